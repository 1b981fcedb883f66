"""A run's report: one HTML file that needs nothing else, and the table a terminal shows when a run ends.

Both are made from the dict that is also saved as ``metrics.json``, so that a report can be made again. Every part may be missing (a run
that paused has no test), and a metric that is undefined is shown as such, never as a number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs
from rich.table import Table
from rich.text import Text

from server.figures import COLOURS, NAMES, Figure, Result, Rounds, cost_figures, dash, finite, round_figures, score_figures, weight_figures
from server.page import PAGE

VIEWS = {"macro": "mean of centres", "pooled": "pooled", "worst": "worst centre", "spread": "spread"}
SHORT = {
    "positive": "pos.",
    "ROC-AUC": "AUC",
    "sensitivity": "sens.",
    "specificity": "spec.",
    "balanced accuracy": "bal. acc.",
    "calibration error": "cal. err.",
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}


class Cell(NamedTuple):
    text: str
    kind: str = ""  # n: a number; none: undefined; text: long
    small: str = ""
    title: str = ""


class Head(NamedTuple):
    text: str
    number: bool = True
    span: int = 1


class Line(NamedTuple):
    cells: list[Cell]
    kind: str = ""


class Grid(NamedTuple):
    """A table; `head` is one row or, with column groups above, two."""

    head: list[list[Head]]
    rows: list[Line]
    caption: str = ""
    notes: list[str] = []  # noqa: RUF012  (a NamedTuple's default, never changed)


def write_report(path: Path, result: Result) -> None:
    """Writes the page to `path`, whole or not at all. `result`: see `tests/server/test_report.py` for one with every part."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(PAGE).render(**_context(result), plotly=Markup(get_plotlyjs()))
    part = Path(path).with_name(f"{Path(path).name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def table(result: Result) -> Table:
    """The chosen task's test metrics by centre, for a terminal; of the run's last validation where there was no test."""
    task, _ = _chosen(result)
    split, scores = "test", result.get("test", {}).get(task)
    if not scores:
        split, scores = "validation", next((r["val"][task] for _, _, r in reversed(_rounds(result)) if task in r.get("val", {})), {})
    columns = [name for name in _columns(scores) if name not in ("precision", "accuracy", "brier")] if scores else []
    grid = _score_grid(task, scores, columns)
    drawn = Table(title=f"{task}, {split}: run {result.get('run', '')}", caption="\n".join(grid.notes) or None, caption_justify="left")
    drawn.title = Text(str(drawn.title))  # names are text, not markup
    for column in grid.head[-1]:
        drawn.add_column(Text(SHORT.get(column.text, column.text)), justify="right" if column.number else "left", overflow="fold")
    for i, row in enumerate(grid.rows):
        ends = i + 1 < len(grid.rows) and grid.rows[i + 1].kind == "view first"
        # what is undefined is a dash here: a cell is too narrow for the reason, which stands below the table
        shown = [Text("–", "dim") if c.kind == "none" else Text("\n".join(filter(None, (c.text, c.small)))) for c in row.cells]
        drawn.add_row(*shown, end_section=ends)
    if drawn.caption:
        drawn.caption = Text(str(drawn.caption))
    return drawn


def _context(result: Result) -> dict[str, Any]:
    """All that the page shows."""
    rounds = _rounds(result)
    names = _names(result, rounds)
    task, metric = _chosen(result)
    test = result.get("test", {})
    tasks = sorted(test, key=lambda name: name != task)  # the chosen one first
    figures: dict[str, list[Figure]] = {
        "score_figures": [f for t in tasks if test[t].get("hist") for f in score_figures(t, test[t]["hist"], names)],
        "round_figures": round_figures(rounds, names, task, metric),
        "weight_figures": weight_figures(rounds, names),
        "cost_figures": cost_figures(rounds, names),
    }
    drawn = [figure for some in figures.values() for figure in some]
    for i, figure in enumerate(drawn):
        figure["id"] = f"figure{i}"
    # "<" escaped: a name cannot end the script element
    data = json.dumps({f["id"]: {"data": f["data"], "layout": f["layout"]} for f in drawn}, allow_nan=False).replace("<", "\\u003c")
    recipe, mode, run = (str(result.get(key, "")) for key in ("recipe", "mode", "run"))
    facts = [f"run {run}", f"{mode}", f"{len(names)} centres", f"{len(rounds)} rounds", f"seed {result.get('seed', '?')}"]
    facts += [f"started {result['started']}"] if result.get("started") else []
    facts += [f"took {_duration(result['seconds'])}"] if result.get("seconds") is not None else []
    styles = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "double"}
    return {
        "title": f"{recipe} · {run}",
        "heading": f"{recipe}, {mode}",
        "status": str(result.get("status", "unknown")),
        "facts": facts,
        "notes": [str(note) for note in result.get("notes", [])],
        **_headline(result, task, metric),
        "results": [_score_grid(name, test[name], _columns(test[name])) for name in tasks],
        "who": [{"name": name, "colour": i % COLOURS, "style": styles[dash(i)]} for i, name in enumerate(names)] if drawn else [],
        "weights": _weights_grid(rounds, names),
        "labels": _labels(result),
        "about": _about(result),
        "costs": _costs(rounds),
        "left_out": Grid(
            [[Head("stage", False), Head("round"), Head("centre", False), Head("reason", False)]],
            [
                Line([Cell(str(o["stage"])), Cell(str(o["round"]), "n"), Cell(str(o["centre"]), "text"), Cell(str(o["reason"]), "text")])
                for o in result.get("left_out", [])
            ],
        ),
        "config": yaml.safe_dump(result.get("config", {}), sort_keys=False, allow_unicode=True, width=120),
        "figures": Markup(data),
        **figures,
    }


# ---- numbers and tables


def _headline(result: Result, task: str, metric: str) -> dict[str, Any]:
    scores = result.get("test", {}).get(task)
    if not scores:
        return {"headline": [], "headline_note": ""}
    worst = scores.get("worst", {}).get(metric) or {}
    said = [("mean of centres", _get(scores, "macro", metric), ""), ("pooled", _get(scores, "pooled", metric), "")]
    said += [("worst centre", worst.get("value"), worst.get("centre") or ""), ("spread", _get(scores, "spread", metric), "best less worst")]
    if scores.get("challenge_score") is not None:
        said.append(("challenge score", scores["challenge_score"], "mean over sources of (F1⁺ + F1⁻)/2"))
    best = next((stage["best"] for stage in reversed(result.get("stages", [])) if stage.get("best")), None)
    after = f", after round {best['round']} of {best.get('stage', result['stages'][-1]['name'])}, the best on validation" if best else ""
    return {
        "headline": [{"label": label, "value": _text(value) or "undefined", "small": small} for label, value, small in said],
        "headline_note": f"{NAMES.get(metric, metric)} of {task} on the test scans{after}.",
    }


def _score_grid(task: str, scores: Result, columns: Sequence[str]) -> Grid:
    """Centre x metric, then the four views over centres."""
    rows: list[Line] = []
    undefined: dict[str, list[str]] = {}  # what is so and why: the centres
    for centre, values in scores.get("centres", {}).items():
        why = values.get("reasons", {})
        cells = [_score(values.get(name), name, why.get(name, "")) for name in columns]
        rows.append(Line([Cell(centre), *cells]))
        for reason in dict.fromkeys(why.values()):
            of = ", ".join(NAMES.get(n, n) for n, r in why.items() if r == reason)
            undefined.setdefault(f"{of} undefined: {reason}.", []).append(centre)
    for i, (view, label) in enumerate((view, label) for view, label in VIEWS.items() if view in scores):
        over, cells = scores[view], [Cell(label)]
        for name in columns:
            value = over.get(name)
            who = value.get("centre") or "" if isinstance(value, Mapping) else ""
            value = value.get("value") if isinstance(value, Mapping) else value
            blank = name in ("n", "positives") and view != "pooled"
            cells.append(Cell("") if blank else _score(value, name, over.get("reasons", {}).get(name, ""))._replace(small=who))
        rows.append(Line(cells, "view first" if i == 0 else "view"))
    head = [Head("centre", False), *(Head(NAMES.get(name, name)) for name in columns)]
    return Grid([head], rows, f"{task}, test scans", [f"{', '.join(centres)}: {what}" for what, centres in undefined.items()])


def _score(value: Any, name: str, why: str) -> Cell:
    if (text := _text(value, 0 if name in ("n", "positives") else 3)) is not None:
        return Cell(text, "n")
    return Cell(f"undefined: {why.split(' (')[0]}" if why else "undefined", "none", title=why)


def _columns(scores: Result) -> list[str]:
    """The metrics that are there, in the order of NAMES, others after."""
    there = dict.fromkeys(
        name for of in (*scores.get("centres", {}).values(), scores.get("pooled", {})) for name in of if name != "reasons"
    )
    return sorted(there, key=lambda name: list(NAMES).index(name) if name in NAMES else len(NAMES))


def _weights_grid(rounds: Rounds, names: Sequence[str]) -> Grid:
    """Shares in the last round that had any."""
    last = next(((stage, r) for _, stage, r in reversed(rounds) if r.get("weights")), None)
    if not last:
        return Grid([], [])
    stage, r = last
    parts = list(r["weights"])
    rows = [
        Line([Cell(name), *(Cell(_text(r["weights"][part].get(name)) or "–", "n") for part in parts)])
        for name in names
        if any(name in r["weights"][part] for part in parts)
    ]
    rows.append(Line([Cell("effective number"), *(Cell(_text(r.get("effective", {}).get(p), 2) or "–", "n") for p in parts)], "view first"))
    return Grid([[Head("centre", False), *map(Head, parts)]], rows, f"Shares in round {r['round']} of {stage}")


def _labels(result: Result) -> list[Grid]:
    """One table a task: scans by centre, split and class."""
    counts = {centre: facts.get("counts", {}) for centre, facts in result.get("centres", {}).items()}
    tasks = dict.fromkeys(task for of in counts.values() for split in of.values() for task in split)
    grids = []
    for task in tasks:
        splits = [
            split
            for split in dict.fromkeys([*SPLITS, *(s for of in counts.values() for s in of)])
            if any(split in of for of in counts.values())
        ]
        keys = list(dict.fromkeys(k for of in counts.values() for split in of.values() for k in split.get(task, {})))
        named = {k: {"0": "negative", "1": "positive"}.get(str(k), str(k)) if len(keys) <= 2 else str(k) for k in keys}
        wide = len(keys) > 8  # then sizes instead of every class
        columns = ["scans", "classes"] if wide else [named[key] for key in keys]
        rows, every = [], []
        for centre, of in counts.items():
            every.append(np.array([[of.get(split, {}).get(task, {}).get(key, 0) for key in keys] for split in splits], float))
            rows.append(Line([Cell(centre), *_counts(every[-1], wide)]))
        rows.append(Line([Cell("all"), *_counts(np.sum(every, axis=0), wide)], "view first"))
        groups = [Head("", False), *(Head(SPLITS.get(split, split), span=len(columns)) for split in splits)]
        head = [Head("centre", False), *(Head(column) for _ in splits for column in columns)]
        grids.append(Grid([groups, head], rows, f"{task}, scans with a label"))
    return grids


def _counts(counts: NDArray[np.float64], wide: bool) -> list[Cell]:
    """Of [splits, classes]; `wide`: scans and classes that have any."""
    shown = np.stack([counts.sum(1), (counts > 0).sum(1)], axis=1) if wide else counts
    return [Cell(_text(float(n), 0) or "", "n") for n in shown.ravel()]


def _about(result: Result) -> Grid:
    head = [Head("centre", False), Head("sources", False), Head("device", False), Head("scans not readable"), Head("versions", False)]
    rows = []
    for centre, facts in result.get("centres", {}).items():
        versions = facts.get("versions") or {}
        said = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else str(versions)
        skipped = facts.get("skipped", 0)
        lost, why = (
            (sum(skipped.values()), "; ".join(f"{n} {r}" for r, n in skipped.items())) if isinstance(skipped, Mapping) else (skipped, "")
        )
        sources = Cell(", ".join(map(str, facts.get("sources", []))), "text")
        rows.append(
            Line([Cell(centre), sources, Cell(str(facts.get("device", "")), "text"), Cell(str(lost), "n", why), Cell(said, "text")])
        )
    return Grid([head], rows)


def _costs(rounds: Rounds) -> Grid:
    stages: dict[str, list[Result]] = {}
    for _, stage, r in rounds:
        stages.setdefault(stage, []).append(r)
    rows = []
    for stage, some in stages.items():
        sums = {key: math.fsum(r.get(key) or 0 for r in some) for key in ("seconds", "bytes_down", "bytes_up")}
        cells = [Cell(str(len(some)), "n"), Cell(f"{sums['seconds']:.1f}", "n"), Cell(f"{sums['seconds'] / len(some):.1f}", "n")]
        rows.append(Line([Cell(stage), *cells, *(Cell(f"{sums[key] / 1e6:.1f}", "n") for key in ("bytes_down", "bytes_up"))]))
    heads = ("rounds", "time, s", "time per round, s", "to centres, MB", "from centres, MB")
    return Grid([[Head("stage", False), *map(Head, heads)]], rows)


# ---- small things


def _rounds(result: Result) -> Rounds:
    """(number over all stages from 1, stage, round)."""
    flat = [(stage["name"], r) for stage in result.get("stages", []) for r in stage.get("rounds", [])]
    return [(i, stage, r) for i, (stage, r) in enumerate(flat, 1)]


def _names(result: Result, rounds: Rounds) -> list[str]:
    """Every centre that is named anywhere, in the order of the federation."""
    named = dict.fromkeys(result.get("centres", {}))
    for _, _, r in rounds:
        for of in (r.get("centres", {}), *r.get("weights", {}).values(), *(val.get("centres", {}) for val in r.get("val", {}).values())):
            named |= dict.fromkeys(of)
    for scores in result.get("test", {}).values():
        named |= dict.fromkeys([*scores.get("centres", {}), *scores.get("hist", {})])
    return list(named)


def _chosen(result: Result) -> tuple[str, str]:
    """The task and metric that the run was judged by."""
    evaluation = result.get("config", {}).get("evaluation", {})
    tasks = [*result.get("test", {}), *(task for _, _, r in _rounds(result) for task in r.get("val", {}))]
    task = evaluation.get("task", "covid")
    return (task if task in tasks or not tasks else tasks[0]), evaluation.get("metric", "auc")


def _get(scores: Result, view: str, metric: str) -> Any:
    return scores.get(view, {}).get(metric)


def _text(value: Any, digits: int = 3) -> str | None:
    number = finite(value)
    return None if number is None else f"{number:,.{digits}f}".replace(",", "\u2009")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
