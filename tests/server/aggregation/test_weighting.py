"""The centres' weights in the parameter groups, and the laws that they keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.schema import AggregationConfig, BackboneConfig, DecoderConfig, Task
from common.modeling.model import make_model
from common.modeling.parameters import build_layout
from common.protocol.messages import TrainReply
from server.aggregation.stored_updates import store_update
from server.aggregation.weighted_mean import weighted_sum
from server.aggregation.weighting import compute_group_weights
from tests.server.aggregation.updates import CENTRES, LAYOUT, TASKS, make_reply, store_random_updates

MAP_TASKS = {
    "finding": Task(type="multiclass", classes=["a", "b"], loss_weight=2.0),
    "infection": Task(type="segmentation", loss_weight=1.0),
    "covid": Task(head_input="map", loss_weight=0.5),
}
NUM_CELLS = {"finding": 2, "infection": 1, "covid": 2}
SCANS = st.integers(0, 500)
Counts = dict[str, dict[str, list[float]]]


@st.composite
def label_counts(draw: st.DrawFn) -> Counts:
    """Draw what three centres have for each task of MAP_TASKS; the unlabelled scans come last."""
    return {
        centre: {task: [float(draw(SCANS)) for _ in range(cells + 1)] for task, cells in NUM_CELLS.items()}
        for centre in CENTRES
    }


def test_a_head_is_weighted_by_the_labels_of_its_task(tmp_path: Path) -> None:
    counts = {
        "north": {"covid": [50, 50, 0], "source": [0, 0, 100]},
        "east": {"covid": [0, 0, 40], "source": [20, 20, 0]},
    }
    weights = compute_group_weights(counts, AggregationConfig(tau=1.0), TASKS)
    assert weights["covid"] == {"north": pytest.approx(1), "east": pytest.approx(0)}
    assert weights["source"] == {"north": pytest.approx(0), "east": pytest.approx(1)}
    total_loss_weight = sum(task.loss_weight for task in TASKS.values())
    assert weights["backbone"] == {  # as in the loss
        "north": pytest.approx(TASKS["covid"].loss_weight / total_loss_weight),
        "east": pytest.approx(TASKS["source"].loss_weight / total_loss_weight),
    }
    update = weighted_sum(store_random_updates(tmp_path, 1, 2), weights, LAYOUT)
    north_delta = make_reply("", 1).delta
    for slot in LAYOUT.floats:
        if slot.group == "covid":
            np.testing.assert_allclose(update[slot.span], north_delta[slot.span], rtol=1e-6)


@settings(deadline=None)
@given(label_counts(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["cells", "scans"]))
def test_shared_groups_are_weighted_by_the_tasks_that_share_them(
    counts: Counts, tau: float, weight_by: str
) -> None:
    """The decoder by the tasks that read its map, the backbone by all, each as in the loss.

    A task without any label counts nothing.
    """
    config = AggregationConfig(tau=tau, weight_by=weight_by)  # type: ignore[arg-type]
    weights = compute_group_weights(counts, config, MAP_TASKS)
    labelled = {task: {c: sum(counts[c][task][:-1]) for c in CENTRES} for task in MAP_TASKS}
    tasks_by_group = {"backbone": list(MAP_TASKS), "decoder": ["infection", "covid"]}
    tasks_by_group |= {task: [task] for task in MAP_TASKS}
    for group, tasks in tasks_by_group.items():
        loss_weights = {task: MAP_TASKS[task].loss_weight for task in tasks if sum(labelled[task].values())}
        assert sum(weights[group].values()) == pytest.approx(1 if loss_weights else 0)
        for centre in CENTRES:
            if not any(labelled[task][centre] for task in tasks):
                assert weights[group][centre] == 0  # it does not dilute what it has no labels for
            weighted = sum(w * weights[task][centre] for task, w in loss_weights.items())
            assert weights[group][centre] == pytest.approx(weighted / (sum(loss_weights.values()) or 1))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10_000), min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_tau_0_by_scans_is_fedavg_where_everything_is_labelled(
    sizes: list[int], fractions: list[float]
) -> None:
    """Every group has FedAvg's n_c / n, however a centre's scans are divided into classes."""
    counts = {}
    for centre, size, fraction in zip(CENTRES, sizes, fractions, strict=True):
        first = float(round(size * fraction))
        counts[centre] = {
            "finding": [first, size - first, 0.0],
            "infection": [float(size), 0.0],
            "covid": [size - first, first, 0.0],
        }
    weights = compute_group_weights(counts, AggregationConfig(tau=0.0, weight_by="scans"), MAP_TASKS)
    assert weights.keys() == {"backbone", "decoder", *MAP_TASKS}
    expected = {c: pytest.approx(size / sum(sizes)) for c, size in zip(CENTRES, sizes, strict=True)}
    for centre_weights in weights.values():
        assert centre_weights == expected


def test_a_centre_without_masks_does_not_move_the_decoder(tmp_path: Path) -> None:
    tasks = {task: MAP_TASKS[task] for task in ("finding", "infection")}
    layout = build_layout(make_model(BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4])), tasks, 1))
    counts = {
        "north": {"finding": [9.0, 9.0, 0.0], "infection": [18.0, 0.0]},
        "east": {"finding": [40.0, 50.0, 0.0], "infection": [0.0, 90.0]},
    }
    weights = compute_group_weights(counts, AggregationConfig(), tasks)
    deltas = {
        centre: np.random.default_rng(k).normal(size=layout.size).astype(np.float32)
        for k, centre in enumerate(counts)
    }
    int_buffers = np.zeros(layout.int_buffer_size, np.int64)
    updates = [
        store_update(TrainReply(centre, delta, int_buffers, 1, 1, {}, 0.0), layout, tmp_path)
        for centre, delta in deltas.items()
    ]
    update = weighted_sum(updates, weights, layout)
    segmentation_slots = [slot for slot in layout.floats if slot.group in ("decoder", "infection")]
    assert {slot.group for slot in segmentation_slots} == {"decoder", "infection"}
    for slot in segmentation_slots:
        np.testing.assert_allclose(update[slot.span], deltas["north"][slot.span], rtol=1e-6)
    # Both centres have findings, a half each; only north has masks, whose task counts a third of the loss.
    for slot in layout.floats:
        if slot.group == "backbone":
            north = (2 / 3 * 0.5 + 1 / 3) * deltas["north"][slot.span]
            east = 2 / 3 * 0.5 * deltas["east"][slot.span]
            np.testing.assert_allclose(update[slot.span], north + east, rtol=1e-4, atol=1e-6)
