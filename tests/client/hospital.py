"""A small made-up hospital, and requests to it as the coordinator sends them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from client.phantom import write_centre
from client.site import Site
from common.compose import compose, to_dict
from common.messages import Contribution, Refusal, Reply, Train
from common.model import make_model
from common.schema import Config, Phantom
from common.weights import Weights, flatten, layout_of

WHO = "DOE^JANE-1957"  # stands in every path of these hospitals, and must stay there
TINY = Phantom(scale=0.001, slices=10, pixels=64)  # 8 scans to train on, 6 and 6 others


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(tmp_path_factory.mktemp("data") / WHO, "north", TINY)


@pytest.fixture
def copy(hospital: Path, tmp_path: Path) -> Path:
    """The same hospital, to be spoilt; what is preprocessed already comes along."""
    return shutil.copytree(hospital, tmp_path / WHO)


def config_of(*overrides: str) -> Config:
    few = ["federation=folder", "federation.centres=[north,south]", "preprocess.size=32", "preprocess.crop=none", "stage.batch=4"]
    config = compose([*few, "stage.precision=fp32", "aggregation.codec=fp32", *overrides])
    tasks = {n: replace(t, classes=["north", "south"]) if n == "source" else t for n, t in config.tasks.items()}
    return replace(config, tasks=tasks)


def site_of(data: Path, **more: object) -> Site:
    return Site(centre="north", data=str(data), device="cpu", threads=1, **more)  # type: ignore[arg-type]


def start(config: Config) -> Weights:
    model = make_model(config.backbone, config.tasks, 1)
    return flatten(model, layout_of(model))


def train(config: Config, round: int = 1, weights: Weights | None = None, **more: object) -> Train:
    counts = {"covid": [8.0, 8.0], "source": [8.0, 8.0]}
    return Train("run", to_dict(config), "main", round, weights or start(config), counts, **more)  # type: ignore[arg-type]


def contribution(reply: Reply) -> Contribution:
    assert isinstance(reply, Contribution), reply
    return reply


def reason(reply: Reply) -> str:
    """A refusal's text, which is one sentence without a path or a name."""
    assert isinstance(reply, Refusal), reply
    assert WHO not in f"{reply.centre} {reply.reason}"
    assert "\n" not in reply.reason
    assert "/" not in reply.reason
    return reply.reason


def relabel(folder: Path, **columns: object) -> None:
    table = pd.read_csv(folder / "cohort.csv")
    table.assign(**columns).to_csv(folder / "cohort.csv", index=False)
