"""Paths, file names, patients, scan names and what DICOM files say stay in the hospital: a whole run is searched for them, failures included."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pandas as pd
import pydicom
import pytest

from client.federation import handlers
from client.federation.query_handlers import QueryContext
from client.phantom.federation import write_centre
from client.site.config import Site
from common.protocol.messages import Reply, Request, Sums, pack_message
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.client.planted import plant
from tests.in_process_federation import InProcess, phantom_config
from tests.server.dashboard.console_client import PAGES, logged_in

SECRETS = ("DOE^JANE", "jane_doe", "19340229", "MRN0815", "PLANTED", "19470311")


def hospital(source: Path, home: Path) -> None:
    """A phantom centre whose folder, files, table and DICOM elements name patients; one scan is unreadable, and says whose it is."""
    source.rename(home)
    table = pd.read_csv(home / "cohort.csv")
    table["patient"] = [f"DOE^JANE-{p}" for p in table["patient"]]
    table["scan"] = [f"MRN0815-{s}" for s in table["scan"]]
    table["jane_doe_note"] = "DOE^JANE, born 19340229"
    table.to_csv(home / "cohort.csv", index=False)
    for scan in table["path"][1:3]:
        for i, file in enumerate(sorted((home / scan).glob("*"))):
            plant(pydicom.dcmread(file)).save_as(file)
            file.rename(file.with_name(f"jane_doe_{i}.dcm"))
    for file in (home / table["path"][0]).glob("*"):
        file.write_bytes(b"DICM jane_doe 19340229")


def test_no_identifier_reaches_the_coordinator_or_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    plain = phantom_config(tmp_path / "source")
    assert plain.federation.phantom
    sites, runs, homes = (
        [],
        tmp_path / "runs",
        tmp_path / "jane_doe_19340229",
    )  # what a folder of a hospital may be called
    homes.mkdir()
    for centre in plain.federation.centres:
        hospital(write_centre(tmp_path / "source", centre, plain.federation.phantom), homes / centre)
        sites.append(Site(centre=centre, data=str(homes / centre), threads=1, device="cpu"))
    sent: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        arrays, facts = pack_message(reply)
        sent.append(
            f"{sorted(arrays)} {facts} {b''.join(array.tobytes() for array in arrays.values()).decode('latin-1')}"
        )
        if centre == "west":
            (homes / "west" / "cohort.csv").unlink(missing_ok=True)  # its next answer fails
        return reply

    true, text_of_accident = handlers.QUERY_HANDLERS["scores"], f"DOE^JANE in {homes}/south/MRN0815"

    def failing(q: QueryContext) -> Sums:
        if "south" in q.datasets["val"].centres:
            raise RuntimeError(text_of_accident)
        return true(q)

    monkeypatch.setitem(handlers.QUERY_HANDLERS, "scores", failing)
    config = phantom_config(tmp_path / "nowhere", "federation.quorum=0.5", "stage.rounds=1")
    ledger = open_ledger(runs)
    result = start_run(config, InProcess(sites, hook), runs, ledger, "r")
    assert sum(c["skipped"] for c in result["centres"].values()) == 4  # the provoked failures did happen
    assert {"south"} <= {o["centre"] for o in result["left_out"] if "RuntimeError" in o["reason"]}
    database = sqlite3.connect(runs / "ledger.db")
    rows = [
        str(row)
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for row in database.execute(f"SELECT * FROM {name}")
    ]
    files = [p for p in runs.rglob("*") if p.is_file()]
    assert {"report.html", "metrics.json", "model.safetensors", "config.yaml"} <= {p.name for p in files}
    assert any("checkpoint" in str(p) for p in files)
    egress = [
        (homes / centre / ".consilium" / "egress.jsonl").read_text() for centre in config.federation.centres
    ]
    client = logged_in(ledger, runs=runs)
    console = [
        client.get(path)
        for path in (*PAGES, "/metrics", "/runs/r/files/model-card.html", "/runs/r/files/scores.csv")
    ]
    assert [page.status_code for page in console] == [200] * len(console)
    assert "RuntimeError" in "".join(page.text for page in console)  # the failures are shown
    for text in [
        *sent,
        *rows,
        *(p.read_bytes().decode("latin-1") for p in files),
        *egress,
        caplog.text,
        *(page.text for page in console),
    ]:
        for secret in SECRETS:
            assert secret not in text
