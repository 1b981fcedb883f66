"""Central differential privacy: clipping, noise, cost, and the cost of a round that a crash interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.compose import compose_config
from common.modeling.parameters import Layout, TensorSlot
from common.protocol.messages import TrainReply
from common.utils.errors import ConsiliumError
from server.aggregation.central_dp import (
    COUNT_NOISE_RATIO,
    adapt_clip_norm,
    noisy_weighted_sum,
    record_spent,
    round_noise_multiplier,
    sum_noise_multiplier,
)
from server.aggregation.stored_updates import store_update
from server.rounds import coordinator
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

SIZE = 4000
LAYOUT = Layout(
    [
        TensorSlot("w", (SIZE,), 0, SIZE, "backbone", True, False),
        TensorSlot("running_mean", (8,), SIZE, SIZE + 8, "backbone", False, True),
        TensorSlot("h", (50,), SIZE + 8, SIZE + 58, "covid", True, False),
        TensorSlot("idle", (50,), SIZE + 58, SIZE + 108, "source", True, False),
    ]
)
CENTRES = ["a", "b", "c"]
FROZEN = [slot.span for slot in LAYOUT.floats if not slot.is_parameter]
DELTA = 1e-5


def sum_deltas(
    folder: Path,
    deltas: list[np.ndarray],
    weights: dict[str, dict[str, float]],
    clip_norm: float,
    noise_multiplier: float = 0.0,
) -> np.ndarray:
    int_buffers = np.empty(0, np.int64)
    updates = [
        store_update(TrainReply(c, delta.astype(np.float32), int_buffers, 1, 1, {}, 0.0), LAYOUT, folder)
        for c, delta in zip(CENTRES, deltas, strict=True)
    ]
    return noisy_weighted_sum(
        updates, weights, LAYOUT, clip_norm=clip_norm, noise_multiplier=noise_multiplier, frozen=FROZEN
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    st.floats(0.1, 10),
)
def test_one_centre_moves_the_sum_by_the_clip_norm_times_the_largest_weight_at_most(
    tmp_path: Path, scales: list[float], centre_weights: list[float], clip_norm: float
) -> None:
    """The accountant assumes this: any update against none, whatever the others sent and the groups weigh."""
    rng = np.random.default_rng(len(scales))
    deltas = [scale * rng.normal(size=LAYOUT.size) for scale in scales]
    weights = {
        "backbone": dict(zip(CENTRES, centre_weights[:3], strict=True)),
        "covid": dict(zip(CENTRES, centre_weights[3:], strict=True)),
    }
    total = sum_deltas(tmp_path, deltas, weights, clip_norm)
    for i in range(3):
        without = [0 * delta if i == j else delta for j, delta in enumerate(deltas)]
        moved = total.astype(np.float64) - sum_deltas(tmp_path, without, weights, clip_norm)
        limit = clip_norm * max(centre_weights)
        assert np.linalg.norm(moved) <= limit * (1 + 1e-5) + 1e-6 * np.linalg.norm(total)
    # Updates within the clip norm give the plain weighted sum.
    factor = clip_norm / (3 * max(np.linalg.norm(delta) for delta in deltas))
    small_deltas = [factor * delta for delta in deltas]
    unclipped = sum_deltas(tmp_path, small_deltas, weights, clip_norm)
    expected = sum(w * delta for w, delta in zip(centre_weights, small_deltas, strict=False))
    np.testing.assert_allclose(unclipped[:SIZE], expected[:SIZE], atol=1e-5 * clip_norm)


def test_noise_is_added_to_what_can_move_and_to_nothing_else(tmp_path: Path) -> None:
    weights = {
        "backbone": {"a": 0.5, "b": 0.3, "c": 0.2},
        "covid": {"a": 0.1, "b": 0.9, "c": 0.0},
        "source": {"a": 0.0, "b": 0.0, "c": 0.0},
    }
    update = sum_deltas(tmp_path, [np.zeros(LAYOUT.size)] * 3, weights, 2.0, 1.5)
    parameters = np.concatenate([update[:SIZE], update[SIZE + 8 : SIZE + 58]])
    assert parameters.std() == pytest.approx(1.5 * 2.0 * 0.9, rel=0.08)  # the largest weight of any group
    assert (update[SIZE : SIZE + 8] == 0).all()
    assert (update[SIZE + 58 :] == 0).all()


def test_epsilon_matches_the_gaussian_mechanism_and_counts_every_recorded_round(tmp_path: Path) -> None:
    """k rounds of noise sigma are one of sigma / sqrt(k) (Dong et al. 2022).

    Its epsilon is that of Balle & Wang (ICML 2018, theorem 8).
    """
    spent = [record_spent(tmp_path / "privacy.json", 4.0, DELTA) for _ in range(3)]
    assert spent == sorted(spent)
    assert len(json.loads((tmp_path / "privacy.json").read_text())["noise"]) == 3
    accounting = pytest.importorskip("dp_accounting", reason="pip install -e .[dev]")
    expected = accounting.get_epsilon_gaussian(4.0 / math.sqrt(3), DELTA)
    assert expected <= spent[-1] <= 1.01 * expected
    config = compose_config(["privacy=central", "stage.rounds=10"])
    noise_multiplier = round_noise_multiplier(config)
    epsilon = accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(10), DELTA)
    assert epsilon == pytest.approx(8, rel=0.05)


def test_the_count_of_norms_takes_its_part_of_the_noise() -> None:
    """Andrew et al., theorem 1: the noise on sum and count (sensitivity 1/2) together is the round's."""
    adaptive = compose_config(["privacy=central", "privacy.adaptive_clip_quantile=0.5"])
    sum_multiplier = sum_noise_multiplier(1.3, adaptive)
    count_multiplier = 1.3 * COUNT_NOISE_RATIO
    assert pytest.approx(1 / sum_multiplier**2 + 1 / count_multiplier**2) == 1 / 1.3**2
    assert sum_noise_multiplier(1.3, compose_config(["privacy=central"])) == 1.3


def test_the_adaptive_clip_norm_converges_to_the_quantile() -> None:
    rng = np.random.default_rng(1)
    clip_norm = 0.01
    for _ in range(300):
        clip_norm = adapt_clip_norm(clip_norm, list(rng.lognormal(1.0, 0.5, 200)), 0.8, 1.0)
    assert clip_norm == pytest.approx(np.exp(1.0 + 0.5 * 0.8416), rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["aggregation.robust_rule=median"], "aggregation.robust_rule=median does not sum updates"),
        (["federation.mode=local"], "federation.mode=local has no updates of several centres"),
        (["tasks.source.head_update=moments"], "task 'source' uses sums of features"),
        (["stage.local_layers=[batch_norm]"], "keeps parameters that are not exchanged"),
        (
            ["evaluation.cross_site=last"],
            "evaluation.cross_site=last shows each centre's own model to the others",
        ),
        (["privacy.adaptive_clip_quantile=1"], "privacy.adaptive_clip_quantile is 1.0"),
    ],
)
def test_settings_that_contradict_central_dp_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(["privacy=central", *overrides])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_pays_for_the_round_that_a_crash_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = phantom_config(
        tmp_path / "data",
        "privacy=central",
        "privacy.epsilon=20",
        "privacy.adaptive_clip_quantile=0.5",
        "stage.rounds=2",
        "stage.tasks=[covid]",
    )
    ledger = open_ledger(tmp_path)
    evaluate_validation = coordinator.evaluate_validation
    num_calls = 0

    def crash_in_round_1(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:  # after round 1's weights were made and before they were saved
            raise KeyboardInterrupt
        return evaluate_validation(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(coordinator, "evaluate_validation", crash_in_round_1)
    with pytest.raises(KeyboardInterrupt):
        start_run(config, InProcess(sites()), tmp_path, ledger, "r")
    result = resume_run("r", InProcess(sites()), tmp_path, ledger)
    assert len(json.loads((tmp_path / "r" / "privacy.json").read_text())["noise"]) == 3
    accepted = [row for row in ledger.read_contributions("r") if row["accepted"]]
    (epsilon_1,) = {row["epsilon"] for row in accepted if row["round"] == 1}
    (epsilon_2,) = {row["epsilon"] for row in accepted if row["round"] == 2}
    assert epsilon_2 > epsilon_1 > 0
    assert result.clip_norm != config.privacy.clip_norm
    assert "Centres&#39; privacy loss" in (tmp_path / "r" / "report.html").read_text()
