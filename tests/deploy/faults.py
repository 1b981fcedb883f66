"""A deployed federation that can be harmed and mended: what tests/deploy/test_failures.py needs to do it, and to see what became of it."""

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
from tests.deploy import processes as p

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
DEADLINE = 90.0 * BUSY


@dataclass
class Federation:
    """A running one, and what the tests need to harm and mend it."""

    processes: p.Started
    folder: Path
    port: int  # of the proxy
    relay: int  # west's way to it
    operator: str  # address of the SuperLink
    ledger: str
    database: Callable[[str], None]  # starts and kills the ledger's server
    runs: list[str] = field(default_factory=list)
    books: list[Ledger] = field(default_factory=list)

    def start(self, *overrides: str, resume: str = "", wait: float = 400) -> str:
        """`consilium-server run`, in the background. Returns the run's id once the ledger has it."""
        before = self.events(resume)
        number = sum(name.startswith("command") for name in self.processes.processes)
        self.processes.start(
            f"command-{number}-{time.monotonic_ns()}",
            *(
                sys.executable,
                "-c",
                "from server.cli import main; main()",
                "run",
                "--superlink",
                self.operator,
            ),
            *(
                "--ca",
                str(self.folder / "made/ca.crt"),
                "--runs",
                str(self.folder / "runs"),
                *RUN,
                *overrides,
            ),
            *(["--resume", resume] if resume else []),
        )
        if resume:
            self.until("", "the run is taken up", wait, lambda: len(self.events(resume)) > len(before))
            return resume
        ids = lambda: [row["id"] for row in self.book().read_runs() if row["id"] not in self.runs]  # noqa: E731
        self.until("", "the run begins", wait, lambda: bool(ids()))
        self.runs += ids()
        return self.runs[-1]

    def book(self) -> Ledger:
        if not self.books:
            self.books.append(Ledger(self.ledger))
        return self.books[0]

    def events(self, run: str) -> list[dict[str, Any]]:
        return self.book().read_events(run)

    def kinds(self, run: str) -> list[str]:
        return [event["kind"] for event in self.events(run)]

    def said(self, run: str, centre: str) -> str:
        """What the ledger has of a centre: every event's detail."""
        return "; ".join(str(event["detail"]) for event in self.events(run) if event["centre"] == centre)

    def rounds(self, run: str) -> int:
        """The last round that closed; -1 before the stage's start."""
        return max((row["round"] for row in self.book().read_rounds(run)), default=-1)

    def replies(self, run: str, round: int) -> dict[str, dict[str, Any]]:
        return {row["centre"]: row for row in self.book().read_contributions(run) if row["round"] == round}

    def until(self, run: str, what: str, seconds: float, true: Callable[[], bool]) -> float:
        """Wait; returns for how long. Fails at once when the run has ended without it."""
        began = time.monotonic()
        while time.monotonic() - began < seconds * BUSY:
            if true():
                return time.monotonic() - began
            if run and self.book().read_status(run) in ("paused", "failed", "finished") and not true():
                break
            time.sleep(0.1)
        logs = "\n".join(f"== {name}\n{self.processes.log(name)[-800:]}" for name in self.processes.processes)
        raise AssertionError(
            f"not within {seconds * BUSY:.0f} s: {what}; {[(e['kind'], e['detail']) for e in self.events(run)]}\n{logs}"
        )

    def training(self, run: str, centre: str) -> int:
        """Waits until a centre works on a round's training; returns the round."""
        after = self.rounds(run)
        self.until(run, "the round closes", 600, lambda: self.rounds(run) > after)
        self.until(run, f"{centre} works on round {after + 2}", 300, lambda: bool(self.apps(centre)))
        return self.rounds(run) + 1

    def back(self, run: str, centre: str, after: int, seconds: float = 600) -> float:
        """Waits until a contribution of the centre is accepted in a round after `after`; returns for how long."""
        there = lambda: any(
            row["accepted"]
            for r in range(after + 1, self.rounds(run) + 1)
            if (row := self.replies(run, r).get(centre))
        )
        return self.until(run, f"{centre} takes part again", seconds, there)

    def hospital(self, centre: str) -> Path:
        return self.folder / "hospitals" / centre

    def apps(self, centre: str) -> list[int]:
        """The processes that a centre's SuperNode has started for messages."""
        return p.children(self.processes.processes[centre].pid, "flwr-clientapp")

    def everything(self, centre: str, how: signal.Signals) -> None:
        """To the SuperNode of a centre and all it has started."""
        os.killpg(self.processes.processes[centre].pid, how)

    def centre(self, name: str, **more: str) -> None:
        """Start a centre as Docker does, with `restart: unless-stopped`: again after a wait that doubles, up to a minute."""
        address = f"localhost:{self.relay if name == 'west' else self.port}"
        if name in self.processes.processes:
            self.processes.stop(name, signal.SIGKILL)
        p.start_centre(self.processes, self.hospital(name), address, restart=True, WARM="yes", **more)

    def connect(self) -> None:
        """West's cable."""
        self.processes.start(
            "relay",
            sys.executable,
            str(Path(__file__).with_name("relay.py")),
            str(self.relay),
            str(self.port),
        )

    def note(self, failure: str, outcome: str, seconds: float) -> None:
        """A row for deploy/README.md."""
        with (self.folder / "table.txt").open("a") as table:
            table.write(f"| {failure} | {outcome} | {seconds:.0f} s |\n")


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Federation]:
    """Four centres, west through a relay, and a PostgreSQL server for the ledger; prints the table of what was noted."""
    with p.postgresql() as (ledger, database), p.started(folder) as processes:
        operator, port = p.federation(processes, CENTRES, PHANTOM, CONSILIUM_LEDGER=ledger)
        there = Federation(processes, folder, port, p.free_port(), operator, ledger, database)
        there.connect()
        for name in CENTRES:
            there.centre(name)
        p.wait_until(
            "every centre is warm",
            240 * BUSY,
            lambda: all((folder / f"home-{c}" / "warm.sock").exists() for c in CENTRES),
        )
        yield there
        print("\n" + (folder / "table.txt").read_text())
