"""What the pages show, read from the ledger: a run's state at this moment and its history, in as few and as small rows as will do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from common.config.compose import parse_config
from common.config.schema import Config
from common.learning.losses import class_names
from common.learning.metrics import primary_metric
from server.ledger import tables
from server.ledger.ledger import Ledger, Row
from server.reporting.figures import Rounds
from server.rounds.membership import fill_source_classes
from server.run.operator_commands import ACTIVE_STATUSES, excluded_centres, find_root_run_id

ACTIVITY_LABELS = {
    "meet": "joining",
    "train": "training",
    "secure sum": "adding up in secret",
    "scores": "scoring",
    "counts": "counting",
    "moments": "fitting heads",
    "clusters": "clustering",
    "quality": "describing its scans",
}
MEDIAN_WINDOW = 10  # rounds
SLOW_FACTOR = 2.0  # times its own median: a straggler
STALE_GRACE = 120.0  # seconds beyond a round's deadline without a sign of life, after which a run's coordinator is taken for gone


def load_run(ledger: Ledger, run_id: str) -> Row | None:
    """A run with its status."""
    return next((row for row in ledger.read_runs() if row["id"] == run_id), None)


def select_latest_run(ledger: Ledger) -> Row | None:
    """The run to show first: the youngest that is going on, else the youngest."""
    runs = ledger.read_runs()
    return next(
        (row for row in reversed(runs) if row["status"] in ACTIVE_STATUSES), runs[-1] if runs else None
    )


def list_expected_centres(row: Mapping[str, Any]) -> list[str]:
    """Those that a run expects."""
    return ["pooled"] if row["mode"] == "central" else list(row["config"]["federation"]["centres"])


def list_cohorts(row: Mapping[str, Any]) -> list[str]:
    """Those whose scans are scored and described: each by name, also where one site holds all of them (`pooled`)."""
    return list(row["config"]["federation"]["centres"])


def planned_rounds_by_stage(row: Mapping[str, Any]) -> dict[str, int]:
    """{stage: its rounds}, in their order."""
    return {name: stage["rounds"] for name, stage in row["config"]["stages"].items() if stage["rounds"]}


def load_config_with_sources(
    row: Mapping[str, Any], metadata_by_centre: Mapping[str, Mapping[str, Any]]
) -> Config:
    """A run's configuration with the sources, which the ledger's does not know yet, as the classes of a task that names none. `said`: facts by
    centre."""
    sources = sorted(
        {s for of in metadata_by_centre.values() for s in of.get("sources", [])}
        | (set(list_expected_centres(row)) - metadata_by_centre.keys())
    )
    return fill_source_classes(parse_config(row["config"]), sources)


def select_known_counts(metadata: Mapping[str, Any], config: Config) -> dict[str, list[float]]:
    """A centre's counts, of the tasks whose classes are known (those of a clustering are not)."""
    held = {}
    for key, n in metadata.get("counts", {}).items():
        task = key.split("/")[2]
        if task in config.tasks and len(n) == len(class_names(task, config.tasks[task])) + 1:
            held[key] = n
    return held


# ---- this moment


def current_status(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Where a run is: stage, round, who has been asked for what and how it went, how long it takes, how long it will take.

    Times are seconds; `centres` holds a dict for each: phase (waiting | done | refused | excluded | idle), what, seconds, median, slow, reason.
    """
    run, names = row["id"], list_expected_centres(row)
    of, now = tables.progress.c, datetime.now(UTC)
    asks = ledger.read(
        sa.select(tables.progress).where(of.run == run, of.centre.is_(None)).order_by(of.id.desc()).limit(1)
    )
    going = row["status"] in ACTIVE_STATUSES
    excluded = excluded_centres(ledger.read_audit(find_root_run_id(row)))
    found: dict[str, Any] = {
        "going": going,
        "stage": "",
        "round": 0,
        "doing": "",
        "since": row["since"],
        "last": row["since"],  # sign of life
        "gone": not going,  # no coordinator, or none that gives one
        "waiting": [],
        "good": 0,
        "asked": 0,
        "quorum": None,
        "deadline": row["config"]["federation"]["deadline"],
        "excluded": excluded,
        "centres": {},
    }
    blank = {"what": "", "seconds": None, "median": None, "slow": False}
    for name in names:
        found["centres"][name] = {
            **blank,
            "phase": "excluded" if name in excluded else "idle",
            "reason": excluded.get(name, ""),
        }
    if not asks:
        return found
    (ask,) = asks
    recent = ledger.read(
        sa.select(of.id, of.doing, of.centre, of.seconds, of.reason, of.time)
        .where(of.run == run, of.centre.is_not(None))
        .order_by(of.id.desc())
        .limit(3 * MEDIAN_WINDOW * len(names))
    )
    own: dict[str, list[float]] = {}
    for said in recent:
        if said["doing"] == ask["doing"] and not said["reason"] and said["id"] < ask["id"]:
            own.setdefault(said["centre"], []).append(said["seconds"])
    answered = {said["centre"]: said for said in reversed(recent) if said["id"] > ask["id"]}
    elapsed = (now - ask["time"]).total_seconds()
    for name in ask["asked"]:
        at = found["centres"].setdefault(name, {**blank, "phase": "idle", "reason": ""})
        answer, median = (
            answered.get(name),
            statistics.median(own[name]) if len(own.get(name, [])) >= 3 else None,
        )
        if at["phase"] == "excluded" and not answer:
            continue
        at |= {"what": ACTIVITY_LABELS.get(ask["doing"], ask["doing"]), "median": median}
        if answer:
            at |= {
                "phase": "refused" if answer["reason"] else "done",
                "seconds": answer["seconds"],
                "reason": answer["reason"] or "",
            }
        elif going:
            at |= {
                "phase": "waiting",
                "seconds": elapsed,
                "slow": median is not None and elapsed > max(SLOW_FACTOR * median, median + 5),
            }
    waiting = [name for name, at in found["centres"].items() if at["phase"] == "waiting"]
    last = max([ask["time"], *(said["time"] for said in answered.values())])
    return found | {
        "stage": ask["stage"],
        "round": ask["round"],
        "doing": ACTIVITY_LABELS.get(ask["doing"], ask["doing"])
        if waiting or not going
        else "adding up at the coordinator",
        "since": ask["time"] if waiting or not going else last,
        "last": last,
        "gone": not going
        or (now - last).total_seconds() > row["config"]["federation"]["deadline"] + STALE_GRACE,
        "waiting": waiting,
        "good": sum(at["phase"] == "done" for at in found["centres"].values()),
        "asked": len(ask["asked"]),
        "quorum": max(1, math.ceil(row["config"]["federation"]["quorum"] * len(ask["asked"]))),
    }


def estimate_progress(ledger: Ledger, row: Row, status: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds done and to be done, the median round's seconds, and the seconds left by it (None where nothing can be said)."""
    of, stages = tables.rounds.c, planned_rounds_by_stage(row)
    played = ledger.read(
        sa.select(
            of.stage,
            sa.func.max(of.round).label("round"),
            sa.func.count(sa.distinct(of.round)).label("count"),
        )
        .where(of.run == row["id"], of.round > 0)
        .group_by(of.stage)
    )
    lasted = ledger.read(
        sa.select(of.stage, of.seconds)
        .where(of.run == row["id"], of.round > 0)
        .order_by(of.id.desc())
        .limit(2 * MEDIAN_WINDOW)
    )
    here = [r["seconds"] for r in lasted if r["stage"] == status["stage"]] or [r["seconds"] for r in lasted]
    median = statistics.median(here) if here else None
    done = sum(r["count"] for r in played)
    before = list(stages).index(status["stage"]) if status["stage"] in stages else 0
    last = {r["stage"]: r["round"] for r in played}
    left = sum(rounds - last.get(name, 0) for k, (name, rounds) in enumerate(stages.items()) if k >= before)
    return {
        "done": done,
        "all": done + left,
        "median": median,
        "left": median * left if median is not None and status["going"] else None,
    }


# ---- history


def primary_task_metric(row: Row, views_by_task: Mapping[str, Any]) -> tuple[str, str]:
    """(task, metric) to show first: what the run is judged by, else what its scores have. `known`: {task: views}."""
    evaluation = row["config"]["evaluation"]
    task = (
        evaluation["task"]
        if evaluation["task"] in views_by_task
        else next(iter(views_by_task), evaluation["task"])
    )
    return task, primary_metric(evaluation["metric"], views_by_task.get(task, {}).get("macro", {}))


def score_history(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Validation over all rounds by the run's own measure: {"task", "metric", "points": [{stage, round, macro, pooled, worst, centre, spread}]}.

    Values are None where they are undefined.
    """
    rows = [r for r in ledger.read_scores(row["id"], include_centres=False) if r["split"] == "val"]
    last = {r["task"]: r["views"] for r in rows}
    task, metric = primary_task_metric(row, last)
    points = []
    for r in rows:
        if r["task"] == task:
            views = r["views"]
            worst = views.get("worst", {}).get(metric) or {}
            flat = {view: views.get(view, {}).get(metric) for view in ("macro", "pooled", "spread")}
            points.append(
                {
                    "stage": r["stage"],
                    "round": r["round"],
                    **flat,
                    "worst": worst.get("value"),
                    "centre": worst.get("centre"),
                }
            )
    return {"task": task, "metric": metric, "points": points}


def load_rounds(ledger: Ledger, row: Row, max_rounds: int) -> tuple[Rounds, int]:
    """(server.figures.Rounds, every how manieth): the first and last round of each stage and so many between that about `most` are read whole."""
    run, every = row["id"], ledger.read_rounds(row["id"])
    step = max(1, math.ceil(len(every) / max_rounds))
    ends = {
        k for i in range(1, len(every)) if every[i - 1]["stage"] != every[i]["stage"] for k in (i - 1, i)
    } | {0, len(every) - 1}
    chosen = {(r["stage"], r["round"]): (i, r) for i, r in enumerate(every) if i % step == 0 or i in ends}
    made: dict[tuple[str, int], dict[str, Any]] = {}
    for at, (_, r) in chosen.items():
        made[at] = {
            "round": r["round"],
            "seconds": r["seconds"],
            "because": r["closed_because"],
            "val": {},
            "weights": {},
            "effective": {},
        }
        made[at] |= {"centres": {}, "bytes_up": 0, "bytes_down": 0}

    def read_rows(table: sa.Table) -> list[tuple[dict[str, Any], Row]]:
        """Of the chosen rounds' last attempts."""
        wanted = [(stage, number) for stage, number in chosen]
        query = sa.select(table).where(table.c.run == run).order_by(table.c.id)
        if step > 1:
            query = query.where(
                sa.or_(*(_match_stage_rounds(table, name, wanted) for name in {s for s, _ in wanted}))
            )
        found = [r for r in ledger.read(query) if (r["stage"], r["round"]) in chosen]
        attempts = {at: r["attempt"] for at, (_, r) in chosen.items()}
        own = table is tables.scores  # scores have attempts of their own
        return [
            (made[r["stage"], r["round"]], r)
            for r in found
            if own or r["attempt"] == attempts[r["stage"], r["round"]]
        ]

    for entry, r in read_rows(tables.contributions):
        entry["centres"][r["centre"]] = r
        entry["bytes_up"], entry["bytes_down"] = (
            entry["bytes_up"] + (r["bytes_up"] or 0),
            entry["bytes_down"] + (r["bytes_down"] or 0),
        )
    for entry, r in read_rows(tables.shares):
        entry["weights"][r["part"]], entry["effective"][r["part"]] = r["weights"], r["effective"]
    for entry, r in read_rows(tables.scores):
        if r["split"] == "val":
            entry["val"][r["task"]] = {**r["views"], "centres": r["centres"]}
    return [(i + 1, stage, made[stage, number]) for (stage, number), (i, _) in chosen.items()], step


def load_last_events(ledger: Ledger, run_id: str, max_events: int) -> list[Row]:
    """In the order of writing."""
    of = tables.events.c
    return ledger.read(
        sa.select(tables.events).where(of.run == run_id).order_by(of.id.desc()).limit(max_events)
    )[::-1]


def _match_stage_rounds(table: sa.Table, stage: str, rounds: list[tuple[str, int]]) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.stage == stage, table.c.round.in_([number for s, number in rounds if s == stage]))


def load_test_scores(ledger: Ledger, run_id: str) -> dict[str, Any]:
    """{task: scores} on the test split, as in metrics.json; empty before the run's end."""
    of = tables.scores.c
    rows = ledger.read(sa.select(tables.scores).where(of.run == run_id, of.split == "test").order_by(of.id))
    return {r["task"]: {**r["views"], "centres": r["centres"]} for r in rows}
