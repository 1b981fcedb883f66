"""Soft labels: each scan's cluster, kept at the centre under the name that the coordinator gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client import soft_labels
from client.dataset import Scans
from client.queries import Question
from common.errors import Refused
from common.model import Model, make_model
from common.schema import Backbone, Config, Federation, Stage, Task

TASKS = {"soft": Task(kind="multiclass", clusters=[3], classes=["0", "1", "2"])}
CONFIG = Config(tasks=TASKS, stages={"main": Stage(batch=3)}, federation=Federation(centres=["a"]))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(Backbone(), TASKS, 3).eval()


def scans(seed: int, n: int) -> Scans:
    """All take part but the second."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (1, 32, 32), dtype=np.uint8) // (1 + i % 3) for i in range(n)]
    part = np.array([np.nan if i == 1 else 1.0 for i in range(n)])
    return Scans(pictures, {"soft": np.full(n, np.nan)}, ["a"] * n, [f"{seed}-{i}" for i in range(n)], extra={"soft": part})


def question(model: Model | None, centroids: np.ndarray | None, folder: Path) -> Question:
    held = {"train": scans(1, 7), "val": scans(2, 4), "test": scans(3, 0)}
    return Question(held, "train", CONFIG, CONFIG.stages["main"], model, "soft", 1, torch.device("cpu"), centroids, folder / "features")


def test_every_scan_that_takes_part_gets_its_nearest_centroid_in_every_split(model: Model, tmp_path: Path) -> None:
    asked = question(model, None, tmp_path)
    of: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        held = asked.scans[split]
        with torch.no_grad():
            f = model.features(torch.from_numpy(np.stack(held.slices)) / 255).double().numpy()
        of |= dict(zip(held.keys, f, strict=True))
    centroids = np.stack([of["1-0"], of["1-2"], of["2-0"]])
    soft_labels.keep(tmp_path, "run-soft", question(model, centroids, tmp_path))
    keys = [*of, "elsewhere"]
    found = soft_labels.read(tmp_path, "run-soft", keys)
    for key, cluster in zip(keys, found, strict=True):
        if key in ("1-1", "2-1", "elsewhere"):
            assert np.isnan(cluster)
        else:
            assert cluster == np.argmin(((centroids - of[key]) ** 2).sum(1))
    assert found[0] == 0
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["run-soft.json"]  # nothing half written beside it


def test_without_a_clustering_every_scan_is_unlabelled_and_lost_labels_are_said(model: Model, tmp_path: Path) -> None:
    assert np.isnan(soft_labels.read(tmp_path, "", ["x", "y"])).all()
    with pytest.raises(Refused, match="cluster labels of this run are gone from its state folder; start the run anew"):
        soft_labels.read(tmp_path, "run-soft", ["x"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "run-soft.json").write_text('{"x": 1')
    with pytest.raises(Refused, match="are gone"):
        soft_labels.read(tmp_path, "run-soft", ["x"])
    with pytest.raises(Refused, match="no centroids came"):
        soft_labels.keep(tmp_path, "run-soft", question(model, None, tmp_path))
    with pytest.raises(Refused, match="is not a name"):
        soft_labels.keep(tmp_path, "../../run", question(model, np.zeros((2, 96)), tmp_path))
    assert list(tmp_path.rglob("*.tmp")) == []
