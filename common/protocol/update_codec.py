"""Encode updates (changes of weights) in fewer bytes: fp32, fp16, int8 or int4, with error feedback.

Parameters are rounded symmetrically on a grid of their own per channel (the first dimension of a tensor; a
1-D tensor is one channel): scale = max|x| / 127 for int8, or / 7 for int4. What rounding loses is the
residual. The sender adds it to its next update, so errors do not accumulate over rounds (Seide et al., "1-bit
SGD", Interspeech 2014; Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019).

Scales travel as the upper half of a float32, rounded up. float16 would not do: a change of 1e-5 has a scale
of 8e-8, below its precision. float32 would cost too much: a depthwise filter has one scale for every nine
values. Batch-norm statistics (0.5 % of the values) travel as float32.

Updates in a secure sum are not encoded here; they have a grid of their own
(common/privacy/secure_aggregation). With differential privacy an update is clipped and noised first and
encoded afterwards, which costs no privacy; the residual, too, consists of noised values and stays at the
centre.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from common.config.schema import Compression, Config
from common.modeling.parameters import Layout, TensorSlot

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]

MAX_CODES = {"fp16": 1.0, "int8": 127.0, "int4": 7.0}  # the largest code of a channel
CODE_DTYPES: dict[str, type[np.generic]] = {"fp16": np.float16, "int8": np.int8, "int4": np.int8}
ZERO_THRESHOLD = 1e-30  # a channel with smaller values only is sent as zeros; its values stay in the residual
BLOCK_SIZE = 1 << 16  # values that are processed at a time, few enough for the processor's cache


class EncodedUpdate(NamedTuple):
    """An update in its form on the wire, and what the encoding lost."""

    arrays: Arrays
    residual: Floats | None  # [P] to add to the next update; None for fp32


def encode_update(
    values: Floats, layout: Layout, codec: Compression, residual: Floats | None = None
) -> EncodedUpdate:
    """Encode an update [P] in the layout's order, after adding the residual [P] of the previous one.

    The given residual array is overwritten with the new residual. The encoded arrays are:

    - fp32: `values`, float32 [P].
    - otherwise: `codes` of the V parameters (float16 or int8 [V]; int4: compressed bytes), `scales` uint16
      [channels], and `rest` float32 [P - V] with the values that are not parameters.

    A channel that contains a value that is not finite gets a scale that is not finite, and decodes to such
    values.
    """
    if codec == "fp32":
        return EncodedUpdate({"values": values}, None)
    quantizer = _BlockQuantizer(codec, adds_residual=residual is not None)
    if residual is None:
        residual = np.zeros(layout.size, np.float32)
    codes, scales = _quantize_parameters(values, residual, layout, quantizer)
    rest = [np.empty(0, np.float32)]
    for slot in layout.floats:
        if not slot.is_parameter:
            rest.append(values[slot.span])
            residual[slot.span] = 0
    arrays: Arrays = {
        "codes": pack_int4(codes.view(np.int8)) if codec == "int4" else codes,
        "scales": to_bf16_ceil(scales),
        "rest": np.concatenate(rest),
    }
    return EncodedUpdate(arrays, residual)


def decode_update(
    arrays: Mapping[str, NDArray[np.generic]], layout: Layout, codec: Compression, out: Floats | None = None
) -> Floats:
    """Return the values float32 [P] of an encoded update; written into `out` if it is given.

    Raises:
        KeyError: An array is missing.
        ValueError: An array has another size or type than this layout and codec need.
    """
    if codec == "fp32":
        return _require_array(arrays["values"], np.float32, layout.size)
    slots = layout.parameter_slots
    num_codes = layout.num_parameters
    codes = unpack_int4(arrays["codes"], num_codes) if codec == "int4" else arrays["codes"]
    codes = _require_array(codes, CODE_DTYPES[codec], num_codes)
    num_scales = sum(map(count_channels, slots))
    scales = from_bf16_ceil(_require_array(arrays["scales"], np.uint16, num_scales))
    rest = _require_array(arrays["rest"], np.float32, layout.size - num_codes)

    values = np.empty(layout.size, np.float32) if out is None else out
    code_offset = 0
    channel_offset = 0
    rest_offset = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for slot in layout.floats:
            if not slot.is_parameter:
                values[slot.span] = rest[rest_offset : rest_offset + slot.size]
                rest_offset += slot.size
                continue
            num_channels = count_channels(slot)
            slot_codes = codes[code_offset : code_offset + slot.size].reshape(num_channels, -1)
            slot_scales = scales[channel_offset : channel_offset + num_channels, None]
            slot_values = values[slot.span].reshape(num_channels, -1)
            np.multiply(slot_codes, slot_scales, out=slot_values, dtype=np.float32)
            code_offset += slot.size
            channel_offset += num_channels
    return values


def apply_update(
    floats: Floats,
    encoded_delta: Mapping[str, NDArray[np.generic]],
    layout: Layout,
    codec: Compression,
    out: Floats | None = None,
) -> Floats:
    """Return the values [P] plus an encoded update, with the same bits on every machine.

    An empty update returns the values themselves.

    Raises:
        KeyError: An array is missing.
        ValueError: An array has another size or type than this layout and codec need.
    """
    if not encoded_delta:
        return floats
    delta = decode_update(encoded_delta, layout, codec, out)
    np.add(_require_array(floats, np.float32, layout.size), delta, out=delta)
    return delta


def select_codec(config: Config) -> Compression:
    """Return the codec of a run's updates. Central and local training send none, so theirs stay exact."""
    return config.aggregation.compression if config.federation.mode == "federated" else "fp32"


# --- quantization -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Channels:
    """Views of some channels of one tensor: [R, N], and one scale [R] per channel."""

    values: Floats
    residual: Floats  # read and overwritten
    codes: NDArray[Any]  # output
    scales: Floats  # output

    def take_rows(self, rows: slice) -> _Channels:
        """Return the views of some of the channels."""
        return _Channels(self.values[rows], self.residual[rows], self.codes[rows], self.scales[rows])


class _BlockQuantizer:
    """Quantizes blocks of channels, with scratch memory that is small enough for the processor's cache."""

    def __init__(self, codec: Compression, adds_residual: bool) -> None:
        """Allocate the scratch memory; `adds_residual`: whether there is a residual to add to the values."""
        self.codec = codec
        self.code_dtype = CODE_DTYPES[codec]
        self.max_code = np.float32(MAX_CODES[codec])
        self.adds_residual = adds_residual
        self._totals = np.empty(BLOCK_SIZE, np.float32)
        self._scaled = np.empty(BLOCK_SIZE, np.float32)

    def quantize_block(self, block: _Channels) -> None:
        """Compute a block's scales, codes and new residual."""
        totals = _view_scratch(self._totals, block.values.shape)
        scaled = _view_scratch(self._scaled, block.values.shape)
        if self.adds_residual:
            np.add(block.values, block.residual, out=totals)
        else:
            np.copyto(totals, block.values)

        largest = np.maximum(totals.max(1), -totals.min(1))
        is_finite = np.isfinite(largest)
        scales = from_bf16_ceil(to_bf16_ceil(largest / self.max_code))
        scales[largest < ZERO_THRESHOLD] = 0
        scales[~is_finite] = np.nan
        block.scales[:] = scales

        is_usable = scales > 0
        np.divide(totals, np.where(is_usable, scales, np.inf)[:, None], out=scaled)
        if self.codec != "fp16":
            np.rint(scaled, out=scaled)
        if not is_usable.all():
            scaled[~is_usable] = 0
        np.copyto(block.codes, scaled, casting="unsafe")

        if self.codec == "fp16":
            np.copyto(scaled, block.codes)  # the conversion to float16 has rounded them
        np.multiply(scaled, scales[:, None], out=scaled)
        np.subtract(totals, scaled, out=block.residual)
        if not is_finite.all():
            block.residual[~is_finite] = 0  # reported once, by the scale; the next round starts clean


def _quantize_parameters(
    values: Floats, residual: Floats, layout: Layout, quantizer: _BlockQuantizer
) -> tuple[NDArray[Any], Floats]:
    """Return the codes [V] and scales [channels] of all parameters, and overwrite the residual."""
    codes = np.empty(layout.num_parameters, quantizer.code_dtype)
    scales = np.empty(sum(map(count_channels, layout.parameter_slots)), np.float32)
    code_offset = 0
    channel_offset = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for slot in layout.parameter_slots:
            num_channels = count_channels(slot)
            channels = _Channels(
                values=values[slot.span].reshape(num_channels, -1),
                residual=residual[slot.span].reshape(num_channels, -1),
                codes=codes[code_offset : code_offset + slot.size].reshape(num_channels, -1),
                scales=scales[channel_offset : channel_offset + num_channels],
            )
            for rows in split_row_blocks(channels.values.shape):
                quantizer.quantize_block(channels.take_rows(rows))
            code_offset += slot.size
            channel_offset += num_channels
    return codes, scales


def _view_scratch(scratch: Floats, shape: tuple[int, ...]) -> Floats:
    """Return scratch memory in the given shape; newly allocated where a single row exceeds a block."""
    size = shape[0] * shape[1]
    if size > len(scratch):
        return np.empty(shape, np.float32)
    return scratch[:size].reshape(shape)


def count_channels(slot: TensorSlot) -> int:
    """Return the number of a tensor's channels, each of which has one scale."""
    return slot.shape[0] if len(slot.shape) > 1 else 1


def to_bf16_ceil(scales: Floats) -> NDArray[np.uint16]:
    """Return the upper 16 bits of positive float32 values, rounded up; infinity and NaN are preserved."""
    return ((scales.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def from_bf16_ceil(scales: NDArray[np.uint16]) -> Floats:
    """Return the float32 values of scales from `to_bf16_ceil`."""
    return (scales.astype(np.uint32) << 16).view(np.float32)


def split_row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices over the rows of an array [K, N], each of about BLOCK_SIZE values and at least one row."""
    rows_per_block = max(1, BLOCK_SIZE // max(1, shape[1]))
    for start in range(0, shape[0], rows_per_block):
        yield slice(start, min(start + rows_per_block, shape[0]))


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack codes of -7 to 7, two in a byte, and compress them with zstd.

    Most codes are near zero, so Huffman coding saves another quarter.
    """
    nibbles = np.zeros(codes.size + codes.size % 2, np.uint8)
    np.add(codes, 8, out=nibbles[: codes.size], casting="unsafe")
    pairs = nibbles[::2] | (nibbles[1::2] << 4)
    return np.frombuffer(zstandard.ZstdCompressor(level=1).compress(pairs.data), np.uint8)


def unpack_int4(data: NDArray[np.generic], num_codes: int) -> NDArray[np.int8]:
    """Unpack codes from `pack_int4`; never allocates more than `num_codes` need, whatever was received.

    Raises:
        ValueError: The data are not that many codes.
    """
    num_bytes = (num_codes + 1) // 2
    frame = np.ascontiguousarray(data).tobytes()
    try:
        content_size = zstandard.frame_content_size(frame)
        if content_size != num_bytes:
            raise ValueError(f"expected {num_bytes} bytes of int4 codes, got {content_size}")
        pairs = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    codes = np.empty((num_bytes, 2), np.int8)
    np.subtract(pairs & 15, 8, out=codes[:, 0], casting="unsafe")
    np.subtract(pairs >> 4, 8, out=codes[:, 1], casting="unsafe")
    return codes.reshape(-1)[:num_codes]


def _require_array(array: NDArray[Any], dtype: type[np.generic], size: int) -> NDArray[Any]:
    """Return the array, or raise ValueError when it has another type or is not a vector of that size."""
    if array.dtype != dtype or array.shape != (size,):
        expected = f"{np.dtype(dtype).name} ({size},)"
        raise ValueError(f"expected an array {expected}, got {array.dtype} {array.shape}")
    return array
