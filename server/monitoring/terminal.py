"""A run's status in the terminal: what the console's pages show, for people without a browser at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.config.parse import parse_config
from common.utils.errors import ConsiliumError, suggest
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.ledger.views import centre_totals, last_accepted, last_round
from server.monitoring import run_history, run_status
from server.monitoring.centre_reports import CentreReport
from server.monitoring.health import CentreHealth, CentreState, SuperLinkNode, centre_health
from server.monitoring.run_info import select_latest_run
from server.monitoring.run_status import CentreStatus, CurrentStatus, Phase, Progress
from server.reporting.labels import format_duration, format_number, format_number_or_dash, label_metric
from server.reporting.ledger_records import index_rows
from server.reporting.scores import choose_task_metric
from server.run.operator_commands import ACTIVE_STATUSES
from server.run.records import CentreScores, parse_task_scores

STATE_COLOURS = {CentreState.ONLINE: "green", CentreState.DEGRADED: "yellow", CentreState.OFFLINE: "red"}
NUM_EVENTS = 5
LATEST = "latest"


def resolve_run(ledger: Ledger, run_id: str) -> Row:
    """Return a run by its id, or by "latest" the latest active run, or else the latest.

    Raises:
        ConsiliumError: the ledger has no such run.
    """
    row = ledger.read_run(run_id)
    if run_id == LATEST:
        row = select_latest_run(ledger)
    if row is None:
        run_ids = [run["id"] for run in ledger.read_runs()]
        raise ConsiliumError(f"the ledger {ledger.address} has no run '{run_id}'{suggest(run_id, run_ids)}")
    return row


def render_status(ledger: Ledger, row: Row, nodes: list[SuperLinkNode] | None = None) -> Group:
    """Return a run's status: what it does, its scores, its centres and its last events.

    `nodes` are the SuperLink's; None in a simulation.
    """
    status = run_status.current_status(ledger, row)
    progress = run_status.estimate_progress(ledger, row, status)
    events = run_history.load_last_events(ledger, row["id"], NUM_EVENTS)
    heading = Text.assemble(
        (row["id"], "bold"),
        f"  {row['recipe']}, {row['mode']}  ",
        (row["status"], "bold"),
        f" since {_format_age(row['since'])}",
    )
    return Group(
        heading,
        Text(_describe_progress(row, status, progress)),
        Text(_describe_scores(ledger, row)),
        _centre_table(ledger, row, status, centre_health(ledger, row["id"], nodes)),
        _event_table(events),
    )


def watch_status(
    ledger: Ledger,
    run_id: str,
    list_nodes: Callable[[], list[SuperLinkNode]] | None,
    console: Console,
    interval: float = 2.0,
) -> None:
    """Show a run's status, renewed every `interval` seconds, until the run ends or is paused."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            row = resolve_run(ledger, run_id)
            live.update(render_status(ledger, row, list_nodes() if list_nodes else None), refresh=True)
            if row["status"] not in ACTIVE_STATUSES:
                return
            time.sleep(interval)


def _describe_progress(row: Row, status: CurrentStatus, progress: Progress) -> str:
    """Return a sentence on the run's activity.

    For example ``main, 3 of 8 rounds done; training for 12 s, waiting for south; 3 of 4 centres have replied,
    quorum 2, round timeout 1 h 0 min; a round takes 1 min 3 s, about 5 min 15 s left``.
    """
    stage = status.stage or "starting"
    parts = [f"{stage}, {progress.num_done} of {progress.num_total} rounds done"]
    if status.is_active:
        activity = f"{status.activity or 'connecting to the centres'} for {_format_elapsed(status.since)}"
        if status.waiting_for:
            activity += f", waiting for {', '.join(status.waiting_for)}"
        parts.append(activity)
        if status.num_asked:
            parts.append(
                f"{status.num_replied} of {status.num_asked} centres have replied, quorum {status.quorum}, "
                f"round timeout {format_duration(status.round_timeout)}"
            )
    if progress.median_seconds is not None:
        parts.append(f"a round takes {format_duration(progress.median_seconds)}")
    sentence = "; ".join(parts)
    if progress.seconds_left is not None:
        sentence += f", about {format_duration(progress.seconds_left)} left"
    return sentence


def _describe_scores(ledger: Ledger, row: Row) -> str:
    """Return mean, worst and spread after the last round, and how the worst centre's score has changed."""
    history = run_history.score_history(ledger, row)
    if not history.points:
        return "no round has been scored yet"
    last = history.points[-1]
    subject = f"{history.task}: {label_metric(history.metric)} on validation"
    if last.worst is None:
        return f"{subject} is undefined at every centre"
    worst_values = [point.worst for point in history.points if point.worst is not None]
    trend = f"first {worst_values[0]:.3f}"
    if len(worst_values) > 1:
        trend += f", highest so far {max(worst_values):.3f}"
    worst = f"worst {last.worst:.3f} ({last.worst_centre}; {trend})"
    return f"{subject}: mean {format_number(last.macro)}, {worst}, spread {format_number(last.spread)}"


# ---- the centres


@dataclass
class _CentreNumbers:
    """What the table shows of the centres beside their state."""

    metric: str
    scores: Mapping[str, CentreScores] = field(default_factory=dict)  # of the last round
    weights: Mapping[str, float] = field(default_factory=dict)  # in the last round
    last_accepted: Mapping[str, Row] = field(default_factory=dict)  # contributions
    totals: Mapping[str, Row] = field(default_factory=dict)  # of server.ledger.views.centre_totals


def _load_centre_numbers(ledger: Ledger, row: Row) -> _CentreNumbers:
    evaluation = parse_config(row["config"]).evaluation
    numbers = _CentreNumbers(evaluation.metric)
    closed = last_round(ledger, row["id"])
    if closed:
        scores = {scores_row["task"]: parse_task_scores(scores_row) for scores_row in closed.scores}
        task, numbers.metric = choose_task_metric(evaluation, scores)
        if task in scores:
            numbers.scores = scores[task].centres
        weights = index_rows(closed.group_weights, "group")
        if "backbone" in weights:
            numbers.weights = weights["backbone"]["centre_weights"]
    numbers.last_accepted = index_rows(last_accepted(ledger, row["id"]), "centre")
    numbers.totals = index_rows(centre_totals(ledger, row["id"]), "centre")
    return numbers


def _centre_table(ledger: Ledger, row: Row, status: CurrentStatus, centres: Sequence[CentreHealth]) -> Table:
    numbers = _load_centre_numbers(ledger, row)
    table = Table("centre", "state", "last seen", "now")
    table.columns[2].no_wrap = True
    metric = label_metric(numbers.metric)
    for name in ("scans", "unreadable", "weight", metric, "epsilon", "sent, MB", "received, MB"):
        table.add_column(Text(name), justify="right")
    for centre in centres:
        phase = ""
        if status.is_active:
            phase = _describe_phase(status.centres.get(centre.centre, CentreStatus()))
        table.add_row(*_health_cells(centre), Text(phase), *_number_cells(centre, numbers))
    notes = []
    for name, scores in numbers.scores.items():
        if numbers.metric in scores.reasons:
            notes.append(f"{name}: {metric} undefined: {scores.reasons[numbers.metric]}")
    if notes:
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table


def _health_cells(centre: CentreHealth) -> list[Text]:
    state = Text(centre.state, STATE_COLOURS[centre.state])
    if centre.reason:
        state.append(f": {centre.reason}", "default")
    last_seen = _format_age(centre.last_seen) if centre.last_seen else "never"
    return [Text(centre.centre), state, Text(last_seen)]


def _number_cells(centre: CentreHealth, numbers: _CentreNumbers) -> list[str]:
    name = centre.centre
    report = centre.report or CentreReport()
    scores = numbers.scores.get(name, CentreScores(metrics={}))
    total = numbers.totals.get(name, {"bytes_up": 0, "bytes_down": 0})
    return [
        format_number_or_dash(sum(report.scans.values()), 0) if centre.report else "–",
        str(report.num_skipped),
        format_number_or_dash(numbers.weights.get(name)),
        format_number_or_dash(scores.get_metric(numbers.metric)),
        _format_epsilon(numbers.last_accepted.get(name), report.epsilon_limit),
        format_number_or_dash(total["bytes_up"] / 1e6, 1),
        format_number_or_dash(total["bytes_down"] / 1e6, 1),
    ]


def _describe_phase(centre: CentreStatus) -> str:
    if centre.phase is Phase.IDLE:
        return ""
    text = f"{centre.activity} {centre.phase}".strip()
    if centre.seconds is not None:
        text += f" {format_duration(centre.seconds)}"
    if centre.is_slow and centre.median_seconds is not None:
        text += f", usually {format_duration(centre.median_seconds)}"
    return text


def _format_epsilon(accepted: Row | None, limit: float | None) -> str:
    if accepted is None or accepted["epsilon"] is None:
        return "–"
    text = f"{accepted['epsilon']:.2f}"
    return f"{text} of {limit:g}" if limit else text


# ---- events


def _event_table(events: Sequence[Row]) -> Table:
    table = Table(box=None, show_header=False)
    for event in events:
        kind = event["kind"].replace("_", " ")
        detail = Text(event["detail"])
        table.add_row(_format_age(event["time"]), Text(kind), Text(event["centre"] or ""), detail)
    return table


def _format_age(time_of_event: datetime) -> str:
    return f"{_format_elapsed(time_of_event)} ago"


def _format_elapsed(start: datetime) -> str:
    return format_duration(max(0.0, (datetime.now(UTC) - start).total_seconds()))
