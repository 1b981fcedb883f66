"""No path, file name, scan name, patient or DICOM element leaves a hospital, even when something fails."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pandas as pd
import pydicom
import pytest

from client.federation import query_handlers
from client.federation.query_context import QueryContext
from client.phantom.federation import write_centre
from client.site.config import Site
from common.protocol.message_packing import pack_message
from common.protocol.messages import Reply, Request, Sums
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.client.planted import plant
from tests.in_process_federation import InProcess, phantom_config
from tests.server.dashboard.console_client import PAGES, log_in_as

SECRETS = ("DOE^JANE", "jane_doe", "19340229", "MRN0815", "PLANTED", "19470311")


def plant_identifiers(source: Path, home: Path) -> None:
    """Move a phantom centre, and name patients in its folder, file names, table and DICOM elements.

    One scan is unreadable, and its content names a patient.
    """
    source.rename(home)
    table = pd.read_csv(home / "cohort.csv")
    table["patient"] = [f"DOE^JANE-{patient}" for patient in table["patient"]]
    table["scan"] = [f"MRN0815-{scan}" for scan in table["scan"]]
    table["jane_doe_note"] = "DOE^JANE, born 19340229"
    table.to_csv(home / "cohort.csv", index=False)
    for scan in table["path"][1:3]:
        for number, file in enumerate(sorted((home / scan).glob("*"))):
            plant(pydicom.dcmread(file)).save_as(file)
            file.rename(file.with_name(f"jane_doe_{number}.dcm"))
    for file in (home / table["path"][0]).glob("*"):
        file.write_bytes(b"DICM jane_doe 19340229")


def test_no_identifier_reaches_the_coordinator_or_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    phantom = phantom_config(tmp_path / "source").federation
    assert phantom.phantom
    runs = tmp_path / "runs"
    homes = tmp_path / "jane_doe_19340229"  # what a folder of a hospital may be called
    homes.mkdir()
    sites = []
    for centre in phantom.centres:
        plant_identifiers(write_centre(tmp_path / "source", centre, phantom.phantom), homes / centre)
        sites.append(Site(centre=centre, data=str(homes / centre), threads=1, device="cpu"))
    sent: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        arrays, metadata = pack_message(reply)
        content = b"".join(array.tobytes() for array in arrays.values()).decode("latin-1")
        sent.append(f"{sorted(arrays)} {metadata} {content}")
        if centre == "west":
            (homes / "west" / "cohort.csv").unlink(missing_ok=True)  # its next reply is a failure
        return reply

    scores_handler = query_handlers.QUERY_HANDLERS["scores"]

    # Not a literal where it is raised: a traceback shows the source line.
    planted_text = f"{SECRETS[0]} in {homes}/south/MRN0815"

    def fail_at_south(context: QueryContext) -> Sums:
        if "south" in context.datasets["val"].centres:
            raise RuntimeError(planted_text)
        return scores_handler(context)

    monkeypatch.setitem(query_handlers.QUERY_HANDLERS, "scores", fail_at_south)
    config = phantom_config(tmp_path / "nowhere", "federation.quorum=0.5", "stage.rounds=1")
    ledger = open_ledger(runs)
    result = start_run(config, InProcess(sites, hook), runs, ledger, "r")
    # The provoked failures did happen.
    assert sum(centre.skipped for centre in result.centres.values()) == 4
    assert "south" in {left.centre for left in result.left_out if "RuntimeError" in left.reason}

    rows = read_rows(runs / "ledger.db")
    files = [path for path in runs.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "metrics.json", "model.safetensors", "config.yaml"} <= names
    assert any("checkpoint" in str(path) for path in files)
    egress_logs = [(homes / centre / ".consilium" / "egress.jsonl").read_text() for centre in phantom.centres]
    pages = read_console(ledger, runs)
    assert "RuntimeError" in "".join(pages)  # the failures are shown
    file_contents = [path.read_bytes().decode("latin-1") for path in files]
    for text in [*sent, *rows, *file_contents, *egress_logs, caplog.text, *pages]:
        for secret in SECRETS:
            assert secret not in text


def read_rows(path: Path) -> list[str]:
    """All rows of all tables of a SQLite database."""
    database = sqlite3.connect(path)
    tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    rows: list[str] = []
    for (table,) in tables:
        rows += [str(row) for row in database.execute(f"SELECT * FROM {table}")]
    return rows


def read_console(ledger: Ledger, runs: Path) -> list[str]:
    """The texts of the console's pages."""
    client = log_in_as(ledger, runs=runs)
    texts = []
    for path in (*PAGES, "/metrics", "/runs/r/files/model-card.html", "/runs/r/files/scores.csv"):
        page = client.get(path)
        assert page.status_code == 200, path
        texts.append(page.text)
    return texts
