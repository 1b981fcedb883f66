"""Our log lines: for people, or with CONSILIUM_LOG=json one JSON object a line that says what it belongs to (run, stage, round, centre).

By these a line of the coordinator's and one of a centre's find each other. No line names a patient, a scan or a path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

PREFIX = "consilium  "
_about: ContextVar[dict[str, str | int]] = ContextVar("about", default={})  # noqa: B039 (never changed in place)


@contextlib.contextmanager
def about(**facts: str | int) -> Iterator[None]:
    """What every line written inside belongs to."""
    token = _about.set(_about.get() | facts)
    try:
        yield
    finally:
        _about.reset(token)


def add_facts(record: logging.LogRecord) -> bool:
    """A logging filter."""
    record.__dict__.update(_about.get())
    return True


def set_up() -> None:
    """Let the lines of our loggers go to stdout, once a process."""
    logger = logging.getLogger("consilium")
    logger.setLevel(logging.INFO)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(add_facts)
    if os.environ.get("CONSILIUM_LOG") == "json":
        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        formatter = JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=fields, datefmt="%Y-%m-%dT%H:%M:%S%z")
        handler.setFormatter(formatter)
    else:
        handler.setFormatter(logging.Formatter(f"{PREFIX}%(message)s"))
    logger.addHandler(handler)


def said(line: str) -> str | None:
    """The message of one of our lines, whichever its form; None of anybody else's."""
    if line.startswith(PREFIX):
        return line.removeprefix(PREFIX).rstrip()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        entry = json.loads(line)
        return str(entry["message"]) if str(entry["logger"]).startswith("consilium") else None
    return None
