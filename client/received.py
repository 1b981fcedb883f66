"""The weights a centre holds, so that the next ones need not come whole: `wire/<run>/<digest>.safetensors` in the state folder, the last only."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from client.site import safe
from common.codec import changed, codec_of
from common.messages import Query, Train
from common.model import make_model
from common.schema import Config
from common.weights import Layout, Weights, layout_of

log = logging.getLogger("consilium.centre")


class Missing(Exception):
    """The weights that a request builds on are not held here."""


def completed(folder: Path, config: Config, request: Query | Train) -> Query | Train:
    """The request with its weights in full, which are kept for the next one. Raises Missing where they cannot be put together to the very bit."""
    codec = codec_of(config)
    if request.weights is None or codec == "fp32":
        return request
    place = folder / "wire" / safe(request.run)
    if not request.base:
        weights, digest = request.weights, request.weights.digest()
    else:
        try:
            held = Weights(**load_file(place / f"{safe(request.base)}.safetensors"))
            weights, digest = changed(held, request.change, layout_for(config), codec), request.digest
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise Missing from error
        if weights.digest() != digest:
            raise Missing
    keep(place, digest, weights)
    return replace(request, weights=weights, base="", change={}, digest="")


def keep(place: Path, digest: str, weights: Weights) -> None:
    """Put the weights on disk in place of the last. A disk that is full costs bytes on the wire, no more."""
    path = place / f"{digest}.safetensors"
    if path.exists():
        return
    part = place / f"{digest}.{os.getpid()}.part"
    try:
        place.mkdir(parents=True, exist_ok=True)
        save_file({"floats": weights.floats, "integers": weights.integers}, part)
        part.replace(path)
        for old in place.glob("*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        log.warning("the weights cannot be kept (%s): they will come whole again", type(error).__name__)
        part.unlink(missing_ok=True)


def layout_for(config: Config) -> Layout:
    """The layout of the run's model, without a weight of it."""
    with torch.device("meta"):
        return layout_of(make_model(config.backbone, config.tasks, 0))
