"""The weights a centre holds, so that the next ones need not come whole: `wire/<run>/<digest>.npy` in the state folder, the last only."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.site.config import safe_filename
from common.config.schema import Config
from common.modeling.model import parameter_layout
from common.modeling.parameters import Weights
from common.protocol.messages import StatisticsRequest, TrainRequest
from common.protocol.update_codec import apply_update, select_codec

log = logging.getLogger("consilium.centre")


class MissingBaseError(Exception):
    """The weights that a request builds on are not held here."""


def restore_parameters(
    folder: Path, config: Config, request: StatisticsRequest | TrainRequest
) -> StatisticsRequest | TrainRequest:
    """The request with its weights in full, which are kept for the next one. Raises Missing where they cannot be put together to the very bit."""
    codec = select_codec(config)
    if request.weights is None or codec == "fp32":
        return request
    place = folder / "wire" / safe_filename(request.run_id)
    weights = request.weights
    if request.base_digest:
        try:
            held = np.load(
                place / f"{safe_filename(request.base_digest)}.npy", mmap_mode="c"
            )  # nothing is read before it is used
            weights = Weights(
                apply_update(held, request.encoded_delta, parameter_layout(config), codec),
                weights.int_buffers,
            )
        except (OSError, EOFError, KeyError, ValueError) as error:
            raise MissingBaseError from error
        if weights.digest != request.target_digest:
            raise MissingBaseError
    cache_parameters(place, weights)
    return replace(request, weights=weights, base_digest="", encoded_delta={}, target_digest="")


def cache_parameters(cache_dir: Path, weights: Weights) -> None:
    """Put the weights on disk in place of the last. A disk that is full costs bytes on the wire, no more."""
    path = cache_dir / f"{weights.digest}.npy"
    if path.exists():
        return
    part = cache_dir / f"{weights.digest}.{os.getpid()}.part"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, weights.floats)
        part.replace(path)
        for old in cache_dir.glob("*.npy"):
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the weights cannot be kept (%s): they will come whole again", type(error).__name__)
        part.unlink(missing_ok=True)
