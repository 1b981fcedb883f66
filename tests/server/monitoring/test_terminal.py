"""A run's status in the terminal, and the exports by the command."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from common.config.parse import parse_config
from common.utils.errors import ConsiliumError
from server.cli import app
from server.ledger.ledger import Ledger
from server.monitoring import terminal
from tests.server.monitoring.test_prometheus import ledger as ledger  # a run of two rounds


def print_status(ledger: Ledger, run_id: str) -> str:
    """Return a run's status as the terminal shows it."""
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal.render_status(ledger, terminal.resolve_run(ledger, run_id)))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_show_prints_what_the_ledger_holds(ledger: Ledger) -> None:
    text = print_status(ledger, "latest")
    num_rounds = parse_config(ledger.read_runs()[-1]["config"]).stages["main"].rounds
    assert "r  multisource, federated  started" in text
    assert f"2 of {num_rounds} rounds done" in text
    assert "a round takes 12.5 s" in text
    scores = "mean 0.900, worst 0.900 (north; first 0.900, highest so far 0.900)"
    assert f"ROC-AUC on validation: {scores}" in text
    south = next(line for line in text.splitlines() if "│ south" in line)
    assert "1.85 of 4" in south  # epsilon and the hospital's limit
    assert "0.750" in south
    assert "south: ROC-AUC undefined: one class only" in text


def test_unknown_run_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ConsiliumError, match="has no run 'x'"):
        terminal.resolve_run(ledger, "x")


def test_watch_ends_with_the_run(ledger: Ledger) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    terminal.watch_status(ledger, "old", None, console)
    assert "finished" in console.file.getvalue()  # type: ignore[attr-defined]


def make_export_arguments(ledger: Ledger, runs_dir: Path) -> list[str]:
    """Make a folder for the run and return the command that exports it, without the format."""
    (runs_dir / "r").mkdir()
    (runs_dir / "r" / "config.yaml").write_text("")
    address = ledger._engine.url.render_as_string()
    return ["export", "r", "--runs", str(runs_dir), "--ledger", address]


def test_export_writes_csv(ledger: Ledger, tmp_path: Path) -> None:
    arguments = make_export_arguments(ledger, tmp_path)
    finished = CliRunner().invoke(app, [*arguments, "--to", "csv"])
    assert finished.exit_code == 0, finished.output
    assert "main,2,val,covid,centre,north,auc,0.9" in (tmp_path / "r" / "scores.csv").read_text()


def test_export_explains_what_it_cannot_write(ledger: Ledger, tmp_path: Path) -> None:
    arguments = make_export_arguments(ledger, tmp_path)
    assert "metrics.json" in str(CliRunner().invoke(app, [*arguments, "--to", "card"]).exception)
    assert "did you mean 'csv'" in str(CliRunner().invoke(app, [*arguments, "--to", "csw"]).exception)


def test_export_writes_curves_that_tensorboard_reads(ledger: Ledger, tmp_path: Path) -> None:
    arguments = make_export_arguments(ledger, tmp_path)
    out = tmp_path / "tb"
    finished = CliRunner().invoke(app, [*arguments, "--to", "tensorboard", "--out", str(out)])
    assert finished.exit_code == 0, finished.output
    curves = EventAccumulator(str(out / "r" / "north"))
    curves.Reload()
    points = [(event.step, round(event.value, 6)) for event in curves.Scalars("covid/auc/val")]
    assert points == [(0, 0.9), (1, 0.9)]
    assert [event.value for event in curves.Scalars("weight/backbone")] == [0.25, 0.25]
