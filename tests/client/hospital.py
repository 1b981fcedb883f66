"""A small phantom hospital, and requests to it as the coordinator sends them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.compose import compose_config, keep_effective_overrides
from common.config.effects.find import IneffectiveKey
from common.config.parse import config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.protocol.messages import Refusal, Reply, TrainReply, TrainRequest

PATIENT_NAME = "DOE^JANE-1957"  # is part of every path of these hospitals, and must not leave them
TINY_PHANTOM = PhantomConfig(scale=0.001, num_slices=10, image_size=64)  # 8 training scans, 6 and 6 others


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(tmp_path_factory.mktemp("data") / PATIENT_NAME, "north", TINY_PHANTOM)


@pytest.fixture
def hospital_copy(hospital: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; scans that are preprocessed already come along."""
    return shutil.copytree(hospital, tmp_path / PATIENT_NAME)


def make_config(*overrides: str, small: Sequence[str] = ()) -> Config:
    """A small configuration; of what makes it small, whatever has an effect with these overrides."""
    tiny = [
        "federation=folder",
        "federation.centres=[north,south]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "stage.batch_size=4",
        "stage.precision=fp32",
        "aggregation.compression=fp32",
        *small,
    ]
    try:
        config = compose_config([*tiny, *overrides])
    except IneffectiveKey:
        config = compose_config([*keep_effective_overrides(tiny, fixed=overrides), *overrides])
    tasks = dict(config.tasks)
    if "source" in tasks:
        tasks["source"] = replace(tasks["source"], classes=["north", "south"])
    return replace(config, tasks=tasks)


def make_site(data: Path, **settings: object) -> Site:
    if (
        "state" in settings
    ):  # the anchor beside the shared data would remember the state folder of another test
        settings.setdefault("anchor", settings["state"])
    return Site(centre="north", data=str(data), device="cpu", threads=1, **settings)  # type: ignore[arg-type]


def initial_weights(config: Config) -> Weights:
    model = make_model(config.backbone, config.tasks, 1)
    return get_model_weights(model, build_layout(model))


def train_request(
    config: Config, round_number: int = 1, weights: Weights | None = None, **fields: object
) -> TrainRequest:
    counts = {"covid": [8.0, 8.0], "source": [8.0, 8.0]}
    return TrainRequest(
        "run",
        config_to_dict(config),
        "main",
        round_number,
        weights or initial_weights(config),
        {task: counts[task] for task in config.tasks if task in counts},
        **fields,  # type: ignore[arg-type]
    )


def expect_train_reply(reply: Reply) -> TrainReply:
    assert isinstance(reply, TrainReply), reply
    return reply


def refusal_reason(reply: Reply) -> str:
    """Return a refusal's reason, which is one sentence without a path or a name."""
    assert isinstance(reply, Refusal), reply
    assert PATIENT_NAME not in f"{reply.centre} {reply.reason}"
    assert "\n" not in reply.reason
    assert "/" not in reply.reason
    return reply.reason


def set_columns(folder: Path, **columns: object) -> None:
    """Change columns of the cohort's table."""
    table = pd.read_csv(folder / "cohort.csv")
    table.assign(**columns).to_csv(folder / "cohort.csv", index=False)
