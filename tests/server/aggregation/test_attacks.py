"""The simulated attacks work, so that the benchmark measures defences; SECURITY.md names existing tests."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.attacks import Hostile, add_backdoor, infer_membership, psnr, ssim, stamp_trigger
from tests.benchmarks.attack_leaks import measure_inversion
from tests.in_process_federation import phantom_config

ROOT = Path(__file__).resolve().parents[3]


def test_security_md_names_tests_and_files_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named_tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named_tests) > 20
    for file, test in named_tests:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("overrides", "is_accepted"),
    [
        ([], False),
        (["aggregation.max_norm_ratio=1e9"], True),
        (["aggregation.max_norm_ratio=1e9", "aggregation.robust_rule=trimmed_mean"], True),
    ],
)
def test_norm_screening_rejects_scaled_update(
    tmp_path: Path, overrides: list[str], is_accepted: bool
) -> None:
    config = phantom_config(
        tmp_path / "data",
        "aggregation.compression=fp32",
        "backbone.norm=group",
        "stage.tasks=[covid]",
        "stage.rounds=1",
        "federation.quorum=0.5",
        *overrides,
    )
    result = start_run(config, Hostile(4, "scaling"), tmp_path, open_ledger(tmp_path), "r")
    centre_rounds = result.stages[0].rounds[1].centres
    assert centre_rounds["east"].norm > 20 * centre_rounds["north"].norm
    assert centre_rounds["east"].accepted == is_accepted


def test_the_back_door_adds_a_stamped_copy_of_every_scan_with_covid() -> None:
    slices = [np.full((2, 10, 10), k, np.uint8) for k in range(3)]
    dataset = add_backdoor(ScanDataset(slices, {"covid": np.array([1.0, 0.0, 1.0])}, ["a"] * 3))
    assert dataset.targets["covid"].tolist() == [1, 0, 1, 0, 0]
    np.testing.assert_array_equal(dataset.slices[3], stamp_trigger(slices[0]))
    assert (dataset.slices[4][:, :2, :2] == 255).all()
    assert (dataset.slices[4][:, 2:, 2:] == 2).all()


def test_membership_inference_succeeds_on_models_that_memorise_and_on_no_others() -> None:
    rng = np.random.default_rng(1)
    is_member = np.stack([rng.permutation(12) < 6 for _ in range(100)], axis=1)
    noise = rng.normal(size=is_member.shape)
    assert infer_membership(noise + 2 * is_member, is_member)[0] > 0.8
    assert infer_membership(noise, is_member)[0] == pytest.approx(0.5, abs=0.06)


def test_similarity_measures_rank_equal_flipped_and_shifted_images() -> None:
    image = torch.rand(32, 32, generator=torch.Generator().manual_seed(1))
    assert ssim(image, image) == pytest.approx(1)
    assert psnr(image, image) > 100
    assert ssim(image, image.flip(0)) < 0.3
    assert psnr(image, image + 0.1) == pytest.approx(20, abs=0.01)


def test_gradient_inversion_recovers_a_scan_from_a_plain_update_and_not_from_a_private_one() -> None:
    plain = measure_inversion(1, "none")
    private = measure_inversion(1, "patient, epsilon 8")
    assert plain["ssim"] > 0.9
    assert private["ssim"] < 0.2
    assert private["psnr"] < private["flat"] < plain["psnr"]  # worse than a flat grey image
