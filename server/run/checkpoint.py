"""A run's state after a round, on disk: killing the coordinator costs at most the round in progress.

``checkpoints/<stage>-<round>.safetensors`` holds the weights, ``.optimiser.safetensors`` the server
optimiser's arrays, ``.json`` the result without its rounds, and the checksums of both. The JSON is written
last: a checkpoint exists only when it is complete. The newest two are kept, and the best round of each, so
that going back by one always finds its best. The records of the rounds lie beside them, one a file
(``checkpoints/history/<number>.json``), so that the thousandth round writes no more than the first; a
checkpoint says how many of them it includes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.utils.atomic_files import atomic_path, atomic_write, hash_file
from common.utils.errors import ConsiliumError
from server.run.records import BestRound, RoundRecord, RunResult, parse_result, parse_round, result_to_dict

Arrays = dict[str, NDArray[Any]]

WEIGHTS_SUFFIX = ".safetensors"
OPTIMISER_SUFFIX = ".optimiser.safetensors"
HEADER_SUFFIX = ".json"
CHECKPOINTS_KEPT = 2


@dataclass
class Checkpoint:
    """Everything a run needs to continue after a round as if it had never stopped."""

    stage: str
    round: int
    weights: Arrays
    result: RunResult
    optimiser_state: Arrays = field(default_factory=dict)
    recovery_note: str = ""  # set by `load_latest`: why this is not the newest checkpoint


@dataclass
class CheckpointHeader:
    """A checkpoint's JSON file."""

    number: int  # counts checkpoints in the order of writing
    stage: str
    round: int
    checksums: dict[str, str]  # {suffix of a file of arrays: its SHA-256}
    rounds_by_stage: list[int]  # how many rounds of each stage the history holds
    best: BestRound | None  # the round whose weights this checkpoint still needs
    result: dict[str, Any]  # a RunResult without its rounds

    @property
    def num_rounds(self) -> int:
        """The number of records of rounds that belong to the checkpoint."""
        return sum(self.rounds_by_stage)


class OldCheckpointError(ConsiliumError):
    """The checkpoints were written by version 0.1.0."""


_HEADER_ADAPTER = TypeAdapter(CheckpointHeader)


def weights_path(run_dir: Path, stage: str, round_number: int) -> Path:
    """Return where the weights after a round lie, if they are kept."""
    return Path(run_dir) / "checkpoints" / f"{quote(stage, safe='')}-{round_number:05d}{WEIGHTS_SUFFIX}"


# --- writing


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write the state, all of it or none, and remove what is no longer needed.

    Returns the path of the weights. Raises ConsiliumError when the folder cannot be written.
    """
    path = weights_path(run_dir, checkpoint.stage, checkpoint.round)
    try:
        (path.parent / "history").mkdir(parents=True, exist_ok=True)
        _write_files(path, checkpoint)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", error)
        raise ConsiliumError(f"the checkpoint cannot be written to {path.parent}: {reason}") from error
    return path


def _write_files(path: Path, checkpoint: Checkpoint) -> None:
    folder = path.parent
    name = path.name.removesuffix(WEIGHTS_SUFFIX)
    headers = _read_headers(folder)
    old_header = headers.get(name)
    checksums = {
        WEIGHTS_SUFFIX: _write_arrays(folder, name, WEIGHTS_SUFFIX, checkpoint.weights, old_header),
        OPTIMISER_SUFFIX: _write_arrays(
            folder, name, OPTIMISER_SUFFIX, checkpoint.optimiser_state, old_header
        ),
    }
    newest = max(headers.values(), key=lambda header: header.number, default=None)
    rounds = list(itertools.chain.from_iterable(stage.rounds for stage in checkpoint.result.stages))
    _write_history(folder, rounds, newest.num_rounds if newest else 0)
    header = _make_header(checkpoint, checksums, newest.number + 1 if newest else 1)
    atomic_write(folder / f"{name}{HEADER_SUFFIX}", json.dumps(dataclasses.asdict(header)).encode())
    _remove_stale_files(folder, {**headers, name: header})


def _write_arrays(
    folder: Path, name: str, suffix: str, arrays: Arrays, old_header: CheckpointHeader | None
) -> str:
    """Write arrays and return their checksum; remove a header of the same round that vouches for others."""
    with atomic_path(folder / f"{name}{suffix}") as part:  # not in memory first: they are a model's size
        save_file({key: np.asarray(value, order="C") for key, value in arrays.items()}, part)
        checksum = hash_file(part)
        if old_header and old_header.checksums[suffix] != checksum:
            (folder / f"{name}{HEADER_SUFFIX}").unlink(missing_ok=True)
    return checksum


def _write_history(folder: Path, rounds: list[RoundRecord], num_written: int) -> None:
    """Write the records of new rounds, and always the last one, because its round may have been repeated."""
    first = max(0, min(num_written, len(rounds) - 1))
    for number in range(first, len(rounds)):
        values = dataclasses.asdict(rounds[number])
        atomic_write(_history_path(folder, number), json.dumps(values).encode())


def _make_header(checkpoint: Checkpoint, checksums: dict[str, str], number: int) -> CheckpointHeader:
    stages = checkpoint.result.stages
    without_rounds = replace(checkpoint.result, stages=[replace(stage, rounds=[]) for stage in stages])
    return CheckpointHeader(
        number=number,
        stage=checkpoint.stage,
        round=checkpoint.round,
        checksums=checksums,
        rounds_by_stage=[len(stage.rounds) for stage in stages],
        best=stages[-1].best if stages else None,
        result=result_to_dict(without_rounds),
    )


def _remove_stale_files(folder: Path, headers: Mapping[str, CheckpointHeader]) -> None:
    """Remove all but the newest checkpoints and their best rounds, and what a killed write left."""
    newest = sorted(headers, key=lambda name: headers[name].number, reverse=True)[:CHECKPOINTS_KEPT]
    needed = set(newest)
    for name in newest:
        best = headers[name].best
        if best:
            best_path = weights_path(folder.parent, best.stage, best.round)
            needed.add(best_path.name.removesuffix(WEIGHTS_SUFFIX))
    # The JSON first: a checkpoint that is half removed must not look complete.
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != HEADER_SUFFIX):
        file_name = re.sub(r"\.\d+\.part$", "", path.name)
        is_part = file_name != path.name  # left by a killed write
        is_ours = file_name.endswith((HEADER_SUFFIX, WEIGHTS_SUFFIX))
        if is_ours and (is_part or _checkpoint_name(file_name) not in needed):
            path.unlink(missing_ok=True)


def _checkpoint_name(file_name: str) -> str:
    """Return the name of the checkpoint that a file belongs to."""
    return file_name.removesuffix(HEADER_SUFFIX).removesuffix(OPTIMISER_SUFFIX).removesuffix(WEIGHTS_SUFFIX)


# --- reading


def load_latest(run_dir: Path) -> Checkpoint | None:
    """Return the newest complete state; None where the run has none yet.

    A checkpoint whose files do not match their checksums is skipped, and `recovery_note` says so. Raises
    ConsiliumError where no intact one is left, because starting from scratch is for a person to decide, and
    OldCheckpointError for those of 0.1.0.
    """
    folder = Path(run_dir) / "checkpoints"
    headers = _read_headers(folder)
    damaged: list[str] = []
    for name in sorted(headers, key=lambda name: headers[name].number, reverse=True):
        try:
            checkpoint = _load_checkpoint(folder, name, headers[name])
        except (OSError, SafetensorError, ValueError, KeyError):
            damaged.append(name)
            continue
        if damaged:
            checkpoint.recovery_note = f"checkpoint {' and '.join(damaged)} is damaged; resumed from {name}"
        return checkpoint
    if damaged:
        raise ConsiliumError(
            f"no checkpoint in {folder} is intact (damaged: {', '.join(damaged)}); "
            "restore the folder or start a new run"
        )
    return None


def _load_checkpoint(folder: Path, name: str, header: CheckpointHeader) -> Checkpoint:
    """Load a checkpoint. Raises OSError, SafetensorError, ValueError or KeyError for a damaged file."""
    weights = _load_verified(folder / f"{name}{WEIGHTS_SUFFIX}", header.checksums[WEIGHTS_SUFFIX])
    optimiser = _load_verified(folder / f"{name}{OPTIMISER_SUFFIX}", header.checksums[OPTIMISER_SUFFIX])
    result = parse_result(header.result)
    rounds = iter(_read_history(folder, header.num_rounds))
    for stage, num_rounds in zip(result.stages, header.rounds_by_stage, strict=True):
        stage.rounds = list(itertools.islice(rounds, num_rounds))
    return Checkpoint(header.stage, header.round, weights, result, optimiser)


def load_weights(path: Path) -> Arrays:
    """Return the arrays of a safetensors file by name. Raises ConsiliumError."""
    try:
        return load_file(path)
    except OSError as error:
        raise ConsiliumError(f"the weights {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConsiliumError(f"the weights {path} are not an intact safetensors file: {error}") from error


def _read_headers(folder: Path) -> dict[str, CheckpointHeader]:
    """Return {checkpoint's name: header}; a file that cannot be parsed is skipped.

    Raises OldCheckpointError for one of 0.1.0: without it, its run would start from scratch.
    """
    headers = {}
    for path in folder.glob(f"*{HEADER_SUFFIX}"):
        try:
            values = json.loads(path.read_bytes())
            headers[path.stem] = _HEADER_ADAPTER.validate_python(values)
        except ValidationError:
            if "facts" in values and "sha256" in values:
                raise OldCheckpointError(
                    f"the checkpoints of run '{folder.parent.name}' were written by version 0.1.0, "
                    "and only that version can finish the run"
                ) from None
        except (OSError, ValueError):
            continue
    return headers


def _read_history(folder: Path, num_rounds: int) -> list[RoundRecord]:
    return [parse_round(json.loads(_history_path(folder, k).read_bytes())) for k in range(num_rounds)]


def _history_path(folder: Path, number: int) -> Path:
    return folder / "history" / f"{number:06d}.json"


def _load_verified(path: Path, sha256: str) -> Arrays:
    if hash_file(path) != sha256:
        raise ValueError("checksum")
    return load_file(path)
