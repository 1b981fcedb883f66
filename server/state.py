"""A run in progress, and how it asks the centres: what the coordinator's modules share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConsiliumError
from common.logs import about
from common.messages import Presence, Refusal, Sums
from common.schema import Config
from common.weights import NONE, Array, Layout, Weights
from server.ledger import Ledger
from server.transport import Transport

log = logging.getLogger("consilium.server")


class Paused(ConsiliumError):
    """Too few centres, again and again: the run waits for a person and can be resumed."""


class Stopped(Paused):
    """A person ended it; it can be resumed like one that was paused."""


class Unlabelled(ConsiliumError):
    """No centre that may train has a label for a task."""


@dataclass
class Run:
    """A run in progress."""

    id: str
    config: Config
    folder: Path
    transport: Transport
    ledger: Ledger
    layout: Layout = field(default_factory=Layout)
    weights: Weights = field(default_factory=lambda: Weights(NONE, np.empty(0, np.int64)))
    moments: dict[str, Any] = field(default_factory=dict)  # of the server optimiser; what its last step lost in rounding
    change: tuple[str, str, dict[str, Array]] = ("", "", {})  # digests of the weights before and after the last step, and the step
    held: dict[str, str] = field(default_factory=dict)  # {centre: digest of the weights it holds}
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)  # {centre: bytes (up, down)} of the round so far
    presence: dict[str, Presence] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # {centre that has no part: why}
    counts: Sums = field(default_factory=dict)  # {"cohort/split/task": [K + 1]}
    result: dict[str, Any] = field(default_factory=dict)  # what the report is made of; survives in the checkpoint

    at: tuple[str, int] = ("", 0)  # stage and round in progress
    track: Callable[[], None] = lambda: None  # called when a round has closed (server/tracking.py)
    # Orders (server/orders.py):
    whole: str = ""  # the id that orders bear: the cross-validation's, or the run's own
    before: int = 0  # id of the last order that was for the process before this one,
    heard: int = 0  # of the last one read, ...
    looked: float = -math.inf  # ... when,
    ordered: tuple[str, str] = ("", "")  # what is still to be done, and by whose order
    excluded: dict[str, str] = field(default_factory=dict)  # {centre: by whose order and why}

    @property
    def expected(self) -> list[str]:
        federation = self.config.federation
        return ["pooled"] if federation.mode == "central" else [c for c in federation.centres if c not in self.excluded]

    @property
    def quorum(self) -> int:
        return max(1, math.ceil(self.config.federation.quorum * len(self.expected)))


def leave_out(run: Run, stage: str, round: int, centre: str, reason: str) -> None:
    """Note who was left out, and why."""
    with about(centre=centre):
        log.warning("%s left out: %s", centre, reason)
    run.ledger.event(run.id, "left_out", reason, centre)
    if run.result:
        run.result["left_out"].append({"stage": stage, "round": round, "centre": centre, "reason": reason})


def reason_of(reply: object) -> str:
    """A refusal's reason; any other unexpected reply is one."""
    return reply.reason if isinstance(reply, Refusal) else f"answered with a {type(reply).__name__}"


def by_reason(reasons: Mapping[str, str]) -> str:
    """`north, east: the disk is full; south: ...`."""
    grouped: dict[str, list[str]] = {}
    for centre, why in reasons.items():
        grouped.setdefault(why, []).append(centre)
    return "; ".join(f"{', '.join(centres)}: {why}" for why, centres in grouped.items())
