"""From a volume to the slices that are kept of it: select, crop, window, resize."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from client import kds, lungs
from client.readers.volume import Volume
from common.schema import Preprocess


@dataclass
class Kept:
    """What preprocessing keeps of a scan, with the facts that a montage and a check need."""

    slices: NDArray[np.uint8]  # [S, size, size]
    indices: NDArray[np.int64]  # [S] into the volume's slices
    areas: NDArray[np.float64]  # [Z] mm2 of lung air (kds_paper: of body)
    box: lungs.Box  # y0, y1, x0, x1 of the crop in the volume's pixels
    notes: list[str]


def slices_of(
    volume: Volume, settings: Preprocess, window: tuple[float, float] | None = None, lung: NDArray[np.uint8] | None = None
) -> Kept:
    """The slices kept of a scan by `settings`: S = settings.slices of a CT, 1 of a radiograph.

    `window` is the cohort's own (low, high) in the image's units and comes first; else `settings.window` for HU and the full 0..255 for
    pictures. `lung` [Z, H, W] is the cohort's own lung mask, for a crop to the lungs; else our finder's. A crop keeps its shape: it is padded
    to a square with its darkest value.
    """
    notes = list(volume.notes)
    shades = window or (settings.window if volume.is_hounsfield else (0.0, 255.0))
    H, W = volume.voxels.shape[1:]
    own = lungs.mask_box(lung, volume.spacing) if lung is not None and settings.crop == "lungs" else None
    if volume.modality == "XR":
        areas, indices = np.zeros(len(volume.voxels)), np.zeros(1, np.int64)
        if settings.crop == "lungs" and not own:
            own = lungs.mask_box(lungs.radiograph_lungs(lungs.shown(volume.voxels[0], shades)), volume.spacing)
        box = (0, H, 0, W) if settings.crop == "none" else own or radiograph_box(volume.voxels[0])
    else:
        paper = settings.selection == "kds_paper"
        if paper:
            outlines, boxes = lungs.paper_body(volume, shades)
            areas = outlines * volume.spacing[1] * volume.spacing[2]
        if not paper or (settings.crop == "lungs" and not own):
            chest = lungs.look(volume.voxels)
        if not paper:
            areas = lungs.areas_of(chest, volume.spacing)
        rng = np.random.default_rng(settings.draw) if settings.draw else None
        indices = kds.select(areas, settings.slices, settings.selection, volume.positions, rng)
        if areas.max() <= 0:
            notes.append(f"No {'body' if paper else 'lung'} was found: slices were taken at even distances.")
        if len(volume.voxels) < settings.slices:
            notes.append(f"Only {len(volume.voxels)} of the {settings.slices} slices wanted: some are repeated.")
        if settings.crop == "none":
            box = (0, H, 0, W)
        elif settings.crop == "lungs":
            box = own or lungs.lung_box_of(chest, volume.spacing)
        else:
            box = lungs.paper_box_of(boxes, volume) if paper else lungs.body_box_of(chest)
    y0, y1, x0, x1 = box
    slices = np.stack([square(lungs.shown(volume.voxels[i, y0:y1, x0:x1], shades), settings.size) for i in indices])
    return Kept(slices, indices, areas, box, notes)


def radiograph_box(image: NDArray[np.uint8]) -> lungs.Box:
    """A radiograph [H, W] without its dark margins (collimator, film edge); the whole where that would leave under half a side."""
    H, W = image.shape
    bright = image > 0.1 * np.percentile(image, 99)
    rows, columns = np.flatnonzero(bright.mean(axis=1) > 0.05), np.flatnonzero(bright.mean(axis=0) > 0.05)
    if not len(rows) or not len(columns) or np.ptp(rows) < H / 2 or np.ptp(columns) < W / 2:
        return 0, H, 0, W
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`image` [h, w] at [size, size]: scaled by one factor, centred, the rest its darkest value."""
    h, w = image.shape
    y0, y1, x0, x1 = place(h, w, size)
    small = cv2.resize(image, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA if size < max(h, w) else cv2.INTER_LINEAR)
    kept = np.full((size, size), image.min(), np.uint8)
    kept[y0:y1, x0:x1] = small
    return kept


def place(h: int, w: int, size: int) -> lungs.Box:
    """Where a crop of h x w pixels lies in its square of `size`: y0, y1, x0, x1, ends exclusive."""
    scale = size / max(h, w)
    wide, high = max(1, round(w * scale)), max(1, round(h * scale))
    y, x = (size - high) // 2, (size - wide) // 2
    return y, y + high, x, x + wide
