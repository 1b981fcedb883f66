"""The hospital's command from a folder of DICOM to a table of predictions.

For bad input one sentence and exit status 2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from client.cli import main
from client.data.cohort import load_cohort
from client.phantom.federation import write_centre
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import PhantomConfig
from common.modeling.model import make_model
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

SMALL = ["-s", "preprocess.image_size=32", "-s", "preprocess.crop=none"]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital's folder of DICOM series, as it is before anything of ours has touched it."""
    return (
        write_centre(
            tmp_path_factory.mktemp("cli"), "north", PhantomConfig(scale=0.001, num_slices=10, image_size=64)
        )
        / "dicom"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    config = phantom_config(
        root / "data", "federation.centres=[north]", "federation.phantom.scale=0.001", "stage.rounds=1"
    )
    (root / "runs").mkdir()
    start_run(config, InProcess(sites(1)), root / "runs", open_ledger(root / "runs"), "run")
    return root / "runs" / "run" / "model.safetensors"


@pytest.fixture
def consilium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command's own entry point, in this process and in a folder of its own.

    (exit status, output, errors).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for module, hook in (
        (sys, "excepthook"),
        (sys, "unraisablehook"),
        (threading, "excepthook"),
        (warnings, "showwarning"),
    ):
        monkeypatch.setattr(
            module, hook, getattr(module, hook)
        )  # the command sets it: restored after the test

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium-centre", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return call


def sentence(result: tuple[int, str, str]) -> str:
    """The one line of an expected failure."""
    status, _, errors = result
    assert status == 2, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_cohort_preprocess_and_predict_from_a_folder_of_dicom(
    consilium: Command, folder: Path, model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "scans")
    pd.DataFrame({"scan": sorted(p.name for p in own.iterdir()), "covid": [0, 1] * 10}).to_csv(
        own / "labels.csv", index=False
    )
    for file in (own / "north-0002").iterdir():
        file.write_bytes(file.read_bytes()[:3000])

    status, out, _ = consilium("cohort", own, "--out", tmp_path / "cohort.csv", "--centre", "north")
    assert status == 0
    assert f"20 scans written to {tmp_path / 'cohort.csv'}, 0 skipped" in out
    table = load_cohort(tmp_path / "cohort.csv", "north")
    assert table["covid"].sum() == 10
    assert not table["path"].str.startswith("/").any()  # the folder can move

    status, out, _ = consilium("preprocess", tmp_path / "cohort.csv", *SMALL, "--workers", 1)
    assert status == 0
    assert f"19 of 20 scans are ready in {tmp_path / '.consilium' / 'slices'}" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("skipped")] == [
        f"skipped {own / 'north-0002'}"
    ]

    status, out, _ = consilium("montage", own / "north-0000", "--out", tmp_path / "m" / "montage.png", *SMALL)
    assert status == 0
    assert "must not leave the centre" in out
    assert Image.open(tmp_path / "m" / "montage.png").width == 1200

    status, out, _ = consilium(
        "predict", model, own, "--out", tmp_path / "p" / "predictions.csv", "--device", "cpu"
    )
    assert status == 0
    assert "19 predictions written to" in out
    assert "1 skipped" in out
    predictions = pd.read_csv(tmp_path / "p" / "predictions.csv")
    assert predictions["covid"].between(0, 1).all()
    assert sorted(predictions["scan"]) == sorted(set(table["scan"]) - {"north-0002"})
    assert not [c for c in predictions.columns if c.startswith("source")]


def test_predict_sorts_a_worklist_and_writes_masks(consilium: Command, folder: Path, tmp_path: Path) -> None:
    config = compose_config(
        ["recipe=triage", "backbone=small", "preprocess.image_size=32", "preprocess.num_slices=4"]
    )
    save_file(
        make_model(config.backbone, config.tasks, 1).state_dict(),
        tmp_path / "model",
        {"config": json.dumps(config_to_dict(config))},
    )
    for scan in ("north-0000", "north-0003", "north-0005"):
        shutil.copytree(folder / scan, tmp_path / "new" / scan)
    status, out, _ = consilium(
        "predict", "model", "new", "--masks", "masks", "--sort", "covid", "--device", "cpu"
    )
    assert (status, "3 predictions written to predictions.csv, 0 skipped" in out) == (0, True)
    table = pd.read_csv("predictions.csv")
    assert table["covid"].is_monotonic_decreasing
    assert table["lesion_severity"].between(0, 100).all()
    assert set(table["lesion_mask"]) == {str(p) for p in (tmp_path / "masks").iterdir()}
    assert len(table) == 3


def test_phantom_is_written_and_preprocessed(consilium: Command, tmp_path: Path) -> None:
    tiny = [
        "federation.centres=[north]",
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
        "federation.phantom.image_size=64",
    ]
    settings = [word for setting in tiny for word in ("-s", setting)]
    status, out, _ = consilium("phantom", tmp_path / "data", *settings, *SMALL, "--workers", 1)
    assert (status, "north: 20 scans ready" in out) == (0, True)
    status, out, _ = consilium("preprocess", tmp_path / "data" / "north", *SMALL, "--workers", 1)
    assert (status, "20 of 20 scans are ready" in out) == (0, True)
    assert "federation 'folder' is not made up; use federation=phantom" in sentence(
        consilium("phantom", tmp_path / "x", "-s", "federation=folder", "-s", "federation.centres=[a]")
    )


def test_bad_input_is_refused_in_one_sentence(
    consilium: Command, folder: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("scan,path,split,covid\n")
    (tmp_path / "text").write_text("no model")
    scan = folder / "north-0000"
    ours = "is not a Consilium model"
    expected = [
        (["cohort", "gone"], "gone is not there; check the path"),
        (
            ["cohort", "empty"],
            "empty holds no scan; it must hold DICOM, NIfTI, folders of slices or pictures, or be a manifest",
        ),
        (
            ["cohort", folder, "--shares", 1, -1, 0],
            "val and test are (1.0, -1.0, 0.0); give three numbers, none below 0",
        ),
        (["cohort", folder, "--out", "text/cohort.csv"], "text cannot be used ("),
        (["preprocess", "gone.csv"], "centre 'this centre': its cohort table is not there"),
        (
            ["preprocess", "empty.csv"],
            "centre 'this centre': its cohort table is empty; it must hold at least one scan",
        ),
        (
            ["preprocess", folder.parent, "-s", "preprocess.image_sise=32"],
            "unknown key 'preprocess.image_sise'; did you mean 'image_size'?",
        ),
        (
            ["preprocess", folder.parent, "-s", "backbone=smal"],
            "backbone 'smal' is unknown; did you mean 'small'?",
        ),
        (
            ["preprocess", folder.parent, "-s", "recipe=multisorce"],
            "recipe 'multisorce' is unknown; did you mean 'multisource'?",
        ),
        (
            ["preprocess", folder.parent, "-s", "preprocess.image_size=4"],
            "preprocess.image_size is 4; it must be 16 to 1024 pixels",
        ),
        (
            ["preprocess", folder.parent, "--state", "text", *SMALL, "--workers", 1],
            "none of the 20 scans could be prepared",
        ),
        (["montage", "gone"], "gone does not exist"),
        (["montage", scan, "--out", "text/montage.png"], "the montage cannot be written to text/montage.png"),
        (
            ["predict", "gone.safetensors", folder],
            f"gone.safetensors {ours} (FileNotFoundError); use the model.safetensors of a run",
        ),
        (["predict", "text", folder], f"text {ours} (SafetensorError); use the model.safetensors of a run"),
        (
            ["predict", model, folder, "--sort", "covit"],
            "there is no column 'covit' to sort by; did you mean 'covid'?",
        ),
        (["predict", model, folder, "--masks", "m"], f"{model} draws no masks (covid); leave --masks out"),
        (
            ["predict", model, folder, "--personal", "empty"],
            "empty has no layers that a run was tested with (used.json: FileNot",
        ),
        (["predict", model, "empty"], "empty holds no scan that can be read"),
        (
            ["predict", model, folder, "--device", "gpu"],
            "unknown device 'gpu'; use auto, cpu, cuda or cuda:1",
        ),
        (["predict", model, scan, "--out", "text/predictions.csv"], "text cannot be used ("),
    ]
    for words, start in expected:
        assert start in sentence(consilium(*words)), words


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_device_is_refused(consilium: Command, folder: Path, model: Path) -> None:
    assert "this machine has no GPU" in sentence(consilium("predict", model, folder, "--device", "cuda"))


def test_help_does_not_import_pytorch() -> None:
    code = "import sys, client.cli; print({'torch', 'pandas', 'pydicom', 'hydra'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "set()"


def test_installed_command_shows_no_stack_trace(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "consilium-centre"
    ended = subprocess.run(
        [command, "cohort", "gone"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: gone is not there; check the path"
