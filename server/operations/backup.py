"""Results and ledger in one file, and back: what makes a coordinator whose machine is lost go on at another.

A run may be on meanwhile. Each file that a run needs later is put under its name whole (common/utils/atomic_files.py), so that hard links to all of them are the
folder as it was; the ledger is read after them, so that it lacks no round of theirs. The file is a plain tar: `tar xf` and `sha256sum -c SHA256SUMS`
open and check it without us. `ledger.db` in it is SQLite, whatever database it came from.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from common.utils.atomic_files import atomic_path, hash_file
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.run import checkpoint
from server.run.broadcast import RESIDUAL_FILE

CHECKSUMS_FILE, LEDGER_FILE, RUNS_FOLDER = "SHA256SUMS", "ledger.db", "runs"
IGNORED_FILES = shutil.ignore_patterns(
    ".*", "*.part", "spool", RESIDUAL_FILE, f"{LEDGER_FILE}*"
)  # of a round that is on, and the ledger itself
MAX_ATTEMPTS = 5  # to find the folder between two checkpoints


def write_backup(file: Path, runs: Path, ledger: Ledger) -> Iterator[str]:
    """Write everything to `file` (`-`: standard output), whole or not at all; yields a sentence for each run that is not finished, then one for
    all. Raises ConsiliumError."""
    if file.resolve().is_relative_to(runs):
        raise ConsiliumError(
            f"{file} lies in what is backed up; give a place outside of {runs}, best on another disk"
        )
    if not {folder.name for folder in list_run_folders(runs)} & {row["id"] for row in ledger.read_runs()}:
        raise ConsiliumError(
            f"the ledger {ledger.address} knows no run in {runs}; name both by --runs and --ledger, or $CONSILIUM_RUNS and _LEDGER"
        )
    with tempfile.TemporaryDirectory(
        prefix=".backup-", dir=runs
    ) as made:  # beside it: hard links do not cross file systems
        place = Path(made)
        sentences = link_runs(runs, place / RUNS_FOLDER)
        copy = Ledger(f"sqlite:///{place / LEDGER_FILE}")
        rows = ledger.copy_to(copy)
        copy.close()
        files = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        (place / CHECKSUMS_FILE).write_text(
            "".join(f"{hash_file(path)}  {path.relative_to(place)}\n" for path in files)
        )
        with open_backup_output(file) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for name in (CHECKSUMS_FILE, LEDGER_FILE, RUNS_FOLDER):
                tar.add(place / name, name)
        size = sum(path.stat().st_size for path in files) / 1e6
    yield from sentences
    yield f"{len(list_run_folders(runs))} runs and {rows} rows of the ledger, {size:.0f} MB"


def restore_backup(file: Path, runs: Path, ledger: Ledger) -> Iterator[str]:
    """Put what `backup` wrote (`-`: standard input) into an empty folder and an empty ledger, after each file's checksum was found good; yields
    as it does. Raises ConsiliumError, and nothing is changed."""
    if there := [
        *(folder.name for folder in list_run_folders(runs)),
        *(row["id"] for row in ledger.read_runs()),
    ]:
        raise ConsiliumError(
            f"{runs} or the ledger {ledger.address} holds runs already ({there[0]}); give an empty folder and a new ledger"
        )
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=runs) as made:
        place = Path(made)
        try:
            with (
                nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as stream,
                tarfile.open(fileobj=stream, mode="r|") as tar,
            ):
                tar.extractall(place, filter="data")
            for line in (place / CHECKSUMS_FILE).read_text().splitlines():
                wanted, _, name = line.partition("  ")
                if hash_file(place / name) != wanted:
                    raise ValueError(name)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ConsiliumError(
                f"{file} is no whole back-up of a coordinator ({error}); take another"
            ) from error
        sentences = [describe_run(folder)[0] for folder in list_unfinished_runs(place / RUNS_FOLDER)]
        copy = Ledger(f"sqlite:///{place / LEDGER_FILE}")
        for path in (place / RUNS_FOLDER).iterdir():
            path.rename(runs / path.name)
        rows = copy.copy_to(ledger)
        copy.close()
    yield from sentences
    yield f"{len(list_run_folders(runs))} runs and {rows} rows of the ledger"


def link_runs(runs: Path, target: Path) -> list[str]:
    """The runs' folder as hard links; returns what is to be said of each run that is not finished. A checkpoint that was replaced between two links
    shows as a damaged one, and all is done again."""
    for left in reversed(range(MAX_ATTEMPTS)):
        shutil.rmtree(target, ignore_errors=True)
        try:
            shutil.copytree(runs, target, symlinks=True, ignore=IGNORED_FILES, copy_function=os.link)
        except shutil.Error as error:
            if not left:
                raise ConsiliumError(
                    f"{runs} cannot be backed up ({error.args[0][0][2]}); see who else writes there"
                ) from error
            continue
        found = [describe_run(folder) for folder in list_unfinished_runs(target)]
        if not left or all(whole for _, whole in found):
            break
    return [sentence for sentence, _ in found]


def list_run_folders(runs: Path) -> list[Path]:
    """Folders of runs."""
    return sorted(path.parent for path in runs.glob("*/config.yaml") if not path.parent.is_symlink())


def list_unfinished_runs(runs: Path) -> list[Path]:
    """Folders of runs that may be resumed."""
    return [folder for folder in list_run_folders(runs) if not (folder / "metrics.json").exists()]


def describe_run(folder: Path) -> tuple[str, bool]:
    """Where a run stands, in words, and whether its newest checkpoint is whole."""
    try:
        last = checkpoint.load_latest(folder)
    except ConsiliumError:
        return f"run {folder.name}: none of its checkpoints is whole; it cannot be resumed", False
    if last is None:
        return f"run {folder.name}: no round closed yet", True
    return (
        f"run {folder.name}: to be resumed after round {last.round} of stage '{last.stage}'",
        not last.recovery_note,
    )


@contextmanager
def open_backup_output(file: Path) -> Iterator[IO[bytes]]:
    """A stream to a file that only its owner may read, there when it is whole; or standard output. Raises ConsiliumError."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with (
            atomic_path(file) as part,
            open(part, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream,
        ):
            yield stream
    except OSError as error:
        raise ConsiliumError(
            f"{file} cannot be written ({error.strerror}); give a place with room"
        ) from error
