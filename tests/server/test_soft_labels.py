"""Soft labels across made-up hospitals: the clusters are those of the pooled features, stay at the centres, and survive a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.scans import read_scans
from common.compose import to_dict
from common.messages import Answer, Query, Reply, Request
from common.model import make_encoder, width_of
from common.schema import Backbone, Config
from common.seeds import derive
from server.initial import initial_model
from server.kmeans import Moments, choose
from server.presence import greet
from server.runs import begin, open_ledger, resume
from server.soft_labels import cluster
from server.state import Run
from tests.inprocess import InProcess, phantom_config, sites

CENTRES = ["north", "south"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def config(phantom: Path, *overrides: str) -> Config:
    """Only a transition to clusters, so that no centre needs a target."""
    few = ["federation.phantom.scale=0.001", "federation.phantom.slices=10", f"federation.centres=[{','.join(CENTRES)}]"]
    soft = ["recipe=transfer", "stages.target.rounds=0", "stages.transition.tasks=[soft]", "tasks.soft.clusters=[2,3]"]
    return phantom_config(phantom, *few, *soft, "evaluation.task=soft", "stage.rounds=1", *overrides)


def started(config: Config, folder: Path, transport: InProcess | None = None) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(folder)
    ledger.start_run("r", recipe="", mode="federated", config=to_dict(config), code="")
    return Run("r", config, folder, transport or InProcess(sites(2)), ledger)


def features(config: Config, split: str) -> tuple[list[str], np.ndarray]:
    """(keys, features) of all centres' scans that take part, computed here."""
    model = initial_model(config).eval()
    keys: list[str] = []
    found = []
    for site in sites(2):
        scans = read_scans(site, config)[0][split]
        some = scans.take(np.flatnonzero(np.isfinite(scans.extra["soft"])))
        keys += some.keys
        with torch.no_grad():
            found.append(model.features(torch.from_numpy(np.stack(some.slices)) / 255).double().numpy())
    return keys, np.concatenate(found)


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.array([((centroids - x) ** 2).sum(1).argmin() for x in rows])


def kept(phantom: Path, clustering: str) -> dict[str, int]:
    paths = [phantom / c / ".consilium" / "labels" / f"{clustering}.json" for c in CENTRES]
    return {k: v for path in paths for k, v in json.loads(path.read_text()).items()}


def test_the_clusters_are_those_of_the_pooled_features(phantom: Path, tmp_path: Path) -> None:
    given = config(phantom, "stage.precision=fp32")
    run = started(given, tmp_path)
    greet(run)
    keys, train = features(given, "train")
    _, val = features(given, "val")

    def ask(rows: np.ndarray):  # type: ignore[no-untyped-def]
        def step(centroids: np.ndarray) -> Moments:
            one = np.eye(len(centroids))[nearest(rows, centroids)]
            return one.sum(0), one.T @ rows, one.T @ (rows**2).sum(1)

        return step

    seed = derive(given.seed, "clusters", "soft")
    expected = choose(ask(train), ask(val), ask(train)(np.zeros((1, train.shape[1]))), [2, 3], seed)
    soft = run.config.tasks["soft"]
    assert soft.classes == [str(k) for k in range(len(expected.sizes))]
    labels = kept(phantom, soft.clustering)
    assert [labels[k] for k in keys] == nearest(train, expected.centroids).tolist()
    counts = sum(run.counts[f"{c}/train/soft"] for c in CENTRES)
    assert counts.tolist() == [*expected.sizes.tolist(), 0]
    assert not list(phantom.glob("*/.consilium/features/*"))  # they have done their work
    assert cluster(run, run.config) is run.config  # once is enough


def test_weights_travel_once_and_features_never(phantom: Path, tmp_path: Path) -> None:
    sent: list[tuple[str, bool]] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, Query) and request.name == "clusters" and centre == "north":
            sent.append((request.split, request.weights is not None))
            assert isinstance(reply, Answer)
            k, d = request.centroids.shape  # type: ignore[union-attr]
            assert {name: a.shape for name, a in reply.sums.items()} == {"n": (k,), "sum": (k, d), "square": (k,)}
        return reply

    greet(started(config(phantom), tmp_path, InProcess(sites(2), hook)))
    assert sent[0] == ("train", True)
    assert next(weights for split, weights in sent if split == "val")
    assert sum(weights for _, weights in sent) == 3  # once a split, and once to keep every split's clusters


def test_widths_are_the_features_and_not_the_encoders() -> None:
    """MobileNetV3 widens its features behind the pooling: the first centroid must be as wide."""
    encoder = make_encoder(Backbone(name="mobilenetv3_small_050")).eval()
    assert width_of(encoder) == encoder(torch.zeros(1, 3, 32, 32)).shape[1] != encoder.num_features


def test_stopped_while_clustering_it_clusters_anew_to_the_same_bits(phantom: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    left = [4]

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, Query) and request.name == "clusters":
            left[0] -= 1
            if not left[0]:
                raise Stopped
        return reply

    given = config(phantom)
    with pytest.raises(Stopped):
        begin(given, InProcess(sites(2), hook), tmp_path, open_ledger(tmp_path), "r")
    found = resume("r", InProcess(sites(2)), tmp_path, open_ledger(tmp_path))
    whole = begin(given, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "whole")
    assert found["test"] == whole["test"]
    assert kept(phantom, "r-soft") == kept(phantom, "whole-soft")


def test_the_unseen_centre_is_not_asked_and_tests_without_clusters(phantom: Path, tmp_path: Path) -> None:
    given = config(phantom, "federation.unseen=[south]", "federation.quorum=0.5")
    asked: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, Query) and request.name == "clusters":
            asked.append(centre)
        return reply

    result = begin(given, InProcess(sites(2), hook), tmp_path, open_ledger(tmp_path), "left")
    assert set(asked) == {"north"}
    assert result["left_out"] == []
    assert not (phantom / "south" / ".consilium" / "labels" / "left-soft.json").exists()
    assert set(result["test"]["soft"]["centres"]) == {"north"}
