"""A ledger of 0.1.0 is migrated whole; until then it, its results and unfinished runs are refused."""

# ruff: noqa: F811 (fixtures are imported, and arguments of the same name)

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from common.config.parse import parse_config
from common.utils.atomic_files import hash_file
from common.utils.errors import ConsiliumError
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.operations.upgrade import upgrade_coordinator
from server.rounds.cross_validation import resume_run_or_folds
from server.rounds.run_lifecycle import load_run_config
from server.run import checkpoint
from server.run.records import parse_result, parse_summary
from tests.in_process_federation import InProcess
from tests.server.ledger.ledger_0_1_0 import schema as old_schema
from tests.upgrade.recorded_coordinator import count_rows, read_json, runs, upgrade, upgraded  # noqa: F401

UNFINISHED = (
    "loco",
    "loco-without-east",
    "paused-central",
    "paused-fedadam",
    "paused-patient",
    "paused-personal",
    "paused-secagg",
    "paused-transfer",
)


# --- before the upgrade


def test_old_ledger_is_refused_with_the_command_that_migrates_it(runs: Path) -> None:
    with pytest.raises(ConsiliumError, match="consilium-server upgrade"):
        Ledger(f"sqlite:///{runs}/ledger.db")


def test_old_results_are_refused_with_the_command_that_converts_them(runs: Path) -> None:
    for path, parse in (("finished/metrics.json", parse_result), ("kfold/crossval.json", parse_summary)):
        with pytest.raises(ConsiliumError, match=r"version 0\.1\.0; .*consilium-server upgrade"):
            parse(read_json(runs / path))
    with pytest.raises(ConsiliumError, match=r"version 0\.1\.0; .*consilium-server upgrade"):
        load_run_config(runs / "finished")


@pytest.mark.parametrize("run_id", UNFINISHED)
def test_unfinished_run_is_refused_and_not_begun_anew(runs: Path, run_id: str) -> None:
    before = sorted(runs.rglob("*"))
    ledger = Ledger("sqlite:///new.db")
    with pytest.raises(ConsiliumError, match=rf"run '{run_id}' was started by version 0\.1\.0; finish it"):
        resume_run_or_folds(run_id, InProcess([]), runs, ledger)
    assert ledger.read_runs() == []
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("run_id", [run_id for run_id in UNFINISHED if run_id.startswith("paused")])
def test_old_checkpoint_is_refused_even_under_a_new_configuration(runs: Path, run_id: str) -> None:
    with pytest.raises(ConsiliumError, match=r"written by version 0\.1\.0, and only that version can finish"):
        checkpoint.load_latest(runs / run_id)


def test_upgrade_asks_to_finish_unfinished_runs_first(runs: Path) -> None:
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    address = f"sqlite:///{runs}/ledger.db"
    with pytest.raises(ConsiliumError, match=r"paused-fedadam.*finish them with it first"):
        list(upgrade_coordinator(runs, address, address))
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


# --- the ledger


def test_ledger_is_migrated_with_all_rows_and_the_old_file_is_kept(upgraded: Path) -> None:
    old_path = upgraded / "ledger.db.0.1.0"
    ledger = Ledger(f"sqlite:///{upgraded}/ledger.db")
    with sqlite3.connect(old_path) as database:
        run_ids = {run_id for (run_id,) in database.execute("SELECT id FROM runs")}
    assert {row["id"] for row in ledger.read_runs()} == run_ids
    ledger.close()
    renamed = {"shares": "group_weights", "evidence": "artifacts"}
    for table in ("events", "centres", "rounds", "contributions", "scores", "progress", "audit", *renamed):
        new_table = renamed.get(table, table)
        assert count_rows(upgraded / "ledger.db", new_table) == count_rows(old_path, table) > 0
    assert count_rows(upgraded / "ledger.db", "accounts") == 2


def test_audit_trail_verifies_after_the_upgrade_and_goes_on(upgraded: Path) -> None:
    ledger = Ledger(f"sqlite:///{upgraded}/ledger.db")
    entries = ledger.read_audit()
    assert {"exclude", "readmit", "pause"} <= {entry["action"] for entry in entries}
    ledger.log_audit("anna", "start", "", "new")
    assert first_broken_link(ledger.read_audit()) is None
    assert len(ledger.read_audit()) == len(entries) + 1


def test_statuses_and_folds_are_those_of_the_old_ledger(upgraded: Path) -> None:
    rows = {row["id"]: row for row in Ledger(f"sqlite:///{upgraded}/ledger.db").read_runs()}
    assert rows["finished"]["status"] == "finished"
    assert rows["paused-fedadam"]["status"] == "paused"
    assert rows["kfold-fold-1"]["parent_run_id"] == "kfold"
    assert rows["loco-without-north"]["parent_run_id"] == "loco"
    for row in rows.values():
        parse_config(row["config"])


def test_upgrade_may_be_repeated(upgraded: Path) -> None:
    before = {path: path.read_bytes() for path in upgraded.rglob("*.json") if path.is_file()}
    kept = hash_file(upgraded / "ledger.db.0.1.0")
    sentences = list(upgrade(upgraded))
    assert "has the present form already" in sentences[0]
    assert not [sentence for sentence in sentences if "converted" in sentence]
    assert {path: path.read_bytes() for path in upgraded.rglob("*.json") if path.is_file()} == before
    assert hash_file(upgraded / "ledger.db.0.1.0") == kept


def test_ledger_in_use_is_not_replaced(runs: Path) -> None:
    with sqlite3.connect(runs / "ledger.db") as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("SELECT count(*) FROM runs").fetchone()
        with pytest.raises(ConsiliumError, match="open in another program"):
            list(upgrade(runs))
    database.close()
    assert not (runs / "ledger.db.0.1.0").exists()
    assert not list(runs.glob(".ledger*"))
    list(upgrade(runs))


def test_ledger_is_copied_to_postgresql(runs: Path, postgresql: str) -> None:
    old = f"sqlite:///{runs}/ledger.db"
    sentences = list(upgrade_coordinator(runs, old, postgresql, leave_unfinished=True))
    assert any("the audit trail is intact" in sentence for sentence in sentences)
    ledger = Ledger(postgresql)
    assert len(ledger.read_runs()) == count_rows(runs / "ledger.db", "runs")
    ledger.log_audit("anna", "start", "", "new")
    assert first_broken_link(ledger.read_audit()) is None
    ledger.close()


@pytest.fixture
def empty_database(postgresql: str) -> Iterator[str]:
    """The address of another database of the same server."""
    server = sa.create_engine(
        postgresql.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with server.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE upgraded"))
    yield sa.make_url(postgresql).set(database="upgraded").render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(sa.text("DROP DATABASE upgraded WITH (FORCE)"))
    server.dispose()


def test_postgresql_ledger_is_copied_to_an_empty_database_and_not_migrated_in_place(
    runs: Path, postgresql: str, empty_database: str
) -> None:
    engine = sa.create_engine(postgresql.replace("postgresql:", "postgresql+psycopg:"))
    _copy_old_ledger(runs / "ledger.db", engine)
    try:
        with pytest.raises(ConsiliumError, match="give its address with --to"):
            list(upgrade_coordinator(runs, postgresql, postgresql, leave_unfinished=True))
        sentences = list(upgrade_coordinator(runs, postgresql, empty_database, leave_unfinished=True))
        assert any("the audit trail is intact" in sentence for sentence in sentences)
        ledger = Ledger(empty_database)
        assert len(ledger.read_runs()) == count_rows(runs / "ledger.db", "runs")
        ledger.close()
        with engine.connect() as connection:
            num_old_rows = connection.scalar(sa.text("SELECT count(*) FROM shares"))
        assert num_old_rows == count_rows(runs / "ledger.db", "shares")
    finally:
        old_schema.drop_all(engine)
        engine.dispose()


def _copy_old_ledger(path: Path, engine: sa.Engine) -> None:
    """Write the rows of a SQLite ledger of 0.1.0 to a PostgreSQL database of the same tables."""
    old_schema.create_all(engine)
    source = sa.create_engine(f"sqlite:///{path}")
    with source.connect() as reader, engine.begin() as writer:
        for table in old_schema.sorted_tables:
            rows = [dict(row) for row in reader.execute(sa.select(table)).mappings()]
            if rows:
                writer.execute(table.insert(), rows)
    source.dispose()
