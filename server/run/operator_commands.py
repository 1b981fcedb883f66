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

from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH, verify_link
from server.ledger.ledger import Ledger
from server.run.run_state import Run, RunPaused, RunStopped

COMMANDS = {
    "pause": "the round in progress is finished, then the run waits to be resumed",
    "stop": "the round in progress is thrown away; the run keeps its last finished round and can be resumed",
    "exclude": "the centre is asked no more and not waited for, in this run, until it is readmitted",
    "readmit": "the centre takes part again from the next round on",
}
ACTIVE_STATUSES = ("started", "resumed")  # a run's status while it has a coordinator
POLL_INTERVAL = 2.0  # seconds between two looks while waiting for replies
log = logging.getLogger("consilium.server")


def apply_pending_commands(run: Run, between_rounds: bool = False) -> None:
    """Act on what was ordered since the last look. Raises Paused (between rounds) or Stopped."""
    if not between_rounds and time.monotonic() < run.last_command_poll + POLL_INTERVAL:
        return
    first, run.last_command_poll = run.last_command_poll == -math.inf, time.monotonic()
    for order in run.ledger.read_audit(run.root_run_id, run.last_command_id):
        run.last_command_id, said = order["id"], f"by order of {order['who']}: {order['why']}"
        if order["what"] in ("pause", "stop") and order["id"] > run.stale_command_id:
            run.pending_command = (order["what"], said)
        elif order["what"] in ("exclude", "readmit"):
            run.excluded_centres.pop(order["centre"], None)
            if order["what"] == "exclude":
                run.excluded_centres[order["centre"]] = f"excluded {said}"
            if not first:
                run.ledger.log_event(run.run_id, order["what"], said, order["centre"])
                log.info(
                    "%s %s", order["centre"], run.excluded_centres.get(order["centre"], f"readmitted {said}")
                )
    what, said = run.pending_command
    if what == "stop":
        raise RunStopped(said)
    if between_rounds and what == "pause":
        raise RunPaused(said)
    if between_rounds and not run.expected_centres:
        raise RunPaused("every centre is excluded; readmit one")


def issue_command(
    ledger: Ledger, actor: str, action: str, reason: str, run_id: str, centre: str = ""
) -> None:
    """Order a run. Raises ConsiliumError where it makes no sense now."""
    known = next((row for row in ledger.read_runs() if row["id"] == run_id), None)
    if known is None:
        raise ConsiliumError(f"the ledger knows no run '{run_id}'")
    if known["status"] == "finished" or (
        action in ("pause", "stop") and known["status"] not in ACTIVE_STATUSES
    ):
        raise ConsiliumError(f"run '{run_id}' is {known['status']}: there is nothing to {action}")
    if action in ("exclude", "readmit"):
        centres = known["config"]["federation"]["centres"]
        excluded = excluded_centres(ledger.read_audit(find_root_run_id(known)))
        if known["mode"] == "central":
            raise ConsiliumError("a central run has all data in one place: no centre can be left out")
        if centre not in centres:
            raise ConsiliumError(f"run '{run_id}' has no centre '{centre}'")
        if (centre in excluded) == (action == "exclude"):
            raise ConsiliumError(
                f"'{centre}' is {'excluded already' if centre in excluded else 'not excluded'}"
            )
        if action == "exclude" and set(centres) <= {*excluded, centre}:
            raise ConsiliumError(f"'{centre}' is the last centre; stop the run instead")
    ledger.log_audit(actor, action, reason, find_root_run_id(known), centre)


def find_root_run_id(run_row: Mapping[str, Any]) -> str:
    """The id that orders to a run of the ledger bear: that of the cross-validation that it is a part of, else its own."""
    federation = run_row["config"]["federation"]
    return str(run_row["id"]).removesuffix(
        f"-{fold_name(federation.get('fold'), federation.get('unseen', []))}"
    )


def fold_name(fold: int | None, held_out_centres: Sequence[str]) -> str:
    """What a part of a cross-validation is called; a run's name is a file's."""
    return (
        f"fold-{fold}"
        if fold is not None
        else f"without-{re.sub('[^A-Za-z0-9._-]', '-', '-'.join(held_out_centres))}"
    )


def excluded_centres(commands: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{excluded centre: why}, by a run's orders."""
    excluded: dict[str, str] = {}
    for order in commands:
        if order["what"] == "exclude":
            excluded[order["centre"]] = f"{order['who']}: {order['why']}"
        elif order["what"] == "readmit":
            excluded.pop(order["centre"], None)
    return excluded


def first_broken_link(entries: Iterable[Mapping[str, Any]]) -> int | None:
    """The id of the first entry that was changed, or whose predecessors were removed; None for a sound trail."""
    previous = GENESIS_HASH
    for row in entries:
        entry = {key: value for key, value in row.items() if key != "id"} | {"time": row["time"].isoformat()}
        if not verify_link(entry, previous):
            return int(row["id"])
        previous = row["hash"]
    return None
