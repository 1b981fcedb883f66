"""The model: names, shapes, pooling, heads, gradient scale, group norm, the shallower share, weights by seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import schema
from common.config.schema import BackboneConfig, ContrastiveConfig, Task
from common.modeling.model import make_head, make_model, shallow_parameter_names
from common.modeling.pyramid_pooling import pyramid_pool
from common.utils.errors import ConsiliumError

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], grad_scale=-2.0)}


def test_shapes_and_pooling_is_the_mean_of_slices() -> None:
    model = make_model(BackboneConfig(), TASKS, 1).eval()
    x = torch.rand(2, 3, 32, 32)
    out = model(x)
    assert out["covid"].shape == (2, 1)
    assert out["source"].shape == (2, 3)
    alone = torch.stack([model.extract_features(x[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(model.extract_features(x), alone.mean(1), rtol=1e-4, atol=1e-5)
    most = make_model(BackboneConfig(slice_pooling="max"), TASKS, 1).eval()
    torch.testing.assert_close(most.extract_features(x), alone.amax(1), rtol=1e-4, atol=1e-5)


def test_names_of_a_plain_model_never_change() -> None:
    """Runs, personal weights and published models are read by these names, and flat buffers by their order."""

    def norm(name: str) -> list[str]:
        return [
            f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]

    def block(layer: int, convs: int, downsample: bool) -> list[str]:
        at = f"encoder.layer{layer}.0"
        own = [n for k in range(1, convs + 1) for n in (f"{at}.conv{k}.weight", *norm(f"{at}.bn{k}"))]
        return own + ([f"{at}.downsample.1.weight", *norm(f"{at}.downsample.2")] if downsample else [])

    stem = [
        "encoder.conv1.0.weight",
        *norm("encoder.conv1.1"),
        "encoder.conv1.3.weight",
        *norm("encoder.conv1.4"),
        "encoder.conv1.6.weight",
    ]
    levels = block(1, 2, False) + block(2, 2, True) + block(3, 3, True) + block(4, 2, True)
    heads = ["heads.covid.1.weight", "heads.covid.1.bias", "heads.source.1.weight", "heads.source.1.bias"]
    assert list(make_model(BackboneConfig(), TASKS, 1).state_dict()) == [
        *stem,
        *norm("encoder.bn1"),
        *levels,
        *heads,
    ]


def test_each_kind_has_its_shape_and_the_encoder_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {
        "covid": Task(),
        "zones": Task(type="regression", label_columns=["a", "b", "c"], head_input="map", hidden_dims=[7]),
        "grade": Task(type="multiclass", classes=["w", "x", "y", "z"], input_relu=True),
        "lesion": Task(type="segmentation"),
        "paint": Task(type="inpainting", hidden_dims=[5]),
        "same": Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=6), hidden_dims=[9]),
    }
    model = make_model(BackboneConfig(decoder=schema.DecoderConfig(channels=[8, 4])), tasks, 1).eval()
    x = torch.rand(2, 3, 40, 36)
    runs: list[int] = []
    ups: list[int] = []
    model.encoder.conv1.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr, arg-type]
    model.decoder.register_forward_hook(lambda *_: ups.append(1))  # type: ignore[union-attr, arg-type]
    out = model(x)
    assert (len(runs), len(ups)) == (1, 1)
    assert {t: tuple(o.shape) for t, o in out.items()} == {
        "covid": (2, 1),
        "zones": (2, 3),
        "grade": (2, 4),
        "lesion": (2, 3, 40, 36),
        "paint": (2, 3, 40, 36),
        "same": (2, 6),
    }
    torch.testing.assert_close(out["same"].norm(dim=1), torch.ones(2))
    alone = model(x, ["covid", "same"])
    assert (len(runs), len(ups)) == (2, 1)  # no map was asked for
    torch.testing.assert_close(alone["covid"], out["covid"], rtol=1e-4, atol=1e-5)
    # by hand: the map of each slice alone, its cells, the head's two layers
    maps = torch.cat(
        [
            model.decoder(
                model.encoder.forward_intermediates(model._normalise_slices(x[:, i : i + 1]))[1], (40, 36)
            )
            for i in range(3)
        ]
    )  # type: ignore[operator, misc]
    maps = maps.view(3, 2, 4, 40, 36).transpose(0, 1)
    head = model.heads["zones"]
    by_hand = F.linear(
        F.relu(F.linear(pyramid_pool(maps), head[1].weight, head[1].bias)), head[4].weight, head[4].bias
    )  # type: ignore[index]
    torch.testing.assert_close(out["zones"], by_hand, rtol=1e-4, atol=1e-5)
    w = model.heads["lesion"][1].weight.view(4)  # type: ignore[index]
    torch.testing.assert_close(
        out["lesion"],
        torch.einsum("bschw,c->bshw", maps, w) + model.heads["lesion"][1].bias,  # type: ignore[index]
        rtol=1e-4,
        atol=1e-5,
    )


def test_heads_are_built_as_the_papers_say() -> None:
    """Prognosis: d -> 128 -> 32 -> 1 with ReLU and dropout, Xavier; triage's starts with dropout; a plain one is dropout and linear."""

    def shape(head: nn.Sequential) -> str:
        return " ".join(
            f"{m.in_features}>{m.out_features}" if isinstance(m, nn.Linear) else type(m).__name__
            for m in head
        )

    assert shape(make_head(Task(), 10)) == "Dropout 10>1"
    assert shape(make_head(Task(input_relu=True, hidden_dims=[128, 32], dropout=0.5), 10)) == (
        "ReLU Dropout 10>128 ReLU Dropout 128>32 ReLU Dropout 32>1"
    )
    head = make_head(Task(type="multiclass", classes=list("abcd"), xavier_init=True), 20)
    bound = (6 / (20 + 4)) ** 0.5  # Glorot & Bengio 2010, eq. 16; PyTorch's own bound is 20 ** -0.5
    assert 0.9 * bound < head[1].weight.abs().max() <= bound
    assert not head[1].bias.any()


def test_shallow_is_a_growing_front_of_the_encoder() -> None:
    model = make_model(BackboneConfig(name="densenet121"), {"covid": Task()}, 1)
    encoder = {n for n in model.state_dict() if n.startswith("encoder.")}
    convs = [f"encoder.{n}.weight" for n, m in model.encoder.named_modules() if isinstance(m, nn.Conv2d)]
    assert shallow_parameter_names(model, 0) == set()
    assert shallow_parameter_names(model, 1) == encoder
    half = shallow_parameter_names(model, 0.5)
    assert [c in half for c in convs] == [True] * 60 + [False] * 60
    assert "encoder.features.norm0.running_mean" in half
    assert "encoder.features.norm5.weight" not in half
    assert shallow_parameter_names(model, 0.25) < half < shallow_parameter_names(model, 0.75) < encoder


def test_grad_scale_acts_on_the_backbone_alone() -> None:
    x = torch.rand(2, 1, 32, 32)
    grads = {}
    for scale in (1.0, -2.0):
        model = make_model(
            BackboneConfig(), {"source": Task(type="multiclass", classes=["a", "b"], grad_scale=scale)}, 1
        ).eval()
        model(x)["source"][:, 0].sum().backward()
        grads[scale] = (model.encoder.conv1[0].weight.grad, model.heads["source"][1].weight.grad)  # type: ignore[union-attr, index]
    torch.testing.assert_close(grads[-2.0][0], -2 * grads[1.0][0])
    torch.testing.assert_close(grads[-2.0][1], grads[1.0][1])


def test_grad_scale_acts_on_the_way_up_too() -> None:
    x, grads = torch.rand(2, 1, 32, 32), {}
    for scale in (1.0, 0.0):
        model = make_model(BackboneConfig(), {"lesion": Task(type="segmentation", grad_scale=scale)}, 1)
        model(x)["lesion"].square().sum().backward()
        grads[scale] = model.decoder.ups[-1].project.weight.grad.abs().sum()  # type: ignore[union-attr]
        assert model.heads["lesion"][1].weight.grad.abs().sum() > 0  # type: ignore[index]
    assert grads[1.0] > 0
    assert grads[0.0] == 0


@pytest.mark.parametrize("name", ["test_resnet", "residual_unet", "densenet121"])
def test_channels_last_and_checkpointing_change_nothing(name: str) -> None:
    x, found = (
        torch.rand(2, 2, 40, 40, dtype=torch.float64),
        {},
    )  # doubles: deep batch norms over few pixels multiply what rounding does
    for fast in (False, True):
        model = make_model(
            BackboneConfig(name=name, decoder=schema.DecoderConfig(channels=[8])),
            {"lesion": Task(type="segmentation")},
            1,
            fast,
            fast,
        )
        out = model.double().train()(x)["lesion"]
        out.square().mean().backward()
        first = next(p for p in model.encoder.parameters() if p.ndim == 4)
        found[fast] = [out, first.grad, model.decoder.ups[0].project.weight.grad]  # type: ignore[union-attr]
    for a, b in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv1_075", "residual_unet"])
def test_group_norm_leaves_no_batch_norm(name: str) -> None:
    model = make_model(BackboneConfig(name=name, norm="group"), TASKS, 1)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train()
    one = model(torch.rand(1, 1, 32, 32))["covid"]
    assert torch.isfinite(one).all()


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(0)
    first = make_model(BackboneConfig(), TASKS, 5).state_dict()
    torch.rand(7)
    second = make_model(BackboneConfig(), TASKS, 5).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = make_model(BackboneConfig(), TASKS, 6).state_dict()
    assert not torch.equal(first["encoder.conv1.0.weight"], other["encoder.conv1.0.weight"])


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConsiliumError, match="did you mean 'resnet18'"):
        make_model(BackboneConfig(name="resnet_18"), TASKS, 1)


def test_a_papers_name_says_what_it_is_called_here() -> None:
    with pytest.raises(
        ConsiliumError, match=r"'ShuffleNetV2-x0\.5' is not a timm model; it is 'lcnet_050' here"
    ):
        make_model(BackboneConfig(name="ShuffleNetV2-x0.5"), TASKS, 1)


def test_paper_backbone_builds() -> None:
    with torch.device("meta"):
        model = make_model(BackboneConfig(name="tf_efficientnet_b7"), TASKS, 1)
    assert model.encoder.num_features == 2560
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(63.8e6, rel=0.01)
