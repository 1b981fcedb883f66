"""The terminal's tables of one run and of several runs side by side."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from server.reporting.terminal_tables import build_comparison_table, build_result_table
from server.run.records import RunResult
from tests.server.reporting.made_up_results import CENTRES, make_result


def print_table(table: Table, width: int = 140) -> str:
    """Return a table as the terminal shows it."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def print_result(result: RunResult, width: int = 140) -> str:
    """Return a result's table as the terminal shows it."""
    return print_table(build_result_table(result), width)


def list_cells(text: str) -> list[list[str]]:
    """Return the cells of a printed table's body."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_table_has_a_row_for_each_centre_and_view() -> None:
    headings = [cells[0] for cells in list_cells(print_result(make_result()))]
    assert [heading for heading in headings if heading] == [
        *CENTRES,
        "mean of centres",
        "pooled",
        "worst centre",
        "spread",
    ]


def test_undefined_metric_is_explained_below_the_table() -> None:
    text = print_result(make_result())
    assert "one class only" in text
    assert "nan" not in text.lower()


def test_runs_are_compared_side_by_side() -> None:
    results = {"federated": make_result(), "local": make_result()}
    results["local"].test["covid"].centres["north"].metrics["auc"] = 0.123
    results["central"] = replace(make_result(), test={})
    rows = list_cells(print_table(build_comparison_table(results), width=100))
    auc = results["federated"].test["covid"].centres["north"].metrics["auc"]
    assert ["north", f"{auc:.3f}", "0.123", "–"] in rows
    assert next(row for row in rows if row[0] == "south") == ["south", "–", "–", "–"]  # one class
    num_contributions = 0
    for stage in results["local"].stages:
        num_contributions += sum(len(record.centres) for record in stage.rounds)
    assert ["optimiser steps, all centres", *[str(4 * num_contributions)] * 3] in rows
