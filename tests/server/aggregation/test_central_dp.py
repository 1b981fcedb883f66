"""Noise at the coordinator: what is clipped, how much noise, what it costs, and a run that a crash does not make cheaper."""

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
from server.aggregation import central_dp
from server.aggregation.central_dp import (
    COUNT_NOISE_RATIO,
    adapt_clip,
    noisy_weighted_sum,
    record_spent,
    sum_noise_multiplier,
)
from server.aggregation.contributions import StoredUpdate, store_update
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
STILL = [e.span for e in LAYOUT.floats if not e.is_parameter]
DELTA = 1e-5


def arrived(folder: Path, deltas: list[np.ndarray]) -> list[StoredUpdate]:
    none = np.empty(0, np.int64)
    return [
        store_update(TrainReply(c, d.astype(np.float32), none, 1, 1, {}, 0.0), LAYOUT, folder)
        for c, d in zip(CENTRES, deltas, strict=True)
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    st.floats(0.1, 10),
)
def test_one_centre_moves_the_sum_by_the_clip_times_the_largest_weight_at_most(
    tmp_path: Path, sizes: list[float], shares: list[float], clip: float
) -> None:
    """What the accountant assumes: any contribution against none, whatever the others sent and however the groups weigh."""
    rng = np.random.default_rng(len(sizes))
    deltas = [s * rng.normal(size=LAYOUT.size) for s in sizes]
    weights = {
        "backbone": dict(zip(CENTRES, shares[:3], strict=True)),
        "covid": dict(zip(CENTRES, shares[3:], strict=True)),
    }
    whole = noisy_weighted_sum(arrived(tmp_path, deltas), weights, LAYOUT, clip, 0.0, STILL)
    for i in range(3):
        without = [0 * d if i == j else d for j, d in enumerate(deltas)]
        moved = whole.astype(np.float64) - noisy_weighted_sum(
            arrived(tmp_path, without), weights, LAYOUT, clip, 0.0, STILL
        )
        assert np.linalg.norm(moved) <= clip * max(shares) * (1 + 1e-5) + 1e-6 * np.linalg.norm(whole)
    small = clip / (3 * max(np.linalg.norm(d) for d in deltas))  # nobody is clipped: the plain weighted sum
    plain = noisy_weighted_sum(
        arrived(tmp_path, [small * d for d in deltas]), weights, LAYOUT, clip, 0.0, STILL
    )
    np.testing.assert_allclose(
        plain[:SIZE],
        sum(s * small * d for s, d in zip(shares, deltas, strict=False))[:SIZE],
        atol=1e-5 * clip,
    )


def test_the_noise_is_on_all_that_moves_and_nowhere_else(tmp_path: Path) -> None:
    weights = {
        "backbone": {"a": 0.5, "b": 0.3, "c": 0.2},
        "covid": {"a": 0.1, "b": 0.9, "c": 0.0},
        "source": {"a": 0.0, "b": 0.0, "c": 0.0},
    }
    found = noisy_weighted_sum(
        arrived(tmp_path, [np.zeros(LAYOUT.size)] * 3), weights, LAYOUT, 2.0, 1.5, STILL
    )
    parameters = np.concatenate([found[:SIZE], found[SIZE + 8 : SIZE + 58]])
    assert parameters.std() == pytest.approx(1.5 * 2.0 * 0.9, rel=0.05)  # the largest weight of any group
    assert (found[SIZE : SIZE + 8] == 0).all()
    assert (found[SIZE + 58 :] == 0).all()


def test_epsilon_is_the_textbooks_and_survives_a_crash(tmp_path: Path) -> None:
    """k rounds of Gaussian noise sigma are one of sigma / sqrt(k) (Dong et al. 2022), whose epsilon Balle & Wang (ICML 2018, theorem 8) give."""
    spent = [record_spent(tmp_path / "privacy.json", 4.0, DELTA) for _ in range(3)]
    assert spent == sorted(spent)
    assert len(json.loads((tmp_path / "privacy.json").read_text())["noise"]) == 3
    accounting = pytest.importorskip("dp_accounting", reason="pip install -e .[dev]")
    theirs = accounting.get_epsilon_gaussian(4.0 / math.sqrt(3), DELTA)
    assert theirs <= spent[-1] <= 1.01 * theirs
    config = compose_config(["privacy=central", "stage.rounds=10"])
    noise = central_dp.round_noise_multiplier(config)
    assert accounting.get_epsilon_gaussian(noise / math.sqrt(10), DELTA) == pytest.approx(8, rel=0.05)


def test_the_count_within_the_clip_is_paid_for() -> None:
    """Andrew et al., theorem 1: the noise on the sum and on the count (sensitivity 1/2) together are the round's noise multiplier."""
    config = compose_config(["privacy=central", "privacy.adaptive_clip_quantile=0.5"])
    of_sum, of_count = (
        sum_noise_multiplier(1.3, config),
        1.3 * COUNT_NOISE_RATIO,
    )  # the count's multiplier: its spread over its sensitivity of a half
    assert pytest.approx(1 / of_sum**2 + 1 / of_count**2) == 1 / 1.3**2
    assert sum_noise_multiplier(1.3, compose_config(["privacy=central"])) == 1.3


def test_the_clip_finds_the_quantile() -> None:
    rng, clip = np.random.default_rng(1), 0.01
    for _ in range(300):
        clip = adapt_clip(clip, list(rng.lognormal(1.0, 0.5, 200)), 0.8, 1.0)
    assert clip == pytest.approx(np.exp(1.0 + 0.5 * 0.8416), rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["aggregation.robust_rule=median"], "aggregation.robust_rule=median is no sum"),
        (["federation.mode=local"], "federation.mode=local has no contributions of several centres"),
        (["tasks.source.head_update=moments"], "task 'source' is made from sums of features"),
        (["stage.local_layers=[batch_norm]"], "keeps weights at the centres"),
        (
            ["evaluation.cross_site=last"],
            "evaluation.cross_site=last shows each centre's own model to the others",
        ),
        (["privacy.adaptive_clip_quantile=1"], "privacy.adaptive_clip_quantile is 1.0"),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(["privacy=central", *overrides])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_reports_what_it_cost_and_a_resumed_one_pays_for_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = [
        "privacy=central",
        "privacy.epsilon=20",
        "privacy.adaptive_clip_quantile=0.5",
        "stage.rounds=2",
        "stage.tasks=[covid]",
    ]
    config, ledger = phantom_config(tmp_path / "data", *settings_), open_ledger(tmp_path)
    from server.rounds import coordinator

    true, asked = coordinator.evaluate_validation, []

    def killed(*args: object, **more: object) -> object:
        asked.append(1)
        if len(asked) == 2:  # after round 1's weights were made, and before they were kept
            raise KeyboardInterrupt
        return true(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(coordinator, "evaluate_validation", killed)
    with pytest.raises(KeyboardInterrupt):
        start_run(config, InProcess(sites()), tmp_path, ledger, "r")
    result = resume_run("r", InProcess(sites()), tmp_path, ledger)
    assert len(json.loads((tmp_path / "r" / "privacy.json").read_text())["noise"]) == 3
    rows = [row for row in ledger.read_contributions("r") if row["accepted"]]
    assert (
        {row["epsilon"] for row in rows if row["round"] == 2}.pop()
        > {row["epsilon"] for row in rows if row["round"] == 1}.pop()
        > 0
    )
    assert result["clip"] != config.privacy.clip_norm
    assert "Centres&#39; privacy loss" in (tmp_path / "r" / "report.html").read_text()
