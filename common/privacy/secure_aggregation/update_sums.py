"""Convert a centre's update into the values of a secure sum, and the sum into the mean update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config.schema import SecureAggregationConfig
from common.modeling.parameters import Layout
from common.privacy.secure_aggregation.fixed_point import quantization_step, quantize
from common.protocol.messages import Sums


class MaskableUpdate(NamedTuple):
    """An update times its weights, in the form in which it is masked."""

    values: NDArray[np.int32]  # [V] the parameters in steps of their grid
    sums: Sums  # the rest, named as in `empty_update_sums`


def empty_update_sums(layout: Layout) -> Sums:
    """Return zeros in the shapes of what accompanies the parameters of an update."""
    return {
        "buffers": np.zeros(layout.size - layout.num_parameters),  # change of the buffers times the weight
        "weights": np.zeros(len(layout.group_slices())),  # the weight in each group
        "clipped": np.zeros(1),  # number of parameters that were clipped
    }


def quantize_weighted_update(
    delta: NDArray[np.float32],
    weights: Mapping[str, float],
    layout: Layout,
    settings: SecureAggregationConfig,
) -> MaskableUpdate:
    """Multiply an update [P] by the centre's weight in each group and quantize its parameters."""
    sums = empty_update_sums(layout)
    quantized_tensors = [np.empty(0, np.int32)]
    buffer_offset = 0
    for slot in layout.floats:
        weighted = delta[slot.span] * np.float64(weights[slot.group])
        if slot.is_parameter:
            quantized = quantize(weighted, settings)
            quantized_tensors.append(quantized.values)
            sums["clipped"] += quantized.num_clipped
        else:
            sums["buffers"][buffer_offset : buffer_offset + slot.size] = weighted
            buffer_offset += slot.size
    sums["weights"][:] = [weights[group] for group in layout.group_slices()]
    return MaskableUpdate(np.concatenate(quantized_tensors), sums)


def dequantize_mean(
    values: NDArray[np.signedinteger], sums: Sums, layout: Layout, settings: SecureAggregationConfig
) -> NDArray[np.float32]:
    """Return the weighted mean [P] of the updates whose quantized values and sums were added.

    It is zero for a group in which no centre has any weight.
    """
    total_weights = dict(zip(layout.group_slices(), sums["weights"], strict=True))
    step = quantization_step(settings)
    mean = np.zeros(layout.size, np.float32)
    parameter_offset = 0
    buffer_offset = 0
    for slot in layout.floats:
        if slot.is_parameter:
            weighted_sum = values[parameter_offset : parameter_offset + slot.size] * step
            parameter_offset += slot.size
        else:
            weighted_sum = sums["buffers"][buffer_offset : buffer_offset + slot.size]
            buffer_offset += slot.size
        if total_weights[slot.group] > 0:
            mean[slot.span] = weighted_sum / total_weights[slot.group]
    return mean


def flatten_sums(sums: Mapping[str, NDArray[np.floating]]) -> NDArray[np.float64]:
    """Return all sums as one vector [R], in the order of their sorted names."""
    vectors = [np.ravel(sums[key]) for key in sorted(sums)]
    return np.concatenate([np.empty(0), *vectors])


def unflatten_sums(vector: NDArray[np.float64], template: Sums) -> Sums:
    """Return the sums in a vector from `flatten_sums`, with the names and shapes of the template."""
    sums: Sums = {}
    offset = 0
    for key in sorted(template):
        size = template[key].size
        sums[key] = vector[offset : offset + size].reshape(template[key].shape)
        offset += size
    return sums
