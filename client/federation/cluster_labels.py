"""Labels that the federation makes: the cluster of each scan's features (soft labels).

They stay at the centre.

Source: the soft labels of Martinez et al., 2020.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from client.data.cluster_label_store import write_cluster_labels
from client.federation.feature_sums import load_pooled_features, nearest_centroid
from client.federation.query_context import QueryContext
from common.utils.errors import Refused


def save_cluster_labels(folder: Path, clustering_id: str, context: QueryContext) -> None:
    """Store the cluster of every scan that takes part, under the id that the coordinator chose."""
    if context.centroids is None:
        raise Refused("clusters cannot be stored: the request has no centroids")
    cluster_of_scan: dict[str, int] = {}
    for split, dataset in context.datasets.items():
        rows, features = load_pooled_features(replace(context, split=split))
        if not len(rows):
            continue
        clusters = nearest_centroid(features, context.centroids)
        for row, cluster in zip(rows, clusters, strict=True):
            cluster_of_scan[dataset.store_keys[row]] = int(cluster)
    write_cluster_labels(folder, clustering_id, cluster_of_scan)
