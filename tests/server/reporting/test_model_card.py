"""The model card: the result's own numbers and warnings, in Markdown that no name can break, and the same as a page."""

from __future__ import annotations

from typing import Any

from common.config.compose import compose_config, config_to_dict
from server.analysis.image_drift import summarise_histograms
from server.reporting.model_card import render_card_html, render_card_markdown
from tests.server.analysis.test_image_drift import SUMS
from tests.server.reporting.made_up_results import CENTRES, sample
from tests.server.reporting.test_report import Page


def result(centres: tuple[str, ...] = CENTRES, *overrides: str) -> dict[str, Any]:
    config = config_to_dict(compose_config([f"federation.centres={list(CENTRES)}", *overrides]))
    return {**sample(centres), "config": config, "quality": summarise_histograms(SUMS)}


def test_the_card_says_what_the_run_found_and_where_it_fails() -> None:
    found = result()
    text = render_card_markdown(found, "4ac5b058", "ab" * 32)
    scores = found["test"]["covid"]
    assert (
        f"Worst centre: {scores['worst']['auc']['centre']}, ROC-AUC {scores['worst']['auc']['value']:.3f}"
        in text
    )
    assert "- At south ROC-AUC is undefined: one class only" in text  # never a number
    assert f"| {scores['centres']['north']['auc']:.3f} |" in text
    assert "code 4ac5b058" in text
    assert "abababab" in text
    assert "no differential privacy" in text
    assert "Contributions of east, west were left out" in text
    assert "Output `covid`" in text
    assert "Output `source`" not in text  # its head serves training only
    rows = Page(render_card_html(text)).rows
    cells = next(row for row in rows if row[0] == "north" and len(row) > 5)
    assert "338" in cells
    assert any(row[0] == "a" and row[1] == "1.00" for row in rows)  # drift


def test_differential_privacy_and_hostile_names() -> None:
    evil = "<img src=x onerror=alert(1)>|`x`"
    found = result((evil, "east", "south", "west"), "privacy=patient", "privacy.epsilon=3")
    found["stages"][-1]["rounds"][-1]["centres"][evil]["epsilon"] = 2.5
    text = render_card_markdown(found)
    assert "differentially private at each hospital" in text
    assert "Secure aggregation" not in text
    shown = Page(render_card_html(text))
    assert not {tag for tag, _ in shown.elements} & {"img", "script", "code "}
    assert any(row[:2] == [evil, "2.50"] for row in shown.rows)
    assert "Secure aggregation" in render_card_markdown(result(CENTRES, "privacy=secagg"))
    assert "the unit is the hospital" in render_card_markdown(result(CENTRES, "privacy=central"))
