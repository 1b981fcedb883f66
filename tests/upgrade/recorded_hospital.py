"""The recorded hospital: its state folder, the settings of its runs, its command."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from client.cli import app

STATE = Path("hospital_north/state")
# The settings of the recorded runs, under their present keys.
PREPROCESSING = [
    "preprocess.image_size=16",
    "preprocess.num_slices=2",
    "preprocess.selection=even",
    "preprocess.crop=none",
]
RECORDED_SETTINGS = [
    "recipe=multisource",
    "federation=folder",
    "federation.centres=[north,east]",
    "federation.join_timeout=1",
    "federation.round_retries=0",
    "federation.quorum=0.3",
    "backbone.name=tiny_net",
    *PREPROCESSING,
    "stage.rounds=1",
    "stage.local_epochs=1",
    "stage.batch_size=4",
    "stage.precision=fp32",
    "stage.tasks=[covid]",
    "evaluation.histogram_bins=8",
    "evaluation.image_statistics=false",
]


def call_centre_command(*arguments: str) -> str:
    """Run `consilium-centre` and return what it prints, as one line."""
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return " ".join(outcome.output.split())
