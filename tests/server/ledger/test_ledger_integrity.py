"""The ledger is append-only, whole after failures, and refuses wrong rows, addresses and versions."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from common.utils.errors import ConsiliumError
from server.ledger.ledger import ArtifactKind, Ledger
from server.ledger.tables import schema
from server.run.records import CentreRound
from tests.server.ledger.ledger_rows import ACCEPTED, close_round, start_run


def open_engine(address: str) -> sa.Engine:
    """Connect like some other program."""
    return sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:"))


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
