"""The privacy budget: epsilons agree with an independent accountant, and nothing resets what is spent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import loading
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site import privacy_budget
from client.site.config import Site
from client.site.privacy_budget import (
    PrivacyAccount,
    check_affordable,
    hash_patients,
    read_charges,
    record_charge,
)
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.privacy.accountant import Charge, compute_epsilon, solve_noise_multiplier
from common.protocol.messages import Refusal, StatisticsRequest, TrainReply, TrainRequest
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused

NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
ROUND = TrainRequest("run", {}, "main", 1, NO_WEIGHTS)
CHARGE = Charge(2.0, 0.1, 30)


# --- the accountant -------------------------------------------------------------------------------

HISTORIES: list[tuple[Charge, ...]] = [
    (Charge(1.0, 0.1, 100),),
    (Charge(1.1, 0.01, 10_000),),
    (Charge(30.0, 0.5, 20),),
    (Charge(5.0, 1.0, 5),),
    (Charge(4.0, 0.3, 40), Charge(2.0, 0.1, 50), Charge(4.0, 0.3, 10)),
]


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize("history", HISTORIES)
def test_epsilon_agrees_with_googles_accountant_within_one_per_cent(
    history: tuple[Charge, ...], delta: float
) -> None:
    """Its privacy loss distributions (dp-accounting) share no code with Opacus."""
    accounting = pytest.importorskip("dp_accounting", reason="pip install -e .[dev]")
    from dp_accounting.pld import PLDAccountant

    reference = PLDAccountant(value_discretization_interval=1e-4)
    for noise, rate, steps in history:
        gaussian = accounting.GaussianDpEvent(noise)
        event = accounting.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian
        reference.compose(event, steps)
    assert compute_epsilon(history, delta) == pytest.approx(reference.get_epsilon(delta), rel=0.01)


@settings(max_examples=4)
@given(target=st.floats(0.5, 20), rate=st.floats(0.05, 1), steps=st.integers(1, 300))
def test_solved_noise_spends_the_target_and_no_more(target: float, rate: float, steps: int) -> None:
    noise = solve_noise_multiplier(target, 1e-5, ((rate, steps), (rate / 2, steps)))
    spent = compute_epsilon((Charge(noise, rate, steps), Charge(noise, rate / 2, steps)), 1e-5)
    assert spent <= target
    assert spent > 0.9 * target or noise < 0.32  # 0.3 is the smallest noise multiplier that is returned


def test_epsilon_grows_with_every_charge_and_takes_bounded_time() -> None:
    epsilons = [compute_epsilon((CHARGE,) * count, 1e-5) for count in range(4)]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] == 0
    assert compute_epsilon((Charge(2.0, 0.1, 60),), 1e-5) == epsilons[2]
    assert compute_epsilon((Charge(0.3, 1.0, 1_000_000),), 1e-5) > 1e6  # as a hostile coordinator might ask


# --- the budget file ------------------------------------------------------------------------------


def test_cohorts_that_share_a_patient_share_a_budget(tmp_path: Path) -> None:
    old, grown, other = (PrivacyAccount(tmp_path, hash_patients(names)) for names in ("abc", "cde", "xyz"))
    assert record_charge(old, CHARGE, ROUND) == (CHARGE,)
    assert record_charge(old, CHARGE, replace(ROUND, run_id="later")) == (CHARGE, CHARGE)
    reopened = PrivacyAccount(tmp_path, hash_patients("abc"))  # as after a restart
    assert read_charges(reopened) == (CHARGE, CHARGE)
    assert read_charges(grown) == (CHARGE, CHARGE)
    assert read_charges(other) == ()
    assert record_charge(grown, CHARGE, ROUND) == (CHARGE,) * 3
    assert read_charges(old) == (CHARGE,) * 3
    texts = (tmp_path / "spent.json").read_text().split('"')
    assert not any(name in texts for name in "abc")


def test_charge_over_the_limit_is_refused_and_not_written(tmp_path: Path) -> None:
    limit = compute_epsilon((CHARGE, CHARGE), 1e-5) + 0.01
    account = PrivacyAccount(tmp_path, hash_patients("abc"), max_epsilon=limit)
    record_charge(account, CHARGE, ROUND)
    record_charge(account, CHARGE, ROUND)
    before = (tmp_path / "spent.json").read_bytes()
    reason = r"allows its patients a privacy loss \(epsilon\) of .* is spent, and this round would make it"
    with pytest.raises(PermanentlyRefused, match=reason) as caught:
        record_charge(account, CHARGE, ROUND)
    assert caught.value.code == RefusalCode.POLICY
    with pytest.raises(PermanentlyRefused):
        check_affordable(account, CHARGE)
    assert (tmp_path / "spent.json").read_bytes() == before
    record_charge(replace(account, max_epsilon=0), CHARGE, ROUND)  # the hospital may allow more later
    stricter_delta = PrivacyAccount(tmp_path, hash_patients("ab"), account.max_epsilon + 1.5, 1e-9)
    with pytest.raises(PermanentlyRefused):  # the limit holds at the policy's delta, not at the run's
        check_affordable(stricter_delta, CHARGE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cohorts": {}, "charges": 3}', '{"coh'])
def test_damaged_budget_is_refused_and_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_text(text)
    with pytest.raises(Refused, match="budget cannot be read"):
        record_charge(PrivacyAccount(tmp_path, hash_patients("a")), CHARGE, ROUND)
    assert (tmp_path / "spent.json").read_text() == text


def test_budget_of_the_previous_version_is_kept(tmp_path: Path) -> None:
    """Its file has the same keys: what was spent before an upgrade stays spent."""
    account = PrivacyAccount(tmp_path, hash_patients("abc"))
    old_charge = {
        "cohort": account.cohort_id,
        "run": "old",
        "stage": "main",
        "round": 1,
        "noise": 2.0,
        "odds": 0.1,
        "steps": 30,
        "time": "2026-01-01T12:00:00+00:00",
    }
    old_query = {**old_charge, "round": 0, "noise": 4.0, "odds": 1.0, "steps": 1}
    old_cohorts = {account.cohort_id: sorted(account.patient_hashes)}
    old_budget = {"cohorts": old_cohorts, "charges": [old_charge, old_query]}
    (tmp_path / "spent.json").write_text(json.dumps(old_budget, indent=1))
    spent_before = (CHARGE, Charge(4.0, 1.0, 1))
    assert read_charges(account) == spent_before
    assert record_charge(account, CHARGE, ROUND) == (*spent_before, CHARGE)
    budget = json.loads((tmp_path / "spent.json").read_text())
    assert budget["cohorts"] == old_cohorts
    assert budget["charges"][:2] == [old_charge, old_query]
    assert list(budget["charges"][2]) == list(old_charge)


# --- at a centre ----------------------------------------------------------------------------------


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
    assert (first.steps, first.scans) == (2, 8)
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
    for bad_config, sentence in ((batch_norm, "BatchNorm"), (by_label, "draws scans by their label")):
        reply = train(hospital, bad_config)
        assert isinstance(reply, Refusal)
        assert sentence in reply.reason
    assert not (hospital / ".consilium" / "budget").exists()
    site = Site(centre="north", data=str(hospital), device="cpu")
    for name, split in (("scores", "train"), ("moments", "train"), ("clusters", "val")):
        request = StatisticsRequest("run", config_to_dict(config), name, "main", split, "covid")
        reply_to_query = handle_request(site, request)
        assert isinstance(reply_to_query, Refusal)
        assert "without noise" in reply_to_query.reason

    def fail(*_: object) -> None:
        raise Refused("the disk is full")

    monkeypatch.setattr(privacy_budget, "_write_file", fail)
    assert isinstance(train(hospital, config), Refusal)  # trained, but not charged: it does not leave
