"""The first weights of a run: random by the seed, from a file or from timm; and what can be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.config.compose import compose_config
from common.config.schema import Config, Task
from common.modeling.encoder import check_no_batch_norm
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError
from server.run.initial_model import build_initial_model


def config(**backbone: object) -> Config:
    base = compose_config(["tasks.source.classes=[a,b]"])
    return replace(base, backbone=replace(base.backbone, **backbone))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_is_loaded_from_a_file_with_or_without_prefix(tmp_path: Path, suffix: str) -> None:
    donor = make_model(config().backbone, config().tasks, 99).encoder.state_dict()
    named = (
        {f"encoder.{k}": v for k, v in donor.items()}
        if suffix == ".safetensors"
        else {**donor, "fc.weight": torch.zeros(3)}
    )
    path = tmp_path / f"weights{suffix}"
    save_file(named, path) if suffix == ".safetensors" else torch.save(named, path)
    model = build_initial_model(config(weights=str(path)))
    assert all(torch.equal(v, donor[k]) for k, v in model.encoder.state_dict().items())


def test_group_norm_model_loads_the_weights_of_a_batch_norm_model(tmp_path: Path) -> None:
    torch.save(make_model(config().backbone, config().tasks, 99).encoder.state_dict(), tmp_path / "bn.pth")
    model = build_initial_model(config(weights=str(tmp_path / "bn.pth"), norm="group"))
    assert not any("running" in name for name in model.state_dict())


def test_frozen_norms_keep_the_statistics_of_the_file(tmp_path: Path) -> None:
    donor = make_model(config().backbone, config().tasks, 99)
    x = torch.rand(6, 2, 32, 32)
    donor(x)  # in training mode: its statistics are no longer 0 and 1
    torch.save(donor.encoder.state_dict(), tmp_path / "bn.pth")
    model = build_initial_model(config(weights=str(tmp_path / "bn.pth"), norm="frozen")).train()
    torch.testing.assert_close(
        model.compute_head_inputs(x, {"features"}), donor.eval().compute_head_inputs(x, {"features"})
    )
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    check_no_batch_norm(model)
    with pytest.raises(ValueError, match="has no statistics to keep"):
        config(norm="frozen")


def test_decoder_and_heads_stay_random_by_the_seed(tmp_path: Path) -> None:
    base = config()
    base = replace(base, tasks={**base.tasks, "lesion": Task(type="segmentation")})
    donor = make_model(base.backbone, base.tasks, 99).state_dict()
    torch.save(donor, tmp_path / "whole.pth")
    loaded = build_initial_model(
        replace(base, backbone=replace(base.backbone, weights=str(tmp_path / "whole.pth")))
    ).state_dict()
    fresh = build_initial_model(base).state_dict()
    assert any(name.startswith("decoder.") for name in loaded)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, (donor if name.startswith("encoder.") else fresh)[name]), name


def test_unusable_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"nowhere.pth' does not exist; give a file, 'timm' or 'random'"):
        build_initial_model(config(weights=str(tmp_path / "nowhere.pth")))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ConsiliumError, match="cannot be read as weights"):
        build_initial_model(config(weights=str(tmp_path / "torn.safetensors")))
    torch.save(
        make_model(config(name="test_efficientnet").backbone, config().tasks, 1).encoder.state_dict(),
        tmp_path / "other.pth",
    )
    with pytest.raises(ConsiliumError, match="do not fit backbone 'test_resnet'"):
        build_initial_model(config(weights=str(tmp_path / "other.pth")))


def test_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConsiliumError,
        match=r"could not be fetched .*the coordinator needs internet for backbone.weights=timm",
    ):
        build_initial_model(config(name="tf_efficientnet_b0", weights="timm"))


def test_backbone_without_timm_weights_is_refused() -> None:
    for name in ("residual_unet", "mobilenetv1_075"):
        with pytest.raises(ConsiliumError, match=f"timm has no weights for '{name}'; give a file"):
            build_initial_model(config(name=name, weights="timm"))
