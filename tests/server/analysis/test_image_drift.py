"""Image statistics and drift between centres; and in a run, with the cross-site scores."""

from __future__ import annotations

import dataclasses
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
from server.rounds.membership import restore_tasks
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

SUMS = {
    "a/quality/area": np.eye(25)[0] * 4,
    "b/quality/area": np.eye(25)[1] * 2,
    "a/quality/intensity": np.ones(32),
}


def test_drift_is_the_jensen_shannon_distance_to_all_other_centres() -> None:
    histograms = {"a": np.array([4.0, 0, 0]), "b": np.array([0, 2.0, 0]), "c": np.array([0, 2.0, 0])}
    drift = compute_drift(histograms)
    assert drift["a"] == 1  # nothing in common
    p = np.array([0, 1.0, 0])
    q = np.array([4 / 6, 2 / 6, 0])
    middle = (p + q) / 2
    divergence = 0.0
    for fractions in (p, q):
        filled = fractions > 0
        terms = fractions[filled] * np.log2(fractions[filled] / middle[filled])
        divergence += 0.5 * float(terms.sum())
    assert drift["b"] == pytest.approx(np.sqrt(divergence), abs=1e-4)
    assert compute_drift({"a": histograms["a"]}) == {}


def test_histograms_are_summarised_by_statistic() -> None:
    statistics = summarise_histograms(SUMS)
    assert statistics["area"].scans == {"a": 4, "b": 2}
    assert statistics["intensity"].drift == {}  # there is no other centre


def test_image_statistics_and_cross_site_scores_of_a_run(tmp_path: Path) -> None:
    """West's policy allows no image statistics; it takes part all the same.

    On the diagonal of the cross-site scores is the loss of each centre's own weights on its own scans.
    """
    trained: dict[str, Weights] = {}

    def record_weights(centre: str, request: Request, reply: Reply) -> Reply | None:
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
    result = start_run(config, InProcess(nodes, record_weights), tmp_path, ledger, "r")
    published = json.loads((tmp_path / "r" / "metrics.json").read_text())

    statistics = {name: dataclasses.asdict(one) for name, one in result.image_statistics.items()}
    assert statistics == ledger.read_artifacts("r")["image_statistics"] == published["image_statistics"]
    assert result.image_statistics["area"].centres.keys() == {"north", "east", "south"}
    assert {row["kind"]: row["centre"] for row in ledger.read_events("r")}["withheld"] == "west"
    assert not result.left_out
    counts_by_split = result.centres["north"].counts
    num_scans = sum(sum(counts["covid"].values()) for counts in counts_by_split.values())
    assert result.image_statistics["position"].scans["north"] == num_scans
    for statistic in result.image_statistics.values():
        for fractions in statistic.centres.values():
            assert sum(fractions) == pytest.approx(1, abs=1e-4)

    cross_site = result.cross_site
    assert cross_site is not None
    assert (cross_site.round, cross_site.split) == (2, "val")
    scores = cross_site.tasks["covid"]
    assert scores.keys() == {"north", "east", "south", "west"}
    plain = json.loads(json.dumps(dataclasses.asdict(cross_site)))
    assert ledger.read_artifacts("r")["cross_site"] == published["cross_site"] == plain
    assert not (tmp_path / "r" / "local").exists()
    config = restore_tasks(config, result.fitted_tasks)
    model = make_model(config.backbone, config.tasks, 0).eval()
    for node, (centre, weights) in zip(nodes, trained.items(), strict=True):
        set_model_weights(model, build_layout(model), weights)
        val = load_datasets(node, config)[0]["val"]
        with torch.inference_mode():
            inputs = [torch.from_numpy(np.array(slices))[None] / 255 for slices in val.slices]
            logits = torch.cat([model(x, ["covid"])["covid"][:, 0] for x in inputs])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(val.targets["covid"]).float()
        )
        assert scores[centre][centre].loss == pytest.approx(float(loss), rel=1e-4)
    losses_at_north = {by_centre["north"].loss for by_centre in scores.values()}
    assert len(losses_at_north) == 4  # four different models
