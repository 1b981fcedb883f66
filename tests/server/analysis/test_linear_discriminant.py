"""The fitted source head against Mahalanobis distances, and its additivity."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from common.protocol.messages import add_sums
from server.analysis.linear_discriminant import fit_balanced_discriminant


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.choice(3, size=400, p=[0.7, 0.2, 0.1])
    return rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + 2 * rng.normal(size=(3, 5))[y], y


def moments(f: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    one_hot = np.eye(3)[y]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ f, "square": f.T @ f}


def test_equals_the_balanced_discriminant_of_the_pooled_data() -> None:
    f, y = data()
    weight, bias = fit_balanced_discriminant(moments(f, y), shrinkage=0.0)
    means = np.stack([f[y == k].mean(0) for k in range(3)])
    nearest = cdist(f, means, "mahalanobis", VI=np.linalg.inv(np.cov((f - means[y]).T))).argmin(1)
    np.testing.assert_array_equal((f @ weight.T + bias).argmax(1), nearest)


def test_centres_with_one_class_each_give_the_same_head() -> None:
    f, y = data()
    total: dict[str, np.ndarray] = {}
    for k in range(3):
        add_sums(total, moments(f[y == k], y[y == k]))
    for ours, whole in zip(
        fit_balanced_discriminant(total), fit_balanced_discriminant(moments(f, y)), strict=True
    ):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


def test_a_class_without_scans_is_finite() -> None:
    f, y = data()
    weight, bias = fit_balanced_discriminant(moments(f[y != 2], y[y != 2]))
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()
