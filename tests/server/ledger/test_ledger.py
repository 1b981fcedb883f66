"""The ledger on real databases: SQLite, and PostgreSQL where its server is installed."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.ledger.tables import schema

START = datetime(2020, 3, 1, 12, 0, tzinfo=UTC)
REPLY = {
    "accepted": True,
    "scans": 30,
    "steps": 3,
    "norm": 0.5,
    "loss": 0.7,
    "seconds": 1.5,
    "bytes_up": 5_000_000_000,
    "bytes_down": 9,
}
LEFT_OUT = {
    "accepted": False,
    "reason": "not finite",
    "scans": 30,
    "loss": math.nan,
    "norm": math.inf,
    "else": "passed over",
}
SCORES: dict[str, Any] = {
    "covid": {
        "centres": {
            "north": {"n": 30.0, "auc": 0.9},
            "south": {"n": 9.0, "auc": None, "reasons": {"auc": "one class only (no positive scan among 9)"}},
        },
        "macro": {"auc": 0.9},
        "pooled": {"n": 39.0, "auc": 0.8},
        "worst": {"auc": {"value": 0.9, "centre": "north"}},
        "spread": {"auc": 0.0},
        "challenge_score": 0.7,
    }
}


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new folder/ledger.db"
    address: str = request.getfixturevalue("postgresql")
    return address


def begin(address: str, run: str = "r1") -> Ledger:
    ledger = Ledger(address)
    ledger.add_run(
        run, recipe="multisource", mode="federated", config={"seed": 1, "tasks": {"covid": {}}}, code="abc"
    )
    return ledger


def close_round(ledger: Ledger, round: int, because: str = "every centre replied", **replies: Any) -> int:
    return ledger.add_round(
        "r1",
        "main",
        round,
        started=START,
        seconds=2.5,
        closed_because=because,
        contributions=replies or {"north": REPLY, "south": LEFT_OUT},
        weights={"backbone": {"north": 0.75, "south": 0.25}, "covid": {"north": 1.0}},
        scores=SCORES,
    )


def test_what_is_written_is_read_back(address: str) -> None:
    ledger = begin(address)
    ledger.add_centre("r1", "north", {"counts": {"train": {"covid": {"1": 3}}}, "device": "cpu"})
    ledger.log_event("r1", "left_out", "not finite", centre="south")
    assert close_round(ledger, 1) == 1
    ledger.add_metrics("r1", "main", 1, "test", SCORES)
    ledger.log_event("r1", "finished")

    again = Ledger(address)  # another process, later
    (run,) = again.read_runs()
    assert (run["id"], run["recipe"], run["config"]["tasks"], run["status"]) == (
        "r1",
        "multisource",
        {"covid": {}},
        "finished",
    )
    assert run["since"] >= run["created"] > START
    assert [event["kind"] for event in again.read_events("r1")] == ["started", "left_out", "finished"]
    assert again.read_centres("r1")[0]["facts"] == {"counts": {"train": {"covid": {"1": 3}}}, "device": "cpu"}
    (row,) = again.read_rounds("r1")
    assert (row["started"], row["seconds"], row["closed_because"]) == (START, 2.5, "every centre replied")
    north, south = again.read_contributions("r1")
    assert REPLY.items() <= north.items()
    assert (south["accepted"], south["reason"], south["loss"], south["norm"]) == (
        False,
        "not finite",
        None,
        None,
    )
    shares = {
        share["part"]: (share["weights"], share["effective"]) for share in again.read_group_weights("r1")
    }
    assert shares == {
        "backbone": ({"north": 0.75, "south": 0.25}, pytest.approx(1.6)),
        "covid": ({"north": 1.0}, 1.0),
    }
    val, test = again.read_scores("r1")
    assert (val["split"], val["attempt"], test["split"], test["task"]) == ("val", 1, "test", "covid")
    for row in (val, test):
        assert {"centres": row["centres"], **row["views"]} == SCORES["covid"]
    assert "centres" not in again.read_scores("r1", include_centres=False)[0]


def test_what_is_not_finite_is_null_also_inside_scores(address: str) -> None:
    ledger = begin(address)
    ledger.add_metrics(
        "r1",
        "main",
        1,
        "test",
        {"covid": {"centres": {"north": {"loss": math.nan}}, "macro": {"loss": math.inf}}},
    )
    (row,) = ledger.read_scores("r1")
    assert (row["centres"], row["views"]) == ({"north": {"loss": None}}, {"macro": {"loss": None}})


def test_the_database_itself_refuses_change(address: str) -> None:
    ledger = begin(address)
    ledger.add_centre("r1", "north", {})
    ledger.add_artifact("r1", "quality", {"area": {}})
    ledger.log_progress("r1", "main", 1, "train", asked=["north"])
    ledger.log_audit("ada", "start", "a trial", "r1")
    ledger.add_account("ada", "operator", None)
    close_round(ledger, 1)
    engine = sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:"))  # some other program
    for table in schema.tables.values():
        statements = [f"UPDATE {table.name} SET id = id", f"DELETE FROM {table.name}"]
        for statement in statements + (
            [f"TRUNCATE {table.name} CASCADE"] if engine.name == "postgresql" else []
        ):
            with pytest.raises(sa.exc.SQLAlchemyError, match="append-only"), engine.begin() as database:
                database.execute(sa.text(statement))
    engine.dispose()
    assert ledger.read_status("r1") == "started"
    assert len(ledger.read_rounds("r1")) == 1


def test_what_a_broken_connection_interrupts_is_done_again(postgresql: str) -> None:
    ledger = begin(postgresql)
    other = sa.create_engine(postgresql.replace("postgresql:", "postgresql+psycopg:"))
    at_once = other.execution_options(isolation_level="AUTOCOMMIT")
    cut = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid <> pg_backend_pid()"
    )
    with ThreadPoolExecutor(1) as beside:
        for work in (lambda: ledger.log_event("r1", "paused", "asked for"), lambda: ledger.read_events("r1")):
            with other.begin() as holder, at_once.connect() as killer:
                holder.execute(
                    sa.text("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
                )  # so that it stands in the middle
                done = beside.submit(work)
                while not killer.execute(cut).all() and not done.done():
                    time.sleep(0.05)
            done.result()
    other.dispose()
    assert [event["kind"] for event in ledger.read_events("r1")] == ["started", "paused"]


def test_a_round_done_again_is_a_higher_attempt_and_the_last_is_shown(address: str) -> None:
    ledger = begin(address)
    assert close_round(ledger, 1) == 1
    assert close_round(ledger, 2, "below the quorum", north=REPLY) == 1
    assert close_round(ledger, 2, "deadline", south=REPLY) == 2
    assert [(r["round"], r["attempt"], r["closed_because"]) for r in ledger.read_rounds("r1")] == [
        (1, 1, "every centre replied"),
        (2, 2, "deadline"),
    ]
    assert [(c["round"], c["centre"]) for c in ledger.read_contributions("r1")] == [
        (1, "north"),
        (1, "south"),
        (2, "south"),
    ]
    assert [r["attempt"] for r in ledger.read_rounds("r1", all_attempts=True)] == [1, 1, 2]
    assert len(ledger.read_contributions("r1", all_attempts=True)) == 4
    assert {row["attempt"] for row in ledger.read_scores("r1") if row["round"] == 2} == {2}
    assert {row["attempt"] for row in ledger.read_group_weights("r1") if row["round"] == 2} == {2}


def test_the_status_is_the_last_status_event(address: str) -> None:
    ledger = begin(address)
    begin(address, "r2")
    assert ledger.read_status("r3") is None
    for kind in ("paused", "resumed", "left_out"):
        ledger.log_event("r1", kind)
    assert [(run["id"], run["status"]) for run in ledger.read_runs()] == [
        ("r2", "started"),
        ("r1", "resumed"),
    ]  # by when they got there


def test_a_run_is_started_once_and_must_be_known(address: str) -> None:
    ledger = begin(address)
    with pytest.raises(ConsiliumError, match="already knows a run 'r1'"):
        begin(address)
    with pytest.raises(ConsiliumError, match="refuses the row"):
        ledger.log_event("r7", "finished")
    assert [event["run"] for event in ledger.read_events("r1")] == ["r1"]


def test_a_torn_round_leaves_no_rows(address: str) -> None:
    ledger = begin(address)
    with pytest.raises(ConsiliumError):
        close_round(ledger, 1, north=REPLY, south={"accepted": None})  # the second table's row is refused
    assert (
        ledger.read_rounds("r1", all_attempts=True)
        == ledger.read_contributions("r1", all_attempts=True)
        == []
    )
    assert close_round(ledger, 1) == 1


def test_several_processes_write_one_new_ledger(address: str) -> None:
    script = (
        "import sys; from server.ledger import Ledger; ledger = Ledger(sys.argv[1]);"
        "ledger.add_run(sys.argv[2], recipe='', mode='', config={}, code='');"
        "[ledger.log_event(sys.argv[2], 'note', str(i)) for i in range(20)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, address, f"r{i}"], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    ledger = Ledger(address)
    for i in range(3):
        assert [event["detail"] for event in ledger.read_events(f"r{i}")] == ["", *map(str, range(20))]


def test_bad_addresses_are_one_sentence_and_never_show_a_password(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text(
        "no database, but a text that is longer than a header of a hundred bytes. " * 9
    )
    (tmp_path / "file").touch()
    for address, sentence in {
        "ledger.db": "'ledger.db' is no database address; write e.g. sqlite:///runs/ledger.db",
        "me:secret@host/x": r"'\*\*\*' is no database address",
        "mysql://me:secret@host/x": "cannot be kept in 'mysql'",
        "postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2": r"//me:\*\*\*@127.* cannot be used",
        f"sqlite:///{tmp_path}/text.db": "file is not a database",
        f"sqlite:///{tmp_path}/file/ledger.db": "folder cannot be made",
    }.items():
        with pytest.raises(ConsiliumError, match=sentence) as caught:
            Ledger(address)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_ledger_of_another_version_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "old.db") as old:
        old.execute(
            "CREATE TABLE runs (id VARCHAR PRIMARY KEY, created DATETIME, recipe VARCHAR, mode VARCHAR, config JSON)"
        )
    with pytest.raises(ConsiliumError, match=r"another version \(its runs lack code\); name a new ledger"):
        Ledger(f"sqlite:///{tmp_path}/old.db")
