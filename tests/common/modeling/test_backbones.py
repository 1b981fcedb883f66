"""Every backbone of the papers and this project builds, gives its levels, and trains with a decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.config.schema import BackboneConfig, DecoderConfig, Task
from common.learning.losses import compute_stage_loss
from common.modeling.backbones import PAPER_BACKBONES, PROGNOSIS_BACKBONES, TRANSFER_BACKBONES
from common.modeling.model import make_model

NAMES = sorted({*PAPER_BACKBONES.values(), "residual_unet", "mobilenetv1_075"})


def test_lists_of_the_papers_are_complete() -> None:
    assert len(PROGNOSIS_BACKBONES) == len(set(PROGNOSIS_BACKBONES.values())) == 18
    assert len(TRANSFER_BACKBONES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_backbone_takes_a_training_step_with_a_decoder(name: str) -> None:
    tasks = {"severe": Task(hidden_dims=[8]), "lesion": Task(type="segmentation")}
    backbone = BackboneConfig(name=name, decoder=DecoderConfig(channels=[16, 8]))
    model = make_model(backbone, tasks, 1, channels_last=True)
    image_size = 75 if name == "inception_v3" else 64  # the smallest that Inception accepts
    slices = torch.rand(2, 1, image_size, image_size, generator=torch.Generator().manual_seed(0))
    head_inputs: list[Tensor] = []
    model.heads["severe"].register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
    outputs = model.train()(slices)
    with torch.no_grad():  # features by way of the levels equal those of the plain forward pass
        features = model.extract_features(slices)
        torch.testing.assert_close(head_inputs[0], features, rtol=1e-3, atol=1e-4)
    assert outputs["lesion"].shape == slices.shape
    targets = {"severe": torch.tensor([0.0, 1.0]), "lesion": (slices > 0.7).to(torch.uint8)}
    loss = compute_stage_loss(tasks, outputs, targets, {}).total
    loss.backward()
    assert torch.isfinite(loss)
    first_convolution = next(p for p in model.encoder.parameters() if p.ndim == 4)
    decoder_weight = model.decoder.ups[0].project.weight  # type: ignore[union-attr]
    head_weight = model.heads["severe"][1].weight  # type: ignore[index]
    for parameter in (first_convolution, decoder_weight, head_weight):
        before = parameter.detach().clone()
        torch.optim.SGD([parameter], lr=0.1).step()
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, before)
