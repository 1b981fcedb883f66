"""The way up: sizes, both merges, group norm, and that it can learn a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import schema
from common.config.schema import BackboneConfig, Task
from common.learning.losses import compute_stage_loss
from common.modeling.decoder import Decoder, make_decoder
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError

LESION = {"lesion": Task(type="segmentation")}


@pytest.mark.parametrize("merge", ["concat", "add"])
@pytest.mark.parametrize("name", ["test_resnet", "residual_unet"])
@pytest.mark.parametrize("size", [(100, 100), (33, 47), (16, 16)])
def test_the_map_is_as_large_as_the_picture(name: str, merge: str, size: tuple[int, int]) -> None:
    decoder = schema.DecoderConfig(channels=[24, 16, 12], skip_connection=merge)  # type: ignore[arg-type]
    model = make_model(BackboneConfig(name=name, decoder=decoder), LESION, 1).eval()
    with torch.no_grad():
        read = model.compute_head_inputs(torch.rand(1, 2, *size), {"map"})["map"]
        assert model(torch.rand(1, 2, *size))["lesion"].shape == (1, 2, *size)
    assert read.shape == (1, 2, 8 if (name, merge) == ("residual_unet", "add") else 12, *size)


def test_widths_from_the_deepest_up() -> None:
    def widths(merge: str, reductions: list[int]) -> list[int]:
        settings = schema.DecoderConfig(channels=[50, 40, 30], skip_connection=merge)  # type: ignore[arg-type]
        return [up.width for up in Decoder([8, 16, 32, 64], reductions, settings).ups]  # type: ignore[union-attr, misc]

    assert widths("concat", [1, 2, 4, 8]) == [50, 40, 30]
    assert widths("concat", [2, 4, 8, 16]) == [50, 50, 40, 30]  # one more step, without a merge
    assert widths("add", [1, 2, 4, 8]) == [32, 16, 8]
    assert widths("add", [2, 4, 8, 16]) == [32, 16, 8, 30]
    few = Decoder([8, 16], [1, 2], schema.DecoderConfig(channels=[50, 40, 30]))
    assert few.out_channels == 30


def test_a_step_is_what_the_papers_say() -> None:
    """Concat: [up, skip] -> two convolutions. Add: y = up + skip; relu(y + f(y))."""
    draws = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 8, 9, 7, generator=draws), torch.randn(2, 12, 5, 4, generator=draws)]
    concat = Decoder([8, 12], [1, 2], schema.DecoderConfig(channels=[6])).eval()
    add = Decoder([8, 12], [1, 2], schema.DecoderConfig(channels=[6], skip_connection="add")).eval()
    up = concat.ups[0]
    x = up.project(F.interpolate(levels[1], size=(9, 7), mode="bilinear"))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(
        concat(levels, (9, 7)), up.block(torch.cat([x, levels[0]], 1)), rtol=1e-4, atol=1e-5
    )  # type: ignore[operator, union-attr]
    up = add.ups[0]
    y = up.project(F.interpolate(levels[1], size=(9, 7), mode="bilinear")) + levels[0]  # type: ignore[operator, union-attr]
    b = up.block
    f = b.norm2(F.conv2d(F.relu(b.norm1(F.conv2d(y, b.conv1.weight, padding=1))), b.conv2.weight, padding=1))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(add(levels, (9, 7)), F.relu(y + f), rtol=1e-4, atol=1e-5)


def test_group_norm_leaves_no_batch_norm_on_the_way_up() -> None:
    model = make_model(
        BackboneConfig(
            name="residual_unet", norm="group", decoder=schema.DecoderConfig(skip_connection="add")
        ),
        LESION,
        1,
    )
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert torch.isfinite(model.train()(torch.rand(1, 1, 40, 40))["lesion"]).all()


@pytest.mark.parametrize(("name", "merge"), [("test_resnet", "concat"), ("residual_unet", "add")])
def test_one_picture_is_learnt(name: str, merge: str) -> None:
    model = make_model(
        BackboneConfig(name=name, decoder=schema.DecoderConfig(channels=[32, 16, 8], skip_connection=merge)),
        LESION,
        1,
    )  # type: ignore[arg-type]
    x = 0.2 * torch.rand(1, 2, 34, 34, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 2, 34, 34, dtype=torch.uint8)
    mask[0, 0, 6:18, 10:30] = mask[0, 1, 20:32, 5:12] = 1
    x = x + 0.1 * mask
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        compute_stage_loss(LESION, model(x), {"lesion": mask}, {}).total.backward()
        optimiser.step()
    found = model(x)["lesion"] > 0
    dice = 2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum())
    assert dice > 0.9


def test_an_encoder_without_levels_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"backbone.name 'flat' has no forward_intermediates"):
        make_decoder(nn.Flatten(), "flat", schema.DecoderConfig())
