"""Where the body is, by the rule of Robust Multi-Source COVID-19 Detection (arXiv 2604.03320).

The paper takes the area within the body's outer contour for that of the lungs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging.lung_segmentation import Box, apply_window, widen_box
from client.imaging.readers.volume import LazyVolume, Volume

PAPER_MARGIN = 5  # pixels around the box of the body


def segment_paper_body(
    voxels: Iterable[NDArray[Any]], window: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return areas [Z] in pixels and boxes [Z, 4] of the body, as arXiv 2604.03320 finds it.

    Its code reads pictures; the window (in the image's units) that makes pictures of HU is ours.
    """
    areas = []
    boxes = []
    for image in voxels:
        body = _fill_paper_body(apply_window(image, window))
        areas.append(int(np.count_nonzero(body)))
        x, y, width, height = cv2.boundingRect(body)
        boxes.append((y, y + height, x, x + width))
    return np.array(areas, np.float64), np.array(boxes, np.int64)


def find_paper_body_box(boxes: NDArray[np.int64], volume: Volume | LazyVolume) -> Box:
    """Return the box around the boxes [Z, 4] of `segment_paper_body` plus 5 pixels.

    It is the whole slice where no body is found.
    """
    _, H, W = volume.shape
    boxes = boxes[boxes[:, 1] > 0]
    if not len(boxes):
        return 0, H, 0, W
    low = boxes.min(axis=0)
    high = boxes.max(axis=0)
    box = (int(low[0]), int(high[1]), int(low[2]), int(high[3]))
    return widen_box(box, PAPER_MARGIN, PAPER_MARGIN, H, W)


def _fill_paper_body(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the body's filled outer contour [H, W], 0 and 1, by the filters of arXiv 2604.03320."""
    filtered = cv2.erode(cv2.blur(grey, (3, 3)), np.ones((3, 3), np.uint8))
    otsu, _ = cv2.threshold(filtered, 0, 255, cv2.THRESH_OTSU)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    closed = cv2.morphologyEx((filtered > max(otsu / 2, 20)).view(np.uint8), cv2.MORPH_CLOSE, ellipse)
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    body = np.zeros(filtered.shape, np.uint8)
    if contours:
        outline = max(contours, key=cv2.contourArea)
        cv2.drawContours(body, [outline], -1, 1, cv2.FILLED)
    return body
