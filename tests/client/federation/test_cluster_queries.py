"""The query for clusters: a step of k-means over all centres, and the features kept between its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from client.federation.query_handlers import QUERY_HANDLERS
from common.config.schema import Stage, Task
from common.modeling.model import Model
from common.protocol.messages import Sums, add_sums
from common.utils.errors import Refused
from tests.client.federation.queried_scans import CONFIG, NUM_SCANS, compute_features
from tests.client.federation.queried_scans import model as model
from tests.client.federation.queried_scans import scans as scans


def make_cluster_query(
    scans: ScanDataset, features_dir: Path | None, model: Model | None, centroids: np.ndarray
) -> QueryContext:
    soft = Task(type="multiclass", num_clusters=[2, 3])
    return QueryContext(
        datasets={"train": scans},
        split="train",
        config=replace(CONFIG, tasks={**CONFIG.tasks, "soft": soft}),
        stage=Stage(batch_size=4),
        model=model,
        task_name="soft",
        device=torch.device("cpu"),
        centroids=centroids,
        features_dir=features_dir,
    )


def select_for_clustering(scans: ScanDataset, rows: np.ndarray) -> ScanDataset:
    """Return some scans, all of which but every fifth take part in the clustering."""
    selected = scans.subset(rows)
    selected.store_keys = [f"k{row}" for row in rows]
    selected.extra_targets["soft"] = np.where(rows % 5 == 4, np.nan, 1.0)
    return selected


def test_step_of_k_means_equals_a_direct_computation(
    scans: ScanDataset, model: Model, tmp_path: Path
) -> None:
    features = compute_features(model, scans)
    centroids = features[[0, 11, 21]]
    features = features[np.arange(NUM_SCANS) % 5 != 4]
    squared_distances = [[((row - centroid) ** 2).sum() for centroid in centroids] for row in features]
    nearest = np.argmin(squared_distances, axis=1)
    assert len(set(nearest)) > 1
    total: Sums = {}
    for centre in ("a", "b"):
        own_scans = select_for_clustering(scans, np.flatnonzero(np.array(scans.centres) == centre))
        query = make_cluster_query(own_scans, tmp_path / centre, model, centroids)
        add_sums(total, QUERY_HANDLERS["clusters"](query))
    all_scans = select_for_clustering(scans, np.arange(NUM_SCANS))
    pooled = QUERY_HANDLERS["clusters"](make_cluster_query(all_scans, None, model, centroids))
    for sums in (total, pooled):
        for index in range(3):
            members = features[nearest == index]
            assert sums["n"][index] == len(members)
            np.testing.assert_allclose(sums["sum"][index], members.sum(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(sums["square"][index], (members**2).sum(), rtol=1e-4, atol=1e-4)


def test_features_are_kept_for_the_next_steps_and_refused_when_lost(
    scans: ScanDataset, model: Model, tmp_path: Path
) -> None:
    all_scans = select_for_clustering(scans, np.arange(NUM_SCANS))
    num_features = int(model.encoder.num_features)  # type: ignore[call-overload]
    centroids = np.random.default_rng(2).normal(size=(2, num_features))
    moved = centroids + 0.1
    first_step = QUERY_HANDLERS["clusters"](make_cluster_query(all_scans, tmp_path, model, centroids))
    next_step = QUERY_HANDLERS["clusters"](make_cluster_query(all_scans, tmp_path, None, moved))
    assert next_step["n"].sum() == first_step["n"].sum() == NUM_SCANS - NUM_SCANS // 5
    recomputed = QUERY_HANDLERS["clusters"](make_cluster_query(all_scans, None, model, moved))
    for key in recomputed:
        np.testing.assert_allclose(next_step[key], recomputed[key], rtol=1e-5, atol=1e-6)
    for path in tmp_path.iterdir():
        path.unlink()
    missing = "the features of this run are missing from the centre's state folder"
    with pytest.raises(Refused, match=missing):
        QUERY_HANDLERS["clusters"](make_cluster_query(all_scans, tmp_path, None, centroids))
    not_taking_part = select_for_clustering(scans, np.array([4, 9]))
    assert QUERY_HANDLERS["clusters"](make_cluster_query(not_taking_part, tmp_path, None, centroids)) == {}
