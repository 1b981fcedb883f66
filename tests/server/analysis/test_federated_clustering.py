"""Soft labels across phantom hospitals: clusters of the pooled features, which stay at the centres."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.loading import load_datasets
from common.config.parse import config_to_dict
from common.config.schema import BackboneConfig, Config
from common.learning.seeds import derive_seed
from common.modeling.model import feature_dim, make_encoder
from common.protocol.messages import Reply, Request, StatisticsReply, StatisticsRequest
from server.analysis.federated_clustering import fit_clusters
from server.analysis.kmeans import ClusterMoments, KMeansOracle, select_clusters
from server.rounds.membership import admit_centres, fit_to_centres
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.initial_model import build_initial_model
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def make_config(phantom: Path, *overrides: str) -> Config:
    """Return the configuration of a single transition to clusters, for which no centre needs a label."""
    return phantom_config(
        phantom,
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
        f"federation.centres=[{','.join(CENTRES)}]",
        "recipe=transfer",
        "stages.target.rounds=0",
        "stages.transition.tasks=[soft]",
        "tasks.soft.num_clusters=[2,3]",
        "evaluation.task=soft",
        "stage.rounds=1",
        *overrides,
    )


def make_run(config: Config, folder: Path, transport: InProcess | None = None) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(folder)
    ledger.add_run("r", recipe="", mode="federated", config=config_to_dict(config), code_fingerprint="")
    return Run("r", config, folder, transport or InProcess(sites(2)), ledger)


def compute_features(config: Config, split: str) -> tuple[list[str], np.ndarray]:
    """Return the store keys and features of all centres' scans that are clustered."""
    model = build_initial_model(config).eval()
    keys: list[str] = []
    features = []
    for site in sites(2):
        dataset = load_datasets(site, config)[0][split]
        clustered = dataset.subset(np.flatnonzero(np.isfinite(dataset.extra_targets["soft"])))
        keys += clustered.store_keys
        inputs = torch.from_numpy(np.stack(clustered.slices)) / 255
        with torch.no_grad():
            features.append(model.extract_features(inputs).double().numpy())
    return keys, np.concatenate(features)


def assign_rows(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.array([((centroids - row) ** 2).sum(1).argmin() for row in rows])


def make_oracle(rows: np.ndarray) -> KMeansOracle:
    def oracle(centroids: np.ndarray) -> ClusterMoments:
        one_hot = np.eye(len(centroids))[assign_rows(rows, centroids)]
        return ClusterMoments(one_hot.sum(0), one_hot.T @ rows, one_hot.T @ (rows**2).sum(1))

    return oracle


def read_cluster_labels(phantom: Path, clustering_id: str) -> dict[str, int]:
    """Return {store key: cluster} from the centres' own files."""
    labels: dict[str, int] = {}
    for centre in CENTRES:
        path = phantom / centre / ".consilium" / "labels" / f"{clustering_id}.json"
        labels |= json.loads(path.read_text())
    return labels


def test_the_clusters_are_those_of_the_pooled_features(phantom: Path, tmp_path: Path) -> None:
    config = make_config(phantom, "stage.precision=fp32")
    run = make_run(config, tmp_path)
    admit_centres(run)
    fit_to_centres(run)
    keys, train = compute_features(config, "train")
    _, val = compute_features(config, "val")
    seed = derive_seed(config.seed, "clusters", "soft")
    oracle = make_oracle(train)
    total_moments = oracle(np.zeros((1, train.shape[1])))
    expected = select_clusters(oracle, make_oracle(val), total_moments, [2, 3], seed)
    soft = run.config.tasks["soft"]
    assert soft.classes == [str(k) for k in range(len(expected.sizes))]
    labels = read_cluster_labels(phantom, soft.clustering_id)
    assert [labels[key] for key in keys] == assign_rows(train, expected.centroids).tolist()
    counts = sum(run.membership.label_counts[f"{centre}/train/soft"] for centre in CENTRES)
    assert counts.tolist() == [*expected.sizes.tolist(), 0]
    assert not list(phantom.glob("*/.consilium/features/*"))  # removed after their last use
    assert fit_clusters(run, run.config) is run.config  # a clustered task is not clustered again


def test_weights_travel_once_a_split_and_features_never(phantom: Path, tmp_path: Path) -> None:
    sent: list[tuple[str, bool]] = []

    def check_reply(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and request.name == "clusters" and centre == "north":
            sent.append((request.split, request.weights is not None))
            assert isinstance(reply, StatisticsReply)
            assert request.centroids is not None
            k, width = request.centroids.shape
            shapes = {name: array.shape for name, array in reply.sums.items()}
            assert shapes == {"n": (k,), "sum": (k, width), "square": (k,)}
        return reply

    run = make_run(make_config(phantom), tmp_path, InProcess(sites(2), check_reply))
    admit_centres(run)
    fit_to_centres(run)
    assert sent[0] == ("train", True)
    assert next(with_weights for split, with_weights in sent if split == "val")
    # Once a split, and once for the centres to keep the clusters of every split.
    assert sum(with_weights for _, with_weights in sent) == 3


def test_the_width_of_centroids_is_that_of_the_features_and_not_of_the_encoder() -> None:
    """MobileNetV3 widens its features after pooling: the first centroid must be as wide."""
    encoder = make_encoder(BackboneConfig(name="mobilenetv3_small_050")).eval()
    assert feature_dim(encoder) == encoder(torch.zeros(1, 3, 32, 32)).shape[1] != encoder.num_features


def test_a_run_stopped_while_clustering_clusters_again_to_the_same_bits(
    phantom: Path, tmp_path: Path
) -> None:
    class SimulatedCrash(Exception):
        pass

    queries_until_crash = 4

    def crash(centre: str, request: Request, reply: Reply) -> Reply:
        nonlocal queries_until_crash
        if isinstance(request, StatisticsRequest) and request.name == "clusters":
            queries_until_crash -= 1
            if not queries_until_crash:
                raise SimulatedCrash
        return reply

    config = make_config(phantom)
    with pytest.raises(SimulatedCrash):
        start_run(config, InProcess(sites(2), crash), tmp_path, open_ledger(tmp_path), "r")
    resumed = resume_run("r", InProcess(sites(2)), tmp_path, open_ledger(tmp_path))
    uninterrupted = start_run(config, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "whole")
    assert resumed.test == uninterrupted.test
    assert read_cluster_labels(phantom, "r-soft") == read_cluster_labels(phantom, "whole-soft")


def test_a_held_out_centre_is_not_asked_and_is_tested_without_clusters(phantom: Path, tmp_path: Path) -> None:
    config = make_config(phantom, "federation.held_out_centres=[south]", "federation.quorum=0.5")
    asked: list[str] = []

    def record_centre(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and request.name == "clusters":
            asked.append(centre)
        return reply

    transport = InProcess(sites(2), record_centre)
    result = start_run(config, transport, tmp_path, open_ledger(tmp_path), "left")
    assert set(asked) == {"north"}
    assert result.left_out == []
    assert not (phantom / "south" / ".consilium" / "labels" / "left-soft.json").exists()
    assert set(result.test["soft"].centres) == {"north"}
