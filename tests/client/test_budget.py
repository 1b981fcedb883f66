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

from client import budget, scans
from client.answer import answer
from client.budget import Account, afford, charge, charges, marks_of
from client.phantom import write_centre
from client.site import Site
from common.accountant import Charge, epsilon, noise_for
from common.compose import compose, to_dict
from common.errors import Declined, Refused
from common.messages import Contribution, Query, Refusal, Train
from common.model import make_model
from common.schema import Config, Phantom
from common.weights import Weights, flatten, layout_of

NOTHING = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
ROUND = Train("run", {}, "main", 1, NOTHING)
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
    assert epsilon(history, delta) == pytest.approx(theirs.get_epsilon(delta), rel=0.01)


@settings(max_examples=4)
@given(target=st.floats(0.5, 20), odds=st.floats(0.05, 1), steps=st.integers(1, 300))
def test_the_noise_spends_what_is_planned_and_no_more(target: float, odds: float, steps: int) -> None:
    noise = noise_for(target, 1e-5, ((odds, steps), (odds / 2, steps)))
    spent = epsilon(((noise, odds, steps), (noise, odds / 2, steps)), 1e-5)
    assert spent <= target
    assert spent > 0.9 * target or noise < 0.32  # 0.3 is the least that is given


def test_epsilon_grows_with_every_charge_and_is_bounded_work() -> None:
    seen = [epsilon((PRICE,) * k, 1e-5) for k in range(4)]
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert epsilon(((2.0, 0.1, 60),), 1e-5) == seen[2]
    assert epsilon(((0.3, 1.0, 1_000_000),), 1e-5) > 1e6  # what a hostile coordinator might ask for


# --- the book -------------------------------------------------------------------------------------------------------------------------


def test_it_is_one_budget_while_any_patient_is_shared(tmp_path: Path) -> None:
    old, grown, other = (Account(tmp_path, marks_of(names)) for names in ("abc", "cde", "xyz"))
    assert charge(old, PRICE, ROUND) == (PRICE,)
    assert charge(old, PRICE, replace(ROUND, run="later")) == (PRICE, PRICE)
    assert charges(Account(tmp_path, marks_of("abc"))) == (PRICE, PRICE)  # as after a restart
    assert charges(grown) == (PRICE, PRICE)
    assert charges(other) == ()
    assert charge(grown, PRICE, ROUND) == (PRICE,) * 3
    assert charges(old) == (PRICE,) * 3
    assert not any(name in (tmp_path / "spent.json").read_text().split('"') for name in "abc")


def test_over_the_limit_nothing_is_written(tmp_path: Path) -> None:
    account = Account(tmp_path, marks_of("abc"), limit=epsilon((PRICE, PRICE), 1e-5) + 0.01)
    charge(account, PRICE, ROUND)
    charge(account, PRICE, ROUND)
    before = (tmp_path / "spent.json").read_bytes()
    with pytest.raises(Declined, match=r"allows its patients a privacy loss \(epsilon\) of .* is spent, and this round would make it"):
        charge(account, PRICE, ROUND)
    with pytest.raises(Declined):
        afford(account, PRICE)
    assert (tmp_path / "spent.json").read_bytes() == before
    charge(replace(account, limit=0), PRICE, ROUND)  # the hospital may allow more, later
    with pytest.raises(Declined):  # the limit is at the policy's delta, not at the run's
        afford(Account(tmp_path, marks_of("ab"), account.limit + 1.5, 1e-9), PRICE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cohorts": {}, "charges": 3}', '{"coh'])
def test_a_damaged_book_is_no_new_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_text(text)
    with pytest.raises(Refused, match="budget cannot be read"):
        charge(Account(tmp_path, marks_of("a")), PRICE, ROUND)
    assert (tmp_path / "spent.json").read_text() == text


# --- at a centre ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(tmp_path_factory.mktemp("data"), "north", Phantom(scale=0.001, slices=10, pixels=64))


@pytest.fixture
def hospital(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "north")


def config_of(*overrides: str) -> Config:
    few = ["federation=folder", "federation.centres=[north]", "preprocess.size=32", "preprocess.crop=none", "stage.batch=4"]
    return compose([*few, "stage.tasks=[covid]", "stage.precision=fp32", "privacy=patient", *overrides])


def asked(hospital: Path, config: Config, round: int = 1, run: str = "run", policy: str = "", seed: int = 1) -> Contribution | Refusal:
    model = make_model(config.backbone, config.tasks, seed)
    site = Site(centre="north", data=str(hospital), device="cpu", threads=1, policy=policy)
    reply = answer(site, Train(run, to_dict(config), "main", round, flatten(model, layout_of(model))))
    assert isinstance(reply, Contribution | Refusal), reply
    return reply


def done(reply: Contribution | Refusal) -> Contribution:
    assert isinstance(reply, Contribution), reply
    return reply


def book(hospital: Path) -> list[dict[str, object]]:
    return list(json.loads((hospital / ".consilium" / "budget" / "spent.json").read_text())["charges"])


def test_a_round_is_charged_once_unless_it_is_trained_again(hospital: Path) -> None:
    config = config_of("stage.rounds=3")
    first = done(asked(hospital, config))
    assert first.losses == {"covid": [0.0, 0.0]}  # these, and how many were drawn, would tell
    assert (first.steps, first.scans) == (2, 8)
    assert first.epsilon is not None
    scans.forget()  # as a new process
    again = done(asked(hospital, config))
    assert first.coded
    assert first.coded.keys() == again.coded.keys()
    for name, codes in first.coded.items():
        np.testing.assert_array_equal(codes, again.coded[name])
    assert (again.epsilon, len(book(hospital))) == (first.epsilon, 1)
    other = done(asked(hospital, config, seed=2))  # the same round from other weights
    assert len(book(hospital)) == 2
    assert (other.epsilon or 0) > first.epsilon
    third = done(asked(hospital, config))  # no longer kept: chance is not the seed's, so this is another draw
    assert len(book(hospital)) == 3
    assert any(not np.array_equal(third.coded[name], codes) for name, codes in first.coded.items())
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
    replies = [asked(hospital, config, 1 + k % 4, f"run{k // 4}", str(tmp_path / "policy.yaml")) for k in range(8)]
    refused = [r for r in replies if isinstance(r, Refusal)]
    assert [isinstance(r, Contribution) for r in replies] == sorted((isinstance(r, Contribution) for r in replies), reverse=True)
    assert 4 < len(replies) - len(refused) < 8
    assert all(r.declined for r in refused)
    assert "privacy loss (epsilon) of 4" in refused[0].reason
    table = pd.read_csv(hospital / "cohort.csv")  # one scan more is no new budget
    added = table.iloc[:1].assign(scan="new", patient="new")
    pd.concat([table, added]).to_csv(hospital / "cohort.csv", index=False)
    scans.forget()
    assert isinstance(asked(hospital, config, 1, "third", str(tmp_path / "policy.yaml")), Refusal)
    assert str(tmp_path) not in refused[0].reason


def test_what_cannot_be_charged_does_not_leave(hospital: Path) -> None:
    (hospital / ".consilium").mkdir(exist_ok=True)
    (hospital / ".consilium" / "budget").write_text("in the way")
    reply = asked(hospital, config_of())
    assert isinstance(reply, Refusal)
    assert "budget cannot be" in reply.reason


def test_a_centre_does_not_rely_on_the_coordinators_checks(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    batch_norm = replace(config, backbone=replace(config.backbone, norm="batch"))
    by_label = replace(config, stages={n: replace(s, sample={"positive": 1.0}) for n, s in config.stages.items()})
    for bad, sentence in ((batch_norm, "BatchNorm"), (by_label, "draws scans by their label")):
        reply = asked(hospital, bad)
        assert isinstance(reply, Refusal)
        assert sentence in reply.reason
    assert not (hospital / ".consilium" / "budget").exists()
    site = Site(centre="north", data=str(hospital), device="cpu")
    for name, split in (("scores", "train"), ("moments", "train"), ("clusters", "val")):
        said = answer(site, Query("run", to_dict(config), name, "main", split, "covid"))
        assert isinstance(said, Refusal)
        assert "without noise" in said.reason
    monkeypatch.setattr(budget, "_write", lambda *_: (_ for _ in ()).throw(Refused("the disk is full")))
    assert isinstance(asked(hospital, config), Refusal)  # trained, but not charged: it stays
