"""From a scan to the slices that are kept of it: look for the lungs, select, crop, window, resize.

In a long scan the lungs are looked for in evenly spaced slices at an eighth of 512 pixels, and the areas
between these are interpolated; only the slices that are kept are read in full. `full_lung_search` (and
`kds_paper`, always) looks at every slice in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging import lung_segmentation, slice_selection
from client.imaging.lung_segmentation import Box, ChestSegmentation
from client.imaging.lung_segmentation_xr import segment_radiograph_lungs
from client.imaging.paper_body import find_paper_body_box, segment_paper_body
from client.imaging.readers import LazyVolume, Volume, open_scan, read_scan
from common.config.schema import PreprocessConfig

MAX_SEARCHED_SLICES = {"zquantile": 32, "kds": 64, "even": 64}  # by selection, in a search of some slices
MIN_SEARCH_SIDE = 64  # pixels that the longer side keeps, when it is halved for the search
MAX_FULL_SEARCH_SLICES = 32  # a scan of no more slices is searched in full
SEARCH_REDUCTIONS = (8, 4, 2)

Window = tuple[float, float]  # low, high in the image's units: shown as 0 and 255
GREY_WINDOW: Window = (0.0, 255.0)


@dataclass
class PreprocessedScan:
    """What preprocessing keeps of a scan, and how it was chosen."""

    slices: NDArray[np.uint8]  # [S, size, size]
    indices: NDArray[np.int64]  # [S] into the volume's slices
    areas: NDArray[np.float64]  # [Z] mm2 of lung air (kds_paper: of body)
    crop_box: Box  # y0, y1, x0, x1 of the crop in the volume's pixels
    notes: list[str]


@dataclass
class _Selection:
    """The slices and the part of them that are kept."""

    indices: NDArray[np.int64]  # [S]
    areas: NDArray[np.float64]  # [Z] mm2
    crop_box: Box


@dataclass
class _MeasuredChest:
    segmentation: ChestSegmentation
    areas: NDArray[np.float64]  # [Z] mm2 of lung air


@dataclass
class _MeasuredBody:
    boxes: NDArray[np.int64]  # [Z, 4]
    areas: NDArray[np.float64]  # [Z] mm2 within the body's outline


def extract_slices(
    path: Path,
    series_uid: str | None,
    settings: PreprocessConfig,
    window: Window | None = None,
    get_lung_mask: Callable[[Volume | LazyVolume], NDArray[np.uint8] | None] = lambda scan: None,
) -> tuple[PreprocessedScan, Volume | LazyVolume]:
    """Apply `select_and_crop` to the scan at `path`; return its result and the scan.

    No more is read than that takes. Where a slice cannot be decoded all are read, and what is wrong is noted.

    Raises:
        ConsiliumError: The scan cannot be read.
    """
    scan = open_scan(path, series_uid)
    try:
        return select_and_crop(scan, settings, window, get_lung_mask(scan)), scan
    except Exception:  # decoders fail in ways of their own
        if isinstance(scan, Volume):
            raise
    scan = read_scan(path, series_uid)
    return select_and_crop(scan, settings, window, get_lung_mask(scan)), scan


def select_and_crop(
    scan: Volume | LazyVolume,
    settings: PreprocessConfig,
    window: Window | None = None,
    lung_mask: NDArray[np.uint8] | None = None,
) -> PreprocessedScan:
    """Return the slices to keep of a scan: `settings.num_slices` of a CT, one of a radiograph.

    `window` is the cohort's own and comes first; else `settings.window` for HU and the full 0..255 for
    pictures. `lung_mask` [Z, H, W] is the cohort's own, for a crop to the lungs; else the lungs are
    segmented. A crop keeps its shape: it is padded to a square with its darkest value. Raises what the reader
    raises where a slice of a scan that was only opened cannot be decoded.
    """
    notes = list(scan.notes)
    window = choose_window(scan, settings, window)
    mask_box = None
    if lung_mask is not None and settings.crop == "lungs":
        mask_box = lung_segmentation.find_mask_box(lung_mask, scan.spacing)
    if scan.modality == "XR":
        selection = _select_from_radiograph(scan, settings, window, mask_box)
    else:
        selection = _select_from_ct(scan, settings, window, mask_box)
        notes += _note_selection(scan, settings, selection)
    y0, y1, x0, x1 = selection.crop_box
    slices = []
    for z in selection.indices:
        crop = scan.read_slice(int(z))[y0:y1, x0:x1]
        slices.append(letterbox(lung_segmentation.apply_window(crop, window), settings.image_size))
    return PreprocessedScan(np.stack(slices), selection.indices, selection.areas, selection.crop_box, notes)


def choose_window(scan: Volume | LazyVolume, settings: PreprocessConfig, window: Window | None) -> Window:
    """Return the cohort's own window, else the settings' for HU, else the full range of grey values."""
    if window is not None:
        return window
    if scan.is_hounsfield:
        return settings.window
    return GREY_WINDOW


def find_radiograph_box(image: NDArray[np.uint8]) -> Box:
    """Return the box of a radiograph [H, W] without its dark margins (collimator, film edge).

    It is the whole image where less than half of a side would be left.
    """
    H, W = image.shape
    is_bright = image > 0.1 * np.percentile(image, 99)
    rows = np.flatnonzero(is_bright.mean(axis=1) > 0.05)
    columns = np.flatnonzero(is_bright.mean(axis=0) > 0.05)
    if not len(rows) or not len(columns) or np.ptp(rows) < H / 2 or np.ptp(columns) < W / 2:
        return 0, H, 0, W
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def letterbox(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return `image` [h, w] at [size, size]: scaled by one factor, centred, the rest its darkest value."""
    h, w = image.shape
    y0, y1, x0, x1 = letterbox_box(h, w, size)
    interpolation = cv2.INTER_AREA if size < max(h, w) else cv2.INTER_LINEAR
    square = np.full((size, size), image.min(), np.uint8)
    square[y0:y1, x0:x1] = cv2.resize(image, (x1 - x0, y1 - y0), interpolation=interpolation)
    return square


def letterbox_box(h: int, w: int, size: int) -> Box:
    """Return where a crop of h x w pixels lies in its square of `size`."""
    scale = size / max(h, w)
    height = max(1, round(h * scale))
    width = max(1, round(w * scale))
    top = (size - height) // 2
    left = (size - width) // 2
    return top, top + height, left, left + width


def _select_from_radiograph(
    scan: Volume | LazyVolume, settings: PreprocessConfig, window: Window, mask_box: Box | None
) -> _Selection:
    """Select the one image; crop it to the lungs, or to the part within its dark margins."""
    Z, H, W = scan.shape
    image = scan.read_slice(0)
    box: Box | None = mask_box
    if settings.crop == "none":
        box = (0, H, 0, W)
    elif settings.crop == "lungs" and box is None:
        lungs = segment_radiograph_lungs(lung_segmentation.apply_window(image, window))
        box = lung_segmentation.find_mask_box(lungs, scan.spacing)
    if box is None:
        box = find_radiograph_box(image)
    return _Selection(indices=np.zeros(1, np.int64), areas=np.zeros(Z), crop_box=box)


def _select_from_ct(
    scan: Volume | LazyVolume, settings: PreprocessConfig, window: Window, mask_box: Box | None
) -> _Selection:
    """Select slices by the areas of their lungs (kds_paper: of the body), and crop them."""
    paper_body = None
    chest = None
    if settings.selection == "kds_paper":
        paper_body = _measure_paper_body(scan, window)
    if paper_body is None or (settings.crop == "lungs" and mask_box is None):
        chest = _measure_chest(scan, settings)
    measured = paper_body or chest
    assert measured is not None
    rng = np.random.default_rng(settings.view) if settings.view else None
    indices = slice_selection.select_slices(
        measured.areas, settings.num_slices, settings.selection, scan.positions, rng
    )
    _, H, W = scan.shape
    if settings.crop == "none":
        box = (0, H, 0, W)
    elif mask_box is not None:
        box = mask_box
    elif settings.crop == "lungs":
        assert chest is not None
        box = lung_segmentation.find_lung_box(chest.segmentation, scan.spacing)
    elif paper_body is not None:
        box = find_paper_body_box(paper_body.boxes, scan)
    else:
        assert chest is not None
        box = lung_segmentation.find_body_box(chest.segmentation)
    return _Selection(indices, measured.areas, box)


def _note_selection(
    scan: Volume | LazyVolume, settings: PreprocessConfig, selection: _Selection
) -> list[str]:
    """Return notes on a selection that could not be made as the settings ask for."""
    notes = []
    if selection.areas.max() <= 0:
        missing = "body" if settings.selection == "kds_paper" else "lung"
        notes.append(f"No {missing} was found: slices were taken at even distances.")
    Z = scan.shape[0]
    if settings.num_slices > Z:
        notes.append(f"Only {Z} of the {settings.num_slices} slices wanted: some are repeated.")
    return notes


def _measure_paper_body(scan: Volume | LazyVolume, window: Window) -> _MeasuredBody:
    """Measure the body in every slice, as Robust Multi-Source COVID-19 Detection (arXiv 2604.03320) does."""
    pixel_counts, boxes = segment_paper_body(scan.iter_slices(), window)
    return _MeasuredBody(boxes, pixel_counts * scan.spacing[1] * scan.spacing[2])


def _measure_chest(scan: Volume | LazyVolume, settings: PreprocessConfig) -> _MeasuredChest:
    """Segment lungs and body in some slices, or in all, and measure the lungs' area in all."""
    if (
        scan.shape[0] > MAX_FULL_SEARCH_SLICES
        and not settings.full_lung_search
        and settings.selection in MAX_SEARCHED_SLICES
    ):
        chest = _search_some_slices(scan, MAX_SEARCHED_SLICES[settings.selection])
        # With less lung than this, a chest wall may have been too thin for so few pixels.
        if chest.segmentation.lungs.mean() >= lung_segmentation.MIN_LUNG_SHARE:
            return chest
    segmentation = lung_segmentation.segment_lungs(scan.iter_slices())
    return _MeasuredChest(segmentation, lung_segmentation.measure_lung_areas(segmentation, scan.spacing))


def _search_some_slices(scan: Volume | LazyVolume, max_slices: int) -> _MeasuredChest:
    """Segment evenly spaced, reduced slices, and interpolate the lungs' area between them."""
    Z, H, W = scan.shape
    reduction = 1
    for candidate in SEARCH_REDUCTIONS:
        if max(H, W) // candidate >= MIN_SEARCH_SIDE:
            reduction = candidate
            break
    step = -(-Z // max_slices)
    searched = np.arange((Z - 1) % step // 2, Z, step)
    segmentation = lung_segmentation.segment_reduced(
        scan.read_reduced(searched, reduction), reduction, (H, W)
    )
    searched_areas = lung_segmentation.measure_lung_areas(segmentation, scan.spacing)
    areas = np.interp(scan.positions, scan.positions[searched], searched_areas)
    return _MeasuredChest(segmentation, areas)
