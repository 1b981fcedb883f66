"""Aggregation against straightforward references, and its laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.schema import AggregationConfig, BackboneConfig, DecoderConfig, Task
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout, get_model_weights
from common.protocol.messages import TrainReply
from server.aggregation.contributions import (
    StoredUpdate,
    compute_group_weights,
    find_outliers,
    server_step,
    store_update,
    validation_error,
    weighted_sum,
)

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}
MODEL = make_model(BackboneConfig(), TASKS, 1)
LAYOUT: Layout = build_layout(MODEL)
START: Weights = get_model_weights(MODEL, LAYOUT)
CENTRES = ["north", "east", "south"]


def contribution(centre: str, seed: int, counter: int = 7) -> TrainReply:
    delta = np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)
    return TrainReply(centre, delta, np.full(LAYOUT.int_buffer_size, counter, np.int64), 10, 5, {}, 0.1)


def spooled(folder: Path, *seeds: int) -> list[StoredUpdate]:
    return [
        store_update(contribution(c, s, 7 + s), LAYOUT, folder) for c, s in zip(CENTRES, seeds, strict=False)
    ]


def counts(**cells: list[list[float]]) -> dict[str, dict[str, list[float]]]:
    """{centre: {"covid": [neg, pos, unlabelled], "source": [a, b, unlabelled]}}"""
    return {c: {"covid": two[0], "source": two[1]} for c, two in cells.items()}


def test_fedavg_is_the_textbook_sum(tmp_path: Path) -> None:
    """tau = 0 equals FedAvg to 1e-6: every tensor by n_c / n, computed tensor by tensor in float64."""
    held = counts(
        north=[[60, 40, 0], [100, 0, 0]], east=[[10, 10, 0], [0, 20, 0]], south=[[5, 0, 0], [0, 5, 0]]
    )
    weights = compute_group_weights(held, AggregationConfig(tau=0.0, weight_by="scans"), TASKS)
    after = server_step(
        START, weighted_sum(spooled(tmp_path, 1, 2, 3), weights, LAYOUT), [], AggregationConfig(), LAYOUT, {}
    )
    n = np.array([100, 20, 5]) / 125
    deltas = np.stack([contribution("", s).delta.astype(np.float64) for s in (1, 2, 3)])
    np.testing.assert_allclose(after.floats, START.floats + n @ deltas, atol=1e-6)


def test_heads_go_by_their_own_labels(tmp_path: Path) -> None:
    held = counts(north=[[50, 50, 0], [0, 0, 100]], east=[[0, 0, 40], [20, 20, 0]])
    weights = compute_group_weights(held, AggregationConfig(tau=1.0), TASKS)
    assert weights["covid"] == {
        "north": pytest.approx(1),
        "east": pytest.approx(0),
    }  # east has no covid labels
    assert weights["source"] == {"north": pytest.approx(0), "east": pytest.approx(1)}
    both = sum(t.loss_weight for t in TASKS.values())
    assert weights["backbone"] == {
        c: pytest.approx(TASKS[t].loss_weight / both) for c, t in (("north", "covid"), ("east", "source"))
    }  # as in the loss
    update = weighted_sum(spooled(tmp_path, 1, 2), weights, LAYOUT)
    for entry in LAYOUT.floats:
        if entry.group == "covid":
            np.testing.assert_allclose(update[entry.span], contribution("", 1).delta[entry.span], rtol=1e-6)


def test_a_head_nobody_labels_does_not_move(tmp_path: Path) -> None:
    held = counts(north=[[5, 5, 0], [0, 0, 10]], east=[[5, 5, 0], [0, 0, 10]])
    update = weighted_sum(
        spooled(tmp_path, 1, 2), compute_group_weights(held, AggregationConfig(), TASKS), LAYOUT
    )
    for entry in LAYOUT.floats:
        assert (update[entry.span] == 0).all() == (entry.group == "source")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([0, 1, 2]))
def test_order_of_arrival_changes_no_bit(tmp_path: Path, order: list[int]) -> None:
    arrived = spooled(tmp_path, 1, 2, 3)
    weights = {g: {"north": 0.5, "east": 0.3, "south": 0.2} for g in LAYOUT.group_slices()}
    np.testing.assert_array_equal(
        weighted_sum([arrived[i] for i in order], weights, LAYOUT), weighted_sum(arrived, weights, LAYOUT)
    )


def test_counters_keep_their_type_and_take_the_largest(tmp_path: Path) -> None:
    arrived = [
        store_update(contribution("north", 1, 2**40 + 1), LAYOUT, tmp_path),
        store_update(contribution("east", 2, 3), LAYOUT, tmp_path),
    ]
    after = server_step(START, np.zeros(LAYOUT.size, np.float32), arrived, AggregationConfig(), LAYOUT, {})
    assert after.int_buffers.dtype == np.int64
    assert (after.int_buffers == 2**40 + 1).all()


@pytest.mark.parametrize("method", ["fedadam", "fedyogi"])
def test_server_optimisers_follow_the_paper(method: str) -> None:
    """Reddi et al. 2021, algorithm 2, written out for two rounds; batch-norm statistics are averaged as they are."""
    chosen = AggregationConfig(method=method, server_lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)  # type: ignore[arg-type]
    updates = [contribution("", s).delta for s in (4, 5)]
    state: dict[str, np.ndarray] = {}
    weights = START
    m, v = np.zeros(LAYOUT.size), np.full(LAYOUT.size, 1e-6)
    x = START.floats.astype(np.float64)
    parameters = LAYOUT.parameter_mask()
    for update in updates:
        weights = server_step(weights, update.copy(), [], chosen, LAYOUT, state)
        d = update.astype(np.float64)
        m = 0.9 * m + 0.1 * d
        v = 0.99 * v + 0.01 * d**2 if method == "fedadam" else v - 0.01 * d**2 * np.sign(v - d**2)
        x = x + np.where(parameters, 0.1 * m / (np.sqrt(v) + 1e-3), d)
    np.testing.assert_allclose(weights.floats, x, rtol=2e-4, atol=2e-4)


def test_faults_and_outliers() -> None:
    good = contribution("north", 1)
    assert validation_error(good, LAYOUT, False) == ""
    bad = contribution("north", 1)
    bad.delta[17] = np.nan
    assert validation_error(bad, LAYOUT, False) == "not finite"
    bad.delta = bad.delta[:-1]
    assert "wrong shape" in validation_error(bad, LAYOUT, False)
    assert "wrong shape" in validation_error(good, LAYOUT, True)  # nothing should come when all is personal
    assert find_outliers({"a": 1.0, "b": 1.2, "c": 50.0}, 10).keys() == {"c"}
    assert find_outliers({"a": 1.0, "b": 1.2, "c": 5.0}, 10) == {}
    assert (
        find_outliers({"a": 1.0}, 10) == find_outliers({"a": 1.0, "b": 50.0}, 10) == {}
    )  # of two nobody can say which is odd


def test_norm_leaves_batch_norm_statistics_out(tmp_path: Path) -> None:
    one = contribution("north", 1)
    one.delta[~LAYOUT.parameter_mask()] = 1e6
    norm = store_update(one, LAYOUT, tmp_path).norm
    assert norm == pytest.approx(np.linalg.norm(one.delta[LAYOUT.parameter_mask()].astype(np.float64)))


# --- what tasks share -------------------------------------------------------------------------------------------------------------------

MAPS = {
    "finding": Task(type="multiclass", classes=["a", "b"], loss_weight=2.0),
    "infection": Task(type="segmentation", loss_weight=1.0),
    "covid": Task(head_input="map", loss_weight=0.5),
}
CELLS = {"finding": 2, "infection": 1, "covid": 2}
NUMBERS = st.integers(0, 500)


def held(draw: st.DrawFn) -> dict[str, dict[str, list[float]]]:
    """What three centres have for each task of MAPS, the unlabelled last."""
    return {c: {t: [float(draw(NUMBERS)) for _ in range(k + 1)] for t, k in CELLS.items()} for c in CENTRES}


HELD = st.composite(held)()
TAUS = st.sampled_from([0.0, 0.5, 1.0])


@settings(deadline=None)
@given(HELD, TAUS, st.sampled_from(["cells", "scans"]))
def test_what_is_shared_goes_by_the_tasks_that_share_it(counts: dict, tau: float, count: str) -> None:  # type: ignore[type-arg]
    """The decoder by the tasks that read its map, the backbone by all, each as much as in the loss; of a task that nobody labels, nothing."""
    weights = compute_group_weights(counts, AggregationConfig(tau=tau, weight_by=count), MAPS)  # type: ignore[arg-type]
    labelled = {t: {c: sum(counts[c][t][:-1]) for c in CENTRES} for t in MAPS}
    for group, tasks in {
        "backbone": list(MAPS),
        "decoder": ["infection", "covid"],
        **{t: [t] for t in MAPS},
    }.items():
        told = {t: MAPS[t].loss_weight for t in tasks if sum(labelled[t].values())}
        assert sum(weights[group].values()) == pytest.approx(1 if told else 0)
        for c in CENTRES:
            if not any(labelled[t][c] for t in tasks):
                assert weights[group][c] == 0  # it does not dilute what it has no labels for
            mixed = sum(w * weights[t][c] for t, w in told.items()) / (sum(told.values()) or 1)
            assert weights[group][c] == pytest.approx(mixed)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10_000), min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_tau_0_by_scans_is_fedavg_where_everything_is_labelled(sizes: list[int], shares: list[float]) -> None:
    """Every group has FedAvg's n_c / n, however a centre's scans fall into classes."""
    counts = {}
    for c, n, share in zip(CENTRES, sizes, shares, strict=True):
        first = float(round(n * share))
        counts[c] = {
            "finding": [first, n - first, 0.0],
            "infection": [float(n), 0.0],
            "covid": [n - first, first, 0.0],
        }
    weights = compute_group_weights(counts, AggregationConfig(tau=0.0, weight_by="scans"), MAPS)
    assert weights.keys() == {"backbone", "decoder", *MAPS}
    for own in weights.values():
        assert own == {c: pytest.approx(n / sum(sizes)) for c, n in zip(CENTRES, sizes, strict=True)}


def test_a_centre_without_masks_moves_no_weight_of_the_decoder(tmp_path: Path) -> None:
    model = make_model(
        BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4])),
        {t: MAPS[t] for t in ("finding", "infection")},
        1,
    )
    layout = build_layout(model)
    counts = {
        "north": {"finding": [9.0, 9.0, 0.0], "infection": [18.0, 0.0]},
        "east": {"finding": [40.0, 50.0, 0.0], "infection": [0.0, 90.0]},
    }
    weights = compute_group_weights(
        counts, AggregationConfig(), {t: MAPS[t] for t in ("finding", "infection")}
    )
    deltas = {
        c: np.random.default_rng(k).normal(size=layout.size).astype(np.float32) for k, c in enumerate(counts)
    }
    none = np.zeros(layout.int_buffer_size, np.int64)
    arrived = [
        store_update(TrainReply(c, delta, none, 1, 1, {}, 0.0), layout, tmp_path)
        for c, delta in deltas.items()
    ]
    update = weighted_sum(arrived, weights, layout)
    alone = [e for e in layout.floats if e.group in ("decoder", "infection")]
    assert {e.group for e in alone} == {"decoder", "infection"}
    for e in alone:
        np.testing.assert_allclose(update[e.span], deltas["north"][e.span], rtol=1e-6)
    for e in layout.floats:  # both find: half of each; only north draws, which counts a third of the loss
        if e.group == "backbone":
            mixed = (2 / 3 * 0.5 + 1 / 3) * deltas["north"][e.span] + 2 / 3 * 0.5 * deltas["east"][e.span]
            np.testing.assert_allclose(update[e.span], mixed, rtol=1e-4, atol=1e-6)
