"""Updates on disk: written as they arrive, so that memory does not grow with the number of centres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import Layout
from common.protocol.messages import TrainReply


@dataclass
class StoredUpdate:
    """A centre's update on disk, with what is needed to judge it."""

    centre: str
    path: Path  # of the weight delta, float32 [P]
    int_buffers: NDArray[np.int64]
    norm: float  # L2 norm of the delta over parameters; buffers would dominate it

    def load_delta(self) -> NDArray[np.float32]:
        """Return the weight delta [P], memory-mapped: nothing is read before it is used."""
        delta: NDArray[np.float32] = np.load(self.path, mmap_mode="c")
        return delta


def store_update(reply: TrainReply, layout: Layout, folder: Path) -> StoredUpdate:
    """Write a valid update to disk, so that its memory can be freed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{reply.centre}.npy"
    np.save(path, reply.delta)
    norms = []
    if reply.delta.size:
        for slot in layout.parameter_slots:
            norms.append(float(np.linalg.norm(reply.delta[slot.span])))
    norm = math.hypot(*norms)
    return StoredUpdate(reply.centre, path, reply.int_buffers, norm)
