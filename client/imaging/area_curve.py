"""The curve of area against slice number, with the chosen slices, as a panel of the montage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from client.imaging.drawing_style import (
    AREA_COLOUR,
    AXIS_COLOUR,
    CHOSEN_COLOUR,
    FAINT_COLOUR,
    LUNG_COLOUR,
    PANEL_COLOUR,
    TEXT_COLOUR,
    load_font,
)
from client.imaging.readers import Volume
from client.imaging.slice_pipeline import PreprocessedScan
from common.config.schema import PreprocessConfig

# The curve is drawn so many times larger, then reduced: Pillow's lines have no smooth edges.
SUPERSAMPLING = 3
# Pixels around the curve.
SIDE = 16
TOP = 40
BOTTOM = 30
DOT_RADIUS = 4.5
END_LABEL_WIDTH = 60  # pixels at each end of the axis that are kept for its label


@dataclass(frozen=True)
class _Curve:
    """The points of the curve in a panel of width x height pixels."""

    width: int
    height: int
    x: NDArray[np.float64]  # [Z]
    y: NDArray[np.float64]  # [Z]
    chosen: list[int]  # ascending, each once

    @property
    def floor(self) -> int:
        """The y of the axis."""
        return self.height - BOTTOM


def draw_area_curve(
    volume: Volume, preprocessed: PreprocessedScan, settings: PreprocessConfig, size: tuple[int, int]
) -> Image.Image:
    """Draw area against slice number in a panel of `size` (width, height); the chosen slices are marked."""
    width, height = size
    unit, unit_name = _choose_area_unit(volume)
    areas = preprocessed.areas / unit
    Z = len(areas)
    largest = max(float(areas.max()), 1e-9)
    curve = _Curve(
        width=width,
        height=height,
        x=SIDE + (np.arange(Z) + 0.5) / Z * (width - 2 * SIDE),
        y=height - BOTTOM - areas / largest * (height - TOP - BOTTOM),
        chosen=sorted(set(preprocessed.indices.tolist())),
    )
    panel = _draw_lines(curve)
    measured = "body area" if settings.selection == "kds_paper" else "lung air area"
    title = f"{measured} by slice, largest {largest:.3g} {unit_name}"
    ImageDraw.Draw(panel).text((SIDE, 10), title, TEXT_COLOUR, load_font(14))
    _draw_axis_labels(panel, curve, ("feet", "head") if volume.is_hounsfield else ("first", "last"))
    return panel


def _choose_area_unit(volume: Volume) -> tuple[float, str]:
    """Return the unit in mm2, or in pixels where the spacing is unknown, and its name."""
    if volume.spacing[1:] != (1.0, 1.0):
        return 100.0, "sq cm"
    return 1000.0, "thousand pixels"


def _draw_lines(curve: _Curve) -> Image.Image:
    """Draw the curve, the axis, and a line with a dot for each chosen slice."""
    scale = SUPERSAMPLING
    panel = Image.new("RGB", (curve.width * scale, curve.height * scale), PANEL_COLOUR)
    pen = ImageDraw.Draw(panel)
    floor = scale * curve.floor
    points = [(scale * x, scale * y) for x, y in zip(curve.x, curve.y, strict=True)]
    if len(points) > 1:
        pen.polygon([(points[0][0], floor), *points, (points[-1][0], floor)], fill=AREA_COLOUR)
        pen.line(points, fill=LUNG_COLOUR, width=2 * scale, joint="curve")
    axis = [(scale * SIDE, floor), (scale * (curve.width - SIDE), floor)]
    pen.line(axis, fill=AXIS_COLOUR, width=scale)
    radius = DOT_RADIUS * scale
    for index in curve.chosen:
        x, y = points[index]
        pen.line([(x, floor), (x, y)], fill=CHOSEN_COLOUR, width=scale)
        dot = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(dot, fill=CHOSEN_COLOUR, outline=PANEL_COLOUR, width=scale)
    return panel.resize((curve.width, curve.height), Image.Resampling.LANCZOS)


def _draw_axis_labels(panel: Image.Image, curve: _Curve, ends: tuple[str, str]) -> None:
    """Label the first and the last slice, and number the chosen ones where there is room."""
    pen = ImageDraw.Draw(panel)
    font = load_font(12)
    y = curve.floor + 8
    first_end, last_end = ends
    pen.text((SIDE, y), f"1 ({first_end})", FAINT_COLOUR, font)
    last_label = f"({last_end}) {len(curve.x)}"
    pen.text((curve.width - SIDE - pen.textlength(last_label, font), y), last_label, FAINT_COLOUR, font)
    left_limit = SIDE + END_LABEL_WIDTH
    right_limit = curve.width - SIDE - END_LABEL_WIDTH
    previous_end = -100.0
    for index in curve.chosen:
        number = str(index + 1)
        number_width = pen.textlength(number, font)
        start = curve.x[index] - number_width / 2
        if start > max(previous_end + 6, left_limit) and start + number_width < right_limit:
            pen.text((start, y), number, CHOSEN_COLOUR, font)
            previous_end = start + number_width
