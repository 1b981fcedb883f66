"""What the tables say: the federation at a glance, privacy, two runs compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from common.config.compose import parse_config
from common.learning.losses import class_names
from common.utils.errors import ConsiliumError
from server.dashboard.render import format_duration_or_dash
from server.ledger import tables, views
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring import health, run_history, run_status
from server.monitoring.centre_reports import CentreReport
from server.monitoring.health import CentreState
from server.monitoring.run_history import ScoreHistory
from server.monitoring.run_status import CurrentStatus
from server.reporting.labels import VIEW_LABELS, format_number_or_dash, label_metric
from server.reporting.scores import view_value
from server.run.operator_commands import ACTIVE_STATUSES

TREND_ROUNDS = 5  # rounds back
DROP_THRESHOLD = 0.05  # of the worst centre's metric in that many
EXPIRY_WARNING_DAYS = 30  # days before a certificate does
EPSILON_WARNING_FRACTION = 0.8  # of a limit
MESSAGE_KINDS = {
    "handshake": "presence: name, sources, versions, scan counts",
    "train": "weight changes, counts, losses",
    "secure sum": "the same masked, of which only the sum over centres is seen",
    "scores": "score histograms and other sums, for metrics",
    "counts": "scans per class",
    "moments": "class moments of features",
    "clusters": "sums of a clustering step",
    "quality": "histograms of lung area, kept positions and intensity",
}
STATE_ORDER = (CentreState.OFFLINE, CentreState.DEGRADED, CentreState.ONLINE)
NodeLister = Callable[[], list[health.SuperLinkNode]] | None


def no_run_view(ledger: Ledger, list_nodes: NodeLister) -> dict[str, Any]:
    """The first screen before the first run."""
    linked, why = try_list_nodes(list_nodes)
    return {
        "people": health.centre_health(ledger, "", linked),
        "attention": [("warning", why)] if why else [],
    }


def try_list_nodes(list_nodes: NodeLister) -> tuple[list[health.SuperLinkNode] | None, str]:
    """The SuperLink's nodes, and why they are not known."""
    if list_nodes is None:
        return None, ""
    try:
        return list_nodes(), ""
    except ConsiliumError as error:
        return None, str(error)


def federation_view(
    ledger: Ledger,
    row: Row,
    history: ScoreHistory,
    list_nodes: NodeLister,
    certificate_expiries: Mapping[str, datetime],
) -> dict[str, Any]:
    """All that the first screen shows of the present run."""
    linked, why = try_list_nodes(list_nodes)
    at = run_status.current_status(ledger, row)
    people = health.centre_health(ledger, row["id"], linked)
    pace = run_status.estimate_progress(ledger, row, at)
    classes, counted = count_scans_by_class(row, people)
    return {
        "at": at,
        "pace": pace,
        "people": sorted(people, key=lambda h: STATE_ORDER.index(h.state)),
        "online": sum(h.state is CentreState.ONLINE for h in people),
        "classes": classes,
        "counted": counted,
        "headline": summarise_trend(history),
        "attention": collect_warnings(ledger, row, at, people, history, [("warning", why)] if why else [])
        + warn_expiring_certificates(certificate_expiries),
        "certificates": certificate_expiries,
        "others": [r for r in ledger.read_runs() if r["status"] in ACTIVE_STATUSES and r["id"] != row["id"]],
    }


def count_scans_by_class(
    row: Row, centres: Sequence[health.CentreHealth]
) -> tuple[list[str], dict[str, list[float]]]:
    """Scans by class of the task that the run is judged by, all splits together: the classes, {centre: counts}."""
    config = parse_config(row["config"])
    task = config.evaluation.task
    classes = [*map(str, class_names(task, config.tasks[task])), "unlabelled"]
    found: dict[str, list[float]] = {}
    for one in centres:
        held = list(one.report.task_counts(task).values()) if one.report else []
        if held and len(held[0]) == len(classes):
            found[one.centre] = [sum(column) for column in zip(*held, strict=True)]
    return classes, found


def summarise_trend(history: ScoreHistory) -> dict[str, Any]:
    """Mean and worst centre now, and against some rounds before."""
    points = [p for p in history.points if p.macro is not None]
    if not points:
        return {}
    now = points[-1]
    same = [p for p in points if p.stage == now.stage and p.round <= now.round - TREND_ROUNDS] or points[:1]
    before = same[-1]
    change: dict[str, float | None] = {}
    for view in ("macro", "worst", "spread"):
        present, past = getattr(now, view), getattr(before, view)
        is_comparable = present is not None and past is not None and before is not now
        change[view] = present - past if is_comparable else None
    return {
        "now": now,
        "change": change,
        "rounds": now.round - before.round if now.stage == before.stage else None,
    }


def collect_warnings(
    ledger: Ledger,
    row: Row,
    status: CurrentStatus,
    centres: Sequence[health.CentreHealth],
    history: ScoreHistory,
    warnings: list[tuple[str, str]],
) -> list[tuple[str, str]]:
    """(level, sentence) of what is not well, the worst first."""
    if row["status"] not in (*ACTIVE_STATUSES, "finished"):
        last = [e for e in run_history.load_last_events(ledger, row["id"], 5) if e["kind"] == row["status"]]
        level = "fault" if row["status"] == "failed" else "warning"
        warnings.append(
            (
                level,
                f"The run is {row['status']}{': ' + last[-1]['detail'] if last and last[-1]['detail'] else ''}.",
            )
        )
    excluded = status.excluded
    away = [h for h in centres if h.state is not CentreState.ONLINE and h.centre not in excluded]
    warnings += [
        ("fault" if h.state is CentreState.OFFLINE else "warning", f"{h.centre} is {h.state}: {h.reason}") for h in away
    ]
    warnings += [("warning", f"{centre} is excluded by {said}") for centre, said in excluded.items()]
    for name, centre in status.centres.items():
        if centre.is_slow and centre.seconds and centre.median_seconds:
            times = centre.seconds / centre.median_seconds
            warnings.append(
                (
                    "warning",
                    f"{name} has been {centre.activity} for {format_duration_or_dash(centre.seconds)}, "
                    f"{times:.1f} times its own median",
                )
            )
    if (
        status.waiting_for
        and (over := (datetime.now(UTC) - status.since).total_seconds() - status.round_timeout) > 0
    ):
        warnings.append(
            (
                "fault",
                f"The round is {format_duration_or_dash(over)} over its timeout of {format_duration_or_dash(status.round_timeout)}.",
            )
        )
    warnings += warn_epsilon_limits(ledger, row, centres)
    change = summarise_trend(history).get("change", {}).get("worst")
    if status.is_active and change is not None and change < -DROP_THRESHOLD:
        metric = label_metric(history.metric)
        warnings.append(
            (
                "warning",
                f"The worst centre's {metric} fell by {format_number_or_dash(-change)} in the last rounds.",
            )
        )
    return sorted(warnings, key=lambda one: one[0] != "fault")


def warn_expiring_certificates(certificate_expiries: Mapping[str, datetime]) -> list[tuple[str, str]]:
    """Certificates that need renewing."""
    days = {name: (when - datetime.now(UTC)).days for name, when in certificate_expiries.items()}
    return [
        ("warning", f"The {name}'s certificate expires in {n} days.")
        for name, n in days.items()
        if n < EXPIRY_WARNING_DAYS
    ]


# ---- privacy


def warn_epsilon_limits(
    ledger: Ledger, row: Row, centres: Sequence[health.CentreHealth]
) -> list[tuple[str, str]]:
    """Centres whose patients' privacy budget is nearly spent."""
    if row["config"].get("privacy", {}).get("dp_level", "none") == "none":
        return []
    limits = {centre.centre: centre.report.epsilon_limit for centre in centres if centre.report}
    warnings = []
    for accepted in views.last_accepted(ledger, row["id"]):
        name, epsilon = accepted["centre"], accepted["epsilon"]
        limit = limits.get(name)
        if epsilon is not None and limit and epsilon >= EPSILON_WARNING_FRACTION * limit:
            sentence = f"{name} has spent epsilon {epsilon:.2f} of the {limit:g} that its policy allows"
            warnings.append(("warning", sentence))
    return warnings


def privacy_view(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Epsilon by centre against the policy's limit and the run's own; what left, by centre and kind."""
    p = tables.progress.c
    left = ledger.read(
        sa.select(
            p.centre, p.activity, sa.func.count().label("messages"), sa.func.sum(p.bytes_up).label("bytes")
        )
        .where(p.run_id == row["id"], p.centre.is_not(None))
        .group_by(p.centre, p.activity)
    )
    kinds = [kind for kind in MESSAGE_KINDS if any(r["activity"] == kind for r in left)]
    people = {h.centre: h.report or CentreReport() for h in health.centre_health(ledger, row["id"])}
    return {
        "settings": row["config"].get("privacy", {}),
        "kinds": {kind: MESSAGE_KINDS[kind] for kind in kinds},
        "left": {
            c: {r["activity"]: r for r in left if r["centre"] == c}
            for c in dict.fromkeys([*people, *(r["centre"] for r in left)])
        },
        "epsilon": {r["centre"]: r for r in views.last_accepted(ledger, row["id"])},
        "policies": {c: report.policy for c, report in people.items()},
    }


# ---- comparison


def comparison_view(
    ledger: Ledger, rows: Sequence[Row], histories: Mapping[str, ScoreHistory]
) -> dict[str, Any]:
    """{"differences": {key: [value of each run]}, "outcomes": {what: [text of each run]}}."""
    flat = [flatten_config(row["config"]) for row in rows]
    keys = dict.fromkeys(key for of in flat for key in of)
    differences = {
        key: [of.get(key, "–") for of in flat] for key in keys if len({of.get(key, "–") for of in flat}) > 1
    }
    outcomes: dict[str, list[str]] = {"status": [row["status"] for row in rows]}
    tested = [run_history.load_test_scores(ledger, row["id"]) for row in rows]
    spent = [views.centre_totals(ledger, row["id"]) for row in rows]
    first = histories[rows[0]["id"]]
    task, metric = first.task, first.metric
    name = label_metric(metric)
    for view, label in VIEW_LABELS.items():
        cells = []
        for test in tested:
            value, centre = view_value(test[task], view, metric) if task in test else (None, "")
            cells.append(format_number_or_dash(value) + (f" ({centre})" if centre else ""))
        outcomes[f"test {name} of {task}, {label}"] = cells
    best = [
        max((p.macro for p in histories[row["id"]].points if p.macro is not None), default=None)
        for row in rows
    ]
    outcomes["best validation mean of centres"] = [format_number_or_dash(value) for value in best]
    outcomes["rounds"] = [str(len([p for p in histories[row["id"]].points if p.round])) for row in rows]
    lasted = [sum(r["seconds"] for r in ledger.read_rounds(row["id"])) for row in rows]
    outcomes["time in rounds"] = [format_duration_or_dash(value) for value in lasted]
    for key, label in (("bytes_down", "to the centres, MB"), ("bytes_up", "from the centres, MB")):
        outcomes[label] = [format_number_or_dash(sum(r[key] or 0 for r in of) / 1e6, 1) for of in spent]
    return {"differences": differences, "outcomes": outcomes}


def flatten_config(value: Any, prefix: str = "") -> dict[str, str]:
    """{"a.b.c": text} of nested settings."""
    if isinstance(value, Mapping) and value:
        return {
            key: text
            for k, v in value.items()
            for key, text in flatten_config(v, f"{prefix}.{k}" if prefix else str(k)).items()
        }
    return {prefix: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
