"""A coordinator's ledger and results of 0.1.0 are migrated whole.

Its unfinished runs are refused, and never begun anew without a word.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import sqlalchemy as sa
import yaml
from typer.testing import CliRunner

from common.config.parse import parse_config
from common.utils.atomic_files import hash_file
from common.utils.errors import ConsiliumError
from server.cli import app
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.operations.backup import restore_backup, write_backup
from server.operations.upgrade import upgrade_coordinator
from server.reporting.export import EXPORTERS
from server.rounds.cross_validation import resume_run_or_folds
from server.rounds.run_lifecycle import find_run_dir, load_run_config
from server.run import checkpoint
from server.run.records import metrics_schema, parse_result, parse_summary
from tests.in_process_federation import InProcess
from tests.server.ledger.ledger_0_1_0 import schema as old_schema

FINISHED = ("finished", "finished-patient", "finished-personal", "loco-without-north")
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


@pytest.fixture
def runs(recorded: Path) -> Path:
    """The coordinator's folder of results, with its ledger."""
    return recorded / "coordinator/runs"


@pytest.fixture
def upgraded(runs: Path) -> Path:
    """The same after the upgrade."""
    list(upgrade(runs))
    return runs


def upgrade(runs: Path) -> Iterator[str]:
    address = f"sqlite:///{runs}/ledger.db"
    return upgrade_coordinator(runs, address, address, leave_unfinished=True)


def call_server_command(*arguments: str) -> str:
    """Run `consilium-server` and return what it prints, as one line."""
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    return " ".join(outcome.output.split())


def read_json(path: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(path.read_text())
    return values


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


def count_rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as database:
        (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)


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


# --- the results


@pytest.mark.parametrize("run_id", FINISHED)
def test_results_have_the_present_form_and_the_old_files_are_kept(upgraded: Path, run_id: str) -> None:
    folder = upgraded / run_id
    values = read_json(folder / "metrics.json")
    jsonschema.validate(values, metrics_schema())
    result = parse_result(values)
    old = read_json(folder / "metrics.json.0.1.0")
    assert (result.run_id, result.seconds, result.started) == (run_id, old["seconds"], old["started"])
    assert result.config == yaml.safe_load((folder / "config.yaml").read_text())
    parse_config(result.config)
    assert yaml.safe_load((folder / "config.yaml.0.1.0").read_text()) == old["config"]


def test_no_number_of_a_result_is_lost(upgraded: Path) -> None:
    """Every number of the old file stands in the new one as often as before."""
    for run_id in FINISHED:
        new_numbers = sorted(_iterate_numbers(read_json(upgraded / run_id / "metrics.json")))
        for number in _iterate_numbers(read_json(upgraded / run_id / "metrics.json.0.1.0")):
            new_numbers.remove(number)


def _iterate_numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _iterate_numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_best_rounds_and_scores_are_where_they_belong(upgraded: Path) -> None:
    result = parse_result(read_json(upgraded / "finished/metrics.json"))
    assert result.stages[0].best is not None
    assert result.stages[0].best.round == 0
    covid = result.test["covid"]
    assert covid.centres["north"].metrics["auc"] == 0.5
    assert covid.centres["north"].loss == pytest.approx(0.6935, abs=1e-4)
    assert result.test["source"].centres["north"].reasons["f1"] == "one class only (4 scans)"
    assert set(covid.sums) == {"north"}
    assert result.image_statistics["area"].drift == {"east": 0.4, "north": 0.4}
    assert result.fitted_tasks["source"].classes == ["east", "north"]
    personal = parse_result(read_json(upgraded / "finished-personal/metrics.json"))
    assert personal.stages[1].local_only
    assert personal.stages[1].best is None
    assert personal.stages[1].best_by_centre["east"].round == 2


def test_summary_of_a_cross_validation_is_converted(upgraded: Path) -> None:
    summary = parse_summary(read_json(upgraded / "kfold/crossval.json"))
    assert summary.evaluation == "kfold"
    assert summary.folds["fold-2"]["covid"]["accuracy"] == 0.75
    assert summary.total.test["covid"].pooled["n"] == 24.0
    assert (summary.total.run_id, summary.total.seed) == ("kfold", 1)
    assert (upgraded / "kfold/crossval.json.0.1.0").is_file()


def test_unfinished_run_is_left_as_it_was_and_still_refused(upgraded: Path) -> None:
    assert not list((upgraded / "paused-fedadam").rglob("*.0.1.0"))
    ledger = Ledger(f"sqlite:///{upgraded}/ledger.db")
    with pytest.raises(ConsiliumError, match="finish it with that version"):
        resume_run_or_folds("paused-fedadam", InProcess([]), upgraded, ledger)


def test_commands_work_on_upgraded_runs(upgraded: Path) -> None:
    folder = find_run_dir(upgraded, "finished")
    ledger = Ledger(f"sqlite:///{upgraded}/ledger.db")
    for name in ("csv", "card", "safetensors"):
        EXPORTERS[name](folder, ledger, str(upgraded / f"exported.{'md' if name == 'card' else name}"))
    for run_id in FINISHED:
        assert "report:" in call_server_command("report", run_id, "--runs", str(upgraded))
    assert "paused-fedadam" in call_server_command("runs", "--runs", str(upgraded))
    assert "north" in call_server_command("show", "finished", "--runs", str(upgraded))


def test_command_prints_what_it_did(runs: Path) -> None:
    printed = call_server_command("upgrade", str(runs), "--leave-unfinished")
    assert "the audit trail is intact" in printed
    assert "run finished: converted" in printed
    assert "run paused-secagg: not finished, and cannot be resumed by this version" in printed


# --- back-ups


def test_upgraded_folder_is_backed_up_and_restored(upgraded: Path, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    sentences = list(write_backup(file, upgraded, Ledger(f"sqlite:///{upgraded}/ledger.db")))
    assert any("paused-fedadam: only version 0.1.0" in sentence for sentence in sentences)
    restored = Ledger(f"sqlite:///{tmp_path}/restored.db")
    list(restore_backup(file, tmp_path / "restored", restored))
    assert len(restored.read_runs()) == count_rows(upgraded / "ledger.db", "runs")


def test_old_backup_is_refused_with_the_commands_that_convert_it(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.tar"
    work = tmp_path / "work"
    shutil.copytree(runs, work / "runs", symlinks=True)
    (work / "runs/ledger.db").rename(work / "ledger.db")
    (work / "SHA256SUMS").write_text(f"{hash_file(work / 'ledger.db')}  ledger.db\n")
    with tarfile.open(file, "w") as tar:
        for name in ("SHA256SUMS", "ledger.db", "runs"):
            tar.add(work / name, name)
    with pytest.raises(ConsiliumError, match=r"by version 0\.1\.0; unpack it with tar.*--ledger sqlite"):
        list(restore_backup(file, tmp_path / "restored", Ledger(f"sqlite:///{tmp_path}/new.db")))
    assert not list((tmp_path / "restored").iterdir())
