"""A line says what it belongs to, on both sides by the same words."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from common.utils.log_setup import add_context_fields, log_context
from common.utils.log_setup import parse_log_message as message_of

ROOT = Path(__file__).resolve().parents[3]
SAY = """
import logging
from common.logs import about, set_up
set_up()
set_up()
with about(run="r1", stage="main"), about(round=3):
    logging.getLogger("consilium.server").info("%s is late", "north")
logging.getLogger("consilium.server").info("done")
logging.getLogger("consilium.server").debug("never")
"""


@pytest.mark.parametrize("how", ["json", "text"])
def test_lines_for_machines_and_for_people(how: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SAY],
        cwd=ROOT,
        env={"CONSILIUM_LOG": how},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [message_of(line) for line in said.stdout.splitlines()] == ["north is late", "done"]
    if how == "text":
        assert said.stdout == "consilium  north is late\nconsilium  done\n"
        return
    first, second = map(json.loads, said.stdout.splitlines())
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


def test_what_a_line_belongs_to_ends_with_its_block() -> None:
    with pytest.raises(ValueError, match="x"), log_context(run="r"):
        raise ValueError("x")
    record = logging.makeLogRecord({})
    assert add_context_fields(record)
    assert not hasattr(record, "run")


def test_lines_that_are_not_ours() -> None:
    for line in (
        "INFO : Starting",
        "{",
        '{"logger": "flwr", "message": "x"}',
        '{"message": "x"}',
        "[1]",
        "consilium",
        "",
    ):
        assert message_of(line) is None
