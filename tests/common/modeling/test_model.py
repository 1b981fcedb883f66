"""The model: names, shapes, pooling, heads, gradient scale, group norm, shallow parameters, seeds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.schema import BackboneConfig, ContrastiveConfig, DecoderConfig, Task
from common.modeling.heads import make_head
from common.modeling.model import Model, make_model, shallow_parameter_names
from common.modeling.pyramid_pooling import pyramid_pool
from common.utils.errors import ConsiliumError

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], grad_scale=-2.0)}


@pytest.mark.parametrize("slice_pooling", ["mean", "max"])
def test_features_are_pooled_over_slices(slice_pooling: str) -> None:
    model = make_model(BackboneConfig(slice_pooling=slice_pooling), TASKS, 1).eval()  # type: ignore[arg-type]
    slices = torch.rand(2, 3, 32, 32)
    outputs = model(slices)
    assert outputs["covid"].shape == (2, 1)
    assert outputs["source"].shape == (2, 3)
    by_slice = torch.stack([model.extract_features(slices[:, i : i + 1]) for i in range(3)], 1)
    expected = by_slice.mean(1) if slice_pooling == "mean" else by_slice.amax(1)
    torch.testing.assert_close(model.extract_features(slices), expected, rtol=1e-4, atol=1e-5)


def batch_norm_names(module: str) -> list[str]:
    suffixes = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{module}.{suffix}" for suffix in suffixes]


def block_names(layer: int, num_convolutions: int, has_downsample: bool) -> list[str]:
    block = f"encoder.layer{layer}.0"
    names = []
    for index in range(1, num_convolutions + 1):
        names += [f"{block}.conv{index}.weight", *batch_norm_names(f"{block}.bn{index}")]
    if has_downsample:
        names += [f"{block}.downsample.1.weight", *batch_norm_names(f"{block}.downsample.2")]
    return names


def test_tensor_names_of_a_plain_model_never_change() -> None:
    """Saved runs and published models depend on these names, and flat buffers on their order."""
    expected = [
        "encoder.conv1.0.weight",
        *batch_norm_names("encoder.conv1.1"),
        "encoder.conv1.3.weight",
        *batch_norm_names("encoder.conv1.4"),
        "encoder.conv1.6.weight",
        *batch_norm_names("encoder.bn1"),
        *block_names(1, 2, False),
        *block_names(2, 2, True),
        *block_names(3, 3, True),
        *block_names(4, 2, True),
        "heads.covid.1.weight",
        "heads.covid.1.bias",
        "heads.source.1.weight",
        "heads.source.1.bias",
    ]
    assert list(make_model(BackboneConfig(), TASKS, 1).state_dict()) == expected


ALL_TYPES = {
    "covid": Task(),
    "zones": Task(type="regression", label_columns=["a", "b", "c"], head_input="map", hidden_dims=[7]),
    "grade": Task(type="multiclass", classes=["w", "x", "y", "z"], input_relu=True),
    "lesion": Task(type="segmentation"),
    "paint": Task(type="inpainting", hidden_dims=[5]),
    "same": Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=6), hidden_dims=[9]),
}


def make_model_of_all_types() -> Model:
    return make_model(BackboneConfig(decoder=DecoderConfig(channels=[8, 4])), ALL_TYPES, 1).eval()


def test_each_task_type_has_its_output_shape() -> None:
    outputs = make_model_of_all_types()(torch.rand(2, 3, 40, 36))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "covid": (2, 1),
        "zones": (2, 3),
        "grade": (2, 4),
        "lesion": (2, 3, 40, 36),
        "paint": (2, 3, 40, 36),
        "same": (2, 6),
    }
    torch.testing.assert_close(outputs["same"].norm(dim=1), torch.ones(2))


def test_encoder_and_decoder_run_only_as_often_as_needed() -> None:
    model = make_model_of_all_types()
    slices = torch.rand(2, 3, 40, 36)
    encoder_runs: list[int] = []
    decoder_runs: list[int] = []
    model.encoder.conv1.register_forward_hook(lambda *_: encoder_runs.append(1))  # type: ignore[union-attr, arg-type]
    model.decoder.register_forward_hook(lambda *_: decoder_runs.append(1))  # type: ignore[union-attr, arg-type]
    outputs = model(slices)
    assert (len(encoder_runs), len(decoder_runs)) == (1, 1)
    without_map = model(slices, ["covid", "same"])
    assert (len(encoder_runs), len(decoder_runs)) == (2, 1)
    torch.testing.assert_close(without_map["covid"], outputs["covid"], rtol=1e-4, atol=1e-5)


def test_heads_on_the_feature_map_equal_their_definition() -> None:
    model = make_model_of_all_types()
    slices = torch.rand(2, 3, 40, 36)
    outputs = model(slices)
    maps_by_slice: list[Tensor] = []
    for i in range(3):
        images = model._normalise_slices(slices[:, i : i + 1])
        _, levels = model.encoder.forward_intermediates(images)  # type: ignore[operator]
        maps_by_slice.append(model.decoder(levels, (40, 36)))  # type: ignore[misc]
    maps = torch.cat(maps_by_slice).view(3, 2, 4, 40, 36).transpose(0, 1)

    head = model.heads["zones"]
    hidden = F.relu(F.linear(pyramid_pool(maps), head[1].weight, head[1].bias))  # type: ignore[index]
    expected = F.linear(hidden, head[4].weight, head[4].bias)  # type: ignore[index]
    torch.testing.assert_close(outputs["zones"], expected, rtol=1e-4, atol=1e-5)

    convolution = model.heads["lesion"][1]  # type: ignore[index]
    expected = torch.einsum("bschw,c->bshw", maps, convolution.weight.view(4)) + convolution.bias
    torch.testing.assert_close(outputs["lesion"], expected, rtol=1e-4, atol=1e-5)


def describe_head(head: nn.Sequential) -> str:
    words = []
    for module in head:
        if isinstance(module, nn.Linear):
            words.append(f"{module.in_features}>{module.out_features}")
        else:
            words.append(type(module).__name__)
    return " ".join(words)


def test_heads_have_the_papers_layers() -> None:
    """Prognosis: d -> 128 -> 32 -> 1 with ReLU, dropout, Xavier initialisation. Plain: dropout, linear."""
    assert describe_head(make_head(Task(), 10)) == "Dropout 10>1"
    prognosis = Task(input_relu=True, hidden_dims=[128, 32], dropout=0.5)
    expected = "ReLU Dropout 10>128 ReLU Dropout 128>32 ReLU Dropout 32>1"
    assert describe_head(make_head(prognosis, 10)) == expected
    head = make_head(Task(type="multiclass", classes=list("abcd"), xavier_init=True), 20)
    bound = (6 / (20 + 4)) ** 0.5  # Glorot & Bengio 2010, eq. 16; PyTorch's own bound is 20 ** -0.5
    assert 0.9 * bound < head[1].weight.abs().max() <= bound
    assert not head[1].bias.any()


def test_shallow_parameters_grow_with_the_fraction() -> None:
    model = make_model(BackboneConfig(name="densenet121"), {"covid": Task()}, 1)
    encoder_names = {name for name in model.state_dict() if name.startswith("encoder.")}
    convolutions = [
        f"encoder.{name}.weight"
        for name, module in model.encoder.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert shallow_parameter_names(model, 0) == set()
    assert shallow_parameter_names(model, 1) == encoder_names
    half = shallow_parameter_names(model, 0.5)
    assert [name in half for name in convolutions] == [True] * 60 + [False] * 60
    assert "encoder.features.norm0.running_mean" in half
    assert "encoder.features.norm5.weight" not in half
    quarter = shallow_parameter_names(model, 0.25)
    three_quarters = shallow_parameter_names(model, 0.75)
    assert quarter < half < three_quarters < encoder_names


def test_grad_scale_changes_the_backbones_gradient_only() -> None:
    slices = torch.rand(2, 1, 32, 32)
    encoder_gradients = {}
    head_gradients = {}
    for scale in (1.0, -2.0):
        task = Task(type="multiclass", classes=["a", "b"], grad_scale=scale)
        model = make_model(BackboneConfig(), {"source": task}, 1).eval()
        model(slices)["source"][:, 0].sum().backward()
        encoder_gradients[scale] = model.encoder.conv1[0].weight.grad  # type: ignore[union-attr, index]
        head_gradients[scale] = model.heads["source"][1].weight.grad  # type: ignore[index]
    torch.testing.assert_close(encoder_gradients[-2.0], -2 * encoder_gradients[1.0])
    torch.testing.assert_close(head_gradients[-2.0], head_gradients[1.0])


def test_grad_scale_changes_the_decoders_gradient() -> None:
    slices = torch.rand(2, 1, 32, 32)
    decoder_gradients = {}
    for scale in (1.0, 0.0):
        task = Task(type="segmentation", grad_scale=scale)
        model = make_model(BackboneConfig(), {"lesion": task}, 1)
        model(slices)["lesion"].square().sum().backward()
        projection = model.decoder.ups[-1].project  # type: ignore[union-attr]
        decoder_gradients[scale] = projection.weight.grad.abs().sum()  # type: ignore[union-attr]
        assert model.heads["lesion"][1].weight.grad.abs().sum() > 0  # type: ignore[index]
    assert decoder_gradients[1.0] > 0
    assert decoder_gradients[0.0] == 0


@pytest.mark.parametrize("name", ["test_resnet", "residual_unet", "densenet121"])
def test_channels_last_and_checkpointing_do_not_change_results(name: str) -> None:
    # Doubles, because deep batch norms over few pixels amplify rounding errors.
    slices = torch.rand(2, 2, 40, 40, dtype=torch.float64)
    backbone = BackboneConfig(name=name, decoder=DecoderConfig(channels=[8]))
    results = {}
    for optimised in (False, True):
        model = make_model(backbone, {"lesion": Task(type="segmentation")}, 1, optimised, optimised)
        output = model.double().train()(slices)["lesion"]
        output.square().mean().backward()
        first_convolution = next(p for p in model.encoder.parameters() if p.ndim == 4)
        projection = model.decoder.ups[0].project  # type: ignore[union-attr]
        results[optimised] = [output, first_convolution.grad, projection.weight.grad]  # type: ignore[union-attr]
    for plain, optimised_result in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(plain, optimised_result, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv1_075", "residual_unet"])
def test_group_norm_replaces_every_batch_norm(name: str) -> None:
    model = make_model(BackboneConfig(name=name, norm="group"), TASKS, 1)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train()
    output = model(torch.rand(1, 1, 32, 32))["covid"]
    assert torch.isfinite(output).all()


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(0)
    first = make_model(BackboneConfig(), TASKS, 5).state_dict()
    torch.rand(7)
    second = make_model(BackboneConfig(), TASKS, 5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_model(BackboneConfig(), TASKS, 6).state_dict()
    assert not torch.equal(first["encoder.conv1.0.weight"], other["encoder.conv1.0.weight"])


def test_error_for_an_unknown_backbone_suggests_the_nearest() -> None:
    with pytest.raises(ConsiliumError, match="did you mean 'resnet18'"):
        make_model(BackboneConfig(name="resnet_18"), TASKS, 1)


def test_error_for_a_papers_backbone_name_gives_timms_name() -> None:
    message = r"'ShuffleNetV2-x0\.5' is not a timm model; it is 'lcnet_050' here"
    with pytest.raises(ConsiliumError, match=message):
        make_model(BackboneConfig(name="ShuffleNetV2-x0.5"), TASKS, 1)


def test_multi_source_papers_backbone_builds() -> None:
    with torch.device("meta"):
        model = make_model(BackboneConfig(name="tf_efficientnet_b7"), TASKS, 1)
    assert model.encoder.num_features == 2560
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(63.8e6, rel=0.01)
