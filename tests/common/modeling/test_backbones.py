"""Every backbone of the papers, and our own: builds, shows its levels, takes a training step with a decoder on top."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.config.schema import BackboneConfig, DecoderConfig, Task
from common.learning.losses import compute_stage_loss
from common.modeling.backbones import PAPER_BACKBONES, PROGNOSIS_BACKBONES, TRANSFER_BACKBONES
from common.modeling.model import make_model

NAMES = sorted({*PAPER_BACKBONES.values(), "residual_unet", "mobilenetv1_075"})


def test_the_papers_lists_are_whole() -> None:
    assert len(PROGNOSIS_BACKBONES) == len(set(PROGNOSIS_BACKBONES.values())) == 18
    assert len(TRANSFER_BACKBONES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_takes_a_step(name: str) -> None:
    tasks = {"severe": Task(hidden_dims=[8]), "lesion": Task(type="segmentation")}
    model = make_model(
        BackboneConfig(name=name, decoder=DecoderConfig(channels=[16, 8])), tasks, 1, channels_last=True
    )
    side = 75 if name == "inception_v3" else 64  # 75 is the least that Inception takes
    x = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    read: list[Tensor] = []
    model.heads["severe"].register_forward_pre_hook(lambda _, given: read.append(given[0]))
    out = model.train()(x)
    with torch.no_grad():  # the way through the levels gives the features of the plain one
        torch.testing.assert_close(read[0], model.extract_features(x), rtol=1e-3, atol=1e-4)
    assert out["lesion"].shape == x.shape
    loss = compute_stage_loss(
        tasks, out, {"severe": torch.tensor([0.0, 1.0]), "lesion": (x > 0.7).to(torch.uint8)}, {}
    ).total
    loss.backward()
    assert torch.isfinite(loss)
    first = next(p for p in model.encoder.parameters() if p.ndim == 4)
    for p in (first, model.decoder.ups[0].project.weight, model.heads["severe"][1].weight):  # type: ignore[union-attr, index]
        before = p.detach().clone()
        torch.optim.SGD([p], lr=0.1).step()
        assert torch.isfinite(p).all()
        assert not torch.equal(p, before)
