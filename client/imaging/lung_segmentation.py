"""Where the lungs are: air enclosed by the body, found on a reduced copy of every slice.

HU volumes are thresholded at -500 HU, pictures by Otsu's threshold over the whole scan (SSFL++, arXiv
2404.01643: enclosed air = fill_holes(mask) - mask). What lies outside the body's outline (the table's inside,
a sleeve) and what is small beside the lungs (bowel gas) does not count. paper_body.py has the rule of
Robust Multi-Source COVID-19 Detection (arXiv 2604.03320), which measures the body instead. A radiograph's
lungs are darker than their surroundings, but enclosed by no threshold: lung_segmentation_xr.py looks for
their shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

AIR_THRESHOLD_HU = -500.0
# Pixels that the longer side is reduced to at least: 2 to 3 mm each, thinner than a chest wall.
MIN_REDUCED_SIDE = 160
MIN_AIR_SPACE_SHARE = 0.1  # of the largest air space: smaller ones are gas in the gut, or the oesophagus
# Of a picture's pixels: with less lung than this, something went wrong (a chest's share is 0.08 and more).
MIN_LUNG_SHARE = 0.04
LUNG_MARGIN = 10.0  # mm around a box of lungs; pixels where the spacing is unknown

Box = tuple[int, int, int, int]  # y0, y1, x0, x1 in pixels; the ends are exclusive
Mask = NDArray[np.bool_]


@dataclass
class ChestSegmentation:
    """Lungs and body of a scan, at the reduced scale [Z, h, w]."""

    lungs: Mask
    body_boxes: NDArray[np.int64]  # [Z, 4] y0, y1, x0, x1 of the body's outline; zeros where there is none
    reduction: int  # full pixels in a reduced one, each way
    full_shape: tuple[int, int]  # H, W of the scan


def segment_lungs(voxels: Iterable[NDArray[Any]]) -> ChestSegmentation:
    """Segment lungs and body in slices [H, W] (int16 HU or uint8 grey), one at a time in memory."""
    reduced_slices = []
    for image in voxels:
        H, W = image.shape
        reduction = max(1, max(H, W) // MIN_REDUCED_SIDE)
        if reduction > 1:
            h = max(1, H // reduction)
            w = max(1, W // reduction)
            # Whole blocks of pixels are averaged three times as fast.
            blocks = image[: h * reduction, : w * reduction]
            image = cv2.resize(blocks, (w, h), interpolation=cv2.INTER_AREA)
        reduced_slices.append(image)
    return segment_reduced(np.stack(reduced_slices), reduction, (H, W))


def segment_reduced(
    reduced_slices: NDArray[Any], reduction: int, full_shape: tuple[int, int]
) -> ChestSegmentation:
    """Segment lungs and body in slices [Z, h, w] that were reduced by `reduction`."""
    if reduced_slices.dtype == np.uint8:
        lungs, body_boxes = _segment_pictures(reduced_slices)
    else:
        lungs, body_boxes = _find_enclosed_air(reduced_slices > AIR_THRESHOLD_HU)
    return ChestSegmentation(lungs, body_boxes, reduction, full_shape)


def measure_lung_areas(chest: ChestSegmentation, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """Return [Z] mm2 of lung air."""
    pixel_area = chest.reduction**2 * spacing[1] * spacing[2]
    return _count_lung_pixels(chest.lungs) * float(pixel_area)


def make_lung_mask(voxels: NDArray[Any]) -> Mask:
    """Return the lungs of a scan [Z, H, W] or a slice [H, W] at full size, with their vessels."""
    if voxels.ndim == 2:
        return np.asarray(make_lung_mask(voxels[None])[0])
    chest = segment_lungs(voxels)
    masks = np.zeros((len(voxels), *chest.full_shape), bool)
    for z in np.flatnonzero(chest.lungs.any(axis=(1, 2))):
        filled = _close_and_fill(chest.lungs[z].view(np.uint8))
        height = filled.shape[0] * chest.reduction
        width = filled.shape[1] * chest.reduction
        enlarged = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
        masks[z, :height, :width] = enlarged > 127
    return masks


def find_body_box(chest: ChestSegmentation) -> Box:
    """Return the body's box over the slices with lung (over all, where none has).

    It is the whole slice where no body is found.
    """
    lung_pixels = _count_lung_pixels(chest.lungs)
    has_body = chest.body_boxes[:, 1] > 0
    if lung_pixels.max() > 0:
        has_body &= lung_pixels > MIN_AIR_SPACE_SHARE * lung_pixels.max()
    boxes = chest.body_boxes[has_body]
    if not len(boxes):
        H, W = chest.full_shape
        return 0, H, 0, W
    # A slice or two with a shadow at the border must not widen the box of all: the 5 % at the ends do not
    # count.
    low, high = np.percentile(boxes, (5, 95), axis=0)
    reduced_box = np.array([low[0], high[1], low[2], high[3]])
    return _to_full_size_box(reduced_box, chest, (chest.reduction, chest.reduction))


def find_lung_box(chest: ChestSegmentation, spacing: tuple[float, float, float]) -> Box:
    """Return the lungs' box over all slices plus 10 mm; the body's where there are no lungs.

    Where the spacing is unknown the margin is 10 pixels.
    """
    reduced_box = _find_bounding_box(np.asarray(chest.lungs.any(axis=0)))
    if reduced_box is None:
        return find_body_box(chest)
    margin = (LUNG_MARGIN / spacing[1], LUNG_MARGIN / spacing[2])
    return _to_full_size_box(np.array(reduced_box), chest, margin)


def find_mask_box(mask: NDArray[Any], spacing: tuple[float, float, float]) -> Box | None:
    """Return the box of a lung mask [Z, H, W] or [H, W] plus 10 mm; None where the mask is empty.

    Where the spacing is unknown the margin is 10 pixels.
    """
    stack = mask if mask.ndim == 3 else mask[None]
    H, W = stack.shape[1:]
    box = _find_bounding_box(np.asarray(np.any(stack, axis=0)))
    if box is None:
        return None
    y_margin = int(np.ceil(LUNG_MARGIN / spacing[1]))
    x_margin = int(np.ceil(LUNG_MARGIN / spacing[2]))
    return widen_box(box, y_margin, x_margin, H, W)


def label_sides(lungs: NDArray[Any]) -> NDArray[np.uint8]:
    """Label lungs [Z, H, W] as 1 (right, at the image's left) and 2 (left) by 2-means over the pixels' x.

    In one dimension a single cut parts the best two clusters, so all cuts are tried: no start, no iterations.
    Source: the severity of arXiv 2006.01441.
    """
    pixels_by_column = np.count_nonzero(lungs, axis=(0, 1)).astype(np.float64)  # [W]
    x = np.arange(len(pixels_by_column))
    n = np.cumsum(pixels_by_column)
    sums = np.cumsum(pixels_by_column * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The variance between the two sides of a cut, which 2-means makes largest.
        variance = np.nan_to_num(sums**2 / n + (sums[-1] - sums) ** 2 / (n[-1] - n), posinf=0)
    best_cuts = np.flatnonzero(variance >= variance.max() * (1 - 1e-12))
    # The columns of the gap between the lungs are all equal: the middle one is taken.
    cut = int(best_cuts[len(best_cuts) // 2])
    return np.where(lungs != 0, np.where(x <= cut, 1, 2), 0).astype(np.uint8)


def apply_window(voxels: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Return voxels [H, W] as grey 0..255 by a window (low, high) in their own units."""
    low, high = window
    if voxels.dtype == np.uint8 and (low, high) == (0, 255):
        return np.asarray(voxels, np.uint8)
    grey = (voxels.astype(np.float32) - low) * (255 / (high - low))
    return np.asarray(np.rint(grey).clip(0, 255), np.uint8)


def widen_box(box: Box, y_margin: int, x_margin: int, H: int, W: int) -> Box:
    """Return the box with a margin on each side, inside the slice."""
    y0, y1, x0, x1 = box
    return max(0, y0 - y_margin), min(H, y1 + y_margin), max(0, x0 - x_margin), min(W, x1 + x_margin)


def _segment_pictures(pictures: NDArray[np.uint8]) -> tuple[Mask, NDArray[np.int64]]:
    """Return lungs [Z, h, w] and body boxes [Z, 4] of grey slices, after up to three attempts."""
    Z, h, w = pictures.shape
    threshold, _ = cv2.threshold(pictures.reshape(Z * h, w), 0, 255, cv2.THRESH_OTSU)
    first_attempt = _find_enclosed_air(pictures > threshold)
    if _has_enough_lung(first_attempt[0]):
        return first_attempt
    # The pictures may be cropped so close that the lungs touch the border.
    attempt = _find_enclosed_air(pictures > threshold, from_corners=True)
    if _has_enough_lung(attempt[0]):
        return attempt
    # The threshold may lie between the black around the scanner's round field and everything within.
    bright = pictures[pictures > threshold]
    if len(bright):
        threshold, _ = cv2.threshold(bright[None], 0, 255, cv2.THRESH_OTSU)
        attempt = _find_enclosed_air(pictures > threshold)
        if _has_enough_lung(attempt[0]):
            return attempt
    return first_attempt


def _has_enough_lung(lungs: Mask) -> bool:
    return bool(np.count_nonzero(lungs) >= MIN_LUNG_SHARE * lungs.size)


def _find_enclosed_air(solid: Mask, from_corners: bool = False) -> tuple[Mask, NDArray[np.int64]]:
    """Return the air spaces [Z, h, w] inside the body, and the body's box [Z, 4] in each slice.

    Outside is the air that reaches a slice's border, or with `from_corners` only what reaches one of its
    corners.
    """
    Z, h, w = solid.shape
    tissue = solid.view(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    enclosed = np.zeros((Z, h, w), bool)
    body_boxes = np.zeros((Z, 4), np.int64)
    for z in range(Z):
        # Thin shells go (the table), the largest piece stays (no arms), its hull bounds what can be lung.
        opened = cv2.morphologyEx(tissue[z], cv2.MORPH_OPEN, kernel)
        contours, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            continue
        outline = max(contours, key=cv2.contourArea)
        x, y, width, height = cv2.boundingRect(outline)
        body_boxes[z] = y, y + height, x, x + width
        # A close crop shows no table, so there all of the slice may hold lung.
        inside = np.full((h, w), int(from_corners), np.uint8)
        cv2.fillConvexPoly(inside, cv2.convexHull(outline), 1)
        enclosed[z] = ~_find_outside_or_tissue(tissue[z], from_corners) & (inside > 0)
    _remove_small_spaces(enclosed)
    return enclosed, body_boxes


def _find_outside_or_tissue(tissue: NDArray[np.uint8], from_corners: bool) -> Mask:
    """Return [h, w] what is tissue, or air that reaches the border (with `from_corners`, a corner)."""
    h, w = tissue.shape
    # A frame of air joins all air at the border, one of tissue does not.
    framed = np.full((h + 2, w + 2), int(from_corners), np.uint8)
    framed[1:-1, 1:-1] = tissue
    seeds = [(0, 0)]
    if from_corners:
        seeds = [(1, 1), (w, 1), (1, h), (w, h)]
    for x, y in seeds:
        if framed[y, x] == 0:
            cv2.floodFill(framed, None, (x, y), 2, flags=4)
    return np.asarray(framed[1:-1, 1:-1] != 0)


def _remove_small_spaces(enclosed: Mask) -> None:
    """Remove, in place, air spaces [Z, h, w] that are small beside the largest.

    In three dimensions the oesophagus and the gut are separate spaces; the two lungs may be one or two.
    """
    box = _find_bounding_box(np.asarray(enclosed.any(axis=0)))
    if box is None:
        return
    y0, y1, x0, x1 = box
    air = enclosed[:, y0:y1, x0:x1]
    labels = ndimage.label(air)[0][air]
    sizes = np.bincount(labels)
    air[air] = sizes[labels] >= MIN_AIR_SPACE_SHARE * sizes.max()


def _count_lung_pixels(lungs: Mask) -> NDArray[np.float64]:
    """Return [Z] pixels of lung; slice by slice, which numpy counts ten times as fast as along axes."""
    return np.array(list(map(np.count_nonzero, lungs)), np.float64)


def _close_and_fill(lungs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return one slice's lungs [h, w], 0 and 255, with gaps closed and vessels filled."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    framed = cv2.copyMakeBorder(lungs, 4, 4, 4, 4, cv2.BORDER_CONSTANT)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, kernel)
    contours, _ = cv2.findContours(closed[4:-4, 4:-4], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(lungs), contours, -1, 255, cv2.FILLED), np.uint8)


def _find_bounding_box(mask: Mask) -> Box | None:
    """Return the box of what is set in a mask [h, w], None where nothing is."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _to_full_size_box(
    reduced_box: NDArray[np.floating] | NDArray[np.integer],
    chest: ChestSegmentation,
    margin: tuple[float, float],
) -> Box:
    """Return a reduced box in full pixels, widened by a margin (y, x), inside the scan."""
    H, W = chest.full_shape
    y_margin, x_margin = margin
    y0, y1, x0, x1 = reduced_box * chest.reduction + np.array([-y_margin, y_margin, -x_margin, x_margin])
    return max(0, int(y0)), min(H, int(np.ceil(y1))), max(0, int(x0)), min(W, int(np.ceil(x1)))
