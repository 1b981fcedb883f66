"""What the learning page shows: scores, weights and their causes, cross-site scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from common.config.parse import parse_config
from common.learning.losses import class_names
from common.learning.metrics import primary_metric
from server.dashboard.charts import MAX_CENTRE_LINES, NUM_SELECTED_CENTRES
from server.dashboard.cross_site import build_cross_site_tables
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring import centre_reports, run_history, run_info
from server.reporting.figures import build_cost_figures, build_round_figures, build_weight_figures
from server.reporting.labels import format_number, to_finite_float
from server.reporting.ledger_records import load_cross_site_scores
from server.reporting.numbered_rounds import Rounds
from server.reporting.plot_traces import Figure, Trace
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
from server.run.records import CentreScores, TaskScores


@dataclass(frozen=True)
class Weighting:
    """What the centres' weights follow from."""

    method: str
    weight_by: str
    tau: float
    priors: list[str]  # of each task's head, as text
    label_counts: ReportTable  # labelled training scans by class


class Quartiles(NamedTuple):
    """The bounds of the middle half of the centres; None where no centre has a value."""

    first: float | None = None
    third: float | None = None


def learning_view(ledger: Ledger, row: Row, rounds: Rounds) -> dict[str, Any]:
    """Return what the learning page shows of a run."""
    centres = run_info.list_expected_centres(row)
    names = list(dict.fromkeys([*run_info.list_cohorts(row), *centres]))
    validation = _last_validation(rounds)
    test_scores = run_history.load_test_scores(ledger, row["id"])
    task, metric = choose_task_metric(parse_config(row["config"]).evaluation, validation)
    has_many_centres = len(names) > MAX_CENTRE_LINES
    drawn_centres = names
    if has_many_centres:
        drawn_centres = select_worst_centres(validation.get(task), metric, names)
    round_figures = build_round_figures(rounds, drawn_centres, task, metric)
    if has_many_centres:
        round_figures = [with_quartile_band(rounds, figure) for figure in round_figures]
    return {
        "figures": [
            *round_figures,
            *build_weight_figures(rounds, drawn_centres),
            *build_cost_figures(rounds, drawn_centres),
        ],
        "drawn_centres": drawn_centres,
        "shows_worst_only": has_many_centres,
        "scores": _build_score_tables(validation, "validation", task, metric),
        "tests": _build_score_tables(test_scores, "test", task, metric),
        "weights": build_weight_table(rounds, centres),
        "weighting": explain_weights(ledger, row),
        "cross_site": build_cross_site_tables(load_cross_site_scores(ledger, row["id"]), metric),
    }


# --- scores


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
    shown_metric = primary_metric(metric, scores.macro)
    names = _sort_by_metric(scores.centres, shown_metric)
    ordered = replace(scores, centres={name: scores.centres[name] for name in names})
    table = build_score_table(task, ordered, list_metrics(scores))
    return table._replace(caption=f"{task}, {split} scans")


def select_worst_centres(scores: TaskScores | None, metric: str, centre_names: Sequence[str]) -> list[str]:
    """Return the centres with the lowest values, in the order of `centre_names`; none without scores."""
    if scores is None:
        return []
    lowest = _sort_by_metric(scores.centres, metric)[:NUM_SELECTED_CENTRES]
    return [name for name in centre_names if name in lowest]


def _sort_by_metric(scores: Mapping[str, CentreScores], metric: str) -> list[str]:
    """Return the centres with the lowest value first, and those without one last."""

    def get_value(name: str) -> float:
        value = to_finite_float(scores[name].get_metric(metric))
        return math.inf if value is None else value

    return sorted(scores, key=get_value)


def with_quartile_band(rounds: Rounds, figure: Figure) -> Figure:
    """Return a figure of scores with the middle half of all centres by round, drawn behind the lines."""
    lower_bounds = []
    upper_bounds = []
    for entry in rounds:
        quartiles = Quartiles()
        if figure.task in entry.record.validation:
            scores = entry.record.validation[figure.task]
            quartiles = compute_quartiles(scores.centres.values(), figure.metric)
        lower_bounds.append(quartiles.first)
        upper_bounds.append(quartiles.third)
    if all(bound is None for bound in lower_bounds):
        return figure
    line = {
        "x": [entry.number for entry in rounds],
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    lower: Trace = {**line, "y": lower_bounds}
    upper: Trace = {**line, "y": upper_bounds, "fill": "tonexty", "fillcolor": "var(--line)"}
    return replace(figure, data=[lower, upper, *figure.data])


def compute_quartiles(scores: Iterable[CentreScores], metric: str) -> Quartiles:
    """Return the quartiles of a metric over centres."""
    values = []
    for centre_scores in scores:
        value = to_finite_float(centre_scores.get_metric(metric))
        if value is not None:
            values.append(value)
    if not values:
        return Quartiles()
    first, third = np.quantile(values, [0.25, 0.75]).tolist()
    return Quartiles(first, third)


# --- weights


def explain_weights(ledger: Ledger, row: Row) -> Weighting:
    """Return what the weights follow from: labelled training scans by class, tau, and each head's prior."""
    config = parse_config(row["config"])
    priors = []
    for name, settings in config.tasks.items():
        prior = f"{name}: {settings.prior}"
        if settings.prior != "none":
            prior += f", tau {settings.tau:g}"
        priors.append(prior)
    task = config.evaluation.task
    classes = list(map(str, class_names(task, config.tasks[task])))
    return Weighting(
        config.aggregation.method,
        config.aggregation.weight_by,
        config.aggregation.tau,
        priors,
        _build_training_counts(ledger, row["id"], task, classes),
    )


def _build_training_counts(ledger: Ledger, run_id: str, task: str, classes: Sequence[str]) -> ReportTable:
    rows = []
    for centre, report in centre_reports.load_centre_reports(ledger, run_id).items():
        cells = [TableCell(centre)]
        for count in _count_training_scans(report, task, len(classes)):
            cells.append(number_cell(format_number(count, 0)))
        rows.append(TableRow(cells))
    header = [HeaderCell("centre", False), *map(HeaderCell, classes)]
    return ReportTable([header], rows, f"labelled training scans for {task}")


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
