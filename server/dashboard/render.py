"""From facts to HTML: the templates and how numbers, sizes and times are written."""

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

_loader = ChoiceLoader(
    [
        FileSystemLoader(Path(__file__).resolve().parent / "templates"),
        DictLoader({"grids.html": TEMPLATE_MACROS}),
    ]
)
_templates = Environment(
    loader=_loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)


def render_page(
    request: Request,
    template: str,
    context: Mapping[str, Any],
    status: int = 200,
    figures: Sequence[Figure] = (),
) -> HTMLResponse:
    """A page that shows `shown`. `figures` are drawn by static/console.js where the template has an element of their id."""
    figures = [dataclasses.replace(figure, id=f"figure{i}") for i, figure in enumerate(figures)]
    data = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in figures}
    own = {
        "person": getattr(request.state, "person", None),
        "path": request.url.path,
        "figures": figures,
        "drawn": _script_json(data) if data else "",
    }
    text = _templates.get_template(template).render({**context, **own})
    return HTMLResponse(text, status)


def _script_json(data: Any) -> Markup:
    """For a script element of data: "<" escaped, so that no name can end it."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def format_bytes(value: Any) -> str:
    """Bytes in the unit that fits."""
    if value is None:
        return "–"
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return (
                f"{amount:.0f}\u2009{unit}" if unit == "B" or amount >= 100 else f"{amount:.1f}\u2009{unit}"
            )
        amount /= 1000
    return ""


def format_duration_or_dash(value: Any) -> str:
    return "–" if value is None else format_duration(float(value))


def format_time(value: datetime | None, style: str = "") -> Markup:
    """A time in UTC; static/console.js lets those of style `ago` and `for` count."""
    if value is None:
        return Markup("–")
    kind = Markup(' data-show="{}"').format(style) if style else ""
    return Markup('<time datetime="{}"{}>{}</time>').format(
        value.isoformat(), kind, f"{value:%Y-%m-%d %H:%M:%S}"
    )


def format_signed(value: float | None, decimals: int = 3) -> str:
    """+0.012; a true minus."""
    return "–" if value is None else f"{value:+.{decimals}f}".replace("-", "−")


_templates.filters |= {
    "number": format_number_or_dash,
    "size": format_bytes,
    "seconds": format_duration_or_dash,
    "when": format_time,
    "signed": format_signed,
}
_templates.globals |= {"plotly": f"/static/plotly-{version('plotly')}.js"}
