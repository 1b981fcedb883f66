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

from common.errors import ConsiliumError, nearest
from server import latest
from server.dashboard import facts
from server.figures import NAMES
from server.grids import text_of
from server.health import Health, Node, federation
from server.ledger import Ledger, Row
from server.orders import RUNNING
from server.report import duration

COLOURS = {"online": "green", "degraded": "yellow", "offline": "red"}
EVENTS = 5


def run_named(ledger: Ledger, name: str) -> Row:
    """A run by id, or `latest`: the youngest that is going on, else the youngest. Raises ConsiliumError."""
    row = facts.latest(ledger) if name == "latest" else facts.run_of(ledger, name)
    if row is None:
        raise ConsiliumError(f"the ledger {ledger.address} knows no run '{name}'{nearest(name, [of['id'] for of in ledger.runs()])}")
    return row


def show(ledger: Ledger, row: Row, nodes: list[Node] | None = None) -> Group:
    """How a run is at this moment."""
    at = facts.moment(ledger, row)
    events = facts.last_events(ledger, row["id"], EVENTS)
    head = Text.assemble(
        (row["id"], "bold"), f"  {row['recipe']}, {row['mode']}  ", (row["status"], "bold"), f" since {_ago(row['since'])}"
    )
    going, learning = Text(_going(row, at, facts.pace(ledger, row, at))), Text(_learning(ledger, row))
    return Group(head, going, learning, _centres(ledger, row, at, nodes), _events(events))


def watch(ledger: Ledger, run: str, ask: Callable[[], list[Node]] | None, console: Console, every: float = 2.0) -> None:
    """The same, again and again, until the run has ended or waits for a person."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            row = run_named(ledger, run)
            live.update(show(ledger, row, ask() if ask else None), refresh=True)
            if row["status"] not in RUNNING:
                return
            time.sleep(every)


def _going(row: Row, at: dict[str, Any], pace: dict[str, Any]) -> str:
    """`main, round 3 of 8: training at 4 centres for 12 s (south is waited for); a round takes 1 min 3 s; about 5 min left`."""
    said = f"{at['stage'] or 'beginning'}, {pace['done']} of {pace['all']} rounds closed"
    if at["going"]:
        for_ = f" for {duration((datetime.now(UTC) - at['since']).total_seconds())}"
        said += f"; {at['doing'] or 'meeting the centres'}{for_}"
        said += f", {', '.join(at['waiting'])} waited for" if at["waiting"] else ""
        said += (
            f"; {at['good']} of {at['asked']} answered, quorum {at['quorum']}, deadline {duration(at['deadline'])}" if at["asked"] else ""
        )
    said += f"; a round takes {duration(pace['median'])}" if pace["median"] is not None else ""
    return said + (f", about {duration(pace['left'])} left" if pace["left"] is not None else "")


def _learning(ledger: Ledger, row: Row) -> str:
    """Mean, worst and spread after the last round; and whether the worst centre is getting better."""
    course = facts.course(ledger, row)
    if not course["points"]:
        return "no round was scored yet"
    last, name = course["points"][-1], NAMES.get(course["metric"], course["metric"])
    if last["worst"] is None:
        return f"{course['task']}: {name} on validation undefined at every centre"
    worst = [point["worst"] for point in course["points"] if point["worst"] is not None]
    best = f", best so far {max(worst):.3f}" if len(worst) > 1 else ""
    return (
        f"{course['task']}: {name} on validation: mean {text_of(last['macro'])}, "
        f"worst {last['worst']:.3f} ({last['centre']}; began at {worst[0]:.3f}{best}), spread {text_of(last['spread'])}"
    )


def _centres(ledger: Ledger, row: Row, at: dict[str, Any], nodes: list[Node] | None) -> Table:
    closed, spent = latest.closed(ledger, row["id"]), {of["centre"]: of["epsilon"] for of in latest.used(ledger, row["id"])}
    sums = {of["centre"]: of for of in latest.totals(ledger, row["id"])}
    task, metric = facts.judged_by(row, {of["task"]: of["views"] for of in closed.get("scores", [])})
    scored: dict[str, Any] = next((of["centres"] for of in closed.get("scores", []) if of["task"] == task), {})
    weights: dict[str, float] = next((of["weights"] for of in closed.get("shares", []) if of["part"] == "backbone"), {})
    drawn = Table("centre", "state", "last seen", "now")
    drawn.columns[2].no_wrap = True
    for name in ("scans", "unread", "weight", NAMES.get(metric, metric), "epsilon", "sent, MB", "got, MB"):
        drawn.add_column(Text(name), justify="right")
    for one in federation(ledger, row["id"], nodes):
        now, total = at["centres"].get(one.centre, {}), sums.get(one.centre, {})
        drawn.add_row(
            Text(one.centre),
            Text.assemble((one.state, COLOURS[one.state]), f": {one.reason}" if one.reason else ""),
            _ago(one.seen) if one.seen else "never",
            Text(_phase(now) if at["going"] else ""),
            text_of(sum(one.facts.get("scans", {}).values()), 0) if one.facts else "–",
            str(sum(one.facts.get("skipped", {}).values())),
            text_of(weights.get(one.centre)) or "–",
            text_of(scored.get(one.centre, {}).get(metric)) or "–",
            _epsilon(one, spent.get(one.centre)),
            *(text_of((total.get(way) or 0) / 1e6, 1) for way in ("bytes_up", "bytes_down")),
        )
    notes = [f"{c}: {NAMES.get(metric, metric)} undefined: {why}" for c, of in scored.items() if (why := of.get("reasons", {}).get(metric))]
    drawn.caption, drawn.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    return drawn


def _phase(now: dict[str, Any]) -> str:
    if not now or now["phase"] == "idle":
        return ""
    took = f" {duration(now['seconds'])}" if now["seconds"] is not None else ""
    usual = f", usually {duration(now['median'])}" if now["slow"] else ""
    return f"{now['what']} {now['phase']}{took}{usual}".strip()


def _epsilon(one: Health, spent: float | None) -> str:
    limit = one.facts.get("policy", {}).get("epsilon")
    return "–" if spent is None else f"{spent:.2f}" + (f" of {limit:g}" if limit else "")


def _events(events: list[Row]) -> Table:
    drawn = Table(box=None, show_header=False)
    for event in events:
        drawn.add_row(_ago(event["time"]), Text(event["kind"]), Text(event["centre"] or ""), Text(event["detail"]))
    return drawn


def _ago(when: datetime) -> str:
    return f"{duration(max(0.0, (datetime.now(UTC) - when).total_seconds()))} ago"
