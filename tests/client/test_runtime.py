"""The measured choice: one of those that run here, remembered, measured again when it must be, and used by the centre's training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import client.runtime
from client.answer import answer
from client.dataset import Scans
from client.phantom import write_centre
from client.runtime import Choice, fastest
from client.site import Site
from common.compose import compose, to_dict
from common.messages import Contribution, Train
from common.model import make_model
from common.schema import Phantom
from common.weights import flatten, layout_of

CONFIG = compose(["federation=folder", "federation.centres=[north]", "stage.batch=2", "stage.tasks=[covid]"])
STAGE = CONFIG.stages["main"]
SITE = Site(centre="north", device="cpu")


def scans() -> Scans:
    return Scans([np.zeros((2, 32, 32), np.uint8)] * 4, {"covid": np.array([0.0, 1.0, 0.0, 1.0])}, ["north"] * 4)


def choose(folder: Path, site: Site = SITE) -> Choice:
    return fastest(site, CONFIG, STAGE, {"covid": CONFIG.tasks["covid"]}, scans(), folder)


def test_the_choice_is_measured_once_and_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times of steps: the fastest wins, is not measured twice, and is when the file is damaged or the site has other threads."""
    asked: list[Choice] = []

    def timed(choice: Choice, *_: object) -> dict[Choice, float]:
        asked.append(choice)
        return {} if choice.precision == "fp32" else {choice: (1.0 if choice.channels_last else 0.5) + 0.1 * choice.threads}

    monkeypatch.setattr(client.runtime, "_timed", timed)
    assert choose(tmp_path) == Choice("bf16", False, 1)
    assert {(c.precision, c.channels_last) for c in asked} == {(p, f) for p in ("fp32", "bf16") for f in (True, False)}
    asked.clear()
    assert choose(tmp_path) == Choice("bf16", False, 1)
    assert not asked
    assert choose(tmp_path, replace(SITE, threads=3)) == Choice("bf16", False, 3)
    assert {c.threads for c in asked} == {3}
    (tmp_path / "runtime.json").write_text("{")
    asked.clear()
    assert choose(tmp_path) == Choice("bf16", False, 1)
    assert asked


def test_where_nothing_can_be_measured_the_given_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(client.runtime, "train", broken)
    given = choose(tmp_path, replace(SITE, threads=1))
    assert given == Choice(STAGE.precision, STAGE.channels_last, 1)
    assert not (tmp_path / "runtime.json").exists()


def test_a_centre_trains_as_it_measured(tmp_path: Path) -> None:
    """Really measured, in a real round; the round is then the same bits as with that choice given."""
    data = write_centre(tmp_path / "north", "north", Phantom(scale=0.001, slices=10, pixels=64))
    few = [
        "federation=folder",
        "federation.centres=[north]",
        "preprocess.size=32",
        "preprocess.crop=none",
        "stage.batch=4",
        "stage.tasks=[covid]",
    ]

    def round_with(*overrides: str) -> Contribution:
        config = compose([*few, *overrides])
        model = make_model(config.backbone, config.tasks, 1)
        request = Train("run", to_dict(config), "main", 1, flatten(model, layout_of(model)), {"covid": [8.0, 8.0]})
        reply = answer(Site(centre="north", data=str(data), device="cpu", threads=1), request)
        assert isinstance(reply, Contribution), reply
        return reply

    threads = torch.get_num_threads()
    measured = round_with("stage.runtime=auto")
    assert torch.get_num_threads() == threads
    ((precision, channels_last, _),) = json.loads((data / ".consilium" / "runtime.json").read_text()).values()
    given = round_with(f"stage.precision={precision}", f"stage.channels_last={channels_last}")
    assert np.array_equal(measured.delta, given.delta)
