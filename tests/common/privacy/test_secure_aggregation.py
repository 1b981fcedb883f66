"""Secure aggregation: quantization error, overflow, masks that cancel, and secret sharing."""

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
from common.privacy import secure_aggregation as secagg
from common.utils.errors import Refused

LAYOUT = Layout(
    [
        TensorSlot("encoder.w", (3, 4), 0, 12, "backbone", True, False),
        TensorSlot("encoder.mean", (3,), 12, 15, "backbone", False, True),
        TensorSlot("heads.covid.w", (4,), 15, 19, "covid", True, False),
    ]
)
SETTINGS = st.builds(
    SecureAggregationConfig, clip_value=st.floats(1e-3, 1e3), quantization_bits=st.integers(8, 32)
)


def make_config(num_centres: int, quantization_bits: int = 26) -> Config:
    names = ",".join(f"c{i:03d}" for i in range(num_centres))
    return compose_config(
        [
            "federation=folder",
            f"federation.centres=[{names}]",
            "privacy=secagg",
            f"privacy.secagg.quantization_bits={quantization_bits}",
        ]
    )


@settings(deadline=None)
@given(SETTINGS, arrays(np.float64, 20, elements=st.floats(-1, 1)))
def test_quantization_error_is_at_most_half_a_step(
    config: SecureAggregationConfig, fractions: np.ndarray
) -> None:
    step = secagg.quantization_step(config)
    values = fractions * (config.clip_value - step)
    quantized, num_clipped = secagg.quantize(values, config)
    assert not num_clipped
    rounding = config.clip_value * 2.0**-50  # of the values themselves, as floats
    max_error = config.clip_value / 2**config.quantization_bits * (1 + 1e-9) + rounding
    assert np.abs(quantized * step - values).max() <= max_error
    clipped, num_clipped = secagg.quantize(np.array([-3 * config.clip_value, np.inf, 0]), config)
    assert num_clipped == 2
    assert clipped[0] == -clipped[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 300), st.integers(8, 32), st.sampled_from([-1, 1]))
def test_sum_of_largest_values_does_not_overflow(num_centres: int, bits: int, sign: int) -> None:
    config = make_config(num_centres, bits)
    secagg_config = secagg.require_secagg_config(config)
    num_bytes = secagg.bytes_per_parameter(config)
    dtype = secagg.ring_dtype(num_bytes)
    quantized, _ = secagg.quantize(np.full(3, 2.0 * sign * secagg_config.clip_value), secagg_config)
    total = np.zeros(3, dtype)
    for _ in range(num_centres):
        packed = secagg.pack_ring_values(quantized.astype(dtype), num_bytes)
        total += secagg.unpack_ring_values(packed, num_bytes)
    expected = num_centres * quantized.astype(np.int64)
    np.testing.assert_array_equal(secagg.to_signed_integers(total, num_bytes), expected)
    assert num_bytes == math.ceil((bits + math.ceil(math.log2(num_centres))) / 8)


@settings(deadline=None)
@given(arrays(np.float64, 9, elements=st.floats(-1e6, 1e6)), st.integers(3, 1000))
def test_fixed_point_sums_are_exact_to_24_bits_and_counts_entirely(
    values: np.ndarray, num_centres: int
) -> None:
    fixed_point = secagg.to_fixed_point(values, num_centres).view(np.uint64)
    total = np.sum([fixed_point] * 3, axis=0, dtype=np.uint64)
    assert np.abs(secagg.from_fixed_point(total) - 3 * values).max() <= 3 * 2.0**-25
    counts = np.rint(values)
    restored = secagg.from_fixed_point(secagg.to_fixed_point(counts, num_centres).view(np.uint64))
    np.testing.assert_array_equal(restored, counts)
    for bad_value in (np.nan, np.inf, 2.0**39 / num_centres):
        with pytest.raises(Refused, match="not finite, or too large"):
            secagg.to_fixed_point(np.array([0.0, bad_value]), num_centres)


@settings(deadline=None)
@given(
    arrays(np.float32, (4, 19), elements=st.floats(-2, 2, width=32)),
    arrays(np.float64, (4, 2), elements=st.floats(0.01, 1)),
)
def test_sum_of_updates_gives_their_weighted_mean(deltas: np.ndarray, weights: np.ndarray) -> None:
    config = SecureAggregationConfig(quantization_bits=20)
    updates = []
    for delta, centre_weights in zip(deltas, weights, strict=True):
        weight_by_group = dict(zip(LAYOUT.group_slices(), centre_weights, strict=True))
        updates.append(secagg.quantize_weighted_update(delta, weight_by_group, LAYOUT, config))
    values = np.sum([update.values for update in updates], axis=0)
    sums = {
        key: np.sum([update.sums[key] for update in updates], axis=0)
        for key in secagg.empty_update_sums(LAYOUT)
    }
    mean = secagg.dequantize_mean(values, sums, LAYOUT, config)
    weight_by_value = np.concatenate([np.repeat(weights[:, :1], 15, 1), np.repeat(weights[:, 1:], 4, 1)], 1)
    total_weight = weight_by_value.sum(0)
    expected = (weight_by_value * deltas).sum(0) / total_weight
    max_error = 4 * config.clip_value / 2**config.quantization_bits / total_weight + 1e-6
    assert (np.abs(mean - expected) <= max_error).all()
    assert not sums["clipped"]


def test_group_without_weight_does_not_change() -> None:
    weights = {"backbone": 1.0, "covid": 0.0}
    config = SecureAggregationConfig()
    values, sums = secagg.quantize_weighted_update(np.ones(19, np.float32), weights, LAYOUT, config)
    mean = secagg.dequantize_mean(values, sums, LAYOUT, config)
    np.testing.assert_allclose(mean, [1] * 15 + [0] * 4)


def test_masks_look_random_and_cancel() -> None:
    seed = secrets.token_bytes(32)
    fixed_point_sums = np.arange(5, dtype=np.uint64)
    values = np.zeros(600_000, np.uint32)  # more than two blocks
    secagg.add_mask(seed, 1, fixed_point_sums, values)
    assert abs(values.astype(np.float64).mean() / 2**32 - 0.5) < 0.002  # 5 standard errors of a uniform mean
    first_block = values[: secagg.BLOCK_SIZE]
    second_block = values[secagg.BLOCK_SIZE : 2 * secagg.BLOCK_SIZE]
    assert len(np.unique(first_block)) > 0.99 * secagg.BLOCK_SIZE
    assert not np.intersect1d(first_block, second_block).size > 100  # the key stream does not restart
    secagg.add_mask(seed, -1, fixed_point_sums, values)
    np.testing.assert_array_equal(fixed_point_sums, np.arange(5))
    assert not values.any()


@pytest.mark.parametrize("num_bytes", [16, 32])
def test_threshold_many_shares_restore_the_secret_and_fewer_do_not(num_bytes: int) -> None:
    secret = secrets.token_bytes(num_bytes)
    shares = dict(enumerate(secagg.shamir_split(secret, 3, 5), 1))
    for numbers in combinations(shares, 3):
        assert secagg.shamir_combine({number: shares[number] for number in numbers}) == secret
    assert secagg.shamir_combine({number: shares[number] for number in (1, 2)}) != secret


def test_shared_key_depends_on_its_purpose() -> None:
    private, other_private = secrets.token_bytes(32), secrets.token_bytes(32)
    public = secagg.derive_public_key(private)
    other_public = secagg.derive_public_key(other_private)
    key = secagg.derive_shared_key(private, other_public, b"mask1")
    assert key == secagg.derive_shared_key(other_private, public, b"mask1")
    assert key != secagg.derive_shared_key(private, other_public, b"mask2")


def test_mask_context_depends_on_sum_keys_and_members() -> None:
    roster = {centre: np.full(96, number, np.uint8) for number, centre in enumerate("abc")}
    context = secagg.hash_mask_context("train/main/1/x", roster, "abc")
    changed_key = roster | {"c": np.full(96, 9, np.uint8)}
    assert secagg.hash_mask_context("train/main/2/x", roster, "abc") != context
    assert secagg.hash_mask_context("train/main/1/x", changed_key, "abc") != context
    assert secagg.hash_mask_context("train/main/1/x", roster, "ab") != context


@pytest.mark.parametrize(("num_started", "min_survivors"), [(3, 3), (4, 3), (5, 4), (16, 11), (64, 43)])
def test_a_majority_and_at_least_three_centres_must_stay(num_started: int, min_survivors: int) -> None:
    assert secagg.compute_min_survivors(make_config(num_started), num_started) == min_survivors
    assert 2 * min_survivors > num_started


PATIENT_DP = ["privacy.dp_level=patient", "privacy.epsilon=8", "privacy.count_noise_multiplier=5"]
HIDE_ALL = ["privacy.secagg.scope=all", "evaluation.reduction=pooled"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.centres=[a,b]"], "fewer than 3 centres"),
        (["federation.mode=local"], "exchanges nothing between centres"),
        (["aggregation.max_norm_ratio=5"], "compares single updates"),
        (["aggregation.robust_rule=median"], "compares single updates"),
        ([*PATIENT_DP, *HIDE_ALL, "privacy.query_noise_multiplier=10"], "which scope=all hides anyway"),
        (["evaluation.cross_site=last"], "each centre's own model"),
        (["privacy.dp_level=central", "privacy.epsilon=8"], "use patient"),
        (["privacy.secagg.scope=all"], "set evaluation.reduction=pooled"),
        ([*HIDE_ALL, "federation.evaluation=loco"], "use scope=model"),
        (["recipe=multisource_personal", *HIDE_ALL], r"local_layers=\[all\] is selected by"),
        (["privacy.secagg.quantization_bits=40"], "it must be 8 to 32"),
    ],
)
def test_incompatible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        compose_config(["privacy=secagg", *overrides])
