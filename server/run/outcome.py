"""How a submitted run ended: written where it ends, read by the command or console that started it.

Flower reports success for an application that failed, and a command that follows a run sees its log only. The
outcome is a file beside the run's folder, so that nobody has to read a log line to learn whether a run
failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended."""

    succeeded: bool
    reason: str = ""  # one sentence, where it did not succeed


def outcome_path(runs_dir: Path, run_id: str) -> Path:
    """Return where a run's outcome lies."""
    return runs_dir / f"{run_id}.outcome.json"


def clear_outcome(runs_dir: Path, run_id: str) -> None:
    """Remove the outcome of an earlier process of the run."""
    outcome_path(runs_dir, run_id).unlink(missing_ok=True)


def write_outcome(runs_dir: Path, run_id: str, outcome: Outcome) -> None:
    """Write how the run's process ended."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(outcome_path(runs_dir, run_id), json.dumps(asdict(outcome)).encode())


def read_outcome(runs_dir: Path, run_id: str) -> Outcome | None:
    """Return how the run's last process ended; None while it goes on, or where it was killed."""
    try:
        return Outcome(**json.loads(outcome_path(runs_dir, run_id).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def record_outcome(runs_dir: Path, run_id: str) -> Iterator[None]:
    """Write how the block ended: a success, or the sentence of the error that left it."""
    try:
        yield
    except ConsiliumError as error:
        write_outcome(runs_dir, run_id, Outcome(False, str(error)))
        raise
    except Exception as error:
        write_outcome(
            runs_dir, run_id, Outcome(False, f"{type(error).__name__}; the coordinator's log has the details")
        )
        raise
    write_outcome(runs_dir, run_id, Outcome(True))


@contextmanager
def record_failure(runs_dir: Path, run_id: str) -> Iterator[None]:
    """Write the error that kept a run from being started, unless its process wrote an outcome."""
    try:
        yield
    except ConsiliumError as error:
        if read_outcome(runs_dir, run_id) is None:
            write_outcome(runs_dir, run_id, Outcome(False, str(error)))
        raise
