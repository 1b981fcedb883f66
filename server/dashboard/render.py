"""Render the console's pages: the templates, and how numbers, sizes and times are written in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import ChoiceLoader, DictLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.reporting.labels import format_duration, format_number_or_dash
from server.reporting.plot_traces import Figure
from server.reporting.report_template import TEMPLATE_MACROS

TEMPLATE_FOLDER = Path(__file__).resolve().parent / "templates"
DASH = "–"  # stands for a missing value
BYTE_UNITS = ("B", "kB", "MB", "GB")
THIN_SPACE = "\u2009"
_templates = Environment(
    loader=ChoiceLoader([FileSystemLoader(TEMPLATE_FOLDER), DictLoader({"grids.html": TEMPLATE_MACROS})]),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def render_page(
    request: Request,
    template: str,
    context: Mapping[str, Any],
    status: int = 200,
    figures: Sequence[Figure] = (),
) -> HTMLResponse:
    """Render a template.

    Args:
        request: whose user and path the page shows.
        template: its file name.
        context: what the template shows.
        status: the HTTP status.
        figures: get an id; static/console.js draws each into the element of its id.
    """
    numbered = [dataclasses.replace(figure, id=f"figure{index}") for index, figure in enumerate(figures)]
    figure_json = ""
    if numbered:
        figure_json = _to_script_json(numbered)
    shared_context = {
        "person": getattr(request.state, "person", None),
        "path": request.scope["path"],
        "figures": numbered,
        "figure_json": figure_json,
    }
    text = _templates.get_template(template).render({**context, **shared_context})
    return HTMLResponse(text, status)


def _to_script_json(figures: Sequence[Figure]) -> Markup:
    """Return JSON for a script element, with "<" escaped, so that no name in it can end the element."""
    data = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in figures}
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def format_bytes(value: float | None) -> str:
    """Write a number of bytes in the unit that fits."""
    if value is None:
        return DASH
    amount = float(value)
    unit = BYTE_UNITS[0]
    for unit in BYTE_UNITS:
        if amount < 1000 or unit == BYTE_UNITS[-1]:
            break
        amount /= 1000
    decimals = 0 if unit == "B" or amount >= 100 else 1
    return f"{amount:.{decimals}f}{THIN_SPACE}{unit}"


def format_duration_or_dash(value: float | None) -> str:
    """Write seconds as a duration, and a dash for None."""
    if value is None:
        return DASH
    return format_duration(float(value))


def format_time(value: datetime | None, style: str = "") -> Markup:
    """Write a time in UTC.

    In the styles `ago` and `for`, static/console.js replaces it by the time since then and keeps it current.
    """
    if value is None:
        return Markup(DASH)
    attribute = Markup("")
    if style:
        attribute = Markup(' data-show="{}"').format(style)
    return Markup('<time datetime="{}"{}>{}</time>').format(
        value.isoformat(), attribute, f"{value:%Y-%m-%d %H:%M:%S}"
    )


def format_signed(value: float | None, decimals: int = 3) -> str:
    """Write a change with its sign, which is a true minus where it is negative."""
    if value is None:
        return DASH
    return f"{value:+.{decimals}f}".replace("-", "−")


_templates.filters |= {
    "number": format_number_or_dash,
    "size": format_bytes,
    "seconds": format_duration_or_dash,
    "when": format_time,
    "signed": format_signed,
}
_templates.globals |= {"plotly": f"/static/plotly-{version('plotly')}.js"}
