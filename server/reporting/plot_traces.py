"""The parts of a figure: its record, the style of each centre's line, and lines over the rounds of a run.

A centre keeps its colour, dash and marker in every figure; a line over all centres is bold, in the colour of
the text. Colours are CSS variables of the page (`server/reporting/report_template.py`).
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from server.reporting.numbered_rounds import RoundPosition

Trace = dict[str, Any]  # as Plotly reads it
Layout = dict[str, Any]  # as Plotly reads it
Values = Sequence[float | None]  # None leaves a gap

NUM_COLOURS = 7
DASH_STYLES = ("solid", "dash", "dot", "dashdot")
MARKER_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
LEGEND_LAYOUT = {
    "showlegend": True,
    "legend": {"orientation": "h", "y": 1.07, "yanchor": "bottom", "x": 0},
    "margin": {"t": 44},
}
NO_LINES: Mapping[str, Values] = MappingProxyType({})
MAX_ROUND_TICKS = 16
MAX_STAGE_NAME = 24  # characters above a plot


@dataclass
class Figure:
    """A plot: Plotly's data and layout, and what it shows."""

    title: str
    data: list[Trace]
    layout: Layout
    task: str = ""
    metric: str = ""
    id: str = ""  # of the page's element that it is drawn into


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn."""

    colour: str
    width: float
    dash: str
    symbol: str
    centre_index: int | None = None  # the legend's buttons hide lines by it; None: not a centre's line


SUMMARY_STYLE = LineStyle("var(--ink)", 2.5, "solid", MARKER_SYMBOLS[0])


def select_dash(centre_index: int) -> str:
    """Return the dash of a centre's lines; it changes when the colours are used up."""
    return DASH_STYLES[centre_index // NUM_COLOURS % len(DASH_STYLES)]


def assign_styles(centre_names: Sequence[str]) -> dict[str, LineStyle]:
    """Give each centre a style by its place in the federation."""
    styles: dict[str, LineStyle] = {}
    for index, name in enumerate(centre_names):
        colour = f"var(--c{index % NUM_COLOURS})"
        symbol = MARKER_SYMBOLS[index % len(MARKER_SYMBOLS)]
        styles[name] = LineStyle(colour, 1.5, select_dash(index), symbol, index)
    return styles


def make_line_trace(
    name: str,
    style: LineStyle,
    x: Iterable[Any],
    y: Iterable[Any],
    hover: str,
    *,
    with_markers: bool = True,
) -> Trace:
    """Return one line of a figure. `hover` is Plotly's template for the text beside the pointer."""
    trace: Trace = {
        "x": list(x),
        "y": list(y),
        "name": html.escape(name),  # Plotly interprets a little HTML in names
        "mode": "lines+markers" if with_markers else "lines",
        "line": {"color": style.colour, "width": style.width, "dash": style.dash},
        "marker": {"color": style.colour, "size": 5, "symbol": style.symbol},
        "hovertemplate": hover,
    }
    if style.centre_index is not None:
        trace["meta"] = style.centre_index
    return trace


def plot_over_rounds(
    title: str,
    y_label: str,
    rounds: Sequence[RoundPosition],
    centre_names: Sequence[str],
    centre_lines: Mapping[str, Values],
    summary_lines: Mapping[str, Values] = NO_LINES,
) -> Figure:
    """Plot lines over the rounds of all stages, one stage after the other.

    Args:
        title: the figure's title.
        y_label: what is plotted.
        rounds: the positions on the x axis.
        centre_names: all centres of the run in their order, which decides on their styles.
        centre_lines: {centre: one value a round}; a line without any value is not drawn.
        summary_lines: {name: one value a round} over all centres.
    """
    styles = assign_styles(centre_names) | _style_summaries(list(summary_lines))
    numbers = list_numbers(rounds)
    labels = label_positions(rounds)
    traces = []
    for name, values in itertools.chain(centre_lines.items(), summary_lines.items()):
        if any(value is not None for value in values):
            hover = f"{html.escape(name)}<br>%{{customdata}}<br>{y_label} %{{y:.4g}}<extra></extra>"
            trace = make_line_trace(name, styles[name], numbers, values, hover)
            traces.append({**trace, "customdata": labels})
    layout: Layout = {"xaxis": _round_axis(rounds), "yaxis": {"title": {"text": y_label}}}
    return Figure(title, traces, layout | _mark_stages(rounds))


def list_numbers(rounds: Sequence[RoundPosition]) -> list[int]:
    """Return the rounds' numbers: their values on the x axis."""
    return [position.number for position in rounds]


def label_positions(rounds: Sequence[RoundPosition]) -> list[str]:
    """Return the text beside the pointer for each round: ``main, round 3``."""
    return [f"{html.escape(position.stage)}, round {position.round}" for position in rounds]


def _style_summaries(names: Sequence[str]) -> dict[str, LineStyle]:
    """Return the style of each line over all centres; several are told apart by dash and marker."""
    if len(names) == 1:
        return {names[0]: SUMMARY_STYLE}
    styles = {}
    for index, name in enumerate(names):
        dash = DASH_STYLES[index % len(DASH_STYLES)]
        symbol = MARKER_SYMBOLS[index % len(MARKER_SYMBOLS)]
        styles[name] = LineStyle(SUMMARY_STYLE.colour, 1.5, dash, symbol)
    return styles


def _round_axis(rounds: Sequence[RoundPosition]) -> dict[str, Any]:
    """Return an x axis with as many round numbers as there is room for; each stage counts its own rounds."""
    numbers = list_numbers(rounds)
    step = max(1, -(-len(rounds) // MAX_ROUND_TICKS))
    return {
        "title": {"text": "round"},
        "range": [min(numbers, default=0) - 0.5, max(numbers, default=1) + 0.5],
        "tickvals": numbers[::step],
        "ticktext": [str(position.round) for position in rounds[::step]],
    }


def _mark_stages(rounds: Sequence[RoundPosition]) -> Layout:
    """Return the layout's lines between stages and their names above; nothing for a single stage."""
    starts: list[RoundPosition] = []
    for position in rounds:
        if not starts or starts[-1].stage != position.stage:
            starts.append(position)
    if len(starts) < 2:
        return {}
    line = {"color": "var(--soft)", "width": 1, "dash": "dot"}
    shapes = []
    for start in starts[1:]:
        x = start.number - 0.5
        shapes.append({"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": line, "x0": x, "x1": x})
    above = {"y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "left", "showarrow": False}
    names = []
    for start in starts:
        text = html.escape(start.stage)[:MAX_STAGE_NAME]
        names.append({**above, "x": start.number - 0.4, "text": text})
    return {"shapes": shapes, "annotations": names, "margin": {"t": 22}}
