"""A run in the terminal: the facts of the console's pages, for people who have no browser at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.utils.errors import ConsiliumError, suggest
from server.ledger import views
from server.ledger.ledger import Ledger, Row
from server.monitoring import run_status
from server.monitoring.health import CentreHealth, SuperLinkNode, centre_health
from server.reporting.figures import METRIC_NAMES
from server.reporting.report import format_duration
from server.reporting.report_tables import format_number
from server.run.operator_commands import ACTIVE_STATUSES

STATE_COLOURS = {"online": "green", "degraded": "yellow", "offline": "red"}
NUM_EVENTS = 5


def resolve_run(ledger: Ledger, run_id: str) -> Row:
    """A run by id, or `latest`: the youngest that is going on, else the youngest. Raises ConsiliumError."""
    row = run_status.select_latest_run(ledger) if run_id == "latest" else run_status.load_run(ledger, run_id)
    if row is None:
        raise ConsiliumError(
            f"the ledger {ledger.address} knows no run '{run_id}'{suggest(run_id, [of['id'] for of in ledger.read_runs()])}"
        )
    return row


def render_status(ledger: Ledger, row: Row, nodes: list[SuperLinkNode] | None = None) -> Group:
    """How a run is at this moment."""
    at = run_status.current_status(ledger, row)
    events = run_status.load_last_events(ledger, row["id"], NUM_EVENTS)
    head = Text.assemble(
        (row["id"], "bold"),
        f"  {row['recipe']}, {row['mode']}  ",
        (row["status"], "bold"),
        f" since {_format_age(row['since'])}",
    )
    going, learning = (
        Text(_describe_progress(row, at, run_status.estimate_progress(ledger, row, at))),
        Text(_describe_scores(ledger, row)),
    )
    return Group(head, going, learning, _centre_table(ledger, row, at, nodes), _event_table(events))


def watch_status(
    ledger: Ledger,
    run_id: str,
    list_nodes: Callable[[], list[SuperLinkNode]] | None,
    console: Console,
    interval: float = 2.0,
) -> None:
    """The same, again and again, until the run has ended or waits for a person."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            row = resolve_run(ledger, run_id)
            live.update(render_status(ledger, row, list_nodes() if list_nodes else None), refresh=True)
            if row["status"] not in ACTIVE_STATUSES:
                return
            time.sleep(interval)


def _describe_progress(row: Row, status: dict[str, Any], progress: dict[str, Any]) -> str:
    """`main, round 3 of 8: training at 4 centres for 12 s (south is waited for); a round takes 1 min 3 s; about 5 min left`."""
    said = f"{status['stage'] or 'beginning'}, {progress['done']} of {progress['all']} rounds closed"
    if status["going"]:
        for_ = f" for {format_duration((datetime.now(UTC) - status['since']).total_seconds())}"
        said += f"; {status['doing'] or 'meeting the centres'}{for_}"
        said += f", {', '.join(status['waiting'])} waited for" if status["waiting"] else ""
        said += (
            f"; {status['good']} of {status['asked']} answered, quorum {status['quorum']}, deadline {format_duration(status['deadline'])}"
            if status["asked"]
            else ""
        )
    said += f"; a round takes {format_duration(progress['median'])}" if progress["median"] is not None else ""
    return said + (
        f", about {format_duration(progress['left'])} left" if progress["left"] is not None else ""
    )


def _describe_scores(ledger: Ledger, row: Row) -> str:
    """Mean, worst and spread after the last round; and whether the worst centre is getting better."""
    course = run_status.score_history(ledger, row)
    if not course["points"]:
        return "no round was scored yet"
    last, name = course["points"][-1], METRIC_NAMES.get(course["metric"], course["metric"])
    if last["worst"] is None:
        return f"{course['task']}: {name} on validation undefined at every centre"
    worst = [point["worst"] for point in course["points"] if point["worst"] is not None]
    best = f", best so far {max(worst):.3f}" if len(worst) > 1 else ""
    return (
        f"{course['task']}: {name} on validation: mean {format_number(last['macro'])}, "
        f"worst {last['worst']:.3f} ({last['centre']}; began at {worst[0]:.3f}{best}), spread {format_number(last['spread'])}"
    )


def _centre_table(
    ledger: Ledger, row: Row, status: dict[str, Any], nodes: list[SuperLinkNode] | None
) -> Table:
    closed, spent = (
        views.last_round(ledger, row["id"]),
        {of["centre"]: of["epsilon"] for of in views.last_accepted(ledger, row["id"])},
    )
    sums = {of["centre"]: of for of in views.centre_totals(ledger, row["id"])}
    task, metric = run_status.primary_task_metric(
        row, {of["task"]: of["views"] for of in closed.get("scores", [])}
    )
    scored: dict[str, Any] = next(
        (of["centres"] for of in closed.get("scores", []) if of["task"] == task), {}
    )
    weights: dict[str, float] = next(
        (of["weights"] for of in closed.get("shares", []) if of["part"] == "backbone"), {}
    )
    drawn = Table("centre", "state", "last seen", "now")
    drawn.columns[2].no_wrap = True
    for name in (
        "scans",
        "unread",
        "weight",
        METRIC_NAMES.get(metric, metric),
        "epsilon",
        "sent, MB",
        "got, MB",
    ):
        drawn.add_column(Text(name), justify="right")
    for one in centre_health(ledger, row["id"], nodes):
        now, total = status["centres"].get(one.centre, {}), sums.get(one.centre, {})
        drawn.add_row(
            Text(one.centre),
            Text.assemble((one.state, STATE_COLOURS[one.state]), f": {one.reason}" if one.reason else ""),
            _format_age(one.last_seen) if one.last_seen else "never",
            Text(_describe_phase(now) if status["going"] else ""),
            format_number(sum(one.metadata.get("scans", {}).values()), 0) if one.metadata else "–",
            str(sum(one.metadata.get("skipped", {}).values())),
            format_number(weights.get(one.centre)) or "–",
            format_number(scored.get(one.centre, {}).get(metric)) or "–",
            _format_epsilon(one, spent.get(one.centre)),
            *(format_number((total.get(way) or 0) / 1e6, 1) for way in ("bytes_up", "bytes_down")),
        )
    notes = [
        f"{c}: {METRIC_NAMES.get(metric, metric)} undefined: {why}"
        for c, of in scored.items()
        if (why := of.get("reasons", {}).get(metric))
    ]
    drawn.caption, drawn.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    return drawn


def _describe_phase(centre_status: dict[str, Any]) -> str:
    if not centre_status or centre_status["phase"] == "idle":
        return ""
    took = f" {format_duration(centre_status['seconds'])}" if centre_status["seconds"] is not None else ""
    usual = f", usually {format_duration(centre_status['median'])}" if centre_status["slow"] else ""
    return f"{centre_status['what']} {centre_status['phase']}{took}{usual}".strip()


def _format_epsilon(centre: CentreHealth, spent: float | None) -> str:
    limit = centre.metadata.get("policy", {}).get("epsilon")
    return "–" if spent is None else f"{spent:.2f}" + (f" of {limit:g}" if limit else "")


def _event_table(events: list[Row]) -> Table:
    drawn = Table(box=None, show_header=False)
    for event in events:
        drawn.add_row(
            _format_age(event["time"]),
            Text(event["kind"]),
            Text(event["centre"] or ""),
            Text(event["detail"]),
        )
    return drawn


def _format_age(when: datetime) -> str:
    return f"{format_duration(max(0.0, (datetime.now(UTC) - when).total_seconds()))} ago"
