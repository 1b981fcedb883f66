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


def fill_every_table(address: str) -> Ledger:
    ledger = start_run(address)
    ledger.add_centre("r1", "north", {})
    ledger.add_artifact("r1", ArtifactKind.IMAGE_STATISTICS, {"area": {}})
    ledger.log_progress("r1", "main", 1, "train", asked_centres=["north"])
    ledger.log_audit("ada", "start", "a trial", "r1")
    ledger.add_account("ada", "operator", None)
    close_round(ledger, 1)
    return ledger


def read_all_tables(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    with engine.connect() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(table.c.id))]
            for table in schema.tables.values()
        }


def require_refusal(engine: sa.Engine, statements: list[str]) -> None:
    """Each statement must be refused, and no table may differ afterwards."""
    before = read_all_tables(engine)
    for statement in statements:
        with pytest.raises(sa.exc.SQLAlchemyError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert read_all_tables(engine) == before


def test_the_database_itself_refuses_changes(address: str) -> None:
    ledger = fill_every_table(address)
    engine = open_engine(address)
    for table in schema.tables.values():
        columns = ", ".join(f'"{column.name}"' for column in table.columns)
        copy = f"INTO {table.name} ({columns}) SELECT {columns} FROM {table.name} WHERE TRUE"
        statements = [
            f"UPDATE {table.name} SET id = id",
            f"DELETE FROM {table.name}",
            f"INSERT {copy} ON CONFLICT (id) DO UPDATE SET id = excluded.id",
        ]
        if engine.name == "postgresql":
            statements.append(f"TRUNCATE {table.name} CASCADE")
        else:
            statements += [
                f"UPDATE OR REPLACE {table.name} SET id = id",
                f"REPLACE {copy}",
                *(f"INSERT OR {policy} {copy}" for policy in ("REPLACE", "IGNORE", "FAIL", "ROLLBACK")),
            ]
        require_refusal(engine, statements)
    engine.dispose()
    assert ledger.read_status("r1") == "started"
    assert len(ledger.read_rounds("r1")) == 1


def test_sqlite_refuses_to_replace_a_row_by_another_key(tmp_path: Path) -> None:
    """Beside its id a row has other unique keys, and a hidden number where its id is a text."""
    address = f"sqlite:///{tmp_path}/ledger.db"
    fill_every_table(address).close()
    engine = open_engine(address)
    rounds = "INSERT OR REPLACE INTO rounds (run_id, stage, round, attempt, started, seconds, close_reason)"
    runs = "INSERT OR REPLACE INTO runs (rowid, id, created, recipe, mode, config, code_fingerprint)"
    hashes = "previous_hash, entry_hash"
    audit = f"INSERT OR REPLACE INTO audit (time, actor, action, run_id, centre, reason, {hashes})"
    require_refusal(
        engine,
        [
            f"{rounds} SELECT run_id, stage, round, attempt, started, 0, 'never' FROM rounds",
            f"{runs} SELECT rowid, 'other', created, recipe, mode, config, code_fingerprint FROM runs",
            f"{audit} SELECT time, 'eve', action, run_id, centre, reason, {hashes} FROM audit",
        ],
    )
    engine.dispose()


def test_sqlite_refuses_a_row_in_the_past(tmp_path: Path) -> None:
    """A gap is not filled, and the number that stands for "not set" before an insertion is not used up."""
    address = f"sqlite:///{tmp_path}/ledger.db"
    ledger = start_run(address)
    engine = open_engine(address)
    insert = "INSERT INTO events (id, run_id, time, kind, detail) VALUES ({}, 'r1', '2026-01-01', 'note', '')"
    with engine.begin() as connection:
        connection.exec_driver_sql(insert.format(100))
    account = "INSERT INTO accounts (id, time, name, role) VALUES (-1, '2026-01-01', 'eve', 'viewer')"
    require_refusal(engine, [*(insert.format(number) for number in (50, 0, -1)), account])
    engine.dispose()
    ledger.log_event("r1", "finished")
    assert ledger.read_status("r1") == "finished"


def test_an_older_ledger_gets_the_triggers_that_it_lacks(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite's of an earlier 0.2.0 did not refuse INSERT OR REPLACE; dropped ones come back too."""
    fill_every_table(address).close()
    engine = open_engine(address)
    with engine.begin() as connection:
        if engine.name == "postgresql":
            connection.exec_driver_sql("DROP TRIGGER accounts_append_only ON accounts")
        else:
            connection.exec_driver_sql("DROP TRIGGER accounts_no_REPLACE")
            connection.exec_driver_sql("DROP TRIGGER accounts_no_DELETE")
    Ledger(address).close()
    statements = ["DELETE FROM accounts"]
    if engine.name == "sqlite":
        statements.append("INSERT OR REPLACE INTO accounts SELECT * FROM accounts")
    require_refusal(engine, statements)
    engine.dispose()
    assert "lacked triggers that refuse changes" in caplog.text
    caplog.clear()
    Ledger(address).close()
    assert caplog.text == ""


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
