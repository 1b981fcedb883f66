"""What the figures show, and the tables beside them: drawn as the report's (server/figures.py), from the ledger's rows. Of many centres the worst are
drawn and the others are a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.compose import config_from
from common.metrics import leading
from common.tasks import cells_of
from server.dashboard import facts
from server.figures import NAMES, Figure, Rounds, cost_figures, finite, over_rounds, quality_figures, round_figures, weight_figures
from server.grids import Cell, Grid, Head, Line, columns_of, label_grids, score_grid, text_of, weights_grid
from server.ledger import Ledger, Row
from server.scores import by_class

LINES = 12  # centres in a figure; of more, the WORST and a band
WORST = 5
POINTS, MARKS = 300, 60  # of a curve; with marks


def course_figures(course: Mapping[str, Any]) -> list[Figure]:
    """Mean over centres and worst centre, over all rounds."""
    points = thin(course["points"])
    rounds: Rounds = [(i, p["stage"], p) for i, p in points]
    if not any(p["macro"] is not None for _, p in points):
        return []
    label = NAMES.get(course["metric"], course["metric"])
    lines = {"mean of centres": [p["macro"] for _, p in points], "worst centre": [p["worst"] for _, p in points]}
    return [legended(over_rounds(f"{course['task']}: {label} on validation", label, rounds, [], {}, lines))]


def compared_figures(courses: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Mean and worst centre of each run, one colour a run."""
    figures = []
    for view, label in (("macro", "mean of centres"), ("worst", "worst centre")):
        names = list(courses)
        longest = max(courses.values(), key=lambda c: len(c["points"]))
        rounds: Rounds = [(i, p["stage"], p) for i, p in thin(longest["points"])]
        lines = {}
        for name, course in courses.items():
            known = {(p["stage"], p["round"]): p[view] for p in course["points"]}
            lines[name] = [known.get((stage, p["round"])) for _, stage, p in rounds]
        metric = NAMES.get(longest["metric"], longest["metric"])
        figures.append(legended(over_rounds(f"{longest['task']}: {metric} on validation, {label}", metric, rounds, names, lines)))
    return [figure for figure in figures if figure["data"]]


def thin(points: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, point): every so manieth, the first and the last."""
    step = max(1, math.ceil(len(points) / POINTS))
    return [(i + 1, p) for i, p in enumerate(points) if i % step == 0 or i == len(points) - 1]


def legended(figure: Figure) -> Figure:
    """With its legend above the plot, in a margin of its own; marks only where they stand apart."""
    data = [{**t, "mode": "lines"} if len(t["x"]) > MARKS else t for t in figure["data"]]
    layout = figure["layout"] | {"showlegend": True, "legend": {"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0}}
    return {**figure, "data": data, "layout": layout | {"margin": {"t": 52}}}


def learning(ledger: Ledger, row: Row, rounds: Rounds) -> dict[str, Any]:
    """Figures, the last validation's table, the test's, the weights with what they follow from, and the matrix."""
    sites = facts.centres_of(row)
    names = list(dict.fromkeys([*facts.cohorts_of(row), *sites]))
    last: Mapping[str, Any] = next((r["val"] for _, _, r in reversed(rounds) if r["val"]), {})
    task, metric = facts.judged_by(row, last)
    tested = facts.tested(ledger, row["id"])
    shown = worst_of(last.get(task, {}), metric, names) if len(names) > LINES else names
    figures = round_figures(rounds, shown, task, metric)
    if len(names) > LINES:
        figures = [{**f, "data": [*band(rounds, f, names), *f["data"]]} for f in figures]
    figures += weight_figures(rounds, shown) + cost_figures(rounds, shown)
    return {
        "figures": figures,
        "shown": shown if len(names) > LINES else [],
        "who": shown,
        "count": len(rounds),
        "scores": [table_of(t, last[t], "validation", metric) for t in sorted(last, key=lambda t: t != task)],
        "tests": [table_of(t, tested[t], "test", metric) for t in sorted(tested, key=lambda t: t != task)],
        "weights": weights_grid(rounds, sites),
        "why": why_weights(ledger, row),
        "matrix": matrix(ledger.evidence(row["id"]).get("matrix") or {}, metric),
    }


def table_of(task: str, scores: Mapping[str, Any], split: str, metric: str) -> Grid:
    """Centre x metric, the worst centre first."""
    centres = scores.get("centres", {})
    order = sorted(
        centres, key=lambda c: (finite(centres[c].get(leading(metric, scores.get("macro", {})))) is None, _value(centres[c], metric))
    )
    grid = score_grid(task, {**scores, "centres": {c: centres[c] for c in order}}, columns_of(scores))
    return grid._replace(caption=f"{task}, {split} scans")


def _value(values: Mapping[str, Any], metric: str) -> float:
    found = finite(values.get(metric))
    return math.inf if found is None else found


def worst_of(scores: Mapping[str, Any], metric: str, names: Sequence[str]) -> list[str]:
    """The centres with the lowest values now, and in the order of the federation."""
    values = {c: _value(of, metric) for c, of in scores.get("centres", {}).items()}
    lowest = sorted(values, key=lambda c: values[c])[:WORST]
    return [c for c in names if c in lowest]


def band(rounds: Rounds, figure: Figure, names: Sequence[str]) -> list[dict[str, Any]]:
    """The middle half of all centres (first to third quartile) by round, behind the lines of a figure of scores."""
    task, _, rest = figure["title"].partition(": ")
    metric = next((m for m, name in NAMES.items() if rest.startswith(f"{name} on ")), "")
    low, high = [], []
    for _, _, r in rounds:
        values = [v for of in r["val"].get(task, {}).get("centres", {}).values() if (v := finite(of.get(metric))) is not None]
        q = np.quantile(values, [0.25, 0.75]).tolist() if values else [None, None]
        low.append(q[0])
        high.append(q[1])
    if not any(v is not None for v in low):
        return []
    x = [i for i, _, _ in rounds]
    line = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**line, "y": low}, {**line, "y": high, "fill": "tonexty", "fillcolor": "var(--line)"}]


def why_weights(ledger: Ledger, row: Row) -> dict[str, Any]:
    """What the centres' weights follow from: labelled training scans by class, tau, and each head's prior."""
    config = config_from(row["config"])
    task = config.evaluation.task
    classes = list(map(str, cells_of(task, config.tasks[task])))
    said = {r["centre"]: r["facts"] for r in ledger.centres(row["id"])}
    lines = []
    for centre, facts_ in said.items():
        held = [n for key, n in facts_.get("counts", {}).items() if key.split("/")[1:] == ["train", task]]
        sums = [sum(column) for column in zip(*held, strict=True)] if held else []
        lines.append(Line([Cell(centre), *(Cell(text_of(n, 0) or "–", "n") for n in sums[: len(classes)] or [None] * len(classes))]))
    grid = Grid([[Head("centre", False), *map(Head, classes)]], lines, f"labelled training scans for {task}")
    priors = [f"{name}: {t.prior}" + (f", tau {t.tau:g}" if t.prior != "none" else "") for name, t in config.tasks.items()]
    return {
        "grid": grid,
        "tau": config.aggregation.tau,
        "count": config.aggregation.count,
        "priors": priors,
        "method": config.aggregation.method,
    }


def matrix(found: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """One table a task: rows are where a model was trained, columns where it was scored; `shade` 0 to 6 by value."""
    tables = []
    for task, trained in found.get("tasks", {}).items():
        known = {name for of in trained.values() for values in of.values() for name in values}
        shown = leading(metric, known)
        columns = list(dict.fromkeys(c for of in trained.values() for c in of))
        values = {(a, b): finite(of.get(b, {}).get(shown)) for a, of in trained.items() for b in columns}
        there = [v for v in values.values() if v is not None]
        low, high = (min(there), max(there)) if there else (0.0, 1.0)
        rows = []
        for a, of in trained.items():
            cells = []
            for b in columns:
                v = values[a, b]
                shade = "" if v is None else round(6 * (v - low) / (high - low or 1))
                why = of.get(b, {}).get("reasons", {}).get(shown, "") if v is None else ""
                cells.append({"text": text_of(v) or (f"undefined: {why.split(' (')[0]}" if why else "–"), "shade": shade, "own": a == b})
            rows.append((a, cells))
        tables.append(
            {
                "task": task,
                "metric": NAMES.get(shown, shown),
                "columns": columns,
                "rows": rows,
                "round": found["round"],
                "stage": found["stage"],
            }
        )
    return tables


def quality(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Counts by class and split of every task; the histograms of the survey, and how far each centre lies from the others."""
    surveyed = ledger.evidence(row["id"]).get("quality") or {}
    said = {r["centre"]: r["facts"] for r in ledger.centres(row["id"])}
    names = facts.cohorts_of(row)
    figures = [legended(f) for f in quality_figures({name: fewer(of) for name, of in surveyed.items()}, names)]
    config = facts.config_of(row, said)
    labels = {"centres": {c: {"counts": by_class(facts.counts_of(of, config), config)} for c, of in said.items()}}
    drift = [(of["name"], of["drift"]) for of in surveyed.values() if of["drift"]]
    return {"figures": figures, "drift": drift, "names": names, "said": said, "labels": label_grids(labels), "surveyed": bool(surveyed)}


def fewer(measure: Mapping[str, Any]) -> dict[str, Any]:
    """Of many centres those that lie farthest from the others."""
    drift = measure["drift"]
    kept = sorted(drift, key=lambda c: -drift[c])[:WORST] if len(measure["centres"]) > LINES else measure["centres"]
    return {**measure, "centres": {c: shares for c, shares in measure["centres"].items() if c in kept}}
