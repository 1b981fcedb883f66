"""A federation under `privacy=patient`: group norms, reported privacy loss, a budget spent at one centre."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn

from client.tools.predict import load_model
from common.protocol.messages import Reply, Request, TrainReply
from common.utils.errors import ConsiliumError
from server.reporting.report import write_report
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.initial_model import build_initial_model
from server.run.records import RunStatus
from tests.in_process_federation import InProcess, phantom_config, sites

PRIVATE = ["privacy=patient", "privacy.epsilon=4", "stage.rounds=3"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def test_spent_budget_stops_its_centre_and_no_other(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("epsilon: 3.2\n")
    nodes = [replace(site, state=str(tmp_path / f"state{i}")) for i, site in enumerate(sites())]
    nodes[1] = replace(nodes[1], policy=str(tmp_path / "policy.yaml"))
    num_sent: dict[str, int] = {}

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        num_sent[centre] = num_sent.get(centre, 0) + isinstance(reply, TrainReply)
        return reply

    config = phantom_config(phantom, *PRIVATE)
    assert config.federation.quorum == 1  # of those that do not refuse permanently
    ledger = open_ledger(tmp_path)
    result = start_run(config, InProcess(nodes, hook), tmp_path, ledger, "r")
    assert result.status == RunStatus.FINISHED
    assert result.left_out
    assert {left.centre for left in result.left_out} == {"east"}
    assert all("privacy loss (epsilon) of 3.2" in left.reason for left in result.left_out)
    rounds_left_out = {(left.round, left.centre) for left in result.left_out}
    assert num_sent == {"north": 3, "east": 3 - len(rounds_left_out), "south": 3, "west": 3}

    spent: dict[str, list[float]] = {centre: [] for centre in num_sent}
    for row in ledger.read_contributions("r"):
        if row["accepted"]:
            assert row["loss"] is None
            spent[row["centre"]].append(row["epsilon"])
    assert all(epsilons == sorted(epsilons) for epsilons in spent.values())
    assert max(spent["east"]) <= 3.2 < spent["north"][-1] <= 4
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<h2>Privacy</h2>" in page
    assert f"{spent['north'][-1]:.2f}" in page

    weights = load_file(tmp_path / "r" / "model.safetensors")
    assert not [name for name in weights if "running_mean" in name]
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    model, exported, _ = load_model(tmp_path / "r" / "model.safetensors")
    assert exported.privacy == config.privacy
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_run_pauses_when_every_budget_is_spent_and_resumes_when_more_is_allowed(
    phantom: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("epsilon: 2.9\n")
    nodes = [
        replace(site, state=str(tmp_path / f"state{i}"), policy=str(policy)) for i, site in enumerate(sites())
    ]
    ledger = open_ledger(tmp_path)
    config = phantom_config(phantom, *PRIVATE, "federation.round_retries=0")
    with pytest.raises(ConsiliumError, match=r"paused.*privacy loss"):
        start_run(config, InProcess(nodes), tmp_path, ledger, "r")
    policy.write_text("epsilon: 9\n")
    assert resume_run("r", InProcess(nodes), tmp_path, ledger).status == RunStatus.FINISHED


def test_run_without_privacy_reports_no_privacy_loss(phantom: Path, tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    result = start_run(phantom_config(phantom, "stage.rounds=1"), InProcess(sites()), tmp_path, ledger, "r")
    assert [row["epsilon"] for row in ledger.read_contributions("r")] == [None] * 4
    write_report(tmp_path / "again.html", result)
    assert "<h2>Privacy</h2>" not in (tmp_path / "again.html").read_text()
    assert not list(phantom.glob("*/.consilium/budget"))


def test_backbone_with_an_irreplaceable_batch_norm_is_refused(phantom: Path) -> None:
    config = phantom_config(phantom, *PRIVATE, "backbone.name=levit_128s", "preprocess.image_size=224")
    with pytest.raises(ConsiliumError, match=r"privacy=patient: the backbone contains a .*BatchNorm"):
        build_initial_model(config)
    # This one has timm's BatchNormAct2d, which can be replaced.
    config = phantom_config(phantom, *PRIVATE, "backbone.name=test_efficientnet", "backbone.num_groups=4")
    norms = [module for module in build_initial_model(config).modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(norm.num_groups <= 4 for norm in norms)
