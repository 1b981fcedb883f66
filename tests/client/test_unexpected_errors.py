"""An unexpected error is one sentence: no text, variable, warning or log line about a patient is printed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pydicom
import pytest

from client.phantom.federation import write_centre
from common.config.schema import PhantomConfig
from tests.client.failing_commands import CLIENT_COMMANDS, SECRETS, SERVER_COMMANDS

ROOT = Path(__file__).parents[2]


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONSILIUM_ERROR_DIR": str(folder / "errors")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("side", "commands"), [("client", CLIENT_COMMANDS), ("server", SERVER_COMMANDS)])
def test_command_that_fails_unexpectedly_prints_no_value(
    side: str, commands: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "site.yaml").write_text("centre: north\ndata: scans\n")
    ended = run_python(tmp_path, "-m", "tests.client.failing_commands", side, str(tmp_path))
    for words in commands:
        assert f"exit {words} 70" in ended.stdout.splitlines(), ended.stdout + ended.stderr
    reports = [path.read_text() for path in (tmp_path / "errors").iterdir()]
    for text in (ended.stdout, ended.stderr, *reports):
        for secret in SECRETS:
            assert secret not in text
    assert "Traceback" not in ended.stderr
    sentences = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(commands) + (side == "client")
    place = "unexpected KeyError in failing_commands.fail_with_secrets, line"
    assert sum(place in line for line in sentences) == len(commands)
    assert sum("fail_with_secrets" in report and "ValueError" in report for report in reports) >= len(
        commands
    )
    assert len(reports) >= len(sentences)
    assert "UserWarning in client/failing_commands.py" in ended.stderr
    assert ended.stderr.count("WARNING of pydicom (text withheld") >= len(commands)
    if side == "client":
        assert "error in a thread: unexpected KeyError" in ended.stderr
        assert "error in a destructor: KeyError" in ended.stderr
        assert ended.returncode == 1


def test_odd_values_of_dicom_headers_are_not_printed(tmp_path: Path) -> None:
    """pydicom's warnings quote the value that they are about."""
    patient, name, accession = SECRETS
    centre = write_centre(
        tmp_path / "data", "north", PhantomConfig(scale=0.001, num_slices=10, image_size=64)
    )
    (tmp_path / "scans").mkdir()
    (centre / "dicom" / "north-0000").rename(tmp_path / "scans" / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the values planted here
        for path in (tmp_path / "scans" / "a").iterdir():
            dataset = pydicom.dcmread(path)
            dataset.add_new("FrameOfReferenceUID", "UI", f"{patient} {name}")
            dataset.add_new("PatientBirthDate", "DA", patient)
            dataset.add_new("AccessionNumber", "SH", accession * 4)
            dataset.save_as(path)
    call = "from client.cli import main; main()"
    ended = run_python(tmp_path, "-c", call, "cohort", "scans")
    assert ended.returncode == 0, ended.stderr
    ended_too = run_python(
        tmp_path, "-c", call, "preprocess", ".", "--workers", "2", "-s", "preprocess.image_size=32"
    )
    for secret in SECRETS:
        for text in (ended.stdout, ended.stderr, ended_too.stdout, ended_too.stderr):
            assert secret not in text


def test_interruption_and_closed_output_print_no_stack(tmp_path: Path) -> None:
    interrupted = run_python(
        tmp_path,
        "-c",
        "import client.site.policy as policy\n"
        "def interrupt(_): raise KeyboardInterrupt\n"
        "policy.load_policy = interrupt\n"
        "import sys; sys.argv = ['consilium-centre', 'policy', 'x']\n"
        "from client.cli import main; main()",
    )
    assert interrupted.returncode not in (0, 70)
    assert "Traceback" not in interrupted.stderr
    closed = run_python(
        tmp_path,
        "-c",
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.argv = ['consilium-centre', '--help']\n"
        "from client.cli import main; main()",
    )
    assert "Traceback" not in closed.stderr
    assert "defect" not in closed.stderr
