"""Whole runs under secure aggregation: the plain run's weights, drop-outs, retries, kill -9 and resume, with differential privacy, under a policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

ONE = ["stage.rounds=1", "evaluation.checkpoint_selection=last", "aggregation.compression=fp32"]
SECRET = ["privacy=secagg"]
HIDDEN = ["privacy=secagg", "privacy.secagg.scope=all", "evaluation.reduction=pooled"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def run(
    phantom: Path, runs: Path, name: str, *overrides: str, transport: InProcess | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    result = start_run(
        phantom_config(phantom, *overrides), transport or InProcess(sites()), runs, open_ledger(runs), name
    )
    return result, load_file(runs / name / "model.safetensors")


def test_a_secret_round_makes_the_plain_rounds_weights_and_hides_what_it_says(
    phantom: Path, tmp_path: Path
) -> None:
    sent: list[Reply] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        sent.append(reply)
        return reply

    plain, expected = run(phantom, tmp_path, "plain", *ONE)
    for name, settings in (("secret", SECRET), ("hidden", HIDDEN)):
        sent.clear()
        result, found = run(phantom, tmp_path, name, *ONE, *settings, transport=InProcess(sites(), hook))
        for tensor, value in expected.items():
            if value.dtype.kind == "f":  # 4 clip / 2^bits, and a float32's own rounding
                np.testing.assert_allclose(
                    found[tensor], value, atol=4 * 4 / 2**26, rtol=1e-6, err_msg=tensor
                )
        assert not any(
            reply.delta.size or reply.encoded_delta for reply in sent if isinstance(reply, TrainReply)
        )
        entry = result["stages"][0]["rounds"][1]
        pooled = {task: views["pooled"] for task, views in result["test"].items()}
        assert pooled == {task: views["pooled"] for task, views in plain["test"].items()}
        if name == "secret":
            aucs = [
                {c: of["auc"] for c, of in one["test"]["covid"]["centres"].items()} for one in (result, plain)
            ]
            assert aucs[0] == aucs[1]
            assert entry["weights"]["covid"] == pytest.approx(
                plain["stages"][0]["rounds"][1]["weights"]["covid"]
            )
            assert entry["weights"]["backbone"] == pytest.approx(
                plain["stages"][0]["rounds"][1]["weights"]["backbone"]
            )
        else:
            assert not any(reply.sums for reply in sent if isinstance(reply, StatisticsReply))
            assert not any(
                reply.scans or reply.losses or reply.int_buffers.any()
                for reply in sent
                if isinstance(reply, TrainReply)
            )
            assert not any(reply.scans or reply.skipped for reply in sent if isinstance(reply, JoinReply))
            assert result["test"]["covid"]["centres"].keys() == {"all"}
            assert "challenge_score" not in result["test"]["covid"]
            assert entry["weights"] == {}
            assert any("no centre's own scores are known" in note for note in result["notes"])
            ledger = json.dumps(
                [
                    *map(str, open_ledger(tmp_path).read_contributions(name)),
                    *map(str, open_ledger(tmp_path).read_centres(name)),
                ]
            )
            assert all(f"'{c}/train" not in ledger for c in ("north", "east", "south", "west"))
    lines = [
        line for line in egress_log.read_entries(phantom / "north" / ".consilium") if line["run"] == "secret"
    ]
    kinds = [
        (line["kind"], line["query"].partition("/")[0])
        for line in lines
        if line["kind"] in ("ShareKeysReply", "MaskedInputReply", "UnmaskReply")
    ]
    assert kinds == [("ShareKeysReply", "train"), ("MaskedInputReply", "train"), ("UnmaskReply", "train")]
    assert next(line["bytes"] for line in lines if line["kind"] == "MaskedInputReply") > 4 * 370_000


def test_who_drops_out_is_left_out_and_a_sum_of_too_few_is_begun_again(phantom: Path, tmp_path: Path) -> None:
    trained: list[str] = []
    lost = {
        (1, ShareKeysRequest, "north"),
        (1, ShareKeysRequest, "east"),
        (2, MaskedInputRequest, "west"),
    }  # (attempt, step, centre): the first falls below the threshold
    attempts: dict[str, int] = {}

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest):
            trained.append(centre)
            attempts[centre] = attempts.get(centre, 0) + 1
        return None if (attempts.get(centre), type(request), centre) in lost else reply

    result, weights = run(
        phantom,
        tmp_path,
        "dropped",
        *ONE,
        *SECRET,
        "federation.quorum=0.75",
        transport=InProcess(sites(), hook),
    )
    assert len(trained) == 8
    assert {(left["centre"], "no reply" in left["reason"]) for left in result["left_out"]} == {
        ("north", True),
        ("east", True),
        ("west", True),
    }
    entry = result["stages"][0]["rounds"][1]
    assert set(entry["weights"]["backbone"]) == {"north", "east", "south"}
    assert not entry["centres"]["west"]["accepted"]
    assert all(np.isfinite(value).all() for value in weights.values())
    assert [e["kind"] for e in open_ledger(tmp_path).read_events("dropped")].count("below_quorum") == 1


def test_it_pauses_when_too_few_stay_and_says_who_is_missing(phantom: Path, tmp_path: Path) -> None:
    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        return None if isinstance(request, MaskedInputRequest) and centre in ("north", "east") else reply

    with pytest.raises(
        ConsiliumError, match=r"is paused: .*0 contributions, 3 needed \(.*north.*no reply within"
    ):
        run(
            phantom,
            tmp_path,
            "paused",
            *ONE,
            *SECRET,
            "federation.quorum=0.75",
            "federation.round_retries=1",
            transport=InProcess(sites(), hook),
        )


class Killed(BaseException):
    """What no handler of the coordinator's catches: as after kill -9, only what lies on disk goes on."""


def test_killed_while_masks_are_opened_and_resumed_equals_uninterrupted(
    phantom: Path, tmp_path: Path
) -> None:
    opened = 0

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        nonlocal opened
        opened += isinstance(request, UnmaskRequest)
        if (
            opened == 11
        ):  # by 4 centres each: counts, scores of round 0, the change of round 1. The third has forgotten its secrets
            opened += 1
            raise Killed
        return reply

    settings = [*ONE, *HIDDEN]
    _, whole = run(phantom, tmp_path, "whole", *settings)
    nodes = InProcess(sites(), hook)
    with pytest.raises(Killed):
        run(phantom, tmp_path, "broken", *settings, transport=nodes)
    resume_run("broken", InProcess(sites()), tmp_path, open_ledger(tmp_path))
    for name, tensor in load_file(tmp_path / "broken" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_with_differential_privacy_what_is_masked_is_noised_already(phantom: Path, tmp_path: Path) -> None:
    """The new weights are the mean of what each centre was charged for, and that is the noised change."""
    before: list[np.ndarray] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            before.append(request.weights.floats)
        return reply

    private = [
        "privacy=patient",
        "privacy.noise_multiplier=1",
        "privacy.epsilon=0",
        "privacy.secagg.scope=model",
    ]
    nodes = [replace(site, state=str(tmp_path / str(i))) for i, site in enumerate(sites())]
    result, found = run(phantom, tmp_path, "private", *ONE, *private, transport=InProcess(nodes, hook))
    entry = result["stages"][0]["rounds"][1]
    assert all(said["epsilon"] > 0 for said in entry["centres"].values())
    charged = {
        c: load_file(tmp_path / str(i) / "budget" / "last.safetensors")["delta"]
        for i, c in enumerate(("north", "east", "south", "west"))
    }
    layout = parameter_layout(
        phantom_config(phantom, *ONE, *private, "tasks.source.classes=[north,east,south,west]")
    )
    for e in layout.floats:
        mean = sum(
            entry["weights"][e.group][c] * delta[e.span].astype(np.float64) for c, delta in charged.items()
        )
        np.testing.assert_allclose(found[e.name].ravel(), before[0][e.span] + mean, atol=5e-7, err_msg=e.name)


def test_a_policy_that_requires_it_lets_nothing_else_leave(phantom: Path, tmp_path: Path) -> None:
    def answered(policy: str, *overrides: str) -> list[str]:
        (tmp_path / "policy.yaml").write_text(policy)
        nodes = [
            replace(sites()[0], policy=str(tmp_path / "policy.yaml"), state=str(tmp_path / "state")),
            *sites()[1:],
        ]
        ended: list[str] = []

        def hook(centre: str, request: Request, reply: Reply) -> Reply:
            if centre == "north" and isinstance(
                request, ShareKeysRequest | MaskedInputRequest | UnmaskRequest
            ):
                ended.append(type(reply).__name__)
            return reply

        name = f"policy{len(list(tmp_path.glob('policy*/')))}"
        result, _ = run(
            phantom,
            tmp_path,
            name,
            *ONE,
            *overrides,
            "federation.quorum=0.75",
            transport=InProcess(nodes, hook),
        )
        return ended or [
            result["left_out"][0]["reason"]
            if result["left_out"]
            else open_ledger(tmp_path).read_events(name)[1]["detail"]
        ]

    assert answered("require_secure_aggregation: true\nmin_centres: 4\n", *SECRET) == [
        "ShareKeysReply",
        "MaskedInputReply",
        "UnmaskReply",
    ]
    assert "requires secure aggregation" in answered("require_secure_aggregation: true\n")[0]
    assert "asks for 9 centres or more" in answered("min_centres: 9\n", *SECRET)[0]
