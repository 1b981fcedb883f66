"""The report, from a result with every part, with few parts, and with hostile names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.reporting.numbered_rounds import NumberedRound
from server.reporting.report import MAX_FIGURE_POINTS, downsample_rounds, write_report
from server.reporting.terminal_tables import build_comparison_table
from server.run.records import (
    BestRound,
    RoundRecord,
    RunResult,
    StageRecord,
    parse_result,
    result_to_dict,
)
from tests.server.reporting.made_up_results import CENTRES, TASKS, make_mixed_result, make_result
from tests.server.reporting.report_page import Page
from tests.server.reporting.test_terminal_tables import print_result

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&[bold]{{ 7*7 }}"


def render_page(result: RunResult, folder: Path) -> Page:
    """Write the report of a result that was saved as metrics.json and read again."""
    saved = parse_result(json.loads(json.dumps(result_to_dict(result))))
    write_report(folder / "report.html", saved)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_report_shows_the_results_numbers(tmp_path: Path) -> None:
    result = make_result()
    page = render_page(result, tmp_path)
    covid = result.test["covid"]
    for metrics in (covid.macro, covid.pooled, covid.spread):
        assert f"{metrics['auc']:.3f}" in page.text
    worst = covid.worst["auc"]
    (row,) = [row for row in page.rows if row[0] == "worst centre" and len(row) > 8]
    assert f"{worst.value:.3f} {worst.centre}" in row
    row = page.find_row("north")
    assert row[1] == "60"
    assert row[3] == f"{covid.centres['north'].metrics['auc']:.3f}"
    assert ["main", "3", "east", "no reply before the round timeout of 60 s"] in page.rows
    assert "Resumed once" in page.text
    assert "tau: 1.0" in page.text
    assert "finished" in page.text


def test_report_draws_every_figure(tmp_path: Path) -> None:
    page = render_page(make_result(), tmp_path)
    figures = json.loads(page.scripts[1])
    roc_and_calibration, tasks_and_loss, groups_and_effective_number, time_and_traffic = 2, 3, 4, 2
    assert len(figures) == (
        roc_and_calibration + tasks_and_loss + groups_and_effective_number + time_and_traffic
    )
    plots = {attributes["id"] for _, attributes in page.elements if attributes.get("class") == "plot"}
    assert plots == set(figures)


def test_undefined_metric_is_never_a_number(tmp_path: Path) -> None:
    page = render_page(make_result(), tmp_path)
    assert page.find_row("south")[3] == "undefined: one class only"
    undefined = "south: ROC-AUC, F1, sensitivity, precision, balanced accuracy, G-mean undefined"
    assert f"{undefined}: one class only (no positive scan among 60)." in page.text
    roc = next(iter(json.loads(page.scripts[1]).values()))
    names = {trace.get("name") for trace in roc["data"]}
    assert names == {None, "north", "east", "west", "pooled"}  # the diagonal has no name
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


def test_report_loads_nothing(tmp_path: Path) -> None:
    page = render_page(make_result(), tmp_path)
    policies = []
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        if attributes.get("http-equiv") == "Content-Security-Policy":
            policies.append(str(attributes["content"]))
    assert any("default-src 'none'" in policy for policy in policies)
    assert "@import" not in page.text
    assert len(page.scripts) == 3


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    result = make_result((EVIL, "a" * 120, "south", "west"))
    result.notes.append(EVIL)
    result.run_id = EVIL
    result.left_out[0].reason = EVIL
    result.stages[0].name = EVIL
    page = render_page(result, tmp_path)
    assert len(page.scripts) == 3
    assert "img" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(EVIL) >= 9
    # Plotly interprets a little HTML, so its texts are escaped once more.
    texts = []
    for figure in json.loads(page.scripts[1]).values():
        for shown in (*figure["data"], *figure["layout"].get("annotations", [])):
            texts += [str(shown.get("name")), str(shown.get("text"))]
    assert any("&lt;/script&gt;" in text for text in texts)
    assert not any("<img" in text for text in texts)
    assert "[bold]" in print_result(result, width=2000)


@pytest.mark.parametrize(
    ("field", "empty"),
    [
        ("test", {}),
        ("stages", []),
        ("centres", {}),
        ("config", {}),
        ("left_out", []),
        ("notes", []),
        ("seconds", 0.0),
        ("started", ""),
    ],
)
def test_missing_part_is_left_out(tmp_path: Path, field: str, empty: Any) -> None:
    result = replace(make_result(), **{field: empty})
    page = render_page(result, tmp_path)
    print_result(result)
    if field == "test":
        assert "There are no test results" in page.text
        assert "covid, validation" in print_result(result)


def test_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    result = RunResult("r1", "multisource", "local", 1, "", config={}, notes=["No centre appeared."])
    page = render_page(result, tmp_path)
    assert "No centre appeared." in page.text
    assert json.loads(page.scripts[1]) == {}
    print_result(result)


def test_many_centres_have_different_lines(tmp_path: Path) -> None:
    result = make_result(tuple(f"centre {index:02d}" for index in range(24)))
    page = render_page(result, tmp_path)
    figure = json.loads(page.scripts[1])["figure2"]
    looks = {(trace["line"]["color"], trace["line"]["dash"]) for trace in figure["data"] if "meta" in trace}
    assert len(looks) == 23  # of 24, one of which has no AUC
    assert sum(tag == "button" for tag, _ in page.elements) == 24


def test_long_curves_keep_the_ends_of_each_stage() -> None:
    rounds = []
    for number in range(1, 2001):
        stage = "first" if number <= 701 else "second"
        rounds.append(NumberedRound(number, stage, number, RoundRecord(number)))
    chosen, step = downsample_rounds(rounds, 100)
    assert step == 20
    assert {1, 701, 702, 2000} <= {entry.number for entry in chosen}
    assert 100 * len(chosen) < 1.1 * MAX_FIGURE_POINTS
    assert downsample_rounds(rounds[:150], 4) == (rounds[:150], 1)
    assert downsample_rounds([], 0) == ([], 1)


def test_each_centre_may_have_its_own_best_round(tmp_path: Path) -> None:
    result = make_result()
    stage = result.stages[-1]
    stage.best = None
    stage.best_by_centre = {name: BestRound("main", index, 0.8) for index, name in enumerate(CENTRES)}
    page = render_page(result, tmp_path)
    assert "after each centre's own best round of main" in page.text
    assert page.find_row("main", 5)[3] == "each centre's own best"


# ---- stages of different tasks, centres with different labels


def test_each_task_type_has_its_columns_and_figure(tmp_path: Path) -> None:
    supervised = [task for task in TASKS if task != "moco"]
    result = make_mixed_result({"moco": (2, ["moco"]), "main": (3, supervised)}, "lesion", "dice")
    page = render_page(result, tmp_path)
    headings = [set(row) for row in page.rows if row[0] == "centre" and "scans" in row]
    segmentation = {"Dice", "Dice where affected", "Spearman's rho", "loss"}
    assert any(segmentation <= names and "ROC-AUC" not in names for names in headings)
    regression = {"mean absolute error", "R²", "Pearson's r"}
    assert any(regression <= names and "Dice" not in names for names in headings)
    lesion, brixia = result.test["lesion"], result.test["brixia"]
    assert f"{lesion.macro['dice']:.3f}" in page.text
    assert f"{brixia.pooled['rmse']:.3f}" in page.text
    assert "Nothing to score at south." in page.text
    assert "Nothing to score at south, west." in page.text
    titles = {
        str(attributes["aria-label"]) for _, attributes in page.elements if attributes.get("class") == "plot"
    }
    for task, label in (
        ("moco", "loss"),
        ("lesion", "Dice"),
        ("brixia", "R²"),
        ("covid", "ROC-AUC"),
        ("finding", "balanced accuracy"),
    ):
        assert f"{task}: {label} on validation; mean of centres bold" in titles
    best = result.stages[1].best
    assert best is not None
    assert ["moco", "moco", "2", "round 2", "–"] in page.rows
    assert ["main", "covid, finding, brixia, lesion", "3", "round 3", f"{best.value:.3f}"] in page.rows
    shown = print_result(result)
    assert "lesion, test" in shown
    assert "Dice aff." in shown
    assert f"{lesion.centres['west'].metrics['spearman']:.3f}" in shown


@pytest.mark.parametrize(
    ("stages", "headline"),
    [
        ({"main": (2, ["covid"]), "last": (2, ["brixia", "finding"])}, "R² of brixia"),
        ({"main": (1, ["covid"]), "last": (0, ["moco"])}, "loss of moco"),
        ({"passed over": (0, ["covid"]), "main": (1, ["lesion"])}, "Dice of lesion"),
    ],
)
def test_last_stage_may_lack_the_task_that_selects(
    tmp_path: Path, stages: dict[str, Any], headline: str
) -> None:
    result = make_mixed_result(stages)
    last = result.stages[-1]
    assert last.best is not None
    assert last.best.value is None
    sentence = f"{headline} on the test scans, after round {last.best.round} of {last.name}."
    assert sentence in render_page(result, tmp_path).text
    result.test = {}
    assert sentence not in render_page(result, tmp_path).text
    print_result(result)
    build_comparison_table({"a": result, "b": make_result()})


def test_stage_without_rounds_is_shown_as_such(tmp_path: Path) -> None:
    result = make_result()
    result.stages.insert(0, StageRecord("skipped"))
    assert ["skipped", "", "0", "–", "–"] in render_page(result, tmp_path).rows
