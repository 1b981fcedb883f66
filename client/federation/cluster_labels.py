"""Labels that the federation makes itself: the cluster of each scan's features (Martinez 2020's soft labels). They never leave the centre."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.federation.query_handlers import QueryContext, load_pooled_features, nearest_centroid
from client.site.config import safe_filename
from common.utils.atomic_files import atomic_write
from common.utils.errors import Refused


def save_cluster_labels(folder: Path, clustering_id: str, context: QueryContext) -> None:
    """Note the cluster of every scan that takes part, under the name that the coordinator gave the centroids. Written whole or not at all."""
    if context.centroids is None:
        raise Refused("clusters are to be kept, but no centroids came")
    found: dict[str, int] = {}
    for split, scans in context.datasets.items():
        rows, features = load_pooled_features(replace(context, split=split))
        if len(rows):
            found |= {
                scans.store_keys[i]: int(k)
                for i, k in zip(rows, nearest_centroid(features, context.centroids), strict=True)
            }
    path = _labels_path(folder, clustering_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found).encode())


def load_cluster_labels(folder: Path, clustering_id: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """[N]: the cluster of each stored scan, NaN where it has none. Raises Refused where the centre has lost them."""
    if not clustering_id:
        return np.full(len(keys), np.nan)
    try:
        kept = json.loads(_labels_path(folder, clustering_id).read_text())
    except (OSError, ValueError) as error:
        raise Refused(
            "its cluster labels of this run are gone from its state folder; start the run anew"
        ) from error
    return np.array([kept.get(key, np.nan) for key in keys], dtype=np.float64)


def _labels_path(folder: Path, clustering_id: str) -> Path:
    return folder / "labels" / f"{safe_filename(clustering_id)}.json"
