"""Secure sums: what is lost on the grid, what cannot overflow, masks that cancel, shares that fit."""

from __future__ import annotations

import math
import secrets
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.config.compose import compose_config
from common.config.schema import Config, SecureAggregationConfig
from common.modeling.parameters import Layout, TensorSlot
from common.privacy import secure_aggregation
from common.utils.errors import Refused

LAYOUT = Layout(
    [
        TensorSlot("encoder.w", (3, 4), 0, 12, "backbone", True, False),
        TensorSlot("encoder.mean", (3,), 12, 15, "backbone", False, True),
        TensorSlot("heads.covid.w", (4,), 15, 19, "covid", True, False),
    ]
)
GRIDS = st.builds(SecureAggregationConfig, clip=st.floats(1e-3, 1e3), bits=st.integers(8, 32))


def config_of(count: int, bits: int = 26) -> Config:
    names = ",".join(f"c{i:03d}" for i in range(count))
    return compose_config(
        [
            "federation=folder",
            f"federation.centres=[{names}]",
            "privacy=secagg",
            f"privacy.secagg.quantization_bits={bits}",
        ]
    )


@settings(deadline=None)
@given(GRIDS, arrays(np.float64, 20, elements=st.floats(-1, 1)))
def test_half_a_step_is_all_that_a_value_within_the_clip_loses(
    grid: SecureAggregationConfig, share: np.ndarray
) -> None:
    values = share * (grid.clip_value - secure_aggregation.quantization_step(grid))
    on_grid, clipped = secure_aggregation.quantize(values, grid)
    assert not clipped
    assert np.abs(
        on_grid * secure_aggregation.quantization_step(grid) - values
    ).max() <= grid.clip_value / 2**grid.quantization_bits * (1 + 1e-9)
    far, beyond = secure_aggregation.quantize(np.array([-3 * grid.clip_value, np.inf, 0]), grid)
    assert beyond == 2
    assert far[0] == -far[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 300), st.integers(8, 32), st.sampled_from([-1, 1]))
def test_the_largest_values_of_all_centres_add_without_overflow(count: int, bits: int, sign: int) -> None:
    config = config_of(count, bits)
    grid, width = (
        secure_aggregation.require_secagg_config(config),
        secure_aggregation.bytes_per_parameter(config),
    )
    one, _ = secure_aggregation.quantize(np.full(3, 2.0 * sign * grid.clip_value), grid)
    total = np.zeros(3, secure_aggregation.ring_dtype(width))
    for _ in range(count):
        total += secure_aggregation.unpack_ring_values(
            secure_aggregation.pack_ring_values(one.astype(secure_aggregation.ring_dtype(width)), width),
            width,
        )
    np.testing.assert_array_equal(
        secure_aggregation.to_signed_integers(total, width), count * one.astype(np.int64)
    )
    assert width == math.ceil((bits + math.ceil(math.log2(count))) / 8)


@settings(deadline=None)
@given(arrays(np.float64, 9, elements=st.floats(-1e6, 1e6)), st.integers(3, 1000))
def test_other_numbers_are_exact_to_2_to_the_minus_24_and_counts_altogether(
    values: np.ndarray, count: int
) -> None:
    total = np.sum(
        [secure_aggregation.to_fixed_point(values, count).view(np.uint64)] * 3, axis=0, dtype=np.uint64
    )
    assert np.abs(secure_aggregation.from_fixed_point(total) - 3 * values).max() <= 3 * 2.0**-25
    whole = np.rint(values)
    np.testing.assert_array_equal(
        secure_aggregation.from_fixed_point(secure_aggregation.to_fixed_point(whole, count).view(np.uint64)),
        whole,
    )
    for bad in (np.nan, np.inf, 2.0**39 / count):
        with pytest.raises(Refused, match="not finite, or too large"):
            secure_aggregation.to_fixed_point(np.array([0.0, bad]), count)


@settings(deadline=None)
@given(
    arrays(np.float32, (4, 19), elements=st.floats(-2, 2, width=32)),
    arrays(np.float64, (4, 2), elements=st.floats(0.01, 1)),
)
def test_added_changes_are_the_weighted_mean_within_the_bound(
    deltas: np.ndarray, weights: np.ndarray
) -> None:
    grid = SecureAggregationConfig(quantization_bits=20)
    added = [
        secure_aggregation.quantize_weighted_update(
            d, dict(zip(LAYOUT.group_slices(), w, strict=True)), LAYOUT, grid
        )
        for d, w in zip(deltas, weights, strict=True)
    ]
    values = np.sum([v for v, _ in added], axis=0)
    sums = {
        key: np.sum([s[key] for _, s in added], axis=0)
        for key in secure_aggregation.empty_update_sums(LAYOUT)
    }
    mean = secure_aggregation.dequantize_mean(values, sums, LAYOUT, grid)
    by_value = np.concatenate([np.repeat(weights[:, :1], 15, 1), np.repeat(weights[:, 1:], 4, 1)], 1)
    expected = (by_value * deltas).sum(0) / by_value.sum(0)
    assert (
        np.abs(mean - expected) <= 4 * grid.clip_value / 2**grid.quantization_bits / by_value.sum(0) + 1e-6
    ).all()
    assert not sums["clipped"]


def test_what_nobody_weighs_does_not_move() -> None:
    values, sums = secure_aggregation.quantize_weighted_update(
        np.ones(19, np.float32), {"backbone": 1.0, "covid": 0.0}, LAYOUT, SecureAggregationConfig()
    )
    np.testing.assert_allclose(
        secure_aggregation.dequantize_mean(values, sums, LAYOUT, SecureAggregationConfig()),
        [1] * 15 + [0] * 4,
    )


def test_masks_cancel_and_look_like_noise_in_between() -> None:
    seed, exact, values = (
        secrets.token_bytes(32),
        np.arange(5, dtype=np.uint64),
        np.zeros(600_000, np.uint32),
    )  # more than a block
    secure_aggregation.add_mask(seed, 1, exact, values)
    assert abs(values.astype(np.float64).mean() / 2**32 - 0.5) < 0.002  # 5 standard errors of a uniform mean
    assert len(np.unique(values[: secure_aggregation.BLOCK_SIZE])) > 0.99 * secure_aggregation.BLOCK_SIZE
    assert (
        not np.intersect1d(
            values[: secure_aggregation.BLOCK_SIZE],
            values[secure_aggregation.BLOCK_SIZE : 2 * secure_aggregation.BLOCK_SIZE],
        ).size
        > 100
    )  # the stream goes on
    secure_aggregation.add_mask(seed, -1, exact, values)
    np.testing.assert_array_equal(exact, np.arange(5))
    assert not values.any()


@pytest.mark.parametrize("size", [16, 32])
def test_any_threshold_of_the_shares_give_the_secret_and_fewer_do_not(size: int) -> None:
    secret = secrets.token_bytes(size)
    shares = dict(enumerate(secure_aggregation.shamir_split(secret, 3, 5), 1))
    for some in combinations(shares, 3):
        assert secure_aggregation.shamir_combine({n: shares[n] for n in some}) == secret
    assert secure_aggregation.shamir_combine({n: shares[n] for n in (1, 2)}) != secret


def test_two_centres_agree_on_a_key_of_this_sum_and_purpose_only() -> None:
    one, other = secrets.token_bytes(32), secrets.token_bytes(32)
    key = secure_aggregation.derive_shared_key(one, secure_aggregation.derive_public_key(other), b"mask1")
    assert key == secure_aggregation.derive_shared_key(
        other, secure_aggregation.derive_public_key(one), b"mask1"
    )
    assert key != secure_aggregation.derive_shared_key(
        one, secure_aggregation.derive_public_key(other), b"mask2"
    )
    roster = {c: np.full(96, n, np.uint8) for n, c in enumerate("abc")}
    bound = secure_aggregation.hash_mask_context("train/main/1/x", roster, "abc")
    others = [
        ("train/main/2/x", roster, "abc"),
        ("train/main/1/x", roster | {"c": np.full(96, 9, np.uint8)}, "abc"),
        ("train/main/1/x", roster, "ab"),
    ]
    assert all(secure_aggregation.hash_mask_context(*other) != bound for other in others)


@pytest.mark.parametrize(("began", "needed"), [(3, 3), (4, 3), (5, 4), (16, 11), (64, 43)])
def test_more_than_half_and_at_least_three_must_stay(began: int, needed: int) -> None:
    assert secure_aggregation.compute_min_survivors(config_of(began), began) == needed
    assert 2 * needed > began


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["federation.centres=[a,b]"], "fewer than 3 centres"),
        (["federation.mode=local"], "exchanges nothing between centres"),
        (["aggregation.max_norm_ratio=5"], "compares single contributions"),
        (["aggregation.robust_rule=median"], "compares single contributions"),
        (
            ["privacy.dp_level=patient", "privacy.epsilon=8", "privacy.query_noise_multiplier=10"],
            "made of exact ones",
        ),
        (["evaluation.cross_site=last"], "each centre's own model"),
        (
            ["privacy.dp_level=patient", "privacy.epsilon=8", "privacy.query_noise_multiplier=4"],
            "made of exact ones",
        ),
        (["privacy.dp_level=central", "privacy.epsilon=8"], "use privacy.dp_level=patient"),
        (["privacy.secagg.scope=all"], "set evaluation.reduction=pooled"),
        (
            ["privacy.secagg.scope=all", "evaluation.reduction=pooled", "federation.evaluation=loco"],
            "use hide=model",
        ),
        (
            ["recipe=multisource_personal", "privacy.secagg.scope=all", "evaluation.reduction=pooled"],
            "personal=.all. is judged",
        ),
        (["privacy.secagg.quantization_bits=40"], "it must be 8 to 32"),
    ],
)
def test_what_cannot_be_had_with_it_is_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        compose_config(["privacy=secagg", *overrides])
