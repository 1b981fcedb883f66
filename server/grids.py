"""The report's tables: rows of cells, drawn as HTML by `server/page.py` and in the terminal by `server/report.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.metrics import COUNTS
from server.figures import COLUMNS, NAMES, Result, Rounds, finite

VIEWS = {"macro": "mean of centres", "pooled": "pooled", "worst": "worst centre", "spread": "spread"}
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


def score_grid(task: str, scores: Result, columns: Sequence[str]) -> Grid:
    """Centre x metric, then the four views over centres. A centre without a scan to score has no row, but is named."""
    rows: list[Line] = []
    absent: list[str] = []
    undefined: dict[str, list[str]] = {}  # what is so and why: the centres
    for centre, values in scores.get("centres", {}).items():
        why = {name: reason for name, reason in values.get("reasons", {}).items() if name in columns}
        if values.get("n") == 0 and all(finite(v) is None for k, v in values.items() if k not in COUNTS):
            absent.append(centre)
            continue
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
            blank = name not in over  # a view that does not speak of this column
            cells.append(Cell("") if blank else _score(value, name, over.get("reasons", {}).get(name, ""))._replace(small=who))
        rows.append(Line(cells, "view first" if i == 0 else "view"))
    head = [Head("centre", False), *(Head(NAMES.get(name, name)) for name in columns)]
    notes = [f"{', '.join(centres)}: {what}" for what, centres in undefined.items()]
    return Grid([head], rows, f"{task}, test scans", notes + ([f"Nothing to score at {', '.join(absent)}."] if absent else []))


def _score(value: Any, name: str, why: str) -> Cell:
    if (text := text_of(value, COLUMNS[name].digits if name in COLUMNS else 3)) is not None:
        return Cell(text, "n")
    return Cell(f"undefined: {why.split(' (')[0]}" if why else "undefined", "none", title=why)


def columns_of(scores: Result) -> list[str]:
    """The metrics that are there, in the order of COLUMNS, others after."""
    there = dict.fromkeys(
        name for of in (*scores.get("centres", {}).values(), scores.get("pooled", {})) for name in of if name != "reasons"
    )
    return sorted(there, key=lambda name: list(COLUMNS).index(name) if name in COLUMNS else len(COLUMNS))


def stages_grid(result: Result, task: str, metric: str) -> Grid:
    """What each stage trained, for how long, and which of its rounds the next one, or the test, began from."""
    rows = []
    for stage in result.get("stages", []):
        rounds, best = stage.get("rounds", []), stage.get("best") or {}
        tasks = ", ".join(dict.fromkeys(name for r in rounds for name in r.get("val", {})))
        taken = "–" if not best else f"round {best['round']}" if "round" in best else "each centre's own best"
        value = text_of(best.get("value"))
        played = sum(r["round"] > 0 for r in rounds)
        rows.append(Line([Cell(stage["name"]), Cell(tasks, "text"), Cell(str(played), "n"), Cell(taken, "text"), Cell(value or "–", "n")]))
    head = [Head("stage", False), Head("tasks", False), Head("rounds"), Head("taken", False), Head(f"{task}: {NAMES.get(metric, metric)}")]
    return Grid([head], rows)


def weights_grid(rounds: Rounds, names: Sequence[str]) -> Grid:
    """Shares in the last round that had any."""
    last = next(((stage, r) for _, stage, r in reversed(rounds) if r.get("weights")), None)
    if not last:
        return Grid([], [])
    stage, r = last
    parts = list(r["weights"])
    rows = [
        Line([Cell(name), *(Cell(text_of(r["weights"][part].get(name)) or "–", "n") for part in parts)])
        for name in names
        if any(name in r["weights"][part] for part in parts)
    ]
    effective = [Cell(text_of(r.get("effective", {}).get(part), 2) or "–", "n") for part in parts]
    rows.append(Line([Cell("effective number"), *effective], "view first"))
    return Grid([[Head("centre", False), *map(Head, parts)]], rows, f"Shares in round {r['round']} of {stage}")


def label_grids(result: Result) -> list[Grid]:
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
        wide = len(keys) > 9  # then sizes instead of every class
        if wide:
            keys.sort(key=lambda key: key == "unlabelled")
        columns = ["scans", "classes", "unlabelled"][: 2 + (keys[-1] == "unlabelled")] if wide else keys
        rows, every = [], []
        for centre, of in counts.items():
            every.append(np.array([[of.get(split, {}).get(task, {}).get(key, 0) for key in keys] for split in splits], float))
            rows.append(Line([Cell(centre), *_counts(every[-1], columns)]))
        rows.append(Line([Cell("all"), *_counts(np.sum(every, axis=0), columns)], "view first"))
        groups = [Head("", False), *(Head(SPLITS.get(split, split), span=len(columns)) for split in splits)]
        head = [Head("centre", False), *(Head(column) for _ in splits for column in columns)]
        grids.append(Grid([groups, head], rows, f"{task}, scans"))
    return grids


def _counts(counts: NDArray[np.float64], columns: list[str]) -> list[Cell]:
    """Of [splits, classes]: as they are, or as many columns as are asked for: scans, classes that have any, unlabelled (the last class)."""
    if counts.shape[1] > len(columns):
        of = counts[:, : -1 if len(columns) == 3 else None]
        counts = np.stack([of.sum(1), (of > 0).sum(1), counts[:, -1]], axis=1)[:, : len(columns)]
    return [Cell(text_of(float(n), 0) or "", "n") for n in counts.ravel()]


def about_grid(result: Result) -> Grid:
    """Who the centres are: sources, device, versions, and the scans they could not read."""
    head = [Head("centre", False), Head("sources", False), Head("device", False), Head("scans not readable"), Head("versions", False)]
    rows = []
    for centre, facts in result.get("centres", {}).items():
        versions = facts.get("versions") or {}
        said = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else str(versions)
        lost = str(facts.get("skipped", 0))
        why = "; ".join(f"{n} {reason}" for reason, n in (facts.get("skipped_why") or {}).items())
        sources = Cell(", ".join(map(str, facts.get("sources", []))), "text")
        rows.append(Line([Cell(centre), sources, Cell(str(facts.get("device", "")), "text"), Cell(lost, "n", why), Cell(said, "text")]))
    return Grid([head], rows)


def drift_grid(quality: Result) -> Grid:
    """How unlike all the others' scans each centre's are."""
    centres = dict.fromkeys(centre for of in quality.values() for centre in of["centres"])
    rows = [Line([Cell(c), *(Cell(text_of(of["drift"].get(c), 2) or "–", "n") for of in quality.values())]) for c in centres]
    caption = "Distance of each centre's histogram from all others' together (Jensen-Shannon: 0 alike, 1 nothing in common)"
    return Grid([[Head("centre", False), *(Head(of["name"]) for of in quality.values())]], rows, caption)


def cost_grid(rounds: Rounds) -> Grid:
    """Time and bytes by stage."""
    stages: dict[str, list[Result]] = {}
    for _, stage, r in rounds:
        if r["round"]:  # round 0 is no round, but the score of what the stage starts from
            stages.setdefault(stage, []).append(r)
    rows = []
    for stage, some in stages.items():
        sums = {key: math.fsum(r.get(key) or 0 for r in some) for key in ("seconds", "bytes_down", "bytes_up")}
        cells = [Cell(str(len(some)), "n"), Cell(f"{sums['seconds']:.1f}", "n"), Cell(f"{sums['seconds'] / len(some):.1f}", "n")]
        rows.append(Line([Cell(stage), *cells, *(Cell(f"{sums[key] / 1e6:.1f}", "n") for key in ("bytes_down", "bytes_up"))]))
    heads = ("rounds", "time, s", "time per round, s", "to centres, MB", "from centres, MB")
    return Grid([[Head("stage", False), *map(Head, heads)]], rows)


def privacy_grid(rounds: Rounds, privacy: Result) -> Grid:
    """What each centre's patients (in this and earlier runs), or each centre (in this run), have lost by the last round each contributed to."""
    spent: dict[str, list[tuple[int, float]]] = {}
    for number, _, r in rounds:
        for centre, said in r.get("centres", {}).items():
            if finite(said.get("epsilon")) is not None:
                spent.setdefault(centre, []).append((number, said["epsilon"]))
    rows = [
        Line([Cell(centre), *(Cell(text_of(v, 2) or "", "n") for v in (of[0][1], of[-1][1])), Cell(str(len(of)), "n")])
        for centre, of in spent.items()
    ]
    heads = ("epsilon, first round", "epsilon, last round", "rounds")
    central = privacy.get("kind") == "central"
    whose = "Centres' privacy loss, to those who see the models but not to the coordinator," if central else "Patients' privacy loss"
    caption = f"{whose} at delta {privacy.get('delta', 0):g}, clipped at {privacy.get('clip', 0):g}"
    return Grid([[Head("centre", False), *map(Head, heads)]], rows, caption)


def left_out_grid(result: Result) -> Grid:
    """Contributions that were not used, and why."""
    head = [Head("stage", False), Head("round"), Head("centre", False), Head("reason", False)]
    rows = []
    for out in result.get("left_out", []):
        stage, round, centre, reason = (str(out[key]) for key in ("stage", "round", "centre", "reason"))
        rows.append(Line([Cell(stage), Cell(round, "n"), Cell(centre, "text"), Cell(reason, "text")]))
    return Grid([head], rows)


def text_of(value: Any, digits: int = 3) -> str | None:
    """With thin spaces between thousands; None for what is no finite number."""
    number = finite(value)
    return None if number is None else f"{number:,.{digits}f}".replace(",", "\u2009")
