"""The report and the terminal's table from a result with every part, with few parts, and with hostile names."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.messages import Sums
from common.metrics import (
    binary_metrics,
    binary_reasons,
    challenge_score,
    histogram,
    multiclass_metrics,
    multiclass_reasons,
    regression_sums,
    summary,
)
from common.overlap import SEVERITY_EDGES, SHARE_EDGES, joint_histogram, overlap_sums
from common.schema import Config, Evaluation, Task
from server import scores as tables
from server.report import POINTS, side_by_side, table, thinned, write_report

CENTRES = ("north", "east", "south", "west")
STAGES = (("pretraining", 3), ("main", 6))


def scored(hists: dict[str, Any]) -> dict[str, Any]:
    """A binary task's part of a result."""
    per_centre = {centre: binary_metrics(hist) for centre, hist in hists.items()}
    views = summary(per_centre, binary_metrics(np.sum(list(hists.values()), axis=0)))
    shown = {centre: {**values, "loss": 0.4, "reasons": binary_reasons(hists[centre])} for centre, values in per_centre.items()}
    return {
        "centres": shown,
        **views,
        "hist": {c: h.tolist() for c, h in hists.items()},
        "challenge_score": challenge_score(hists.values()),
    }


def sourced(centres: tuple[str, ...], right: float) -> dict[str, Any]:
    """The source task's part: each centre sees one class."""
    confusions = {}
    for k, centre in enumerate(centres):
        confusions[centre] = np.zeros((len(centres), len(centres)))
        confusions[centre][k, [k, (k + 1) % len(centres)]] = [30 * right, 30 * (1 - right)]
    per_centre = {centre: multiclass_metrics(c) for centre, c in confusions.items()}
    views = summary(per_centre, multiclass_metrics(np.sum(list(confusions.values()), axis=0)))
    return {"centres": {c: {**v, "reasons": multiclass_reasons(confusions[c])} for c, v in per_centre.items()}, **views}


def sample(centres: tuple[str, ...] = CENTRES) -> dict[str, Any]:
    """A finished federated run's result, as saved in metrics.json: every part that a report may show. The third centre has one class."""
    bits = np.random.default_rng(4)

    def scores(skill: float) -> dict[str, Any]:
        hists = {}
        for k, centre in enumerate(centres):
            truth = bits.integers(0, 2, 60).astype(float) * (k != 2)
            hists[centre] = histogram(bits.normal(0, 2, 60) + skill * (1 - 0.15 * (k % 4)) * (2 * truth - 1), truth)
        return scored(hists)

    stages = []
    for stage, (name, count) in enumerate(STAGES):
        start: dict[str, Any] = {"round": 0, "seconds": 0.0, "bytes_up": 0, "bytes_down": 0, "weights": {}, "effective": {}, "centres": {}}
        rounds = [{**start, "val": {"covid": scores(0.3 + stage), "source": sourced(centres, 0.4)}}]
        for r in range(1, count + 1):
            there = [c for k, c in enumerate(centres) if (stage, r, k) != (1, 3, 1)]  # east drops out of a round
            replies: dict[str, dict[str, Any]] = {}
            for k, c in enumerate(there):
                replies[c] = {"loss": 0.7 / (r + stage) + 0.05 * (k % 5), "scans": 30 + k, "steps": 4, "seconds": 2.0 + 0.7 * (k % 6)}
                replies[c] |= {"norm": 0.4, "accepted": True, "reason": None}
            if (stage, r) == (1, 5):
                replies[centres[-1]] |= {"accepted": False, "reason": "update not finite", "loss": float("nan")}
            used = [c for c in there if replies[c]["accepted"]]
            share = {c: (2.0 if c == centres[0] else 1.0) / (len(used) + 1) for c in used}
            weights = {"backbone": share, "covid": share, "source": dict.fromkeys(used, 1 / len(used))}
            val = scores(0.4 + 0.25 * r + stage)
            del val["hist"]
            rounds.append(
                {
                    "round": r,
                    "seconds": 7.5 + 0.3 * r,
                    "bytes_up": 9_400_000 * len(there),
                    "bytes_down": 9_400_000 * len(centres),
                    "weights": weights,
                    "effective": {part: 1 / sum(w * w for w in of.values()) for part, of in weights.items()},
                    "centres": replies,
                    "val": {"covid": val, "source": sourced(centres, 0.5 + 0.05 * r)},
                }
            )
        stages.append({"name": name, "rounds": rounds, "best": {"stage": name, "round": count - 1, "value": 0.91}})
    counts = {"train": 338, "val": 88, "test": 60}
    return {
        "run": "2026-03-01-multisource-7f3a",
        "recipe": "multisource",
        "mode": "federated",
        "seed": 1,
        "status": "finished",
        "started": "2026-03-01 12:00 UTC",
        "seconds": 154.2,
        "config": {"recipe": "multisource", "evaluation": {"task": "covid", "metric": "auc"}, "aggregation": {"tau": 1.0}},
        "centres": {
            c: {
                "counts": {
                    s: {
                        "covid": {"no covid": n - 3 * k % n, "covid": 0 if k == 2 else n // 2, "unlabelled": 0.0},
                        "source": {**{other: n if other == c else 0 for other in centres}, "unlabelled": k},
                    }
                    for s, n in counts.items()
                },
                "sources": [c],
                "skipped": k,
                "skipped_why": {"no pixel data": k} if k else {},
                "versions": {"consilium": "0.1.0", "torch": "2.15"},
                "device": "cpu",
            }
            for k, c in enumerate(centres)
        },
        "stages": stages,
        "test": {"covid": scores(1.6), "source": sourced(centres, 0.8)},
        "left_out": [
            {"stage": "main", "round": 3, "centre": centres[1], "reason": "no reply before the deadline of 60 s"},
            {"stage": "main", "round": 5, "centre": centres[-1], "reason": "update not finite"},
        ],
        "notes": ["Resumed once, after round 2 of main."],
    }


class Page(HTMLParser):
    """What a reader sees: the text, the tables' cells, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag  # well-formed

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts[-1] += data
        elif "style" not in self.inside:
            self.text += data
            if "td" in self.inside or "th" in self.inside:
                self.rows[-1][-1] += data


def page(result: dict[str, Any], folder: Path) -> Page:
    saved = json.loads(json.dumps(result))  # made again from metrics.json
    write_report(folder / "report.html", saved)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def printed(result: dict[str, Any], width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(result))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_report_shows_what_is_in_the_result(tmp_path: Path) -> None:
    result = sample()
    got = page(result, tmp_path)
    covid = result["test"]["covid"]
    for view in ("macro", "pooled", "spread"):
        assert f"{covid[view]['auc']:.3f}" in got.text
    worst = covid["worst"]["auc"]
    (row,) = [r for r in got.rows if r[0] == "worst centre" and len(r) > 8]
    assert f"{worst['value']:.3f} {worst['centre']}" in row
    row = next(r for r in got.rows if r[0] == "north")
    assert row[1] == "60"
    assert row[3] == f"{covid['centres']['north']['auc']:.3f}"
    assert ["main", "3", "east", "no reply before the deadline of 60 s"] in got.rows
    assert "Resumed once" in got.text
    assert "tau: 1.0" in got.text
    assert "finished" in got.text
    figures = json.loads(got.scripts[1])
    assert len(figures) == 2 + 3 + 4 + 2  # ROC and calibration; two tasks and the loss; three parts and the effective number; time, traffic
    plots = {attrs["id"] for tag, attrs in got.elements if attrs.get("class") == "plot"}
    assert plots == set(figures)


def test_an_undefined_metric_is_never_a_number(tmp_path: Path) -> None:
    result = sample()
    got = page(result, tmp_path)
    row = next(r for r in got.rows if r[0] == "south")
    assert row[3] == "undefined: one class only"
    undefined = "south: ROC-AUC, F1, sensitivity, precision, balanced accuracy, G-mean undefined"
    assert f"{undefined}: one class only (no positive scan among 60)." in got.text
    roc_names = {trace.get("name") for trace in next(iter(json.loads(got.scripts[1]).values()))["data"]}
    assert roc_names == {None, "north", "east", "west", "pooled"}  # the diagonal has no name
    shown = printed(result)
    assert "one class only" in shown
    assert not re.search(r"\bnan\b", shown + got.text, re.IGNORECASE)


def test_it_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    got = page(sample(), tmp_path)
    for tag, attrs in got.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attrs.keys()
    assert any(
        attrs.get("http-equiv") == "Content-Security-Policy" and "default-src 'none'" in str(attrs["content"]) for _, attrs in got.elements
    )
    assert "@import" not in got.text
    assert len(got.scripts) == 3


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&[bold]{{ 7*7 }}"
    result = sample((evil, "a" * 120, "south", "west"))
    result["notes"].append(evil)
    result["config"]["federation"] = {"name": evil}
    result["run"] = evil
    result["left_out"][0]["reason"] = evil
    result["stages"][0]["name"] = evil
    got = page(result, tmp_path)
    assert len(got.scripts) == 3
    assert "img" not in {tag for tag, _ in got.elements}
    assert not any(name.startswith("on") for _, attrs in got.elements for name in attrs)
    assert got.text.count(evil) >= 10
    figures = json.loads(got.scripts[1])
    # plotly reads a little HTML, so what it gets is escaped once more
    texts = [
        str(v) for f in figures.values() for t in (*f["data"], *f["layout"].get("annotations", [])) for v in (t.get("name"), t.get("text"))
    ]
    assert any("&lt;/script&gt;" in text for text in texts)
    assert not any("<img" in text for text in texts)
    assert "[bold]" in printed(result, width=2000)


@pytest.mark.parametrize("missing", ["test", "stages", "centres", "config", "left_out", "notes", "seconds", "started"])
def test_a_part_that_is_missing_is_no_error(tmp_path: Path, missing: str) -> None:
    result = sample()
    del result[missing]
    got = page(result, tmp_path)
    printed(result)
    if missing == "test":
        assert "There are no test results" in got.text
        assert "covid, validation" in printed(result)


def test_a_run_that_failed_at_once_has_a_report(tmp_path: Path) -> None:
    got = page({"run": "r1", "recipe": "multisource", "mode": "local", "status": "failed", "notes": ["No centre appeared."]}, tmp_path)
    assert "No centre appeared." in got.text
    assert json.loads(got.scripts[1]) == {}
    printed({"run": "r1"})


def test_many_centres_keep_apart(tmp_path: Path) -> None:
    result = sample(tuple(f"centre {i:02d}" for i in range(24)))
    got = page(result, tmp_path)
    figure = json.loads(got.scripts[1])["figure2"]
    looks = {(t["line"]["color"], t["line"]["dash"]) for t in figure["data"] if "meta" in t}
    assert len(looks) == 23  # of 24, one of which has no AUC
    assert sum(tag == "button" for tag, _ in got.elements) == 24


def test_a_long_runs_curves_are_thinned_but_keep_their_ends() -> None:
    rounds: Any = [(i, "first" if i <= 701 else "second", {}) for i in range(1, 2001)]
    kept, step = thinned(rounds, 100)
    assert step == 20
    assert {1, 701, 702, 2000} <= {i for i, _, _ in kept}
    assert 100 * len(kept) < 1.1 * POINTS
    assert thinned(rounds[:150], 4) == (rounds[:150], 1)
    assert thinned([], 0) == ([], 1)


def test_the_terminal_table_has_a_row_a_centre_and_the_views() -> None:
    lines = printed(sample()).splitlines()
    first = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [name for name in first if name] == [*CENTRES, "mean of centres", "pooled", "worst centre", "spread"]


def test_runs_side_by_side() -> None:
    results = {"federated": sample(), "local": sample()}
    results["local"]["test"]["covid"]["centres"]["north"]["auc"] = 0.123
    results["central"] = {**sample(), "test": {}}
    console = Console(file=io.StringIO(), width=100)
    console.print(side_by_side(results))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["north", f"{results['federated']['test']['covid']['centres']['north']['auc']:.3f}", "0.123", "–"] in cells
    assert next(row for row in cells if row[0] == "south") == ["south", "–", "–", "–"]  # one class
    steps = 4 * sum(len(r["centres"]) for stage in results["local"]["stages"] for r in stage["rounds"])
    assert ["optimiser steps, all centres", *[str(steps)] * 3] in cells


def test_each_centre_may_have_its_own_best(tmp_path: Path) -> None:
    result = sample()
    result["stages"][-1]["best"] = {c: {"stage": "main", "round": k, "value": 0.8} for k, c in enumerate(CENTRES)}
    assert "after each centre's own best round of main" in page(result, tmp_path).text


# --- stages of different tasks, centres with different labels

TASKS = {
    "moco": Task(kind="contrast"),
    "covid": Task(),
    "finding": Task(kind="multiclass", classes=["none", "typical", "other"]),
    "brixia": Task(kind="regression", columns=["left", "right"]),
    "lesion": Task(kind="segmentation", burden="severity"),
}


def answered(seed: int, skill: float) -> Sums:
    """All kinds: west has masks only, south neither masks nor scores, and of south's scans one class."""
    random = np.random.default_rng(seed)
    sums: Sums = {}
    for k, c in enumerate(CENTRES):
        n = {task: 40 for task in TASKS} | ({"covid": 0, "finding": 0, "brixia": 0} if c == "west" else {})
        n |= {"brixia": 0, "lesion": 0} if c == "south" else {}
        truth = random.integers(0, 2, n["covid"]) * float(c != "south")
        target = random.integers(0, 4, (n["brixia"], 2)).astype(float)
        mask = (random.uniform(size=(n["lesion"], 1, 16, 16)) < 0.2).astype(np.uint8)
        share = mask.mean((1, 2, 3))
        sums |= {
            f"{c}/covid/hist": histogram(random.normal(size=len(truth)) + skill * (2 * truth - 1), truth),
            f"{c}/finding/confusion": random.integers(1, 9, (3, 3)) * float(n["finding"] > 0) + skill * n["finding"] * np.eye(3),
            f"{c}/brixia/regression": regression_sums(target + random.normal(0, 1 / (1 + skill), target.shape), target),
            f"{c}/lesion/overlap": overlap_sums(np.clip(mask * skill / 2 + random.uniform(0, 0.6, mask.shape), 0, 1), mask),
            f"{c}/lesion/joint": joint_histogram(share + random.normal(0, 0.02, len(share)), 100 * share, SHARE_EDGES, SEVERITY_EDGES),
        }
        sums |= {f"{c}/{task}/loss": np.array([n[task] * (1 + 0.1 * k) / (1 + skill), n[task]]) for task in TASKS}
    return sums


def mixed(stages: dict[str, tuple[int, list[str]]], task: str = "covid", metric: Any = "auc") -> dict[str, Any]:
    """A run of {stage: (rounds, tasks)}, judged by `task`; the last stage's tasks are tested."""
    config = Config(recipe="mixed", tasks=TASKS, evaluation=Evaluation(task=task, metric=metric))
    result: dict[str, Any] = {**sample(), "recipe": "mixed", "stages": []}
    result["config"]["evaluation"] = {"task": task, "metric": metric}
    for name, (count, of) in stages.items():
        rounds: list[dict[str, Any]] = []
        for r in range(count + 1):
            replies = {
                c: {"loss": 1 / (1 + r), "scans": 40, "steps": 4, "seconds": 2.0, "accepted": True, "reason": ""} for c in CENTRES if r
            }
            entry = {"round": r, "seconds": 2.0, "bytes_up": 1, "bytes_down": 1, "weights": {}, "effective": {}, "centres": replies}
            rounds.append({**entry, "val": tables.table(answered(r, 0.3 * r), config, of)})
        value = tables.chosen(rounds[-1]["val"], config.evaluation)
        result["stages"].append({"name": name, "rounds": rounds, "best": {"stage": name, "round": count, "value": value}})
    result["test"] = tables.table(answered(99, 1.5), config, of, with_sums=True)
    return result


def test_each_kind_of_task_has_its_columns_and_its_figure(tmp_path: Path) -> None:
    result = mixed({"moco": (2, ["moco"]), "main": (3, [task for task in TASKS if task != "moco"])}, "lesion", "dice")
    got = page(result, tmp_path)
    lesion, brixia = result["test"]["lesion"], result["test"]["brixia"]
    heads = [row for row in got.rows if row[0] == "centre" and "scans" in row]
    assert any({"Dice", "Dice where affected", "Spearman's rho", "loss"} <= set(row) and "ROC-AUC" not in row for row in heads)
    assert any({"mean absolute error", "R²", "Pearson's r"} <= set(row) and "Dice" not in row for row in heads)
    assert f"{lesion['macro']['dice']:.3f}" in got.text
    assert f"{brixia['pooled']['rmse']:.3f}" in got.text
    assert "Nothing to score at south." in got.text
    assert "Nothing to score at south, west." in got.text
    titles = {str(attrs.get("aria-label")) for _, attrs in got.elements if attrs.get("class") == "plot"}
    for task, label in (("moco", "loss"), ("lesion", "Dice"), ("brixia", "R²"), ("covid", "ROC-AUC"), ("finding", "balanced accuracy")):
        assert f"{task}: {label} on validation; mean of centres bold" in titles
    dice = f"{result['stages'][1]['best']['value']:.3f}"
    assert ["moco", "moco", "2", "round 2", "–"] in got.rows
    assert ["main", "covid, finding, brixia, lesion", "3", "round 3", dice] in got.rows
    shown = printed(result)
    assert "lesion, test" in shown
    assert "Dice aff." in shown
    assert f"{lesion['centres']['west']['spearman']:.3f}" in shown


@pytest.mark.parametrize(
    ("stages", "first"),
    [
        ({"main": (2, ["covid"]), "last": (2, ["brixia", "finding"])}, "R² of brixia"),
        ({"main": (1, ["covid"]), "last": (0, ["moco"])}, "loss of moco"),
        ({"passed over": (0, ["covid"]), "main": (1, ["lesion"])}, "Dice of lesion"),
    ],
)
def test_the_last_stage_need_not_have_the_task_that_chooses(tmp_path: Path, stages: dict[str, Any], first: str) -> None:
    result = mixed(stages)
    assert result["stages"][-1]["best"]["value"] is None
    for tested in (True, False):
        if not tested:
            del result["test"]
        got = page(result, tmp_path)
        assert (f"{first} on the test scans, after round {stages[[*stages][-1]][0]} of {[*stages][-1]}." in got.text) == tested
        printed(result)
        side_by_side({"a": result, "b": sample()})


def test_a_stage_that_was_passed_over_is_shown_as_such(tmp_path: Path) -> None:
    result = sample()
    result["stages"].insert(0, {"name": "skipped", "rounds": [], "best": {}})
    assert ["skipped", "", "0", "–", "–"] in page(result, tmp_path).rows
