"""The privacy budget: an independent accountant's figures, and a book that no restart, resume or new run resets."""

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
from common.config.compose import compose_config, config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.privacy.accountant import Charge, compute_epsilon, solve_noise_multiplier
from common.protocol.messages import Refusal, StatisticsRequest, TrainReply, TrainRequest
from common.utils.errors import PermanentlyRefused, Refused

NOTHING = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
ROUND = TrainRequest("run", {}, "main", 1, NOTHING)
PRICE: Charge = (2.0, 0.1, 30)


# --- the accountant -------------------------------------------------------------------------------------------------------------------

HISTORIES: list[tuple[Charge, ...]] = [
    ((1.0, 0.1, 100),),
    ((1.1, 0.01, 10_000),),
    ((30.0, 0.5, 20),),
    ((5.0, 1.0, 5),),
    ((4.0, 0.3, 40), (2.0, 0.1, 50), (4.0, 0.3, 10)),
]


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize("history", HISTORIES)
def test_epsilon_is_googles_to_one_per_cent(history: tuple[Charge, ...], delta: float) -> None:
    """Privacy loss distributions (dp-accounting), which share no code with Opacus."""
    accounting = pytest.importorskip("dp_accounting", reason="pip install -e .[dev]")
    from dp_accounting.pld import PLDAccountant

    theirs = PLDAccountant(value_discretization_interval=1e-4)
    for noise, odds, steps in history:
        gauss = accounting.GaussianDpEvent(noise)
        theirs.compose(accounting.PoissonSampledDpEvent(odds, gauss) if odds < 1 else gauss, steps)
    assert compute_epsilon(history, delta) == pytest.approx(theirs.get_epsilon(delta), rel=0.01)


@settings(max_examples=4)
@given(target=st.floats(0.5, 20), odds=st.floats(0.05, 1), steps=st.integers(1, 300))
def test_the_noise_spends_what_is_planned_and_no_more(target: float, odds: float, steps: int) -> None:
    noise = solve_noise_multiplier(target, 1e-5, ((odds, steps), (odds / 2, steps)))
    spent = compute_epsilon(((noise, odds, steps), (noise, odds / 2, steps)), 1e-5)
    assert spent <= target
    assert spent > 0.9 * target or noise < 0.32  # 0.3 is the least that is given


def test_epsilon_grows_with_every_charge_and_is_bounded_work() -> None:
    seen = [compute_epsilon((PRICE,) * k, 1e-5) for k in range(4)]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert compute_epsilon(((2.0, 0.1, 60),), 1e-5) == seen[2]
    assert compute_epsilon(((0.3, 1.0, 1_000_000),), 1e-5) > 1e6  # what a hostile coordinator might ask for


# --- the book -------------------------------------------------------------------------------------------------------------------------


def test_it_is_one_budget_while_any_patient_is_shared(tmp_path: Path) -> None:
    old, grown, other = (PrivacyAccount(tmp_path, hash_patients(names)) for names in ("abc", "cde", "xyz"))
    assert record_charge(old, PRICE, ROUND) == (PRICE,)
    assert record_charge(old, PRICE, replace(ROUND, run_id="later")) == (PRICE, PRICE)
    assert read_charges(PrivacyAccount(tmp_path, hash_patients("abc"))) == (
        PRICE,
        PRICE,
    )  # as after a restart
    assert read_charges(grown) == (PRICE, PRICE)
    assert read_charges(other) == ()
    assert record_charge(grown, PRICE, ROUND) == (PRICE,) * 3
    assert read_charges(old) == (PRICE,) * 3
    assert not any(name in (tmp_path / "spent.json").read_text().split('"') for name in "abc")


def test_over_the_limit_nothing_is_written(tmp_path: Path) -> None:
    account = PrivacyAccount(
        tmp_path, hash_patients("abc"), max_epsilon=compute_epsilon((PRICE, PRICE), 1e-5) + 0.01
    )
    record_charge(account, PRICE, ROUND)
    record_charge(account, PRICE, ROUND)
    before = (tmp_path / "spent.json").read_bytes()
    with pytest.raises(
        PermanentlyRefused,
        match=r"allows its patients a privacy loss \(epsilon\) of .* is spent, and this round would make it",
    ):
        record_charge(account, PRICE, ROUND)
    with pytest.raises(PermanentlyRefused):
        check_affordable(account, PRICE)
    assert (tmp_path / "spent.json").read_bytes() == before
    record_charge(replace(account, max_epsilon=0), PRICE, ROUND)  # the hospital may allow more, later
    with pytest.raises(PermanentlyRefused):  # the limit is at the policy's delta, not at the run's
        check_affordable(
            PrivacyAccount(tmp_path, hash_patients("ab"), account.max_epsilon + 1.5, 1e-9), PRICE
        )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cohorts": {}, "charges": 3}', '{"coh'])
def test_a_damaged_book_is_no_new_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_text(text)
    with pytest.raises(Refused, match="budget cannot be read"):
        record_charge(PrivacyAccount(tmp_path, hash_patients("a")), PRICE, ROUND)
    assert (tmp_path / "spent.json").read_text() == text


# --- at a centre ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(
        tmp_path_factory.mktemp("data"), "north", PhantomConfig(scale=0.001, num_slices=10, image_size=64)
    )


@pytest.fixture
def hospital(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "north")


def config_of(*overrides: str) -> Config:
    few = [
        "federation=folder",
        "federation.centres=[north]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "stage.batch_size=4",
    ]
    return compose_config(
        [*few, "stage.tasks=[covid]", "stage.precision=fp32", "privacy=patient", *overrides]
    )


def asked(
    hospital: Path, config: Config, round: int = 1, run: str = "run", policy: str = "", seed: int = 1
) -> TrainReply | Refusal:
    model = make_model(config.backbone, config.tasks, seed)
    site = Site(centre="north", data=str(hospital), device="cpu", threads=1, policy=policy)
    reply = handle_request(
        site,
        TrainRequest(
            run, config_to_dict(config), "main", round, get_model_weights(model, build_layout(model))
        ),
    )
    assert isinstance(reply, TrainReply | Refusal), reply
    return reply


def done(reply: TrainReply | Refusal) -> TrainReply:
    assert isinstance(reply, TrainReply), reply
    return reply


def book(hospital: Path) -> list[dict[str, object]]:
    return list(json.loads((hospital / ".consilium" / "budget" / "spent.json").read_text())["charges"])


def test_a_round_is_charged_once_unless_it_is_trained_again(hospital: Path) -> None:
    config = config_of("stage.rounds=3")
    first = done(asked(hospital, config))
    assert first.losses == {"covid": [0.0, 0.0]}  # these, and how many were drawn, would tell
    assert (first.steps, first.scans) == (2, 8)
    assert first.epsilon is not None
    loading.clear_dataset_cache()  # as a new process
    again = done(asked(hospital, config))
    assert first.encoded_delta
    assert first.encoded_delta.keys() == again.encoded_delta.keys()
    for name, codes in first.encoded_delta.items():
        np.testing.assert_array_equal(codes, again.encoded_delta[name])
    assert (again.epsilon, len(book(hospital))) == (first.epsilon, 1)
    other = done(asked(hospital, config, seed=2))  # the same round from other weights
    assert len(book(hospital)) == 2
    assert (other.epsilon or 0) > first.epsilon
    third = done(asked(hospital, config))  # no longer kept: chance is not the seed's, so this is another draw
    assert len(book(hospital)) == 3
    assert any(
        not np.array_equal(third.encoded_delta[name], codes) for name, codes in first.encoded_delta.items()
    )
    (hospital / ".consilium" / "budget" / "last.safetensors").write_bytes(b"torn")
    assert (done(asked(hospital, config, run="another")).epsilon or 0) > (third.epsilon or 0)
    assert [line["run"] for line in book(hospital)] == ["run", "run", "run", "another"]


def test_a_whole_run_costs_what_was_asked(hospital: Path) -> None:
    config = config_of("stage.rounds=4", "privacy.epsilon=3")
    spent = [done(asked(hospital, config, round)).epsilon or 0 for round in (1, 2, 3, 4)]
    assert spent == sorted(spent)
    assert 2.7 < spent[-1] <= 3
    noise = {line["noise"] for line in book(hospital)}
    assert len(noise) == 1


def test_the_policy_limits_the_cohort_over_all_runs(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("epsilon: 4\n")
    config = config_of("stage.rounds=4", "privacy.epsilon=3")
    replies = [
        asked(hospital, config, 1 + k % 4, f"run{k // 4}", str(tmp_path / "policy.yaml")) for k in range(8)
    ]
    refused = [r for r in replies if isinstance(r, Refusal)]
    assert [isinstance(r, TrainReply) for r in replies] == sorted(
        (isinstance(r, TrainReply) for r in replies), reverse=True
    )
    assert 4 < len(replies) - len(refused) < 8
    assert all(r.permanent for r in refused)
    assert "privacy loss (epsilon) of 4" in refused[0].reason
    table = pd.read_csv(hospital / "cohort.csv")  # one scan more is no new budget
    added = table.iloc[:1].assign(scan="new", patient="new")
    pd.concat([table, added]).to_csv(hospital / "cohort.csv", index=False)
    loading.clear_dataset_cache()
    assert isinstance(asked(hospital, config, 1, "third", str(tmp_path / "policy.yaml")), Refusal)
    assert str(tmp_path) not in refused[0].reason


def test_what_cannot_be_charged_does_not_leave(hospital: Path) -> None:
    (hospital / ".consilium").mkdir(exist_ok=True)
    (hospital / ".consilium" / "budget").write_text("in the way")
    reply = asked(hospital, config_of())
    assert isinstance(reply, Refusal)
    assert "budget cannot be" in reply.reason


def test_a_centre_does_not_rely_on_the_coordinators_checks(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    batch_norm = replace(config, backbone=replace(config.backbone, norm="batch"))
    by_label = replace(
        config, stages={n: replace(s, sampling_ratios={"positive": 1.0}) for n, s in config.stages.items()}
    )
    for bad, sentence in ((batch_norm, "BatchNorm"), (by_label, "draws scans by their label")):
        reply = asked(hospital, bad)
        assert isinstance(reply, Refusal)
        assert sentence in reply.reason
    assert not (hospital / ".consilium" / "budget").exists()
    site = Site(centre="north", data=str(hospital), device="cpu")
    for name, split in (("scores", "train"), ("moments", "train"), ("clusters", "val")):
        said = handle_request(
            site, StatisticsRequest("run", config_to_dict(config), name, "main", split, "covid")
        )
        assert isinstance(said, Refusal)
        assert "without noise" in said.reason
    monkeypatch.setattr(
        privacy_budget, "_write_file", lambda *_: (_ for _ in ()).throw(Refused("the disk is full"))
    )
    assert isinstance(asked(hospital, config), Refusal)  # trained, but not charged: it stays
