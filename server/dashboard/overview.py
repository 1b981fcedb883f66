"""What the tables say: the federation at a glance, privacy, two runs compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from common.compose import config_from
from common.errors import ConsiliumError
from common.tasks import cells_of
from server import health, latest, tables
from server.dashboard import facts
from server.dashboard.render import number, seconds
from server.figures import NAMES
from server.ledger import Ledger, Row
from server.orders import RUNNING

TREND = 5  # rounds back
FALL = 0.05  # of the worst centre's metric in that many
EXPIRES = 30  # days before a certificate does
NEAR = 0.8  # of a limit
KINDS = {
    "meet": "presence: name, sources, versions, scan counts",
    "train": "weight changes, counts, losses",
    "secure sum": "the same masked, of which only the sum over centres is seen",
    "scores": "score histograms and other sums, for metrics",
    "counts": "scans per class",
    "moments": "class moments of features",
    "clusters": "sums of a clustering step",
    "quality": "histograms of lung area, kept positions and intensity",
}
Nodes = Callable[[], list[health.Node]] | None


def nobody(ledger: Ledger, nodes: Nodes) -> dict[str, Any]:
    """The first screen before the first run."""
    linked, why = connected(nodes)
    return {"people": health.federation(ledger, "", linked), "attention": [("warning", why)] if why else []}


def connected(nodes: Nodes) -> tuple[list[health.Node] | None, str]:
    """The SuperLink's nodes, and why they are not known."""
    if nodes is None:
        return None, ""
    try:
        return nodes(), ""
    except ConsiliumError as error:
        return None, str(error)


def of(ledger: Ledger, row: Row, course: Mapping[str, Any], nodes: Nodes, certificates: Mapping[str, datetime]) -> dict[str, Any]:
    """All that the first screen shows of the present run."""
    linked, why = connected(nodes)
    at = facts.moment(ledger, row)
    people = health.federation(ledger, row["id"], linked)
    pace = facts.pace(ledger, row, at)
    classes, counted = counts(row, people)
    return {
        "at": at,
        "pace": pace,
        "people": sorted(people, key=lambda h: ("offline", "degraded", "online").index(h.state)),
        "online": sum(h.state == "online" for h in people),
        "classes": classes,
        "counted": counted,
        "headline": headline(course),
        "attention": attention(ledger, row, at, people, course, [("warning", why)] if why else []) + expiring(certificates),
        "certificates": certificates,
        "others": [r for r in ledger.runs() if r["status"] in RUNNING and r["id"] != row["id"]],
    }


def counts(row: Row, people: Sequence[health.Health]) -> tuple[list[str], dict[str, list[float]]]:
    """Scans by class of the task that the run is judged by, all splits together: the classes, {centre: counts}."""
    config = config_from(row["config"])
    task = config.evaluation.task
    classes = [*map(str, cells_of(task, config.tasks[task])), "unlabelled"]
    found: dict[str, list[float]] = {}
    for one in people:
        held = [n for key, n in one.facts.get("counts", {}).items() if key.split("/")[2] == task]
        if held and len(held[0]) == len(classes):
            found[one.centre] = [sum(column) for column in zip(*held, strict=True)]
    return classes, found


def headline(course: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and worst centre now, and against some rounds before."""
    points = [p for p in course["points"] if p["macro"] is not None]
    if not points:
        return {}
    now = points[-1]
    same = [p for p in points if p["stage"] == now["stage"] and p["round"] <= now["round"] - TREND] or points[:1]
    before = same[-1]
    change = {k: None if now[k] is None or before[k] is None or before is now else now[k] - before[k] for k in ("macro", "worst", "spread")}
    return {"now": now, "change": change, "rounds": now["round"] - before["round"] if now["stage"] == before["stage"] else None}


def attention(
    ledger: Ledger,
    row: Row,
    at: Mapping[str, Any],
    people: Sequence[health.Health],
    course: Mapping[str, Any],
    found: list[tuple[str, str]],
) -> list[tuple[str, str]]:
    """(level, sentence) of what is not well, the worst first."""
    if row["status"] not in (*RUNNING, "finished"):
        last = [e for e in facts.last_events(ledger, row["id"], 5) if e["kind"] == row["status"]]
        level = "fault" if row["status"] == "failed" else "warning"
        found.append((level, f"The run is {row['status']}{': ' + last[-1]['detail'] if last and last[-1]['detail'] else ''}."))
    excluded = at["excluded"]
    away = [h for h in people if h.state != "online" and h.centre not in excluded]
    found += [("fault" if h.state == "offline" else "warning", f"{h.centre} is {h.state}: {h.reason}") for h in away]
    found += [("warning", f"{centre} is excluded by {said}") for centre, said in excluded.items()]
    for name, here in at["centres"].items():
        if here.get("slow"):
            times = here["seconds"] / here["median"]
            found.append(("warning", f"{name} has been {here['what']} for {seconds(here['seconds'])}, {times:.1f} times its own median"))
    if at.get("waiting") and (over := (datetime.now(UTC) - at["since"]).total_seconds() - at["deadline"]) > 0:
        found.append(("fault", f"The round is {seconds(over)} over its deadline of {seconds(at['deadline'])}."))
    found += epsilon_near(ledger, row, people)
    change = headline(course).get("change", {}).get("worst")
    if at["going"] and change is not None and change < -FALL:
        metric = NAMES.get(course["metric"], course["metric"])
        found.append(("warning", f"The worst centre's {metric} fell by {number(-change)} in the last rounds."))
    return sorted(found, key=lambda one: one[0] != "fault")


def expiring(certificates: Mapping[str, datetime]) -> list[tuple[str, str]]:
    """Certificates that need renewing."""
    days = {name: (when - datetime.now(UTC)).days for name, when in certificates.items()}
    return [("warning", f"The {name}'s certificate expires in {n} days.") for name, n in days.items() if n < EXPIRES]


# ---- privacy


def epsilon_near(ledger: Ledger, row: Row, people: Sequence[health.Health]) -> list[tuple[str, str]]:
    """Centres whose patients' privacy budget is nearly spent."""
    if row["config"].get("privacy", {}).get("kind", "none") == "none":
        return []
    spent = {r["centre"]: r["epsilon"] for r in latest.used(ledger, row["id"])}
    limits = {h.centre: h.facts.get("policy", {}).get("epsilon") for h in people}
    near = [(c, e, limits[c]) for c, e in spent.items() if e is not None and limits.get(c) and e >= NEAR * limits[c]]
    return [("warning", f"{c} has spent epsilon {e:.2f} of the {limit:g} that its policy allows") for c, e, limit in near]


def privacy(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Epsilon by centre against the policy's limit and the run's own; what left, by centre and kind."""
    p = tables.progress.c
    left = ledger.read(
        sa.select(p.centre, p.doing, sa.func.count().label("messages"), sa.func.sum(p.bytes_up).label("bytes"))
        .where(p.run == row["id"], p.centre.is_not(None))
        .group_by(p.centre, p.doing)
    )
    kinds = [kind for kind in KINDS if any(r["doing"] == kind for r in left)]
    people = {h.centre: h.facts for h in health.federation(ledger, row["id"])}
    return {
        "settings": row["config"].get("privacy", {}),
        "kinds": {kind: KINDS[kind] for kind in kinds},
        "left": {c: {r["doing"]: r for r in left if r["centre"] == c} for c in dict.fromkeys([*people, *(r["centre"] for r in left)])},
        "epsilon": {r["centre"]: r for r in latest.used(ledger, row["id"])},
        "policies": {c: f.get("policy") or {} for c, f in people.items()},
    }


# ---- comparison


def compared(ledger: Ledger, rows: Sequence[Row], courses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"differences": {key: [value of each run]}, "outcomes": {what: [text of each run]}}."""
    flat = [flattened(row["config"]) for row in rows]
    keys = dict.fromkeys(key for of in flat for key in of)
    differences = {key: [of.get(key, "–") for of in flat] for key in keys if len({of.get(key, "–") for of in flat}) > 1}
    outcomes: dict[str, list[str]] = {"status": [row["status"] for row in rows]}
    tested = [facts.tested(ledger, row["id"]) for row in rows]
    spent = [latest.totals(ledger, row["id"]) for row in rows]
    task, metric = courses[rows[0]["id"]]["task"], courses[rows[0]["id"]]["metric"]
    name = NAMES.get(metric, metric)
    for view, label in (("macro", "mean of centres"), ("pooled", "pooled"), ("worst", "worst centre"), ("spread", "spread")):
        cells = []
        for test in tested:
            value = test.get(task, {}).get(view, {}).get(metric)
            who = f" ({value['centre']})" if isinstance(value, Mapping) and value.get("centre") else ""
            cells.append(number(value["value"] if isinstance(value, Mapping) else value) + who)
        outcomes[f"test {name} of {task}, {label}"] = cells
    best = [max((p["macro"] for p in courses[row["id"]]["points"] if p["macro"] is not None), default=None) for row in rows]
    outcomes["best validation mean of centres"] = [number(value) for value in best]
    outcomes["rounds"] = [str(len([p for p in courses[row["id"]]["points"] if p["round"]])) for row in rows]
    lasted = [sum(r["seconds"] for r in ledger.rounds(row["id"])) for row in rows]
    outcomes["time in rounds"] = [seconds(value) for value in lasted]
    for key, label in (("bytes_down", "to the centres, MB"), ("bytes_up", "from the centres, MB")):
        outcomes[label] = [number(sum(r[key] or 0 for r in of) / 1e6, 1) for of in spent]
    return {"differences": differences, "outcomes": outcomes}


def flattened(value: Any, at: str = "") -> dict[str, str]:
    """{"a.b.c": text} of nested settings."""
    if isinstance(value, Mapping) and value:
        return {key: text for k, v in value.items() for key, text in flattened(v, f"{at}.{k}" if at else str(k)).items()}
    return {at: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
