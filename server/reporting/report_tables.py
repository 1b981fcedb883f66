"""The report's tables: rows of cells, drawn as HTML by `server/reporting/report_template.py` and in the terminal by `server/reporting/report.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics import COUNT_METRICS
from server.reporting.figures import METRIC_COLUMNS, METRIC_NAMES, Rounds, RunResult, to_finite_float

VIEW_LABELS = {"macro": "mean of centres", "pooled": "pooled", "worst": "worst centre", "spread": "spread"}
SPLIT_LABELS = {"train": "training", "val": "validation", "test": "test"}


class TableCell(NamedTuple):
    text: str
    css_class: str = ""  # n: a number; none: undefined; text: long
    subtext: str = ""
    tooltip: str = ""


class HeaderCell(NamedTuple):
    text: str
    is_numeric: bool = True
    column_span: int = 1


class TableRow(NamedTuple):
    cells: list[TableCell]
    css_class: str = ""


class ReportTable(NamedTuple):
    """A table; `head` is one row or, with column groups above, two."""

    header_rows: list[list[HeaderCell]]
    rows: list[TableRow]
    caption: str = ""
    notes: list[str] = []  # noqa: RUF012  (a NamedTuple's default, never changed)


def build_score_table(task: str, scores: RunResult, columns: Sequence[str]) -> ReportTable:
    """Centre x metric, then the four views over centres. A centre without a scan to score has no row, but is named."""
    rows: list[TableRow] = []
    absent: list[str] = []
    undefined: dict[str, list[str]] = {}  # what is so and why: the centres
    for centre, values in scores.get("centres", {}).items():
        why = {name: reason for name, reason in values.get("reasons", {}).items() if name in columns}
        if values.get("n") == 0 and all(
            to_finite_float(v) is None for k, v in values.items() if k not in COUNT_METRICS
        ):
            absent.append(centre)
            continue
        cells = [_score_cell(values.get(name), name, why.get(name, "")) for name in columns]
        rows.append(TableRow([TableCell(centre), *cells]))
        for reason in dict.fromkeys(why.values()):
            of = ", ".join(METRIC_NAMES.get(n, n) for n, r in why.items() if r == reason)
            undefined.setdefault(f"{of} undefined: {reason}.", []).append(centre)
    for i, (view, label) in enumerate((view, label) for view, label in VIEW_LABELS.items() if view in scores):
        over, cells = scores[view], [TableCell(label)]
        for name in columns:
            value = over.get(name)
            who = value.get("centre") or "" if isinstance(value, Mapping) else ""
            value = value.get("value") if isinstance(value, Mapping) else value
            blank = name not in over  # a view that does not speak of this column
            cells.append(
                TableCell("")
                if blank
                else _score_cell(value, name, over.get("reasons", {}).get(name, ""))._replace(subtext=who)
            )
        rows.append(TableRow(cells, "view first" if i == 0 else "view"))
    head = [HeaderCell("centre", False), *(HeaderCell(METRIC_NAMES.get(name, name)) for name in columns)]
    notes = [f"{', '.join(centres)}: {what}" for what, centres in undefined.items()]
    return ReportTable(
        [head],
        rows,
        f"{task}, test scans",
        notes + ([f"Nothing to score at {', '.join(absent)}."] if absent else []),
    )


def _score_cell(value: Any, name: str, why: str) -> TableCell:
    if (
        text := format_number(value, METRIC_COLUMNS[name].decimals if name in METRIC_COLUMNS else 3)
    ) is not None:
        return TableCell(text, "n")
    return TableCell(f"undefined: {why.split(' (')[0]}" if why else "undefined", "none", tooltip=why)


def list_metrics(scores: RunResult) -> list[str]:
    """The metrics that are there, in the order of COLUMNS, others after."""
    there = dict.fromkeys(
        name
        for of in (*scores.get("centres", {}).values(), scores.get("pooled", {}))
        for name in of
        if name != "reasons"
    )
    return sorted(
        there,
        key=lambda name: list(METRIC_COLUMNS).index(name) if name in METRIC_COLUMNS else len(METRIC_COLUMNS),
    )


def build_stage_table(result: RunResult, task: str, metric: str) -> ReportTable:
    """What each stage trained, for how long, and which of its rounds the next one, or the test, began from."""
    rows = []
    for stage in result.get("stages", []):
        rounds, best = stage.get("rounds", []), stage.get("best") or {}
        tasks = ", ".join(dict.fromkeys(name for r in rounds for name in r.get("val", {})))
        taken = "–" if not best else f"round {best['round']}" if "round" in best else "each centre's own best"
        value = format_number(best.get("value"))
        played = sum(r["round"] > 0 for r in rounds)
        rows.append(
            TableRow(
                [
                    TableCell(stage["name"]),
                    TableCell(tasks, "text"),
                    TableCell(str(played), "n"),
                    TableCell(taken, "text"),
                    TableCell(value or "–", "n"),
                ]
            )
        )
    head = [
        HeaderCell("stage", False),
        HeaderCell("tasks", False),
        HeaderCell("rounds"),
        HeaderCell("taken", False),
        HeaderCell(f"{task}: {METRIC_NAMES.get(metric, metric)}"),
    ]
    return ReportTable([head], rows)


def build_weight_table(rounds: Rounds, centre_names: Sequence[str]) -> ReportTable:
    """Shares in the last round that had any."""
    last = next(((stage, r) for _, stage, r in reversed(rounds) if r.get("weights")), None)
    if not last:
        return ReportTable([], [])
    stage, r = last
    parts = list(r["weights"])
    rows = [
        TableRow(
            [
                TableCell(name),
                *(TableCell(format_number(r["weights"][part].get(name)) or "–", "n") for part in parts),
            ]
        )
        for name in centre_names
        if any(name in r["weights"][part] for part in parts)
    ]
    effective = [TableCell(format_number(r.get("effective", {}).get(part), 2) or "–", "n") for part in parts]
    rows.append(TableRow([TableCell("effective number"), *effective], "view first"))
    return ReportTable(
        [[HeaderCell("centre", False), *map(HeaderCell, parts)]],
        rows,
        f"Shares in round {r['round']} of {stage}",
    )


def build_label_count_tables(result: RunResult) -> list[ReportTable]:
    """One table a task: scans by centre, split and class."""
    counts = {centre: facts.get("counts", {}) for centre, facts in result.get("centres", {}).items()}
    tasks = dict.fromkeys(task for of in counts.values() for split in of.values() for task in split)
    grids = []
    for task in tasks:
        splits = [
            split
            for split in dict.fromkeys([*SPLIT_LABELS, *(s for of in counts.values() for s in of)])
            if any(split in of for of in counts.values())
        ]
        keys = list(
            dict.fromkeys(k for of in counts.values() for split in of.values() for k in split.get(task, {}))
        )
        wide = len(keys) > 9  # then sizes instead of every class
        if wide:
            keys.sort(key=lambda key: key == "unlabelled")
        columns = ["scans", "classes", "unlabelled"][: 2 + (keys[-1] == "unlabelled")] if wide else keys
        rows, every = [], []
        for centre, of in counts.items():
            every.append(
                np.array(
                    [[of.get(split, {}).get(task, {}).get(key, 0) for key in keys] for split in splits], float
                )
            )
            rows.append(TableRow([TableCell(centre), *_count_cells(every[-1], columns)]))
        rows.append(TableRow([TableCell("all"), *_count_cells(np.sum(every, axis=0), columns)], "view first"))
        groups = [
            HeaderCell("", False),
            *(HeaderCell(SPLIT_LABELS.get(split, split), column_span=len(columns)) for split in splits),
        ]
        head = [HeaderCell("centre", False), *(HeaderCell(column) for _ in splits for column in columns)]
        grids.append(ReportTable([groups, head], rows, f"{task}, scans"))
    return grids


def _count_cells(counts: NDArray[np.float64], columns: list[str]) -> list[TableCell]:
    """Of [splits, classes]: as they are, or as many columns as are asked for: scans, classes that have any, unlabelled (the last class)."""
    if counts.shape[1] > len(columns):
        of = counts[:, : -1 if len(columns) == 3 else None]
        counts = np.stack([of.sum(1), (of > 0).sum(1), counts[:, -1]], axis=1)[:, : len(columns)]
    return [TableCell(format_number(float(n), 0) or "", "n") for n in counts.ravel()]


def build_centre_table(result: RunResult) -> ReportTable:
    """Who the centres are: sources, device, versions, and the scans they could not read."""
    head = [
        HeaderCell("centre", False),
        HeaderCell("sources", False),
        HeaderCell("device", False),
        HeaderCell("scans not readable"),
        HeaderCell("versions", False),
    ]
    rows = []
    for centre, facts in result.get("centres", {}).items():
        versions = facts.get("versions") or {}
        said = (
            ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, Mapping)
            else str(versions)
        )
        lost = str(facts.get("skipped", 0))
        why = "; ".join(f"{n} {reason}" for reason, n in (facts.get("skipped_why") or {}).items())
        sources = TableCell(", ".join(map(str, facts.get("sources", []))), "text")
        rows.append(
            TableRow(
                [
                    TableCell(centre),
                    sources,
                    TableCell(str(facts.get("device", "")), "text"),
                    TableCell(lost, "n", why),
                    TableCell(said, "text"),
                ]
            )
        )
    return ReportTable([head], rows)


def build_drift_table(image_statistics: RunResult) -> ReportTable:
    """How unlike all the others' scans each centre's are."""
    centres = dict.fromkeys(centre for of in image_statistics.values() for centre in of["centres"])
    rows = [
        TableRow(
            [
                TableCell(c),
                *(
                    TableCell(format_number(of["drift"].get(c), 2) or "–", "n")
                    for of in image_statistics.values()
                ),
            ]
        )
        for c in centres
    ]
    caption = "Distance of each centre's histogram from all others' together (Jensen-Shannon: 0 alike, 1 nothing in common)"
    return ReportTable(
        [[HeaderCell("centre", False), *(HeaderCell(of["name"]) for of in image_statistics.values())]],
        rows,
        caption,
    )


def build_cost_table(rounds: Rounds) -> ReportTable:
    """Time and bytes by stage."""
    stages: dict[str, list[RunResult]] = {}
    for _, stage, r in rounds:
        if r["round"]:  # round 0 is no round, but the score of what the stage starts from
            stages.setdefault(stage, []).append(r)
    rows = []
    for stage, some in stages.items():
        sums = {
            key: math.fsum(r.get(key) or 0 for r in some) for key in ("seconds", "bytes_down", "bytes_up")
        }
        cells = [
            TableCell(str(len(some)), "n"),
            TableCell(f"{sums['seconds']:.1f}", "n"),
            TableCell(f"{sums['seconds'] / len(some):.1f}", "n"),
        ]
        rows.append(
            TableRow(
                [
                    TableCell(stage),
                    *cells,
                    *(TableCell(f"{sums[key] / 1e6:.1f}", "n") for key in ("bytes_down", "bytes_up")),
                ]
            )
        )
    heads = ("rounds", "time, s", "time per round, s", "to centres, MB", "from centres, MB")
    return ReportTable([[HeaderCell("stage", False), *map(HeaderCell, heads)]], rows)


def build_privacy_table(rounds: Rounds, privacy: RunResult) -> ReportTable:
    """What each centre's patients (in this and earlier runs), or each centre (in this run), have lost by the last round each contributed to."""
    spent: dict[str, list[tuple[int, float]]] = {}
    for number, _, r in rounds:
        for centre, said in r.get("centres", {}).items():
            if to_finite_float(said.get("epsilon")) is not None:
                spent.setdefault(centre, []).append((number, said["epsilon"]))
    rows = [
        TableRow(
            [
                TableCell(centre),
                *(TableCell(format_number(v, 2) or "", "n") for v in (of[0][1], of[-1][1])),
                TableCell(str(len(of)), "n"),
            ]
        )
        for centre, of in spent.items()
    ]
    heads = ("epsilon, first round", "epsilon, last round", "rounds")
    central = privacy.get("kind") == "central"
    whose = (
        "Centres' privacy loss, to those who see the models but not to the coordinator,"
        if central
        else "Patients' privacy loss"
    )
    caption = f"{whose} at delta {privacy.get('delta', 0):g}, clipped at {privacy.get('clip', 0):g}"
    return ReportTable([[HeaderCell("centre", False), *map(HeaderCell, heads)]], rows, caption)


def build_exclusion_table(result: RunResult) -> ReportTable:
    """Contributions that were not used, and why."""
    head = [
        HeaderCell("stage", False),
        HeaderCell("round"),
        HeaderCell("centre", False),
        HeaderCell("reason", False),
    ]
    rows = []
    for out in result.get("left_out", []):
        stage, round, centre, reason = (str(out[key]) for key in ("stage", "round", "centre", "reason"))
        rows.append(
            TableRow(
                [
                    TableCell(stage),
                    TableCell(round, "n"),
                    TableCell(centre, "text"),
                    TableCell(reason, "text"),
                ]
            )
        )
    return ReportTable([head], rows)


def format_number(value: Any, decimals: int = 3) -> str | None:
    """With thin spaces between thousands; None for what is no finite number."""
    number = to_finite_float(value)
    return None if number is None else f"{number:,.{decimals}f}".replace(",", "\u2009")
