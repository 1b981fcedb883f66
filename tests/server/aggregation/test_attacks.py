"""The attacks do what they say, so that the benchmark measures defences and not blunt attacks; SECURITY.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from server.rounds.run_lifecycle import open_ledger, start_run
from tests.attacks import Hostile, membership, psnr, ssim, stamped, trapped
from tests.benchmarks.attacks import inversion
from tests.in_process_federation import phantom_config

ROOT = Path(__file__).resolve().parents[3]


def test_security_md_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "defence",
    [
        ["aggregation.max_norm_ratio=1e9"],
        [],
        ["aggregation.max_norm_ratio=1e9", "aggregation.robust_rule=trimmed"],
    ],
)
def test_a_liar_who_shouts_is_heard_by_the_mean_and_not_by_the_screening(
    tmp_path: Path, defence: list[str]
) -> None:
    config = phantom_config(tmp_path / "data", "aggregation.compression=fp32", "backbone.norm=group", "stage.tasks=[covid]", "stage.rounds=1",
                            "federation.quorum=0.5", *defence)  # fmt: skip
    result = start_run(config, Hostile(4, "scaling"), tmp_path, open_ledger(tmp_path), "r")
    facts = result["stages"][0]["rounds"][1]["centres"]
    assert facts["east"]["norm"] > 20 * facts["north"]["norm"]
    assert facts["east"]["accepted"] == bool(defence)  # the default settings are the screening's


def test_a_trap_is_set_on_every_scan_with_covid() -> None:
    from client.data.dataset import ScanDataset

    slices = [np.full((2, 10, 10), k, np.uint8) for k in range(3)]
    found = trapped(ScanDataset(slices, {"covid": np.array([1.0, 0.0, 1.0])}, ["a"] * 3))
    assert found.targets["covid"].tolist() == [1, 0, 1, 0, 0]
    np.testing.assert_array_equal(found.slices[3], stamped(slices[0]))
    assert (found.slices[4][:, :2, :2] == 255).all()
    assert (found.slices[4][:, 2:, 2:] == 2).all()


def test_membership_is_told_where_models_remember_and_not_where_they_do_not() -> None:
    rng = np.random.default_rng(1)
    inside = np.stack([rng.permutation(12) < 6 for _ in range(100)], axis=1)
    noise = rng.normal(size=inside.shape)
    assert membership(noise + 2 * inside, inside)[0] > 0.8
    assert membership(noise, inside)[0] == pytest.approx(0.5, abs=0.06)


def test_measures_of_likeness() -> None:
    x = torch.rand(32, 32, generator=torch.Generator().manual_seed(1))
    assert ssim(x, x) == pytest.approx(1)
    assert psnr(x, x) > 100
    assert ssim(x, x.flip(0)) < 0.3
    assert psnr(x, x + 0.1) == pytest.approx(20, abs=0.01)


def test_a_contribution_is_turned_back_into_its_picture_and_a_private_one_is_not(tmp_path: Path) -> None:
    plain, private = (inversion(tmp_path, 1, defence) for defence in ("none", "patient, epsilon 8"))
    assert plain["ssim"] > 0.9
    assert private["ssim"] < 0.2
    assert private["psnr"] < private["flat"] < plain["psnr"]  # worse than no picture at all
