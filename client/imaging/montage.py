"""A picture of what preprocessing keeps of one scan: the chosen slices with the lungs' outline, and the area curve they were chosen from.

It shows a patient's pixels: it is written where a person at the centre asks for it, and nowhere else.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from client.imaging import lung_segmentation
from client.imaging.masks import find_lung_mask
from client.imaging.readers import Volume, read_scan
from client.imaging.slice_pipeline import PreprocessedScan, extract_slices, letterbox
from common.config.schema import PreprocessConfig
from common.utils.errors import ConsiliumError

PAGE_WIDTH, MARGIN, GAP, HEADER_HEIGHT, CURVE_HEIGHT = 1200, 24, 8, 76, 190  # pixels
PAGE_COLOUR, PANEL_COLOUR, TEXT_COLOUR, FAINT_COLOUR, LUNG_COLOUR, CHOSEN_COLOUR = (
    "#10151b",
    "#171e26",
    "#e8edf2",
    "#8593a1",
    (64, 196, 208),
    "#ffb454",
)
SUPERSAMPLING = (
    3  # the curve is drawn so many times larger, then reduced: Pillow's lines have no smooth edges
)


def write_montage(
    path: Path, settings: PreprocessConfig, out_path: Path, window: tuple[float, float] | None = None
) -> Path:
    """Draw the scan at `path` as `settings` keep it, as a PNG at `out`; `window` is the cohort's own, in the image's units.

    Raises ConsiliumError when the scan cannot be read or the picture cannot be written.
    """
    kept, scan = extract_slices(Path(path), None, settings, window)
    volume = scan if isinstance(scan, Volume) else read_scan(Path(path))
    page = draw_montage(volume, kept, settings, window)
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
    kept: PreprocessedScan,
    settings: PreprocessConfig,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """The montage as a picture of WIDTH pixels."""
    S, radiograph = len(kept.slices), volume.modality == "XR"
    columns = min(S, 4 if S <= 8 else 8)
    side = min((PAGE_WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns, 640)
    rows = -(-S // columns)
    notes = [line for note in kept.notes for line in textwrap.wrap(note, 150)]
    curve = 0 if radiograph else CURVE_HEIGHT + 20
    height = HEADER_HEIGHT + rows * (side + GAP) + curve + 22 * len(notes) + MARGIN
    page = Image.new("RGB", (PAGE_WIDTH, height), PAGE_COLOUR)
    pen = ImageDraw.Draw(page)
    pen.text(
        (MARGIN, 18),
        "Radiograph" if radiograph else f"{S} of {len(volume.voxels)} slices, {settings.selection}",
        TEXT_COLOUR,
        _load_font(24),
    )
    pen.text((MARGIN, 48), _describe_scan(volume, kept, settings, window), FAINT_COLOUR, _load_font(15))

    masks = find_lung_mask(volume, not radiograph)[kept.indices] > 0
    for k, picture in enumerate(kept.slices):
        x, y = MARGIN + k % columns * (side + GAP), HEADER_HEIGHT + k // columns * (side + GAP)
        page.paste(_draw_tile(picture, masks[k], kept.crop_box, side), (x, y))
        if not radiograph:
            _draw_label(
                pen,
                (x + 8, y + side - 26),
                f"{kept.indices[k] + 1}",
                f"of {len(volume.voxels)}" if side > 200 else "",
            )
    if not radiograph:
        top = HEADER_HEIGHT + rows * (side + GAP) + 8
        page.paste(
            _draw_area_curve(
                kept,
                PAGE_WIDTH - 2 * MARGIN,
                CURVE_HEIGHT,
                _choose_area_unit(volume),
                _name_curve_ends(volume),
                settings.selection,
            ),
            (MARGIN, top),
        )
    for k, line in enumerate(notes):
        pen.text((MARGIN, height - MARGIN + 2 - 22 * (len(notes) - k)), line, CHOSEN_COLOUR, _load_font(14))
    return page


def _load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _describe_scan(
    volume: Volume, kept: PreprocessedScan, settings: PreprocessConfig, window: tuple[float, float] | None
) -> str:
    H, W = volume.voxels.shape[1:]
    z, y, x = volume.spacing
    shades = window or (settings.window if volume.is_hounsfield else (0.0, 255.0))
    size = f"{W} x {H} pixels" + (f" of {x:.2f} x {y:.2f} mm" if (y, x) != (1.0, 1.0) else "")
    apart = f", slices {z:.2f} mm apart" if volume.modality == "CT" and z != 1.0 else ""
    crop = (
        f"crop {settings.crop} {kept.crop_box[3] - kept.crop_box[2]} x {kept.crop_box[1] - kept.crop_box[0]}"
    )
    return f"{size}{apart}   |   {crop}   |   window {shades[0]:g} to {shades[1]:g}   |   kept at {settings.image_size} x {settings.image_size}"


def _draw_tile(
    picture: NDArray[np.uint8], mask: NDArray[np.bool_], box: lung_segmentation.Box, side: int
) -> Image.Image:
    """One slice as the model sees it, `side` pixels wide, with the lungs' outline."""
    tile = cv2.resize(
        picture, (side, side), interpolation=cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
    )
    tile = np.repeat(tile[:, :, None], 3, axis=2)
    if mask.any():
        y0, y1, x0, x1 = box
        lung = letterbox(mask[y0:y1, x0:x1].astype(np.uint8) * 255, side) > 127
        contours, _ = cv2.findContours(lung.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.polylines(tile, contours, True, LUNG_COLOUR, 1, cv2.LINE_AA)
    return Image.fromarray(tile)


def _draw_label(pen: ImageDraw.ImageDraw, at: tuple[float, float], strong: str, faint: str) -> None:
    """`12 of 24` on a dark plate, so that it reads on any slice."""
    wide = (
        pen.textlength(strong, _load_font(16)) + pen.textlength(faint, _load_font(12)) + (17 if faint else 10)
    )
    pen.rounded_rectangle((at[0] - 5, at[1] - 2, at[0] - 5 + wide, at[1] + 20), 5, PAGE_COLOUR)
    pen.text(at, strong, CHOSEN_COLOUR, _load_font(16))
    pen.text(
        (at[0] + pen.textlength(strong, _load_font(16)) + 5, at[1] + 4), faint, FAINT_COLOUR, _load_font(12)
    )


def _choose_area_unit(volume: Volume) -> tuple[float, str]:
    return (100.0, "sq cm") if volume.spacing[1:] != (1.0, 1.0) else (1000.0, "thousand pixels")


def _name_curve_ends(volume: Volume) -> tuple[str, str]:
    return ("feet", "head") if volume.is_hounsfield else ("first", "last")


def _draw_area_curve(
    kept: PreprocessedScan,
    width: int,
    height: int,
    unit: tuple[float, str],
    ends: tuple[str, str],
    selection: str,
) -> Image.Image:
    """Area against slice number; the chosen slices as upright lines with a dot on the curve."""
    left, right, top, bottom = 16, 16, 40, 30
    areas = kept.areas / unit[0]
    Z, peak = len(areas), max(float(areas.max()), 1e-9)
    x = left + (np.arange(Z) + 0.5) / Z * (width - left - right)
    y = height - bottom - areas / peak * (height - top - bottom)
    panel = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), PANEL_COLOUR)
    pen = ImageDraw.Draw(panel)
    floor = height - bottom
    points = [(SUPERSAMPLING * a, SUPERSAMPLING * b) for a, b in zip(x, y, strict=True)]
    if Z > 1:
        pen.polygon(
            [(points[0][0], SUPERSAMPLING * floor), *points, (points[-1][0], SUPERSAMPLING * floor)],
            fill="#1f3a42",
        )
        pen.line(points, fill=LUNG_COLOUR, width=2 * SUPERSAMPLING, joint="curve")
    pen.line(
        [
            (SUPERSAMPLING * left, SUPERSAMPLING * floor),
            (SUPERSAMPLING * (width - right), SUPERSAMPLING * floor),
        ],
        fill="#3a4652",
        width=SUPERSAMPLING,
    )
    for k in sorted(set(kept.indices.tolist())):
        px, py = points[k]
        pen.line([(px, SUPERSAMPLING * floor), (px, py)], fill=CHOSEN_COLOUR, width=SUPERSAMPLING)
        pen.ellipse(
            (
                px - 4.5 * SUPERSAMPLING,
                py - 4.5 * SUPERSAMPLING,
                px + 4.5 * SUPERSAMPLING,
                py + 4.5 * SUPERSAMPLING,
            ),
            fill=CHOSEN_COLOUR,
            outline=PANEL_COLOUR,
            width=SUPERSAMPLING,
        )
    panel = panel.resize((width, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(panel)
    what = "body area" if selection == "kds_paper" else "lung air area"
    pen.text((left, 10), f"{what} by slice, largest {peak:.3g} {unit[1]}", TEXT_COLOUR, _load_font(14))
    pen.text((left, floor + 8), f"1 ({ends[0]})", FAINT_COLOUR, _load_font(12))
    last = f"({ends[1]}) {Z}"
    pen.text(
        (width - right - pen.textlength(last, _load_font(12)), floor + 8), last, FAINT_COLOUR, _load_font(12)
    )
    end = -100.0
    for k in sorted(set(kept.indices.tolist())):  # numbers under the chosen, where there is room
        text = str(k + 1)
        wide = pen.textlength(text, _load_font(12))
        at = x[k] - wide / 2
        if at > max(end + 6, left + 60) and at + wide < width - right - 60:
            pen.text((at, floor + 8), text, CHOSEN_COLOUR, _load_font(12))
            end = at + wide
    return panel
