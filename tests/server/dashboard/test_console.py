"""The console's pages without a browser: what they show of runs, ledger and audit trail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from common.protocol.image_statistics import IMAGE_STATISTICS
from common.utils.errors import ConsiliumError
from server.analysis.image_drift import summarise_histograms
from server.dashboard.launcher import LaunchedProcess
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import ArtifactKind, Ledger
from server.run.outcome import Outcome, write_outcome
from tests.deploy.postgresql_server import run_postgresql
from tests.server.dashboard.console_client import (
    CENTRES,
    PAGES,
    add_rounds,
    add_run,
    log_in_as,
    read_csrf_token,
)


def test_every_page_works_before_the_first_round(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    for path in (*PAGES, "/start", "/runs/r/order/stop"):
        assert client.get(path).status_code == 200, path
    assert client.get("/runs/none").status_code == 400
    assert client.get("/none").status_code == 404


def test_first_page_works_before_the_first_run(tmp_path: Path) -> None:
    client = log_in_as(Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"))
    assert "There is no run yet" in client.get("/").text


def test_two_runs_are_compared(ledger: Ledger) -> None:
    add_run(ledger, "other", "aggregation.tau=0.25")
    add_rounds(ledger, "r", CENTRES, 2)
    add_rounds(ledger, "other", CENTRES, 3)
    client = log_in_as(ledger)
    page = client.get("/compare?run=r&run=other")
    assert page.status_code == 200
    assert "aggregation.tau" in page.text
    assert "federation.data_root" not in page.text, "settings that are equal are not shown"
    assert client.get("/compare?run=r").status_code == 400


def test_central_run_shows_each_cohort(ledger: Ledger) -> None:
    """In central mode one centre, `pooled`, replies for four cohorts."""
    add_run(ledger, "c", "federation.mode=central", mode="central")
    histograms = {}
    for index, centre in enumerate(CENTRES):
        for name, statistic in IMAGE_STATISTICS.items():
            num_bins = len(statistic.bin_edges) - 1
            histograms[f"{centre}/quality/{name}"] = np.roll(np.arange(1.0, num_bins + 1), index)
    statistics = {name: asdict(statistic) for name, statistic in summarise_histograms(histograms).items()}
    ledger.add_artifact("c", ArtifactKind.IMAGE_STATISTICS, statistics)
    add_rounds(ledger, "c", CENTRES, 2)
    client = log_in_as(ledger)
    for path in ("/runs/c/data", "/runs/c/learning"):
        figures = client.get(path).text.partition("<script")[2]
        for centre in CENTRES:
            assert f'"name": "{centre}"' in figures or f'"name":"{centre}"' in figures, path
    drift_table = client.get("/runs/c/data").text.partition("<h2>Drift</h2>")[2]
    for centre in CENTRES:
        assert f"<span>{centre}</span>" in drift_table


@pytest.mark.parametrize("is_recent", [True, False])
def test_run_page_shows_why_a_resume_failed(ledger: Ledger, tmp_path: Path, is_recent: bool) -> None:
    """A process that was started before the run was paused says nothing about resuming it."""
    ledger.log_event("r", "paused", "enough for today")
    client = log_in_as(ledger)
    launcher = client.app.state.console.launcher  # type: ignore[attr-defined]
    write_outcome(tmp_path, "r", Outcome(False, "the SuperLink cannot be reached"))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = datetime.now(UTC) if is_recent else datetime.now(UTC) - timedelta(hours=1)
    launcher.launched["r"] = LaunchedProcess(process, started)
    run = ledger.read_run("r")
    assert run
    message = "already being resumed" if is_recent else "no run 'r'"
    with pytest.raises(ConsiliumError, match=message):
        launcher.resume_run("r", run["since"])
    process.communicate()  # closes its input, so that it fails
    assert ("the SuperLink cannot be reached" in client.get("/runs/r").text) is is_recent


def test_invalid_settings_do_not_start_a_run(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    form = {"csrf": read_csrf_token(client), "recipe": "multisource", "why": "a try"}
    response = client.post("/start", data=form | {"overrides": "stage.rouds=3"})
    assert response.status_code == 400
    assert "did you mean &#39;rounds&#39;?" in response.text
    without_reason = form | {"overrides": "stage.rounds=3", "why": ""}
    assert client.post("/start", data=without_reason).status_code == 400
    assert "start" not in {entry["action"] for entry in ledger.read_audit()}


def test_pending_run_is_shown_until_the_ledger_has_it(ledger: Ledger, tmp_path: Path) -> None:
    client = log_in_as(ledger)
    ledger.log_audit("operator", "start", "a try", "new")
    assert "new: started by operator" in client.get("/runs").text
    assert "it is starting" in client.get("/runs").text
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    process.wait()
    client.app.state.console.launcher.launched["new"] = LaunchedProcess(process, datetime.now(UTC))  # type: ignore[attr-defined]
    write_outcome(tmp_path, "new", Outcome(False, "the SuperLink cannot be reached"))
    assert "the start failed: the SuperLink cannot be reached" in client.get("/runs").text
    add_run(ledger, "new")
    assert "started by operator" not in client.get("/runs").text


@pytest.mark.skipif(
    not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    reason="no PostgreSQL here: apt install postgresql",
)
def test_pages_commands_and_audit_trail_work_on_postgresql(tmp_path: Path) -> None:
    with run_postgresql() as (address, _):
        ledger = Ledger(address)
        add_run(ledger, "r")
        add_rounds(ledger, "r", CENTRES, 5)
        client = log_in_as(ledger, runs=tmp_path)
        for path in PAGES:
            assert client.get(path).status_code == 200, path
        form = {"csrf": read_csrf_token(client), "why": "moves", "centre": "west"}
        assert client.post("/runs/r/order/exclude", data=form).status_code == 303
        assert "west is excluded by operator: moves" in client.get("/").text
        assert first_broken_link(ledger.read_audit()) is None
        with pytest.raises(ConsiliumError, match="append-only"), ledger.transaction() as database:
            database.execute(sa.text("DELETE FROM audit"))
        ledger._engine.dispose()


def test_audit_page_detects_a_changed_entry(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    assert "the chain of hashes is intact" in client.get("/audit").text
    with ledger.transaction() as database:
        database.execute(sa.text('DROP TRIGGER "audit_no_UPDATE"'))
        database.execute(sa.text("UPDATE audit SET actor = 'eve' WHERE id = 1"))
    assert "Entry 1 was changed" in client.get("/audit").text
