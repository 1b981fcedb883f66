"""Centre weights and priors: laws, and the paper's own counts."""

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

cells = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    min_size=1,
    max_size=8,
)
taus = st.floats(0, 2)


@given(cells, taus)
def test_weights_sum_to_one_or_all_are_zero(counts: dict[str, list[int]], tau: float) -> None:
    weights = compute_centre_weights(counts, tau)
    assert set(weights) == set(counts)
    assert all(w >= 0 for w in weights.values())
    assert sum(weights.values()) == pytest.approx(1.0 if any(map(sum, counts.values())) else 0.0)


@given(cells)
def test_tau_zero_is_fedavg(counts: dict[str, list[int]]) -> None:
    total = sum(map(sum, counts.values()))
    for centre, weight in compute_centre_weights(counts, 0.0).items():
        assert weight == pytest.approx(sum(counts[centre]) / total if total else 0.0, abs=1e-6)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=8),
    taus,
)
def test_one_cell_a_centre_is_the_softmax_of_the_plan(n: dict[str, int], tau: float) -> None:
    z = np.array([(1 - tau) * np.log(n[c]) for c in sorted(n)])
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    weights = compute_centre_weights({c: [k] for c, k in n.items()}, tau)
    np.testing.assert_allclose([weights[c] for c in sorted(n)], expected, rtol=1e-9)


@given(cells, taus, st.randoms())
def test_order_of_centres_changes_nothing(counts: dict[str, list[int]], tau: float, random: object) -> None:
    names = list(counts)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert compute_centre_weights({c: counts[c] for c in names}, tau) == compute_centre_weights(counts, tau)


@given(cells, taus)
def test_mirrors_the_adjustment(counts: dict[str, list[int]], tau: float) -> None:
    """What the loss adds to a class's logit, tau log pi, is what the weights take from a cell: w ~ n exp(-tau log pi)."""
    flat = np.concatenate([np.array(counts[c], float) for c in sorted(counts)])
    if not flat.sum():
        return
    raw = {}
    for c in sorted(counts):
        n = np.array([k for k in counts[c] if k], float)
        raw[c] = float((n * np.exp(-tau * np.log(n / flat.sum()))).sum())
    for c, w in compute_centre_weights(counts, tau).items():
        assert w == pytest.approx(raw[c] / sum(raw.values()), rel=1e-6)


def test_one_class_centre_counts_less_than_one_with_both() -> None:
    weights = compute_centre_weights({"both": [50, 50], "one": [100, 0]}, tau=1.0)
    assert weights == {"both": pytest.approx(2 / 3), "one": pytest.approx(1 / 3)}


def test_absent_class_has_a_finite_prior() -> None:
    assert np.isfinite(compute_log_prior([10, 0])).all()
    assert np.isfinite(compute_logit_adjustment([10, 0], 1.0, "fedlc")).all()
    np.testing.assert_allclose(np.exp(compute_log_prior([3, 0])).sum(), 1.0)
    np.testing.assert_allclose(compute_logit_adjustment([15, 0], 2.0, "fedlc"), [-2 * 16**-0.25, -2.0])


def test_effective_number() -> None:
    assert compute_effective_centres({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}) == pytest.approx(4)
    assert compute_effective_centres({"a": 1.0, "b": 0.0}) == pytest.approx(1)
    assert compute_effective_centres({}) == 0
