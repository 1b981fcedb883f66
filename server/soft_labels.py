"""Soft labels (Martinez 2020): the clusters that the initial encoder's features fall into, found by exact federated k-means (server/kmeans.py).

The centres answer with sums for each cluster and keep the cluster of each scan to themselves; features are computed once and stay there too.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from common.compose import check, to_dict
from common.messages import Query, Sums
from common.model import width_of
from common.schema import Config
from common.seeds import derive
from common.weights import Weights, flatten, layout_of
from server.initial import initial_model
from server.kmeans import Ask, Floats, Moments, choose
from server.queries import ask
from server.state import Run

log = logging.getLogger("consilium.server")


def cluster(run: Run, config: Config) -> Config:
    """The configuration with every clustered task's classes and the name under which the centres keep their scans' clusters."""
    for name, task in config.tasks.items():
        if not task.clusters or task.clustering:
            continue
        model = initial_model(config)
        weights = flatten(model, layout_of(model))
        train, val = (asker(run, config, name, split, weights) for split in ("train", "val"))
        seed = derive(config.seed, "clusters", name)
        found = choose(train, val, train(np.zeros((1, width_of(model.encoder)))), task.clusters, seed)
        clustering = f"{run.id[:80]}-{name}"
        last = Query(run.id, to_dict(config), "clusters", "", "train", name, weights, [], found.centroids, clustering)
        _ask(run, config, last)
        tried = ", ".join(f"{k}: {index:.1f}" for k, index in found.tried.items() if index is not None)
        said = f"task '{name}': {len(found.sizes)} clusters of {', '.join(f'{n:.0f}' for n in found.sizes)} scans (index on validation: {tried})"
        log.info("%s", said)
        run.ledger.event(run.id, "clusters", said)
        filled = replace(task, classes=[str(k) for k in range(len(found.sizes))], clustering=clustering)
        config = check(replace(config, tasks=config.tasks | {name: filled}))
    return config


def asker(run: Run, config: Config, task: str, split: str, weights: Weights) -> Ask:
    """A step of k-means as a function: centroids [K, D] -> (n [K], sum [K, D], sum of squared lengths [K]) over all centres. The weights travel
    the first time only."""
    known = False

    def step(centroids: Floats) -> Moments:
        nonlocal known
        query = Query(run.id, to_dict(config), "clusters", "", split, task, None if known else weights, [], centroids)
        sums, known = _ask(run, config, query), True
        k, d = centroids.shape
        return sums.get("n", np.zeros(k)), sums.get("sum", np.zeros((k, d))), sums.get("square", np.zeros(k))

    return step


def _ask(run: Run, config: Config, query: Query) -> Sums:
    return ask(run, {c: query for c in run.presence if c not in config.federation.unseen})
