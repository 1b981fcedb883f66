"""Heat maps of cross-site scores: each centre's own model, scored at every centre."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.learning.metrics import primary_metric
from server.reporting.labels import format_number_or_dash, label_metric, to_finite_float
from server.reporting.plot_traces import Figure, Layout, Trace
from server.reporting.scores import centre_metrics
from server.run.records import CentreScores, CrossSiteScores

SiteScores = Mapping[str, Mapping[str, CentreScores]]  # {trained at: {scored at: ...}}
CELL_STYLE: Trace = {
    "type": "heatmap",
    "texttemplate": "%{text}",
    "colorscale": [[0, "var(--wash)"], [1, "var(--accent)"]],
    "showscale": False,
    "hoverongaps": True,
    "xgap": 2,
    "ygap": 2,
}
LAYOUT: Layout = {
    "xaxis": {"title": {"text": "scored at"}, "type": "category", "showgrid": False},
    "yaxis": {
        "title": {"text": "trained at"},
        "type": "category",
        "autorange": "reversed",
        "showgrid": False,
    },
}


def build_cross_site_figures(
    cross_site: CrossSiteScores | None, centre_names: Sequence[str], primary_task: str, metric: str
) -> list[Figure]:
    """Draw one heat map a task: rows are where a model was trained, columns where it was scored."""
    if cross_site is None:
        return []
    figures = []
    for task in sorted(cross_site.tasks, key=lambda name: name != primary_task):
        scores = cross_site.tasks[task]
        shown = primary_metric(metric, list_defined_metrics(scores))
        title = f"{task}: {label_metric(shown)} of each centre's own model at every centre"
        trace = _heat_map(scores, centre_names, shown)
        figures.append(Figure(title, [trace], dict(LAYOUT), task, shown))
    return figures


def list_defined_metrics(scores: SiteScores) -> set[str]:
    """Return the metrics that are defined for at least one model at one centre."""
    defined = set()
    for row in scores.values():
        for cell in row.values():
            defined |= {name for name, value in centre_metrics(cell).items() if value is not None}
    return defined


def _heat_map(scores: SiteScores, centre_names: Sequence[str], metric: str) -> Trace:
    scored_at: set[str] = set().union(*scores.values())
    rows = [name for name in centre_names if name in scores]
    columns = [name for name in centre_names if name in scored_at]
    values: list[list[float | None]] = []
    texts: list[list[str]] = []
    reasons: list[list[str]] = []
    for trained_at in rows:
        cells = [_describe_cell(scores[trained_at].get(column), metric) for column in columns]
        values.append([cell.value for cell in cells])
        texts.append([cell.text for cell in cells])
        reasons.append([cell.reason for cell in cells])
    value_text = f"{label_metric(metric)} %{{text}} %{{customdata}}"
    return {
        **CELL_STYLE,
        "x": list(map(html.escape, columns)),
        "y": list(map(html.escape, rows)),
        "z": values,
        "text": texts,
        "customdata": reasons,
        "hovertemplate": f"trained at %{{y}}, scored at %{{x}}<br>{value_text}<extra></extra>",
    }


class _HeatMapCell(NamedTuple):
    value: float | None
    text: str
    reason: str = ""  # why there is no value, as HTML


def _describe_cell(scores: CentreScores | None, metric: str) -> _HeatMapCell:
    if scores is None:
        return _HeatMapCell(None, "–", "not scored")
    value = to_finite_float(scores.get_metric(metric))
    reason = scores.reasons.get(metric)
    return _HeatMapCell(
        value, format_number_or_dash(value), html.escape(f"undefined: {reason}") if reason else ""
    )
