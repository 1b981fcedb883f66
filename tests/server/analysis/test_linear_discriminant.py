"""The fitted source head against Mahalanobis distances, and its additivity."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from common.protocol.messages import add_sums
from server.analysis.linear_discriminant import fit_balanced_discriminant


def make_features(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features [400, 5] of three unequally frequent classes, and the classes."""
    rng = np.random.default_rng(seed)
    classes = rng.choice(3, size=400, p=[0.7, 0.2, 0.1])
    features = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + 2 * rng.normal(size=(3, 5))[classes]
    return features, classes


def compute_moments(features: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    one_hot = np.eye(3)[classes]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": features.T @ features}


def test_the_head_assigns_to_the_nearest_class_by_mahalanobis_distance() -> None:
    features, classes = make_features()
    weight, bias = fit_balanced_discriminant(compute_moments(features, classes), shrinkage=0.0)
    means = np.stack([features[classes == k].mean(0) for k in range(3)])
    precision = np.linalg.inv(np.cov((features - means[classes]).T))
    nearest = cdist(features, means, "mahalanobis", VI=precision).argmin(1)
    np.testing.assert_array_equal((features @ weight.T + bias).argmax(1), nearest)


def test_centres_with_one_class_each_give_the_head_of_the_pooled_data() -> None:
    features, classes = make_features()
    total: dict[str, np.ndarray] = {}
    for k in range(3):
        add_sums(total, compute_moments(features[classes == k], classes[classes == k]))
    pooled_head = fit_balanced_discriminant(compute_moments(features, classes))
    for values, pooled_values in zip(fit_balanced_discriminant(total), pooled_head, strict=True):
        np.testing.assert_allclose(values, pooled_values, rtol=1e-4, atol=1e-5)


def test_a_class_without_scans_leaves_the_head_finite() -> None:
    features, classes = make_features()
    present = classes != 2
    weight, bias = fit_balanced_discriminant(compute_moments(features[present], classes[present]))
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()
