"""A run in progress: the records that the coordinator's modules share, and what ends it early."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import EMPTY_PARAMS, Array, Layout, Weights
from common.protocol.messages import JoinReply, Refusal, Sums
from common.utils.errors import ConsiliumError, RefusalCode
from common.utils.log_setup import log_context
from server.ledger.ledger import Ledger
from server.run.records import Exclusion, RunResult
from server.run.transport import Transport

POOLED_CENTRE = "pooled"  # the only node of a central run: it has all centres' cohorts
log = logging.getLogger("consilium.server")


class RunPaused(ConsiliumError):
    """The run cannot go on now; it can be resumed."""


class RunStopped(RunPaused):
    """An operator stopped the run; it can be resumed like a paused one."""


class NoCentreReplied(RunPaused):
    """None of the centres that were asked has sent a usable reply."""


class NoLabelledScans(ConsiliumError):
    """No centre that may train has a label for a task."""


@dataclass
class ModelState:
    """The global model, as a checkpoint keeps it."""

    layout: Layout = field(default_factory=Layout)
    weights: Weights = field(default_factory=lambda: Weights(EMPTY_PARAMS, np.empty(0, np.int64)))
    # The server optimiser's moments, and what rounding took from the last step (server/run/broadcast.py).
    optimiser_state: dict[str, Any] = field(default_factory=dict)


class ServerStep(NamedTuple):
    """The difference between two successive global weights, as the centres receive it."""

    base_digest: str
    target_digest: str
    encoded_delta: dict[str, Array]  # in the run's codec


@dataclass
class BroadcastState:
    """What the centres hold of the global weights, so that they can be sent a difference."""

    last_step: ServerStep | None = None  # None: no step, or one that was not quantized
    held_digests: dict[str, str] = field(default_factory=dict)  # {centre: digest of the weights it holds}


@dataclass
class Membership:
    """Who takes part in the run, and what they hold."""

    members: dict[str, JoinReply] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)  # of centres that could not be admitted
    label_counts: Sums = field(default_factory=dict)  # {"cohort/split/task": scans per class [K + 1]}


@dataclass
class PendingCommand:
    """A pause or stop that an operator has ordered and the run has not yet obeyed."""

    action: str
    attribution: str  # by whom and why


@dataclass
class OperatorCommands:
    """Which of its operators' commands the run has read, and what they ordered (operator_commands.py)."""

    root_run_id: str = ""  # the id that commands name: the cross-validation's, or the run's own
    stale_command_id: int = 0  # commands up to this one were for an earlier process
    last_command_id: int = 0  # the last one that was read
    last_poll: float = -math.inf  # when the commands were last read, by the monotonic clock
    pending: PendingCommand | None = None
    excluded_centres: dict[str, str] = field(default_factory=dict)  # {centre: on whose order and why}


class CentreTraffic(NamedTuple):
    """Bytes of arrays that a centre exchanged."""

    bytes_up: int = 0  # from the centre
    bytes_down: int = 0  # to the centre


@dataclass
class Traffic:
    """Bytes exchanged with each centre in the round so far."""

    by_centre: dict[str, CentreTraffic] = field(default_factory=dict)

    def add(self, centre: str, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """Add a message exchange; without bytes the centre is only listed."""
        before = self.of_centre(centre)
        self.by_centre[centre] = CentreTraffic(before.bytes_up + bytes_up, before.bytes_down + bytes_down)

    def of_centre(self, centre: str) -> CentreTraffic:
        """Return one centre's traffic."""
        return self.by_centre.get(centre, CentreTraffic())

    def sum_up(self) -> CentreTraffic:
        """Return the traffic of all centres together."""
        up = sum(traffic.bytes_up for traffic in self.by_centre.values())
        down = sum(traffic.bytes_down for traffic in self.by_centre.values())
        return CentreTraffic(up, down)


class RunPosition(NamedTuple):
    """The stage and round in progress; no stage yet while the centres join."""

    stage: str = ""
    round: int = 0


def _do_nothing() -> None:
    """Ignore the end of a round."""


@dataclass
class Run:
    """A run in progress."""

    run_id: str
    config: Config
    run_dir: Path
    transport: Transport
    ledger: Ledger
    model: ModelState = field(default_factory=ModelState)
    membership: Membership = field(default_factory=Membership)
    broadcast: BroadcastState = field(default_factory=BroadcastState)
    commands: OperatorCommands = field(default_factory=OperatorCommands)
    traffic: Traffic = field(default_factory=Traffic)
    position: RunPosition = field(default_factory=RunPosition)
    on_round_end: Callable[[], None] = _do_nothing  # writes live curves (server/reporting/tensorboard.py)
    # The configuration as plain values, as messages carry it.
    config_values: dict[str, Any] = field(init=False)
    result: RunResult = field(init=False)  # without centres until they have joined

    def __post_init__(self) -> None:
        """Begin with an empty result."""
        self.set_config(self.config)
        self.result = RunResult(
            run_id=self.run_id,
            recipe=self.config.recipe,
            mode=self.config.federation.mode,
            seed=self.config.seed,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            config=self.config_values,
        )

    def set_config(self, config: Config) -> None:
        """Replace the configuration, and the plain values that are made from it once."""
        self.config = config
        self.config_values = config_to_dict(config)

    @property
    def expected_centres(self) -> list[str]:
        """The centres that take part unless they are away: all but those that an operator excluded."""
        federation = self.config.federation
        if federation.mode == "central":
            return [POOLED_CENTRE]
        return [centre for centre in federation.centres if centre not in self.commands.excluded_centres]

    @property
    def quorum(self) -> int:
        """How many centres must be present for the run to start."""
        return max(1, math.ceil(self.config.federation.quorum * len(self.expected_centres)))


def record_exclusion(run: Run, stage: str, round_number: int, centre: str, refusal: Refusal) -> None:
    """Log, in the ledger and in the result, that a centre was left out and why."""
    with log_context(centre=centre):
        log.warning("%s left out: %s", centre, refusal.reason)
    run.ledger.log_event(run.run_id, "left_out", refusal.reason, centre, refusal.code)
    run.result.left_out.append(Exclusion(stage, round_number, centre, refusal.reason, refusal.code))


def to_refusal(centre: str, reply: object) -> Refusal:
    """Return a refusal as it is, and make one of any other unexpected reply."""
    if isinstance(reply, Refusal):
        return reply
    return Refusal(centre, f"answered with a {type(reply).__name__}", code=RefusalCode.BAD_REPLY)


def group_by_reason(reasons: Mapping[str, str]) -> str:
    """Return a sentence of reasons: ``north, east: the disk is full; south: ...``."""
    centres_by_reason: dict[str, list[str]] = {}
    for centre, reason in reasons.items():
        centres_by_reason.setdefault(reason, []).append(centre)
    return "; ".join(f"{', '.join(centres)}: {reason}" for reason, centres in centres_by_reason.items())
