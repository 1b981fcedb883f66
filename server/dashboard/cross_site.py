"""The console's tables of cross-site scores: each centre's own model, scored at every centre."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.learning.metrics import primary_metric
from server.reporting.cross_site_figures import SiteScores, list_defined_metrics
from server.reporting.labels import format_number_or_dash, label_metric, to_finite_float
from server.run.records import CentreScores, CrossSiteScores

NUM_SHADES = 6  # above 0; static/console.css has a class for each


@dataclass(frozen=True)
class CrossSiteCell:
    """A score, or why there is none."""

    text: str
    shade: int | None = None  # from 0, the table's lowest value, to `NUM_SHADES`; None: no value
    own: bool = False  # scored where it was trained


@dataclass(frozen=True)
class CrossSiteRow:
    """The scores of one centre's own model."""

    trained_at: str
    cells: list[CrossSiteCell]


@dataclass(frozen=True)
class CrossSiteTable:
    """The scores of one task: rows are where a model was trained, columns where it was scored."""

    task: str
    metric: str
    stage: str
    round: int
    columns: list[str]
    rows: list[CrossSiteRow]


@dataclass(frozen=True)
class _ShadeScale:
    """Maps values to shades."""

    low: float
    extent: float

    def choose_shade(self, value: float) -> int:
        return round(NUM_SHADES * (value - self.low) / self.extent)


def build_cross_site_tables(cross_site: CrossSiteScores | None, metric: str) -> list[CrossSiteTable]:
    """Return a table of each task; none where the run has no cross-site scores."""
    if cross_site is None:
        return []
    tables = []
    for task, scores in cross_site.tasks.items():
        shown_metric = primary_metric(metric, list_defined_metrics(scores))
        columns: dict[str, None] = {}
        for row in scores.values():
            columns |= dict.fromkeys(row)
        tables.append(
            CrossSiteTable(
                task,
                label_metric(shown_metric),
                cross_site.stage,
                cross_site.round,
                list(columns),
                _build_rows(scores, list(columns), shown_metric),
            )
        )
    return tables


def _build_rows(scores: SiteScores, columns: list[str], metric: str) -> list[CrossSiteRow]:
    scale = _make_shade_scale(scores, metric)
    rows = []
    for trained_at, row in scores.items():
        cells = []
        for scored_at in columns:
            cells.append(_build_cell(row.get(scored_at), metric, scale, trained_at == scored_at))
        rows.append(CrossSiteRow(trained_at, cells))
    return rows


def _make_shade_scale(scores: SiteScores, metric: str) -> _ShadeScale:
    values = []
    for row in scores.values():
        for cell in row.values():
            value = to_finite_float(cell.get_metric(metric))
            if value is not None:
                values.append(value)
    if not values:
        return _ShadeScale(0.0, 1.0)
    return _ShadeScale(min(values), np.ptp(values).item() or 1.0)


def _build_cell(scores: CentreScores | None, metric: str, scale: _ShadeScale, own: bool) -> CrossSiteCell:
    if scores is None:
        return CrossSiteCell("–", own=own)
    value = to_finite_float(scores.get_metric(metric))
    if value is None:
        return CrossSiteCell(_explain_missing(scores, metric), own=own)
    return CrossSiteCell(format_number_or_dash(value), scale.choose_shade(value), own)


def _explain_missing(scores: CentreScores, metric: str) -> str:
    if metric not in scores.reasons:
        return "–"
    short_reason = scores.reasons[metric].split(" (")[0]
    return f"undefined: {short_reason}"
