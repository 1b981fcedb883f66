"""Keep the layers that stay at a centre, by run, stage and round: batch norms (FedBN), heads, or all.

`personal/<run>/<stage>/<round>.safetensors` in the state folder holds them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from client.site.config import safe_filename
from common.config.schema import Stage
from common.modeling.local_layers import LocalValues, find_local_values
from common.modeling.parameters import Layout, Weights
from common.utils.atomic_files import atomic_path, atomic_write
from common.utils.errors import ConsiliumError, Refused

TEST_STATE_FILENAME = "used.json"  # beside the stages' folders: the layers with which the run was tested here

# Keys of a file: masks of the model's values, packed in bits.
FLOATS_MASK = "where"
INTEGERS_MASK = "integers_where"

PersonalRounds = list[tuple[str, int]]  # (stage, round) of layers to overlay, in this order


@dataclass(frozen=True)
class RecordedTestState:
    """What a run was tested with at this centre. The field names are the keys in the file."""

    personal: PersonalRounds
    common: str  # hash of the run's common weights
    own: str  # hash of those with the centre's own layers overlaid


_TEST_STATE_ADAPTER = TypeAdapter(RecordedTestState)


def save_parameters(
    folder: Path, run_id: str, stage: str, round_number: int, weights: Weights, local_values: LocalValues
) -> None:
    """Store the local values of a round; the file is complete or does not exist."""
    path = _stage_dir(folder, run_id, stage) / f"{round_number:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {
        FLOATS_MASK: np.packbits(local_values.floats),
        "floats": weights.floats[local_values.floats],
        INTEGERS_MASK: np.packbits(local_values.int_buffers),
        "integers": weights.int_buffers[local_values.int_buffers],
    }
    with atomic_path(path) as part:
        save_file(arrays, part)


def overlay_parameters(
    folder: Path, run_id: str, personal_rounds: PersonalRounds, weights: Weights
) -> Weights:
    """Return the weights with the centre's own layers laid over.

    For each (stage, round) these are the newest ones stored up to that round.
    """
    merged = weights.copy()
    for path in _find_layers(folder, run_id, personal_rounds):
        layers = load_file(path)
        merged.floats[_unpack_mask(layers[FLOATS_MASK], merged.floats.size)] = layers["floats"]
        integers = np.ones(merged.int_buffers.size, bool)  # version 0.1.0 stored all of them
        if INTEGERS_MASK in layers:
            integers = _unpack_mask(layers[INTEGERS_MASK], merged.int_buffers.size)
        merged.int_buffers[integers] = layers["integers"]
    return merged


def find_kept_values(
    folder: Path, run_id: str, personal_rounds: PersonalRounds, stage: Stage, layout: Layout
) -> LocalValues:
    """Return the values that must not leave a round: those local to the stage, and those laid over.

    What is laid over stays here even if this message's stage calls it shared. Raises Refused when the layers
    are those of another model.
    """
    kept_values = find_local_values(layout, stage.local_layers)
    for path in _find_layers(folder, run_id, personal_rounds):
        kept_values = kept_values.union(_read_stored_masks(path, layout))
    return kept_values


def _find_layers(folder: Path, run_id: str, personal_rounds: PersonalRounds) -> list[Path]:
    """Return the file for each (stage, round): the newest one stored up to that round, if there is one."""
    paths = []
    for stage, last_round in personal_rounds:
        stored = sorted(_stage_dir(folder, run_id, stage).glob("*.safetensors"))
        usable = [path for path in stored if int(path.stem) <= last_round]
        paths += usable[-1:]
    return paths


def _read_stored_masks(path: Path, layout: Layout) -> LocalValues:
    with safe_open(path, framework="np") as file:
        floats = _unpack_mask(file.get_tensor(FLOATS_MASK), layout.size)
        integers = np.ones(layout.int_buffer_size, bool)
        if INTEGERS_MASK in file.keys():  # noqa: SIM118 (the file is no mapping)
            integers = _unpack_mask(file.get_tensor(INTEGERS_MASK), layout.int_buffer_size)
    return LocalValues(floats, integers)


def _unpack_mask(packed: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    if len(packed) != -(-size // 8):
        raise Refused("the layers that this centre keeps belong to another model than the request's")
    return np.unpackbits(packed, count=size).astype(bool)


def prune_parameters(
    folder: Path, run_id: str, stage: Stage, stage_name: str, rounds_to_keep: list[int]
) -> None:
    """Delete the stage's layers of all rounds but those given."""
    if not stage.local_layers:
        return
    for path in _stage_dir(folder, run_id, stage_name).glob("*.safetensors"):
        if int(path.stem) not in rounds_to_keep:
            path.unlink(missing_ok=True)


def _stage_dir(folder: Path, run_id: str, stage: str) -> Path:
    return folder / safe_filename(run_id) / safe_filename(stage)


# --- the layers that a run was tested with --------------------------------------------------------


def hash_weights(weights: Weights) -> str:
    """Return a short hash of all values."""
    return hashlib.sha256(weights.floats.tobytes() + weights.int_buffers.tobytes()).hexdigest()[:16]


def record_test_state(
    folder: Path, run_id: str, personal_rounds: PersonalRounds, common_weights: Weights
) -> None:
    """Note what a run is tested with here, so that `load_as_tested` finds the same again.

    Only the coordinator knows the best round of each stage; it names them when it asks for the test scores.
    """
    merged = overlay_parameters(folder, run_id, personal_rounds, common_weights)
    state = RecordedTestState(
        personal=personal_rounds, common=hash_weights(common_weights), own=hash_weights(merged)
    )
    path = folder / safe_filename(run_id) / TEST_STATE_FILENAME
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, _TEST_STATE_ADAPTER.dump_json(state))


def load_as_tested(folder: Path, common_weights: Weights) -> Weights:
    """Return a run's common weights with this centre's own layers laid over, as the run was tested here.

    `folder` is `<state>/personal/<run>`. Raises ConsiliumError where the run was not tested, where the common
    weights are another run's, and where layers are missing or damaged.
    """
    state = _read_test_state(folder)
    if state.common != hash_weights(common_weights):
        raise ConsiliumError(
            f"the layers in {folder} belong to another model; "
            f"give the model.safetensors of run '{folder.resolve().name}'"
        )
    run_dir = folder.resolve()
    try:
        merged = overlay_parameters(run_dir.parent, run_dir.name, state.personal, common_weights)
    except Exception:  # a damaged file fails in many ways
        merged = common_weights
    if state.own != hash_weights(merged):
        raise ConsiliumError(
            f"some layers in {folder} are missing or damaged; "
            "restore the folder, or predict without --personal"
        )
    return merged


def _read_test_state(folder: Path) -> RecordedTestState:
    try:
        return _TEST_STATE_ADAPTER.validate_json((folder / TEST_STATE_FILENAME).read_bytes())
    except (OSError, ValueError) as error:
        raise ConsiliumError(
            f"{folder} has no layers that a run was tested with "
            f"({TEST_STATE_FILENAME}: {type(error).__name__}); "
            "give <state>/personal/<run> of a finished run that has local layers"
        ) from None
