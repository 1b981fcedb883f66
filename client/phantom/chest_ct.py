"""A made-up chest CT, drawn from ellipses as one scanner would see it; no pixel is a patient's.

Everything is drawn hard-edged in Hounsfield units on the scan's own grid, a few array operations a volume, and softened by the scanner's
kernel afterwards. Lesions may be faint, and healthy lungs have look-alikes (nodules, dependent atelectasis, crowded vessels), so that
telling them apart is neither hopeless nor trivial.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class GroundTruth:
    """What was drawn, on the voxels' grid: what a reader of the scan should find."""

    lungs: (
        np.ndarray
    )  # [Z, N, N] uint8: 0 none, 1 the patient's right lung, 2 the left one; lesions belong to their lung
    lesion: np.ndarray  # [Z, N, N] bool


@dataclass(frozen=True)
class Scanner:
    """How one hospital's scanner sees a chest."""

    manufacturer: str
    field_of_view: float  # mm
    slice_spacing: float  # mm between slices
    noise_sd: float  # HU, standard deviation before the kernel
    kernel_strength: float  # below 0: pixels of Gaussian blur; above 0: strength of sharpening
    hu_offset: float  # HU
    patient_shift: tuple[float, float]  # mm (y, x) of the patient off the centre
    rotation: float  # degrees
    feet_first: bool = False  # feet first: mirrored rows, slice order against z
    rle_compressed: bool = False  # RLE


def _smooth_noise(rng: np.random.Generator, num_slices: int, num_pixels: int, grain: int) -> np.ndarray:
    """Smooth noise of unit spread, `[Z, N, N]` float32, with blobs of about `pixels / grain`."""
    coarse = rng.standard_normal((num_slices, grain, grain), dtype=np.float32)
    coarse[1:] = 0.8 * coarse[1:] + 0.6 * coarse[:-1]  # neighbouring slices resemble each other
    return np.stack([cv2.resize(c, (num_pixels, num_pixels), interpolation=cv2.INTER_CUBIC) for c in coarse])


def compute_lesion_weights(
    lesions: np.ndarray, x: np.ndarray, y: np.ndarray, t: np.ndarray, ragged: np.ndarray
) -> np.ndarray:
    """How much of each voxel is lesion, `[Z, N, N]` in 0..1; thresholded at 0.5 inside the lungs it is the lesion mask.

    `lesions [L, 7]`: centre x, y (mm), t (0..1 along z), radii in x, y (mm) and t, strength. `x`, `y`: `[N, N]` mm; `t`: `[Z]`;
    `ragged [Z, N, N]`: noise that makes borders irregular.
    """
    weight = np.zeros((len(t), *x.shape), np.float32)
    for cx, cy, ct, rx, ry, rt, strength in lesions:
        near = np.flatnonzero(np.abs(t - ct) < 1.4 * rt)
        flat = (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).astype(np.float32)
        distance = flat + (((t[near] - ct) / rt) ** 2).astype(np.float32)[:, None, None] + 0.3 * ragged[near]
        weight[near] = np.maximum(weight[near], strength * np.clip(1.5 - distance, 0, 1))
    return weight


def _draw_vessels(
    rng: np.random.Generator, shape: tuple[int, int, int], mm: float, hilum: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Tapering tubes from a hilum to `ends [V, 3]` (pixels: z, y, x), `[Z, N, N]` uint8 0..255."""
    canvas = np.zeros(shape, np.uint8)
    along = np.linspace(0, 1, 9)[None, :, None]
    bend = rng.normal(0, 0.05, (len(ends), 1, 3)) * np.linalg.norm(ends - hilum, axis=1)[:, None, None]
    points = hilum + (ends - hilum)[:, None] * along + bend * np.sin(np.pi * along)
    for tube in points:
        for k in range(len(tube) - 1):
            z = int(np.clip(round((tube[k, 0] + tube[k + 1, 0]) / 2), 0, shape[0] - 1))
            a, b = (16 * tube[k, :0:-1]).astype(int), (16 * tube[k + 1, :0:-1]).astype(int)
            width = max(1, round((5.0 - 3.5 * k / 8) / mm))
            cv2.line(canvas[z], a.tolist(), b.tolist(), 200 if k < 4 else 120, width, cv2.LINE_AA, 4)
    return canvas


def draw_chest(
    patient_rng: np.random.Generator,
    visit_rng: np.random.Generator,
    scanner: Scanner,
    covid: bool,
    num_slices: int,
    num_pixels: int,
) -> tuple[np.ndarray, GroundTruth]:
    """One scan, feet to head: voxels `[Z, N, N]` int16 HU and what was drawn.

    `person` draws the anatomy (the same for a patient's two scans), `visit` the disease, the position and the noise.
    """
    mm = scanner.field_of_view / num_pixels
    axis = ((np.arange(num_pixels) - (num_pixels - 1) / 2) * mm).astype(np.float32)
    t = ((np.arange(num_slices) + 0.5) / num_slices).astype(np.float32)
    angle = np.deg2rad(scanner.rotation + visit_rng.normal(0, 1.5))
    dy, dx = np.array(scanner.patient_shift) + visit_rng.normal(0, 4, 2)
    table_y, table_x = axis[:, None] - dy, axis[None, :] - dx
    x = (np.cos(angle) * table_x + np.sin(angle) * table_y).astype(
        np.float32
    )  # mm; x to the patient's left, y to the back
    y = (np.cos(angle) * table_y - np.sin(angle) * table_x).astype(np.float32)

    # The body: a rounded box of fat, muscle inside, ribs as an interrupted ring, spine, table.
    a, b = patient_rng.uniform(150, 168), patient_rng.uniform(104, 122)
    fat, lo, hi = (
        patient_rng.uniform(0.05, 0.13),
        patient_rng.uniform(0.03, 0.10),
        patient_rng.uniform(0.90, 0.97),
    )
    radius = (np.abs(x / a) ** 2.5 + np.abs(y / b) ** 2.5) ** 0.4
    girth = (1.0 - 0.10 * np.clip(t - 0.7, 0, 1) + 0.03 * np.clip(0.3 - t, 0, 1))[:, None, None].astype(
        np.float32
    )
    depth = girth - radius  # [Z, N, N], of the half width; above 0 inside
    hu = np.full(depth.shape, -1000, np.float32)
    hu[depth > 0] = -95
    hu[depth > fat] = 45
    turn = np.abs(np.arctan2(x, y)) * 3.2
    ribs = (
        np.cos(
            turn[None]
            - (2 * np.pi * t * num_slices * scanner.slice_spacing / 30 + patient_rng.uniform(0, 6))[
                :, None, None
            ]
        )
        > 0.35
    )
    hu[(np.abs(depth - fat - 0.05) < 0.03) & ribs] = 420
    hu[:, x**2 + (y - 0.66 * b) ** 2 < 17**2] = 230
    hu[:, x**2 + (y - 0.66 * b - 21) ** 2 < 8**2] = 20
    hu[:, (np.abs(table_y - b * 1.03 - 6 + (table_x / 60) ** 2) < 3) & (np.abs(table_x) < 190)] = -150

    # Two lungs that grow from the apex to the base, where a dome of diaphragm fills them from below; heart, aorta, trachea.
    u = (t - lo) / (hi - lo)
    grow = np.sqrt(np.clip(1 - np.clip(u, 0, 1) ** 2.5, 0, 1)) * (u > 0)
    dome = 0.95 * np.sqrt(np.clip(1 - u / patient_rng.uniform(0.25, 0.4), 0, 1))
    heart = ((x - 0.13 * a) / (0.36 * a)) ** 2 + ((y + 0.2 * b) / (0.42 * b)) ** 2 + ((u - 0.25) / 0.32)[
        :, None, None
    ] ** 2 < 1
    lungs, rim = np.zeros(depth.shape, bool), np.zeros(depth.shape, np.float32)
    sides, tubes = np.zeros(depth.shape, np.uint8), np.zeros(depth.shape, np.uint8)
    crowded = visit_rng.random() < 0.3  # vessels crowded at the bases: a look-alike
    for side, wide in ((-1, 0.40), (1, 0.37)):
        cx, rx, ry = side * 0.45 * a, wide * a, 0.76 * b
        size = np.maximum(grow, 1e-3)[:, None, None]
        ellipse = ((x - cx) / (rx * size)) ** 2 + (y / (ry * size)) ** 2
        top = np.maximum(dome, 1e-3)[:, None, None]
        below = ((x - cx * 0.95) / (rx * top)) ** 2 + ((y + 0.2 * b) / (ry * top)) ** 2 < 1
        lung = (ellipse < 1) & ~below & ~heart & (depth > fat + 0.10)
        lungs |= lung
        sides[lung] = 1 if side < 0 else 2
        rim = np.where(lung, ellipse, rim)
        inside = np.argwhere(lung)
        if len(inside):
            ends = inside[visit_rng.integers(len(inside), size=34 if crowded else 24)].astype(float)
            root = np.argmin(np.abs(y) + np.abs(x - cx * 0.55))
            hilum = np.array([0.5 * num_slices, *np.unravel_index(root, x.shape)], float)
            tubes = np.maximum(tubes, _draw_vessels(visit_rng, hu.shape, mm, hilum, ends))
    hu[:, (x - 14) ** 2 + (y - 0.4 * b) ** 2 < 12**2] = 50
    lungs &= hu < 49

    texture = _smooth_noise(visit_rng, num_slices, num_pixels, max(8, num_pixels // 8))
    air = -865 + visit_rng.normal(0, 15) + 45 * (y / b) + 14 * texture
    filled = np.zeros_like(hu)  # the share of a voxel that is not air, by disease or look-alike
    for _ in range(visit_rng.integers(1, 3) if visit_rng.random() < 0.35 else 0):  # nodules, in anybody
        filled = np.maximum(
            filled,
            compute_lesion_weights(
                _place_spot(visit_rng, lungs, rim, x, y, t, 5, 10, 1.0), x, y, t, 0 * texture
            ),
        )
    if visit_rng.random() < (0.3 if covid else 0.45):  # dependent atelectasis: a grey band along the back
        band = (
            np.clip((rim - visit_rng.uniform(0.7, 0.85)) * 4, 0, 1)
            * (y > 0.3 * b)
            * np.clip(1.1 - u, 0, 1)[:, None, None]
        )
        filled = np.maximum(
            filled, visit_rng.uniform(0.1, 0.35) * band * np.clip(1 + 0.3 * texture, 0.3, 1.5)
        )
    filled = np.maximum(filled, tubes / np.float32(255) * (0.7 if crowded else 0.8))
    lesion = np.zeros_like(filled)
    if covid:
        strength = visit_rng.uniform(0.4, 0.9)  # 0.35: ground glass of about -550 HU; 0.8: consolidation
        found = [
            _place_spot(visit_rng, lungs, rim, x, y, t, 16, 42, strength * visit_rng.uniform(0.8, 1.15))
            for _ in range(visit_rng.integers(4, 11))
        ]
        lesion = compute_lesion_weights(np.concatenate(found), x, y, t, texture)
        filled = np.maximum(filled, np.minimum(lesion * np.clip(1 + 0.15 * texture, 0.5, 1.3), 0.95))
    hu = np.where(lungs, air + filled * (40 - air), hu)
    hu[(u > 0.55) & (u < 1.0)] = np.where(x**2 + (y - 0.1 * b) ** 2 < 8**2, -990, hu[(u > 0.55) & (u < 1.0)])

    # The scanner: noise before the kernel, so that it has the kernel's grain.
    hu += (
        scanner.noise_sd
        * visit_rng.uniform(0.8, 1.25)
        * visit_rng.standard_normal(hu.shape, dtype=np.float32)
    )
    for z in range(num_slices):
        soft = cv2.GaussianBlur(hu[z], (0, 0), max(0.5, -scanner.kernel_strength))
        hu[z] = soft if scanner.kernel_strength < 0 else hu[z] + scanner.kernel_strength * (hu[z] - soft)
    voxels = np.clip(np.rint(hu + scanner.hu_offset), -1024, 3071).astype(np.int16)
    return voxels, GroundTruth(sides * lungs, (lesion > 0.1) & lungs)


def _place_spot(
    rng: np.random.Generator,
    lungs: np.ndarray,
    rim: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    t: np.ndarray,
    low: float,
    high: float,
    strength: float,
) -> np.ndarray:
    """One row for `lesion_weights`: a place in the lungs, rather at the rim and the base, and radii between `low` and `high` mm."""
    inside = np.flatnonzero(lungs)
    if not len(inside):
        return np.zeros((0, 7))
    some = inside[rng.integers(len(inside), size=40)]
    z, rows, columns = np.unravel_index(some, lungs.shape)
    odds = rim[z, rows, columns] ** 2 * (1.2 - t[z])
    k = rng.choice(len(some), p=odds / odds.sum())
    place = (x[rows[k], columns[k]], y[rows[k], columns[k]], t[z[k]])
    return np.array([[*place, *rng.uniform(low, high, 2), rng.uniform(0.06, 0.15), strength]])
