"""What terminal people see: the same facts as the pages, of a run that goes on, one that is paused, and one that was never."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from common.utils.errors import ConsiliumError
from server.cli import app
from server.ledger.ledger import Ledger
from server.monitoring import terminal
from tests.server.monitoring.test_prometheus import ledger as ledger  # a run of two rounds


def text_of(ledger: Ledger, run: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal.render_status(ledger, terminal.resolve_run(ledger, run)))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_show_says_what_the_ledger_says(ledger: Ledger) -> None:
    text = text_of(ledger, "latest")
    assert "r  multisource, federated  started" in text
    assert f"2 of {ledger.read_runs()[-1]['config']['stages']['main']['rounds']} rounds closed" in text
    assert "a round takes 12.5 s" in text
    assert "ROC-AUC on validation: mean 0.900, worst 0.900 (north; began at 0.900, best so far 0.900)" in text
    south = next(line for line in text.splitlines() if "│ south" in line)
    assert "1.85 of 4" in south  # epsilon and the hospital's limit
    assert "0.750" in south
    assert "south: ROC-AUC undefined: one class only" in text
    with pytest.raises(ConsiliumError, match="knows no run 'x'"):
        terminal.resolve_run(ledger, "x")


def test_watch_ends_with_the_run(ledger: Ledger, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    terminal.watch_status(ledger, "old", None, console)
    assert "finished" in console.file.getvalue()  # type: ignore[attr-defined]


def test_export_csv_card_and_curves_by_the_command(ledger: Ledger, tmp_path: Path) -> None:
    """The curves are read again by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    address = ledger._engine.url.render_as_string()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("")
    call = ["export", "r", "--runs", str(tmp_path), "--ledger", address]
    said = CliRunner().invoke(app, [*call, "--to", "csv"])
    assert said.exit_code == 0, said.output
    assert "main,2,val,covid,centre,north,auc,0.9" in (tmp_path / "r" / "scores.csv").read_text()
    assert "metrics.json" in str(CliRunner().invoke(app, [*call, "--to", "card"]).exception)
    assert "did you mean 'csv'" in str(CliRunner().invoke(app, [*call, "--to", "csw"]).exception)
    assert (
        CliRunner().invoke(app, [*call, "--to", "tensorboard", "--out", str(tmp_path / "tb")]).exit_code == 0
    )
    curves = EventAccumulator(str(tmp_path / "tb" / "r" / "north"))
    curves.Reload()
    assert [(e.step, round(e.value, 6)) for e in curves.Scalars("covid/auc/val")] == [(0, 0.9), (1, 0.9)]
    assert [e.value for e in curves.Scalars("weight/backbone")] == [0.25, 0.25]
