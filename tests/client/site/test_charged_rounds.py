"""Rounds at a centre are charged to its privacy budget, and the policy limits what all runs may spend."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.data import loading
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site import privacy_budget
from client.site.config import Site
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import build_layout, get_model_weights
from common.protocol.messages import Refusal, StatisticsRequest, TrainReply, TrainRequest
from common.utils.errors import Refused


@pytest.fixture(scope="module")
def phantom_hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    phantom = PhantomConfig(scale=0.001, num_slices=10, image_size=64)
    return write_centre(tmp_path_factory.mktemp("data"), "north", phantom)


@pytest.fixture
def hospital(phantom_hospital: Path, tmp_path: Path) -> Path:
    return shutil.copytree(phantom_hospital, tmp_path / "north")


def make_config(*overrides: str) -> Config:
    small = [
        "federation=folder",
        "federation.centres=[north]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "stage.batch_size=4",
        "stage.tasks=[covid]",
        "stage.precision=fp32",
        "privacy=patient",
    ]
    return compose_config([*small, *overrides])


def train(
    hospital: Path,
    config: Config,
    round_number: int = 1,
    *,
    run_id: str = "run",
    policy: str = "",
    weights_seed: int = 1,
) -> TrainReply | Refusal:
    """Send a request to train a round."""
    model = make_model(config.backbone, config.tasks, weights_seed)
    weights = get_model_weights(model, build_layout(model))
    site = Site(centre="north", data=str(hospital), device="cpu", threads=1, policy=policy)
    request = TrainRequest(run_id, config_to_dict(config), "main", round_number, weights)
    reply = handle_request(site, request)
    assert isinstance(reply, TrainReply | Refusal), reply
    return reply


def expect_train_reply(reply: TrainReply | Refusal) -> TrainReply:
    assert isinstance(reply, TrainReply), reply
    return reply


def expect_epsilon(reply: TrainReply | Refusal) -> float:
    epsilon = expect_train_reply(reply).epsilon
    assert epsilon is not None
    return epsilon


def read_budget_file(hospital: Path) -> list[dict[str, object]]:
    path = hospital / ".consilium" / "budget" / "spent.json"
    return list(json.loads(path.read_text())["charges"])


def test_round_is_charged_once_unless_it_is_trained_again(hospital: Path) -> None:
    config = make_config("stage.rounds=3")
    first = expect_train_reply(train(hospital, config))
    assert first.losses == {"covid": [0.0, 0.0]}  # losses and the number of patients drawn are secret
    assert (first.steps, first.scans, first.seconds) == (0, 0, 0.0)  # they follow from the number of patients
    first_epsilon = expect_epsilon(first)
    loading.clear_dataset_cache()  # as in a new process
    repeated = expect_train_reply(train(hospital, config))
    assert first.encoded_delta
    assert first.encoded_delta.keys() == repeated.encoded_delta.keys()
    for name, codes in first.encoded_delta.items():
        np.testing.assert_array_equal(codes, repeated.encoded_delta[name])
    assert (repeated.epsilon, len(read_budget_file(hospital))) == (first_epsilon, 1)
    from_other_weights = train(hospital, config, weights_seed=2)
    assert expect_epsilon(from_other_weights) > first_epsilon
    assert len(read_budget_file(hospital)) == 2
    # The first reply is not kept any more. The round is trained with other noise, which is not the seed's.
    third = expect_train_reply(train(hospital, config))
    assert len(read_budget_file(hospital)) == 3
    assert any(
        not np.array_equal(third.encoded_delta[name], codes) for name, codes in first.encoded_delta.items()
    )
    (hospital / ".consilium" / "budget" / "last.safetensors").write_bytes(b"torn")
    assert expect_epsilon(train(hospital, config, run_id="another")) > expect_epsilon(third)
    assert [line["run"] for line in read_budget_file(hospital)] == ["run", "run", "run", "another"]


def test_complete_run_costs_the_requested_epsilon(hospital: Path) -> None:
    config = make_config("stage.rounds=4", "privacy.epsilon=3")
    epsilons = [expect_epsilon(train(hospital, config, round_number)) for round_number in (1, 2, 3, 4)]
    assert epsilons == sorted(epsilons)
    assert 2.7 < epsilons[-1] <= 3
    assert len({line["noise"] for line in read_budget_file(hospital)}) == 1


def test_policy_limits_the_epsilon_of_a_cohort_over_all_runs(hospital: Path, tmp_path: Path) -> None:
    policy = str(tmp_path / "policy.yaml")
    (tmp_path / "policy.yaml").write_text("epsilon: 4\n")
    config = make_config("stage.rounds=4", "privacy.epsilon=3")
    replies = []
    for run_id in ("run0", "run1"):
        for round_number in (1, 2, 3, 4):
            replies.append(train(hospital, config, round_number, run_id=run_id, policy=policy))
    refusals = [reply for reply in replies if isinstance(reply, Refusal)]
    num_trained = len(replies) - len(refusals)
    assert 4 < num_trained < 8
    assert replies[num_trained:] == refusals
    assert all(refusal.permanent for refusal in refusals)
    assert "privacy loss (epsilon) of 4" in refusals[0].reason
    assert str(tmp_path) not in refusals[0].reason
    table = pd.read_csv(hospital / "cohort.csv")
    added = table.iloc[:1].assign(scan="new", patient="new")
    pd.concat([table, added]).to_csv(hospital / "cohort.csv", index=False)
    loading.clear_dataset_cache()
    with_a_new_patient = train(hospital, config, 1, run_id="run2", policy=policy)
    assert isinstance(with_a_new_patient, Refusal)  # another scan does not open another budget


def test_nothing_leaves_that_cannot_be_charged(hospital: Path) -> None:
    (hospital / ".consilium").mkdir(exist_ok=True)
    (hospital / ".consilium" / "budget").write_text("a file where the folder should be")
    reply = train(hospital, make_config())
    assert isinstance(reply, Refusal)
    assert "budget cannot be" in reply.reason


def test_centre_checks_the_privacy_of_a_run_itself(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    batch_norm = replace(config, backbone=replace(config.backbone, norm="batch"))
    by_label = replace(
        config,
        stages={
            name: replace(stage, sampling_ratios={"positive": 1.0}) for name, stage in config.stages.items()
        },
    )
    for bad_config, sentence in (
        (batch_norm, "lacks what follows"),
        (by_label, "draws scans by their label"),
    ):
        reply = train(hospital, bad_config)
        assert isinstance(reply, Refusal)
        assert sentence in reply.reason
    assert not (hospital / ".consilium" / "budget").exists()
    site = Site(centre="north", data=str(hospital), device="cpu")
    expectations = {"scores": "without noise", "moments": "no use for", "clusters": "no use for"}
    for name, expected in expectations.items():
        request = StatisticsRequest("run", config_to_dict(config), name, "main", "train", "covid")
        reply_to_query = handle_request(site, request)
        assert isinstance(reply_to_query, Refusal)
        assert expected in reply_to_query.reason

    def fail(*_: object) -> None:
        raise Refused("the disk is full")

    monkeypatch.setattr(privacy_budget, "_write_file", fail)
    assert isinstance(train(hospital, config), Refusal)  # trained, but not charged: it does not leave
