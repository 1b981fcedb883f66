"""A run's state after a round, on disk, so that killing the coordinator at any moment costs at most the round it was in.

``checkpoints/<stage>-<round>.safetensors`` holds the weights, ``.optimiser.safetensors`` the server optimiser's arrays, ``.json`` the rest
and the checksums of both. The JSON is written last: a checkpoint exists only when it is complete. The newest two are kept, and the best of
each, so that going back by one never finds its best gone. What the run has been through lies beside them, an entry a file
(``checkpoints/history/<number>.json``), so that the thousandth round writes no more than the first; a checkpoint says how many entries are its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.utils.atomic_files import atomic_path, atomic_write, hash_file
from common.utils.errors import ConsiliumError

Arrays = dict[str, NDArray[Any]]

WEIGHTS_SUFFIX, OPTIMISER_SUFFIX = ".safetensors", ".optimiser.safetensors"
CHECKPOINTS_KEPT = 2


@dataclass
class Checkpoint:
    """Everything a run needs to go on after `round` of `stage` as if it had never stopped."""

    stage: str
    round: int
    weights: Arrays
    optimiser_state: Arrays = field(default_factory=dict)
    metadata: dict[str, Any] = field(
        default_factory=dict
    )  # JSON: finished stages, random state, "best": {"stage", "round", "value"}
    history: list[Any] = field(default_factory=list)  # JSON, only ever added to, at most one entry a save
    recovery_note: str = ""  # of `load_latest`: why this is not the newest


def weights_path(run_dir: Path, stage: str, round_number: int) -> Path:
    """Where the weights after this round lie, if they are kept."""
    return Path(run_dir) / "checkpoints" / f"{quote(stage, safe='')}-{round_number:05d}{WEIGHTS_SUFFIX}"


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Writes the state, whole or not at all, removes what is no longer kept, returns the weights' path. Raises ConsiliumError."""
    weights = weights_path(run_dir, checkpoint.stage, checkpoint.round)
    folder, name = weights.parent, weights.name.removesuffix(WEIGHTS_SUFFIX)
    try:
        (folder / "history").mkdir(parents=True, exist_ok=True)
        known = _read_headers(folder)
        sums = {}
        for suffix, arrays in (
            (WEIGHTS_SUFFIX, checkpoint.weights),
            (OPTIMISER_SUFFIX, checkpoint.optimiser_state),
        ):
            with atomic_path(
                folder / f"{name}{suffix}"
            ) as part:  # straight to the file: a model's size in memory is another's place
                save_file({key: np.asarray(value, order="C") for key, value in arrays.items()}, part)
                sums[suffix] = hash_file(part)
                if name in known and known[name]["sha256"][suffix] != sums[suffix]:
                    (folder / f"{name}.json").unlink(
                        missing_ok=True
                    )  # a round done again: its old JSON would vouch for the wrong arrays
        last = max(known.values(), key=lambda header: header["number"], default={"number": 0, "entries": 0})
        entries = len(checkpoint.history)
        new = max(
            0, min(last.get("entries", 0), entries - 1)
        )  # the last one always: its round may have been done again
        for k in range(new, entries):
            atomic_write(_history_path(folder, k), json.dumps(checkpoint.history[k]).encode())
        header = {
            "number": last["number"] + 1,
            "stage": checkpoint.stage,
            "round": checkpoint.round,
            "sha256": sums,
            "entries": entries,
        }
        header["facts"] = checkpoint.metadata
        atomic_write(folder / f"{name}.json", json.dumps(header).encode())
        _remove_stale_files(folder, {**known, name: header})
    except (OSError, SafetensorError) as error:
        raise ConsiliumError(
            f"the checkpoint cannot be written to {folder}: {getattr(error, 'strerror', error)}"
        ) from error
    return weights


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest complete state; None where the run has none yet.

    One whose files do not match their checksums is passed over, and `note` says so. Raises ConsiliumError where none is left: beginning
    anew is for a person to decide.
    """
    folder = Path(run_dir) / "checkpoints"
    torn = []
    for name, header in sorted(
        _read_headers(folder).items(), key=lambda item: item[1]["number"], reverse=True
    ):
        try:
            weights, optimiser = (
                _load_verified(folder / f"{name}{suffix}", header["sha256"][suffix])
                for suffix in (WEIGHTS_SUFFIX, OPTIMISER_SUFFIX)
            )
            history = [json.loads(_history_path(folder, k).read_bytes()) for k in range(header["entries"])]
        except (OSError, SafetensorError, ValueError, KeyError):
            torn.append(name)
            continue
        note = f"checkpoint {' and '.join(torn)} is damaged; went on from {name}" if torn else ""
        return Checkpoint(
            header["stage"], header["round"], weights, optimiser, header["facts"], history, note
        )
    if torn:
        raise ConsiliumError(
            f"no checkpoint in {folder} is intact (damaged: {', '.join(torn)}); restore the folder or start a new run"
        )
    return None


def load_weights(path: Path) -> Arrays:
    """The arrays of a safetensors file by name. Raises ConsiliumError."""
    try:
        return load_file(path)
    except OSError as error:
        raise ConsiliumError(f"the weights {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConsiliumError(f"the weights {path} are no intact safetensors file: {error}") from error


def _read_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """{checkpoint's name: its JSON}. One that cannot be parsed was torn by something worse than a kill, and does not count."""
    found = {}
    for path in folder.glob("*.json"):
        try:
            header = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(header, dict) and {"number", "stage", "round", "sha256", "facts"} <= header.keys():
            found[path.stem] = header
    return found


def _history_path(folder: Path, number: int) -> Path:
    return folder / "history" / f"{number:06d}.json"


def _load_verified(path: Path, sha256: str) -> Arrays:
    if hash_file(path) != sha256:
        raise ValueError("checksum")
    return load_file(path)


def _remove_stale_files(folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes all but the newest checkpoints, the best that each of them names, and what a killed save left behind."""
    newest = sorted(headers, key=lambda name: headers[name]["number"], reverse=True)[:CHECKPOINTS_KEPT]
    bests = [best for name in newest if (best := headers[name]["facts"].get("best"))]
    kept = {
        *newest,
        *(
            weights_path(folder.parent, best["stage"], best["round"]).name.removesuffix(WEIGHTS_SUFFIX)
            for best in bests
        ),
    }
    files = [path for path in folder.iterdir() if _final_name(path).endswith((".json", WEIGHTS_SUFFIX))]
    for path in sorted(
        files, key=lambda path: path.suffix != ".json"
    ):  # the JSON first: what is half removed must not look complete
        name = path.name.removesuffix(".json").removesuffix(OPTIMISER_SUFFIX).removesuffix(WEIGHTS_SUFFIX)
        if name not in kept:
            path.unlink(missing_ok=True)


def _final_name(path: Path) -> str:
    """The name a file has or, where a killed save left a part of it, was to have."""
    return re.sub(r"\.\d+\.part$", "", path.name)
