"""A change of weights as it leaves: in the run's codec (common/codec.py), with what rounding takes from it kept here and added to the next.

`wire/<run>/<stage>/<round>.npy` in the state folder is what a round left over. A round that is trained again takes what the round before it left, so
that a resumed run sends the same bits.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.site import safe
from common.codec import Arrays, encode
from common.messages import Train
from common.schema import Codec
from common.weights import Layout

KEPT = 3  # rounds: a resumed run may go back by one, a round of which nothing came by one more


def coded(folder: Path, request: Train, delta: NDArray[np.float32], layout: Layout, codec: Codec) -> Arrays:
    """The arrays to send for `delta` [P]."""
    place = folder / "wire" / safe(request.run) / safe(request.stage)
    left = {int(path.stem): path for path in place.glob("*.npy")}
    before = [round for round in left if round < request.round]
    residual = np.load(left[max(before)]) if before else None
    arrays, lost = encode(delta, layout, codec, residual)
    if lost is not None:
        place.mkdir(parents=True, exist_ok=True)
        part = place / f"{request.round:05d}.{os.getpid()}.part"
        with part.open("wb") as file:
            np.save(file, lost)
        part.replace(place / f"{request.round:05d}.npy")
        for round, path in left.items():
            if round <= request.round - KEPT:
                path.unlink(missing_ok=True)
    return arrays


def forget(folder: Path, run: str) -> None:
    """A run that is tested sends no more changes."""
    shutil.rmtree(folder / "wire" / safe(run), ignore_errors=True)
