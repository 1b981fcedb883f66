"""Format log lines for people or, with CONSILIUM_LOG=json, as one JSON object per line.

A JSON line has the fields of its context (run, stage, round, centre), by which lines of the coordinator and
of a centre can be matched. No line names a patient, a scan or a path.
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

LOGGER_NAME = "consilium"
LOG_PREFIX = f"{LOGGER_NAME}  "
JSON_FIELD_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}
# The default is never modified.
_context_fields: ContextVar[dict[str, str | int]] = ContextVar("log_context", default={})  # noqa: B039


@contextlib.contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """Add fields to every line that is logged within the block."""
    token = _context_fields.set(_context_fields.get() | fields)
    try:
        yield
    finally:
        _context_fields.reset(token)


def add_context_fields(record: logging.LogRecord) -> bool:
    """Add the fields of the context to a log record; a logging filter that keeps every record."""
    record.__dict__.update(_context_fields.get())
    return True


def configure_logging() -> None:
    """Send the lines of Consilium's loggers to standard output; further calls have no effect."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(logging.INFO)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(add_context_fields)
    handler.setFormatter(_make_formatter())
    logger.addHandler(handler)


def _make_formatter() -> logging.Formatter:
    """Return the formatter that the environment selects."""
    if os.environ.get("CONSILIUM_LOG") != "json":
        return logging.Formatter(f"{LOG_PREFIX}%(message)s")
    return JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields=JSON_FIELD_NAMES,
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )


def parse_log_message(line: str) -> str | None:
    """Return the message of a Consilium log line in either format, or None for any other line."""
    if line.startswith(LOG_PREFIX):
        return line.removeprefix(LOG_PREFIX).rstrip()
    try:
        entry = json.loads(line)
        message = str(entry["message"])
        logger_name = str(entry["logger"])
    except (ValueError, KeyError, TypeError):
        return None
    if not logger_name.startswith(LOGGER_NAME):
        return None
    return message
