"""A run in progress, and how it asks the centres: what the coordinator's modules share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.config.schema import Config
from common.modeling.parameters import EMPTY_PARAMS, Array, Layout, Weights
from common.protocol.messages import JoinReply, Refusal, Sums
from common.utils.errors import ConsiliumError
from common.utils.log_setup import log_context
from server.ledger.ledger import Ledger
from server.run.transport import Transport

log = logging.getLogger("consilium.server")


class RunPaused(ConsiliumError):
    """Too few centres, again and again: the run waits for a person and can be resumed."""


class RunStopped(RunPaused):
    """A person ended it; it can be resumed like one that was paused."""


class NoLabelledScans(ConsiliumError):
    """No centre that may train has a label for a task."""


@dataclass
class Run:
    """A run in progress."""

    run_id: str
    config: Config
    run_dir: Path
    transport: Transport
    ledger: Ledger
    layout: Layout = field(default_factory=Layout)
    weights: Weights = field(default_factory=lambda: Weights(EMPTY_PARAMS, np.empty(0, np.int64)))
    optimiser_state: dict[str, Any] = field(
        default_factory=dict
    )  # of the server optimiser; what its last step lost in rounding
    broadcast_delta: tuple[str, str, dict[str, Array]] = (
        "",
        "",
        {},
    )  # digests of the weights before and after the last step, and the step
    held_digests: dict[str, str] = field(default_factory=dict)  # {centre: digest of the weights it holds}
    traffic: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # {centre: bytes (up, down)} of the round so far
    members: dict[str, JoinReply] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)  # {centre that has no part: why}
    label_counts: Sums = field(default_factory=dict)  # {"cohort/split/task": [K + 1]}
    result: dict[str, Any] = field(
        default_factory=dict
    )  # what the report is made of; survives in the checkpoint

    stage_and_round: tuple[str, int] = ("", 0)  # stage and round in progress
    on_round_end: Callable[[], None] = lambda: (
        None
    )  # called when a round has closed (server/reporting/tensorboard.py)
    # Orders (server/run/operator_commands.py):
    root_run_id: str = ""  # the id that orders bear: the cross-validation's, or the run's own
    stale_command_id: int = 0  # id of the last order that was for the process before this one,
    last_command_id: int = 0  # of the last one read, ...
    last_command_poll: float = -math.inf  # ... when,
    pending_command: tuple[str, str] = ("", "")  # what is still to be done, and by whose order
    excluded_centres: dict[str, str] = field(default_factory=dict)  # {centre: by whose order and why}

    @property
    def expected_centres(self) -> list[str]:
        federation = self.config.federation
        return (
            ["pooled"]
            if federation.mode == "central"
            else [c for c in federation.centres if c not in self.excluded_centres]
        )

    @property
    def quorum(self) -> int:
        return max(1, math.ceil(self.config.federation.quorum * len(self.expected_centres)))


def record_exclusion(run: Run, stage: str, round_number: int, centre: str, reason: str) -> None:
    """Note who was left out, and why."""
    with log_context(centre=centre):
        log.warning("%s left out: %s", centre, reason)
    run.ledger.log_event(run.run_id, "left_out", reason, centre)
    if run.result:
        run.result["left_out"].append(
            {"stage": stage, "round": round_number, "centre": centre, "reason": reason}
        )


def refusal_reason(reply: object) -> str:
    """A refusal's reason; any other unexpected reply is one."""
    return reply.reason if isinstance(reply, Refusal) else f"answered with a {type(reply).__name__}"


def group_by_reason(reasons: Mapping[str, str]) -> str:
    """`north, east: the disk is full; south: ...`."""
    grouped: dict[str, list[str]] = {}
    for centre, why in reasons.items():
        grouped.setdefault(why, []).append(centre)
    return "; ".join(f"{', '.join(centres)}: {why}" for why, centres in grouped.items())
