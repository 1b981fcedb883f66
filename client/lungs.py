"""Where the lungs are: air enclosed by the body, found on a reduced copy of every slice.

HU volumes are cut at -500 HU, pictures by Otsu's threshold over the whole scan (SSFL++, arXiv 2404.01643: enclosed air =
fill_holes(mask) - mask). What lies outside the body's outline (the table's inside, a sleeve) and what is small beside the lungs (bowel gas)
does not count. `paper_areas` and `paper_box` are the first paper's own rule (arXiv 2604.03320), which measures the body instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.readers.volume import Volume

AIR_HU = -500.0
REDUCED = 160  # pixels that the longer side is reduced to at least; 2 to 3 mm a pixel, thinner than a chest wall
SMALL = 0.1  # of the largest air space: smaller ones are gas in the gut, or the oesophagus

Box = tuple[int, int, int, int]  # y0, y1, x0, x1 in pixels; the ends are exclusive
Mask = NDArray[np.bool_]


@dataclass
class Chest:
    """What one look at a scan finds, at the reduced scale [Z, h, w]."""

    lungs: Mask
    body: NDArray[np.int64]  # [Z, 4] y0, y1, x0, x1 of the body's outline; zeros where there is none
    scale: tuple[float, float]  # full pixels in a reduced one (y, x)
    shape: tuple[int, int]  # H, W of the scan


def look(voxels: NDArray[Any]) -> Chest:
    """Lungs and body of `voxels` [Z, H, W] (int16 HU or uint8 grey), in one pass over the slices."""
    Z, H, W = voxels.shape
    step = max(1, max(H, W) // REDUCED)
    h, w = max(1, H // step), max(1, W // step)
    small = voxels if step == 1 else np.stack([cv2.resize(slice_, (w, h), interpolation=cv2.INTER_AREA) for slice_ in voxels])
    if voxels.dtype == np.uint8:
        cut, _ = cv2.threshold(small.reshape(Z * h, w), 0, 255, cv2.THRESH_OTSU)
        tissue = (small > cut).view(np.uint8)
    else:
        tissue = (small > AIR_HU).view(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    enclosed = np.zeros((Z, h, w), bool)
    body = np.zeros((Z, 4), np.int64)
    framed = np.zeros((h + 2, w + 2), np.uint8)
    for z in range(Z):
        # Thin shells go (the table), the largest piece stays (no arms), its hull bounds what can be lung.
        opened = cv2.morphologyEx(tissue[z], cv2.MORPH_OPEN, kernel)
        count, pieces, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
        if count < 2:
            continue
        piece = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        x, y, wide, high, _ = (int(v) for v in stats[piece])
        body[z] = y, y + high, x, x + wide
        points = cv2.findNonZero((pieces == piece).view(np.uint8))
        inside = cv2.fillConvexPoly(np.zeros((h, w), np.uint8), cv2.convexHull(points), 1)
        framed[1:-1, 1:-1] = tissue[z]
        outside = framed.copy()  # the frame is air: a fill from its corner reaches all air that touches the border
        cv2.floodFill(outside, None, (0, 0), 2, flags=4)
        enclosed[z] = (outside[1:-1, 1:-1] == 0) & (inside > 0)
    # The oesophagus and gut are separate air spaces in three dimensions, and small ones; the two lungs may be one or two.
    spaces, number = ndimage.label(enclosed)
    sizes = np.bincount(spaces.ravel(), minlength=number + 1)
    sizes[0] = 0
    keep = sizes >= max(SMALL * sizes.max(), 1)
    return Chest(keep[spaces], body, (H / h, W / w), (H, W))


def areas_of(chest: Chest, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """[Z] mm2 of lung air."""
    pixel = chest.scale[0] * chest.scale[1] * spacing[1] * spacing[2]
    areas: NDArray[np.float64] = np.count_nonzero(chest.lungs, axis=(1, 2)).astype(np.float64) * pixel
    return areas


def lung_areas(volume: Volume) -> NDArray[np.float64]:
    """[Z] mm2 of air inside the body per slice (pixels where the spacing is unknown); zeros where there are no lungs."""
    return areas_of(look(volume.voxels), volume.spacing)


def lung_mask(voxels: NDArray[Any]) -> Mask:
    """The lungs of a scan [Z, H, W] or a slice [H, W] at full size, with their vessels: what a montage outlines."""
    chest = look(voxels if voxels.ndim == 3 else voxels[None])
    H, W = chest.shape
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    masks = np.zeros((len(chest.lungs), H, W), bool)
    for z in np.flatnonzero(chest.lungs.any(axis=(1, 2))):
        closed = cv2.morphologyEx(
            cv2.copyMakeBorder(chest.lungs[z].view(np.uint8), 4, 4, 4, 4, cv2.BORDER_CONSTANT), cv2.MORPH_CLOSE, kernel
        )
        contours, _ = cv2.findContours(closed[4:-4, 4:-4], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        filled = cv2.drawContours(np.zeros(chest.lungs.shape[1:], np.uint8), contours, -1, 255, cv2.FILLED)
        masks[z] = cv2.resize(filled, (W, H), interpolation=cv2.INTER_LINEAR) > 127
    return masks if voxels.ndim == 3 else masks[0]


def _full(box: NDArray[np.int64], chest: Chest, margin: tuple[float, float]) -> Box:
    """A reduced box in full pixels, widened by a margin (y, x), inside the scan."""
    H, W = chest.shape
    (sy, sx), (my, mx) = chest.scale, margin
    y0, y1, x0, x1 = box[0] * sy - my, box[1] * sy + my, box[2] * sx - mx, box[3] * sx + mx
    return max(0, int(y0)), min(H, int(np.ceil(y1))), max(0, int(x0)), min(W, int(np.ceil(x1)))


def body_box_of(chest: Chest) -> Box:
    """The body over the slices that hold lung (over all, where none does); the whole slice where no body is found."""
    lungs = np.count_nonzero(chest.lungs, axis=(1, 2))
    found = chest.body[(chest.body[:, 1] > 0) & ((lungs > SMALL * lungs.max()) | (lungs.max() == 0))]
    if not len(found):
        return 0, chest.shape[0], 0, chest.shape[1]
    # A slice or two with a shadow at the border must not widen the box of all: the 5 % at the ends do not count.
    low, high = np.percentile(found, 5, axis=0), np.percentile(found, 95, axis=0)
    return _full(np.array([low[0], high[1], low[2], high[3]]), chest, chest.scale)


def lung_box_of(chest: Chest, spacing: tuple[float, float, float]) -> Box:
    """The lungs over all slices plus 10 mm (10 pixels where the spacing is unknown); the body where there are none."""
    rows, columns = np.flatnonzero(chest.lungs.any(axis=(0, 2))), np.flatnonzero(chest.lungs.any(axis=(0, 1)))
    if not len(rows):
        return body_box_of(chest)
    return _full(np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]), chest, (10 / spacing[1], 10 / spacing[2]))


def body_box(volume: Volume) -> Box:
    """y0, y1, x0, x1 (ends exclusive) of the body, without table and arms."""
    return body_box_of(look(volume.voxels))


def lung_box(volume: Volume) -> Box:
    """y0, y1, x0, x1 (ends exclusive) of both lungs plus 10 mm."""
    return lung_box_of(look(volume.voxels), volume.spacing)


def _paper_body(volume: Volume, window: tuple[float, float]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Areas [Z] in pixels and boxes [Z, 4] of the body's filled outer contour, as the first paper's code finds it."""
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    areas, boxes = np.zeros(len(volume.voxels)), np.zeros((len(volume.voxels), 4), np.int64)
    for z, voxels in enumerate(volume.voxels):
        grey = shown(voxels, window)
        grey = cv2.erode(cv2.blur(grey, (3, 3)), np.ones((3, 3), np.uint8))
        otsu, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
        closed = cv2.morphologyEx((grey > max(otsu / 2, 20)).view(np.uint8), cv2.MORPH_CLOSE, ellipse)
        contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if contours:
            filled = cv2.drawContours(np.zeros_like(grey), [max(contours, key=cv2.contourArea)], -1, 1, cv2.FILLED)
            areas[z] = np.count_nonzero(filled)
            x, y, wide, high = cv2.boundingRect(filled)
            boxes[z] = y, y + high, x, x + wide
    return areas, boxes


def shown(voxels: NDArray[Any], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Voxels [H, W] as grey 0..255 by a window (low, high) in their own units."""
    low, high = window
    if voxels.dtype == np.uint8 and (low, high) == (0, 255):
        return voxels
    grey = (voxels.astype(np.float32) - low) * (255 / (high - low))
    return np.rint(grey).clip(0, 255).astype(np.uint8)


def paper_areas(volume: Volume, window: tuple[float, float] = (-1000.0, 300.0)) -> NDArray[np.float64]:
    """[Z] mm2 of the body's filled outline: what the first paper's code calls the lung. `window` (HU) is ours: it reads pictures."""
    return _paper_body(volume, window if volume.is_hounsfield else (0, 255))[0] * volume.spacing[1] * volume.spacing[2]


def paper_box(volume: Volume, window: tuple[float, float] = (-1000.0, 300.0)) -> Box:
    """The box of that outline over all slices, plus 5 pixels; the whole slice where there is none."""
    H, W = volume.voxels.shape[1:]
    boxes = _paper_body(volume, window if volume.is_hounsfield else (0, 255))[1]
    boxes = boxes[boxes[:, 1] > 0]
    if not len(boxes):
        return 0, H, 0, W
    low, high = boxes.min(axis=0), boxes.max(axis=0)
    return max(0, int(low[0]) - 5), min(H, int(high[1]) + 5), max(0, int(low[2]) - 5), min(W, int(high[3]) + 5)
