"""Soft labels (Martinez 2020): the clusters that the initial encoder's features fall into, found by exact federated k-means (server/analysis/kmeans.py).

The centres answer with sums for each cluster and keep the cluster of each scan to themselves; features are computed once and stay there too.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from common.config.compose import config_to_dict, validate_config
from common.config.schema import Config
from common.learning.seeds import derive_seed
from common.modeling.model import feature_dim
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.protocol.messages import StatisticsRequest, Sums
from server.analysis.additive_queries import query_sum
from server.analysis.kmeans import ClusterMoments, FloatArray, KMeansOracle, select_clusters
from server.run.initial_model import build_initial_model
from server.run.run_state import Run

log = logging.getLogger("consilium.server")


def fit_clusters(run: Run, config: Config) -> Config:
    """The configuration with every clustered task's classes and the name under which the centres keep their scans' clusters."""
    for name, task in config.tasks.items():
        if not task.num_clusters or task.clustering_id:
            continue
        model = build_initial_model(config)
        weights = get_model_weights(model, build_layout(model))
        train, val = (make_kmeans_oracle(run, config, name, split, weights) for split in ("train", "val"))
        seed = derive_seed(config.seed, "clusters", name)
        found = select_clusters(
            train, val, train(np.zeros((1, feature_dim(model.encoder)))), task.num_clusters, seed
        )
        clustering = f"{run.run_id[:80]}-{name}"
        last = StatisticsRequest(
            run.run_id,
            config_to_dict(config),
            "clusters",
            "",
            "train",
            name,
            weights,
            [],
            found.centroids,
            clustering,
        )
        _query_training_centres(run, config, last)
        tried = ", ".join(f"{k}: {index:.1f}" for k, index in found.index_by_k.items() if index is not None)
        said = f"task '{name}': {len(found.sizes)} clusters of {', '.join(f'{n:.0f}' for n in found.sizes)} scans (index on validation: {tried})"
        log.info("%s", said)
        run.ledger.log_event(run.run_id, "clusters", said)
        filled = replace(task, classes=[str(k) for k in range(len(found.sizes))], clustering_id=clustering)
        config = validate_config(replace(config, tasks=config.tasks | {name: filled}))
    return config


def make_kmeans_oracle(run: Run, config: Config, task: str, split: str, weights: Weights) -> KMeansOracle:
    """A step of k-means as a function: centroids [K, D] -> (n [K], sum [K, D], sum of squared lengths [K]) over all centres. The weights travel
    the first time only."""
    known = False

    def query_moments(centroids: FloatArray) -> ClusterMoments:
        nonlocal known
        query = StatisticsRequest(
            run.run_id,
            config_to_dict(config),
            "clusters",
            "",
            split,
            task,
            None if known else weights,
            [],
            centroids,
        )
        sums, known = _query_training_centres(run, config, query), True
        k, d = centroids.shape
        return sums.get("n", np.zeros(k)), sums.get("sum", np.zeros((k, d))), sums.get("square", np.zeros(k))

    return query_moments


def _query_training_centres(run: Run, config: Config, query: StatisticsRequest) -> Sums:
    return query_sum(run, {c: query for c in run.members if c not in config.federation.held_out_centres})
