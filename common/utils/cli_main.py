"""What both commands do alike: an expected error is one sentence on standard error and exit status 2, never a stack trace."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console

from common.utils.errors import ConsiliumError


def run_app(app: typer.Typer) -> None:
    """Run a Typer app as a command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except ConsiliumError as error:
        _exit_with_error(str(error))
    except OSError as error:
        if error.filename is None:  # not of a file that the person named: a fault of ours
            raise
        _exit_with_error(
            f"{error.filename} cannot be used ({error.strerror}); give another place, or make this one readable and writable"
        )


def print_plain(console: Console, text: str) -> None:
    """A line as it is: names and paths are no markup, and are not cut."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _exit_with_error(sentence: str) -> None:
    typer.secho(f"error: {sentence}", fg=typer.colors.RED, err=True)
    sys.exit(2)
