"""Weights that a centre keeps as its own, on its own disk, by run, stage and round: batch norms (FedBN), heads, or all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from client.site import safe
from common.errors import ConsiliumError
from common.files import whole, write_whole
from common.schema import Personal, Stage
from common.weights import Layout, Weights

NOTE = "used.json"  # beside the stages' folders: which weights the run was tested with here


def mask_of(layout: Layout, personal: list[Personal]) -> NDArray[np.bool_]:
    """True [P] where a float weight is personal (Li et al., "FedBN", ICLR 2021, for batch norms)."""
    mask = np.zeros(layout.size, dtype=bool)
    for e in layout.floats:
        norm, head = "batch_norm" in personal and e.batch_norm, "heads" in personal and e.group not in ("backbone", "decoder")
        mask[e.where] = norm or head or "all" in personal
    return mask


def save(folder: Path, run: str, stage: str, round: int, weights: Weights, mask: NDArray[np.bool_]) -> None:
    """Keep the personal part of the weights after a round; written whole or not at all."""
    path = folder / safe(run) / safe(stage) / f"{round:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        save_file({"where": np.packbits(mask), "floats": weights.floats[mask], "integers": weights.integers}, part)


def lay_over(folder: Path, run: str, personal: list[tuple[str, int]], weights: Weights) -> Weights:
    """The received weights with the centre's own laid over: for each (stage, round) the newest kept up to that round."""
    merged = weights.copy()
    for stage, last in personal:
        kept = sorted((folder / safe(run) / safe(stage)).glob("*.safetensors"))
        due = [path for path in kept if int(path.stem) <= last]
        if due:
            own = load_file(due[-1])
            mask = np.unpackbits(own["where"], count=merged.floats.size).astype(bool)
            merged.floats[mask], merged.integers[:] = own["floats"], own["integers"]
    return merged


def forget(folder: Path, run: str, stage: Stage, name: str, keep: list[int]) -> None:
    """Delete the stage's personal weights of rounds that nobody will ask for again."""
    if stage.personal:
        for path in (folder / safe(run) / safe(name)).glob("*.safetensors"):
            if int(path.stem) not in keep:
                path.unlink(missing_ok=True)


def digest(weights: Weights) -> str:
    """Equal for equal weights."""
    return hashlib.sha256(weights.floats.tobytes() + weights.integers.tobytes()).hexdigest()[:16]


def note(folder: Path, run: str, personal: list[tuple[str, int]], common: Weights) -> None:
    """Remember what a run is tested with here, so that `as_tested` finds the same again; written whole or not at all.

    Only the coordinator knows each stage's best round, and it says so with its question for the test split.
    """
    known = {"personal": personal, "common": digest(common), "own": digest(lay_over(folder, run, personal, common))}
    path = folder / safe(run) / NOTE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known).encode())


def as_tested(folder: Path, common: Weights) -> Weights:
    """A run's common weights with this centre's own of `folder` (`<state>/personal/<run>`) laid over, as the run was tested here.

    Raises ConsiliumError where the run was not tested, where the common weights are another run's, and where own ones are gone or damaged.
    """
    try:
        known = json.loads((folder / NOTE).read_text())
        personal, model, own = [(str(stage), int(round)) for stage, round in known["personal"]], known["common"], known["own"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConsiliumError(
            f"{folder} holds no own weights that a run was tested with ({NOTE}: {type(error).__name__}); give <state>/personal/<run> of a "
            "finished run whose stages keep some"
        ) from None
    if model != digest(common):
        raise ConsiliumError(
            f"the own weights in {folder} belong to another model; give the model.safetensors of run '{folder.resolve().name}'"
        )
    try:
        merged = lay_over(folder.resolve().parent, folder.resolve().name, personal, common)
    except Exception:  # a damaged file fails in many ways
        merged = common
    if own != digest(merged):
        raise ConsiliumError(f"some of the own weights in {folder} are gone or damaged; restore the folder, or predict without --personal")
    return merged
