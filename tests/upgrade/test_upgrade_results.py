"""Results of 0.1.0 are converted without loss, are fit for every command, and can be backed up."""

# ruff: noqa: F811 (fixtures are imported, and arguments of the same name)

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from common.config.parse import parse_config
from common.utils.atomic_files import hash_file
from common.utils.errors import ConsiliumError
from server.cli import app
from server.ledger.ledger import Ledger
from server.operations.backup import restore_backup, write_backup
from server.reporting.export import EXPORTERS
from server.rounds.cross_validation import resume_run_or_folds
from server.rounds.run_lifecycle import find_run_dir
from server.run.records import metrics_schema, parse_result, parse_summary
from tests.in_process_federation import InProcess
from tests.upgrade.recorded_coordinator import count_rows, read_json, runs, upgraded  # noqa: F401

FINISHED = ("finished", "finished-patient", "finished-personal", "loco-without-north")


def call_server_command(*arguments: str) -> str:
    """Run `consilium-server` and return what it prints, as one line."""
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    return " ".join(outcome.output.split())


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
