"""A small made-up hospital, and requests to it as the coordinator sends them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.compose import compose_config, config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.protocol.messages import Refusal, Reply, TrainReply, TrainRequest

WHO = "DOE^JANE-1957"  # stands in every path of these hospitals, and must stay there
TINY = PhantomConfig(scale=0.001, num_slices=10, image_size=64)  # 8 scans to train on, 6 and 6 others


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(tmp_path_factory.mktemp("data") / WHO, "north", TINY)


@pytest.fixture
def copy(hospital: Path, tmp_path: Path) -> Path:
    """The same hospital, to be spoilt; what is preprocessed already comes along."""
    return shutil.copytree(hospital, tmp_path / WHO)


def config_of(*overrides: str) -> Config:
    few = [
        "federation=folder",
        "federation.centres=[north,south]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "stage.batch_size=4",
    ]
    config = compose_config([*few, "stage.precision=fp32", "aggregation.compression=fp32", *overrides])
    tasks = {
        n: replace(t, classes=["north", "south"]) if n == "source" else t for n, t in config.tasks.items()
    }
    return replace(config, tasks=tasks)


def site_of(data: Path, **more: object) -> Site:
    return Site(centre="north", data=str(data), device="cpu", threads=1, **more)  # type: ignore[arg-type]


def start(config: Config) -> Weights:
    model = make_model(config.backbone, config.tasks, 1)
    return get_model_weights(model, build_layout(model))


def train(config: Config, round: int = 1, weights: Weights | None = None, **more: object) -> TrainRequest:
    counts = {"covid": [8.0, 8.0], "source": [8.0, 8.0]}
    return TrainRequest(
        "run", config_to_dict(config), "main", round, weights or start(config), counts, **more
    )  # type: ignore[arg-type]


def contribution(reply: Reply) -> TrainReply:
    assert isinstance(reply, TrainReply), reply
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
