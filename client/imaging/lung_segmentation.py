"""Where the lungs are: air enclosed by the body, found on a reduced copy of every slice.

HU volumes are cut at -500 HU, pictures by Otsu's threshold over the whole scan (SSFL++, arXiv 2404.01643: enclosed air =
fill_holes(mask) - mask). What lies outside the body's outline (the table's inside, a sleeve) and what is small beside the lungs (bowel gas)
does not count. `paper_body` is the first paper's own rule (arXiv 2604.03320), which measures the body instead.
A radiograph's lungs are darker than what is around them, but enclosed by no threshold: client/imaging/lung_segmentation_xr.py looks for their shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.imaging.readers.volume import LazyVolume, Volume

AIR_THRESHOLD_HU = -500.0
MIN_REDUCED_SIDE = (
    160  # pixels that the longer side is reduced to at least; 2 to 3 mm a pixel, thinner than a chest wall
)
MIN_AIR_SPACE_SHARE = 0.1  # of the largest air space: smaller ones are gas in the gut, or the oesophagus
MIN_LUNG_SHARE = 0.04  # share of a picture: with less lung than this, look again for a reason (a chest's share is 0.08 and more)

Box = tuple[int, int, int, int]  # y0, y1, x0, x1 in pixels; the ends are exclusive
Mask = NDArray[np.bool_]


@dataclass
class ChestSegmentation:
    """What one look at a scan finds, at the reduced scale [Z, h, w]."""

    lungs: Mask
    body_boxes: NDArray[np.int64]  # [Z, 4] y0, y1, x0, x1 of the body's outline; zeros where there is none
    reduction: int  # full pixels in a reduced one, each way
    full_shape: tuple[int, int]  # H, W of the scan


def segment_lungs(voxels: Iterable[NDArray[Any]]) -> ChestSegmentation:
    """Lungs and body of the slices `voxels` [Z, H, W] (int16 HU or uint8 grey), of which one at a time need be in memory."""
    small = []
    for image in voxels:
        H, W = image.shape
        step = max(1, max(H, W) // MIN_REDUCED_SIDE)
        h, w = max(1, H // step), max(1, W // step)
        whole = image[
            : h * step, : w * step
        ]  # a whole number of pixels in each reduced one is three times as fast to average
        small.append(cv2.resize(whole, (w, h), interpolation=cv2.INTER_AREA) if step > 1 else image)
    return segment_reduced(np.stack(small), step, (H, W))


def segment_reduced(
    reduced_slices: NDArray[Any], reduction: int, full_shape: tuple[int, int]
) -> ChestSegmentation:
    """Lungs and body of slices [Z, h, w] that were reduced by `step`, or of some of a scan's slices at even distances."""
    Z, h, w = reduced_slices.shape
    H, W = full_shape
    if reduced_slices.dtype != np.uint8:
        lungs, body = _find_enclosed_air(reduced_slices > AIR_THRESHOLD_HU)
        return ChestSegmentation(lungs, body, reduction, (H, W))
    cut, _ = cv2.threshold(reduced_slices.reshape(Z * h, w), 0, 255, cv2.THRESH_OTSU)
    lungs, body = _find_enclosed_air(reduced_slices > cut)
    if (
        np.count_nonzero(lungs) < MIN_LUNG_SHARE * lungs.size
    ):  # a picture cropped so close that the lungs touch its border?
        again, outline = _find_enclosed_air(reduced_slices > cut, from_corners=True)
        if np.count_nonzero(again) >= MIN_LUNG_SHARE * lungs.size:
            return ChestSegmentation(again, outline, reduction, (H, W))
        bright = reduced_slices[
            reduced_slices > cut
        ]  # or black around the scanner's round field, which took the threshold?
        if len(bright):
            cut, _ = cv2.threshold(bright[None], 0, 255, cv2.THRESH_OTSU)
            again, outline = _find_enclosed_air(reduced_slices > cut)
            if np.count_nonzero(again) >= MIN_LUNG_SHARE * lungs.size:
                lungs, body = again, outline
    return ChestSegmentation(lungs, body, reduction, (H, W))


def _find_enclosed_air(solid: Mask, from_corners: bool = False) -> tuple[Mask, NDArray[np.int64]]:
    """Air spaces [Z, h, w] inside the body, and the body's box [Z, 4] in each slice.

    Outside is the air that reaches a slice's border, or (`corners`) only what reaches one of its corners.
    """
    Z, h, w = solid.shape
    tissue = solid.view(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    enclosed = np.zeros((Z, h, w), bool)
    body = np.zeros((Z, 4), np.int64)
    framed = np.full(
        (h + 2, w + 2), int(from_corners), np.uint8
    )  # a frame of air joins all air at the border, one of tissue does not
    for z in range(Z):
        # Thin shells go (the table), the largest piece stays (no arms), its hull bounds what can be lung.
        opened = cv2.morphologyEx(tissue[z], cv2.MORPH_OPEN, kernel)
        contours, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            continue
        outline = max(contours, key=cv2.contourArea)
        x, y, wide, high = cv2.boundingRect(outline)
        body[z] = y, y + high, x, x + wide
        # A close crop shows no table, so there all of the slice may hold lung.
        inside = cv2.fillConvexPoly(np.full((h, w), int(from_corners), np.uint8), cv2.convexHull(outline), 1)
        framed[1:-1, 1:-1] = tissue[z]
        outside = framed.copy()
        for seed in ((1, 1), (w, 1), (1, h), (w, h)) if from_corners else ((0, 0),):
            if outside[seed[1], seed[0]] == 0:
                cv2.floodFill(outside, None, seed, 2, flags=4)
        enclosed[z] = (outside[1:-1, 1:-1] == 0) & (inside > 0)
    # The oesophagus and gut are separate air spaces in three dimensions, and small ones; the two lungs may be one or two.
    flat = np.asarray(enclosed.any(axis=0))
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    if len(rows):
        air = enclosed[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        spaces = ndimage.label(air)[0][air]
        sizes = np.bincount(spaces)
        air[air] = sizes[spaces] >= MIN_AIR_SPACE_SHARE * sizes.max()
    return enclosed, body


def measure_lung_areas(chest: ChestSegmentation, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """[Z] mm2 of lung air."""
    pixel = chest.reduction**2 * spacing[1] * spacing[2]
    return _count_lung_pixels(chest.lungs) * float(pixel)


def _count_lung_pixels(lungs: Mask) -> NDArray[np.float64]:
    """[Z] pixels of lung; slice by slice, which numpy counts ten times as fast as along axes."""
    return np.array([np.count_nonzero(slice_) for slice_ in lungs], np.float64)


def make_lung_mask(voxels: NDArray[Any]) -> Mask:
    """The lungs of a scan [Z, H, W] or a slice [H, W] at full size, with their vessels: what a montage outlines."""
    chest = segment_lungs(voxels if voxels.ndim == 3 else voxels[None])
    Z, h, w = chest.lungs.shape
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    masks = np.zeros((Z, *chest.full_shape), bool)
    for z in np.flatnonzero(chest.lungs.any(axis=(1, 2))):
        closed = cv2.morphologyEx(
            cv2.copyMakeBorder(chest.lungs[z].view(np.uint8), 4, 4, 4, 4, cv2.BORDER_CONSTANT),
            cv2.MORPH_CLOSE,
            kernel,
        )
        contours, _ = cv2.findContours(closed[4:-4, 4:-4], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        filled = cv2.drawContours(np.zeros((h, w), np.uint8), contours, -1, 255, cv2.FILLED)
        large = (
            cv2.resize(filled, (w * chest.reduction, h * chest.reduction), interpolation=cv2.INTER_LINEAR)
            > 127
        )
        masks[z, : h * chest.reduction, : w * chest.reduction] = large
    return masks if voxels.ndim == 3 else masks[0]


def _to_full_size_box(box: NDArray[np.int64], chest: ChestSegmentation, margin: tuple[float, float]) -> Box:
    """A reduced box in full pixels, widened by a margin (y, x), inside the scan."""
    H, W = chest.full_shape
    y0, y1, x0, x1 = box * chest.reduction + np.array([-margin[0], margin[0], -margin[1], margin[1]])
    return max(0, int(y0)), min(H, int(np.ceil(y1))), max(0, int(x0)), min(W, int(np.ceil(x1)))


def find_body_box(chest: ChestSegmentation) -> Box:
    """The body over the slices that hold lung (over all, where none does); the whole slice where no body is found."""
    lungs = _count_lung_pixels(chest.lungs)
    found = chest.body_boxes[
        (chest.body_boxes[:, 1] > 0) & ((lungs > MIN_AIR_SPACE_SHARE * lungs.max()) | (lungs.max() == 0))
    ]
    if not len(found):
        return 0, chest.full_shape[0], 0, chest.full_shape[1]
    # A slice or two with a shadow at the border must not widen the box of all: the 5 % at the ends do not count.
    low, high = np.percentile(found, 5, axis=0), np.percentile(found, 95, axis=0)
    return _to_full_size_box(
        np.array([low[0], high[1], low[2], high[3]]), chest, (chest.reduction, chest.reduction)
    )


def find_lung_box(chest: ChestSegmentation, spacing: tuple[float, float, float]) -> Box:
    """The lungs over all slices plus 10 mm (10 pixels where the spacing is unknown); the body where there are none."""
    rows, columns = np.flatnonzero(chest.lungs.any(axis=(0, 2))), np.flatnonzero(chest.lungs.any(axis=(0, 1)))
    if not len(rows):
        return find_body_box(chest)
    return _to_full_size_box(
        np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]),
        chest,
        (10 / spacing[1], 10 / spacing[2]),
    )


def find_mask_box(mask: NDArray[Any], spacing: tuple[float, float, float]) -> Box | None:
    """The box of a lung mask [Z, H, W] or [H, W] at full size plus 10 mm (10 pixels where the spacing is unknown); None where it is empty."""
    flat = np.any(mask if mask.ndim == 3 else mask[None], axis=0)
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    if not len(rows):
        return None
    y, x = int(np.ceil(10 / spacing[1])), int(np.ceil(10 / spacing[2]))
    H, W = flat.shape
    return (
        max(0, int(rows[0]) - y),
        min(H, int(rows[-1]) + 1 + y),
        max(0, int(columns[0]) - x),
        min(W, int(columns[-1]) + 1 + x),
    )


def label_sides(lungs: NDArray[Any]) -> NDArray[np.uint8]:
    """Lungs [Z, H, W] as 1 (right, at the image's left) and 2 (left), 0 elsewhere: 2-means over the pixels' x (arXiv 2006.01441, severity).

    In one dimension the best two clusters are parted by one cut, so all cuts are tried: no start, no iterations.
    """
    count = np.count_nonzero(lungs, axis=(0, 1)).astype(np.float64)  # [W]
    x = np.arange(len(count))
    n, sums = np.cumsum(count), np.cumsum(count * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(
            sums**2 / n + (sums[-1] - sums) ** 2 / (n[-1] - n), posinf=0
        )  # what 2-means makes largest
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    cut = int(best[len(best) // 2])  # the gap between the lungs leaves all its columns equal: its middle
    return np.where(lungs != 0, np.where(x <= cut, 1, 2), 0).astype(np.uint8)


def segment_paper_body(
    voxels: Iterable[NDArray[Any]], window: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Areas [Z] in pixels and boxes [Z, 4] of the body's filled outer contour, as the first paper's code finds it.

    That code reads pictures; the window (in the image's units) that makes pictures of HU is ours.
    """
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    areas, boxes = [], []
    for image in voxels:
        grey = cv2.erode(cv2.blur(apply_window(image, window), (3, 3)), np.ones((3, 3), np.uint8))
        otsu, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
        closed = cv2.morphologyEx((grey > max(otsu / 2, 20)).view(np.uint8), cv2.MORPH_CLOSE, ellipse)
        contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        areas.append(0)
        boxes.append((0, 0, 0, 0))
        if contours:
            filled = cv2.drawContours(
                np.zeros_like(grey), [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED
            )
            x, y, wide, high = cv2.boundingRect(filled)
            areas[-1], boxes[-1] = int(np.count_nonzero(filled)), (y, y + high, x, x + wide)
    return np.array(areas, np.float64), np.array(boxes, np.int64)


def apply_window(voxels: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Voxels [H, W] as grey 0..255 by a window (low, high) in their own units."""
    low, high = window
    if voxels.dtype == np.uint8 and (low, high) == (0, 255):
        return np.asarray(voxels, np.uint8)
    grey = (voxels.astype(np.float32) - low) * (255 / (high - low))
    return np.asarray(np.rint(grey).clip(0, 255), np.uint8)


def find_paper_body_box(boxes: NDArray[np.int64], volume: Volume | LazyVolume) -> Box:
    """The box of the boxes [Z, 4] of `paper_body` over all slices, plus 5 pixels; the whole slice where there is none."""
    _, H, W = volume.shape
    boxes = boxes[boxes[:, 1] > 0]
    if not len(boxes):
        return 0, H, 0, W
    low, high = boxes.min(axis=0), boxes.max(axis=0)
    return (
        max(0, int(low[0]) - 5),
        min(H, int(high[1]) + 5),
        max(0, int(low[2]) - 5),
        min(W, int(high[3]) + 5),
    )
