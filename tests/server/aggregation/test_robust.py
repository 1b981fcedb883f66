"""Median, trimmed mean and Krum against Flower's own, their laws, and runs with a hostile centre."""

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
from server.aggregation.robust import find_quorum_error, robust_update, select_krum_outliers
from server.aggregation.stored_updates import StoredUpdate, store_update
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
CENTRES = [f"centre{i:02}" for i in range(9)]
MANY_EXAMPLES = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=3, max_size=9)
MEDIAN = AggregationConfig(robust_rule="median")
TRIMMED_MEAN = AggregationConfig(robust_rule="trimmed_mean")


def store_updates(folder: Path, deltas: np.ndarray) -> list[StoredUpdate]:
    int_buffers = np.empty(0, np.int64)
    return [
        store_update(TrainReply(centre, delta, int_buffers, 1, 1, {}, 0.0), LAYOUT, folder)
        for centre, delta in zip(CENTRES, deltas, strict=False)
    ]


def draw_deltas(num_centres: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_centres, SIZE)).astype(np.float32)


def weigh_all_groups(weights: list[float]) -> dict[str, dict[str, float]]:
    centre_weights = {c: weight / sum(weights) for c, weight in zip(CENTRES, weights, strict=False)}
    return {"backbone": centre_weights, "covid": centre_weights}


@pytest.mark.parametrize("num_centres", [3, 4, 6, 7, 9])
def test_median_and_trimmed_mean_with_equal_weights_are_those_of_flower(
    tmp_path: Path, num_centres: int
) -> None:
    deltas = draw_deltas(num_centres, num_centres)
    updates = store_updates(tmp_path, deltas)
    weights = weigh_all_groups([1.0] * num_centres)
    flower_results = [([delta], 1) for delta in deltas]
    median = robust_update(updates, weights, LAYOUT, MEDIAN)
    np.testing.assert_allclose(median, aggregate_median(flower_results)[0], atol=1e-6)
    trimmed_mean = robust_update(updates, weights, LAYOUT, TRIMMED_MEAN)
    expected = aggregate_trimmed_avg(flower_results, 1 / num_centres + 1e-9)[0]
    np.testing.assert_allclose(trimmed_mean, expected, atol=1e-6)


@pytest.mark.parametrize(("num_centres", "num_byzantine"), [(5, 1), (7, 1), (7, 2), (9, 3)])
def test_krum_with_equal_weights_is_that_of_flower(
    tmp_path: Path, num_centres: int, num_byzantine: int
) -> None:
    offsets = 0.01 * np.arange(num_centres)[:, None].astype(np.float32)
    deltas = draw_deltas(num_centres, num_centres) + offsets
    deltas[0] += 5
    outliers = select_krum_outliers(store_updates(tmp_path, deltas)[::-1], LAYOUT, num_byzantine)
    assert outliers[0] == CENTRES[0]
    accepted = [delta for centre, delta in zip(CENTRES, deltas, strict=False) if centre not in outliers]
    flower_results = [([delta], 1) for delta in deltas]
    expected = aggregate_krum(flower_results, num_byzantine, num_centres - num_byzantine)[0]
    np.testing.assert_allclose(np.mean(accepted, axis=0), expected, atol=1e-6)


@MANY_EXAMPLES
@given(WEIGHTS, st.integers(0, 99), st.sampled_from(["median", "trimmed_mean"]))
def test_a_hostile_centre_moves_no_value_beyond_those_of_the_honest(
    tmp_path: Path, weights: list[float], seed: int, rule: str
) -> None:
    """Whatever it sends, if it has less than half of the weight; and the order of arrival changes no bit."""
    deltas = draw_deltas(len(weights), seed)
    deltas[0] = np.random.default_rng(seed).choice([-3e38, 3e38], SIZE)
    group_weights = weigh_all_groups([min(weights[0], 0.9 * sum(weights[1:])), *weights[1:]])
    updates = store_updates(tmp_path, deltas)
    config = AggregationConfig(robust_rule=rule)  # type: ignore[arg-type]
    update = robust_update(updates, group_weights, LAYOUT, config)
    assert (update >= deltas[1:].min(0) - 1e-6).all()
    assert (update <= deltas[1:].max(0) + 1e-6).all()
    np.testing.assert_array_equal(update, robust_update(updates[::-1], group_weights, LAYOUT, config))


@MANY_EXAMPLES
@given(WEIGHTS, st.integers(0, 99))
def test_the_rules_keep_the_centre_weights(tmp_path: Path, weights: list[float], seed: int) -> None:
    """The weighted median minimises sum w |x - m|; the trimmed mean is that of a plain loop."""
    num_centres = len(weights)
    deltas = draw_deltas(num_centres, seed)
    updates = store_updates(tmp_path, deltas)
    group_weights = weigh_all_groups(weights)
    normalised = np.array(weights) / sum(weights)
    first = deltas[:, :300]
    median = robust_update(updates, group_weights, LAYOUT, MEDIAN)[:300]
    cost = np.einsum("c,cp->p", normalised, np.abs(first - median))
    costs_of_deltas = np.einsum("c,ckp->kp", normalised, np.abs(first[:, None] - first[None]))
    assert (cost <= costs_of_deltas.min(0) + 1e-5).all()
    trimmed_mean = robust_update(updates, group_weights, LAYOUT, TRIMMED_MEAN)
    for p in (0, 17, SIZE - 1):
        inner = np.argsort(deltas[:, p])[1 : num_centres - 1]
        expected = float(np.average(deltas[inner, p], weights=normalised[inner]))
        assert trimmed_mean[p] == pytest.approx(expected, abs=1e-5)


def test_a_centre_without_weight_in_a_group_does_not_count_there(tmp_path: Path) -> None:
    deltas = draw_deltas(4, 1)
    covid_weights = dict(zip(CENTRES, (0.0, 0.2, 0.3, 0.5), strict=False))
    weights = weigh_all_groups([1.0] * 4) | {"covid": covid_weights}
    update = robust_update(store_updates(tmp_path, deltas), weights, LAYOUT, MEDIAN)[-100:]
    sorted_deltas = np.sort(deltas[1:, -100:], axis=0)
    assert ((update >= sorted_deltas[0]) & (update <= sorted_deltas[2])).all()
    without_it = {"covid": dict(zip(CENTRES, (0.2, 0.3, 0.5), strict=False))}
    expected = robust_update(store_updates(tmp_path, deltas[1:]), without_it, LAYOUT, MEDIAN)[-100:]
    assert (update == expected).all()


def test_too_few_updates_of_a_group_are_an_error_only_under_a_rule_that_needs_them() -> None:
    error = find_quorum_error({"covid": {"a": 0.5, "b": 0.5, "c": 0.0}}, MEDIAN)
    assert "2 updates train 'covid'" in error
    assert find_quorum_error({"covid": {"a": 0.5, "b": 0.5}}, AggregationConfig()) == ""


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["aggregation.robust_rule=krum"],
            "with aggregation.num_byzantine=1 needs 5 updates in a round, and here there are 4",
        ),
        (["aggregation.robust_rule=median", "aggregation.num_byzantine=2"], "needs 5 updates"),
        (["aggregation.robust_rule=trimmed_mean", "federation.mode=central"], "here there are 1"),
        (["aggregation.robust_rule=median", "federation.held_out_centres=[north,east]"], "here there are 2"),
        (
            ["aggregation.robust_rule=trimmed_mean", "aggregation.num_byzantine=0"],
            "aggregation.num_byzantine is 0",
        ),
    ],
)
def test_a_rule_without_enough_centres_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", ["none", "median", "trimmed_mean", "krum"])
def test_a_run_with_a_hostile_centre_stays_near_the_honest_run(tmp_path: Path, rule: str) -> None:
    """One centre of four (Krum: of five) sends -50 times its update; the plain mean follows it."""
    centres = ["north", "east", "south", "west", "harbour"][: 5 if rule == "krum" else 4]
    config = phantom_config(
        tmp_path / "data",
        "aggregation.compression=fp32",
        "aggregation.max_norm_ratio=1e9",
        f"federation.centres=[{','.join(centres)}]",
        f"aggregation.robust_rule={rule}",
        "backbone.norm=group",
        "stage.rounds=1",
        "stage.tasks=[covid]",
        "evaluation.checkpoint_selection=last",
    )

    def scale_update(centre: str, request: Request, reply: Reply) -> Reply:
        if centre == "east" and isinstance(reply, TrainReply):
            reply.delta *= -50
        return reply

    initial = {name: tensor.numpy() for name, tensor in build_initial_model(config).state_dict().items()}
    moved, results = {}, {}
    for run_id, hook in (("honest", None), ("hostile", scale_update)):
        transport = InProcess(sites(len(centres)), hook)
        results[run_id] = start_run(config, transport, tmp_path, open_ledger(tmp_path), run_id)
        final = load_file(tmp_path / run_id / "model.safetensors")
        weights = [name for name in initial if name.endswith(".weight")]
        moved[run_id] = np.concatenate([(final[name] - initial[name]).ravel() for name in weights])
    distance = np.linalg.norm(moved["hostile"] - moved["honest"]) / np.linalg.norm(moved["honest"])
    assert distance > 10 if rule == "none" else distance < 2
    result = results["hostile"]
    centre_rounds = result.stages[0].rounds[1].centres
    assert centre_rounds["east"].norm > 20 * centre_rounds["north"].norm
    if rule == "krum":
        assert [centre for centre, record in centre_rounds.items() if not record.accepted] == ["east"]
        assert "Krum" in result.left_out[0].reason
