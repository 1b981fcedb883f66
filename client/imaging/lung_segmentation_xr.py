"""Where the lungs are in a frontal radiograph: darker than their surroundings, and of a known shape.

No threshold encloses them, so their shape is looked for.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging.lung_segmentation import Box, Mask

# Two lungs as an upright radiograph shows them, drawn by hand: x, y in per cent of their common box. The
# heart is at the image's right.
_RIGHT_LUNG_X = "36 25 13 5 1 0 8 22 36 39 41 43"
_RIGHT_LUNG_Y = "0 3 17 42 72 100 91 83 82 60 30 6"
_LEFT_LUNG_X = "64 75 87 95 99 100 94 86 79 69 61 57"
_LEFT_LUNG_Y = "0 3 17 42 72 100 94 88 82 64 42 6"
RIGHT_LUNG_OUTLINE = np.array([_RIGHT_LUNG_X.split(), _RIGHT_LUNG_Y.split()], np.float64).T / 100
LEFT_LUNG_OUTLINE = np.array([_LEFT_LUNG_X.split(), _LEFT_LUNG_Y.split()], np.float64).T / 100
TEMPLATE_SIZE = 128  # a radiograph's sides while its lungs are looked for, pixels
MIN_SIDE = 16  # pixels: a smaller image shows no lungs
MIN_LIKENESS = 0.2  # correlation of outline and darkness, less the penalties
FRAME_DARKNESS = -0.7  # around the picture is no lung
PENALTY_WEIGHT = 0.045


def segment_radiograph_lungs(image: NDArray[np.uint8]) -> Mask:
    """Return the lungs of a frontal radiograph [H, W], bone bright; nothing where none stand out.

    An outline of two lungs is laid where what is inside is darkest against what is around it (over place,
    width and height). It is then adapted to the picture: near its edge a pixel is lung if it is darker than
    its surroundings. tests/client/imaging/test_lung_segmentation.py measures the result.
    """
    if min(image.shape) < MIN_SIDE or np.ptp(image) == 0:
        return np.zeros(image.shape, bool)
    small = cv2.resize(image, (TEMPLATE_SIZE, TEMPLATE_SIZE), interpolation=cv2.INTER_AREA)
    darkness = _compute_darkness(small.astype(np.float32))
    likeness, box = _match_outline(darkness)
    lungs = np.zeros((TEMPLATE_SIZE, TEMPLATE_SIZE), np.uint8)
    if likeness >= MIN_LIKENESS:
        for outline in (RIGHT_LUNG_OUTLINE, LEFT_LUNG_OUTLINE):
            lungs |= _adapt_outline(_fill_outline(outline, box, TEMPLATE_SIZE, TEMPLATE_SIZE), darkness)
    full_size = cv2.resize(lungs.astype(np.float32), image.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(full_size > 0.5)


def _compute_darkness(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much darker than its surroundings each pixel is, in their standard deviations, -2 to 2."""
    grey = _smooth(grey, TEMPLATE_SIZE / 85)
    surroundings = _smooth(grey, TEMPLATE_SIZE / 5.3)
    deviation = np.sqrt(_smooth((grey - surroundings) ** 2, TEMPLATE_SIZE / 5.3))
    return np.asarray(((surroundings - grey) / (deviation + 3)).clip(-2, 2), np.float32)


def _smooth(image: NDArray[Any], sigma: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.float32)


def _match_outline(darkness: NDArray[np.float32]) -> tuple[float, Box]:
    """Return the best correlation of the lungs' outline with `darkness`, less its penalties, and its box.

    The penalties weigh against places and sizes that are unusual.
    """
    edge = TEMPLATE_SIZE // 5
    pad = TEMPLATE_SIZE // 21
    framed = cv2.copyMakeBorder(darkness, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=FRAME_DARKNESS)
    best_likeness = -np.inf
    best_box = (0, TEMPLATE_SIZE, 0, TEMPLATE_SIZE)
    for relative_width in np.arange(0.7, 1.0, 0.06):
        for relative_height in np.arange(0.55, 1.0, 0.075):
            w = int(relative_width * TEMPLATE_SIZE)
            h = int(relative_height * TEMPLATE_SIZE)
            correlation = cv2.matchTemplate(framed, _draw_template(h, w, pad), cv2.TM_CCOEFF_NORMED)
            y = np.arange(correlation.shape[0]) + pad - edge
            x = np.arange(correlation.shape[1]) + pad - edge
            y_penalty = (((y + h / 2) / TEMPLATE_SIZE - 0.48) / 0.12) ** 2
            x_penalty = (((x + w / 2) / TEMPLATE_SIZE - 0.5) / 0.1) ** 2
            size_penalty = ((relative_width - 0.84) / 0.1) ** 2 + ((relative_height - 0.8) / 0.12) ** 2
            penalty = y_penalty[:, None] + x_penalty[None, :] + size_penalty
            likeness = correlation - PENALTY_WEIGHT * penalty
            i, j = np.unravel_index(int(likeness.argmax()), likeness.shape)
            if likeness[i, j] > best_likeness:
                best_likeness = float(likeness[i, j])
                best_box = (int(y[i]), int(y[i]) + h, int(x[j]), int(x[j]) + w)
    return best_likeness, best_box


def _draw_template(h: int, w: int, pad: int) -> NDArray[np.float32]:
    """Return both lungs as a picture of 0 and 1, their box h x w pixels, with `pad` pixels around it."""
    box = (pad, pad + h, pad, pad + w)
    right = _fill_outline(RIGHT_LUNG_OUTLINE, box, h + 2 * pad, w + 2 * pad)
    left = _fill_outline(LEFT_LUNG_OUTLINE, box, h + 2 * pad, w + 2 * pad)
    return np.asarray(right + left, np.float32)


def _fill_outline(outline: NDArray[np.float64], box: Box, h: int, w: int) -> NDArray[np.uint8]:
    """Return an outline (x, y in shares of the box) as a mask [h, w] of 0 and 1."""
    y0, y1, x0, x1 = box
    points = np.rint(outline * [x1 - x0 - 1, y1 - y0 - 1] + [x0, y0]).astype(np.int32)
    return np.asarray(cv2.fillPoly(np.zeros((h, w), np.uint8), [points], 1), np.uint8)


def _adapt_outline(outline_mask: NDArray[np.uint8], darkness: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return one lung, 0 and 1, where its laid outline and the darkness together speak for it.

    It is one piece, without bays or holes.
    """
    depth_inside = cv2.distanceTransform(outline_mask, cv2.DIST_L2, 5)
    distance_outside = cv2.distanceTransform(1 - outline_mask, cv2.DIST_L2, 5)
    signed_distance = depth_inside - distance_outside  # pixels from the edge
    likely = ((signed_distance / 4).clip(-3, 3) + darkness + 0.65 > 0).astype(np.uint8)
    opening_kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(likely, cv2.MORPH_OPEN, opening_kernel)
    piece_count, pieces, statistics, _ = cv2.connectedComponentsWithStats(opened)
    if piece_count < 2:
        return outline_mask
    largest = 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()
    framed = cv2.copyMakeBorder((pieces == largest).astype(np.uint8), 8, 8, 8, 8, cv2.BORDER_CONSTANT)
    closing_kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13))
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, closing_kernel)
    contours, _ = cv2.findContours(closed[8:-8, 8:-8], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(outline_mask), contours, -1, 1, cv2.FILLED), np.uint8)
