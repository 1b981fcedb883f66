"""Data quality and the matrix of sites and models, in a run of real centres."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.data.loading import load_datasets
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, set_model_weights
from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from server.analysis.image_drift import compute_drift, summarise_histograms
from server.rounds.membership import restore_classes
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


def test_quality_and_matrix_of_a_run(tmp_path: Path) -> None:
    """West's policy allows neither quality nor more than the run needs; it takes part all the same. The diagonal of the matrix is what each
    centre's own scans say of the very weights that it trained."""
    trained: dict[str, Weights] = {}

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            trained[centre] = Weights(request.weights.floats + reply.delta, reply.int_buffers)
        return reply

    policy = tmp_path / "policy.yaml"
    policy.write_text("queries: [counts, scores]\n")
    nodes = sites()
    nodes[3] = replace(nodes[3], policy=str(policy))
    config = phantom_config(
        tmp_path / "data",
        "evaluation.cross_site=last",
        "aggregation.compression=fp32",
        "stage.precision=fp32",
    )
    ledger = open_ledger(tmp_path)
    result = start_run(config, InProcess(nodes, hook), tmp_path, ledger, "r")

    quality = result["quality"]
    assert (
        quality
        == ledger.read_artifacts("r")["quality"]
        == json.loads((tmp_path / "r" / "metrics.json").read_text())["quality"]
    )
    assert quality["area"]["centres"].keys() == {"north", "east", "south"}
    assert {row["kind"]: row["centre"] for row in ledger.read_events("r")}["withheld"] == "west"
    assert not result["left_out"]
    scans = result["centres"]["north"]["counts"]
    assert quality["position"]["scans"]["north"] == sum(sum(of["covid"].values()) for of in scans.values())
    assert all(
        sum(shares) == pytest.approx(1, abs=1e-4)
        for of in quality.values()
        for shares in of["centres"].values()
    )

    matrix = result["matrix"]
    assert (matrix["round"], matrix["split"]) == (2, "val")
    assert matrix["tasks"]["covid"].keys() == {"north", "east", "south", "west"}
    assert ledger.read_artifacts("r")["matrix"] == json.loads(json.dumps(matrix))
    assert not (tmp_path / "r" / "local").exists()
    config = restore_classes(config, result["filled"])
    model = make_model(config.backbone, config.tasks, 0).eval()
    for node, (centre, weights) in zip(nodes, trained.items(), strict=True):
        set_model_weights(model, build_layout(model), weights)
        val = load_datasets(node, config)[0]["val"]
        with torch.inference_mode():
            z = torch.cat(
                [
                    model(torch.from_numpy(np.array(s))[None] / 255, ["covid"])["covid"][:, 0]
                    for s in val.slices
                ]
            )
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            z, torch.from_numpy(val.targets["covid"]).float()
        )
        assert matrix["tasks"]["covid"][centre][centre]["loss"] == pytest.approx(float(loss), rel=1e-4)
    losses = {a: {b: of["loss"] for b, of in row.items()} for a, row in matrix["tasks"]["covid"].items()}
    assert len({row["north"] for row in losses.values()}) == 4  # four different models


SUMS = {
    "a/quality/area": np.eye(25)[0] * 4,
    "b/quality/area": np.eye(25)[1] * 2,
    "a/quality/intensity": np.ones(32),
}


def test_drift_is_the_distance_to_all_the_others() -> None:
    own = {"a": np.array([4.0, 0, 0]), "b": np.array([0, 2.0, 0]), "c": np.array([0, 2.0, 0])}
    found = compute_drift(own)
    assert found["a"] == 1  # nothing in common
    p, q = np.array([0, 1.0, 0]), np.array([4 / 6, 2 / 6, 0])
    m = (p + q) / 2
    divergence = sum(0.5 * x * np.log2(x / y) for of in (p, q) for x, y in zip(of, m, strict=True) if x)
    assert found["b"] == pytest.approx(np.sqrt(divergence), abs=1e-4)
    assert compute_drift({"a": own["a"]}) == {}
    assert summarise_histograms(SUMS)["area"]["scans"] == {"a": 4, "b": 2}
    assert summarise_histograms(SUMS)["intensity"]["drift"] == {}  # nobody to compare it with
