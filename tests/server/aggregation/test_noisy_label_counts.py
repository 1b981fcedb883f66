"""Decisions from noisy label counts: none depends on whether a noisy count happens to be 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.config.compose import compose_config
from common.privacy.count_noise import count_noise_std, estimate_counts
from common.protocol.messages import JoinReply
from server.aggregation.aggregate import weigh_centres
from server.aggregation.label_counts import (
    count_labels,
    global_label_counts,
    participating_centres,
    secure_sum_weights,
    total_label_weights,
)
from server.rounds.membership import check_labelled_scans
from server.rounds.run_lifecycle import open_ledger
from server.run.run_state import NoLabelledScans, Run
from tests.in_process_federation import InProcess

PRIVATE = ["privacy=patient", "stage.tasks=[covid]", "federation.centres=[a,b,c,d]"]


def make_run(folder: Path, cells: list[float], *overrides: str) -> Run:
    """Return a run of four centres that all sent these counts; `d` has no column for the task."""
    config = compose_config(["federation=folder", *PRIVATE, *overrides])
    run = Run("r", config, folder, InProcess([]), open_ledger(folder))
    for centre in config.federation.centres:
        columns = [] if centre == "d" else ["covid"]
        run.membership.members[centre] = JoinReply(centre, [centre], "", [centre], columns, {}, {}, {}, "cpu")
        for split in ("train", "val", "test"):
            run.membership.label_counts[f"{centre}/{split}/covid"] = np.array([*cells, 0.0])
    return run


@pytest.mark.parametrize("privacy", [[], ["privacy.secagg.scope=model"]])
@pytest.mark.parametrize("tau", ["aggregation.tau=0", "aggregation.tau=1"])
def test_run_whose_noisy_counts_are_all_zero_trains_as_any_other(
    tmp_path: Path, tau: str, privacy: list[str]
) -> None:
    run = make_run(tmp_path, [0.0, 0.0], tau, *privacy)
    stage = run.config.stages["main"]
    check_labelled_scans(run)
    centres, mean_scans = participating_centres(run, stage)
    assert centres == ["a", "b", "c"]  # who has the column says so itself
    assert mean_scans > 0
    assert min(global_label_counts(run)["covid"]) > 0
    assert total_label_weights(run, stage)["covid"] > 0
    weights = secure_sum_weights(run, stage, centres)
    for group in ("backbone", "covid"):
        assert weights[group] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    weights = weigh_centres(run, stage, ["a", "b", "c", "d"])
    assert weights["covid"] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3, "d": 0.0})


def test_noisy_counts_weigh_at_least_the_noise_and_large_ones_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path, [1.0, 900.0])
    std = count_noise_std(run.config)
    assert std == 5.0
    assert count_labels(run, "a", "covid").tolist() == [std, 900.0, std]
    assert count_labels(run, "d", "covid")[:-1].tolist() == [0.0, 0.0]
    assert global_label_counts(run)["covid"] == [3 * std, 2700.0]


def test_held_out_centre_has_no_noisy_training_scans(tmp_path: Path) -> None:
    run = make_run(tmp_path, [3.0, 40.0], "federation.held_out_centres=[b]")
    assert count_labels(run, "b", "covid")[:-1].sum() == 0
    assert participating_centres(run, run.config.stages["main"]).centres == ["a", "c"]


def test_exact_counts_are_taken_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.0, 0.0], "privacy=none")
    assert estimate_counts([0.0, 2.0], run.config).tolist() == [0.0, 2.0]
    assert global_label_counts(run)["covid"] == [0.0, 0.0]
    with pytest.raises(NoLabelledScans):
        check_labelled_scans(run)
    with pytest.raises(NoLabelledScans):
        participating_centres(run, run.config.stages["main"])


def test_noisy_counts_of_a_secure_sum_are_estimates_too(tmp_path: Path) -> None:
    hidden = ["privacy.secagg.scope=all", "evaluation.reduction=pooled"]
    run = make_run(tmp_path, [0.0, 0.0], *hidden)
    run.membership.label_counts = {"all/train/covid": np.array([0.0, 30.0, 0.0])}
    assert global_label_counts(run)["covid"] == [5.0, 30.0]
    check_labelled_scans(run)
    assert participating_centres(run, run.config.stages["main"]).centres == ["a", "b", "c", "d"]
