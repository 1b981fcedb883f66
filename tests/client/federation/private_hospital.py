"""A small hospital that takes part in private runs, and what a coordinator may send to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.data import loading
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config, PhantomConfig
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights
from common.protocol.messages import Reply, StatisticsReply, StatisticsRequest, TrainRequest

SMALL = [
    "federation=folder",
    "federation.centres=[north,east]",
    "preprocess.image_size=32",
    "preprocess.crop=none",
    "stage.batch_size=4",
    "stage.rounds=2",
    "stage.tasks=[covid]",
    "stage.precision=fp32",
    "evaluation.histogram_bins=16",
    "privacy=patient",
]


def write_hospital(folder: Path) -> Path:
    """Write the hospital's scans: about two dozen patients in three splits."""
    return write_centre(folder, "north", PhantomConfig(scale=0.03, num_slices=10, image_size=64))


@pytest.fixture(scope="module")
def written_hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hospital's scans, written once for all tests of a file."""
    return write_hospital(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hospital(written_hospital: Path, tmp_path: Path) -> Path:
    """A copy of the hospital, with a state folder of its own."""
    loading.clear_dataset_cache()
    return Path(shutil.copytree(written_hospital, tmp_path / "north"))


def make_config(*overrides: str) -> Config:
    """Return the configuration of a private run."""
    return compose_config([*SMALL, *overrides])


def make_weights(config: Config) -> Weights:
    """Return the weights of a new model."""
    model = make_model(config.backbone, config.tasks, 1)
    return get_model_weights(model, build_layout(model))


def make_site(hospital: Path, **settings: Any) -> Site:
    """Return the hospital's settings."""
    return Site(centre="north", data=str(hospital), device="cpu", threads=1, **settings)


def train(
    hospital: Path, config: Config, run_id: str = "run", round_number: int = 1, **settings: Any
) -> Reply:
    """Send a request to train a round."""
    weights = make_weights(config)
    request = TrainRequest(run_id, config_to_dict(config), "main", round_number, weights)
    return handle_request(make_site(hospital, **settings), request)


def query(
    hospital: Path,
    config: Config | dict[str, Any],
    name: str,
    split: str = "train",
    run_id: str = "run",
    **settings: Any,
) -> Reply:
    """Send a query; a configuration as a dict is sent as it is."""
    values = config if isinstance(config, dict) else config_to_dict(config)
    weights = make_weights(make_config()) if name == "scores" else None
    request = StatisticsRequest(run_id, values, name, "main", split, weights=weights)
    return handle_request(make_site(hospital, **settings), request)


def count_scored(reply: Reply) -> float:
    """Return how many scans an exact reply to `scores` is made of."""
    assert isinstance(reply, StatisticsReply), reply
    return float(reply.sums["north/covid/hist"].sum()) if reply.sums else 0.0


def read_charges(hospital: Path) -> list[dict[str, Any]]:
    """Return what was charged to the patients' budget."""
    path = hospital / ".consilium" / "budget" / "spent.json"
    return list(json.loads(path.read_text())["charges"]) if path.exists() else []
