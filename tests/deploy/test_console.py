"""A deployed federation commanded by the console alone, over TLS, as compose.coordinator.yaml starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import yaml

from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from tests.deploy.commands import run_server_command
from tests.deploy.faults import BUSY, PHANTOM
from tests.deploy.postgresql_server import run_postgresql
from tests.deploy.process_group import (
    BIN,
    ROOT,
    ProcessGroup,
    find_free_port,
    list_processes,
    open_process_group,
    wait_until,
    wait_until_healthy,
)
from tests.deploy.processes import start_centre, start_federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deploy,
    pytest.mark.skipif(
        not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
        reason="no PostgreSQL here: apt install postgresql",
    ),
]
CENTRES = ["north", "south"]
OVERRIDES = (
    f"federation=folder 'federation.centres=[{', '.join(CENTRES)}]' stage.rounds=400 stage.local_epochs=1 "
    "stage.batch_size=4 preprocess.image_size=32"
)


class Console(NamedTuple):
    """An operator's browser at a running console, and what is behind it."""

    browser: httpx.Client
    ledger: Ledger
    processes: ProcessGroup

    def read_page(self, path: str) -> str:
        """Return a page's text without line breaks."""
        response = self.browser.get(path)
        assert response.status_code == 200, response.text
        return " ".join(response.text.split())

    def submit_form(self, path: str, **fields: str) -> None:
        """Fill in the form at a path, keep its hidden fields, and submit it."""
        form = self.read_page(path)
        hidden_fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form))
        response = self.browser.post(path.partition("?")[0], data=hidden_fields | fields)
        assert response.status_code == 303, response.text

    def wait_until(self, event: str, has_happened: Callable[[], object], seconds: float = 300) -> None:
        """Wait for an event; a failure shows the ends of all logs."""
        try:
            wait_until(event, seconds * BUSY, has_happened)
        except AssertionError as error:
            lines = [str(error)]
            folder = self.processes.folder
            for log in [*folder.glob("*.log"), *folder.glob("runs/*.log")]:
                lines.append(f"== {log.name}\n{log.read_text()[-1500:]}")
            raise AssertionError("\n".join(lines)) from error

    def accepted_centres(self, run_id: str) -> dict[int, set[str]]:
        """Return {closed round: centres whose contributions count in it}."""
        accepted: dict[int, set[str]] = {}
        for row in self.ledger.read_contributions(run_id):
            centres = accepted.setdefault(row["round"], set())
            if row["accepted"]:
                centres.add(row["centre"])
        return accepted


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """Two hospitals, a coordinator, and the operator anna logged in to its console."""
    folder = tmp_path_factory.mktemp("console")
    with run_postgresql() as (address, _), open_process_group(folder) as processes:
        operator, port = start_federation(processes, CENTRES, PHANTOM, CONSILIUM_LEDGER=address)
        for name in CENTRES:
            hospital = folder / "hospitals" / name
            start_centre(processes, hospital, f"localhost:{port}", restarts=True, WARM="yes")
        url = start_console(processes, operator, address)
        account = run_server_command("account", "add", "anna", "--role", "operator", "--ledger", address)
        assert account.returncode == 0, account.stderr
        login = {"name": "anna", "password": account.stdout.split("password ")[1].strip()}
        tls = ssl.create_default_context(cafile=folder / "made/ca.crt")
        ledger = Ledger(address)
        try:
            with httpx.Client(base_url=url, verify=tls, timeout=120, trust_env=False) as browser:
                response = browser.post("/login", data=login)
                assert response.status_code == 303, response.text
                yield Console(browser, ledger, processes)
        finally:
            ledger.close()
            for pid in list_run_processes(folder / "runs"):
                os.kill(pid, signal.SIGKILL)


def start_console(processes: ProcessGroup, operator: str, ledger_address: str) -> str:
    """Start the console by the stack's own command and settings, and return its URL.

    Only paths and ports are replaced by those of this machine.
    """
    made = processes.folder / "made"
    port = find_free_port()
    stack = yaml.safe_load((ROOT / "deploy/compose.coordinator.yaml").read_text())
    service = stack["services"]["dashboard"]
    replacements = {
        "/etc/consilium/": f"{made}/coordinator/",
        "/run/secrets/": f"{made}/coordinator/",
        "superlink:8000": operator,
        "0.0.0.0": "127.0.0.1",
        "/runs": str(processes.folder / "runs"),
        service["environment"]["CONSILIUM_LEDGER"]: ledger_address,
    }

    def localise(text: str) -> str:
        for in_stack, on_this_machine in replacements.items():
            text = text.replace(in_stack, on_this_machine)
        return text

    program, *arguments = [localise(word) for word in service["command"]]
    assert program == "consilium-server"
    settings = {}
    for key, value in service["environment"].items():
        if key != "PGPASSFILE" and "$" not in value:
            settings[key] = localise(value)
    code = "from server.cli import main; main()"
    command = (str(BIN / "python"), "-c", code, *arguments, f"--port={port}")
    processes.start("dashboard", *command, **settings)
    wait_until_healthy(f"https://localhost:{port}/health", made, processes, "dashboard")
    return f"https://localhost:{port}"


def list_run_processes(runs: Path) -> list[int]:
    """Return the processes that the console has started for runs."""
    matches = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().decode().split("\0")
            if "run" in arguments and str(runs) in arguments:
                matches.append(int(entry.name))
    return matches


def test_run_is_started_paused_resumed_and_stopped_and_a_centre_excluded(console: Console) -> None:
    """The ledger and the audit trail record every command."""
    ledger, processes = console.ledger, console.processes
    console.wait_until(
        "both hospitals are online", lambda: console.read_page("/").count('"state online"') == 2
    )
    console.submit_form("/start", recipe="multisource", overrides=OVERRIDES, why="a first look")
    [start_entry] = [entry for entry in ledger.read_audit() if entry["action"] == "start"]
    run_id = start_entry["run_id"]
    assert f"{run_id}: started by anna" in console.read_page("/runs")
    console.wait_until(
        "the run starts, or the page says why not",
        lambda: "it is starting" not in console.read_page("/runs"),
    )
    assert f'href="/runs/{run_id}"' in console.read_page("/runs")
    console.wait_until("two rounds are closed", lambda: len(ledger.read_rounds(run_id)) > 2)
    config = next(row["config"] for row in ledger.read_runs() if row["id"] == run_id)
    assert config["stages"]["main"]["rounds"] == 400
    assert config["federation"]["centres"] == CENTRES
    page = console.read_page(f"/runs/{run_id}")
    assert "of 400" in page
    assert f"/runs/{run_id}/order/pause" in page

    console.submit_form(f"/runs/{run_id}/order/pause", why="the network is being repaired")
    console.wait_until("the run pauses", lambda: ledger.read_status(run_id) == "paused")
    num_rounds = len(ledger.read_rounds(run_id))
    console.submit_form(f"/runs/{run_id}/order/resume", why="the network is back")
    console.wait_until("the run goes on", lambda: len(ledger.read_rounds(run_id)) > num_rounds)

    console.submit_form(f"/runs/{run_id}/order/exclude?centre=south", why="its scanner is recalibrated")
    console.wait_until(
        "a round closes without south", lambda: {"north"} in console.accepted_centres(run_id).values()
    )
    assert "anna: its scanner is recalibrated" in console.read_page(f"/runs/{run_id}")
    rounds_alone = []
    for number, centres in console.accepted_centres(run_id).items():
        if centres == {"north"}:
            rounds_alone.append(number)
    console.submit_form(f"/runs/{run_id}/order/readmit?centre=south", why="it is done")

    def has_south_again() -> bool:
        later_rounds = console.accepted_centres(run_id).items()
        return any("south" in centres for number, centres in later_rounds if number > max(rounds_alone))

    console.wait_until("south counts again", has_south_again)

    console.submit_form(f"/runs/{run_id}/order/stop", why="seen enough")
    console.wait_until("the run is stopped", lambda: ledger.read_status(run_id) == "stopped")
    runs = processes.folder / "runs"
    console.wait_until("its processes have ended", lambda: not list_run_processes(runs), 60)
    assert not list_processes(processes.pid("superexec"), "flwr-serverapp")
    assert "by order of anna: seen enough" in console.read_page(f"/runs/{run_id}")

    events = [(event["kind"], event["centre"]) for event in ledger.read_events(run_id)]
    assert [event for event in events if event[0] != "left_out"] == [
        ("started", None),
        ("paused", None),
        ("resumed", None),
        ("exclude", "south"),
        ("readmit", "south"),
        ("stopped", None),
    ]
    entries = ledger.read_audit(run_id)
    assert [(entry["actor"], entry["action"], entry["centre"]) for entry in entries] == [
        ("anna", "start", ""),
        ("anna", "pause", ""),
        ("anna", "resume", ""),
        ("anna", "exclude", "south"),
        ("anna", "readmit", "south"),
        ("anna", "stop", ""),
    ]
    assert first_broken_link(ledger.read_audit()) is None
    assert start_entry["reason"] == f"a first look [multisource {OVERRIDES}]"
