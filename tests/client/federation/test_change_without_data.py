"""What a round changes without data is known to everybody, and computed as training does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.federation.change_without_data import compute_change_without_data
from client.federation.local_round import train_local_round
from client.federation.run_context import RunContext
from client.site.policy import Policy
from common.modeling.model import parameter_layout
from tests.client.hospital import hospital as hospital
from tests.client.hospital import make_config, make_site, train_request

DECAY = ["stage.tasks=[covid]", "stage.optimiser.weight_decay=0.5", "stage.optimiser.schedule=constant"]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_change_without_data_is_what_training_does_without_gradients(
    hospital: Path, tmp_path: Path, optimiser: str
) -> None:
    """A head that sends no gradient into the backbone leaves it to the weight decay."""
    config = make_config(*DECAY, "tasks.covid.grad_scale=0", f"stage.optimiser.name={optimiser}")
    layout = parameter_layout(config)
    request = train_request(config)
    context = RunContext(make_site(hospital, state=str(tmp_path)), config, Policy(), "run")
    reply = train_local_round(context, request)
    known_change = compute_change_without_data(context, request, reply.steps)
    assert known_change is not None
    num_moved = 0
    for slot in layout.parameter_slots:
        if slot.group == "backbone":
            np.testing.assert_allclose(known_change[slot.span], reply.delta[slot.span], rtol=1e-4, atol=1e-9)
            num_moved += int(np.count_nonzero(known_change[slot.span]))
    assert num_moved > 100_000
    learns = make_config(*DECAY, f"stage.optimiser.name={optimiser}")
    delta = train_local_round(replace(context, config=learns), train_request(learns)).delta
    backbone = layout.group_slices()["backbone"][0]
    assert np.linalg.norm((delta - known_change)[backbone]) > 0.1 * np.linalg.norm(known_change[backbone])


def test_nothing_is_known_without_weight_decay_or_with_noise(hospital: Path, tmp_path: Path) -> None:
    context = RunContext(make_site(hospital, state=str(tmp_path)), make_config(), Policy(), "run")
    for overrides in (["stage.optimiser.weight_decay=0"], ["privacy=patient", "privacy.epsilon=8"]):
        config = make_config(*overrides)
        own = replace(context, config=config)
        assert compute_change_without_data(own, train_request(config), 3) is None
