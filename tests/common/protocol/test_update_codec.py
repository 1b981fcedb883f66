"""Changes of weights in fewer bytes: error bounds, error feedback, and that nothing bad is hidden."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of

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


def layout_with(*shapes: tuple[int, ...], buffer: int = 0) -> Layout:
    layout, start = Layout(), 0
    for k, shape in enumerate([*shapes, *([(buffer,)] if buffer else [])]):
        stop = start + int(np.prod(shape))
        layout.floats.append(TensorSlot(f"t{k}", shape, start, stop, "backbone", k < len(shapes), False))
        start = stop
    return layout


SMALL = layout_with((4, 3), (5,), (3, 1, 2, 2), (1, 7), buffer=6)
WIDE = layout_with(
    (640, 160, 1, 1), (640, 1, 5, 5), (640,), (160, 640, 1, 1), (160,), buffer=1280
)  # as in EfficientNet


def grid(arrays: dict[str, np.ndarray], layout: Layout) -> np.ndarray:
    """Each value's scale [P]; 0 for a buffer's."""
    scales, out, at = from_bf16_ceil(arrays["scales"]), np.zeros(layout.size, np.float32), 0
    for e in layout.floats:
        if e.is_parameter:
            k = count_channels(e)
            out[e.span] = np.repeat(scales[at : at + k], (e.stop - e.start) // k)
            at += k
    return out


def adam(layout: Layout, rounds: int, seed: int = 1) -> list[np.ndarray]:
    """Changes of `rounds` rounds of five steps of a fresh Adam on gradients that are half drift, half noise."""
    rng = np.random.default_rng(seed)
    drift, out = rng.standard_normal(layout.size), []
    for _ in range(rounds):
        m, v, delta = np.zeros((3, layout.size))
        for t in range(1, 6):
            g = drift + rng.standard_normal(layout.size)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            delta -= 3e-4 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        out.append(delta.astype(np.float32))
    return out


@settings(deadline=None, max_examples=100)
@given(
    arrays_of(np.float32, SMALL.size, elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    arrays_of(np.float32, SMALL.size, elements=st.floats(-1, 1, width=32)),
    st.sampled_from(["int8", "int4"]),
)
def test_no_value_is_off_by_more_than_half_a_step(
    values: np.ndarray, residual: np.ndarray, codec: Compression
) -> None:
    """Of value + residual; buffers are exact; what was lost plus what was sent is what there was."""
    arrays, lost = encode_update(values, SMALL, codec, residual.copy())
    back, wanted = decode_update(arrays, SMALL, codec), values + np.where(SMALL.parameter_mask(), residual, 0)
    assert lost is not None
    tiny = np.float32(1e-30)
    assert (np.abs(wanted - back) <= np.maximum(grid(arrays, SMALL) * (0.5 + 1e-4), tiny)).all()
    np.testing.assert_array_equal(back[~SMALL.parameter_mask()], values[~SMALL.parameter_mask()])
    np.testing.assert_allclose(back.astype(np.float64) + lost, wanted, rtol=1e-6, atol=1e-30)


def test_fp32_changes_nothing() -> None:
    values = np.random.default_rng(1).normal(size=SMALL.size).astype(np.float32)
    arrays, lost = encode_update(values, SMALL, "fp32", None)
    assert lost is None
    np.testing.assert_array_equal(decode_update(arrays, SMALL, "fp32"), values)


@pytest.mark.parametrize(
    ("codec", "fewer", "once", "together"),
    [("fp16", 1.95, 5e-4, 2e-4), ("int8", 3.7, 0.007, 0.002), ("int4", 7.5, 0.13, 0.025)],
)
def test_bytes_and_errors_of_changes_as_adam_makes_them(
    codec: Compression, fewer: float, once: float, together: float
) -> None:
    """WIDE has 1.3 % of its values in depthwise filters and buffers; the whole network's ratio is what tests/benchmarks/wire.py prints."""
    deltas, mask = adam(WIDE, 5), WIDE.parameter_mask()
    residual, error = None, np.zeros(WIDE.size)
    for k, delta in enumerate(deltas):
        arrays, residual = encode_update(delta, WIDE, codec, residual)
        error += decode_update(arrays, WIDE, codec) - delta
        assert 4 * WIDE.size / sum(a.nbytes for a in arrays.values()) > fewer
        if k == 0:
            assert 0 < np.linalg.norm(error[mask]) < once * np.linalg.norm(delta[mask])
    assert np.linalg.norm(error[mask]) < together * np.linalg.norm(np.sum(deltas, axis=0)[mask])


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [2, 14, SMALL.size - 1])
def test_what_is_not_finite_is_seen_and_does_not_last(codec: Compression, bad: float, where: int) -> None:
    values = np.ones(SMALL.size, np.float32)
    values[where] = bad
    arrays, lost = encode_update(values, SMALL, codec)
    assert not np.isfinite(decode_update(arrays, SMALL, codec)).all()
    again, _ = encode_update(np.ones(SMALL.size, np.float32), SMALL, codec, lost)
    np.testing.assert_allclose(decode_update(again, SMALL, codec), 1, rtol=0.01)


def test_a_channel_far_smaller_than_its_neighbour_keeps_its_digits() -> None:
    values = np.ones(SMALL.size, np.float32)
    values[:3] = [1e-12, -3e-12, 2e-12]
    back = decode_update(encode_update(values, SMALL, "int8")[0], SMALL, "int8")
    np.testing.assert_allclose(back[:3], values[:3], rtol=0.02)


def test_what_does_not_fit_is_refused() -> None:
    arrays, _ = encode_update(np.ones(SMALL.size, np.float32), SMALL, "int4")
    for other in (
        {"codes": arrays["codes"][:-3]},
        {"codes": pack_int4(np.zeros(10**6, np.int8))},
        {"scales": arrays["scales"][:-1]},
    ):
        with pytest.raises(ValueError, match=r"instead of|rror|frame|decompress"):
            decode_update(arrays | other, SMALL, "int4")
    odd = np.arange(-7, 8, dtype=np.int8)
    np.testing.assert_array_equal(unpack_int4(pack_int4(odd), 15), odd)
