"""Cluster labels that the federation made: the cluster of each stored scan, in the centre's state folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.site.config import safe_filename
from common.config.names import MAX_CLUSTERING_ID_LENGTH
from common.utils.atomic_files import atomic_write
from common.utils.errors import RefusalCode, Refused


def write_cluster_labels(folder: Path, clustering_id: str, cluster_by_scan: Mapping[str, int]) -> None:
    """Write {scan's key in the slice store: its cluster} under the id that the coordinator chose."""
    path = _labels_path(folder, clustering_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(dict(cluster_by_scan)).encode())


def load_cluster_labels(folder: Path, clustering_id: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """Return [N]: the cluster of each stored scan, NaN where it has none, throughout without an id.

    Raises Refused when the file is lost.
    """
    if not clustering_id:
        return np.full(len(keys), np.nan)
    try:
        cluster_by_scan = json.loads(_labels_path(folder, clustering_id).read_text())
    except (OSError, ValueError) as error:
        raise Refused(
            "the cluster labels of this run are missing from the centre's state folder; start the run anew",
            RefusalCode.NO_DATA,
        ) from error
    return np.array([cluster_by_scan.get(key, np.nan) for key in keys], dtype=np.float64)


def _labels_path(folder: Path, clustering_id: str) -> Path:
    return folder / "labels" / f"{safe_filename(clustering_id, MAX_CLUSTERING_ID_LENGTH)}.json"
