"""The measured choice: one of those that run here, remembered, measured again when it must be, and used by the centre's training."""

from __future__ import annotations

import json
from dataclasses import replace
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
from common.config.compose import compose_config, config_to_dict
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


def test_the_choice_is_measured_once_and_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times of steps: the fastest wins, is not measured twice, and is when the file is damaged or the site has other threads."""
    asked: list[RuntimeSettings] = []

    def timed(choice: RuntimeSettings, *_: object) -> dict[RuntimeSettings, float]:
        asked.append(choice)
        return (
            {}
            if choice.precision == "fp32"
            else {choice: (1.0 if choice.channels_last else 0.5) + 0.1 * choice.num_threads}
        )

    monkeypatch.setattr(client.training.autotune, "_measure_step", timed)
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    assert {(c.precision, c.channels_last) for c in asked} == {
        (p, f) for p in ("fp32", "bf16") for f in (True, False)
    }
    asked.clear()
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    assert not asked
    assert choose(tmp_path, replace(SITE, threads=3)) == RuntimeSettings("bf16", False, 3)
    assert {c.num_threads for c in asked} == {3}
    (tmp_path / "runtime.json").write_text("{")
    asked.clear()
    assert choose(tmp_path) == RuntimeSettings("bf16", False, 1)
    assert asked


def test_where_nothing_can_be_measured_the_given_settings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(client.training.autotune, "train", broken)
    given = choose(tmp_path, replace(SITE, threads=1))
    assert given == RuntimeSettings(STAGE.precision, STAGE.channels_last, 1)
    assert not (tmp_path / "runtime.json").exists()


def test_a_centre_trains_as_it_measured(tmp_path: Path) -> None:
    """Really measured, in a real round; the round is then the same bits as with that choice given."""
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
    given = round_with(f"stage.precision={precision}", f"stage.channels_last={channels_last}")
    assert np.array_equal(measured.delta, given.delta)
