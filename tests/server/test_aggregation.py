"""Aggregation against straightforward references, and its laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.messages import Contribution
from common.model import make_model
from common.schema import Aggregation, Backbone, Decoder, Task
from common.weights import Layout, Weights, flatten, layout_of
from server.aggregation import Spooled, fault, group_weights, outliers, spool, step, weighted_sum

TASKS = {"covid": Task(), "source": Task(kind="multiclass", classes=["a", "b"])}
MODEL = make_model(Backbone(), TASKS, 1)
LAYOUT: Layout = layout_of(MODEL)
START: Weights = flatten(MODEL, LAYOUT)
CENTRES = ["north", "east", "south"]


def contribution(centre: str, seed: int, counter: int = 7) -> Contribution:
    delta = np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)
    return Contribution(centre, delta, np.full(LAYOUT.integer_size, counter, np.int64), 10, 5, {}, 0.1)


def spooled(folder: Path, *seeds: int) -> list[Spooled]:
    return [spool(contribution(c, s, 7 + s), LAYOUT, folder) for c, s in zip(CENTRES, seeds, strict=False)]


def counts(**cells: list[list[float]]) -> dict[str, dict[str, list[float]]]:
    """{centre: {"covid": [neg, pos, unlabelled], "source": [a, b, unlabelled]}}"""
    return {c: {"covid": two[0], "source": two[1]} for c, two in cells.items()}


def test_fedavg_is_the_textbook_sum(tmp_path: Path) -> None:
    """tau = 0 equals FedAvg to 1e-6: every tensor by n_c / n, computed tensor by tensor in float64."""
    held = counts(north=[[60, 40, 0], [100, 0, 0]], east=[[10, 10, 0], [0, 20, 0]], south=[[5, 0, 0], [0, 5, 0]])
    weights = group_weights(held, Aggregation(tau=0.0, count="scans"), TASKS)
    after = step(START, weighted_sum(spooled(tmp_path, 1, 2, 3), weights, LAYOUT), [], Aggregation(), LAYOUT, {})
    n = np.array([100, 20, 5]) / 125
    deltas = np.stack([contribution("", s).delta.astype(np.float64) for s in (1, 2, 3)])
    np.testing.assert_allclose(after.floats, START.floats + n @ deltas, atol=1e-6)


def test_heads_go_by_their_own_labels(tmp_path: Path) -> None:
    held = counts(north=[[50, 50, 0], [0, 0, 100]], east=[[0, 0, 40], [20, 20, 0]])
    weights = group_weights(held, Aggregation(tau=1.0), TASKS)
    assert weights["covid"] == {"north": pytest.approx(1), "east": pytest.approx(0)}  # east has no covid labels
    assert weights["source"] == {"north": pytest.approx(0), "east": pytest.approx(1)}
    both = sum(t.weight for t in TASKS.values())
    assert weights["backbone"] == {
        c: pytest.approx(TASKS[t].weight / both) for c, t in (("north", "covid"), ("east", "source"))
    }  # as in the loss
    update = weighted_sum(spooled(tmp_path, 1, 2), weights, LAYOUT)
    for entry in LAYOUT.floats:
        if entry.group == "covid":
            np.testing.assert_allclose(update[entry.where], contribution("", 1).delta[entry.where], rtol=1e-6)


def test_a_head_nobody_labels_does_not_move(tmp_path: Path) -> None:
    held = counts(north=[[5, 5, 0], [0, 0, 10]], east=[[5, 5, 0], [0, 0, 10]])
    update = weighted_sum(spooled(tmp_path, 1, 2), group_weights(held, Aggregation(), TASKS), LAYOUT)
    for entry in LAYOUT.floats:
        assert (update[entry.where] == 0).all() == (entry.group == "source")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([0, 1, 2]))
def test_order_of_arrival_changes_no_bit(tmp_path: Path, order: list[int]) -> None:
    arrived = spooled(tmp_path, 1, 2, 3)
    weights = {g: {"north": 0.5, "east": 0.3, "south": 0.2} for g in LAYOUT.groups()}
    np.testing.assert_array_equal(weighted_sum([arrived[i] for i in order], weights, LAYOUT), weighted_sum(arrived, weights, LAYOUT))


def test_counters_keep_their_type_and_take_the_largest(tmp_path: Path) -> None:
    arrived = [spool(contribution("north", 1, 2**40 + 1), LAYOUT, tmp_path), spool(contribution("east", 2, 3), LAYOUT, tmp_path)]
    after = step(START, np.zeros(LAYOUT.size, np.float32), arrived, Aggregation(), LAYOUT, {})
    assert after.integers.dtype == np.int64
    assert (after.integers == 2**40 + 1).all()


@pytest.mark.parametrize("method", ["fedadam", "fedyogi"])
def test_server_optimisers_follow_the_paper(method: str) -> None:
    """Reddi et al. 2021, algorithm 2, written out for two rounds; batch-norm statistics are averaged as they are."""
    chosen = Aggregation(method=method, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)  # type: ignore[arg-type]
    updates = [contribution("", s).delta for s in (4, 5)]
    state: dict[str, np.ndarray] = {}
    weights = START
    m, v = np.zeros(LAYOUT.size), np.full(LAYOUT.size, 1e-6)
    x = START.floats.astype(np.float64)
    parameters = LAYOUT.parameters()
    for update in updates:
        weights = step(weights, update.copy(), [], chosen, LAYOUT, state)
        d = update.astype(np.float64)
        m = 0.9 * m + 0.1 * d
        v = 0.99 * v + 0.01 * d**2 if method == "fedadam" else v - 0.01 * d**2 * np.sign(v - d**2)
        x = x + np.where(parameters, 0.1 * m / (np.sqrt(v) + 1e-3), d)
    np.testing.assert_allclose(weights.floats, x, rtol=2e-4, atol=2e-4)


def test_faults_and_outliers() -> None:
    good = contribution("north", 1)
    assert fault(good, LAYOUT, False) == ""
    bad = contribution("north", 1)
    bad.delta[17] = np.nan
    assert fault(bad, LAYOUT, False) == "not finite"
    bad.delta = bad.delta[:-1]
    assert "wrong shape" in fault(bad, LAYOUT, False)
    assert "wrong shape" in fault(good, LAYOUT, True)  # nothing should come when all is personal
    assert outliers({"a": 1.0, "b": 1.2, "c": 50.0}, 10).keys() == {"c"}
    assert outliers({"a": 1.0, "b": 1.2, "c": 5.0}, 10) == {}
    assert outliers({"a": 1.0}, 10) == outliers({"a": 1.0, "b": 50.0}, 10) == {}  # of two nobody can say which is odd


def test_norm_leaves_batch_norm_statistics_out(tmp_path: Path) -> None:
    one = contribution("north", 1)
    one.delta[~LAYOUT.parameters()] = 1e6
    norm = spool(one, LAYOUT, tmp_path).norm
    assert norm == pytest.approx(np.linalg.norm(one.delta[LAYOUT.parameters()].astype(np.float64)))


# --- what tasks share -------------------------------------------------------------------------------------------------------------------

MAPS = {
    "finding": Task(kind="multiclass", classes=["a", "b"], weight=2.0),
    "infection": Task(kind="segmentation", weight=1.0),
    "covid": Task(reads="map", weight=0.5),
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
    weights = group_weights(counts, Aggregation(tau=tau, count=count), MAPS)  # type: ignore[arg-type]
    labelled = {t: {c: sum(counts[c][t][:-1]) for c in CENTRES} for t in MAPS}
    for group, tasks in {"backbone": list(MAPS), "decoder": ["infection", "covid"], **{t: [t] for t in MAPS}}.items():
        told = {t: MAPS[t].weight for t in tasks if sum(labelled[t].values())}
        assert sum(weights[group].values()) == pytest.approx(1 if told else 0)
        for c in CENTRES:
            if not any(labelled[t][c] for t in tasks):
                assert weights[group][c] == 0  # it does not dilute what it has no labels for
            mixed = sum(w * weights[t][c] for t, w in told.items()) / (sum(told.values()) or 1)
            assert weights[group][c] == pytest.approx(mixed)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_tau_0_by_scans_is_fedavg_where_everything_is_labelled(sizes: list[int], shares: list[float]) -> None:
    """Every group has FedAvg's n_c / n, however a centre's scans fall into classes."""
    counts = {}
    for c, n, share in zip(CENTRES, sizes, shares, strict=True):
        first = float(round(n * share))
        counts[c] = {"finding": [first, n - first, 0.0], "infection": [float(n), 0.0], "covid": [n - first, first, 0.0]}
    weights = group_weights(counts, Aggregation(tau=0.0, count="scans"), MAPS)
    assert weights.keys() == {"backbone", "decoder", *MAPS}
    for own in weights.values():
        assert own == {c: pytest.approx(n / sum(sizes)) for c, n in zip(CENTRES, sizes, strict=True)}


def test_a_centre_without_masks_moves_no_weight_of_the_decoder(tmp_path: Path) -> None:
    model = make_model(Backbone(decoder=Decoder([16, 8, 8, 8, 4])), {t: MAPS[t] for t in ("finding", "infection")}, 1)
    layout = layout_of(model)
    counts = {
        "north": {"finding": [9.0, 9.0, 0.0], "infection": [18.0, 0.0]},
        "east": {"finding": [40.0, 50.0, 0.0], "infection": [0.0, 90.0]},
    }
    weights = group_weights(counts, Aggregation(), {t: MAPS[t] for t in ("finding", "infection")})
    deltas = {c: np.random.default_rng(k).normal(size=layout.size).astype(np.float32) for k, c in enumerate(counts)}
    none = np.zeros(layout.integer_size, np.int64)
    arrived = [spool(Contribution(c, delta, none, 1, 1, {}, 0.0), layout, tmp_path) for c, delta in deltas.items()]
    update = weighted_sum(arrived, weights, layout)
    alone = [e for e in layout.floats if e.group in ("decoder", "infection")]
    assert {e.group for e in alone} == {"decoder", "infection"}
    for e in alone:
        np.testing.assert_allclose(update[e.where], deltas["north"][e.where], rtol=1e-6)
    for e in layout.floats:  # both find: half of each; only north draws, which counts a third of the loss
        if e.group == "backbone":
            mixed = (2 / 3 * 0.5 + 1 / 3) * deltas["north"][e.where] + 2 / 3 * 0.5 * deltas["east"][e.where]
            np.testing.assert_allclose(update[e.where], mixed, rtol=1e-4, atol=1e-6)
