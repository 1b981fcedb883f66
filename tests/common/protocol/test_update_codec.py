"""Encoded updates: error bounds, error feedback, and that values that are not finite stay visible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_strategy

from common.modeling.parameters import Layout, TensorSlot
from common.protocol.update_codec import (
    Compression,
    count_channels,
    decode_update,
    encode_update,
    from_bf16_ceil,
    pack_int4,
    unpack_int4,
)


def make_layout(*shapes: tuple[int, ...], buffer_size: int) -> Layout:
    """Return a layout of parameters with the given shapes, and one buffer at the end."""
    layout = Layout()
    start = 0
    for index, shape in enumerate([*shapes, (buffer_size,)]):
        stop = start + int(np.prod(shape))
        is_parameter = index < len(shapes)
        layout.floats.append(TensorSlot(f"t{index}", shape, start, stop, "backbone", is_parameter, False))
        start = stop
    return layout


SMALL = make_layout((4, 3), (5,), (3, 1, 2, 2), (1, 7), buffer_size=6)
# As in EfficientNet
WIDE = make_layout((640, 160, 1, 1), (640, 1, 5, 5), (640,), (160, 640, 1, 1), (160,), buffer_size=1280)


def scales_by_value(arrays: dict[str, np.ndarray], layout: Layout) -> np.ndarray:
    """Return each value's scale [P]; 0 for a buffer's."""
    scales = from_bf16_ceil(arrays["scales"])
    repeated = np.zeros(layout.size, np.float32)
    offset = 0
    for slot in layout.parameter_slots:
        num_channels = count_channels(slot)
        slot_scales = scales[offset : offset + num_channels]
        repeated[slot.span] = np.repeat(slot_scales, slot.size // num_channels)
        offset += num_channels
    return repeated


def simulate_adam_updates(layout: Layout, rounds: int, seed: int = 1) -> list[np.ndarray]:
    """Return updates of five steps of a fresh Adam each, on gradients that are half drift, half noise."""
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal(layout.size)
    updates = []
    for _ in range(rounds):
        m, v, delta = np.zeros((3, layout.size))
        for t in range(1, 6):
            gradient = drift + rng.standard_normal(layout.size)
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient * gradient
            delta -= 3e-4 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        updates.append(delta.astype(np.float32))
    return updates


@settings(deadline=None, max_examples=100)
@given(
    arrays_strategy(np.float32, SMALL.size, elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    arrays_strategy(np.float32, SMALL.size, elements=st.floats(-1, 1, width=32)),
    st.sampled_from(["int8", "int4"]),
)
def test_error_is_at_most_half_a_step(values: np.ndarray, residual: np.ndarray, codec: Compression) -> None:
    """The error of value + residual; buffers are exact, and the new residual is exactly what was lost."""
    is_parameter = SMALL.parameter_mask()
    arrays, new_residual = encode_update(values, SMALL, codec, residual.copy())
    decoded = decode_update(arrays, SMALL, codec)
    expected = values + np.where(is_parameter, residual, 0)
    assert new_residual is not None
    bound = np.maximum(scales_by_value(arrays, SMALL) * (0.5 + 1e-4), np.float32(1e-30))
    assert (np.abs(expected - decoded) <= bound).all()
    np.testing.assert_array_equal(decoded[~is_parameter], values[~is_parameter])
    np.testing.assert_allclose(decoded.astype(np.float64) + new_residual, expected, rtol=1e-6, atol=1e-30)


def test_fp32_is_lossless() -> None:
    values = np.random.default_rng(1).normal(size=SMALL.size).astype(np.float32)
    arrays, residual = encode_update(values, SMALL, "fp32", None)
    assert residual is None
    np.testing.assert_array_equal(decode_update(arrays, SMALL, "fp32"), values)


@pytest.mark.parametrize(
    ("codec", "min_compression", "max_error_of_one", "max_error_of_all"),
    [("fp16", 1.95, 5e-4, 2e-4), ("int8", 3.7, 0.007, 0.002), ("int4", 7.5, 0.13, 0.025)],
)
def test_compression_and_error_of_adam_updates(
    codec: Compression, min_compression: float, max_error_of_one: float, max_error_of_all: float
) -> None:
    """WIDE has 1.3 % of its values in depthwise filters and buffers (network: tests/benchmarks/wire.py)."""
    updates = simulate_adam_updates(WIDE, 5)
    is_parameter = WIDE.parameter_mask()
    residual = None
    total_error = np.zeros(WIDE.size)
    for index, update in enumerate(updates):
        arrays, residual = encode_update(update, WIDE, codec, residual)
        total_error += decode_update(arrays, WIDE, codec) - update
        assert 4 * WIDE.size / sum(array.nbytes for array in arrays.values()) > min_compression
        if index == 0:
            relative = np.linalg.norm(total_error[is_parameter]) / np.linalg.norm(update[is_parameter])
            assert 0 < relative < max_error_of_one
    total_update = np.sum(updates, axis=0)[is_parameter]
    assert np.linalg.norm(total_error[is_parameter]) < max_error_of_all * np.linalg.norm(total_update)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("bad_value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [2, 14, SMALL.size - 1])
def test_value_that_is_not_finite_shows_in_one_round_only(
    codec: Compression, bad_value: float, position: int
) -> None:
    values = np.ones(SMALL.size, np.float32)
    values[position] = bad_value
    arrays, residual = encode_update(values, SMALL, codec)
    assert not np.isfinite(decode_update(arrays, SMALL, codec)).all()
    next_arrays, _ = encode_update(np.ones(SMALL.size, np.float32), SMALL, codec, residual)
    np.testing.assert_allclose(decode_update(next_arrays, SMALL, codec), 1, rtol=0.01)


def test_small_channel_keeps_its_precision_beside_a_large_one() -> None:
    values = np.ones(SMALL.size, np.float32)
    values[:3] = [1e-12, -3e-12, 2e-12]
    decoded = decode_update(encode_update(values, SMALL, "int8").arrays, SMALL, "int8")
    np.testing.assert_allclose(decoded[:3], values[:3], rtol=0.02)


def test_arrays_of_wrong_size_are_rejected() -> None:
    arrays, _ = encode_update(np.ones(SMALL.size, np.float32), SMALL, "int4")
    for replacement in (
        {"codes": arrays["codes"][:-3]},
        {"codes": pack_int4(np.zeros(10**6, np.int8))},
        {"scales": arrays["scales"][:-1]},
    ):
        with pytest.raises(ValueError, match=r"expected|rror|frame|decompress"):
            decode_update(arrays | replacement, SMALL, "int4")


def test_int4_packing_of_an_odd_number_of_codes_is_lossless() -> None:
    codes = np.arange(-7, 8, dtype=np.int8)
    np.testing.assert_array_equal(unpack_int4(pack_int4(codes), 15), codes)
