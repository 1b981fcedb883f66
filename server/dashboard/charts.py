"""What the console's figures and the tables beside them show.

They are drawn like the report's (server/reporting/figures.py), from the ledger's rows. Of many centres the
worst are drawn as lines and all of them as a band.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.config.parse import parse_config
from common.learning.losses import class_names
from common.learning.metrics import primary_metric
from server.analysis.score_tables import group_counts_by_class
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring import centre_reports, run_history, run_info
from server.monitoring.run_history import ScoreHistory, ScorePoint
from server.reporting.centre_tables import build_label_count_tables
from server.reporting.cross_site_figures import SiteScores, list_defined_metrics
from server.reporting.figures import (
    build_cost_figures,
    build_image_statistics_figures,
    build_round_figures,
    build_weight_figures,
)
from server.reporting.labels import VIEW_LABELS, View, format_number, label_metric, to_finite_float
from server.reporting.ledger_records import load_cross_site_scores, load_image_statistics
from server.reporting.numbered_rounds import RoundPosition, Rounds
from server.reporting.plot_traces import Figure, Trace, plot_over_rounds
from server.reporting.report_tables import (
    HeaderCell,
    ReportTable,
    TableCell,
    TableRow,
    build_score_table,
    build_weight_table,
    number_cell,
)
from server.reporting.scores import choose_task_metric, list_metrics
from server.run.records import CentreScores, CrossSiteScores, ImageStatistic, TaskScores

MAX_LINES = 12  # centres in a figure; of more, the worst and a band
NUM_WORST = 5
MAX_CURVE_POINTS = 300
MAX_MARKED_POINTS = 60  # of a curve whose points have markers
NUM_SHADES = 6  # of a cross-site table's cells, above 0


# ---- scores over the rounds


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
        figures.append(with_legend(plot_over_rounds(title, label, positions, list(histories), lines)))
    return [figure for figure in figures if figure.data]


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


# ---- learning


def learning_view(ledger: Ledger, row: Row, rounds: Rounds) -> dict[str, Any]:
    """Return what the Learning page shows: figures, scores, weights and their causes, cross-site scores."""
    centres = run_info.list_expected_centres(row)
    names = list(dict.fromkeys([*run_info.list_cohorts(row), *centres]))
    last = _last_validation(rounds)
    tested = run_history.load_test_scores(ledger, row["id"])
    task, metric = choose_task_metric(parse_config(row["config"]).evaluation, last)
    has_many_centres = len(names) > MAX_LINES
    drawn = names
    if has_many_centres:
        drawn = select_worst_centres(last[task].centres if task in last else {}, metric, names)
    figures = build_round_figures(rounds, drawn, task, metric)
    if has_many_centres:
        figures = [replace(figure, data=[*quartile_band(rounds, figure), *figure.data]) for figure in figures]
    return {
        "figures": figures + build_weight_figures(rounds, drawn) + build_cost_figures(rounds, drawn),
        "drawn_centres": drawn,
        "shows_worst_only": has_many_centres,
        "scores": _build_score_tables(last, "validation", task, metric),
        "tests": _build_score_tables(tested, "test", task, metric),
        "weights": build_weight_table(rounds, centres),
        "weighting": explain_weights(ledger, row),
        "cross_site": build_cross_site_tables(load_cross_site_scores(ledger, row["id"]), metric),
    }


def _last_validation(rounds: Rounds) -> Mapping[str, TaskScores]:
    for entry in reversed(rounds):
        if entry.record.validation:
            return entry.record.validation
    return {}


def _build_score_tables(
    scores: Mapping[str, TaskScores], split: str, first_task: str, metric: str
) -> list[ReportTable]:
    tasks = sorted(scores, key=lambda task: task != first_task)
    return [build_sorted_score_table(task, scores[task], split, metric) for task in tasks]


def build_sorted_score_table(task: str, scores: TaskScores, split: str, metric: str) -> ReportTable:
    """Return a task's scores by centre, the worst centre first."""
    shown = primary_metric(metric, scores.macro)
    names = sorted(scores.centres, key=lambda name: _sortable_value(scores.centres[name], shown))
    ordered = replace(scores, centres={name: scores.centres[name] for name in names})
    table = build_score_table(task, ordered, list_metrics(scores))
    return table._replace(caption=f"{task}, {split} scans")


def _sortable_value(scores: CentreScores, metric: str) -> float:
    value = to_finite_float(scores.get_metric(metric))
    return math.inf if value is None else value


def select_worst_centres(
    scores: Mapping[str, CentreScores], metric: str, centre_names: Sequence[str]
) -> list[str]:
    """Return the centres with the lowest values now, in the order of the federation."""
    lowest = sorted(scores, key=lambda name: _sortable_value(scores[name], metric))[:NUM_WORST]
    return [name for name in centre_names if name in lowest]


def quartile_band(rounds: Rounds, figure: Figure) -> list[Trace]:
    """Return the middle half of all centres by round, to be drawn behind the lines of a figure of scores."""
    low: list[float | None] = []
    high: list[float | None] = []
    for entry in rounds:
        scores = entry.record.validation.get(figure.task)
        first, third = _quartiles(scores.centres.values() if scores else [], figure.metric)
        low.append(first)
        high.append(third)
    if not any(value is not None for value in low):
        return []
    numbers = [entry.number for entry in rounds]
    line = {"x": numbers, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**line, "y": low}, {**line, "y": high, "fill": "tonexty", "fillcolor": "var(--line)"}]


def _quartiles(scores: Iterable[CentreScores], metric: str) -> tuple[float | None, float | None]:
    values = [to_finite_float(centre_scores.get_metric(metric)) for centre_scores in scores]
    defined = [value for value in values if value is not None]
    if not defined:
        return None, None
    first, third = np.quantile(defined, [0.25, 0.75]).tolist()
    return first, third


def explain_weights(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Return what the weights follow from: labelled training scans by class, tau, and each head's prior."""
    config = parse_config(row["config"])
    task = config.evaluation.task
    classes = [str(name) for name in class_names(task, config.tasks[task])]
    rows = []
    for centre, report in centre_reports.load_centre_reports(ledger, row["id"]).items():
        counts = _count_training_scans(report, task, len(classes))
        cells = [number_cell(format_number(count, 0)) for count in counts]
        rows.append(TableRow([TableCell(centre), *cells]))
    header = [HeaderCell("centre", False), *map(HeaderCell, classes)]
    priors = []
    for name, settings in config.tasks.items():
        strength = "" if settings.prior == "none" else f", tau {settings.tau:g}"
        priors.append(f"{name}: {settings.prior}{strength}")
    return {
        "label_counts": ReportTable([header], rows, f"labelled training scans for {task}"),
        "tau": config.aggregation.tau,
        "weight_by": config.aggregation.weight_by,
        "priors": priors,
        "method": config.aggregation.method,
    }


def _count_training_scans(
    report: centre_reports.CentreReport, task: str, num_classes: int
) -> list[float | None]:
    """Return a centre's training scans by class, over all its cohorts; None where it reported none."""
    counts = []
    for key, scans in report.task_counts(task).items():
        if key.split == "train":
            counts.append(scans[:num_classes])
    if not counts:
        return [None] * num_classes
    totals: list[float | None] = np.sum(counts, axis=0).tolist()
    return totals


# ---- cross-site scores


def build_cross_site_tables(cross_site: CrossSiteScores | None, metric: str) -> list[dict[str, Any]]:
    """Return one table a task: rows are where a model was trained, columns where it was scored."""
    if cross_site is None:
        return []
    tables = []
    for task, scores in cross_site.tasks.items():
        shown = primary_metric(metric, list_defined_metrics(scores))
        columns: dict[str, None] = {}
        for row in scores.values():
            columns |= dict.fromkeys(row)
        tables.append(
            {
                "task": task,
                "metric": label_metric(shown),
                "columns": list(columns),
                "rows": _cross_site_rows(scores, list(columns), shown),
                "round": cross_site.round,
                "stage": cross_site.stage,
            }
        )
    return tables


def _cross_site_rows(
    scores: SiteScores, columns: Sequence[str], metric: str
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return {text, shade from 0 to `NUM_SHADES` or "", own: scored where it was trained} for each cell."""
    values = []
    for row in scores.values():
        values += [to_finite_float(cell.get_metric(metric)) for cell in row.values()]
    defined = [value for value in values if value is not None]
    low = min(defined, default=0.0)
    extent = (max(defined, default=1.0) - low) or 1.0
    rows = []
    for trained_at, row in scores.items():
        cells = []
        for scored_at in columns:
            value = to_finite_float(row[scored_at].get_metric(metric)) if scored_at in row else None
            shade = "" if value is None else round(NUM_SHADES * (value - low) / extent)
            text = format_number(value) or _explain_missing(row.get(scored_at), metric)
            cells.append({"text": text, "shade": shade, "own": trained_at == scored_at})
        rows.append((trained_at, cells))
    return rows


def _explain_missing(cell: CentreScores | None, metric: str) -> str:
    if cell is None or metric not in cell.reasons:
        return "–"
    short_reason = cell.reasons[metric].split(" (")[0]
    return f"undefined: {short_reason}"


# ---- data


def data_view(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Return what the Data page shows: label counts, image statistics and the drift of each centre."""
    statistics = load_image_statistics(ledger, row["id"])
    reports = centre_reports.load_centre_reports(ledger, row["id"])
    names = run_info.list_cohorts(row)
    shown = {name: keep_most_drifted(statistic) for name, statistic in statistics.items()}
    figures = [with_legend(figure) for figure in build_image_statistics_figures(shown, names)]
    config = run_info.load_config_with_sources(row, reports)
    counts = {}
    for centre, report in reports.items():
        counts[centre] = group_counts_by_class(centre_reports.select_known_counts(report, config), config)
    return {
        "figures": figures,
        "drift": [(statistic.name, statistic.drift) for statistic in statistics.values() if statistic.drift],
        "centres": names,
        "label_counts": build_label_count_tables(counts),
        "has_image_statistics": bool(statistics),
    }


def keep_most_drifted(statistic: ImageStatistic) -> ImageStatistic:
    """Return the statistic with only those of many centres that are farthest from the others."""
    if len(statistic.centres) <= MAX_LINES:
        return statistic
    farthest = sorted(statistic.drift, key=lambda centre: -statistic.drift[centre])[:NUM_WORST]
    centres = {name: fractions for name, fractions in statistic.centres.items() if name in farthest}
    return replace(statistic, centres=centres)
