"""The ledger on real databases: SQLite, and PostgreSQL where its server is installed."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from common.utils.errors import ConsiliumError, RefusalCode
from server.ledger.ledger import ArtifactKind, Ledger
from server.ledger.tables import schema
from server.run.records import (
    CentreRound,
    CentreScores,
    RoundRecord,
    TaskScores,
    WorstCentre,
    parse_task_scores,
)

START = datetime(2020, 3, 1, 12, 0, tzinfo=UTC)
ACCEPTED = CentreRound(
    accepted=True,
    scans=30,
    steps=3,
    norm=0.5,
    loss=0.7,
    seconds=1.5,
    bytes_up=5_000_000_000,
    bytes_down=9,
)
LEFT_OUT = CentreRound(
    accepted=False,
    reason="not finite",
    code=RefusalCode.BAD_REPLY,
    scans=30,
    loss=math.nan,
    norm=math.inf,
)
SCORES = {
    "covid": TaskScores(
        centres={
            "north": CentreScores({"n": 30.0, "auc": 0.9}),
            "south": CentreScores(
                {"n": 9.0, "auc": None}, reasons={"auc": "one class only (no positive scan among 9)"}
            ),
        },
        macro={"auc": 0.9},
        pooled={"n": 39.0, "auc": 0.8},
        worst={"auc": WorstCentre(0.9, "north")},
        spread={"auc": 0.0},
        challenge_score=0.7,
    )
}


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new folder/ledger.db"
    address: str = request.getfixturevalue("postgresql")
    return address


def start_run(address: str, run_id: str = "r1", parent_run_id: str | None = None) -> Ledger:
    ledger = Ledger(address)
    ledger.add_run(
        run_id,
        recipe="multisource",
        mode="federated",
        config={"seed": 1, "tasks": {"covid": {}}},
        code_fingerprint="abc",
        parent_run_id=parent_run_id,
    )
    return ledger


def close_round(
    ledger: Ledger, number: int, close_reason: str = "every centre replied", **contributions: CentreRound
) -> int:
    closed_round = RoundRecord(
        number,
        seconds=2.5,
        weights={"backbone": {"north": 0.75, "south": 0.25}, "covid": {"north": 1.0}},
        effective_centres={"backbone": 1.6, "covid": 1.0},
        centres=contributions or {"north": ACCEPTED, "south": LEFT_OUT},
        validation=SCORES,
    )
    return ledger.add_round("r1", "main", closed_round, started=START, close_reason=close_reason)


def open_engine(address: str) -> sa.Engine:
    """Connect like some other program."""
    return sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:"))


def test_written_rows_are_read_back(address: str) -> None:
    ledger = start_run(address)
    ledger.add_centre("r1", "north", {"counts": {"train": {"covid": {"1": 3}}}, "device": "cpu"})
    ledger.log_event("r1", "left_out", "not finite", centre="south", code=RefusalCode.BAD_REPLY)
    assert close_round(ledger, 1) == 1
    ledger.add_metrics("r1", "main", 1, "test", SCORES)
    ledger.log_event("r1", "finished")

    reopened = Ledger(address)  # another process, later
    (run,) = reopened.read_runs()
    assert (run["id"], run["recipe"], run["status"]) == ("r1", "multisource", "finished")
    assert (run["code_fingerprint"], run["parent_run_id"]) == ("abc", None)
    assert run["config"]["tasks"] == {"covid": {}}
    assert run["since"] >= run["created"] > START
    events = reopened.read_events("r1")
    assert [event["kind"] for event in events] == ["started", "left_out", "finished"]
    assert [event["code"] for event in events] == [None, "bad_reply", None]
    assert reopened.read_centres("r1")[0]["metadata"] == {
        "counts": {"train": {"covid": {"1": 3}}},
        "device": "cpu",
    }
    (row,) = reopened.read_rounds("r1")
    assert (row["started"], row["seconds"], row["close_reason"]) == (START, 2.5, "every centre replied")
    north, south = reopened.read_contributions("r1")
    assert dataclasses.asdict(ACCEPTED).items() <= north.items()
    assert (south["accepted"], south["reason"], south["code"]) == (False, "not finite", "bad_reply")
    assert (south["loss"], south["norm"]) == (None, None)
    backbone, covid = reopened.read_group_weights("r1")
    assert (backbone["group"], backbone["effective_centres"]) == ("backbone", pytest.approx(1.6))
    assert backbone["centre_weights"] == {"north": 0.75, "south": 0.25}
    assert (covid["group"], covid["effective_centres"]) == ("covid", 1.0)
    assert covid["centre_weights"] == {"north": 1.0}
    val, test = reopened.read_scores("r1")
    assert (val["split"], val["attempt"], test["split"], test["task"]) == ("val", 1, "test", "covid")
    for row in (val, test):
        assert parse_task_scores(row) == SCORES["covid"]
    assert "centres" not in reopened.read_scores("r1", include_centres=False)[0]


def test_non_finite_values_are_null_also_inside_scores(address: str) -> None:
    ledger = start_run(address)
    scores = TaskScores(
        centres={"north": CentreScores({}, loss=math.nan)},
        macro={"loss": math.inf},
        pooled={},
        worst={},
        spread={},
    )
    ledger.add_metrics("r1", "main", 1, "test", {"covid": scores})
    (row,) = ledger.read_scores("r1")
    assert row["centres"] == {"north": {"metrics": {}, "loss": None, "reasons": {}}}
    assert row["summaries"]["macro"] == {"loss": None}


def test_sums_are_not_written_with_scores(address: str) -> None:
    ledger = start_run(address)
    with_sums = dataclasses.replace(SCORES["covid"], sums={"north": [[1.0], [2.0]]})
    ledger.add_metrics("r1", "main", 1, "test", {"covid": with_sums})
    assert parse_task_scores(ledger.read_scores("r1")[0]) == SCORES["covid"]


def test_the_database_itself_refuses_changes(address: str) -> None:
    ledger = start_run(address)
    ledger.add_centre("r1", "north", {})
    ledger.add_artifact("r1", ArtifactKind.IMAGE_STATISTICS, {"area": {}})
    ledger.log_progress("r1", "main", 1, "train", asked_centres=["north"])
    ledger.log_audit("ada", "start", "a trial", "r1")
    ledger.add_account("ada", "operator", None)
    close_round(ledger, 1)
    engine = open_engine(address)
    for table in schema.tables.values():
        statements = [f"UPDATE {table.name} SET id = id", f"DELETE FROM {table.name}"]
        if engine.name == "postgresql":
            statements.append(f"TRUNCATE {table.name} CASCADE")
        for statement in statements:
            with pytest.raises(sa.exc.SQLAlchemyError, match="append-only"), engine.begin() as connection:
                connection.execute(sa.text(statement))
    engine.dispose()
    assert ledger.read_status("r1") == "started"
    assert len(ledger.read_rounds("r1")) == 1


def test_a_transaction_is_repeated_when_its_connection_breaks(postgresql: str) -> None:
    ledger = start_run(postgresql)
    engine = open_engine(postgresql)
    autocommit_engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    terminate_waiting = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND pid <> pg_backend_pid()"
    )
    transactions = (
        lambda: ledger.log_event("r1", "paused", "asked for"),
        lambda: ledger.read_events("r1"),
    )
    with ThreadPoolExecutor(1) as executor:
        for transaction in transactions:
            with engine.begin() as lock_holder, autocommit_engine.connect() as killer:
                # The lock keeps the transaction waiting in its middle.
                lock_holder.execute(sa.text("LOCK TABLE events IN ACCESS EXCLUSIVE MODE"))
                future = executor.submit(transaction)
                while not killer.execute(terminate_waiting).all() and not future.done():
                    time.sleep(0.05)
            future.result()
    engine.dispose()
    assert [event["kind"] for event in ledger.read_events("r1")] == ["started", "paused"]


def test_a_repeated_round_is_a_higher_attempt_and_only_the_last_is_shown(address: str) -> None:
    ledger = start_run(address)
    assert close_round(ledger, 1) == 1
    assert close_round(ledger, 2, "below the quorum", north=ACCEPTED) == 1
    assert close_round(ledger, 2, "round timeout", south=ACCEPTED) == 2
    assert [(r["round"], r["attempt"], r["close_reason"]) for r in ledger.read_rounds("r1")] == [
        (1, 1, "every centre replied"),
        (2, 2, "round timeout"),
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
    ledger = start_run(address)
    start_run(address, "r2")
    assert ledger.read_status("r3") is None
    for kind in ("paused", "resumed", "left_out"):
        ledger.log_event("r1", kind)
    # Ordered by when the status was reached.
    assert [(run["id"], run["status"]) for run in ledger.read_runs()] == [
        ("r2", "started"),
        ("r1", "resumed"),
    ]
    run = ledger.read_run("r1")
    assert run is not None
    assert run["status"] == "resumed"
    assert ledger.read_run("r3") is None


def test_a_fold_names_its_cross_validation(address: str) -> None:
    ledger = start_run(address, "study-fold-0", parent_run_id="study")
    assert [run["parent_run_id"] for run in ledger.read_runs()] == ["study"]


def test_a_run_is_added_once_and_before_its_events(address: str) -> None:
    ledger = start_run(address)
    with pytest.raises(ConsiliumError, match="has a run 'r1' already"):
        start_run(address)
    with pytest.raises(ConsiliumError, match="refuses the row"):
        ledger.log_event("r7", "finished")
    assert [event["run_id"] for event in ledger.read_events("r1")] == ["r1"]


def test_a_round_that_cannot_be_written_leaves_no_rows(address: str) -> None:
    ledger = start_run(address)
    unwritable = CentreRound(accepted=None)  # type: ignore[arg-type]
    with pytest.raises(ConsiliumError):  # the second table's row is refused
        close_round(ledger, 1, north=ACCEPTED, south=unwritable)
    assert ledger.read_rounds("r1", all_attempts=True) == []
    assert ledger.read_contributions("r1", all_attempts=True) == []
    assert close_round(ledger, 1) == 1


def test_several_processes_write_to_one_new_ledger(address: str) -> None:
    script = (
        "import sys; from server.ledger.ledger import Ledger; ledger = Ledger(sys.argv[1]);"
        "ledger.add_run(sys.argv[2], recipe='', mode='', config={}, code_fingerprint='');"
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


def test_a_bad_address_is_refused_in_one_sentence_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but a text longer than a header of a hundred bytes. " * 9)
    (tmp_path / "file").touch()
    for address, sentence in {
        "ledger.db": "'ledger.db' is not a database address; write for example sqlite:///runs/ledger.db",
        "me:secret@host/x": r"'\*\*\*' is not a database address",
        "mysql://me:secret@host/x": "cannot be kept in 'mysql'",
        "postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2": r"//me:\*\*\*@127.* cannot be used",
        f"sqlite:///{tmp_path}/text.db": "file is not a database",
        f"sqlite:///{tmp_path}/file/ledger.db": "cannot be made",
    }.items():
        with pytest.raises(ConsiliumError, match=sentence) as caught:
            Ledger(address)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_ledger_of_a_newer_version_is_refused(address: str) -> None:
    start_run(address).close()
    engine = open_engine(address)
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO schema_version (time, version) VALUES ('2030-01-01 00:00:00', 99)")
        )
    engine.dispose()
    with pytest.raises(ConsiliumError, match="has schema version 99, and this program needs version 2"):
        Ledger(address)
