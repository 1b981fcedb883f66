"""A picture of what preprocessing keeps of one scan: slices with the lungs' outline, and the area curve.

It shows a patient's pixels: it is written where a person at the centre asks for it, and nowhere else.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from client.imaging.area_curve import draw_area_curve
from client.imaging.drawing_style import (
    CHOSEN_COLOUR,
    FAINT_COLOUR,
    LUNG_COLOUR,
    PAGE_COLOUR,
    TEXT_COLOUR,
    load_font,
)
from client.imaging.lung_segmentation import Box
from client.imaging.masks import find_lung_mask
from client.imaging.readers import Volume, read_scan
from client.imaging.slice_pipeline import PreprocessedScan, Window, choose_window, extract_slices, letterbox
from common.config.schema import PreprocessConfig
from common.utils.errors import ConsiliumError

# Pixels.
PAGE_WIDTH = 1200
MARGIN = 24
GAP = 8
HEADER_HEIGHT = 76
CURVE_HEIGHT = 190
NOTE_HEIGHT = 22
MAX_TILE_SIDE = 640
NOTE_WIDTH = 150  # characters


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a page lie, in pixels."""

    columns: int
    side: int  # of a tile
    curve_top: int
    page_height: int

    def locate_tile(self, index: int) -> tuple[int, int]:
        """Return x, y of a tile's upper left corner."""
        row, column = divmod(index, self.columns)
        return MARGIN + column * (self.side + GAP), HEADER_HEIGHT + row * (self.side + GAP)


def write_montage(
    path: Path, settings: PreprocessConfig, out_path: Path, window: Window | None = None
) -> Path:
    """Draw the scan at `path` as `settings` keep it, as a PNG; `window` is the cohort's own.

    Raises:
        ConsiliumError: The scan cannot be read, or the picture cannot be written.
    """
    preprocessed, scan = extract_slices(Path(path), None, settings, window)
    volume = scan if isinstance(scan, Volume) else read_scan(Path(path))
    page = draw_montage(volume, preprocessed, settings, window)
    try:
        Path(out_path).parent.mkdir(parents=True, exist_ok=True)
        page.save(out_path, format="PNG")
    except OSError as error:
        raise ConsiliumError(
            f"the montage cannot be written to {out_path} ({error.strerror}); choose another folder"
        ) from error
    return Path(out_path)


def draw_montage(
    volume: Volume,
    preprocessed: PreprocessedScan,
    settings: PreprocessConfig,
    window: Window | None = None,
) -> Image.Image:
    """Draw the montage as a picture of PAGE_WIDTH pixels."""
    is_radiograph = volume.modality == "XR"
    notes = [line for note in preprocessed.notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    layout = _plan_layout(len(preprocessed.slices), is_radiograph, len(notes))
    page = Image.new("RGB", (PAGE_WIDTH, layout.page_height), PAGE_COLOUR)
    pen = ImageDraw.Draw(page)
    title = "Radiograph"
    if not is_radiograph:
        title = f"{len(preprocessed.slices)} of {len(volume.voxels)} slices, {settings.selection}"
    pen.text((MARGIN, 18), title, TEXT_COLOUR, load_font(24))
    pen.text(
        (MARGIN, 48), _describe_scan(volume, preprocessed, settings, window), FAINT_COLOUR, load_font(15)
    )

    masks = find_lung_mask(volume, is_ct=not is_radiograph)[preprocessed.indices] > 0
    for index, (picture, mask) in enumerate(zip(preprocessed.slices, masks, strict=True)):
        x, y = layout.locate_tile(index)
        page.paste(_draw_tile(picture, mask, preprocessed.crop_box, layout.side), (x, y))
        if not is_radiograph:
            total = f"of {len(volume.voxels)}" if layout.side > 200 else ""
            _draw_label(pen, (x + 8, y + layout.side - 26), f"{preprocessed.indices[index] + 1}", total)
    if not is_radiograph:
        size = (PAGE_WIDTH - 2 * MARGIN, CURVE_HEIGHT)
        page.paste(draw_area_curve(volume, preprocessed, settings, size), (MARGIN, layout.curve_top))
    first_note = layout.page_height - MARGIN + 2 - NOTE_HEIGHT * len(notes)
    for index, line in enumerate(notes):
        pen.text((MARGIN, first_note + NOTE_HEIGHT * index), line, CHOSEN_COLOUR, load_font(14))
    return page


def _plan_layout(tile_count: int, is_radiograph: bool, note_count: int) -> _Layout:
    """Return the layout of a page with so many tiles and lines of notes."""
    columns = min(tile_count, 4 if tile_count <= 8 else 8)
    width = PAGE_WIDTH - 2 * MARGIN - (columns - 1) * GAP
    side = min(width // columns, MAX_TILE_SIDE)
    rows = -(-tile_count // columns)
    tiles_bottom = HEADER_HEIGHT + rows * (side + GAP)
    curve_height = 0 if is_radiograph else CURVE_HEIGHT + 20
    page_height = tiles_bottom + curve_height + NOTE_HEIGHT * note_count + MARGIN
    return _Layout(columns, side, tiles_bottom + 8, page_height)


def _describe_scan(
    volume: Volume, preprocessed: PreprocessedScan, settings: PreprocessConfig, window: Window | None
) -> str:
    """Return one line with the scan's size, its crop and its window."""
    _, H, W = volume.shape
    z, y, x = volume.spacing
    size = f"{W} x {H} pixels"
    if (y, x) != (1.0, 1.0):
        size += f" of {x:.2f} x {y:.2f} mm"
    if volume.modality == "CT" and z != 1.0:
        size += f", slices {z:.2f} mm apart"
    y0, y1, x0, x1 = preprocessed.crop_box
    low, high = choose_window(volume, settings, window)
    parts = (
        size,
        f"crop {settings.crop} {x1 - x0} x {y1 - y0}",
        f"window {low:g} to {high:g}",
        f"kept at {settings.image_size} x {settings.image_size}",
    )
    return "   |   ".join(parts)


def _draw_tile(picture: NDArray[np.uint8], mask: NDArray[np.bool_], box: Box, side: int) -> Image.Image:
    """Draw one slice as the model sees it, `side` pixels wide, with the lungs' outline."""
    interpolation = cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
    grey = cv2.resize(picture, (side, side), interpolation=interpolation)
    tile = np.repeat(grey[:, :, None], 3, axis=2)
    if mask.any():
        y0, y1, x0, x1 = box
        lungs = letterbox(mask[y0:y1, x0:x1].astype(np.uint8) * 255, side) > 127
        contours, _ = cv2.findContours(lungs.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.polylines(tile, contours, True, LUNG_COLOUR, 1, cv2.LINE_AA)
    return Image.fromarray(tile)


def _draw_label(pen: ImageDraw.ImageDraw, corner: tuple[float, float], number: str, total: str) -> None:
    """Write a label such as `12 of 24` on a dark plate, which is legible on any slice."""
    x, y = corner
    number_width = pen.textlength(number, load_font(16))
    padding = 17 if total else 10
    plate_width = number_width + pen.textlength(total, load_font(12)) + padding
    pen.rounded_rectangle((x - 5, y - 2, x - 5 + plate_width, y + 20), 5, PAGE_COLOUR)
    pen.text(corner, number, CHOSEN_COLOUR, load_font(16))
    pen.text((x + number_width + 5, y + 4), total, FAINT_COLOUR, load_font(12))
