"""Noise on counts and histograms: what one patient can change, how much noise, what it costs, and a run that spends no more than was asked."""

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
from client.federation.noisy_counts import (
    add_noise,
    cap_scans_per_patient,
    planned_answers,
    project_non_negative,
)
from client.federation.query_handlers import QueryContext, sum_label_counts
from common.config.compose import compose_config
from common.config.schema import Config
from common.privacy.accountant import solve_noise_multiplier
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

PRIVATE = compose_config(
    [
        "privacy=patient",
        "privacy.query_noise_multiplier=4",
        "privacy.max_scans_per_patient=2",
        "evaluation.histogram_bins=16",
    ]
)
PATIENTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30
)


def scans_of(rows: list[tuple[int, int, int]]) -> ScanDataset:
    """(patient, covid, split is val)."""
    targets = {"covid": np.array([float(r[1]) for r in rows]), "source": np.full(len(rows), np.nan)}
    return ScanDataset(
        [np.zeros((1, 2, 2), np.uint8)] * len(rows),
        targets,
        ["north"] * len(rows),
        patient_ids=[str(r[0]) for r in rows],
    )


def exact(rows: list[tuple[int, int, int]], config: Config) -> np.ndarray:
    scans = cap_scans_per_patient(scans_of(rows), config.privacy.max_scans_per_patient)
    stage = config.stages["main"]
    found = sum_label_counts(
        QueryContext({"train": scans}, "train", config, stage, None, "", 1, torch.device("cpu"))
    )
    return np.concatenate([found[k] for k in sorted(found)]) if found else np.zeros(0)


@settings(deadline=None)
@given(PATIENTS)
def test_one_patient_changes_an_answer_by_the_bound_at_most(rows: list[tuple[int, int, int]]) -> None:
    config = replace(
        PRIVATE,
        tasks={
            t: replace(task, classes=["a", "b"] if t == "source" else []) for t, task in PRIVATE.tasks.items()
        },
    )
    bound = config.privacy.max_scans_per_patient * math.sqrt(len(config.tasks))
    whole = exact(rows, config)
    for patient in {r[0] for r in rows}:
        without = exact([r for r in rows if r[0] != patient], config)
        assert np.linalg.norm(whole - (without if len(without) else 0)) <= bound + 1e-9


def test_the_noise_has_its_scale_on_every_cell() -> None:
    scale = 4 * 2 * math.sqrt(len(PRIVATE.tasks))
    cells = np.full(20_000, 1e6)
    found = add_noise({"north/train/covid": cells}, PRIVATE, "counts", 1)["north/train/covid"]
    assert (found - cells).std() == pytest.approx(scale, rel=0.05)
    rows = add_noise(
        {"north/covid/hist": np.full((2, 20_000), 1e6), "north/covid/loss": np.array([7.0, 3.0])},
        PRIVATE,
        "scores",
        1,
    )
    assert (rows["north/covid/hist"] - 1e6).std() == pytest.approx(scale, rel=0.05)
    assert rows["north/covid/loss"].tolist() == [0, 0]
    few = add_noise({"north/train/covid": np.zeros(1000)}, PRIVATE, "counts", 5)["north/train/covid"]
    assert not ((few > 0) & (few < 5)).any()  # suppression stays, after the noise


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_cells_are_the_nearest_that_are_not_below_zero(cells: list[float]) -> None:
    x = np.array(cells)
    found, total = project_non_negative(x), max(x.sum(), 0.0)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(total, abs=1e-6)
    less = (
        x - found
    )  # the same everywhere but where it was cut off, and there no more (the conditions of a least-squares optimum)
    if (found > 1e-9).any():
        assert np.ptp(less[found > 1e-9]) < 1e-6
        assert (less[found <= 1e-9] <= less[found > 1e-9].max() + 1e-6).all()


def test_the_answers_are_planned_for() -> None:
    plain, both = (
        solve_noise_multiplier(8, 1e-5, ((0.2, 60),)),
        solve_noise_multiplier(8, 1e-5, ((0.2, 60),), ((10.0, 1.0, planned_answers(PRIVATE)),)),
    )
    assert planned_answers(PRIVATE) == 2 + 11
    assert both > plain
    with pytest.raises(ConsiliumError, match="the answers of a run alone cost an epsilon of"):
        solve_noise_multiplier(3, 1e-5, ((0.2, 60),), ((1.0, 1.0, 13),))
    with pytest.raises(
        ConsiliumError,
        match=r"privacy.query_noise_multiplier is 4.0; it must be 0.3 to 1000 with privacy=patient",
    ):
        compose_config(["privacy.query_noise_multiplier=4"])
    with pytest.raises(ConsiliumError, match="sums that one patient can change without bound"):
        compose_config(
            [
                "privacy=patient",
                "privacy.query_noise_multiplier=4",
                "recipe=triage",
                "stage.sampling_ratios={}",
            ]
        )


def test_a_run_spends_what_was_asked_and_a_policy_may_want_more(tmp_path: Path) -> None:
    more = [
        "privacy=patient",
        "privacy.epsilon=8",
        "privacy.query_noise_multiplier=15",
        "evaluation.histogram_bins=16",
        "stage.rounds=1",
        "stage.tasks=[covid]",
    ]
    config = phantom_config(tmp_path / "data", *more, "federation.quorum=0.5")
    (tmp_path / "policy.yaml").write_text("min_query_noise: 20\n")
    nodes = [replace(site, state=str(tmp_path / f"state{i}")) for i, site in enumerate(sites())]
    nodes[3] = replace(nodes[3], policy=str(tmp_path / "policy.yaml"))
    result = start_run(config, InProcess(nodes), tmp_path, open_ledger(tmp_path), "r")
    assert result["status"] == "finished"
    spent = json.loads((tmp_path / "state0" / "budget" / "spent.json").read_text())["charges"]
    assert [c["noise"] for c in spent].count(15.0) == planned_answers(config) == 4
    rounds = result["stages"][0]["rounds"][1]["centres"]
    assert 0 < rounds["north"]["epsilon"] <= 8
    assert not (tmp_path / "state3" / "budget" / "spent.json").exists()
    assert any("requires noise of 20 on counts and scores" in str(o["reason"]) for o in result["left_out"])
