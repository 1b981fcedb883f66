"""What a check found, a line each: ok, a warning, or a fault, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import typer

CheckLevel = Literal["ok", "warning", "fault"]


class CheckResult(NamedTuple):
    """One line of a check."""

    level: CheckLevel
    message: str
    remedy: str = ""


LEVEL_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "fault": typer.colors.RED}


def print_results(results: Iterable[CheckResult]) -> None:
    """Print them as they come; ends the command with exit status 1 when one is a fault."""
    faults = 0
    for finding in results:
        typer.secho(f"{finding.level:8}", fg=LEVEL_COLOURS[finding.level], nl=False)
        typer.echo(f"{finding.message}{f': {finding.remedy}' if finding.remedy else ''}")
        faults += finding.level == "fault"
    if faults:
        raise typer.Exit(1)
