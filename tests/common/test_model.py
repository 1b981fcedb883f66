"""The model: shapes, pooling, gradient scale, group norm, weights by seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import ConsiliumError
from common.model import make_model
from common.schema import Backbone, Task

TASKS = {"covid": Task(), "source": Task(kind="multiclass", classes=["a", "b", "c"], grad_scale=-2.0)}


def test_shapes_and_pooling_is_the_mean_of_slices() -> None:
    model = make_model(Backbone(), TASKS, 1).eval()
    x = torch.rand(2, 3, 32, 32)
    out = model(x)
    assert out["covid"].shape == (2, 1)
    assert out["source"].shape == (2, 3)
    alone = torch.stack([model.features(x[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(model.features(x), alone.mean(1), rtol=1e-4, atol=1e-5)
    most = make_model(Backbone(pool="max"), TASKS, 1).eval()
    torch.testing.assert_close(most.features(x), alone.amax(1), rtol=1e-4, atol=1e-5)


def test_grad_scale_acts_on_the_backbone_alone() -> None:
    x = torch.rand(2, 1, 32, 32)
    grads = {}
    for scale in (1.0, -2.0):
        model = make_model(Backbone(), {"source": Task(kind="multiclass", classes=["a", "b"], grad_scale=scale)}, 1).eval()
        model(x)["source"][:, 0].sum().backward()
        grads[scale] = (model.encoder.conv1[0].weight.grad, model.heads["source"][1].weight.grad)  # type: ignore[union-attr, index]
    torch.testing.assert_close(grads[-2.0][0], -2 * grads[1.0][0])
    torch.testing.assert_close(grads[-2.0][1], grads[1.0][1])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv1_075"])
def test_group_norm_leaves_no_batch_norm(name: str) -> None:
    model = make_model(Backbone(name=name, norm="group"), TASKS, 1)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train()
    one = model(torch.rand(1, 1, 32, 32))["covid"]
    assert torch.isfinite(one).all()


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(0)
    first = make_model(Backbone(), TASKS, 5).state_dict()
    torch.rand(7)
    second = make_model(Backbone(), TASKS, 5).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = make_model(Backbone(), TASKS, 6).state_dict()
    assert not torch.equal(first["encoder.conv1.0.weight"], other["encoder.conv1.0.weight"])


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConsiliumError, match="did you mean 'resnet18'"):
        make_model(Backbone(name="resnet_18"), TASKS, 1)


def test_paper_backbone_builds() -> None:
    with torch.device("meta"):
        model = make_model(Backbone(name="tf_efficientnet_b7"), TASKS, 1)
    assert model.encoder.num_features == 2560
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(63.8e6, rel=0.01)
