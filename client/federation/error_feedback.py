"""A change of weights as it leaves: in the run's codec (common/protocol/update_codec.py), with what rounding takes from it kept here and added to the next.

`wire/<run>/<stage>/<round>.npy` in the state folder is what a round left over. A round that is trained again takes what the round before it left, so
that a resumed run sends the same bits.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.site.config import safe_filename
from common.config.schema import Compression
from common.modeling.parameters import Layout
from common.protocol.messages import TrainRequest
from common.protocol.update_codec import Arrays, encode_update

ROUNDS_KEPT = 3  # rounds: a resumed run may go back by one, a round of which nothing came by one more


def encode_with_feedback(
    folder: Path, request: TrainRequest, delta: NDArray[np.float32], layout: Layout, codec: Compression
) -> Arrays:
    """The arrays to send for `delta` [P]."""
    place = folder / "wire" / safe_filename(request.run_id) / safe_filename(request.stage)
    left = {int(path.stem): path for path in place.glob("*.npy")}
    before = [round for round in left if round < request.round]
    residual = np.load(left[max(before)]) if before else None
    arrays, lost = encode_update(delta, layout, codec, residual)
    if lost is not None:
        place.mkdir(parents=True, exist_ok=True)
        part = place / f"{request.round:05d}.{os.getpid()}.part"
        with part.open("wb") as file:
            np.save(file, lost)
        part.replace(place / f"{request.round:05d}.npy")
        for round, path in left.items():
            if round <= request.round - ROUNDS_KEPT:
                path.unlink(missing_ok=True)
    return arrays


def delete_residuals(folder: Path, run_id: str) -> None:
    """A run that is tested sends no more changes."""
    shutil.rmtree(folder / "wire" / safe_filename(run_id), ignore_errors=True)
