"""Represent and print the results of checks: ok, warning or fault, with a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import typer

CheckLevel = Literal["ok", "warning", "fault"]
LEVEL_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "fault": typer.colors.RED}


class CheckResult(NamedTuple):
    """The result of one check."""

    level: CheckLevel
    message: str
    remedy: str = ""


def print_results(results: Iterable[CheckResult]) -> None:
    """Print results as they arrive.

    Raises:
        typer.Exit: At least one is a fault; the command exits with status 1.
    """
    has_fault = False
    for result in results:
        text = f"{result.message}: {result.remedy}" if result.remedy else result.message
        typer.secho(f"{result.level:8}", fg=LEVEL_COLOURS[result.level], nl=False)
        typer.echo(text)
        has_fault = has_fault or result.level == "fault"
    if has_fault:
        raise typer.Exit(1)
