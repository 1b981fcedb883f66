"""The decoder: sizes, both kinds of skip connection, group norm, and that it can learn a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config.schema import BackboneConfig, DecoderConfig, Task
from common.learning.losses import compute_stage_loss
from common.modeling.decoder import Decoder, make_decoder
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError

LESION = {"lesion": Task(type="segmentation")}


@pytest.mark.parametrize("skip_connection", ["concat", "add"])
@pytest.mark.parametrize("name", ["test_resnet", "residual_unet"])
@pytest.mark.parametrize("size", [(100, 100), (33, 47), (16, 16)])
def test_feature_map_is_as_large_as_the_image(name: str, skip_connection: str, size: tuple[int, int]) -> None:
    decoder = DecoderConfig(channels=[24, 16, 12], skip_connection=skip_connection)  # type: ignore[arg-type]
    model = make_model(BackboneConfig(name=name, decoder=decoder), LESION, 1).eval()
    with torch.no_grad():
        feature_map = model.compute_head_inputs(torch.rand(1, 2, *size), {"map"})["map"]
        assert model(torch.rand(1, 2, *size))["lesion"].shape == (1, 2, *size)
    channels = 8 if (name, skip_connection) == ("residual_unet", "add") else 12
    assert feature_map.shape == (1, 2, channels, *size)


def test_step_widths_count_from_the_deepest() -> None:
    def step_widths(skip_connection: str, reductions: list[int]) -> list[int]:
        settings = DecoderConfig(channels=[50, 40, 30], skip_connection=skip_connection)  # type: ignore[arg-type]
        decoder = Decoder([8, 16, 32, 64], reductions, settings)
        return [step.out_channels for step in decoder.ups]  # type: ignore[union-attr, misc]

    assert step_widths("concat", [1, 2, 4, 8]) == [50, 40, 30]
    assert step_widths("concat", [2, 4, 8, 16]) == [50, 50, 40, 30]  # one more step, without a level to merge
    assert step_widths("add", [1, 2, 4, 8]) == [32, 16, 8]
    assert step_widths("add", [2, 4, 8, 16]) == [32, 16, 8, 30]
    shallow_decoder = Decoder([8, 16], [1, 2], DecoderConfig(channels=[50, 40, 30]))
    assert shallow_decoder.out_channels == 30


def test_step_equals_the_papers_definition() -> None:
    """Concat: two convolutions of [up, skip]. Add: relu(y + f(y)) of y = up + skip."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 8, 9, 7, generator=generator), torch.randn(2, 12, 5, 4, generator=generator)]
    concat = Decoder([8, 12], [1, 2], DecoderConfig(channels=[6])).eval()
    add = Decoder([8, 12], [1, 2], DecoderConfig(channels=[6], skip_connection="add")).eval()

    upsampled = F.interpolate(levels[1], size=(9, 7), mode="bilinear")
    step = concat.ups[0]
    merged = torch.cat([step.project(upsampled), levels[0]], 1)  # type: ignore[operator, union-attr]
    expected = step.block(merged)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(concat(levels, (9, 7)), expected, rtol=1e-4, atol=1e-5)

    step = add.ups[0]
    block = step.block  # type: ignore[union-attr]
    y = step.project(upsampled) + levels[0]  # type: ignore[operator, union-attr]
    hidden = F.relu(block.norm1(F.conv2d(y, block.conv1.weight, padding=1)))  # type: ignore[operator, union-attr]
    f = block.norm2(F.conv2d(hidden, block.conv2.weight, padding=1))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(add(levels, (9, 7)), F.relu(y + f), rtol=1e-4, atol=1e-5)


def test_group_norm_replaces_batch_norm_in_the_decoder() -> None:
    decoder = DecoderConfig(skip_connection="add")
    model = make_model(BackboneConfig(name="residual_unet", norm="group", decoder=decoder), LESION, 1)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert torch.isfinite(model.train()(torch.rand(1, 1, 40, 40))["lesion"]).all()


@pytest.mark.parametrize(("name", "skip_connection"), [("test_resnet", "concat"), ("residual_unet", "add")])
def test_model_learns_the_mask_of_one_image(name: str, skip_connection: str) -> None:
    decoder = DecoderConfig(channels=[32, 16, 8], skip_connection=skip_connection)  # type: ignore[arg-type]
    model = make_model(BackboneConfig(name=name, decoder=decoder), LESION, 1)
    slices = 0.2 * torch.rand(1, 2, 34, 34, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 2, 34, 34, dtype=torch.uint8)
    mask[0, 0, 6:18, 10:30] = 1
    mask[0, 1, 20:32, 5:12] = 1
    slices = slices + 0.1 * mask
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        compute_stage_loss(LESION, model(slices), {"lesion": mask}, {}).total.backward()
        optimiser.step()
    predicted = model(slices)["lesion"] > 0
    dice = 2 * (predicted & (mask == 1)).sum() / (predicted.sum() + mask.sum())
    assert dice > 0.9


def test_encoder_without_levels_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"backbone.name 'flat' has no forward_intermediates"):
        make_decoder(nn.Flatten(), "flat", DecoderConfig())
