"""Labels that the federation makes itself: the cluster of each scan's features (Martinez 2020's soft labels). They never leave the centre."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.queries import Question, assigned, pooled_features
from client.site import safe
from common.errors import Refused
from common.files import write_whole


def keep(folder: Path, clustering: str, question: Question) -> None:
    """Note the cluster of every scan that takes part, under the name that the coordinator gave the centroids. Written whole or not at all."""
    if question.centroids is None:
        raise Refused("clusters are to be kept, but no centroids came")
    found: dict[str, int] = {}
    for split, scans in question.scans.items():
        rows, features = pooled_features(replace(question, split=split))
        if len(rows):
            found |= {scans.keys[i]: int(k) for i, k in zip(rows, assigned(features, question.centroids), strict=True)}
    path = _path(folder, clustering)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found).encode())


def read(folder: Path, clustering: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """[N]: the cluster of each stored scan, NaN where it has none. Raises Refused where the centre has lost them."""
    if not clustering:
        return np.full(len(keys), np.nan)
    try:
        kept = json.loads(_path(folder, clustering).read_text())
    except (OSError, ValueError) as error:
        raise Refused("its cluster labels of this run are gone from its state folder; start the run anew") from error
    return np.array([kept.get(key, np.nan) for key in keys], dtype=np.float64)


def _path(folder: Path, clustering: str) -> Path:
    return folder / "labels" / f"{safe(clustering)}.json"
