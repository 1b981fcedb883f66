"""Log lines carry their context, and both formats can be parsed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from common.utils.log_setup import add_context_fields, log_context, parse_log_message

ROOT = Path(__file__).resolve().parents[3]
LOGGING_SCRIPT = """
import logging
from common.utils.log_setup import configure_logging, log_context
configure_logging()
configure_logging()
with log_context(run="r1", stage="main"), log_context(round=3):
    logging.getLogger("consilium.server").info("%s is late", "north")
logging.getLogger("consilium.server").info("done")
logging.getLogger("consilium.server").debug("never")
"""


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_lines_in_json_and_text_format(log_format: str) -> None:
    output = subprocess.run(
        [sys.executable, "-c", LOGGING_SCRIPT],
        cwd=ROOT,
        env={"CONSILIUM_LOG": log_format},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [parse_log_message(line) for line in output.splitlines()] == ["north is late", "done"]
    if log_format == "text":
        assert output == "consilium  north is late\nconsilium  done\n"
        return
    first, second = map(json.loads, output.splitlines())
    assert first.pop("time")
    assert first == {
        "level": "INFO",
        "logger": "consilium.server",
        "message": "north is late",
        "run": "r1",
        "stage": "main",
        "round": 3,
    }
    assert second.keys() == {"time", "level", "logger", "message"}


def test_context_ends_with_its_block() -> None:
    with pytest.raises(ValueError, match="x"), log_context(run="r"):
        raise ValueError("x")
    record = logging.makeLogRecord({})
    assert add_context_fields(record)
    assert not hasattr(record, "run")


@pytest.mark.parametrize(
    "line",
    [
        "INFO : Starting",
        "{",
        '{"logger": "flwr", "message": "x"}',
        '{"message": "x"}',
        "[1]",
        "consilium",
        "",
    ],
)
def test_lines_of_other_programs_have_no_message(line: str) -> None:
    assert parse_log_message(line) is None
