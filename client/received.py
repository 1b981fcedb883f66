"""The weights a centre holds, so that the next ones need not come whole: `wire/<run>/<digest>.npy` in the state folder, the last only."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.site import safe
from common.codec import changed, codec_of
from common.messages import Query, Train
from common.model import layout_for
from common.schema import Config
from common.weights import Weights

log = logging.getLogger("consilium.centre")


class Missing(Exception):
    """The weights that a request builds on are not held here."""


def completed(folder: Path, config: Config, request: Query | Train) -> Query | Train:
    """The request with its weights in full, which are kept for the next one. Raises Missing where they cannot be put together to the very bit."""
    codec = codec_of(config)
    if request.weights is None or codec == "fp32":
        return request
    place = folder / "wire" / safe(request.run)
    weights = request.weights
    if request.base:
        try:
            held = np.load(place / f"{safe(request.base)}.npy", mmap_mode="c")  # nothing is read before it is used
            weights = Weights(changed(held, request.change, layout_for(config), codec), weights.integers)
        except (OSError, EOFError, KeyError, ValueError) as error:
            raise Missing from error
        if weights.digest != request.digest:
            raise Missing
    keep(place, weights)
    return replace(request, weights=weights, base="", change={}, digest="")


def keep(place: Path, weights: Weights) -> None:
    """Put the weights on disk in place of the last. A disk that is full costs bytes on the wire, no more."""
    path = place / f"{weights.digest}.npy"
    if path.exists():
        return
    part = place / f"{weights.digest}.{os.getpid()}.part"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, weights.floats)
        part.replace(path)
        for old in place.glob("*.npy"):
            if old != path:
                old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the weights cannot be kept (%s): they will come whole again", type(error).__name__)
        part.unlink(missing_ok=True)
