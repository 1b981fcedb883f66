"""A run's report: one HTML file that needs nothing else, and the table a terminal shows when a run ends.

Both are made from the dict that is also saved as ``metrics.json``, so that a report can be made again. Every part may be missing (a run
that paused has no test), and a metric that is undefined is shown as such, never as a number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.table import Table
from rich.text import Text

from common.learning.metrics import primary_metric
from common.utils.atomic_files import atomic_write
from server.reporting.figures import (
    METRIC_COLUMNS,
    METRIC_NAMES,
    NUM_COLOURS,
    Figure,
    Rounds,
    RunResult,
    build_cost_figures,
    build_cross_site_figures,
    build_image_statistics_figures,
    build_round_figures,
    build_score_figures,
    build_weight_figures,
    pick_dash_style,
)
from server.reporting.report_tables import (
    VIEW_LABELS,
    build_centre_table,
    build_cost_table,
    build_drift_table,
    build_exclusion_table,
    build_label_count_tables,
    build_privacy_table,
    build_score_table,
    build_stage_table,
    build_weight_table,
    format_number,
    list_metrics,
)
from server.reporting.report_template import REPORT_TEMPLATE

MAX_FIGURE_POINTS, MIN_CURVE_POINTS = 10_000, 100


def write_report(path: Path, result: RunResult) -> None:
    """Writes the page to `path`, whole or not at all. `result`: see `tests/server/reporting/made_up_results.py` for one with every part."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(REPORT_TEMPLATE).render(
        **_template_context(result), plotly=Markup(get_plotlyjs())
    )
    atomic_write(path, text.encode())


def build_result_table(result: RunResult) -> Table:
    """The chosen task's test metrics by centre, for a terminal; of the run's last validation where there was no test."""
    task, metric = primary_task_metric(result)
    split, scores = "test", result.get("test", {}).get(task)
    if not scores:
        split, scores = (
            "validation",
            next(
                (r["val"][task] for _, _, r in reversed(list_rounds(result)) if task in r.get("val", {})), {}
            ),
        )
    columns = (
        [
            name
            for name in list_metrics(scores)
            if name == metric or (name in METRIC_COLUMNS and METRIC_COLUMNS[name].short_name)
        ]
        if scores
        else []
    )
    grid = build_score_table(task, scores, columns)
    drawn = Table(
        title=f"{task}, {split}: run {result.get('run', '')}",
        caption="\n".join(grid.notes) or None,
        caption_justify="left",
    )
    drawn.title = Text(str(drawn.title))  # names are text, not markup
    drawn.add_column("centre", overflow="fold")
    for name in columns:
        drawn.add_column(
            Text(
                METRIC_COLUMNS[name].short_name or METRIC_COLUMNS[name].name
                if name in METRIC_COLUMNS
                else name
            ),
            justify="right",
            overflow="fold",
        )
    for i, row in enumerate(grid.rows):
        ends = i + 1 < len(grid.rows) and grid.rows[i + 1].css_class == "view first"
        # what is undefined is a dash here: a cell is too narrow for the reason, which stands below the table
        shown = [
            Text("–", "dim") if c.css_class == "none" else Text("\n".join(filter(None, (c.text, c.subtext))))
            for c in row.cells
        ]
        drawn.add_row(*shown, end_section=ends)
    if drawn.caption:
        drawn.caption = Text(str(drawn.caption))
    return drawn


def build_comparison_table(results: Mapping[str, RunResult]) -> Table:
    """Several runs' chosen test metric by centre, one column a run (`make compare`), with the steps and seconds that each took."""
    task, metric = primary_task_metric(next(iter(results.values())))
    scores = [result.get("test", {}).get(task, {}) for result in results.values()]
    drawn = Table(title=Text(f"{task}, test {METRIC_NAMES.get(metric, metric)}"))
    drawn.add_column("centre")
    for name in results:
        drawn.add_column(Text(name), justify="right")
    centres = list(dict.fromkeys(centre for of in scores for centre in of.get("centres", {})))
    for centre in centres:
        drawn.add_row(
            Text(centre),
            *(format_number(of.get("centres", {}).get(centre, {}).get(metric)) or "–" for of in scores),
        )
    drawn.add_section()
    for view, label in VIEW_LABELS.items():
        values = [of.get(view, {}).get(metric) for of in scores]
        shown = [
            (v.get("value"), v.get("centre") or "") if isinstance(v, Mapping) else (v, "") for v in values
        ]
        drawn.add_row(
            label, *(Text("\n".join(filter(None, (format_number(v) or "–", who)))) for v, who in shown)
        )
    drawn.add_section()
    replies = [
        [reply for _, _, r in list_rounds(result) for reply in r["centres"].values()]
        for result in results.values()
    ]
    drawn.add_row(
        "optimiser steps, all centres",
        *(format_number(sum(reply.get("steps") or 0 for reply in of), 0) for of in replies),
    )
    drawn.add_row("time, s", *(format_number(result.get("seconds"), 0) or "–" for result in results.values()))
    return drawn


def _template_context(result: RunResult) -> dict[str, Any]:
    """All that the page shows."""
    rounds = list_rounds(result)
    names = list_centre_names(result, rounds)
    task, metric = primary_task_metric(result)
    test = result.get("test", {})
    tasks = sorted(test, key=lambda name: name != task)  # the chosen one first
    drawn_of, step = downsample_rounds(rounds, len(names))
    figures: dict[str, list[Figure]] = {
        "score_figures": [
            f for t in tasks if test[t].get("hist") for f in build_score_figures(t, test[t]["hist"], names)
        ],
        "round_figures": build_round_figures(drawn_of, names, task, metric),
        "weight_figures": build_weight_figures(drawn_of, names),
        "cost_figures": build_cost_figures(drawn_of, names),
        "matrix_figures": build_cross_site_figures(result.get("matrix", {}), names, task, metric),
        "quality_figures": build_image_statistics_figures(result.get("quality", {}), names),
    }
    drawn = [figure for some in figures.values() for figure in some]
    for i, figure in enumerate(drawn):
        figure["id"] = f"figure{i}"
    # "<" escaped: a name cannot end the script element
    data = json.dumps(
        {f["id"]: {"data": f["data"], "layout": f["layout"]} for f in drawn}, allow_nan=False
    ).replace("<", "\\u003c")
    recipe, mode, run = (str(result.get(key, "")) for key in ("recipe", "mode", "run"))
    centres, played = (
        len(result.get("centres", {})),
        sum(r["round"] > 0 for _, _, r in rounds),
    )  # round 0 is what a stage starts from
    facts = [
        f"run {run}",
        mode,
        f"{centres} centre{'s'[: centres != 1]}",
        f"{played} round{'s'[: played != 1]}",
    ]
    facts.append(f"seed {result.get('seed', '?')}")
    facts += [f"started {result['started']}"] if result.get("started") else []
    facts += [f"took {format_duration(result['seconds'])}"] if result.get("seconds") is not None else []
    styles = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "double"}
    return {
        "title": f"{recipe} · {run}",
        "heading": f"{recipe}, {mode}",
        "status": str(result.get("status", "unknown")),
        "facts": facts,
        "notes": [str(note) for note in result.get("notes", [])],
        "thinned": f"Of {len(rounds)} rounds the curves show every {step}th, the first and the last of each stage."
        if step > 1
        else "",
        **_headline_numbers(result, task, metric),
        "results": [build_score_table(name, test[name], list_metrics(test[name])) for name in tasks],
        "who": [
            {"name": name, "colour": i % NUM_COLOURS, "style": styles[pick_dash_style(i)]}
            for i, name in enumerate(names)
        ]
        if drawn
        else [],
        "stages": build_stage_table(result, *_selection_metric(result)),
        "weights": build_weight_table(rounds, names),
        "labels": build_label_count_tables(result),
        "about": build_centre_table(result),
        "drift": build_drift_table(result.get("quality", {})),
        "costs": build_cost_table(rounds),
        "privacy": build_privacy_table(rounds, result.get("config", {}).get("privacy", {})),
        "left_out": build_exclusion_table(result),
        "config": yaml.safe_dump(result.get("config", {}), sort_keys=False, allow_unicode=True, width=120),
        "figures": Markup(data),
        **figures,
    }


# ---- numbers and tables


def _headline_numbers(result: RunResult, task: str, metric: str) -> dict[str, Any]:
    scores = result.get("test", {}).get(task)
    if not scores:
        return {"headline": [], "headline_note": ""}
    worst = scores.get("worst", {}).get(metric) or {}
    macro, pooled, spread = (scores.get(view, {}).get(metric) for view in ("macro", "pooled", "spread"))
    said = [
        ("mean of centres", macro, ""),
        ("pooled", pooled, ""),
        ("worst centre", worst.get("value"), worst.get("centre") or ""),
    ]
    said.append(("spread", spread, "best less worst"))
    if scores.get("challenge_score") is not None:
        said.append(("challenge score", scores["challenge_score"], "mean over sources of (F1⁺ + F1⁻)/2"))
    last = next((stage for stage in reversed(result.get("stages", [])) if stage.get("best")), None)
    after = ""
    if last:  # where nothing is exchanged, each centre has its own best
        one = "round" in last["best"]
        which = f"round {last['best']['round']}" if one else "each centre's own best round"
        compared = _evaluation_config(result).get("choose") != "last" and (
            not one or last["best"].get("value") is not None
        )
        after = f", after {which} of {last['name']}" + (", the best on validation" if compared else "")
    return {
        "headline": [
            {"label": label, "value": format_number(value) or "undefined", "small": small}
            for label, value, small in said
        ],
        "headline_note": f"{METRIC_NAMES.get(metric, metric)} of {task} on the test scans{after}.",
    }


# ---- small things


def list_rounds(result: RunResult) -> Rounds:
    """(number over all stages from 1, stage, round)."""
    flat = [(stage["name"], r) for stage in result.get("stages", []) for r in stage.get("rounds", [])]
    return [(i, stage, r) for i, (stage, r) in enumerate(flat, 1)]


def downsample_rounds(rounds: Rounds, num_centres: int) -> tuple[Rounds, int]:
    """The rounds that curves show, and every how manieth: about POINTS of a figure, which a browser still draws at once, but no fewer than FEWEST a
    curve. The first and the last of a stage always."""
    step = max(1, len(rounds) // max(MIN_CURVE_POINTS, MAX_FIGURE_POINTS // max(1, num_centres)))
    ends = {k for i in range(1, len(rounds)) if rounds[i - 1][1] != rounds[i][1] for k in (i - 1, i)} | {
        0,
        len(rounds) - 1,
    }
    return [one for i, one in enumerate(rounds) if i % step == 0 or i in ends], step


def list_centre_names(result: RunResult, rounds: Rounds) -> list[str]:
    """Every centre that is named anywhere, in the order of the federation."""
    named = dict.fromkeys(result.get("centres", {}))
    for _, _, r in rounds:
        for of in (
            r.get("centres", {}),
            *r.get("weights", {}).values(),
            *(val.get("centres", {}) for val in r.get("val", {}).values()),
        ):
            named |= dict.fromkeys(of)
    for of in result.get("quality", {}).values():  # of pooled cohorts, each is named
        named |= dict.fromkeys(of["centres"])
    for scores in result.get("test", {}).values():
        named |= dict.fromkeys([*scores.get("centres", {}), *scores.get("hist", {})])
    return list(named)


def primary_task_metric(result: RunResult) -> tuple[str, str]:
    """The task and metric to show first: what the run was judged by, if its last scores have it, else what they have."""
    task, metric = _selection_metric(result)
    scores: RunResult = result.get("test") or next(
        (r["val"] for _, _, r in reversed(list_rounds(result)) if r.get("val")), {}
    )
    if scores and task not in scores:
        task = next(
            (name for name, views in scores.items() if views.get("macro", {}).keys() - {"loss"}),
            next(iter(scores)),
        )
    return task, primary_metric(metric, scores.get(task, {}).get("macro", {}))


def _selection_metric(result: RunResult) -> tuple[str, str]:
    """The task and metric that choose the best round."""
    return _evaluation_config(result).get("task", "covid"), _evaluation_config(result).get("metric", "auc")


def _evaluation_config(result: RunResult) -> RunResult:
    evaluation: RunResult = result.get("config", {}).get("evaluation", {})
    return evaluation


def format_duration(seconds: float) -> str:
    """For people: `1 h 2 min`, `2 min 3 s`, `3.4 s`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )
