"""Soft labels: each scan's cluster is stored at the centre under the id that the coordinator chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.cluster_label_store import load_cluster_labels
from client.data.dataset import ScanDataset
from client.federation.cluster_labels import save_cluster_labels
from client.federation.query_context import QueryContext
from common.config.schema import BackboneConfig, Config, FederationConfig, Stage, Task
from common.modeling.model import Model, make_model
from common.utils.errors import Refused

TASKS = {"soft": Task(type="multiclass", num_clusters=[3], classes=["0", "1", "2"])}
CONFIG = Config(tasks=TASKS, stages={"main": Stage(batch_size=3)}, federation=FederationConfig(centres=["a"]))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(BackboneConfig(), TASKS, 3).eval()


def make_dataset(seed: int, num_scans: int) -> ScanDataset:
    """Make scans that take part in the clustering, but for the second."""
    rng = np.random.default_rng(seed)
    slices = [rng.integers(0, 256, (1, 32, 32), dtype=np.uint8) // (1 + i % 3) for i in range(num_scans)]
    takes_part = np.ones(num_scans)
    takes_part[1:2] = np.nan
    return ScanDataset(
        slices,
        {"soft": np.full(num_scans, np.nan)},
        ["a"] * num_scans,
        [f"{seed}-{i}" for i in range(num_scans)],
        extra_targets={"soft": takes_part},
    )


def make_query(model: Model | None, centroids: np.ndarray | None, folder: Path) -> QueryContext:
    return QueryContext(
        datasets={"train": make_dataset(1, 7), "val": make_dataset(2, 4), "test": make_dataset(3, 0)},
        split="train",
        config=CONFIG,
        stage=CONFIG.stages["main"],
        model=model,
        task_name="soft",
        device=torch.device("cpu"),
        centroids=centroids,
        features_dir=folder / "features",
    )


def test_scans_that_take_part_get_their_nearest_centroid_in_every_split(model: Model, tmp_path: Path) -> None:
    datasets = make_query(model, None, tmp_path).datasets
    features: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        images = torch.from_numpy(np.stack(datasets[split].slices)) / 255
        with torch.no_grad():
            rows = model.extract_features(images).double().numpy()
        features |= dict(zip(datasets[split].store_keys, rows, strict=True))
    centroids = np.stack([features["1-0"], features["1-2"], features["2-0"]])
    save_cluster_labels(tmp_path, "run-soft", make_query(model, centroids, tmp_path))
    keys = [*features, "elsewhere"]
    clusters = load_cluster_labels(tmp_path, "run-soft", keys)
    for key, cluster in zip(keys, clusters, strict=True):
        if key in ("1-1", "2-1", "elsewhere"):
            assert np.isnan(cluster)
        else:
            assert cluster == np.argmin(((centroids - features[key]) ** 2).sum(1))
    assert clusters[0] == 0
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["run-soft.json"]  # no partial file


def test_scans_are_unlabelled_without_a_clustering_and_lost_labels_are_refused(
    model: Model, tmp_path: Path
) -> None:
    assert np.isnan(load_cluster_labels(tmp_path, "", ["x", "y"])).all()
    missing = "cluster labels of this run are missing from the centre's state folder; start the run anew"
    with pytest.raises(Refused, match=missing):
        load_cluster_labels(tmp_path, "run-soft", ["x"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "run-soft.json").write_text('{"x": 1')
    with pytest.raises(Refused, match="are missing"):
        load_cluster_labels(tmp_path, "run-soft", ["x"])
    with pytest.raises(Refused, match="the request has no centroids"):
        save_cluster_labels(tmp_path, "run-soft", make_query(model, None, tmp_path))
    with pytest.raises(Refused, match="is not a valid name"):
        save_cluster_labels(tmp_path, "../../run", make_query(model, np.zeros((2, 96)), tmp_path))
    assert list(tmp_path.rglob("*.tmp")) == []
