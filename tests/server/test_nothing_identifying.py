"""Paths, file names, patients and scan names stay in the hospital: a whole run is searched for them, failures included."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from client.phantom import write_centre
from client.site import Site
from common.messages import Reply, Request, pack
from server.runs import begin, open_ledger
from tests.inprocess import InProcess, phantom_config

SECRETS = ("DOE^JANE", "jane_doe", "19340229", "MRN0815")


def test_no_identifier_reaches_the_coordinator_or_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    plain = phantom_config(tmp_path / "source")
    assert plain.federation.phantom
    sites, runs = [], tmp_path / "runs"
    for centre in plain.federation.centres:
        written = write_centre(tmp_path / "source", centre, plain.federation.phantom)
        home = tmp_path / "jane_doe_19340229" / centre  # what a folder of a hospital may be called
        home.parent.mkdir(exist_ok=True)
        written.rename(home)
        table = pd.read_csv(home / "cohort.csv")
        table["patient"] = [f"DOE^JANE-{p}" for p in table["patient"]]
        table["scan"] = [f"MRN0815-{s}" for s in table["scan"]]
        table.to_csv(home / "cohort.csv", index=False)
        broken = home / table["path"][0]
        for file in broken.glob("*"):
            file.write_bytes(b"DICM jane_doe 19340229")  # unreadable, and says whose it is
        sites.append(Site(centre=centre, data=str(home), threads=1, device="cpu"))
    sent: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        arrays, facts = pack(reply)
        sent.append(f"{sorted(arrays)} {facts}")
        if centre == "west":
            (tmp_path / "jane_doe_19340229" / "west" / "cohort.csv").unlink(missing_ok=True)  # its next answer fails
        return reply

    config = phantom_config(tmp_path / "nowhere", "federation.quorum=0.5", "stage.rounds=1")
    result = begin(config, InProcess(sites, hook), runs, open_ledger(runs), "r")
    assert sum(c["skipped"] for c in result["centres"].values()) == 4  # the provoked failures did happen
    database = sqlite3.connect(runs / "ledger.db")
    rows = [
        str(row)
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for row in database.execute(f"SELECT * FROM {name}")
    ]
    files = [p.read_bytes().decode("latin-1") for p in runs.rglob("*") if p.is_file()]
    for text in [*sent, *rows, *files, caplog.text]:
        for secret in SECRETS:
            assert secret not in text
