"""A run at this moment, read from the ledger: stage, round, activity, each centre's phase, time left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import sqlalchemy as sa

from common.config.parse import parse_config
from server.ledger import tables
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.run_info import list_expected_centres, planned_rounds_by_stage
from server.reporting.ledger_records import index_rows
from server.run.operator_commands import ACTIVE_STATUSES, excluded_centres, find_root_run_id

ACTIVITY_LABELS = {  # of the ledger's table `progress`
    "handshake": "joining",
    "train": "training",
    "secure sum": "secure aggregation",
    "scores": "scoring",
    "counts": "counting scans",
    "moments": "fitting heads",
    "clusters": "clustering",
    "quality": "computing image statistics",
}
AGGREGATING = "aggregating at the coordinator"
MEDIAN_WINDOW = 10  # rounds
MIN_MEDIAN_SAMPLES = 3  # replies
SLOW_FACTOR = 2.0  # a centre is slow beyond this multiple of its own median ...
SLOW_MARGIN = 5.0  # ... and this many seconds above it
STALE_GRACE = 120.0  # seconds beyond the round timeout, after which a silent coordinator is taken to be gone


class Phase(StrEnum):
    """What a centre does for the present request."""

    WAITING = "waiting"  # asked, and has not replied yet
    DONE = "done"
    REFUSED = "refused"  # its reply could not be used, or none came
    EXCLUDED = "excluded"  # by an operator
    IDLE = "idle"  # not asked


@dataclass
class CentreStatus:
    """A centre's part in the present request."""

    phase: Phase = Phase.IDLE
    activity: str = ""
    seconds: float | None = None  # until its reply, or until now
    median_seconds: float | None = None  # of its earlier replies of this kind
    is_slow: bool = False
    reason: str = ""  # why it is excluded or refused


@dataclass
class CurrentStatus:
    """A run at this moment."""

    is_active: bool  # its last status says that it has a coordinator
    since: datetime  # when the present activity began
    last_sign: datetime  # last sign of life of the coordinator
    round_timeout: float  # seconds
    excluded: dict[str, str]  # {centre: by whom and why}
    centres: dict[str, CentreStatus]
    stage: str = ""  # empty: the run has not begun
    round: int = 0
    activity: str = ""
    is_abandoned: bool = True  # no coordinator, or none that gives a sign of life
    quorum: int | None = None
    num_asked: int = 0
    num_replied: int = 0
    waiting_for: list[str] = field(default_factory=list)

    def list_centres(self, phase: Phase) -> list[str]:
        """Return the centres in a phase."""
        return [name for name, centre in self.centres.items() if centre.phase is phase]


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    num_done: int  # rounds
    num_total: int  # rounds, done and planned
    median_seconds: float | None  # of a round; None before the first
    seconds_left: float | None  # None: unknown


# ---- the status


def current_status(ledger: Ledger, row: Row) -> CurrentStatus:
    """Return where a run is: what its centres were asked for last, and how far each has come with it."""
    config = parse_config(row["config"])
    is_active = row["status"] in ACTIVE_STATUSES
    excluded = excluded_centres(ledger.read_audit(find_root_run_id(row)))
    centres = {name: CentreStatus() for name in list_expected_centres(row)}
    for name in excluded.keys() & centres.keys():
        centres[name] = CentreStatus(Phase.EXCLUDED, reason=excluded[name])
    status = CurrentStatus(
        is_active, row["since"], row["since"], config.federation.round_timeout, excluded, centres
    )
    status.is_abandoned = not is_active
    request = _read_last_request(ledger, row["id"])
    if request is None:
        return status
    replies = _read_recent_replies(ledger, row["id"], num_centres=len(centres))
    now = datetime.now(UTC)
    _fill_centres(status, request, replies, now)
    _fill_activity(status, request, replies)
    status.quorum = max(1, math.ceil(config.federation.quorum * status.num_asked))
    deadline = status.last_sign + timedelta(seconds=status.round_timeout + STALE_GRACE)
    status.is_abandoned = not is_active or now > deadline
    return status


def _read_last_request(ledger: Ledger, run_id: str) -> Row | None:
    progress = tables.progress.c
    rows = ledger.read(
        sa.select(tables.progress)
        .where(progress.run_id == run_id, progress.centre.is_(None))
        .order_by(progress.id.desc())
        .limit(1)
    )
    return rows[0] if rows else None


def _read_recent_replies(ledger: Ledger, run_id: str, num_centres: int) -> list[Row]:
    """Return the last replies, the latest first: enough for each centre's median."""
    progress = tables.progress.c
    columns = (
        progress.id,
        progress.activity,
        progress.centre,
        progress.seconds,
        progress.reason,
        progress.time,
    )
    return ledger.read(
        sa.select(*columns)
        .where(progress.run_id == run_id, progress.centre.is_not(None))
        .order_by(progress.id.desc())
        .limit(3 * MEDIAN_WINDOW * num_centres)
    )


def _fill_centres(status: CurrentStatus, request: Row, replies: list[Row], now: datetime) -> None:
    """Fill in how far each centre has come with the last request."""
    medians = _median_seconds(replies, request)
    current_replies = _replies_to(request, replies)
    activity = describe_activity(request["activity"])
    elapsed = (now - request["time"]).total_seconds()
    for name in request["asked_centres"]:
        centre = status.centres.setdefault(name, CentreStatus())
        reply = current_replies.get(name)
        if reply is None and centre.phase is Phase.EXCLUDED:
            continue
        centre.activity = activity
        centre.median_seconds = medians.get(name)
        if reply:
            centre.phase = Phase.DONE
            centre.seconds = reply["seconds"]
            if reply["reason"]:
                centre.phase = Phase.REFUSED
                centre.reason = reply["reason"]
        elif status.is_active:
            centre.phase = Phase.WAITING
            centre.seconds = elapsed
            centre.is_slow = _is_slow(elapsed, centre.median_seconds)


def _replies_to(request: Row, replies: list[Row]) -> dict[str, Row]:
    """Return {centre: its last reply to the request}. `replies` are the latest first."""
    last_replies: dict[str, Row] = {}
    for reply in replies:
        if reply["id"] > request["id"]:
            last_replies.setdefault(reply["centre"], reply)
    return last_replies


def _median_seconds(replies: list[Row], request: Row) -> dict[str, float]:
    """Return {centre: median time of its earlier good replies to requests of this kind}."""
    seconds: dict[str, list[float]] = {}
    for reply in replies:
        is_earlier = reply["id"] < request["id"] and reply["activity"] == request["activity"]
        if is_earlier and not reply["reason"]:
            seconds.setdefault(reply["centre"], []).append(reply["seconds"])
    medians = {}
    for centre, values in seconds.items():
        if len(values) >= MIN_MEDIAN_SAMPLES:
            medians[centre] = statistics.median(values)
    return medians


def _is_slow(elapsed: float, median: float | None) -> bool:
    return median is not None and elapsed > max(SLOW_FACTOR * median, median + SLOW_MARGIN)


def _fill_activity(status: CurrentStatus, request: Row, replies: list[Row]) -> None:
    """Fill in what the run does, from the last request and each centre's phase."""
    status.stage = request["stage"]
    status.round = request["round"]
    status.num_asked = len(request["asked_centres"])
    status.num_replied = len(status.list_centres(Phase.DONE))
    status.waiting_for = status.list_centres(Phase.WAITING)
    status.last_sign = request["time"]
    for reply in _replies_to(request, replies).values():
        status.last_sign = max(status.last_sign, reply["time"])
    if status.is_active and not status.waiting_for:
        status.activity = AGGREGATING
        status.since = status.last_sign
    else:
        status.activity = describe_activity(request["activity"])
        status.since = request["time"]


def describe_activity(activity: str) -> str:
    """Return the words for an activity of the ledger's table `progress`."""
    return ACTIVITY_LABELS.get(activity, activity)


# ---- progress


def estimate_progress(ledger: Ledger, row: Row, status: CurrentStatus) -> Progress:
    """Count the rounds that are done and still planned, and estimate the time left by the median round."""
    planned = planned_rounds_by_stage(row)
    closed = index_rows(_count_rounds(ledger, row["id"]), "stage")
    num_done = sum(stage["count"] for stage in closed.values())
    num_left = 0
    for stage in _remaining_stages(planned, status.stage):
        last_round = closed[stage]["last_round"] if stage in closed else 0
        num_left += planned[stage] - last_round
    median = _median_round_seconds(ledger, row["id"], status.stage)
    seconds_left = None
    if median is not None and status.is_active:
        seconds_left = median * num_left
    return Progress(num_done, num_done + num_left, median, seconds_left)


def _remaining_stages(planned: Mapping[str, int], current: str) -> list[str]:
    """Return the stages from the current one on; all of them before the first has begun."""
    stages = list(planned)
    if current not in planned:
        return stages
    return stages[stages.index(current) :]


def _count_rounds(ledger: Ledger, run_id: str) -> list[Row]:
    """Return each stage's last closed round, `last_round`, and its number of closed rounds, `count`."""
    rounds = tables.rounds.c
    return ledger.read(
        sa.select(
            rounds.stage,
            sa.func.max(rounds.round).label("last_round"),
            sa.func.count(sa.distinct(rounds.round)).label("count"),
        )
        .where(rounds.run_id == run_id, rounds.round > 0)
        .group_by(rounds.stage)
    )


def _median_round_seconds(ledger: Ledger, run_id: str, stage: str) -> float | None:
    """Return the median time of the last rounds, of the present stage if it has any."""
    rounds = tables.rounds.c
    rows = ledger.read(
        sa.select(rounds.stage, rounds.seconds)
        .where(rounds.run_id == run_id, rounds.round > 0)
        .order_by(rounds.id.desc())
        .limit(2 * MEDIAN_WINDOW)
    )
    if not rows:
        return None
    rows_of_stage = [row for row in rows if row["stage"] == stage]
    seconds: list[float] = [row["seconds"] for row in rows_of_stage or rows]
    return statistics.median(seconds)
