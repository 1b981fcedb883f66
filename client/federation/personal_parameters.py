"""Weights that a centre keeps as its own, on its own disk, by run, stage and round: batch norms (FedBN), heads, or all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from client.site.config import safe_filename
from common.config.schema import LocalLayerGroup, Stage
from common.modeling.parameters import Layout, Weights
from common.utils.atomic_files import atomic_path, atomic_write
from common.utils.errors import ConsiliumError

TEST_STATE_FILENAME = "used.json"  # beside the stages' folders: which weights the run was tested with here


def personal_mask(layout: Layout, local_layers: list[LocalLayerGroup]) -> NDArray[np.bool_]:
    """True [P] where a float weight is personal (Li et al., "FedBN", ICLR 2021, for batch norms)."""
    mask = np.zeros(layout.size, dtype=bool)
    for e in layout.floats:
        norm, head = (
            "batch_norm" in local_layers and e.is_batch_norm,
            "heads" in local_layers and e.group not in ("backbone", "decoder"),
        )
        mask[e.span] = norm or head or "all" in local_layers
    return mask


def save_parameters(
    folder: Path, run_id: str, stage: str, round_number: int, weights: Weights, mask: NDArray[np.bool_]
) -> None:
    """Keep the personal part of the weights after a round; written whole or not at all."""
    path = folder / safe_filename(run_id) / safe_filename(stage) / f"{round_number:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        save_file(
            {"where": np.packbits(mask), "floats": weights.floats[mask], "integers": weights.int_buffers},
            part,
        )


def overlay_parameters(
    folder: Path, run_id: str, personal_rounds: list[tuple[str, int]], weights: Weights
) -> Weights:
    """The received weights with the centre's own laid over: for each (stage, round) the newest kept up to that round."""
    merged = weights.copy()
    for stage, last in personal_rounds:
        kept = sorted((folder / safe_filename(run_id) / safe_filename(stage)).glob("*.safetensors"))
        due = [path for path in kept if int(path.stem) <= last]
        if due:
            own = load_file(due[-1])
            mask = np.unpackbits(own["where"], count=merged.floats.size).astype(bool)
            merged.floats[mask], merged.int_buffers[:] = own["floats"], own["integers"]
    return merged


def prune_parameters(
    folder: Path, run_id: str, stage: Stage, stage_name: str, rounds_to_keep: list[int]
) -> None:
    """Delete the stage's personal weights of rounds that nobody will ask for again."""
    if stage.local_layers:
        for path in (folder / safe_filename(run_id) / safe_filename(stage_name)).glob("*.safetensors"):
            if int(path.stem) not in rounds_to_keep:
                path.unlink(missing_ok=True)


def hash_weights(weights: Weights) -> str:
    """Equal for equal weights."""
    return hashlib.sha256(weights.floats.tobytes() + weights.int_buffers.tobytes()).hexdigest()[:16]


def record_test_state(
    folder: Path, run_id: str, personal_rounds: list[tuple[str, int]], common_weights: Weights
) -> None:
    """Remember what a run is tested with here, so that `as_tested` finds the same again; written whole or not at all.

    Only the coordinator knows each stage's best round, and it says so with its question for the test split.
    """
    known = {
        "personal": personal_rounds,
        "common": hash_weights(common_weights),
        "own": hash_weights(overlay_parameters(folder, run_id, personal_rounds, common_weights)),
    }
    path = folder / safe_filename(run_id) / TEST_STATE_FILENAME
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(known).encode())


def load_as_tested(folder: Path, common_weights: Weights) -> Weights:
    """A run's common weights with this centre's own of `folder` (`<state>/personal/<run>`) laid over, as the run was tested here.

    Raises ConsiliumError where the run was not tested, where the common weights are another run's, and where own ones are gone or damaged.
    """
    try:
        known = json.loads((folder / TEST_STATE_FILENAME).read_text())
        personal, model, own = (
            [(str(stage), int(round)) for stage, round in known["personal"]],
            known["common"],
            known["own"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConsiliumError(
            f"{folder} holds no own weights that a run was tested with ({TEST_STATE_FILENAME}: {type(error).__name__}); give <state>/personal/<run> of a "
            "finished run whose stages keep some"
        ) from None
    if model != hash_weights(common_weights):
        raise ConsiliumError(
            f"the own weights in {folder} belong to another model; give the model.safetensors of run '{folder.resolve().name}'"
        )
    try:
        merged = overlay_parameters(folder.resolve().parent, folder.resolve().name, personal, common_weights)
    except Exception:  # a damaged file fails in many ways
        merged = common_weights
    if own != hash_weights(merged):
        raise ConsiliumError(
            f"some of the own weights in {folder} are gone or damaged; restore the folder, or predict without --personal"
        )
    return merged
