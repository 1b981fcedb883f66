"""A made-up chest CT, drawn from ellipses as one scanner would image it. No pixel is a patient's.

Everything is drawn hard-edged in Hounsfield units on the scan's own grid, with a few array operations a
volume, and softened by the scanner's kernel afterwards. Lesions may be faint, and healthy lungs have
look-alikes (nodules, dependent atelectasis, crowded vessels), so that telling them apart is neither hopeless
nor trivial.

Two generators are used: `patient_rng` draws the anatomy, which is the same for a patient's two scans, and
`visit_rng` the disease, the position and the noise. The order of the draws is part of the phantom: changing
it changes every scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from client.phantom.scanner import Scanner, image_by_scanner

Rng = np.random.Generator
AIR_HU = -1000
FAT_HU = -95
MUSCLE_HU = 45
RIB_HU = 420
VERTEBRA_HU = 230
SPINAL_CANAL_HU = 20
TABLE_HU = -150
AORTA_HU = 50
TRACHEA_HU = -990
CONSOLIDATION_HU = 40  # of a lung without air
RIB_PERIOD = 30  # mm along z
VESSEL_SEGMENTS = 8  # of a tapering vessel


@dataclass
class GroundTruth:
    """What was drawn, on the voxels' grid: what a reader of the scan should find."""

    # [Z, N, N] uint8: 0 none, 1 the patient's right lung, 2 the left one. Lesions belong to their lung.
    lungs: np.ndarray
    lesion: np.ndarray  # [Z, N, N] bool


class Grid(NamedTuple):
    """Where the voxels lie in the patient and on the table."""

    x: np.ndarray  # [N, N] float32, mm, to the patient's left
    y: np.ndarray  # [N, N] float32, mm, to the patient's back
    t: np.ndarray  # [Z] float32, 0 to 1 from the feet's end to the head's
    table_x: np.ndarray  # [1, N] float32, mm
    table_y: np.ndarray  # [N, 1] float32, mm
    pixel_mm: float


class Body(NamedTuple):
    """The trunk: a rounded box."""

    half_width: float  # mm
    half_depth: float  # mm
    fat: float  # thickness of the fat, as a fraction of the half width
    depth: np.ndarray  # [Z, N, N] float32, distance from the skin in half widths; above 0 inside
    lung_height: np.ndarray  # [Z] float32, 0 at the lungs' base and 1 at their apex


class Lungs(NamedTuple):
    """The lungs' air spaces and what runs through them."""

    mask: np.ndarray  # [Z, N, N] bool
    sides: np.ndarray  # [Z, N, N] uint8: 1 right, 2 left
    rim: np.ndarray  # [Z, N, N] float32: 0 in the middle of a lung, 1 at its border
    vessels: np.ndarray  # [Z, N, N] uint8, 0 to 255
    crowded: bool  # vessels are crowded at the bases, which looks like disease


def draw_chest(
    patient_rng: Rng, visit_rng: Rng, scanner: Scanner, covid: bool, num_slices: int, num_pixels: int
) -> tuple[np.ndarray, GroundTruth]:
    """Draw one scan, feet to head: voxels [Z, N, N] int16 HU, and what was drawn."""
    grid = _make_grid(visit_rng, scanner, num_slices, num_pixels)
    body, hu = _draw_body(patient_rng, grid, num_slices * scanner.slice_spacing)
    lungs = _draw_lungs(patient_rng, visit_rng, grid, body)
    x, y = grid.x, grid.y
    hu[:, (x - 14) ** 2 + (y - 0.4 * body.half_depth) ** 2 < 12**2] = AORTA_HU
    lungs = lungs._replace(mask=lungs.mask & (hu < AORTA_HU - 1))

    texture = _draw_smooth_noise(visit_rng, num_slices, num_pixels, max(8, num_pixels // 8))
    air = -865 + visit_rng.normal(0, 15) + 45 * (y / body.half_depth) + 14 * texture
    filled = _draw_look_alikes(visit_rng, grid, body, lungs, texture, covid)
    lesion = np.zeros_like(filled)
    if covid:
        lesion = _draw_lesions(visit_rng, grid, lungs, texture)
        ground_glass = np.minimum(lesion * np.clip(1 + 0.15 * texture, 0.5, 1.3), 0.95)
        filled = np.maximum(filled, ground_glass)
    hu = np.where(lungs.mask, air + filled * (CONSOLIDATION_HU - air), hu)
    trachea_slices = (body.lung_height > 0.55) & (body.lung_height < 1.0)
    trachea = x**2 + (y - 0.1 * body.half_depth) ** 2 < 8**2
    hu[trachea_slices] = np.where(trachea, TRACHEA_HU, hu[trachea_slices])
    voxels = image_by_scanner(visit_rng, hu, scanner)
    return voxels, GroundTruth(lungs.sides * lungs.mask, (lesion > 0.1) & lungs.mask)


def compute_lesion_weights(lesions: np.ndarray, grid: Grid, ragged: np.ndarray) -> np.ndarray:
    """Return how much of each voxel is lesion, [Z, N, N] in 0 to 1.

    Above 0.5 in the lungs is the lesion mask.

    `lesions` [L, 7]: centre x, y (mm) and t, radii in x, y (mm) and t, strength. `ragged` [Z, N, N]: noise
    that makes borders irregular.
    """
    weight = np.zeros((len(grid.t), *grid.x.shape), np.float32)
    for centre_x, centre_y, centre_t, radius_x, radius_y, radius_t, strength in lesions:
        near = np.flatnonzero(np.abs(grid.t - centre_t) < 1.4 * radius_t)
        in_plane = ((grid.x - centre_x) / radius_x) ** 2 + ((grid.y - centre_y) / radius_y) ** 2
        along_z = (((grid.t[near] - centre_t) / radius_t) ** 2).astype(np.float32)
        distance = in_plane.astype(np.float32) + along_z[:, None, None] + 0.3 * ragged[near]
        weight[near] = np.maximum(weight[near], strength * np.clip(1.5 - distance, 0, 1))
    return weight


def _make_grid(visit_rng: Rng, scanner: Scanner, num_slices: int, num_pixels: int) -> Grid:
    pixel_mm = scanner.field_of_view / num_pixels
    axis = ((np.arange(num_pixels) - (num_pixels - 1) / 2) * pixel_mm).astype(np.float32)
    t = ((np.arange(num_slices) + 0.5) / num_slices).astype(np.float32)
    angle = np.deg2rad(scanner.rotation + visit_rng.normal(0, 1.5))
    shift_y, shift_x = np.array(scanner.patient_shift) + visit_rng.normal(0, 4, 2)
    table_y = axis[:, None] - shift_y
    table_x = axis[None, :] - shift_x
    x = (np.cos(angle) * table_x + np.sin(angle) * table_y).astype(np.float32)
    y = (np.cos(angle) * table_y - np.sin(angle) * table_x).astype(np.float32)
    return Grid(x, y, t, table_x, table_y, pixel_mm)


def _draw_body(patient_rng: Rng, grid: Grid, height: float) -> tuple[Body, np.ndarray]:
    """Draw fat, muscle inside it, ribs as an interrupted ring, the spine and the table. `height` in mm."""
    x, y, t = grid.x, grid.y, grid.t
    half_width = patient_rng.uniform(150, 168)
    half_depth = patient_rng.uniform(104, 122)
    fat = patient_rng.uniform(0.05, 0.13)
    base = patient_rng.uniform(0.03, 0.10)
    apex = patient_rng.uniform(0.90, 0.97)
    radius = (np.abs(x / half_width) ** 2.5 + np.abs(y / half_depth) ** 2.5) ** 0.4
    girth = 1.0 - 0.10 * np.clip(t - 0.7, 0, 1) + 0.03 * np.clip(0.3 - t, 0, 1)
    depth = girth[:, None, None].astype(np.float32) - radius
    hu = np.full(depth.shape, AIR_HU, np.float32)
    hu[depth > 0] = FAT_HU
    hu[depth > fat] = MUSCLE_HU
    turn = np.abs(np.arctan2(x, y)) * 3.2
    phase = 2 * np.pi * t * height / RIB_PERIOD + patient_rng.uniform(0, 6)
    ribs = np.cos(turn[None] - phase[:, None, None]) > 0.35
    hu[(np.abs(depth - fat - 0.05) < 0.03) & ribs] = RIB_HU
    hu[:, x**2 + (y - 0.66 * half_depth) ** 2 < 17**2] = VERTEBRA_HU
    hu[:, x**2 + (y - 0.66 * half_depth - 21) ** 2 < 8**2] = SPINAL_CANAL_HU
    table_surface = grid.table_y - half_depth * 1.03 - 6 + (grid.table_x / 60) ** 2
    hu[:, (np.abs(table_surface) < 3) & (np.abs(grid.table_x) < 190)] = TABLE_HU
    return Body(half_width, half_depth, fat, depth, (t - base) / (apex - base)), hu


def _draw_lungs(patient_rng: Rng, visit_rng: Rng, grid: Grid, body: Body) -> Lungs:
    """Draw two lungs from the base to the apex, a dome of diaphragm below them, the heart between them."""
    x, y, height = grid.x, grid.y, body.lung_height
    half_width, half_depth = body.half_width, body.half_depth
    growth = np.sqrt(np.clip(1 - np.clip(height, 0, 1) ** 2.5, 0, 1)) * (height > 0)
    dome = 0.95 * np.sqrt(np.clip(1 - height / patient_rng.uniform(0.25, 0.4), 0, 1))
    heart_in_plane = ((x - 0.13 * half_width) / (0.36 * half_width)) ** 2
    heart_in_plane = heart_in_plane + ((y + 0.2 * half_depth) / (0.42 * half_depth)) ** 2
    heart = heart_in_plane + ((height - 0.25) / 0.32)[:, None, None] ** 2 < 1
    shape = body.depth.shape
    mask = np.zeros(shape, bool)
    rim = np.zeros(shape, np.float32)
    sides = np.zeros(shape, np.uint8)
    vessels = np.zeros(shape, np.uint8)
    crowded = visit_rng.random() < 0.3
    size = np.maximum(growth, 1e-3)[:, None, None]
    dome_size = np.maximum(dome, 1e-3)[:, None, None]
    for side, label, width in ((-1, 1, 0.40), (1, 2, 0.37)):
        centre_x = side * 0.45 * half_width
        radius_x = width * half_width
        radius_y = 0.76 * half_depth
        ellipse = ((x - centre_x) / (radius_x * size)) ** 2 + (y / (radius_y * size)) ** 2
        diaphragm_x = ((x - centre_x * 0.95) / (radius_x * dome_size)) ** 2
        diaphragm = diaphragm_x + ((y + 0.2 * half_depth) / (radius_y * dome_size)) ** 2 < 1
        lung = (ellipse < 1) & ~diaphragm & ~heart & (body.depth > body.fat + 0.10)
        mask |= lung
        sides[lung] = label
        rim = np.where(lung, ellipse, rim)
        inside = np.argwhere(lung)
        if len(inside):
            num_vessels = 34 if crowded else 24
            ends = inside[visit_rng.integers(len(inside), size=num_vessels)].astype(float)
            root = np.argmin(np.abs(y) + np.abs(x - centre_x * 0.55))
            hilum = np.array([0.5 * len(grid.t), *np.unravel_index(root, x.shape)], float)
            vessels = np.maximum(vessels, _draw_vessels(visit_rng, shape, grid.pixel_mm, hilum, ends))
    return Lungs(mask, sides, rim, vessels, crowded)


def _draw_vessels(
    rng: Rng, shape: tuple[int, ...], pixel_mm: float, hilum: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Draw tapering tubes from a hilum to `ends` [V, 3] (pixels.

    Z, y, x); returns [Z, N, N] uint8, 0 to 255.
    """
    canvas = np.zeros(shape, np.uint8)
    along = np.linspace(0, 1, VESSEL_SEGMENTS + 1)[None, :, None]
    lengths = np.linalg.norm(ends - hilum, axis=1)
    bend = rng.normal(0, 0.05, (len(ends), 1, 3)) * lengths[:, None, None]
    points = hilum + (ends - hilum)[:, None] * along + bend * np.sin(np.pi * along)
    for tube in points:
        for segment in range(VESSEL_SEGMENTS):
            middle_z = (tube[segment, 0] + tube[segment + 1, 0]) / 2
            z = int(np.clip(round(middle_z), 0, shape[0] - 1))
            start = (16 * tube[segment, :0:-1]).astype(int).tolist()  # OpenCV counts in sixteenths of a pixel
            end = (16 * tube[segment + 1, :0:-1]).astype(int).tolist()
            width = max(1, round((5.0 - 3.5 * segment / 8) / pixel_mm))
            brightness = 200 if segment < 4 else 120
            cv2.line(canvas[z], start, end, brightness, width, cv2.LINE_AA, 4)
    return canvas


def _draw_smooth_noise(rng: Rng, num_slices: int, num_pixels: int, grain: int) -> np.ndarray:
    """Draw smooth noise of unit spread, [Z, N, N] float32; its blobs have `num_pixels / grain` pixels."""
    coarse = rng.standard_normal((num_slices, grain, grain), dtype=np.float32)
    coarse[1:] = 0.8 * coarse[1:] + 0.6 * coarse[:-1]  # neighbouring slices resemble each other
    size = (num_pixels, num_pixels)
    return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC) for plane in coarse])


def _draw_look_alikes(
    rng: Rng, grid: Grid, body: Body, lungs: Lungs, texture: np.ndarray, covid: bool
) -> np.ndarray:
    """Draw what healthy lungs have too; returns the fraction of each voxel that is not air, [Z, N, N]."""
    filled = np.zeros_like(body.depth)
    num_nodules = rng.integers(1, 3) if rng.random() < 0.35 else 0
    for _ in range(num_nodules):
        nodule = _place_spot(rng, lungs, grid, (5, 10), 1.0)
        filled = np.maximum(filled, compute_lesion_weights(nodule, grid, 0 * texture))
    atelectasis_rate = 0.3 if covid else 0.45
    if rng.random() < atelectasis_rate:  # a grey band along the back
        band = np.clip((lungs.rim - rng.uniform(0.7, 0.85)) * 4, 0, 1)
        band = band * (grid.y > 0.3 * body.half_depth) * np.clip(1.1 - body.lung_height, 0, 1)[:, None, None]
        filled = np.maximum(filled, rng.uniform(0.1, 0.35) * band * np.clip(1 + 0.3 * texture, 0.3, 1.5))
    vessel_density = 0.7 if lungs.crowded else 0.8
    vessels = lungs.vessels / np.float32(255) * vessel_density
    return np.asarray(np.maximum(filled, vessels))


def _draw_lesions(rng: Rng, grid: Grid, lungs: Lungs, texture: np.ndarray) -> np.ndarray:
    """Draw the lesions of a COVID scan; returns their weights [Z, N, N].

    A strength of 0.35 is ground glass of about -550 HU, 0.8 is consolidation.
    """
    strength = rng.uniform(0.4, 0.9)
    spots = []
    for _ in range(rng.integers(4, 11)):
        spot_strength = strength * rng.uniform(0.8, 1.15)
        spots.append(_place_spot(rng, lungs, grid, (16, 42), spot_strength))
    return compute_lesion_weights(np.concatenate(spots), grid, texture)


def _place_spot(
    rng: Rng, lungs: Lungs, grid: Grid, radius_range: tuple[float, float], strength: float
) -> np.ndarray:
    """Draw one row for `compute_lesion_weights`: in the lungs, preferably at the rim and the base.

    `radius_range` in mm. Returns [1, 7], or [0, 7] where there is no lung.
    """
    inside = np.flatnonzero(lungs.mask)
    if not len(inside):
        return np.zeros((0, 7))
    candidates = inside[rng.integers(len(inside), size=40)]
    z, rows, columns = np.unravel_index(candidates, lungs.mask.shape)
    odds = lungs.rim[z, rows, columns] ** 2 * (1.2 - grid.t[z])
    k = rng.choice(len(candidates), p=odds / odds.sum())
    centre = (grid.x[rows[k], columns[k]], grid.y[rows[k], columns[k]], grid.t[z[k]])
    radii = rng.uniform(*radius_range, 2)
    return np.array([[*centre, *radii, rng.uniform(0.06, 0.15), strength]])
