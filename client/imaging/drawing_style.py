"""Colours and fonts of the montage."""

from __future__ import annotations

from PIL import ImageFont

PAGE_COLOUR = "#10151b"
PANEL_COLOUR = "#171e26"
TEXT_COLOUR = "#e8edf2"
FAINT_COLOUR = "#8593a1"
LUNG_COLOUR = (64, 196, 208)
CHOSEN_COLOUR = "#ffb454"
AREA_COLOUR = "#1f3a42"
AXIS_COLOUR = "#3a4652"


def load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)
