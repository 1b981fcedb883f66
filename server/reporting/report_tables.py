"""The report's tables of scores, stages, weights, costs, privacy and exclusions.

A table is drawn as HTML by `server/reporting/report_template.py`, as Markdown by
`server/reporting/model_card.py` and in the terminal by `server/reporting/terminal_tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.config.schema import PrivacyConfig
from common.learning.metrics import COUNT_METRICS
from server.reporting.labels import (
    VIEW_LABELS,
    describe_metric,
    format_number,
    label_metric,
    to_finite_float,
)
from server.reporting.numbered_rounds import Rounds
from server.reporting.scores import TaskMetric, view_metrics
from server.run.records import CentreScores, RunResult, StageRecord, TaskScores


class TableCell(NamedTuple):
    """A cell of a table's body."""

    text: str
    css_class: str = ""  # n: a number; none: undefined; text: long
    subtext: str = ""
    tooltip: str = ""


class HeaderCell(NamedTuple):
    """A cell of a table's head."""

    text: str
    is_numeric: bool = True
    column_span: int = 1


class TableRow(NamedTuple):
    """A row; its first cell is its heading."""

    cells: list[TableCell]
    css_class: str = ""  # view: a summary over centres; view first: with a line above it


class ReportTable(NamedTuple):
    """A table; its head is one row, or two where columns are grouped."""

    header_rows: list[list[HeaderCell]]
    rows: list[TableRow]
    caption: str = ""
    notes: Sequence[str] = ()


def number_cell(text: str | None) -> TableCell:
    """Return a cell that holds a number, or a dash where there is none."""
    return TableCell(text or "–", "n")


def number_cells(values: Iterable[float | None], decimals: int = 3) -> list[TableCell]:
    """Return a cell for each number, with a dash where there is none."""
    return [number_cell(format_number(value, decimals)) for value in values]


# ---- scores


def build_score_table(task: str, scores: TaskScores, columns: Sequence[str]) -> ReportTable:
    """Return metrics by centre, then the views over centres.

    A centre without scans to score has no row; a note names it. Notes also say why a metric is undefined.
    """
    rows: list[TableRow] = []
    unscored: list[str] = []
    for centre, centre_scores in scores.centres.items():
        if _has_nothing_to_score(centre_scores):
            unscored.append(centre)
        else:
            rows.append(_centre_row(centre, centre_scores, columns))
    rows += _view_rows(scores, columns)
    notes = _explain_undefined(scores, columns, unscored)
    if unscored:
        notes.append(f"Nothing to score at {', '.join(unscored)}.")
    header = [HeaderCell("centre", False), *(HeaderCell(label_metric(name)) for name in columns)]
    return ReportTable([header], rows, f"{task}, test scans", notes)


def _has_nothing_to_score(scores: CentreScores) -> bool:
    if scores.metrics.get("n") != 0 or to_finite_float(scores.loss) is not None:
        return False
    measured = scores.metrics.keys() - set(COUNT_METRICS)
    return all(to_finite_float(scores.metrics[name]) is None for name in measured)


def _centre_row(centre: str, scores: CentreScores, columns: Sequence[str]) -> TableRow:
    cells = [_score_cell(name, scores.get_metric(name), scores.reasons.get(name, "")) for name in columns]
    return TableRow([TableCell(centre), *cells])


def _view_rows(scores: TaskScores, columns: Sequence[str]) -> list[TableRow]:
    rows: list[TableRow] = []
    for view, label in VIEW_LABELS.items():
        metrics = view_metrics(scores, view)
        if not metrics:
            continue
        cells = [TableCell(label)]
        for name in columns:
            if name not in metrics:  # the number of scans has no mean, for example
                cells.append(TableCell(""))
            else:
                value, centre = metrics[name]
                cells.append(_score_cell(name, value)._replace(subtext=centre))
        rows.append(TableRow(cells, "view" if rows else "view first"))
    return rows


def _score_cell(metric: str, value: float | None, reason: str = "") -> TableCell:
    text = format_number(value, describe_metric(metric).decimals)
    if text is not None:
        return TableCell(text, "n")
    if not reason:
        return TableCell("undefined", "none")
    short_reason = reason.split(" (")[0]
    return TableCell(f"undefined: {short_reason}", "none", tooltip=reason)


def _explain_undefined(scores: TaskScores, columns: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Return a note for each reason, with the centres it holds for.

    For example ``south: F1 undefined: no labelled scans.``
    """
    centres_by_note: dict[str, list[str]] = {}
    for centre, centre_scores in scores.centres.items():
        if centre in skip:
            continue
        metrics_by_reason: dict[str, list[str]] = {}
        for metric, reason in centre_scores.reasons.items():
            if metric in columns:
                metrics_by_reason.setdefault(reason, []).append(label_metric(metric))
        for reason, metrics in metrics_by_reason.items():
            note = f"{', '.join(metrics)} undefined: {reason}."
            centres_by_note.setdefault(note, []).append(centre)
    return [f"{', '.join(centres)}: {note}" for note, centres in centres_by_note.items()]


# ---- stages, weights and costs


def build_stage_table(result: RunResult, selected_by: TaskMetric) -> ReportTable:
    """Return each stage's tasks, rounds and best round, from which the next stage or the test starts."""
    header = [
        HeaderCell("stage", False),
        HeaderCell("tasks", False),
        HeaderCell("rounds"),
        HeaderCell("best round", False),
        HeaderCell(f"{selected_by.task}: {label_metric(selected_by.metric)}"),
    ]
    return ReportTable([header], [_stage_row(stage) for stage in result.stages])


def _stage_row(stage: StageRecord) -> TableRow:
    tasks: dict[str, None] = {}
    num_rounds = 0
    for record in stage.rounds:
        tasks |= dict.fromkeys(record.validation)
        num_rounds += record.round > 0
    best_round = "–"
    value = None
    if stage.best_by_centre:
        best_round = "each centre's own best"
    elif stage.best:
        best_round = f"round {stage.best.round}"
        value = stage.best.value
    cells = [
        TableCell(stage.name),
        TableCell(", ".join(tasks), "text"),
        TableCell(str(num_rounds), "n"),
        TableCell(best_round, "text"),
        number_cell(format_number(value)),
    ]
    return TableRow(cells)


def build_weight_table(rounds: Rounds, centre_names: Sequence[str]) -> ReportTable:
    """Return the centres' weights in the last round that had any; an empty table where no round had."""
    last = next((entry for entry in reversed(rounds) if entry.record.weights), None)
    if last is None:
        return ReportTable([], [])
    weights = last.record.weights
    weighed = set().union(*weights.values())
    rows = []
    for name in centre_names:
        if name in weighed:
            values = [group_weights.get(name) for group_weights in weights.values()]
            rows.append(TableRow([TableCell(name), *number_cells(values)]))
    effective = [last.record.effective_centres.get(group) for group in weights]
    rows.append(TableRow([TableCell("effective number"), *number_cells(effective, 2)], "view first"))
    header = [HeaderCell("centre", False), *map(HeaderCell, weights)]
    return ReportTable([header], rows, f"Weights in round {last.round} of {last.stage}")


@dataclass
class _StageCost:
    """What a stage's rounds took."""

    num_rounds: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0


def build_cost_table(rounds: Rounds) -> ReportTable:
    """Return time and traffic by stage. A stage's round 0 is its first validation, and does not count."""
    costs: dict[str, _StageCost] = {}
    for entry in rounds:
        if entry.round > 0:
            cost = costs.setdefault(entry.stage, _StageCost())
            cost.num_rounds += 1
            cost.seconds += entry.record.seconds
            cost.bytes_down += entry.record.bytes_down
            cost.bytes_up += entry.record.bytes_up
    rows = []
    for stage, cost in costs.items():
        seconds_per_round = cost.seconds / cost.num_rounds
        numbers = [cost.seconds, seconds_per_round, cost.bytes_down / 1e6, cost.bytes_up / 1e6]
        cells = [TableCell(stage), number_cell(str(cost.num_rounds)), *number_cells(numbers, 1)]
        rows.append(TableRow(cells))
    names = ("rounds", "time, s", "time per round, s", "to centres, MB", "from centres, MB")
    return ReportTable([[HeaderCell("stage", False), *map(HeaderCell, names)]], rows)


# ---- privacy and exclusions


def build_privacy_table(rounds: Rounds, privacy: PrivacyConfig) -> ReportTable:
    """Return epsilon by centre after the first and the last round that it contributed to.

    With ``privacy=central`` the loss is each centre's, of this run; else it is its patients', of all their
    runs.
    """
    epsilons: dict[str, list[float]] = {}
    for entry in rounds:
        for centre, reply in entry.record.centres.items():
            epsilon = to_finite_float(reply.epsilon)
            if epsilon is not None:
                epsilons.setdefault(centre, []).append(epsilon)
    rows = []
    for centre, values in epsilons.items():
        first_and_last = number_cells([values[0], values[-1]], 2)
        rows.append(TableRow([TableCell(centre), *first_and_last, number_cell(str(len(values)))]))
    names = ("epsilon, first round", "epsilon, last round", "rounds")
    header = [HeaderCell("centre", False), *map(HeaderCell, names)]
    if privacy.dp_level == "central":
        whose = "Centres' privacy loss towards those who see the models, but not towards the coordinator,"
    else:
        whose = "Patients' privacy loss"
    caption = f"{whose} at delta {privacy.delta:g}, clip norm {privacy.clip_norm:g}"
    return ReportTable([header], rows, caption)


def build_exclusion_table(result: RunResult) -> ReportTable:
    """Return the contributions that were not used, and why."""
    header = [
        HeaderCell("stage", False),
        HeaderCell("round"),
        HeaderCell("centre", False),
        HeaderCell("reason", False),
    ]
    rows = []
    for exclusion in result.left_out:
        cells = [
            TableCell(exclusion.stage),
            TableCell(str(exclusion.round), "n"),
            TableCell(exclusion.centre, "text"),
            TableCell(exclusion.reason, "text"),
        ]
        rows.append(TableRow(cells))
    return ReportTable([header], rows)
