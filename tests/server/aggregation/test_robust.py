"""Median, trimmed mean and Krum against Flower's own, the laws they keep with centre weights, and a run that a liar cannot spoil."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from common.config.compose import compose_config
from common.config.schema import AggregationConfig
from common.modeling.parameters import Layout, TensorSlot
from common.protocol.messages import Reply, Request, TrainReply
from common.utils.errors import ConsiliumError
from server.aggregation.contributions import StoredUpdate, store_update
from server.aggregation.robust import quorum_error, robust_update, select_krum_outliers
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.initial_model import build_initial_model
from tests.in_process_federation import InProcess, phantom_config, sites

SIZE = 60_000  # more than a block
LAYOUT = Layout(
    [
        TensorSlot("w", (SIZE - 100,), 0, SIZE - 100, "backbone", True, False),
        TensorSlot("b", (100,), SIZE - 100, SIZE, "covid", True, False),
    ]
)
NAMES = [f"centre{i:02}" for i in range(9)]
MANY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARES = st.lists(st.floats(0.01, 1), min_size=3, max_size=9)


def arrived(folder: Path, deltas: np.ndarray) -> list[StoredUpdate]:
    none = np.empty(0, np.int64)
    return [
        store_update(TrainReply(c, d, none, 1, 1, {}, 0.0), LAYOUT, folder)
        for c, d in zip(NAMES, deltas, strict=False)
    ]


def drawn(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, SIZE)).astype(np.float32)


def everywhere(shares: list[float]) -> dict[str, dict[str, float]]:
    of = {c: s / sum(shares) for c, s in zip(NAMES, shares, strict=False)}
    return {"backbone": of, "covid": of}


@pytest.mark.parametrize("n", [3, 4, 6, 7, 9])
def test_with_equal_weights_it_is_flowers(tmp_path: Path, n: int) -> None:
    deltas = drawn(n, n)
    some, equal, theirs = arrived(tmp_path, deltas), everywhere([1.0] * n), [([d], 1) for d in deltas]
    median = robust_update(some, equal, LAYOUT, AggregationConfig(robust_rule="median"))
    np.testing.assert_allclose(median, aggregate_median(theirs)[0], atol=1e-6)
    trimmed = robust_update(some, equal, LAYOUT, AggregationConfig(robust_rule="trimmed_mean"))
    np.testing.assert_allclose(trimmed, aggregate_trimmed_avg(theirs, 1 / n + 1e-9)[0], atol=1e-6)


@pytest.mark.parametrize(("n", "hostile"), [(5, 1), (7, 1), (7, 2), (9, 3)])
def test_krum_with_equal_weights_is_flowers(tmp_path: Path, n: int, hostile: int) -> None:
    deltas = drawn(n, n) + 0.01 * np.arange(n)[:, None].astype(np.float32)
    deltas[0] += 5
    out = select_krum_outliers(arrived(tmp_path, deltas)[::-1], LAYOUT, hostile)
    assert out[0] == NAMES[0]
    kept = [d for c, d in zip(NAMES, deltas, strict=False) if c not in out]
    np.testing.assert_allclose(
        np.mean(kept, axis=0), aggregate_krum([([d], 1) for d in deltas], hostile, n - hostile)[0], atol=1e-6
    )


@MANY
@given(SHARES, st.integers(0, 99), st.sampled_from(["median", "trimmed_mean"]))
def test_a_liar_moves_no_value_beyond_the_honest(
    tmp_path: Path, shares: list[float], seed: int, robust: str
) -> None:
    """Whatever it sends, if it has less than half of the weight; nor does the order of arrival change a bit."""
    deltas = drawn(len(shares), seed)
    deltas[0] = np.random.default_rng(seed).choice([-3e38, 3e38], SIZE)
    given_ = [min(shares[0], 0.9 * sum(shares[1:])), *shares[1:]]
    some, rule = arrived(tmp_path, deltas), AggregationConfig(robust_rule=robust)  # type: ignore[arg-type]
    found = robust_update(some, everywhere(given_), LAYOUT, rule)
    assert (found >= deltas[1:].min(0) - 1e-6).all()
    assert (found <= deltas[1:].max(0) + 1e-6).all()
    np.testing.assert_array_equal(found, robust_update(some[::-1], everywhere(given_), LAYOUT, rule))


@MANY
@given(SHARES, st.integers(0, 99))
def test_weights_are_kept(tmp_path: Path, shares: list[float], seed: int) -> None:
    """The weighted median minimises sum w |x - m|; the trimmed mean is the plain loop's."""
    deltas, n = drawn(len(shares), seed), len(shares)
    some, w = arrived(tmp_path, deltas), np.array(shares) / sum(shares)
    median = robust_update(some, everywhere(shares), LAYOUT, AggregationConfig(robust_rule="median"))[:300]
    cost = np.einsum("c,cp->p", w, np.abs(deltas[:, :300] - median))
    assert (
        cost <= np.einsum("c,ckp->kp", w, np.abs(deltas[:, None, :300] - deltas[None, :, :300])).min(0) + 1e-5
    ).all()
    trimmed = robust_update(some, everywhere(shares), LAYOUT, AggregationConfig(robust_rule="trimmed_mean"))
    for p in (0, 17, SIZE - 1):
        kept = np.argsort(deltas[:, p])[1 : n - 1]
        assert trimmed[p] == pytest.approx(float(np.average(deltas[kept, p], weights=w[kept])), abs=1e-5)


def test_who_has_no_say_in_a_group_has_no_voice(tmp_path: Path) -> None:
    deltas = drawn(4, 1)
    weights = everywhere([1.0] * 4) | {"covid": {NAMES[0]: 0.0, NAMES[1]: 0.2, NAMES[2]: 0.3, NAMES[3]: 0.5}}
    found = robust_update(arrived(tmp_path, deltas), weights, LAYOUT, AggregationConfig(robust_rule="median"))
    order = np.sort(deltas[1:, -100:], axis=0)
    assert ((found[-100:] >= order[0]) & (found[-100:] <= order[2])).all()
    assert (found[-100:] == robust_update(arrived(tmp_path, deltas[1:]), {"covid": dict(zip(NAMES, (0.2, 0.3, 0.5), strict=False))}, LAYOUT,
                                     AggregationConfig(robust_rule="median"))[-100:]).all()  # fmt: skip
    assert "2 contributions teach 'covid'" in quorum_error(
        {"covid": {"a": 0.5, "b": 0.5, "c": 0.0}}, AggregationConfig(robust_rule="median")
    )
    assert quorum_error({"covid": {"a": 0.5, "b": 0.5}}, AggregationConfig()) == ""


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["aggregation.robust_rule=krum"],
            "against aggregation.num_byzantine=1 needs 5 contributions in a round, and here there are 4",
        ),
        (["aggregation.robust_rule=median", "aggregation.num_byzantine=2"], "needs 5 contributions"),
        (["aggregation.robust_rule=trimmed_mean", "federation.mode=central"], "here there are 1"),
        (["aggregation.robust_rule=median", "federation.held_out_centres=[north,east]"], "here there are 2"),
        (
            ["aggregation.robust_rule=trimmed_mean", "aggregation.num_byzantine=0"],
            "aggregation.num_byzantine is 0",
        ),
    ],
)
def test_too_few_centres_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("robust", ["none", "median", "trimmed_mean", "krum"])
def test_a_run_with_a_liar_stays_near_the_honest_run(tmp_path: Path, robust: str) -> None:
    """One centre of four (Krum: of five) sends fifty times the opposite of what it learnt, and no screening; the plain mean follows it."""
    names = ["north", "east", "south", "west", "harbour"][: 5 if robust == "krum" else 4]
    settings = [
        "aggregation.compression=fp32",
        "aggregation.max_norm_ratio=1e9",
        f"federation.centres=[{','.join(names)}]",
        f"aggregation.robust_rule={robust}",
    ]
    settings += [
        "backbone.norm=group",
        "stage.rounds=1",
        "stage.tasks=[covid]",
        "evaluation.checkpoint_selection=last",
    ]
    config = phantom_config(tmp_path / "data", *settings)

    def lie(centre: str, request: Request, reply: Reply) -> Reply:
        if centre == "east" and isinstance(reply, TrainReply):
            reply.delta *= -50
        return reply

    start = {name: tensor.numpy() for name, tensor in build_initial_model(config).state_dict().items()}
    moved, results = {}, {}
    for run, hook in (("honest", None), ("liar", lie)):
        results[run] = start_run(
            config, InProcess(sites(len(names)), hook), tmp_path, open_ledger(tmp_path), run
        )
        after = load_file(tmp_path / run / "model.safetensors")
        moved[run] = np.concatenate([(after[n] - start[n]).ravel() for n in start if n.endswith(".weight")])
    far = np.linalg.norm(moved["liar"] - moved["honest"]) / np.linalg.norm(moved["honest"])
    assert far > 10 if robust == "none" else far < 2
    facts = results["liar"]["stages"][0]["rounds"][1]["centres"]
    assert facts["east"]["norm"] > 20 * facts["north"]["norm"]
    if robust == "krum":
        assert [c for c, f in facts.items() if not f["accepted"]] == ["east"]
        assert "Krum" in results["liar"]["left_out"][0]["reason"]
