"""Soft labels: each scan's cluster, kept at the centre under the name that the coordinator gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from client.federation import cluster_labels
from client.federation.query_handlers import QueryContext
from common.config.schema import BackboneConfig, Config, FederationConfig, Stage, Task
from common.modeling.model import Model, make_model
from common.utils.errors import Refused

TASKS = {"soft": Task(type="multiclass", num_clusters=[3], classes=["0", "1", "2"])}
CONFIG = Config(tasks=TASKS, stages={"main": Stage(batch_size=3)}, federation=FederationConfig(centres=["a"]))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(BackboneConfig(), TASKS, 3).eval()


def scans(seed: int, n: int) -> ScanDataset:
    """All take part but the second."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (1, 32, 32), dtype=np.uint8) // (1 + i % 3) for i in range(n)]
    part = np.array([np.nan if i == 1 else 1.0 for i in range(n)])
    return ScanDataset(
        pictures,
        {"soft": np.full(n, np.nan)},
        ["a"] * n,
        [f"{seed}-{i}" for i in range(n)],
        extra_targets={"soft": part},
    )


def question(model: Model | None, centroids: np.ndarray | None, folder: Path) -> QueryContext:
    held = {"train": scans(1, 7), "val": scans(2, 4), "test": scans(3, 0)}
    return QueryContext(
        held,
        "train",
        CONFIG,
        CONFIG.stages["main"],
        model,
        "soft",
        1,
        torch.device("cpu"),
        centroids,
        folder / "features",
    )


def test_every_scan_that_takes_part_gets_its_nearest_centroid_in_every_split(
    model: Model, tmp_path: Path
) -> None:
    asked = question(model, None, tmp_path)
    of: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        held = asked.datasets[split]
        with torch.no_grad():
            f = model.extract_features(torch.from_numpy(np.stack(held.slices)) / 255).double().numpy()
        of |= dict(zip(held.store_keys, f, strict=True))
    centroids = np.stack([of["1-0"], of["1-2"], of["2-0"]])
    cluster_labels.save_cluster_labels(tmp_path, "run-soft", question(model, centroids, tmp_path))
    keys = [*of, "elsewhere"]
    found = cluster_labels.load_cluster_labels(tmp_path, "run-soft", keys)
    for key, cluster in zip(keys, found, strict=True):
        if key in ("1-1", "2-1", "elsewhere"):
            assert np.isnan(cluster)
        else:
            assert cluster == np.argmin(((centroids - of[key]) ** 2).sum(1))
    assert found[0] == 0
    assert [p.name for p in (tmp_path / "labels").iterdir()] == [
        "run-soft.json"
    ]  # nothing half written beside it


def test_without_a_clustering_every_scan_is_unlabelled_and_lost_labels_are_said(
    model: Model, tmp_path: Path
) -> None:
    assert np.isnan(cluster_labels.load_cluster_labels(tmp_path, "", ["x", "y"])).all()
    with pytest.raises(
        Refused, match="cluster labels of this run are gone from its state folder; start the run anew"
    ):
        cluster_labels.load_cluster_labels(tmp_path, "run-soft", ["x"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "run-soft.json").write_text('{"x": 1')
    with pytest.raises(Refused, match="are gone"):
        cluster_labels.load_cluster_labels(tmp_path, "run-soft", ["x"])
    with pytest.raises(Refused, match="no centroids came"):
        cluster_labels.save_cluster_labels(tmp_path, "run-soft", question(model, None, tmp_path))
    with pytest.raises(Refused, match="is not a name"):
        cluster_labels.save_cluster_labels(
            tmp_path, "../../run", question(model, np.zeros((2, 96)), tmp_path)
        )
    assert list(tmp_path.rglob("*.tmp")) == []
