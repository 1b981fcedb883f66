"""The whole thing through real processes: SuperLink, Ray, `flwr run`, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from server.rounds.run_lifecycle import open_ledger

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
    "stage.local_epochs=1",
]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("simulation")]  # one at a time: each takes all cores


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "consilium-server"), *arguments]


def draw_phantom(folder: Path) -> None:
    """Draw the made-up hospitals that a simulation of TINY reads."""
    settings = [part for override in TINY for part in ("-s", override)]
    tool = str(Path(sys.executable).parent / "consilium-centre")
    subprocess.run([tool, "phantom", *settings, "--no-prepare"], env=environment(folder), check=True)


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "CONSILIUM_DATA": str(folder / "data"),
        "CONSILIUM_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
    }


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that were started below this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"CONSILIUM_DATA={folder / 'data'}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def test_simulate_killed_and_resumed(tmp_path: Path) -> None:
    """`simulate` to the end from a folder with a decoy app.

    Another, its whole session killed by kill -9 in a round, resumed to equal weights.
    """
    decoy = tmp_path / "work" / "client"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('the working directory was imported')")
    draw_phantom(tmp_path)
    begin = command("simulate", *TINY, "stage.rounds=3")
    whole = subprocess.run(
        begin, cwd=tmp_path / "work", env=environment(tmp_path), capture_output=True, text=True, timeout=240
    )
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "south" in whole.stdout
    assert left_running(tmp_path) == []
    (first,) = (tmp_path / "runs").glob("*-federated-*/metrics.json")
    assert json.loads(first.read_text())["status"] == "finished"

    process = subprocess.Popen(
        begin, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 180
    while not (
        killed := [
            p.parent.parent
            for p in (tmp_path / "runs").glob("*/checkpoints/main-00001.json")
            if p.parents[1].name != "latest" and p.parents[1] != first.parent
        ]
    ):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    for entry in Path(
        "/proc"
    ).iterdir():  # SuperLink, ServerApp, Ray, clients, the command itself: all at once
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"CONSILIUM_DATA={tmp_path / 'data'}".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue
    process.wait()
    run = killed[0].resolve().name
    assert not (killed[0] / "metrics.json").exists()
    resumed = subprocess.run(
        command("resume", run),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    ours, theirs = load_file(killed[0] / "model.safetensors"), load_file(first.parent / "model.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    kinds = [e["kind"] for e in open_ledger(tmp_path / "runs").read_events(run)]
    assert kinds == ["started", "resumed", "finished"]


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    """The server's own failure.

    Exit status 2, one sentence, no stack trace, nothing left running. `flwr run` itself would say 0.
    """
    missing = command(
        "simulate",
        "federation=folder",
        f"federation.data_root={tmp_path}",
        "federation.centres=[alpha]",
        "federation.join_timeout=5",
    )
    failed = subprocess.run(
        missing, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=240
    )
    assert failed.returncode == 2
    assert "centre 'alpha' has no data: federation.data_root/alpha does not exist" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr
    assert left_running(tmp_path) == []


def test_a_wrong_setting_is_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    wrong = subprocess.run(
        command("simulate", "backbone.name=resnet_18"),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert (
        wrong.stderr.strip()
        == "error: backbone.name 'resnet_18' is not a timm model; did you mean 'resnet18'?"
    )
    assert time.monotonic() - began < 60
    assert left_running(tmp_path) == []
