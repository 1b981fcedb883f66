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

LOG_PREFIX = "consilium  "
_context_fields: ContextVar[dict[str, str | int]] = ContextVar("about", default={})  # noqa: B039 (never changed in place)


@contextlib.contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """What every line written inside belongs to."""
    token = _context_fields.set(_context_fields.get() | fields)
    try:
        yield
    finally:
        _context_fields.reset(token)


def add_context_fields(record: logging.LogRecord) -> bool:
    """A logging filter."""
    record.__dict__.update(_context_fields.get())
    return True


def configure_logging() -> None:
    """Let the lines of our loggers go to stdout, once a process."""
    logger = logging.getLogger("consilium")
    logger.setLevel(logging.INFO)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(add_context_fields)
    if os.environ.get("CONSILIUM_LOG") == "json":
        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        formatter = JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields=fields,
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
        handler.setFormatter(formatter)
    else:
        handler.setFormatter(logging.Formatter(f"{LOG_PREFIX}%(message)s"))
    logger.addHandler(handler)


def parse_log_message(line: str) -> str | None:
    """The message of one of our lines, whichever its form; None of anybody else's."""
    if line.startswith(LOG_PREFIX):
        return line.removeprefix(LOG_PREFIX).rstrip()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        entry = json.loads(line)
        return str(entry["message"]) if str(entry["logger"]).startswith("consilium") else None
    return None
