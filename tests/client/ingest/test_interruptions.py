"""An ingest survives incomplete files, a kill at any moment, and hours of watching a folder."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.data.cohort import load_cohort
from client.ingest.folder_source import open_folder_source
from client.ingest.journal import Outcome
from client.ingest.pipeline import ingest_studies
from tests.client.ingest.planted_studies import (
    IMAGES_PER_CT,
    PROJECT_ROOT,
    SILENT,
    YEAR_2020,
    ingest_command_line,
    make_paths,
)
from tests.client.planted import find_signs


def test_files_are_ingested_once_they_are_complete(hospital: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "report.pdf").write_text("PLANTED")
    paths = make_paths(tmp_path)
    source = open_folder_source(inbox, 1.5)
    *other_images, last_image = sorted((hospital / "PLANTED^ct3").iterdir())
    for path in other_images:
        shutil.copyfile(path, inbox / path.name)
    summary = ingest_studies(source, YEAR_2020, paths, SILENT)
    assert summary.added == 0
    assert summary.notes == ["1 files that are damaged or not DICOM", "1 studies that are still arriving"]

    time.sleep(1.6)
    assert ingest_studies(source, YEAR_2020, paths, SILENT).added == 1
    (inbox / last_image.name).write_bytes(last_image.read_bytes()[:-100])  # half of the image has arrived
    time.sleep(1.6)
    summary = ingest_studies(source, YEAR_2020, paths, SILENT)
    assert summary.added == 1
    assert [item.reason for item in summary.skipped] == [
        "1 image(s) skipped: its pixel data is missing or incomplete"
    ]
    shutil.copyfile(last_image, inbox / last_image.name)
    time.sleep(1.6)
    assert ingest_studies(source, YEAR_2020, paths, SILENT).added == 1
    assert len(load_cohort(paths.cohort_table, "north")) == 1
    assert len(list(paths.dicom_dir.rglob("*.dcm"))) == IMAGES_PER_CT


@pytest.mark.parametrize("protocol", ["web", "folder"])
def test_killed_ingest_is_completed_by_the_next(
    protocol: str, request: pytest.FixtureRequest, hospital: Path, tmp_path: Path
) -> None:
    """Kill it while a study arrives, and again after one is done; that one is not fetched again."""
    source = hospital if protocol == "folder" else request.getfixturevalue("archive").web
    paths = make_paths(tmp_path)
    site_file = tmp_path / "site.yaml"
    site_file.write_text(
        f"centre: north\ndata: {tmp_path / 'data'}\nstate: {tmp_path / 'state'}\npacs: {source}\n"
    )
    command = ingest_command_line("--site", site_file, "--since", "2020-01-01", "--quiet", 0)
    _kill_when(lambda: any(paths.incoming_dir.glob("*/*/*.dcm")), command)
    _kill_when(lambda: _has_ingested(paths.ingest_dir), command)

    last = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    table = load_cohort(paths.cohort_table, "north")
    assert len(table) == table["scan"].nunique() == 4
    assert " 0 failed" in last.stdout
    assert " 0 already present" not in last.stdout
    assert len(list(paths.dicom_dir.rglob("*.dcm"))) == 3 * IMAGES_PER_CT + 1
    assert not list(paths.incoming_dir.iterdir())
    assert "PLANTED" not in last.stdout + last.stderr
    assert find_signs(tmp_path) == []


def _has_ingested(folder: Path) -> bool:
    """Return whether the journal has the complete line of a study that was ingested."""
    journal = folder / "journal.jsonl"
    if not journal.exists():
        return False
    lines = journal.read_text().splitlines(keepends=True)
    return any(Outcome.INGESTED.value in line and line.endswith("\n") for line in lines)


def _kill_when(condition: Callable[[], bool], command: list[str]) -> None:
    """Run a command and kill it as soon as the condition holds."""
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not condition():
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def test_watching_continues_until_it_is_stopped(hospital: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    table = tmp_path / "data" / "cohort.csv"
    command = ingest_command_line(
        inbox, "--data", tmp_path / "data", "--watch", "--every", 0.2, "--quiet", 0.5
    )
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for num_studies, study in enumerate(("PLANTED^ct1", "PLANTED^ct2"), start=1):
            shutil.copytree(hospital / study, inbox / study)
            _wait_for_rows(table, num_studies, process)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped; studies ingested so far are kept" in output
    assert "PLANTED" not in output


def _wait_for_rows(table: Path, num_rows: int, process: subprocess.Popen[str]) -> None:
    """Wait until the table has as many rows, while the process runs."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if table.exists() and len(load_cohort(table, "north")) == num_rows:
            return
        assert process.poll() is None
        time.sleep(0.1)
    pytest.fail(f"the cohort table did not reach {num_rows} rows")
