"""Operators' commands to a run: entries of the audit trail that the run's coordinator reads.

The coordinator reads them before each round and while it waits for replies. `pause` lets the round end first,
`stop` discards it; both leave a run that can be resumed. An excluded centre is neither asked nor waited for
until it is readmitted. A command to one run of a cross-validation applies to all of its runs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.run.run_state import PendingCommand, Run, RunPaused, RunStopped


class Command(StrEnum):
    """What an operator can order a run to do."""

    PAUSE = "pause"
    STOP = "stop"
    EXCLUDE = "exclude"
    READMIT = "readmit"


COMMANDS = {
    Command.PAUSE: "the run finishes the round in progress, then waits to be resumed",
    Command.STOP: "the run discards the round in progress and can be resumed after its last finished round",
    Command.EXCLUDE: "the centre is neither asked nor waited for in this run until it is readmitted",
    Command.READMIT: "the centre takes part again from the next round on",
}
CENTRE_COMMANDS = (Command.EXCLUDE, Command.READMIT)
ACTIVE_STATUSES = ("started", "resumed")  # a run's status while it has a coordinator
POLL_INTERVAL = 2.0  # seconds between two readings while the run waits for replies
log = logging.getLogger("consilium.server")


def apply_pending_commands(run: Run, between_rounds: bool = False) -> None:
    """Read the commands since the last reading and obey them.

    Raises RunStopped on `stop`, and between rounds RunPaused on `pause` or when every centre is excluded.
    """
    commands = run.commands
    if not between_rounds and time.monotonic() < commands.last_poll + POLL_INTERVAL:
        return
    is_first_reading = commands.last_poll == -math.inf
    commands.last_poll = time.monotonic()
    for row in run.ledger.read_audit(commands.root_run_id, commands.last_command_id):
        commands.last_command_id = row["id"]
        _note_command(run, row, is_first_reading)
    _obey_pending_command(run, between_rounds)


def _note_command(run: Run, row: Mapping[str, Any], is_first_reading: bool) -> None:
    """Take up a command. What an earlier process obeyed is not obeyed again, but exclusions stay in force."""
    action = row["action"]
    attribution = f"by order of {row['actor']}: {row['reason']}"
    if action in CENTRE_COMMANDS:
        _exclude_or_readmit(run, action, row["centre"], attribution, is_first_reading)
    elif action in (Command.PAUSE, Command.STOP) and row["id"] > run.commands.stale_command_id:
        run.commands.pending = PendingCommand(action, attribution)


def _exclude_or_readmit(run: Run, action: str, centre: str, attribution: str, is_first_reading: bool) -> None:
    excluded = run.commands.excluded_centres
    excluded.pop(centre, None)
    message = f"readmitted {attribution}"
    if action == Command.EXCLUDE:
        message = f"excluded {attribution}"
        excluded[centre] = message
    if not is_first_reading:
        run.ledger.log_event(run.run_id, action, attribution, centre)
        log.info("%s %s", centre, message)


def _obey_pending_command(run: Run, between_rounds: bool) -> None:
    pending = run.commands.pending
    if pending and pending.action == Command.STOP:
        raise RunStopped(pending.attribution)
    if not between_rounds:
        return
    if pending:
        raise RunPaused(pending.attribution)
    if not run.expected_centres:
        raise RunPaused("every centre is excluded; readmit one")


def issue_command(
    ledger: Ledger, actor: str, action: str, reason: str, run_id: str, centre: str = ""
) -> None:
    """Add a command to the audit trail. Raises ConsiliumError where the run cannot obey it now."""
    row = ledger.read_run(run_id)
    if row is None:
        raise ConsiliumError(f"the ledger has no run '{run_id}'")
    is_active = row["status"] in ACTIVE_STATUSES
    if row["status"] == "finished" or (action in (Command.PAUSE, Command.STOP) and not is_active):
        raise ConsiliumError(f"run '{run_id}' is {row['status']}: there is nothing to {action}")
    root_run_id = find_root_run_id(row)
    if action in CENTRE_COMMANDS:
        _check_centre_command(action, centre, row, excluded_centres(ledger.read_audit(root_run_id)))
    ledger.log_audit(actor, action, reason, root_run_id, centre)


def _check_centre_command(
    action: str, centre: str, run_row: Mapping[str, Any], excluded: Mapping[str, str]
) -> None:
    """Raise ConsiliumError where a centre cannot be excluded or readmitted."""
    centres = run_row["config"]["federation"]["centres"]
    if run_row["mode"] == "central":
        raise ConsiliumError("a central run has all data in one place: no centre can be excluded")
    if centre not in centres:
        raise ConsiliumError(f"run '{run_row['id']}' has no centre '{centre}'")
    if action == Command.READMIT:
        if centre not in excluded:
            raise ConsiliumError(f"'{centre}' is not excluded")
        return
    if centre in excluded:
        raise ConsiliumError(f"'{centre}' is already excluded")
    if set(centres) <= {*excluded, centre}:
        raise ConsiliumError(f"'{centre}' is the last centre; stop the run instead")


def find_root_run_id(run_row: Mapping[str, Any]) -> str:
    """Return the id that commands to a run name: its cross-validation's, or its own."""
    return str(run_row["parent_run_id"] or run_row["id"])


def make_fold_name(fold: int | None, held_out_centres: Sequence[str]) -> str:
    """Return a cross-validation run's part of its id, which is also a folder's name."""
    if fold is not None:
        return f"fold-{fold}"
    return f"without-{'-'.join(held_out_centres)}"


def excluded_centres(commands: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return {excluded centre: by whom and why} from a run's commands, oldest first."""
    excluded: dict[str, str] = {}
    for row in commands:
        if row["action"] == Command.EXCLUDE:
            excluded[row["centre"]] = f"{row['actor']}: {row['reason']}"
        elif row["action"] == Command.READMIT:
            excluded.pop(row["centre"], None)
    return excluded
