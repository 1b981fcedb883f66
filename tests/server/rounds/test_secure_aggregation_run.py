"""Whole runs under secure aggregation: weights as in the open, dropouts, kill -9, privacy, policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.federation.parameter_cache import parameter_layout
from client.site import egress_log
from common.protocol.messages import (
    JoinReply,
    MaskedInputRequest,
    Reply,
    Request,
    ShareKeysRequest,
    StatisticsReply,
    TrainReply,
    TrainRequest,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError, RefusalCode
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.records import RunResult
from tests.in_process_federation import InProcess, phantom_config, sites

ReplyT = TypeVar("ReplyT")
ONE_ROUND = ["stage.rounds=1", "evaluation.checkpoint_selection=last", "aggregation.compression=fp32"]
SECAGG = ["privacy=secagg"]
SECAGG_ALL = ["privacy=secagg", "privacy.secagg.scope=all", "evaluation.reduction=pooled"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def run(
    phantom: Path, runs: Path, name: str, *overrides: str, transport: InProcess | None = None
) -> tuple[RunResult, dict[str, np.ndarray]]:
    """Execute a run and return its result and its model's tensors."""
    config = phantom_config(phantom, *overrides)
    result = start_run(config, transport or InProcess(sites()), runs, open_ledger(runs), name)
    return result, load_file(runs / name / "model.safetensors")


class Recorder:
    """A hook that keeps every reply."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def __call__(self, centre: str, request: Request, reply: Reply) -> Reply:
        self.replies.append(reply)
        return reply

    def of_type(self, reply_type: type[ReplyT]) -> list[ReplyT]:
        return [reply for reply in self.replies if isinstance(reply, reply_type)]


def test_secure_round_makes_the_same_weights_and_hides_updates(phantom: Path, tmp_path: Path) -> None:
    plain, expected = run(phantom, tmp_path, "plain", *ONE_ROUND)
    plain_round = plain.stages[0].rounds[1]
    recorder = Recorder()
    result, weights = run(
        phantom, tmp_path, "secret", *ONE_ROUND, *SECAGG, transport=InProcess(sites(), recorder)
    )
    assert_close_weights(weights, expected)
    assert_same_pooled_scores(result, plain)
    for reply in recorder.of_type(TrainReply):
        assert not reply.delta.size
        assert not reply.encoded_delta
    for centre, scores in plain.test["covid"].centres.items():
        assert result.test["covid"].centres[centre].metrics["auc"] == scores.metrics["auc"]
    secure_round = result.stages[0].rounds[1]
    for group in ("covid", "backbone"):
        assert secure_round.weights[group] == pytest.approx(plain_round.weights[group])
    log = egress_log.read_entries(phantom / "north" / ".consilium")
    entries = [entry for entry in log if entry.run == "secret"]
    steps = []
    for entry in entries:
        if entry.kind in ("ShareKeysReply", "MaskedInputReply", "UnmaskReply"):
            steps.append((entry.kind, entry.query.partition("/")[0]))
    assert steps == [("ShareKeysReply", "train"), ("MaskedInputReply", "train"), ("UnmaskReply", "train")]
    masked = next(entry for entry in entries if entry.kind == "MaskedInputReply")
    assert masked.bytes > 4 * 370_000


def test_scope_all_hides_the_statistics_as_well(phantom: Path, tmp_path: Path) -> None:
    plain, expected = run(phantom, tmp_path, "plain", *ONE_ROUND)
    recorder = Recorder()
    result, weights = run(
        phantom, tmp_path, "hidden", *ONE_ROUND, *SECAGG_ALL, transport=InProcess(sites(), recorder)
    )
    assert_close_weights(weights, expected)
    assert_same_pooled_scores(result, plain)
    for reply in recorder.of_type(TrainReply):
        assert not reply.delta.size
        assert not reply.encoded_delta
        assert not reply.scans
        assert not reply.losses
        assert not reply.int_buffers.any()
    assert not any(reply.sums for reply in recorder.of_type(StatisticsReply))
    assert not any(reply.scans or reply.skipped for reply in recorder.of_type(JoinReply))
    assert result.test["covid"].centres.keys() == {"all"}
    assert result.test["covid"].challenge_score is None
    assert result.stages[0].rounds[1].weights == {}
    assert any("no centre's own scores are known" in note for note in result.notes)
    ledger = open_ledger(tmp_path)
    rows = str([*ledger.read_contributions("hidden"), *ledger.read_centres("hidden")])
    assert all(f"'{centre}/train" not in rows for centre in ("north", "east", "south", "west"))


def assert_close_weights(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Up to quantization, 4 clip / 2^bits, and a float32's own rounding."""
    for name, tensor in expected.items():
        if tensor.dtype.kind == "f":
            np.testing.assert_allclose(weights[name], tensor, atol=4 * 4 / 2**26, rtol=1e-6, err_msg=name)


def assert_same_pooled_scores(result: RunResult, expected: RunResult) -> None:
    pooled = {task: scores.pooled for task, scores in result.test.items()}
    assert pooled == {task: scores.pooled for task, scores in expected.test.items()}


def test_dropouts_are_left_out_and_a_sum_of_too_few_is_started_again(phantom: Path, tmp_path: Path) -> None:
    trained: list[str] = []
    # (attempt, step, centre): the first attempt falls below the threshold.
    lost = {
        (1, ShareKeysRequest, "north"),
        (1, ShareKeysRequest, "east"),
        (2, MaskedInputRequest, "west"),
    }
    attempts: dict[str, int] = {}

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest):
            trained.append(centre)
            attempts[centre] = attempts.get(centre, 0) + 1
        return None if (attempts.get(centre), type(request), centre) in lost else reply

    transport = InProcess(sites(), hook)
    result, weights = run(
        phantom, tmp_path, "dropped", *ONE_ROUND, *SECAGG, "federation.quorum=0.75", transport=transport
    )
    assert len(trained) == 8
    assert {left.centre for left in result.left_out} == {"north", "east", "west"}
    assert all("no reply" in left.reason for left in result.left_out)
    assert {left.code for left in result.left_out} == {RefusalCode.OFFLINE}
    record = result.stages[0].rounds[1]
    assert set(record.weights["backbone"]) == {"north", "east", "south"}
    assert not record.centres["west"].accepted
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    kinds = [event["kind"] for event in open_ledger(tmp_path).read_events("dropped")]
    assert kinds.count("below_quorum") == 1


def test_run_pauses_when_too_few_centres_stay_in_the_sum(phantom: Path, tmp_path: Path) -> None:
    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        return None if isinstance(request, MaskedInputRequest) and centre in ("north", "east") else reply

    overrides = ["federation.quorum=0.75", "federation.round_retries=1"]
    transport = InProcess(sites(), hook)
    with pytest.raises(ConsiliumError, match=r"is paused: .*0 updates, 3 needed \(.*north.*no reply within"):
        run(phantom, tmp_path, "paused", *ONE_ROUND, *SECAGG, *overrides, transport=transport)


class CoordinatorKilled(BaseException):
    """What no handler of the coordinator's catches: as after kill -9, only what is on disk is left."""


def test_killed_while_masks_are_removed_and_resumed_equals_uninterrupted_run(
    phantom: Path, tmp_path: Path
) -> None:
    num_unmask_requests = 0

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        # 4 centres are asked for the counts, for the scores of round 0 and for the update of round 1: the
        # third centre has deleted its secrets of the update when the coordinator is killed.
        nonlocal num_unmask_requests
        num_unmask_requests += isinstance(request, UnmaskRequest)
        if num_unmask_requests == 11:
            num_unmask_requests += 1
            raise CoordinatorKilled
        return reply

    _, expected = run(phantom, tmp_path, "whole", *ONE_ROUND, *SECAGG_ALL)
    transport = InProcess(sites(), hook)
    with pytest.raises(CoordinatorKilled):
        run(phantom, tmp_path, "broken", *ONE_ROUND, *SECAGG_ALL, transport=transport)
    resume_run("broken", InProcess(sites()), tmp_path, open_ledger(tmp_path))
    for name, tensor in load_file(tmp_path / "broken" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_masked_updates_are_privatised_before(phantom: Path, tmp_path: Path) -> None:
    """Under `privacy=patient`, the next weights are the mean of the noisy updates that were charged."""
    received: list[np.ndarray] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            received.append(request.weights.floats)
        return reply

    private = [
        "privacy=patient",
        "privacy.noise_multiplier=1",
        "privacy.epsilon=0",
        "privacy.secagg.scope=model",
    ]
    nodes = [replace(site, state=str(tmp_path / str(i))) for i, site in enumerate(sites())]
    transport = InProcess(nodes, hook)
    result, weights = run(phantom, tmp_path, "private", *ONE_ROUND, *private, transport=transport)
    record = result.stages[0].rounds[1]
    assert all(centre.epsilon and centre.epsilon > 0 for centre in record.centres.values())
    charged = {}
    for i, centre in enumerate(("north", "east", "south", "west")):
        charged[centre] = load_file(tmp_path / str(i) / "budget" / "last.safetensors")["delta"]
    classes = "tasks.source.classes=[north,east,south,west]"
    layout = parameter_layout(phantom_config(phantom, *ONE_ROUND, *private, classes))
    for slot in layout.floats:
        mean = np.zeros(slot.stop - slot.start)
        for centre, delta in charged.items():
            mean += record.weights[slot.group][centre] * delta[slot.span].astype(np.float64)
        expected = received[0][slot.span] + mean
        np.testing.assert_allclose(weights[slot.name].ravel(), expected, atol=5e-7, err_msg=slot.name)


def run_with_policy(phantom: Path, folder: Path, policy: str, *overrides: str) -> list[str]:
    """Run with a policy at north; return its replies in secure sums, or the reason why it was left out."""
    (folder / "policy.yaml").write_text(policy)
    nodes = sites()
    nodes[0] = replace(nodes[0], policy=str(folder / "policy.yaml"), state=str(folder / "state"))
    replies: list[str] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        is_secure_sum = isinstance(request, ShareKeysRequest | MaskedInputRequest | UnmaskRequest)
        if centre == "north" and is_secure_sum:
            replies.append(type(reply).__name__)
        return reply

    name = f"policy{len(list(folder.glob('policy*/')))}"
    transport = InProcess(nodes, hook)
    result, _ = run(
        phantom, folder, name, *ONE_ROUND, *overrides, "federation.quorum=0.75", transport=transport
    )
    if replies:
        return replies
    if result.left_out:
        return [result.left_out[0].reason]
    return [open_ledger(folder).read_events(name)[1]["detail"]]


def test_policy_that_requires_secure_aggregation_refuses_everything_else(
    phantom: Path, tmp_path: Path
) -> None:
    requires_secagg = "require_secure_aggregation: true\n"
    replies = run_with_policy(phantom, tmp_path, f"{requires_secagg}min_centres: 4\n", *SECAGG)
    assert replies == ["ShareKeysReply", "MaskedInputReply", "UnmaskReply"]
    assert "requires secure aggregation" in run_with_policy(phantom, tmp_path, requires_secagg)[0]
    (reason,) = run_with_policy(phantom, tmp_path, "min_centres: 9\n", *SECAGG)
    assert "requires 9 centres or more" in reason
