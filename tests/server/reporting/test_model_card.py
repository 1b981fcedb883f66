"""The model card: the result's numbers and warnings, in Markdown that no name can break, and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from server.reporting.model_card import CardInput, render_card_html, render_card_markdown
from server.run.records import ImageStatistic, RunResult
from tests.server.reporting.made_up_results import CENTRES, make_result
from tests.server.reporting.report_page import Page

LUNG_AREA = ImageStatistic(
    name="lung area",
    unit="fraction",
    bin_edges=[0.0, 0.5, 1.0],
    scans={"north": 10.0, "east": 10.0},
    centres={"north": [1.0, 0.0], "east": [0.0, 1.0]},
    drift={"north": 1.0, "east": 1.0},
)


def make_composed_result(centres: Sequence[str] = CENTRES, overrides: Sequence[str] = ()) -> RunResult:
    """Return a made-up result with a whole configuration and image statistics."""
    result = make_result(centres)
    result.config = config_to_dict(compose_config([f"federation.centres={list(CENTRES)}", *overrides]))
    result.image_statistics = {"lung_area": LUNG_AREA}
    return result


def test_card_reports_numbers_and_warnings() -> None:
    result = make_composed_result()
    text = render_card_markdown(CardInput(result, "4ac5b058", "ab" * 32))
    scores = result.test["covid"]
    worst = scores.worst["auc"]
    assert f"Worst centre: {worst.centre}, ROC-AUC {worst.value:.3f}" in text
    assert "- At south ROC-AUC is undefined: one class only" in text  # never a number
    assert f"| {scores.centres['north'].metrics['auc']:.3f} |" in text
    assert "code 4ac5b058" in text
    assert "abababab" in text
    assert "no differential privacy" in text
    assert "Contributions of east, west were left out" in text
    assert "Output `covid`" in text
    assert "Output `source`" not in text  # its head is used in training only


def test_card_has_the_tables_of_the_report() -> None:
    page = Page(render_card_html(render_card_markdown(CardInput(make_composed_result()))))
    assert "338" in page.find_row("north", min_cells=6)
    assert any(row[:2] == ["north", "1.00"] for row in page.rows)  # drift


def test_card_states_the_privacy_settings() -> None:
    differentially_private = ["privacy=patient", "privacy.epsilon=3"]
    text = render_card_markdown(CardInput(make_composed_result(overrides=differentially_private)))
    assert "differentially private at each hospital" in text
    assert "Secure aggregation" not in text
    secure = render_card_markdown(CardInput(make_composed_result(overrides=["privacy=secagg"])))
    assert "Secure aggregation" in secure
    central = render_card_markdown(CardInput(make_composed_result(overrides=["privacy=central"])))
    assert "the unit is the hospital" in central


def test_hostile_names_stay_text() -> None:
    evil = "<img src=x onerror=alert(1)>|`x`"
    result = make_composed_result((evil, "east", "south", "west"), ["privacy=patient", "privacy.epsilon=3"])
    result.image_statistics = {}
    result.stages[-1].rounds[-1].centres[evil].epsilon = 2.5
    page = Page(render_card_html(render_card_markdown(CardInput(result))))
    assert not {tag for tag, _ in page.elements} & {"img", "script"}
    assert any(row[:2] == [evil, "2.50"] for row in page.rows)
