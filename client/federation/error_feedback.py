"""Encode updates with error feedback: what rounding takes from one update is added to the next.

The residual of a round is kept as `wire/<run>/<stage>/<round>.npy` in the state folder. A round that is
trained again starts from the residual of the round before it, so that a resumed run sends the same bits. The
codecs and their papers are in common/protocol/update_codec.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.federation.array_file import save_array
from client.site.config import safe_filename
from common.config.schema import Compression
from common.modeling.parameters import Layout
from common.protocol.messages import TrainRequest
from common.protocol.update_codec import Arrays, encode_update

ROUNDS_KEPT = 3  # a resumed run may go back by one round, and by one more when nothing came of a round


def encode_with_feedback(
    folder: Path, request: TrainRequest, delta: NDArray[np.float32], layout: Layout, codec: Compression
) -> Arrays:
    """Return the arrays to send for an update [P], and keep what the codec has lost of it."""
    stage_dir = folder / "wire" / safe_filename(request.run_id) / safe_filename(request.stage)
    residual_paths = {int(path.stem): path for path in stage_dir.glob("*.npy")}
    earlier_rounds = [number for number in residual_paths if number < request.round]
    residual = np.load(residual_paths[max(earlier_rounds)]) if earlier_rounds else None
    encoded = encode_update(delta, layout, codec, residual)
    if encoded.residual is not None:
        save_array(stage_dir / f"{request.round:05d}.npy", encoded.residual)
        for number, path in residual_paths.items():
            if number <= request.round - ROUNDS_KEPT:
                path.unlink(missing_ok=True)
    return encoded.arrays


def delete_residuals(folder: Path, run_id: str) -> None:
    """Delete the residuals of a run, and its cached weights, when it sends no more updates."""
    shutil.rmtree(folder / "wire" / safe_filename(run_id), ignore_errors=True)
