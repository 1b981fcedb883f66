"""A run among made-up hospitals, and the model that it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from common.config.schema import Config
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunResult
from tests.in_process_federation import InProcess, sites


def run(config: Config, runs: Path, transport: InProcess | None = None, name: str = "r") -> RunResult:
    return start_run(config, transport or InProcess(sites()), runs, open_ledger(runs), name)


def load_model(runs: Path, name: str = "r") -> dict[str, np.ndarray]:
    return load_file(runs / name / "model.safetensors")
