"""What both commands do alike: an expected error is one sentence on standard error and exit status 2, never a stack trace."""

from __future__ import annotations

import logging
import sys

import typer

from common.errors import ConsiliumError


def run(app: typer.Typer) -> None:
    """Run a Typer app as a command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except ConsiliumError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
