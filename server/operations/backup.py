"""Back up results and ledger in one file, and restore them.

A coordinator whose machine is lost goes on at another.

A run may be in progress meanwhile. Each file that a run needs later is put under its name whole
(common/utils/atomic_files.py), so that hard links to all of them are the folder as it was; the ledger is read
after them, so that it lacks none of their rounds. The file is a plain tar, which `tar xf` and `sha256sum -c
SHA256SUMS` open and check without this program. Its `ledger.db` is SQLite, whatever database it came from.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from common.utils.atomic_files import atomic_path, hash_file
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.ledger.migration import has_old_form
from server.run import checkpoint
from server.run.broadcast import RESIDUAL_FILE

CHECKSUMS_FILE = "SHA256SUMS"
LEDGER_FILE = "ledger.db"
RUNS_FOLDER = "runs"
# What belongs to a round in progress, and the ledger itself.
IGNORED_FILES = shutil.ignore_patterns(".*", "*.part", "spool", RESIDUAL_FILE, f"{LEDGER_FILE}*")
MAX_ATTEMPTS = 5  # to link the folder between two checkpoints


class ResumePoint(NamedTuple):
    """Where an unfinished run stands."""

    sentence: str
    is_intact: bool  # its newest checkpoint is whole


def write_backup(file: Path, runs: Path, ledger: Ledger) -> Iterator[str]:
    """Write results and ledger to `file` (`-`: standard output), whole or not at all.

    Yields a sentence for each run that is not finished, then one for everything.

    Raises:
        ConsiliumError: the file lies in the results, the ledger is another's, or something cannot be read or
        written.
    """
    if file.resolve().is_relative_to(runs):
        raise ConsiliumError(
            f"{file} lies inside {runs}, which is backed up; use a path outside, best on another disk"
        )
    ledger_ids = {row["id"] for row in ledger.read_runs()}
    folder_ids = {folder.name for folder in list_run_folders(runs)}
    if not folder_ids & ledger_ids:
        raise ConsiliumError(
            f"the ledger {ledger.address} knows no run in {runs}; name both with --runs and --ledger, "
            "or with $CONSILIUM_RUNS and $CONSILIUM_LEDGER"
        )
    # Inside the results' folder, because hard links do not cross file systems.
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=runs) as temporary:
        work = Path(temporary)
        sentences = link_runs(runs, work / RUNS_FOLDER)
        num_rows = _copy_ledger_to_file(ledger, work / LEDGER_FILE)
        files = sorted(path for path in work.rglob("*") if path.is_file() and not path.is_symlink())
        (work / CHECKSUMS_FILE).write_text(_format_checksums(files, work))
        with open_backup_output(file) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for name in (CHECKSUMS_FILE, LEDGER_FILE, RUNS_FOLDER):
                tar.add(work / name, name)
        megabytes = sum(path.stat().st_size for path in files) / 1e6
    yield from sentences
    yield f"{len(list_run_folders(runs))} runs and {num_rows} rows of the ledger, {megabytes:.0f} MB"


def restore_backup(file: Path, runs: Path, ledger: Ledger) -> Iterator[str]:
    """Restore a back-up (`-`: standard input) into an empty folder and an empty ledger.

    Every file's checksum is verified first. Yields a sentence for each run that is not finished, then one for
    everything.

    Raises:
        ConsiliumError: the folder or ledger holds runs, or the back-up is damaged or of 0.1.0; then nothing
            is changed.
    """
    existing = [folder.name for folder in list_run_folders(runs)]
    existing += [row["id"] for row in ledger.read_runs()]
    if existing:
        raise ConsiliumError(
            f"{runs} or the ledger {ledger.address} already holds runs ({existing[0]}); "
            "use an empty folder and a new ledger"
        )
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=runs) as temporary:
        work = Path(temporary)
        try:
            _extract_and_verify(file, work)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ConsiliumError(f"{file} is not an intact back-up ({error}); use another one") from error
        sentences = [describe_run(folder).sentence for folder in list_unfinished_runs(work / RUNS_FOLDER)]
        ledger_address = f"sqlite:///{work / LEDGER_FILE}"
        if has_old_form(ledger_address):
            raise ConsiliumError(
                f"{file} was written by version 0.1.0; unpack it with tar, and run `consilium-server upgrade "
                f"{RUNS_FOLDER} --ledger sqlite:///{LEDGER_FILE} --to ADDRESS`"
            )
        copy = Ledger(ledger_address)
        for path in (work / RUNS_FOLDER).iterdir():
            path.rename(runs / path.name)
        num_rows = copy.copy_to(ledger)
        copy.close()
    yield from sentences
    yield f"{len(list_run_folders(runs))} runs and {num_rows} rows of the ledger"


def link_runs(runs: Path, target: Path) -> list[str]:
    """Hard-link the results into `target`; returns a sentence for each run that is not finished.

    A checkpoint that was replaced between two links looks damaged; then all links are made again.
    """
    resume_points: list[ResumePoint] = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        is_last = attempt == MAX_ATTEMPTS
        shutil.rmtree(target, ignore_errors=True)
        try:
            shutil.copytree(runs, target, symlinks=True, ignore=IGNORED_FILES, copy_function=os.link)
        except shutil.Error as error:
            if is_last:
                cause = error.args[0][0][2]
                raise ConsiliumError(
                    f"{runs} cannot be backed up ({cause}); check which other program writes there"
                ) from error
            continue
        resume_points = [describe_run(folder) for folder in list_unfinished_runs(target)]
        if all(point.is_intact for point in resume_points):
            break
    return [point.sentence for point in resume_points]


def list_run_folders(runs: Path) -> list[Path]:
    """Return the folders of runs."""
    return sorted(path.parent for path in runs.glob("*/config.yaml") if not path.parent.is_symlink())


def list_unfinished_runs(runs: Path) -> list[Path]:
    """Return the folders of runs that may be resumed."""
    return [folder for folder in list_run_folders(runs) if not (folder / "metrics.json").exists()]


def describe_run(folder: Path) -> ResumePoint:
    """Return where an unfinished run stands, and whether its newest checkpoint is intact."""
    try:
        latest = checkpoint.load_latest(folder)
    except checkpoint.OldCheckpointError:
        return ResumePoint(f"run {folder.name}: only version 0.1.0, which began it, can finish it", True)
    except ConsiliumError:
        return ResumePoint(f"run {folder.name}: no checkpoint is intact; it cannot be resumed", False)
    if latest is None:
        return ResumePoint(f"run {folder.name}: no round is finished yet", True)
    sentence = f"run {folder.name}: can be resumed after round {latest.round} of stage '{latest.stage}'"
    return ResumePoint(sentence, not latest.recovery_note)


@contextmanager
def open_backup_output(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that only its owner may read and that appears when it is whole; or standard output.

    Raises:
        ConsiliumError: it cannot be written.
    """
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with atomic_path(file) as part, open(part, "xb", opener=_open_private) as stream:
            yield stream
    except OSError as error:
        raise ConsiliumError(
            f"{file} cannot be written ({error.strerror}); use a path with free space"
        ) from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy_ledger_to_file(ledger: Ledger, path: Path) -> int:
    """Copy a ledger into a SQLite file; returns the number of rows."""
    copy = Ledger(f"sqlite:///{path}")
    num_rows = ledger.copy_to(copy)
    copy.close()
    return num_rows


def _format_checksums(files: list[Path], base: Path) -> str:
    """Return the files' checksums in the format of `sha256sum`."""
    lines = [f"{hash_file(path)}  {path.relative_to(base)}\n" for path in files]
    return "".join(lines)


def _extract_and_verify(file: Path, target: Path) -> None:
    """Extract a back-up and verify its checksums. Raises OSError, TarError or ValueError."""
    if str(file) == "-":
        _extract(sys.stdin.buffer, target)
    else:
        with file.open("rb") as stream:
            _extract(stream, target)
    for line in (target / CHECKSUMS_FILE).read_text().splitlines():
        expected, _, name = line.partition("  ")
        if hash_file(target / name) != expected:
            raise ValueError(f"checksum of {name}")


def _extract(stream: IO[bytes], target: Path) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(target, filter="data")
