"""Cache the last weights that a centre received, so that the next ones can be sent as a change.

`wire/<run>/<digest>.npy` in the state folder holds them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from client.federation.array_file import save_array
from client.site.config import safe_filename
from common.config.schema import Compression, Config
from common.modeling.model import parameter_layout
from common.modeling.parameters import Weights
from common.protocol.messages import StatisticsRequest, TrainRequest
from common.protocol.update_codec import apply_update, select_codec
from common.utils.errors import ConsiliumError

RequestT = TypeVar("RequestT", StatisticsRequest, TrainRequest, StatisticsRequest | TrainRequest)

log = logging.getLogger("consilium.centre")


class MissingBaseError(ConsiliumError):
    """The weights that a request builds on are not cached at this centre."""


def restore_parameters(folder: Path, config: Config, request: RequestT) -> RequestT:
    """Return the request with its weights in full, and cache them.

    Raises MissingBaseError when they cannot be restored to the very bit.
    """
    codec = select_codec(config)
    weights = request.weights
    if weights is None or codec == "fp32":
        return request
    cache_dir = folder / "wire" / safe_filename(request.run_id)
    if request.base_digest:
        weights = _apply_change(cache_dir, config, codec, request, weights)
    cache_parameters(cache_dir, weights)
    return replace(request, weights=weights, base_digest="", encoded_delta={}, target_digest="")


def _apply_change(
    cache_dir: Path,
    config: Config,
    codec: Compression,
    request: StatisticsRequest | TrainRequest,
    received: Weights,
) -> Weights:
    base_path = cache_dir / f"{safe_filename(request.base_digest)}.npy"
    try:
        base = np.load(base_path, mmap_mode="c")  # read block by block, as it is needed
        floats = apply_update(base, request.encoded_delta, parameter_layout(config), codec)
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise MissingBaseError("the base weights are not cached") from error
    weights = Weights(floats, received.int_buffers)
    if weights.digest != request.target_digest:
        raise MissingBaseError("the base weights do not give the digest of the request")
    return weights


def cache_parameters(cache_dir: Path, weights: Weights) -> None:
    """Store the weights in place of the last. Failure is harmless: the next weights are then sent in full."""
    path = cache_dir / f"{weights.digest}.npy"
    if path.exists():
        return
    try:
        save_array(path, weights.floats)
        for old_path in cache_dir.glob("*.npy"):
            if old_path != path:
                old_path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the weights cannot be cached (%s); they will be sent in full", type(error).__name__)
