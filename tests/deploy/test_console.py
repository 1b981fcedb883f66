"""A deployed federation ordered about from the console alone: its pages over TLS, as compose.coordinator.yaml starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from server.ledger.ledger import Ledger
from server.ledger.audit_trail import first_broken_link
from tests.deploy import processes as p
from tests.deploy.faults import BUSY, PHANTOM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deploy,
    pytest.mark.skipif(
        not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
        reason="no PostgreSQL here: apt install postgresql",
    ),
]
CENTRES = ["north", "south"]
OVERRIDES = f"federation=folder 'federation.centres=[{', '.join(CENTRES)}]' stage.rounds=400 stage.local_epochs=1 stage.batch_size=4 preprocess.image_size=32"


class Console(NamedTuple):
    """An operator's browser at a running console, and what stands behind it."""

    browser: httpx.Client
    ledger: Ledger
    processes: p.Started

    def text(self, path: str) -> str:
        """A page, without its line breaks."""
        answer = self.browser.get(path)
        assert answer.status_code == 200, answer.text
        return " ".join(answer.text.split())

    def send(self, path: str, **fields: str) -> None:
        """Fill in the form at `path`, with what stands in it hidden, and send it."""
        form = self.text(path)
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form))
        answer = self.browser.post(path.partition("?")[0], data=hidden | fields)
        assert answer.status_code == 303, answer.text

    def until(self, what: str, true: Any, seconds: float = 300) -> None:
        try:
            p.wait_until(what, seconds * BUSY, true)
        except AssertionError as error:
            logs = [*self.processes.folder.glob("*.log"), *self.processes.folder.glob("runs/*.log")]
            raise AssertionError(
                "\n".join([str(error), *(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)])
            ) from error

    def used(self, run: str) -> dict[int, set[str]]:
        """{round that was closed: the centres whose contributions count in it}."""
        rows = self.ledger.read_contributions(run)
        return {
            number: {r["centre"] for r in rows if r["round"] == number and r["accepted"]}
            for number in {r["round"] for r in rows}
        }


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """Two hospitals, a coordinator, and anna logged in to its console."""
    folder = tmp_path_factory.mktemp("console")
    with p.postgresql() as (address, _), p.started(folder) as processes:
        operator, port = p.federation(processes, CENTRES, PHANTOM, CONSILIUM_LEDGER=address)
        for name in CENTRES:
            p.start_centre(
                processes, folder / "hospitals" / name, f"localhost:{port}", restart=True, WARM="yes"
            )
        url = start_console(processes, operator, address)
        account = p.server("account", "add", "anna", "--role", "operator", "--ledger", address)
        assert account.returncode == 0, account.stderr
        trusted = ssl.create_default_context(cafile=folder / "made/ca.crt")
        ledger = Ledger(address)
        try:
            with httpx.Client(base_url=url, verify=trusted, timeout=120, trust_env=False) as browser:
                answer = browser.post(
                    "/login", data={"name": "anna", "password": account.stdout.split("password ")[1].strip()}
                )
                assert answer.status_code == 303, answer.text
                yield Console(browser, ledger, processes)
        finally:
            ledger.close()
            for pid in followers(folder / "runs"):
                os.kill(pid, signal.SIGKILL)


def start_console(processes: p.Started, operator: str, address: str) -> str:
    """By the stack's own command and settings, with the paths and ports of this machine; returns where it is."""
    made, port = processes.folder / "made", p.free_port()
    service = yaml.safe_load((p.ROOT / "deploy/compose.coordinator.yaml").read_text())["services"][
        "dashboard"
    ]
    here = {
        "/etc/consilium/": f"{made}/coordinator/",
        "/run/secrets/": f"{made}/coordinator/",
        "superlink:8000": operator,
    }
    here |= {
        "0.0.0.0": "127.0.0.1",
        "/runs": str(processes.folder / "runs"),
        service["environment"]["CONSILIUM_LEDGER"]: address,
    }

    def local(text: str) -> str:
        for theirs, ours in here.items():
            text = text.replace(theirs, ours)
        return text

    command = [*map(local, service["command"]), f"--port={port}"]
    assert command[0] == "consilium-server"
    settings = {
        key: local(value)
        for key, value in service["environment"].items()
        if key != "PGPASSFILE" and "$" not in value
    }
    processes.start(
        "dashboard",
        str(p.BIN / "python"),
        "-c",
        "from server.cli import main; main()",
        *command[1:],
        **settings,
    )
    p.wait_for(f"https://localhost:{port}/health", made, processes, "dashboard")
    return f"https://localhost:{port}"


def followers(runs: Path) -> list[int]:
    """The processes that the console has started for runs."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            said = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
            if "run" in said and str(runs) in said:
                found.append(int(entry.name))
    return found


def test_a_run_is_started_ordered_about_and_stopped(console: Console) -> None:
    """Started by recipe and overrides, paused and taken up again at once, a centre excluded and readmitted, stopped. Ledger and trail say so."""
    ledger, processes = console.ledger, console.processes
    console.until("both hospitals are online", lambda: console.text("/").count('"state online"') == 2)
    console.send("/start", recipe="multisource", overrides=OVERRIDES, why="a first look")
    [begun] = [entry for entry in ledger.read_audit() if entry["action"] == "start"]
    run = begun["run"]
    assert f"{run}: started by anna" in console.text("/runs")
    console.until("it begins, or says why not", lambda: "are coming up" not in console.text("/runs"))
    assert f'href="/runs/{run}"' in console.text("/runs")
    console.until("two rounds are over", lambda: len(ledger.read_rounds(run)) > 2)
    settings = next(row["config"] for row in ledger.read_runs() if row["id"] == run)
    assert (settings["stages"]["main"]["rounds"], settings["federation"]["centres"]) == (400, CENTRES)
    shown = console.text(f"/runs/{run}")
    assert "of 400" in shown
    assert f"/runs/{run}/order/pause" in shown

    console.send(f"/runs/{run}/order/pause", why="the network is mended")
    console.until("it pauses", lambda: ledger.read_status(run) == "paused")
    before = len(ledger.read_rounds(run))
    console.send(f"/runs/{run}/order/resume", why="the network is back")
    console.until("it goes on", lambda: len(ledger.read_rounds(run)) > before)

    console.send(f"/runs/{run}/order/exclude?centre=south", why="its scanner is recalibrated")
    console.until("a round closes without south", lambda: {"north"} in console.used(run).values())
    assert "anna: its scanner is recalibrated" in console.text(f"/runs/{run}")
    alone = max(number for number, used in console.used(run).items() if used == {"north"})
    console.send(f"/runs/{run}/order/readmit?centre=south", why="it is done")
    console.until(
        "south counts again",
        lambda: any("south" in used for number, used in console.used(run).items() if number > alone),
    )

    console.send(f"/runs/{run}/order/stop", why="seen enough")
    console.until("it is stopped", lambda: ledger.read_status(run) == "stopped")
    console.until("nothing of it goes on", lambda: not followers(processes.folder / "runs"), 60)
    assert not p.children(processes.processes["superexec"].pid, "flwr-serverapp")
    assert "by order of anna: seen enough" in console.text(f"/runs/{run}")

    kinds = [(e["kind"], e["centre"]) for e in ledger.read_events(run) if e["kind"] != "left_out"]
    assert kinds == [
        ("started", None),
        ("paused", None),
        ("resumed", None),
        ("exclude", "south"),
        ("readmit", "south"),
        ("stopped", None),
    ]
    trail = [(e["actor"], e["action"], e["centre"]) for e in ledger.read_audit(run)]
    assert trail == [("anna", what, centre) for what, centre in [
        ("start", ""), ("pause", ""), ("resume", ""), ("exclude", "south"), ("readmit", "south"), ("stop", "")]]  # fmt: skip
    assert first_broken_link(ledger.read_audit()) is None
    assert f"a first look [multisource {OVERRIDES}]" == begun["reason"]
