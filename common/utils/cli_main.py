"""Run a command so that an error is one sentence on standard error.

An expected error ends with exit status 2. An unexpected one, a defect, ends with 70 (EX_SOFTWARE of
sysexits.h), and nothing of what the program was working on is printed.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import typer
from rich.console import Console

from common.utils.error_reports import report_unexpected_error, withhold_texts
from common.utils.errors import ConsiliumError

EXIT_INPUT_ERROR = 2
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as of a shell


def run_app(app: typer.Typer) -> None:
    """Run a Typer app as a command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    withhold_texts()
    try:
        typer.main.get_command(app)()  # `app()` would replace the hooks of `withhold_texts` by its own
    except ConsiliumError as error:
        _exit_with_error(str(error), EXIT_INPUT_ERROR)
    except KeyboardInterrupt:
        _exit_with_error("interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        if error.filename is None:  # not about a file that the user named, so it is a defect
            _exit_with_error(report_unexpected_error(error), EXIT_DEFECT)
        _exit_with_error(
            f"{error.filename} cannot be used ({error.strerror}); "
            "use another path, or make this one readable and writable",
            EXIT_INPUT_ERROR,
        )
    except Exception as error:
        _exit_with_error(report_unexpected_error(error), EXIT_DEFECT)


def print_plain(console: Console, text: str) -> None:
    """Print a line without markup and wrapping, which would alter names and paths."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _exit_with_error(sentence: str, status: int) -> NoReturn:
    """Print an error and exit."""
    typer.secho(f"error: {sentence}", fg=typer.colors.RED, err=True)
    sys.exit(status)
