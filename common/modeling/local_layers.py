"""Which of a model's values stay at the centres (`stage.local_layers`). Both sides derive it from the layout.

The centre sends no change of these values, and the coordinator refuses an update that holds one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config.schema import LocalLayerGroup
from common.modeling.parameters import Layout, TensorSlot


@dataclass(frozen=True)
class LocalValues:
    """Masks of the values of a model that stay at a centre."""

    floats: NDArray[np.bool_]  # [P]
    int_buffers: NDArray[np.bool_]  # [Q]

    def union(self, other: LocalValues) -> LocalValues:
        """Return the values that either of the two selects."""
        return LocalValues(self.floats | other.floats, self.int_buffers | other.int_buffers)


def find_local_values(layout: Layout, local_layers: Collection[LocalLayerGroup]) -> LocalValues:
    """Return which values stay at a centre.

    For batch norms this is FedBN (Li et al., "FedBN", ICLR 2021); it includes their running statistics and
    their counters of batches.
    """
    local_values = LocalValues(np.zeros(layout.size, bool), np.zeros(layout.int_buffer_size, bool))
    for slot in layout.floats:
        local_values.floats[slot.span] = _is_local(slot, local_layers)
    for slot in layout.int_buffers:
        local_values.int_buffers[slot.span] = _is_local(slot, local_layers)
    return local_values


def _is_local(slot: TensorSlot, local_layers: Collection[LocalLayerGroup]) -> bool:
    if "all" in local_layers:
        return True
    if slot.is_batch_norm and "batch_norm" in local_layers:
        return True
    is_head = slot.group not in ("backbone", "decoder")
    return is_head and "heads" in local_layers
