"""What the figures show, and the tables beside them: drawn as the report's (server/reporting/figures.py), from the ledger's rows. Of many centres the worst are
drawn and the others are a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.config.compose import parse_config
from common.learning.losses import class_names
from common.learning.metrics import primary_metric
from server.analysis.score_tables import group_counts_by_class
from server.ledger.ledger import Ledger, Row
from server.monitoring import run_status
from server.reporting.figures import (
    METRIC_NAMES,
    Figure,
    Rounds,
    build_cost_figures,
    build_image_statistics_figures,
    build_round_figures,
    build_weight_figures,
    plot_over_rounds,
    to_finite_float,
)
from server.reporting.report_tables import (
    HeaderCell,
    ReportTable,
    TableCell,
    TableRow,
    build_label_count_tables,
    build_score_table,
    build_weight_table,
    format_number,
    list_metrics,
)

MAX_LINES = 12  # centres in a figure; of more, the WORST and a band
NUM_WORST = 5
MAX_CURVE_POINTS, MAX_MARKED_POINTS = 300, 60  # of a curve; with marks


def build_history_figures(history: Mapping[str, Any]) -> list[Figure]:
    """Mean over centres and worst centre, over all rounds."""
    points = downsample_points(history["points"])
    rounds: Rounds = [(i, p["stage"], p) for i, p in points]
    if not any(p["macro"] is not None for _, p in points):
        return []
    label = METRIC_NAMES.get(history["metric"], history["metric"])
    lines = {
        "mean of centres": [p["macro"] for _, p in points],
        "worst centre": [p["worst"] for _, p in points],
    }
    return [
        with_legend(
            plot_over_rounds(f"{history['task']}: {label} on validation", label, rounds, [], {}, lines)
        )
    ]


def build_comparison_figures(histories: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Mean and worst centre of each run, one colour a run."""
    figures = []
    for view, label in (("macro", "mean of centres"), ("worst", "worst centre")):
        names = list(histories)
        longest = max(histories.values(), key=lambda c: len(c["points"]))
        rounds: Rounds = [(i, p["stage"], p) for i, p in downsample_points(longest["points"])]
        lines = {}
        for name, course in histories.items():
            known = {(p["stage"], p["round"]): p[view] for p in course["points"]}
            lines[name] = [known.get((stage, p["round"])) for _, stage, p in rounds]
        metric = METRIC_NAMES.get(longest["metric"], longest["metric"])
        figures.append(
            with_legend(
                plot_over_rounds(
                    f"{longest['task']}: {metric} on validation, {label}", metric, rounds, names, lines
                )
            )
        )
    return [figure for figure in figures if figure["data"]]


def downsample_points(points: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, point): every so manieth, the first and the last."""
    step = max(1, math.ceil(len(points) / MAX_CURVE_POINTS))
    return [(i + 1, p) for i, p in enumerate(points) if i % step == 0 or i == len(points) - 1]


def with_legend(figure: Figure) -> Figure:
    """With its legend above the plot, in a margin of its own; marks only where they stand apart."""
    data = [{**t, "mode": "lines"} if len(t["x"]) > MAX_MARKED_POINTS else t for t in figure["data"]]
    layout = figure["layout"] | {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0},
    }
    return {**figure, "data": data, "layout": layout | {"margin": {"t": 52}}}


def learning_view(ledger: Ledger, row: Row, rounds: Rounds) -> dict[str, Any]:
    """Figures, the last validation's table, the test's, the weights with what they follow from, and the matrix."""
    sites = run_status.list_expected_centres(row)
    names = list(dict.fromkeys([*run_status.list_cohorts(row), *sites]))
    last: Mapping[str, Any] = next((r["val"] for _, _, r in reversed(rounds) if r["val"]), {})
    task, metric = run_status.primary_task_metric(row, last)
    tested = run_status.load_test_scores(ledger, row["id"])
    shown = select_worst_centres(last.get(task, {}), metric, names) if len(names) > MAX_LINES else names
    figures = build_round_figures(rounds, shown, task, metric)
    if len(names) > MAX_LINES:
        figures = [{**f, "data": [*quartile_band(rounds, f, names), *f["data"]]} for f in figures]
    figures += build_weight_figures(rounds, shown) + build_cost_figures(rounds, shown)
    return {
        "figures": figures,
        "shown": shown if len(names) > MAX_LINES else [],
        "who": shown,
        "count": len(rounds),
        "scores": [
            build_sorted_score_table(t, last[t], "validation", metric)
            for t in sorted(last, key=lambda t: t != task)
        ],
        "tests": [
            build_sorted_score_table(t, tested[t], "test", metric)
            for t in sorted(tested, key=lambda t: t != task)
        ],
        "weights": build_weight_table(rounds, sites),
        "why": explain_weights(ledger, row),
        "matrix": build_cross_site_tables(ledger.read_artifacts(row["id"]).get("matrix") or {}, metric),
    }


def build_sorted_score_table(task: str, scores: Mapping[str, Any], split: str, metric: str) -> ReportTable:
    """Centre x metric, the worst centre first."""
    centres = scores.get("centres", {})
    order = sorted(
        centres,
        key=lambda c: (
            to_finite_float(centres[c].get(primary_metric(metric, scores.get("macro", {})))) is None,
            _sortable_value(centres[c], metric),
        ),
    )
    grid = build_score_table(
        task, {**scores, "centres": {c: centres[c] for c in order}}, list_metrics(scores)
    )
    return grid._replace(caption=f"{task}, {split} scans")


def _sortable_value(values: Mapping[str, Any], metric: str) -> float:
    found = to_finite_float(values.get(metric))
    return math.inf if found is None else found


def select_worst_centres(scores: Mapping[str, Any], metric: str, centre_names: Sequence[str]) -> list[str]:
    """The centres with the lowest values now, and in the order of the federation."""
    values = {c: _sortable_value(of, metric) for c, of in scores.get("centres", {}).items()}
    lowest = sorted(values, key=lambda c: values[c])[:NUM_WORST]
    return [c for c in centre_names if c in lowest]


def quartile_band(rounds: Rounds, figure: Figure, centre_names: Sequence[str]) -> list[dict[str, Any]]:
    """The middle half of all centres (first to third quartile) by round, behind the lines of a figure of scores."""
    task, _, rest = figure["title"].partition(": ")
    metric = next((m for m, name in METRIC_NAMES.items() if rest.startswith(f"{name} on ")), "")
    low, high = [], []
    for _, _, r in rounds:
        values = [
            v
            for of in r["val"].get(task, {}).get("centres", {}).values()
            if (v := to_finite_float(of.get(metric))) is not None
        ]
        q = np.quantile(values, [0.25, 0.75]).tolist() if values else [None, None]
        low.append(q[0])
        high.append(q[1])
    if not any(v is not None for v in low):
        return []
    x = [i for i, _, _ in rounds]
    line = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**line, "y": low}, {**line, "y": high, "fill": "tonexty", "fillcolor": "var(--line)"}]


def explain_weights(ledger: Ledger, row: Row) -> dict[str, Any]:
    """What the centres' weights follow from: labelled training scans by class, tau, and each head's prior."""
    config = parse_config(row["config"])
    task = config.evaluation.task
    classes = list(map(str, class_names(task, config.tasks[task])))
    said = {r["centre"]: r["facts"] for r in ledger.read_centres(row["id"])}
    lines = []
    for centre, facts_ in said.items():
        held = [n for key, n in facts_.get("counts", {}).items() if key.split("/")[1:] == ["train", task]]
        sums = [sum(column) for column in zip(*held, strict=True)] if held else []
        lines.append(
            TableRow(
                [
                    TableCell(centre),
                    *(
                        TableCell(format_number(n, 0) or "–", "n")
                        for n in sums[: len(classes)] or [None] * len(classes)
                    ),
                ]
            )
        )
    grid = ReportTable(
        [[HeaderCell("centre", False), *map(HeaderCell, classes)]],
        lines,
        f"labelled training scans for {task}",
    )
    priors = [
        f"{name}: {t.prior}" + (f", tau {t.tau:g}" if t.prior != "none" else "")
        for name, t in config.tasks.items()
    ]
    return {
        "grid": grid,
        "tau": config.aggregation.tau,
        "count": config.aggregation.weight_by,
        "priors": priors,
        "method": config.aggregation.method,
    }


def build_cross_site_tables(cross_site: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """One table a task: rows are where a model was trained, columns where it was scored; `shade` 0 to 6 by value."""
    tables = []
    for task, trained in cross_site.get("tasks", {}).items():
        known = {name for of in trained.values() for values in of.values() for name in values}
        shown = primary_metric(metric, known)
        columns = list(dict.fromkeys(c for of in trained.values() for c in of))
        values = {
            (a, b): to_finite_float(of.get(b, {}).get(shown)) for a, of in trained.items() for b in columns
        }
        there = [v for v in values.values() if v is not None]
        low, high = (min(there), max(there)) if there else (0.0, 1.0)
        rows = []
        for a, of in trained.items():
            cells = []
            for b in columns:
                v = values[a, b]
                shade = "" if v is None else round(6 * (v - low) / (high - low or 1))
                why = of.get(b, {}).get("reasons", {}).get(shown, "") if v is None else ""
                cells.append(
                    {
                        "text": format_number(v) or (f"undefined: {why.split(' (')[0]}" if why else "–"),
                        "shade": shade,
                        "own": a == b,
                    }
                )
            rows.append((a, cells))
        tables.append(
            {
                "task": task,
                "metric": METRIC_NAMES.get(shown, shown),
                "columns": columns,
                "rows": rows,
                "round": cross_site["round"],
                "stage": cross_site["stage"],
            }
        )
    return tables


def data_view(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Counts by class and split of every task; the histograms of the survey, and how far each centre lies from the others."""
    surveyed = ledger.read_artifacts(row["id"]).get("quality") or {}
    said = {r["centre"]: r["facts"] for r in ledger.read_centres(row["id"])}
    names = run_status.list_cohorts(row)
    figures = [
        with_legend(f)
        for f in build_image_statistics_figures(
            {name: keep_most_drifted(of) for name, of in surveyed.items()}, names
        )
    ]
    config = run_status.load_config_with_sources(row, said)
    labels = {
        "centres": {
            c: {"counts": group_counts_by_class(run_status.select_known_counts(of, config), config)}
            for c, of in said.items()
        }
    }
    drift = [(of["name"], of["drift"]) for of in surveyed.values() if of["drift"]]
    return {
        "figures": figures,
        "drift": drift,
        "names": names,
        "said": said,
        "labels": build_label_count_tables(labels),
        "surveyed": bool(surveyed),
    }


def keep_most_drifted(measure: Mapping[str, Any]) -> dict[str, Any]:
    """Of many centres those that lie farthest from the others."""
    drift = measure["drift"]
    kept = (
        sorted(drift, key=lambda c: -drift[c])[:NUM_WORST]
        if len(measure["centres"]) > MAX_LINES
        else measure["centres"]
    )
    return {**measure, "centres": {c: shares for c, shares in measure["centres"].items() if c in kept}}
