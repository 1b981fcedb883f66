"""What operators order a run to do: entries of the audit trail, read by the run's coordinator before each round and while it waits for replies.

`pause` lets the round end first; `stop` throws it away; both leave a run that can be resumed. Who is excluded is asked no more, and not waited for,
until readmitted. What is ordered on a part of a cross-validation is ordered of all its parts.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.chain import START, follows
from common.errors import ConsiliumError
from server.ledger import Ledger
from server.state import Paused, Run, Stopped

ORDERS = {
    "pause": "the round in progress is finished, then the run waits to be resumed",
    "stop": "the round in progress is thrown away; the run keeps its last finished round and can be resumed",
    "exclude": "the centre is asked no more and not waited for, in this run, until it is readmitted",
    "readmit": "the centre takes part again from the next round on",
}
RUNNING = ("started", "resumed")  # a run's status while it has a coordinator
LOOK = 2.0  # seconds between two looks while waiting for replies
log = logging.getLogger("consilium.server")


def heed(run: Run, round_over: bool = False) -> None:
    """Act on what was ordered since the last look. Raises Paused (between rounds) or Stopped."""
    if not round_over and time.monotonic() < run.looked + LOOK:
        return
    first, run.looked = run.looked == -math.inf, time.monotonic()
    for order in run.ledger.audit(run.whole, run.heard):
        run.heard, said = order["id"], f"by order of {order['who']}: {order['why']}"
        if order["what"] in ("pause", "stop") and order["id"] > run.before:
            run.ordered = (order["what"], said)
        elif order["what"] in ("exclude", "readmit"):
            run.excluded.pop(order["centre"], None)
            if order["what"] == "exclude":
                run.excluded[order["centre"]] = f"excluded {said}"
            if not first:
                run.ledger.event(run.id, order["what"], said, order["centre"])
                log.info("%s %s", order["centre"], run.excluded.get(order["centre"], f"readmitted {said}"))
    what, said = run.ordered
    if what == "stop":
        raise Stopped(said)
    if round_over and what == "pause":
        raise Paused(said)
    if round_over and not run.expected:
        raise Paused("every centre is excluded; readmit one")


def give(ledger: Ledger, who: str, what: str, why: str, run: str, centre: str = "") -> None:
    """Order a run. Raises ConsiliumError where it makes no sense now."""
    known = next((row for row in ledger.runs() if row["id"] == run), None)
    if known is None:
        raise ConsiliumError(f"the ledger knows no run '{run}'")
    if known["status"] == "finished" or (what in ("pause", "stop") and known["status"] not in RUNNING):
        raise ConsiliumError(f"run '{run}' is {known['status']}: there is nothing to {what}")
    if what in ("exclude", "readmit"):
        centres = known["config"]["federation"]["centres"]
        excluded = out(ledger.audit(whole(known)))
        if known["mode"] == "central":
            raise ConsiliumError("a central run has all data in one place: no centre can be left out")
        if centre not in centres:
            raise ConsiliumError(f"run '{run}' has no centre '{centre}'")
        if (centre in excluded) == (what == "exclude"):
            raise ConsiliumError(f"'{centre}' is {'excluded already' if centre in excluded else 'not excluded'}")
        if what == "exclude" and set(centres) <= {*excluded, centre}:
            raise ConsiliumError(f"'{centre}' is the last centre; stop the run instead")
    ledger.note(who, what, why, whole(known), centre)


def whole(row: Mapping[str, Any]) -> str:
    """The id that orders to a run of the ledger bear: that of the cross-validation that it is a part of, else its own."""
    federation = row["config"]["federation"]
    return str(row["id"]).removesuffix(f"-{part_name(federation.get('fold'), federation.get('unseen', []))}")


def part_name(fold: int | None, unseen: Sequence[str]) -> str:
    """What a part of a cross-validation is called; a run's name is a file's."""
    return f"fold-{fold}" if fold is not None else f"without-{re.sub('[^A-Za-z0-9._-]', '-', '-'.join(unseen))}"


def out(orders: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{excluded centre: why}, by a run's orders."""
    excluded: dict[str, str] = {}
    for order in orders:
        if order["what"] == "exclude":
            excluded[order["centre"]] = f"{order['who']}: {order['why']}"
        elif order["what"] == "readmit":
            excluded.pop(order["centre"], None)
    return excluded


def broken(trail: Iterable[Mapping[str, Any]]) -> int | None:
    """The id of the first entry that was changed, or whose predecessors were removed; None for a sound trail."""
    previous = START
    for row in trail:
        entry = {key: value for key, value in row.items() if key != "id"} | {"time": row["time"].isoformat()}
        if not follows(entry, previous):
            return int(row["id"])
        previous = row["hash"]
    return None
