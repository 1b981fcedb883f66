"""A deployed federation that can be damaged and repaired, with what the tests need to see the effects.

Used by tests/deploy/test_failures.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.ledger.ledger import Ledger
from tests.deploy.postgresql_server import run_postgresql
from tests.deploy.process_group import (
    ProcessGroup,
    find_free_port,
    list_processes,
    open_process_group,
    wait_until,
)
from tests.deploy.processes import start_centre, start_federation, start_superlink

CENTRES = ["north", "east", "south", "west"]
PHANTOM = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
]
RUN = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "stage.local_epochs=1",
    "stage.batch_size=4",
    "preprocess.image_size=32",
]
BUSY = float(os.environ.get("CONSILIUM_BUSY", "1"))  # how much slower than two idle cores this machine is
ROUND_TIMEOUT = 90.0 * BUSY
END_STATUSES = ("paused", "failed", "finished")


@dataclass
class Federation:
    """A running federation, its runs, and the means to damage and repair it."""

    processes: ProcessGroup
    folder: Path
    proxy_port: int
    relay_port: int  # by which west reaches the proxy
    operator: str  # address of the SuperLink
    ledger_address: str
    control_database: Callable[[str], None]  # starts and kills the ledger's server
    run_ids: list[str] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)  # at most one, opened when it is needed

    # --- runs

    def start_run(self, *overrides: str) -> str:
        """Start `consilium-server run`, and return the run's id once the ledger has it."""
        self._start_command(*overrides)
        self.wait_until("", "the run starts", 400, lambda: bool(self._list_new_run_ids()))
        self.run_ids += self._list_new_run_ids()
        return self.run_ids[-1]

    def resume_run(self, run_id: str) -> None:
        """Start `consilium-server run --resume`, and wait until the run is resumed."""
        num_events = len(self.read_events(run_id))
        self._start_command("--resume", run_id)
        self.wait_until("", "the run is resumed", 400, lambda: len(self.read_events(run_id)) > num_events)

    def _start_command(self, *arguments: str) -> None:
        name = f"command-{time.monotonic_ns()}"
        options = [f"--superlink={self.operator}", f"--ca={self.folder / 'made/ca.crt'}"]
        options.append(f"--runs={self.folder / 'runs'}")
        code = "from server.cli import main; main()"
        self.processes.start(name, sys.executable, "-c", code, "run", *options, *RUN, *arguments)

    def _list_new_run_ids(self) -> list[str]:
        ids = [row["id"] for row in self.open_ledger().read_runs()]
        return [run_id for run_id in ids if run_id not in self.run_ids]

    # --- what the ledger says

    def open_ledger(self) -> Ledger:
        """Return the ledger, opened when it is first needed."""
        if not self.ledgers:
            self.ledgers.append(Ledger(self.ledger_address))
        return self.ledgers[0]

    def read_status(self, run_id: str) -> str | None:
        """Return a run's status."""
        return self.open_ledger().read_status(run_id)

    def read_events(self, run_id: str) -> list[dict[str, Any]]:
        """Return a run's events."""
        return self.open_ledger().read_events(run_id)

    def read_event_kinds(self, run_id: str) -> list[str]:
        """Return the kinds of a run's events."""
        return [event["kind"] for event in self.read_events(run_id)]

    def read_centre_details(self, run_id: str, centre: str) -> str:
        """Return the details of a centre's events, as one text."""
        events = [event for event in self.read_events(run_id) if event["centre"] == centre]
        return "; ".join(str(event["detail"]) for event in events)

    def last_round(self, run_id: str) -> int:
        """Return the last round that closed; -1 before the stage's start."""
        return max((row["round"] for row in self.open_ledger().read_rounds(run_id)), default=-1)

    def read_contributions(self, run_id: str, round_number: int) -> dict[str, dict[str, Any]]:
        """Return {centre: its contribution to a round}."""
        contributions = {}
        for row in self.open_ledger().read_contributions(run_id):
            if row["round"] == round_number:
                contributions[row["centre"]] = row
        return contributions

    def list_accepted(self, run_id: str, round_number: int) -> set[str]:
        """Return the centres whose contributions count in a round."""
        contributions = self.read_contributions(run_id, round_number)
        return {centre for centre, row in contributions.items() if row["accepted"]}

    # --- waiting

    def wait_until(self, run_id: str, event: str, seconds: float, has_happened: Callable[[], bool]) -> float:
        """Wait for an event, and return how long it took.

        Fails at once when the run has ended without it.
        """
        start = time.monotonic()
        while time.monotonic() - start < seconds * BUSY:
            if has_happened():
                return time.monotonic() - start
            if run_id and self.read_status(run_id) in END_STATUSES and not has_happened():
                break
            time.sleep(0.1)
        events = [(row["kind"], row["detail"]) for row in self.read_events(run_id)]
        logs = self.processes.read_log_ends(800)
        raise AssertionError(f"not within {seconds * BUSY:.0f} s: {event}; {events}\n{logs}")

    def wait_until_finished(self, run_id: str, seconds: float = 900) -> float:
        """Wait until a run is finished."""
        return self.wait_until(
            run_id, "the run finishes", seconds, lambda: self.read_status(run_id) == "finished"
        )

    def wait_until_paused(self, run_id: str, seconds: float) -> float:
        """Wait until a run is paused."""
        return self.wait_until("", "the run pauses", seconds, lambda: self.read_status(run_id) == "paused")

    def wait_until_left_out(
        self, run_id: str, centre: str, reasons: tuple[str, ...], seconds: float
    ) -> float:
        """Wait until a centre is refused or left out for one of the reasons."""

        def is_left_out() -> bool:
            details = self.read_centre_details(run_id, centre)
            return any(reason in details for reason in reasons)

        return self.wait_until(run_id, f"{centre} is left out", seconds, is_left_out)

    def wait_until_training(self, run_id: str, centre: str) -> int:
        """Wait until a centre works on the training of a new round; return the round."""
        last_round = self.last_round(run_id)
        self.wait_until(run_id, "the round closes", 600, lambda: self.last_round(run_id) > last_round)
        event = f"{centre} works on round {last_round + 2}"
        self.wait_until(run_id, event, 300, lambda: bool(self.list_client_apps(centre)))
        return self.last_round(run_id) + 1

    def wait_until_accepted(self, run_id: str, centre: str, after_round: int, seconds: float = 600) -> float:
        """Wait until a centre's contribution is accepted in a later round; return how long it took."""

        def is_accepted() -> bool:
            later_rounds = range(after_round + 1, self.last_round(run_id) + 1)
            return any(centre in self.list_accepted(run_id, number) for number in later_rounds)

        return self.wait_until(run_id, f"{centre} takes part again", seconds, is_accepted)

    # --- damage and repair

    def hospital_folder(self, centre: str) -> Path:
        """Return a hospital's folder."""
        return self.folder / "hospitals" / centre

    def list_client_apps(self, centre: str) -> list[int]:
        """Return the processes that a centre's SuperNode has started for messages."""
        return list_processes(self.processes.pid(centre), "flwr-clientapp")

    def signal_centre(self, centre: str, signal_number: signal.Signals) -> None:
        """Send a signal to a centre's SuperNode and everything that it started."""
        os.killpg(self.processes.pid(centre), signal_number)

    def start_centre(self, name: str, **variables: str) -> None:
        """Start a centre anew, with the restart policy of `restart: unless-stopped`."""
        port = self.relay_port if name == "west" else self.proxy_port
        if name in self.processes.processes:
            self.processes.stop(name, signal.SIGKILL)
        folder = self.hospital_folder(name)
        start_centre(self.processes, folder, f"localhost:{port}", restarts=True, WARM="yes", **variables)

    def start_relay(self) -> None:
        """Connect west to the proxy."""
        script = Path(__file__).with_name("relay.py")
        ports = (str(self.relay_port), str(self.proxy_port))
        self.processes.start("relay", sys.executable, str(script), *ports)

    def start_superlink(self) -> None:
        """Start the SuperLink again at its port."""
        port = int(self.operator.rpartition(":")[2])
        start_superlink(self.processes, self.folder / "made", port)

    def note_outcome(self, failure: str, outcome: str, seconds: float) -> None:
        """Add a row to the table for deploy/README.md."""
        with (self.folder / "table.txt").open("a") as table:
            table.write(f"| {failure} | {outcome} | {seconds:.0f} s |\n")


@contextlib.contextmanager
def deploy_federation(folder: Path) -> Iterator[Federation]:
    """Deploy four centres, west through a relay, with the ledger in PostgreSQL.

    Prints the table of noted outcomes in the end.
    """
    with run_postgresql() as (ledger_address, control_database), open_process_group(folder) as processes:
        operator, proxy_port = start_federation(processes, CENTRES, PHANTOM, CONSILIUM_LEDGER=ledger_address)
        federation = Federation(
            processes, folder, proxy_port, find_free_port(), operator, ledger_address, control_database
        )
        federation.start_relay()
        for name in CENTRES:
            federation.start_centre(name)
        sockets = [folder / f"home-{name}" / "warm.sock" for name in CENTRES]
        wait_until(
            "every centre has PyTorch loaded",
            240 * BUSY,
            lambda: all(path.exists() for path in sockets),
        )
        yield federation
        print("\n" + (folder / "table.txt").read_text())
