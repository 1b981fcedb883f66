"""Tables for the terminal: one run's result when it ends, and several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from server.reporting.labels import VIEW_LABELS, describe_metric, format_number_or_dash, label_metric
from server.reporting.numbered_rounds import list_rounds
from server.reporting.report_tables import ReportTable, TableCell, build_score_table
from server.reporting.result_summary import get_last_scores, primary_task_metric
from server.reporting.scores import list_metrics, list_short_metrics, view_value
from server.run.records import RunResult, TaskScores


def build_result_table(result: RunResult) -> Table:
    """Return the main task's metrics by centre, of the test or else of the last validation."""
    task, metric = primary_task_metric(result)
    scores = get_last_scores(result).get(task)
    split = "test" if task in result.test else "validation"
    columns: list[str] = []
    rows = ReportTable([], [])
    if scores:
        shown = {metric, *list_short_metrics(scores)}
        columns = [name for name in list_metrics(scores) if name in shown]
        rows = build_score_table(task, scores, columns)
    table = Table(title=Text(f"{task}, {split}: run {result.run_id}"))  # Text: a name is no markup
    table.add_column("centre", overflow="fold")
    for name in columns:
        column = describe_metric(name)
        table.add_column(Text(column.short_name or column.name), justify="right", overflow="fold")
    for index, row in enumerate(rows.rows):
        is_last_centre = rows.rows[index + 1 : index + 2] and rows.rows[index + 1].css_class == "view first"
        table.add_row(*map(_render_cell, row.cells), end_section=bool(is_last_centre))
    if rows.notes:
        table.caption = Text("\n".join(rows.notes))
        table.caption_justify = "left"
    return table


def _render_cell(cell: TableCell) -> Text:
    if cell.css_class == "none":
        return Text("–", "dim")  # the reason stands below the table: a cell is too narrow
    if cell.subtext:
        return Text(f"{cell.text}\n{cell.subtext}")
    return Text(cell.text)


def build_comparison_table(results: Mapping[str, RunResult]) -> Table:
    """Return several runs' main test metric by centre, their optimiser steps and times; one column a run."""
    task, metric = primary_task_metric(next(iter(results.values())))
    tested = [result.test.get(task) for result in results.values()]
    table = Table(title=Text(f"{task}, test {label_metric(metric)}"))
    table.add_column("centre")
    for name in results:
        table.add_column(Text(name), justify="right")
    centres: dict[str, None] = {}
    for scores in tested:
        if scores:
            centres |= dict.fromkeys(scores.centres)
    for centre in centres:
        cells = [_format_centre_score(scores, centre, metric) for scores in tested]
        table.add_row(Text(centre), *cells)
    table.add_section()
    for view, label in VIEW_LABELS.items():
        cells = []
        for scores in tested:
            value, worst_centre = view_value(scores, view, metric) if scores else (None, "")
            cells.append(f"{format_number_or_dash(value)}\n{worst_centre}".strip())
        table.add_row(label, *map(Text, cells))
    table.add_section()
    _add_number_row(table, "optimiser steps, all centres", results, _count_steps)
    _add_number_row(table, "time, s", results, lambda result: result.seconds)
    return table


def _format_centre_score(scores: TaskScores | None, centre: str, metric: str) -> str:
    if scores is None or centre not in scores.centres:
        return "–"
    return format_number_or_dash(scores.centres[centre].get_metric(metric))


def _add_number_row(
    table: Table, label: str, results: Mapping[str, RunResult], read_value: Callable[[RunResult], float]
) -> None:
    cells = [format_number_or_dash(read_value(result), 0) for result in results.values()]
    table.add_row(label, *cells)


def _count_steps(result: RunResult) -> int:
    """Return the optimiser steps of all centres and rounds."""
    steps = 0
    for entry in list_rounds(result):
        steps += sum(reply.steps or 0 for reply in entry.record.centres.values())
    return steps
