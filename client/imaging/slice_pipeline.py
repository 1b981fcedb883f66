"""From a scan to the slices that are kept of it: look for the lungs, select, crop, window, resize.

The lungs of a long scan are looked for in evenly spaced slices at an eighth of 512 pixels; between them the areas are interpolated. Only the slices
that are kept are read in full. `exact` (and `kds_paper`, always) looks at every slice in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging import lung_segmentation, slice_selection
from client.imaging.lung_segmentation_xr import segment_radiograph_lungs
from client.imaging.readers import LazyVolume, Volume, open_scan, read_scan
from common.config.schema import PreprocessConfig

MAX_SEARCHED_SLICES = {
    "zquantile": 32,
    "kds": 64,
    "even": 64,
}  # slices that the lungs are looked for in, at most
MIN_SEARCH_SIDE = 64  # pixels that the longer side is reduced to at least, by halving
MAX_FULL_SEARCH_SLICES = 32  # slices that are all looked at in full


@dataclass
class PreprocessedScan:
    """What preprocessing keeps of a scan, with the facts that a montage and a check need."""

    slices: NDArray[np.uint8]  # [S, size, size]
    indices: NDArray[np.int64]  # [S] into the volume's slices
    areas: NDArray[np.float64]  # [Z] mm2 of lung air (kds_paper: of body)
    crop_box: lung_segmentation.Box  # y0, y1, x0, x1 of the crop in the volume's pixels
    notes: list[str]


def select_and_crop(
    scan: Volume | LazyVolume,
    settings: PreprocessConfig,
    window: tuple[float, float] | None = None,
    lung_mask: NDArray[np.uint8] | None = None,
) -> PreprocessedScan:
    """The slices kept of a scan by `settings`: S = settings.slices of a CT, 1 of a radiograph.

    `window` is the cohort's own (low, high) in the image's units and comes first; else `settings.window` for HU and the full 0..255 for
    pictures. `lung` [Z, H, W] is the cohort's own lung mask, for a crop to the lungs; else our finder's. A crop keeps its shape: it is padded
    to a square with its darkest value. Raises what the reader raises where a slice of an unread scan cannot be decoded.
    """
    notes = list(scan.notes)
    shades = window or (settings.window if scan.is_hounsfield else (0.0, 255.0))
    Z, H, W = scan.shape
    own = (
        lung_segmentation.find_mask_box(lung_mask, scan.spacing)
        if lung_mask is not None and settings.crop == "lungs"
        else None
    )
    if scan.modality == "XR":
        image = scan.read_slice(0)
        areas, indices = np.zeros(Z), np.zeros(1, np.int64)
        if settings.crop == "lungs" and not own:
            own = lung_segmentation.find_mask_box(
                segment_radiograph_lungs(lung_segmentation.apply_window(image, shades)), scan.spacing
            )
        box = (0, H, 0, W) if settings.crop == "none" else own or find_radiograph_box(image)
    else:
        paper = settings.selection == "kds_paper"
        if paper:
            outlines, boxes = lung_segmentation.segment_paper_body(scan.iter_slices(), shades)
            areas = outlines * scan.spacing[1] * scan.spacing[2]
        if not paper or (settings.crop == "lungs" and not own):
            chest, air = _segment_chest(scan, settings)
        if not paper:
            areas = air
        rng = np.random.default_rng(settings.view) if settings.view else None
        indices = slice_selection.select_slices(
            areas, settings.num_slices, settings.selection, scan.positions, rng
        )
        if areas.max() <= 0:
            notes.append(f"No {'body' if paper else 'lung'} was found: slices were taken at even distances.")
        if settings.num_slices > Z:
            notes.append(f"Only {Z} of the {settings.num_slices} slices wanted: some are repeated.")
        if settings.crop == "none":
            box = (0, H, 0, W)
        elif settings.crop == "lungs":
            box = own or lung_segmentation.find_lung_box(chest, scan.spacing)
        else:
            box = (
                lung_segmentation.find_paper_body_box(boxes, scan)
                if paper
                else lung_segmentation.find_body_box(chest)
            )
    y0, y1, x0, x1 = box
    slices = np.stack(
        [
            letterbox(
                lung_segmentation.apply_window(scan.read_slice(int(i))[y0:y1, x0:x1], shades),
                settings.image_size,
            )
            for i in indices
        ]
    )
    return PreprocessedScan(slices, indices, areas, box, notes)


def extract_slices(
    path: Path,
    series_uid: str | None,
    settings: PreprocessConfig,
    window: tuple[float, float] | None = None,
    get_lung_mask: Callable[[Volume | LazyVolume], NDArray[np.uint8] | None] = lambda scan: None,
) -> tuple[PreprocessedScan, Volume | LazyVolume]:
    """`slices_of` the scan at `path`, and the scan, of which no more is read than that takes; `lung` gives its lung mask.

    Where a slice cannot be decoded all are read, and what is wrong is noted. Raises ConsiliumError where the scan cannot be read.
    """
    scan = open_scan(path, series_uid)
    try:
        return select_and_crop(scan, settings, window, get_lung_mask(scan)), scan
    except Exception:  # decoders fail in ways of their own
        if isinstance(scan, Volume):
            raise
    scan = read_scan(path, series_uid)
    return select_and_crop(scan, settings, window, get_lung_mask(scan)), scan


def _segment_chest(
    scan: Volume | LazyVolume, settings: PreprocessConfig
) -> tuple[lung_segmentation.ChestSegmentation, NDArray[np.float64]]:
    """The lungs and body in the slices looked at, and the area [Z] mm2 of lung air in all."""
    Z, H, W = scan.shape
    if (
        Z > MAX_FULL_SEARCH_SLICES
        and not settings.full_lung_search
        and settings.selection in MAX_SEARCHED_SLICES
    ):
        step = next((step for step in (8, 4, 2) if max(H, W) // step >= MIN_SEARCH_SIDE), 1)
        every = -(-Z // MAX_SEARCHED_SLICES[settings.selection])
        at = np.arange((Z - 1) % every // 2, Z, every)
        chest = lung_segmentation.segment_reduced(scan.read_reduced(at, step), step, (H, W))
        if (
            chest.lungs.mean() >= lung_segmentation.MIN_LUNG_SHARE
        ):  # with less, a chest wall may have been too thin for so few pixels
            return chest, np.interp(
                scan.positions, scan.positions[at], lung_segmentation.measure_lung_areas(chest, scan.spacing)
            )
    chest = lung_segmentation.segment_lungs(scan.iter_slices())
    return chest, lung_segmentation.measure_lung_areas(chest, scan.spacing)


def find_radiograph_box(image: NDArray[np.uint8]) -> lung_segmentation.Box:
    """A radiograph [H, W] without its dark margins (collimator, film edge); the whole where that would leave under half a side."""
    H, W = image.shape
    bright = image > 0.1 * np.percentile(image, 99)
    rows, columns = np.flatnonzero(bright.mean(axis=1) > 0.05), np.flatnonzero(bright.mean(axis=0) > 0.05)
    if not len(rows) or not len(columns) or np.ptp(rows) < H / 2 or np.ptp(columns) < W / 2:
        return 0, H, 0, W
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def letterbox(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`image` [h, w] at [size, size]: scaled by one factor, centred, the rest its darkest value."""
    h, w = image.shape
    y0, y1, x0, x1 = letterbox_box(h, w, size)
    small = cv2.resize(
        image, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA if size < max(h, w) else cv2.INTER_LINEAR
    )
    kept = np.full((size, size), image.min(), np.uint8)
    kept[y0:y1, x0:x1] = small
    return kept


def letterbox_box(h: int, w: int, size: int) -> lung_segmentation.Box:
    """Where a crop of h x w pixels lies in its square of `size`: y0, y1, x0, x1, ends exclusive."""
    scale = size / max(h, w)
    wide, high = max(1, round(w * scale)), max(1, round(h * scale))
    y, x = (size - high) // 2, (size - wide) // 2
    return y, y + high, x, x + wide
