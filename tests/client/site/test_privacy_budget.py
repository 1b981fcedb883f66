"""The privacy budget: epsilons agree with an independent accountant, and nothing resets what is spent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.site.privacy_budget import (
    PrivacyAccount,
    check_affordable,
    hash_patients,
    read_charges,
    record_charge,
)
from common.modeling.parameters import Weights
from common.privacy.accountant import Charge, compute_epsilon, solve_noise_multiplier
from common.protocol.messages import TrainRequest
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
