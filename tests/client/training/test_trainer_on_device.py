"""How local training uses a device: precision, memory and compilation do not change what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from client.data.batch import Batch
from client.training.trainer import TrainSpec, train
from common.config.schema import AugmentConfig, BackboneConfig
from common.modeling.model import Model, make_model
from common.utils.errors import ConsiliumError
from tests.client.training.test_trainer import (
    BOTH,
    COVID,
    NAN,
    SGD,
    STAGE,
    batch_of,
    equal,
    model_of,
    some_batches,
    state,
    trained,
)


def test_a_step_whose_gradients_overflow_half_precision_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped steps count for nothing, the anchored head's included, and a batch without labels does no harm.

    fp16's scaler starts too high and halves until the gradients fit. Here with fp32 and a scale that
    overflows even that.
    """
    tasks = {"source": replace(BOTH["source"], head_update="anchored", loss_weight=8.0)}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    stage = replace(STAGE, optimiser=replace(SGD, lr=1e-3))
    model = model_of(tasks)
    seen: list[dict[str, Tensor]] = []
    batches = [batch_of({"source": [NAN, NAN]}), *some_batches(8)]

    def recorded() -> Iterator[Batch]:
        for batch in batches:
            seen.append(state(model))
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
        train(model, recorded(), TrainSpec(stage, tasks, num_steps=9))
    skipped = sum(equal(a, b) for a, b in pairwise(seen))
    assert 2 <= skipped <= 6
    expected = state(trained(tasks, batches[skipped:], stage))
    for name, t in state(model).items():
        torch.testing.assert_close(t, expected[name], rtol=1e-3, atol=1e-5)


def test_checkpointing_and_channels_last_do_not_change_weights() -> None:
    plain = state(trained(COVID, some_batches(1)))
    model = make_model(BackboneConfig(norm="group"), COVID, 1, channels_last=True, grad_checkpointing=True)
    train(model, some_batches(1), TrainSpec(STAGE, COVID))
    for name, t in state(model).items():
        torch.testing.assert_close(t, plain[name], rtol=1e-3, atol=1e-6)


def test_compiling_does_not_change_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as for inductor, whose C++ compiler would take half a minute."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    plain = state(trained(COVID, some_batches(2)))
    compiled = state(trained(COVID, some_batches(2), replace(STAGE, torch_compile=True)))
    assert compiled.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_full_precision(precision: str) -> None:
    full = state(trained(COVID, some_batches(1)))
    half = state(trained(COVID, some_batches(1), replace(STAGE, precision=precision)))  # type: ignore[arg-type]
    assert all(t.dtype == torch.float32 for t in half.values())
    for name in full:
        torch.testing.assert_close(half[name], full[name], rtol=0.05, atol=0.02)
    assert not equal(full, half)


@pytest.mark.parametrize("room", [3, 1])
def test_a_batch_that_does_not_fit_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """On a device that holds `room` scans the step equals that of as many parts, and overflows only once."""
    overflows = []
    forward = Model.forward

    def narrow(self: Model, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        if len(x) > room:
            overflows.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, tasks)

    stage = replace(STAGE, augment=AugmentConfig())
    num_parts = {3: 2, 1: 4}[room]
    expected = state(trained(BOTH, some_batches(3), replace(stage, grad_accum_steps=num_parts), seed=3))
    monkeypatch.setattr(Model, "forward", narrow)
    assert equal(expected, state(trained(BOTH, some_batches(3), stage, seed=3)))
    assert overflows == ([4] if room == 3 else [4, 2])


def test_a_scan_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "forward", full)
    expected = r"^one scan does not fit the device's memory; set stage\.grad_checkpointing=true"
    with pytest.raises(ConsiliumError, match=expected):
        trained(COVID, some_batches(1))
