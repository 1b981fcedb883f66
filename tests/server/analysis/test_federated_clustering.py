"""Soft labels across made-up hospitals: the clusters are those of the pooled features, stay at the centres, and survive a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.loading import load_datasets
from common.config.compose import config_to_dict
from common.config.schema import BackboneConfig, Config
from common.learning.seeds import derive_seed
from common.modeling.model import feature_dim, make_encoder
from common.protocol.messages import Reply, Request, StatisticsReply, StatisticsRequest
from server.analysis.federated_clustering import fit_clusters
from server.analysis.kmeans import ClusterMoments, select_clusters
from server.rounds.membership import admit_centres
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.initial_model import build_initial_model
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def config(phantom: Path, *overrides: str) -> Config:
    """Only a transition to clusters, so that no centre needs a target."""
    few = [
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
        f"federation.centres=[{','.join(CENTRES)}]",
    ]
    soft = [
        "recipe=transfer",
        "stages.target.rounds=0",
        "stages.transition.tasks=[soft]",
        "tasks.soft.num_clusters=[2,3]",
    ]
    return phantom_config(phantom, *few, *soft, "evaluation.task=soft", "stage.rounds=1", *overrides)


def started(config: Config, folder: Path, transport: InProcess | None = None) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(folder)
    ledger.add_run("r", recipe="", mode="federated", config=config_to_dict(config), code="")
    return Run("r", config, folder, transport or InProcess(sites(2)), ledger)


def features(config: Config, split: str) -> tuple[list[str], np.ndarray]:
    """(keys, features) of all centres' scans that take part, computed here."""
    model = build_initial_model(config).eval()
    keys: list[str] = []
    found = []
    for site in sites(2):
        scans = load_datasets(site, config)[0][split]
        some = scans.subset(np.flatnonzero(np.isfinite(scans.extra_targets["soft"])))
        keys += some.store_keys
        with torch.no_grad():
            found.append(
                model.extract_features(torch.from_numpy(np.stack(some.slices)) / 255).double().numpy()
            )
    return keys, np.concatenate(found)


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.array([((centroids - x) ** 2).sum(1).argmin() for x in rows])


def kept(phantom: Path, clustering: str) -> dict[str, int]:
    paths = [phantom / c / ".consilium" / "labels" / f"{clustering}.json" for c in CENTRES]
    return {k: v for path in paths for k, v in json.loads(path.read_text()).items()}


def test_the_clusters_are_those_of_the_pooled_features(phantom: Path, tmp_path: Path) -> None:
    given = config(phantom, "stage.precision=fp32")
    run = started(given, tmp_path)
    admit_centres(run)
    keys, train = features(given, "train")
    _, val = features(given, "val")

    def ask(rows: np.ndarray):  # type: ignore[no-untyped-def]
        def step(centroids: np.ndarray) -> ClusterMoments:
            one = np.eye(len(centroids))[nearest(rows, centroids)]
            return one.sum(0), one.T @ rows, one.T @ (rows**2).sum(1)

        return step

    seed = derive_seed(given.seed, "clusters", "soft")
    expected = select_clusters(ask(train), ask(val), ask(train)(np.zeros((1, train.shape[1]))), [2, 3], seed)
    soft = run.config.tasks["soft"]
    assert soft.classes == [str(k) for k in range(len(expected.sizes))]
    labels = kept(phantom, soft.clustering_id)
    assert [labels[k] for k in keys] == nearest(train, expected.centroids).tolist()
    counts = sum(run.label_counts[f"{c}/train/soft"] for c in CENTRES)
    assert counts.tolist() == [*expected.sizes.tolist(), 0]
    assert not list(phantom.glob("*/.consilium/features/*"))  # they have done their work
    assert fit_clusters(run, run.config) is run.config  # once is enough


def test_weights_travel_once_and_features_never(phantom: Path, tmp_path: Path) -> None:
    sent: list[tuple[str, bool]] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and request.name == "clusters" and centre == "north":
            sent.append((request.split, request.weights is not None))
            assert isinstance(reply, StatisticsReply)
            k, d = request.centroids.shape  # type: ignore[union-attr]
            assert {name: a.shape for name, a in reply.sums.items()} == {
                "n": (k,),
                "sum": (k, d),
                "square": (k,),
            }
        return reply

    admit_centres(started(config(phantom), tmp_path, InProcess(sites(2), hook)))
    assert sent[0] == ("train", True)
    assert next(weights for split, weights in sent if split == "val")
    assert sum(weights for _, weights in sent) == 3  # once a split, and once to keep every split's clusters


def test_widths_are_the_features_and_not_the_encoders() -> None:
    """MobileNetV3 widens its features behind the pooling: the first centroid must be as wide."""
    encoder = make_encoder(BackboneConfig(name="mobilenetv3_small_050")).eval()
    assert feature_dim(encoder) == encoder(torch.zeros(1, 3, 32, 32)).shape[1] != encoder.num_features


def test_stopped_while_clustering_it_clusters_anew_to_the_same_bits(phantom: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    left = [4]

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and request.name == "clusters":
            left[0] -= 1
            if not left[0]:
                raise Stopped
        return reply

    given = config(phantom)
    with pytest.raises(Stopped):
        start_run(given, InProcess(sites(2), hook), tmp_path, open_ledger(tmp_path), "r")
    found = resume_run("r", InProcess(sites(2)), tmp_path, open_ledger(tmp_path))
    whole = start_run(given, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "whole")
    assert found["test"] == whole["test"]
    assert kept(phantom, "r-soft") == kept(phantom, "whole-soft")


def test_the_unseen_centre_is_not_asked_and_tests_without_clusters(phantom: Path, tmp_path: Path) -> None:
    given = config(phantom, "federation.held_out_centres=[south]", "federation.quorum=0.5")
    asked: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and request.name == "clusters":
            asked.append(centre)
        return reply

    result = start_run(given, InProcess(sites(2), hook), tmp_path, open_ledger(tmp_path), "left")
    assert set(asked) == {"north"}
    assert result["left_out"] == []
    assert not (phantom / "south" / ".consilium" / "labels" / "left-soft.json").exists()
    assert set(result["test"]["soft"]["centres"]) == {"north"}
