"""The report and the terminal's table from a result with every part, with few parts, and with hostile names."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.reporting.report import (
    MAX_FIGURE_POINTS,
    build_comparison_table,
    build_result_table,
    downsample_rounds,
    write_report,
)
from tests.server.reporting.made_up_results import CENTRES, TASKS, mixed, sample


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
    console.print(build_result_table(result))
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
    assert (
        len(figures) == 2 + 3 + 4 + 2
    )  # ROC and calibration; two tasks and the loss; three parts and the effective number; time, traffic
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
        attrs.get("http-equiv") == "Content-Security-Policy" and "default-src 'none'" in str(attrs["content"])
        for _, attrs in got.elements
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
        str(v)
        for f in figures.values()
        for t in (*f["data"], *f["layout"].get("annotations", []))
        for v in (t.get("name"), t.get("text"))
    ]
    assert any("&lt;/script&gt;" in text for text in texts)
    assert not any("<img" in text for text in texts)
    assert "[bold]" in printed(result, width=2000)


@pytest.mark.parametrize(
    "missing", ["test", "stages", "centres", "config", "left_out", "notes", "seconds", "started"]
)
def test_a_part_that_is_missing_is_no_error(tmp_path: Path, missing: str) -> None:
    result = sample()
    del result[missing]
    got = page(result, tmp_path)
    printed(result)
    if missing == "test":
        assert "There are no test results" in got.text
        assert "covid, validation" in printed(result)


def test_a_run_that_failed_at_once_has_a_report(tmp_path: Path) -> None:
    got = page(
        {
            "run": "r1",
            "recipe": "multisource",
            "mode": "local",
            "status": "failed",
            "notes": ["No centre appeared."],
        },
        tmp_path,
    )
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
    kept, step = downsample_rounds(rounds, 100)
    assert step == 20
    assert {1, 701, 702, 2000} <= {i for i, _, _ in kept}
    assert 100 * len(kept) < 1.1 * MAX_FIGURE_POINTS
    assert downsample_rounds(rounds[:150], 4) == (rounds[:150], 1)
    assert downsample_rounds([], 0) == ([], 1)


def test_the_terminal_table_has_a_row_a_centre_and_the_views() -> None:
    lines = printed(sample()).splitlines()
    first = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [name for name in first if name] == [
        *CENTRES,
        "mean of centres",
        "pooled",
        "worst centre",
        "spread",
    ]


def test_runs_side_by_side() -> None:
    results = {"federated": sample(), "local": sample()}
    results["local"]["test"]["covid"]["centres"]["north"]["auc"] = 0.123
    results["central"] = {**sample(), "test": {}}
    console = Console(file=io.StringIO(), width=100)
    console.print(build_comparison_table(results))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    assert [
        "north",
        f"{results['federated']['test']['covid']['centres']['north']['auc']:.3f}",
        "0.123",
        "–",
    ] in cells
    assert next(row for row in cells if row[0] == "south") == ["south", "–", "–", "–"]  # one class
    steps = 4 * sum(len(r["centres"]) for stage in results["local"]["stages"] for r in stage["rounds"])
    assert ["optimiser steps, all centres", *[str(steps)] * 3] in cells


def test_each_centre_may_have_its_own_best(tmp_path: Path) -> None:
    result = sample()
    result["stages"][-1]["best"] = {
        c: {"stage": "main", "round": k, "value": 0.8} for k, c in enumerate(CENTRES)
    }
    assert "after each centre's own best round of main" in page(result, tmp_path).text


# --- stages of different tasks, centres with different labels


def test_each_kind_of_task_has_its_columns_and_its_figure(tmp_path: Path) -> None:
    result = mixed(
        {"moco": (2, ["moco"]), "main": (3, [task for task in TASKS if task != "moco"])}, "lesion", "dice"
    )
    got = page(result, tmp_path)
    lesion, brixia = result["test"]["lesion"], result["test"]["brixia"]
    heads = [row for row in got.rows if row[0] == "centre" and "scans" in row]
    assert any(
        {"Dice", "Dice where affected", "Spearman's rho", "loss"} <= set(row) and "ROC-AUC" not in row
        for row in heads
    )
    assert any(
        {"mean absolute error", "R²", "Pearson's r"} <= set(row) and "Dice" not in row for row in heads
    )
    assert f"{lesion['macro']['dice']:.3f}" in got.text
    assert f"{brixia['pooled']['rmse']:.3f}" in got.text
    assert "Nothing to score at south." in got.text
    assert "Nothing to score at south, west." in got.text
    titles = {str(attrs.get("aria-label")) for _, attrs in got.elements if attrs.get("class") == "plot"}
    for task, label in (
        ("moco", "loss"),
        ("lesion", "Dice"),
        ("brixia", "R²"),
        ("covid", "ROC-AUC"),
        ("finding", "balanced accuracy"),
    ):
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
def test_the_last_stage_need_not_have_the_task_that_chooses(
    tmp_path: Path, stages: dict[str, Any], first: str
) -> None:
    result = mixed(stages)
    assert result["stages"][-1]["best"]["value"] is None
    for tested in (True, False):
        if not tested:
            del result["test"]
        got = page(result, tmp_path)
        assert (
            f"{first} on the test scans, after round {stages[[*stages][-1]][0]} of {[*stages][-1]}."
            in got.text
        ) == tested
        printed(result)
        build_comparison_table({"a": result, "b": sample()})


def test_a_stage_that_was_passed_over_is_shown_as_such(tmp_path: Path) -> None:
    result = sample()
    result["stages"].insert(0, {"name": "skipped", "rounds": [], "best": {}})
    assert ["skipped", "", "0", "–", "–"] in page(result, tmp_path).rows
