"""Automatic tuning: settings are measured once, remembered, and used in training."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import client.training.autotune
from client.data.dataset import ScanDataset
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site.config import Site
from client.training.autotune import RuntimeSettings, autotune
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import build_layout, get_model_weights
from common.protocol.messages import TrainReply, TrainRequest

CONFIG = compose_config(
    ["federation=folder", "federation.centres=[north]", "stage.batch_size=2", "stage.tasks=[covid]"]
)
STAGE = CONFIG.stages["main"]
SITE = Site(centre="north", device="cpu")


def scans() -> ScanDataset:
    return ScanDataset(
        [np.zeros((2, 32, 32), np.uint8)] * 4, {"covid": np.array([0.0, 1.0, 0.0, 1.0])}, ["north"] * 4
    )


def choose(folder: Path, site: Site = SITE) -> RuntimeSettings:
    return autotune(site, CONFIG, STAGE, {"covid": CONFIG.tasks["covid"]}, scans(), folder)


def test_settings_are_measured_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times, the fastest settings win and are remembered.

    They are measured again when the file is damaged or the site has another thread count.
    """
    measured: list[RuntimeSettings] = []

    def fake_measure(settings: RuntimeSettings, *_: object) -> dict[RuntimeSettings, float]:
        measured.append(settings)
        if settings.precision == "fp32":
            return {}
        seconds = 1.0 if settings.channels_last else 0.5
        return {settings: seconds + 0.1 * settings.num_threads}

    monkeypatch.setattr(client.training.autotune, "_measure_step", fake_measure)
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    pairs = {(settings.precision, settings.channels_last) for settings in measured}
    assert pairs == set(product(("fp32", "bf16"), (True, False)))
    measured.clear()
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    assert not measured
    assert choose(tmp_path, replace(SITE, threads=3)) == RuntimeSettings("bf16", False, 3)
    assert {settings.num_threads for settings in measured} == {3}
    (tmp_path / "runtime.json").write_text("{")
    measured.clear()
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    assert measured


def test_configured_settings_stay_when_nothing_can_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(client.training.autotune, "train", broken)
    settings = choose(tmp_path, replace(SITE, threads=1))
    assert settings == RuntimeSettings(STAGE.precision, STAGE.channels_last, 1)
    assert not (tmp_path / "runtime.json").exists()


def test_a_centre_trains_with_the_measured_settings(tmp_path: Path) -> None:
    """A real round with measured settings gives the same bits as a round with those settings configured."""
    data = write_centre(tmp_path / "north", "north", PhantomConfig(scale=0.001, num_slices=10, image_size=64))
    few = [
        "federation=folder",
        "federation.centres=[north]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "stage.batch_size=4",
        "stage.tasks=[covid]",
    ]

    def round_with(*overrides: str) -> TrainReply:
        config = compose_config([*few, *overrides])
        model = make_model(config.backbone, config.tasks, 1)
        request = TrainRequest(
            "run",
            config_to_dict(config),
            "main",
            1,
            get_model_weights(model, build_layout(model)),
            {"covid": [8.0, 8.0]},
        )
        reply = handle_request(Site(centre="north", data=str(data), device="cpu", threads=1), request)
        assert isinstance(reply, TrainReply), reply
        return reply

    threads = torch.get_num_threads()
    measured = round_with("stage.autotune=true")
    assert torch.get_num_threads() == threads
    ((precision, channels_last, _),) = json.loads((data / ".consilium" / "runtime.json").read_text()).values()
    configured = round_with(f"stage.precision={precision}", f"stage.channels_last={channels_last}")
    assert np.array_equal(measured.delta, configured.delta)
