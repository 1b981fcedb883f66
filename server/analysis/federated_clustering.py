"""Soft labels (Martinez, "Multi-Source Transfer Learning", 2020): clusters of the initial encoder's features.

They are found by exact federated k-means (server/analysis/kmeans.py). The centres reply with sums for each
cluster and keep the cluster of each scan to themselves; features are computed once and stay at the centres
too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.config.names import name_clustering
from common.config.normalise import normalise_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.config.validate import validate_config
from common.learning.seeds import derive_seed
from common.modeling.encoder import feature_dim
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.protocol.messages import StatisticsRequest, Sums
from server.analysis.additive_queries import query_sum
from server.analysis.kmeans import ClusterMoments, Clusters, FloatArray, select_clusters
from server.run.initial_model import build_initial_model
from server.run.run_state import Run

log = logging.getLogger("consilium.server")


def fit_clusters(run: Run, config: Config) -> Config:
    """Cluster the scans of every task that asks for it.

    Returns:
        The configuration with these tasks' classes, and the id under which the centres keep their scans'
        clusters.
    """
    for task, settings in config.tasks.items():
        if not settings.num_clusters or settings.clustering_id:
            continue
        clustering_id = name_clustering(run.run_id, task)
        clusters = _cluster_task(run, config, task, clustering_id)
        _log_clusters(run, task, clusters)
        classes = [str(k) for k in range(len(clusters.sizes))]
        fitted = replace(settings, classes=classes, clustering_id=clustering_id)
        config = normalise_config(replace(config, tasks=config.tasks | {task: fitted}))
        validate_config(config)
    return config


def _cluster_task(run: Run, config: Config, task: str, clustering_id: str) -> Clusters:
    """Find a task's clusters, and let the centres keep each scan's cluster under the clustering's id."""
    model = build_initial_model(config)
    weights = get_model_weights(model, build_layout(model))
    held_out = config.federation.held_out_centres
    centres = [centre for centre in run.membership.members if centre not in held_out]
    config_values = config_to_dict(config)
    train_query = ClusterQuery(run, centres, config_values, task, "train", weights)
    val_query = ClusterQuery(run, centres, config_values, task, "val", weights)
    total_moments = train_query(np.zeros((1, feature_dim(model.encoder))))
    seed = derive_seed(config.seed, "clusters", task)
    clusters = select_clusters(train_query, val_query, total_moments, config.tasks[task].num_clusters, seed)
    # The centres assign the scans of all splits; for those without features the weights travel once more.
    last_request = train_query.make_request(clusters.centroids)
    train_query.send(replace(last_request, weights=weights, clustering_id=clustering_id))
    return clusters


def _log_clusters(run: Run, task: str, clusters: Clusters) -> None:
    sizes = ", ".join(f"{size:.0f}" for size in clusters.sizes)
    indices = [f"{k}: {index:.1f}" for k, index in clusters.index_by_k.items() if index is not None]
    validation = f"index on validation: {', '.join(indices)}"
    message = f"task '{task}': {len(clusters.sizes)} clusters of {sizes} scans ({validation})"
    log.info("%s", message)
    run.ledger.log_event(run.run_id, "clusters", message)


@dataclass
class ClusterQuery:
    """A step of k-means over the centres' scans of a split, as a function of the centroids."""

    run: Run
    centres: Sequence[str]
    config_values: dict[str, Any]
    task: str
    split: str
    weights: Weights  # of the encoder; they travel with the first request only
    weights_were_sent: bool = False

    def __call__(self, centroids: FloatArray) -> ClusterMoments:
        """Return the moments of the scans nearest to each of the centroids [K, D]."""
        sums = self.send(self.make_request(centroids))
        self.weights_were_sent = True
        num_clusters = len(centroids)
        return ClusterMoments(
            sums.get("n", np.zeros(num_clusters)),
            sums.get("sum", np.zeros(centroids.shape)),
            sums.get("square", np.zeros(num_clusters)),
        )

    def make_request(self, centroids: FloatArray) -> StatisticsRequest:
        """Return the request for the moments."""
        return StatisticsRequest(
            self.run.run_id,
            self.config_values,
            "clusters",
            "",
            self.split,
            self.task,
            weights=None if self.weights_were_sent else self.weights,
            centroids=centroids,
        )

    def send(self, request: StatisticsRequest) -> Sums:
        """Return the sum of all centres' replies."""
        return query_sum(self.run, dict.fromkeys(self.centres, request))
