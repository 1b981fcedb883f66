"""Centre weights and priors: their laws, and small examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.learning.class_imbalance import (
    compute_centre_weights,
    compute_effective_centres,
    compute_log_prior,
    compute_logit_adjustment,
)

CELLS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    min_size=1,
    max_size=8,
)
ONE_CELL_EACH = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=8
)
TAUS = st.floats(0, 2)


@given(CELLS, TAUS)
def test_weights_sum_to_one_or_all_are_zero(counts: dict[str, list[int]], tau: float) -> None:
    weights = compute_centre_weights(counts, tau)
    assert set(weights) == set(counts)
    assert all(weight >= 0 for weight in weights.values())
    has_scans = any(map(sum, counts.values()))
    assert sum(weights.values()) == pytest.approx(1.0 if has_scans else 0.0)


@given(CELLS)
def test_tau_zero_is_fedavg(counts: dict[str, list[int]]) -> None:
    total = sum(map(sum, counts.values()))
    for centre, weight in compute_centre_weights(counts, 0.0).items():
        expected = sum(counts[centre]) / total if total else 0.0
        assert weight == pytest.approx(expected, abs=1e-6)


@given(ONE_CELL_EACH, TAUS)
def test_weights_with_one_cell_per_centre_are_a_softmax(counts: dict[str, int], tau: float) -> None:
    centres = sorted(counts)
    logits = np.array([(1 - tau) * np.log(counts[centre]) for centre in centres])
    exponentials = np.exp(logits - logits.max())
    weights = compute_centre_weights({centre: [count] for centre, count in counts.items()}, tau)
    actual = [weights[centre] for centre in centres]
    np.testing.assert_allclose(actual, exponentials / exponentials.sum(), rtol=1e-9)


@given(CELLS, TAUS, st.randoms())
def test_weights_do_not_depend_on_the_order_of_centres(
    counts: dict[str, list[int]], tau: float, random: object
) -> None:
    centres = list(counts)
    random.shuffle(centres)  # type: ignore[attr-defined]
    shuffled = {centre: counts[centre] for centre in centres}
    assert compute_centre_weights(shuffled, tau) == compute_centre_weights(counts, tau)


@given(CELLS, TAUS)
def test_weights_mirror_the_logit_adjustment(counts: dict[str, list[int]], tau: float) -> None:
    """The loss adds tau log pi to a class's logit; a cell's weight is n exp(-tau log pi)."""
    total = sum(map(sum, counts.values()))
    if not total:
        return
    unnormalised = {}
    for centre in sorted(counts):
        filled = np.array([count for count in counts[centre] if count], float)
        unnormalised[centre] = float((filled * np.exp(-tau * np.log(filled / total))).sum())
    for centre, weight in compute_centre_weights(counts, tau).items():
        assert weight == pytest.approx(unnormalised[centre] / sum(unnormalised.values()), rel=1e-6)


def test_centre_with_one_class_weighs_less_than_one_with_both() -> None:
    weights = compute_centre_weights({"both": [50, 50], "one": [100, 0]}, tau=1.0)
    assert weights == {"both": pytest.approx(2 / 3), "one": pytest.approx(1 / 3)}


def test_absent_class_has_a_finite_prior() -> None:
    assert np.isfinite(compute_log_prior([10, 0])).all()
    assert np.isfinite(compute_logit_adjustment([10, 0], 1.0, "fedlc")).all()
    np.testing.assert_allclose(np.exp(compute_log_prior([3, 0])).sum(), 1.0)
    np.testing.assert_allclose(compute_logit_adjustment([15, 0], 2.0, "fedlc"), [-2 * 16**-0.25, -2.0])


def test_effective_number_of_centres() -> None:
    assert compute_effective_centres({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}) == pytest.approx(4)
    assert compute_effective_centres({"a": 1.0, "b": 0.0}) == pytest.approx(1)
    assert compute_effective_centres({}) == 0
