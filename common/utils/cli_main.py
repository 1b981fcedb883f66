"""Run a command so that an expected error is one sentence on standard error, with exit status 2."""

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
        if error.filename is None:  # not about a file that the user named, so it is a defect
            raise
        _exit_with_error(
            f"{error.filename} cannot be used ({error.strerror}); "
            "use another path, or make this one readable and writable"
        )


def print_plain(console: Console, text: str) -> None:
    """Print a line without markup and wrapping, which would alter names and paths."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _exit_with_error(sentence: str) -> None:
    """Print an error and exit with status 2."""
    typer.secho(f"error: {sentence}", fg=typer.colors.RED, err=True)
    sys.exit(2)
