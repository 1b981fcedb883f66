"""Noise on counts and histograms: what a patient can change, how much noise there is, and what it costs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.dataset import ScanDataset
from client.federation.label_counts import sum_label_counts
from client.federation.noisy_counts import (
    add_count_noise,
    add_score_noise,
    cap_scans_per_patient,
    planned_charges,
    project_non_negative,
)
from client.federation.query_context import QueryContext
from common.config.compose import compose_config
from common.config.schema import Config
from common.privacy.accountant import Charge, solve_noise_multiplier
from common.privacy.count_noise import count_noise_std
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunStatus
from tests.in_process_federation import InProcess, phantom_config, sites

PRIVATE = compose_config(
    [
        "privacy=patient",
        "privacy.query_noise_multiplier=4",
        "privacy.max_scans_per_patient=2",
        "evaluation.histogram_bins=16",
    ]
)
ScanRow = tuple[int, int]  # patient, covid
SCAN_ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=30)


def make_dataset(rows: list[ScanRow]) -> ScanDataset:
    covid = np.array([float(label) for _, label in rows])
    return ScanDataset(
        [np.zeros((1, 2, 2), np.uint8)] * len(rows),
        {"covid": covid, "source": np.full(len(rows), np.nan)},
        ["north"] * len(rows),
        patient_ids=[str(patient) for patient, _ in rows],
    )


def count_exactly(rows: list[ScanRow], config: Config) -> np.ndarray:
    """Return all cells of the counts without noise; zero when there is no scan."""
    dataset = cap_scans_per_patient(make_dataset(rows), config.privacy.max_scans_per_patient)
    query = QueryContext(
        datasets={"train": dataset},
        split="train",
        config=config,
        stage=config.stages["main"],
        device=torch.device("cpu"),
    )
    sums = sum_label_counts(query)
    return np.concatenate([sums[key] for key in sorted(sums)]) if sums else np.zeros(1)


@settings(deadline=None)
@given(SCAN_ROWS)
def test_one_patient_changes_the_counts_by_the_bound_at_most(rows: list[ScanRow]) -> None:
    source = replace(PRIVATE.tasks["source"], classes=["a", "b"])
    covid = replace(PRIVATE.tasks["covid"], classes=[])
    config = replace(PRIVATE, tasks={**PRIVATE.tasks, "covid": covid, "source": source})
    bound = config.privacy.max_scans_per_patient * math.sqrt(len(config.tasks))
    counts = count_exactly(rows, config)
    for patient in {patient for patient, _ in rows}:
        others = [row for row in rows if row[0] != patient]
        assert np.linalg.norm(counts - count_exactly(others, config)) <= bound + 1e-9


def test_every_cell_gets_noise_of_the_right_scale() -> None:
    scale = 2 * math.sqrt(len(PRIVATE.tasks))
    cells = np.full(20_000, 1e6)
    noisy = add_count_noise({"north/train/covid": cells}, PRIVATE, 1)["north/train/covid"]
    assert (noisy - cells).std() == pytest.approx(5 * scale, rel=0.05)
    scores = {"north/covid/hist": np.full((2, 20_000), 1e6), "north/covid/loss": np.array([7.0, 3.0])}
    noisy_scores = add_score_noise(scores, PRIVATE)
    assert (noisy_scores["north/covid/hist"] - 1e6).std() == pytest.approx(4 * scale, rel=0.05)
    assert noisy_scores["north/covid/loss"].tolist() == [0, 0]


def test_every_row_and_cell_has_noise_of_its_own_and_is_a_whole_number() -> None:
    exact = np.full((3, 5000), 1e6)
    noisy = add_score_noise({"north/source/confusion": exact}, PRIVATE)["north/source/confusion"] - exact
    assert np.array_equal(noisy, np.rint(noisy))
    assert min(row.std() for row in noisy) > 0.9 * 4 * 2 * math.sqrt(len(PRIVATE.tasks))
    assert np.abs(np.corrcoef(noisy) - np.eye(3)).max() < 0.1
    counts = add_count_noise({f"north/{s}/covid": np.full(5000, 1e6) for s in ("train", "val")}, PRIVATE, 1)
    train, val = (cells - 1e6 for cells in counts.values())
    assert np.array_equal(train, np.rint(train))
    assert abs(np.corrcoef(train, val)[0, 1]) < 0.1


def test_counts_have_the_noise_of_scores_where_that_is_larger() -> None:
    louder_scores = replace(PRIVATE, privacy=replace(PRIVATE.privacy, query_noise_multiplier=20.0))
    bound = 2 * math.sqrt(len(PRIVATE.tasks))
    assert count_noise_std(louder_scores) == pytest.approx(20 * bound)
    assert count_noise_std(PRIVATE) == pytest.approx(5 * bound)
    assert count_noise_std(compose_config([])) == 0


def test_only_the_first_scans_of_a_patient_count() -> None:
    dataset = make_dataset([(1, 0), (2, 0), (1, 1), (1, 0), (1, 1), (2, 1)])
    assert cap_scans_per_patient(dataset, 2).patient_ids == ["1", "2", "1", "2"]
    assert cap_scans_per_patient(dataset, 1).patient_ids == ["1", "2"]


def test_small_noisy_counts_are_raised_to_the_smallest_reportable_one() -> None:
    noisy = add_count_noise({"north/train/covid": np.zeros(1000)}, PRIVATE, 5)["north/train/covid"]
    assert not ((noisy > 0) & (noisy < 5)).any()


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_projection_gives_the_nearest_non_negative_cells(values: list[float]) -> None:
    cells = np.array(values)
    projected = project_non_negative(cells)
    assert (projected >= 0).all()
    assert projected.sum() == pytest.approx(max(cells.sum(), 0.0), abs=1e-6)
    # The conditions of a least-squares optimum: the same is subtracted from all cells that stay positive, and
    # no more than that from the others.
    subtracted = cells - projected
    is_positive = projected > 1e-9
    if is_positive.any():
        assert np.ptp(subtracted[is_positive]) < 1e-6
        assert (subtracted[~is_positive] <= subtracted[is_positive].max() + 1e-6).all()


def test_noise_of_training_leaves_room_for_the_planned_answers() -> None:
    assert planned_charges(PRIVATE) == (Charge(5.0, 1.0, 1), Charge(4.0, 1.0, 1 + 11))
    only_counts = replace(PRIVATE, privacy=replace(PRIVATE.privacy, query_noise_multiplier=0.0))
    assert planned_charges(only_counts) == (Charge(5.0, 1.0, 1),)
    louder_scores = replace(PRIVATE, privacy=replace(PRIVATE.privacy, query_noise_multiplier=6.0))
    assert planned_charges(louder_scores)[0] == Charge(
        6.0, 1.0, 1
    )  # counts have the noise of scores at least
    steps = ((0.2, 60),)
    training_alone = solve_noise_multiplier(8, 1e-5, steps)
    assert solve_noise_multiplier(8, 1e-5, steps, (Charge(10.0, 1.0, 13),)) > training_alone
    with pytest.raises(ConsiliumError, match="the run's queries alone cost an epsilon of"):
        solve_noise_multiplier(3, 1e-5, steps, (Charge(1.0, 1.0, 13),))


def test_query_noise_requires_patient_level_privacy_and_bounded_scores() -> None:
    with pytest.raises(
        ConsiliumError,
        match=r"privacy.query_noise_multiplier is 4.0; it must be 0.3 to 1000 with privacy=patient",
    ):
        compose_config(["privacy.query_noise_multiplier=4"])
    unbounded = ["recipe=triage", "stage.sampling_ratios={}"]
    with pytest.raises(ConsiliumError, match="sums that one patient can change without bound"):
        compose_config(["privacy=patient", "privacy.query_noise_multiplier=4", *unbounded])


def test_run_spends_the_requested_epsilon_and_a_policy_may_require_more_noise(tmp_path: Path) -> None:
    overrides = [
        "privacy=patient",
        "privacy.epsilon=8",
        "privacy.query_noise_multiplier=15",
        "evaluation.histogram_bins=16",
        "stage.rounds=1",
        "stage.tasks=[covid]",
        "federation.quorum=0.5",
    ]
    config = phantom_config(tmp_path / "data", *overrides)
    (tmp_path / "policy.yaml").write_text("min_query_noise: 20\n")
    nodes = [replace(site, state=str(tmp_path / f"state{i}")) for i, site in enumerate(sites())]
    nodes[3] = replace(nodes[3], policy=str(tmp_path / "policy.yaml"))
    result = start_run(config, InProcess(nodes), tmp_path, open_ledger(tmp_path), "r")
    assert result.status == RunStatus.FINISHED
    charges = json.loads((tmp_path / "state0" / "budget" / "spent.json").read_text())["charges"]
    assert [charge["noise"] for charge in charges].count(15.0) == 4  # counts, validation twice, test
    epsilon = result.stages[0].rounds[1].centres["north"].epsilon
    assert epsilon is not None
    assert 0 < epsilon <= 8
    assert not (tmp_path / "state3" / "budget" / "spent.json").exists()
    reasons = [exclusion.reason for exclusion in result.left_out]
    assert any("requires noise of 20 on counts and scores" in reason for reason in reasons)
