"""Where the lungs are in a frontal radiograph: darker than what is around them, but enclosed by no threshold, so that their shape is looked for."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging.lung_segmentation import Box, Mask

# Two lungs as an upright radiograph shows them, drawn by hand: x, y in shares of their common box. The heart is at the image's right.
_RIGHT_LUNG_X, _RIGHT_LUNG_Y = "36 25 13 5 1 0 8 22 36 39 41 43", "0 3 17 42 72 100 91 83 82 60 30 6"
_LEFT_LUNG_X, _LEFT_LUNG_Y = "64 75 87 95 99 100 94 86 79 69 61 57", "0 3 17 42 72 100 94 88 82 64 42 6"
RIGHT_LUNG_OUTLINE = np.array([_RIGHT_LUNG_X.split(), _RIGHT_LUNG_Y.split()], np.float64).T / 100
LEFT_LUNG_OUTLINE = np.array([_LEFT_LUNG_X.split(), _LEFT_LUNG_Y.split()], np.float64).T / 100
TEMPLATE_SIZE = 128  # a radiograph's sides while its lungs are looked for, pixels
MIN_LIKENESS = 0.2  # correlation of outline and darkness, less the penalties


def segment_radiograph_lungs(image: NDArray[np.uint8]) -> Mask:
    """The lungs of a frontal radiograph [H, W], bone bright; nothing where no pair of lungs stands out.

    An outline of two lungs is laid where what is inside is darkest against what is around it (over place, width and height), then gives way to
    the picture: near its edge a pixel is lung if it is darker than its surroundings. Measured by tests/client/imaging/test_lung_segmentation.py.
    """
    if min(image.shape) < 16 or np.ptp(image) == 0:
        return np.zeros(image.shape, bool)
    dark = _compute_darkness(
        cv2.resize(image, (TEMPLATE_SIZE, TEMPLATE_SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    )
    likeness, box = _match_outline(dark)
    lungs = np.zeros((TEMPLATE_SIZE, TEMPLATE_SIZE), np.uint8)
    if likeness >= MIN_LIKENESS:
        for outline in (RIGHT_LUNG_OUTLINE, LEFT_LUNG_OUTLINE):
            lungs |= _adapt_outline(_fill_outline(outline, box, TEMPLATE_SIZE, TEMPLATE_SIZE), dark)
    return np.asarray(
        cv2.resize(lungs.astype(np.float32), image.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
    )


def _compute_darkness(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much darker than its surroundings each pixel is, in their standard deviations, -2 to 2."""

    def smooth(x: NDArray[Any], sigma: float) -> NDArray[np.float32]:
        return np.asarray(cv2.GaussianBlur(x, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.float32)

    grey = smooth(grey, TEMPLATE_SIZE / 85)
    around = smooth(grey, TEMPLATE_SIZE / 5.3)
    return np.asarray(
        ((around - grey) / (np.sqrt(smooth((grey - around) ** 2, TEMPLATE_SIZE / 5.3)) + 3)).clip(-2, 2),
        np.float32,
    )


def _match_outline(dark: NDArray[np.float32]) -> tuple[float, Box]:
    """The best correlation of the two lungs' outline with `dark`, less what speaks against its place and size, and its box."""
    edge, pad = TEMPLATE_SIZE // 5, TEMPLATE_SIZE // 21
    framed = cv2.copyMakeBorder(
        dark, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=-0.7
    )  # around the picture is no lung
    best, where = -np.inf, (0, TEMPLATE_SIZE, 0, TEMPLATE_SIZE)
    for wide in np.arange(0.7, 1.0, 0.06):
        for high in np.arange(0.55, 1.0, 0.075):
            w, h = int(wide * TEMPLATE_SIZE), int(high * TEMPLATE_SIZE)
            shape = sum(
                _fill_outline(o, (pad, pad + h, pad, pad + w), h + 2 * pad, w + 2 * pad)
                for o in (RIGHT_LUNG_OUTLINE, LEFT_LUNG_OUTLINE)
            )
            like = cv2.matchTemplate(framed, np.asarray(shape, np.float32), cv2.TM_CCOEFF_NORMED)
            y, x = np.arange(like.shape[0]) + pad - edge, np.arange(like.shape[1]) + pad - edge
            odd_y, odd_x = (
                (((y + h / 2) / TEMPLATE_SIZE - 0.48) / 0.12) ** 2,
                (((x + w / 2) / TEMPLATE_SIZE - 0.5) / 0.1) ** 2,
            )
            odd_size = ((wide - 0.84) / 0.1) ** 2 + ((high - 0.8) / 0.12) ** 2
            like = like - 0.045 * (odd_y[:, None] + odd_x[None, :] + odd_size)
            i, j = np.unravel_index(int(like.argmax()), like.shape)
            if like[i, j] > best:
                best, where = float(like[i, j]), (int(y[i]), int(y[i]) + h, int(x[j]), int(x[j]) + w)
    return best, where


def _fill_outline(outline: NDArray[np.float64], box: Box, h: int, w: int) -> NDArray[np.uint8]:
    """An outline (x, y in shares of the box) as a mask [h, w] of 0 and 1; what lies outside is cut off."""
    y0, y1, x0, x1 = box
    points = np.rint(outline * [x1 - x0 - 1, y1 - y0 - 1] + [x0, y0]).astype(np.int32)
    return np.asarray(cv2.fillPoly(np.zeros((h, w), np.uint8), [points], 1), np.uint8)


def _adapt_outline(outline_mask: NDArray[np.uint8], dark: NDArray[np.float32]) -> NDArray[np.uint8]:
    """One lung [FIT, FIT] of 0 and 1, where its laid outline and the darkness together speak for it: one piece, without bays or holes."""
    inside = cv2.distanceTransform(outline_mask, cv2.DIST_L2, 5) - cv2.distanceTransform(
        1 - outline_mask, cv2.DIST_L2, 5
    )  # pixels from the edge
    likely = ((inside / 4).clip(-3, 3) + dark + 0.65 > 0).astype(np.uint8)
    opened = cv2.morphologyEx(likely, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    number, pieces, facts, _ = cv2.connectedComponentsWithStats(opened)
    if number < 2:
        return outline_mask
    piece = (pieces == 1 + facts[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    framed = cv2.copyMakeBorder(piece, 8, 8, 8, 8, cv2.BORDER_CONSTANT)
    closed = cv2.morphologyEx(framed, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13)))
    contours, _ = cv2.findContours(closed[8:-8, 8:-8], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(piece), contours, -1, 1, cv2.FILLED), np.uint8)
