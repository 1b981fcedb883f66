"""The console's curves over rounds, drawn like the report's (server/reporting/figures.py) from the ledger.

Of many centres, the figures show a few as lines and all of them as a band.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from server.monitoring.run_history import ScoreHistory, ScorePoint
from server.reporting.labels import VIEW_LABELS, View, label_metric
from server.reporting.numbered_rounds import RoundPosition
from server.reporting.plot_traces import Figure, plot_over_rounds

MAX_CENTRE_LINES = 12  # in a figure; of more centres, only some are drawn
NUM_SELECTED_CENTRES = 5  # drawn of many: the worst, or those farthest from the others
MAX_CURVE_POINTS = 300
MAX_MARKED_POINTS = 60  # of a curve whose points have markers


def build_history_figures(history: ScoreHistory) -> list[Figure]:
    """Plot the mean over centres and the worst centre, over all rounds."""
    points = downsample_points(history.points)
    if not any(point.macro is not None for point in points.values()):
        return []
    label = label_metric(history.metric)
    lines = {
        VIEW_LABELS[View.MACRO]: [point.macro for point in points.values()],
        VIEW_LABELS[View.WORST]: [point.worst for point in points.values()],
    }
    title = f"{history.task}: {label} on validation"
    return [with_legend(plot_over_rounds(title, label, list(points), [], {}, lines))]


def build_comparison_figures(histories: Mapping[str, ScoreHistory]) -> list[Figure]:
    """Plot the mean and the worst centre of several runs, one colour a run."""
    longest = max(histories.values(), key=lambda history: len(history.points))
    positions = list(downsample_points(longest.points))
    label = label_metric(longest.metric)
    figures = []
    for view in (View.MACRO, View.WORST):
        lines = {}
        for run_id, history in histories.items():
            values = {(point.stage, point.round): getattr(point, view) for point in history.points}
            lines[run_id] = [values.get((position.stage, position.round)) for position in positions]
        title = f"{longest.task}: {label} on validation, {VIEW_LABELS[view]}"
        figure = plot_over_rounds(title, label, positions, list(histories), lines)
        if figure.data:
            figures.append(with_legend(figure))
    return figures


def downsample_points(points: Sequence[ScorePoint]) -> dict[RoundPosition, ScorePoint]:
    """Return every so many points, and the last, by their positions."""
    step = max(1, math.ceil(len(points) / MAX_CURVE_POINTS))
    chosen = {}
    for index, point in enumerate(points):
        if index % step == 0 or index == len(points) - 1:
            chosen[RoundPosition(index + 1, point.stage, point.round)] = point
    return chosen


def with_legend(figure: Figure) -> Figure:
    """Return the figure with a legend above the plot, and markers only where they are far apart."""
    traces = []
    for trace in figure.data:
        if len(trace["x"]) > MAX_MARKED_POINTS:
            trace = {**trace, "mode": "lines"}
        traces.append(trace)
    legend = {"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0}
    layout = {**figure.layout, "showlegend": True, "legend": legend, "margin": {"t": 52}}
    return replace(figure, data=traces, layout=layout)
