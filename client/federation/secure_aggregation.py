"""A centre's part in a secure sum (common/privacy/secure_aggregation.py). Every message may run in a process of its own, so what it must remember lies on disk.

`secagg/<run>/train` and `.../query` in the state folder, readable by their owner only, hold the numbers of the present sum and its secrets. Keys are
made for one sum, each step is taken once, and the secrets are gone before the last answer leaves. The numbers of a round stay until the next one, for
a round that must be repeated: with them it is the same sum. `done.json` keeps who was in each sum: repeated among others, the difference of the two
would show single centres.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from client.site.config import safe_filename
from client.site.policy import Policy
from common.config.schema import Config
from common.learning.class_imbalance import weights_by_group
from common.modeling.model import parameter_layout
from common.modeling.parameters import EMPTY_PARAMS
from common.privacy import secure_aggregation
from common.privacy.masked_layout import anonymise_keys, empty_sums
from common.privacy.secure_aggregation import ByteArray
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    SecureSumRequest,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
    metadata_to_json,
    pack_message,
)
from common.utils.atomic_files import atomic_write
from common.utils.errors import Refused

CENTRE_SPECIFIC_FIELDS = ("personal_rounds", "rounds_to_keep")  # of a request: what differs between centres
SEED_BYTES = 16  # bytes of a seed; a share of it, then one of the key, are what a centre holds of another


# --- before the first step: the numbers -----------------------------------------------------------------------------------------------


def compute_sum_id(request: TrainRequest | StatisticsRequest) -> str:
    """The name of a sum: equal at all centres that were told the same, to the bit of the weights."""
    arrays, facts = pack_message(request)
    told = hashlib.sha256(
        metadata_to_json(
            {key: value for key, value in facts.items() if key not in CENTRE_SPECIFIC_FIELDS}
        ).encode()
    )
    if request.weights is not None:
        told.update(request.weights.digest.encode())
    for name in sorted(name for name in arrays if not name.startswith("weights.")):
        told.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    kind = (
        f"train/{request.stage}/{request.round}"
        if isinstance(request, TrainRequest)
        else f"query/{request.name}/{request.stage}"
    )
    return f"{kind}/{told.hexdigest()}"


def mask_update(
    folder: Path, config: Config, request: TrainRequest, reply: TrainReply, label_weights: Mapping[str, float]
) -> TrainReply:
    """The contribution without what comes masked. `masses` {task: the part of this centre's in those of the request}."""
    settings, layout = secure_aggregation.require_secagg_config(config), parameter_layout(config)
    if not np.isfinite(reply.delta).all():
        raise Refused("its change of the weights is not finite")
    weights = {t: label_weights[t] / total for t, total in request.total_label_weight.items() if total > 0}
    parts = dict.fromkeys(layout.group_slices(), 0.0) | weights_by_group(weights, config.tasks)
    values, sums = secure_aggregation.quantize_weighted_update(reply.delta, parts, layout, settings)
    reply = dataclasses.replace(reply, delta=EMPTY_PARAMS, sum_id=compute_sum_id(request))
    place = sum_dir(folder, request.run_id, reply.sum_id)
    if settings.scope == "all":
        reply = dataclasses.replace(
            reply, int_buffers=request.weights.int_buffers, scans=0, steps=0, losses={}, epsilon=None
        )
    store_sum(place, config, values, sums, reply)
    return dataclasses.replace(reply, public_keys=generate_sum_keys(place, reply.sum_id))


def cached_update(folder: Path, request: TrainRequest) -> TrainReply | None:
    """What the centre said of a round that it has trained already, with the same numbers behind it and new keys."""
    sum_, place = compute_sum_id(request), sum_dir(folder, request.run_id, "train")
    try:
        facts = json.loads((place / "said.json").read_text())
    except FileNotFoundError:
        return None
    if facts["sum_id"] != sum_:
        return None
    with np.load(place / "numbers.npz") as numbers:
        said = TrainReply(**facts, delta=EMPTY_PARAMS, int_buffers=numbers["integers"])
    return dataclasses.replace(said, public_keys=generate_sum_keys(place, sum_))


def mask_statistics(
    folder: Path, config: Config, request: StatisticsRequest, reply: StatisticsReply
) -> StatisticsReply:
    """The answer without its sums, which come masked."""
    sums = anonymise_keys(reply.sums, empty_sums(request, config, parameter_layout(config)))
    reply = dataclasses.replace(reply, sums={}, sum_id=compute_sum_id(request))
    place = sum_dir(folder, request.run_id, reply.sum_id)
    store_sum(place, config, np.empty(0, np.int32), sums, None)
    return dataclasses.replace(reply, public_keys=generate_sum_keys(place, reply.sum_id))


def sum_dir(folder: Path, run_id: str, sum_id: str) -> Path:
    """Where a sum is worked on: one of a kind at a time."""
    kind = "train" if sum_id.startswith("train") else "query"
    return folder / "secagg" / safe_filename(run_id) / kind


def store_sum(
    work_dir: Path, config: Config, values: NDArray[np.int32], sums: Sums, reply: TrainReply | None
) -> None:
    """Put the numbers of a new sum in place of the last one's. Raises Refused for numbers that cannot be added."""
    exact = secure_aggregation.to_fixed_point(
        secure_aggregation.flatten_sums(sums), len(config.federation.centres)
    )
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True, mode=0o700)
    integers = reply.int_buffers if reply else np.empty(0, np.int64)
    data = io.BytesIO()
    np.savez(data, values=values, exact=exact, integers=integers)
    atomic_write(work_dir / "numbers.npz", data.getvalue(), 0o600)
    if reply:
        atomic_write(
            work_dir / "said.json",
            metadata_to_json(
                {k: v for k, v in pack_message(reply)[1].items() if k not in ("kind", "public_keys")}
            ).encode(),
            0o600,
        )


def generate_sum_keys(work_dir: Path, sum_id: str) -> ByteArray:
    """Secrets for one sum; what was agreed on before is forgotten. Returns their public part, uint8 [96]."""
    seed, mask, share = os.urandom(SEED_BYTES), os.urandom(32), os.urandom(32)
    write_state(work_dir, {"sum": sum_id, "seed": seed.hex(), "mask": mask.hex(), "share": share.hex()})
    return to_byte_array(
        secure_aggregation.derive_public_key(mask)
        + secure_aggregation.derive_public_key(share)
        + hashlib.sha256(seed).digest()
    )


def delete_train_sum(folder: Path, run_id: str) -> None:
    """The numbers of the last round are wanted no more."""
    shutil.rmtree(sum_dir(folder, run_id, "train"), ignore_errors=True)


# --- the steps ------------------------------------------------------------------------------------------------------------------------


def handle_step(
    folder: Path, config: Config, centre: str, request: SecureSumRequest, policy: Policy
) -> ShareKeysReply | MaskedInputReply | UnmaskReply:
    """Take part in the next step of a sum. Raises Refused for a step out of turn, and where it would tell of too few centres."""
    place = sum_dir(folder, request.run_id, request.sum_id)
    try:
        state = json.loads((place / "state.json").read_text())
    except FileNotFoundError:
        state = {}
    if state.get("sum") != request.sum_id:
        raise Refused("it has no part in this sum any more; it must be begun again")
    if isinstance(request, ShareKeysRequest):
        return share_keys(place, state, config, centre, request, policy)
    if isinstance(request, MaskedInputRequest):
        return mask_input(place, state, config, centre, request, policy)
    return reveal_shares(place, state, config, centre, request, policy)


def share_keys(
    work_dir: Path,
    state: dict[str, Any],
    config: Config,
    centre: str,
    request: ShareKeysRequest,
    policy: Policy,
) -> ShareKeysReply:
    """Of both secrets a share for everyone in the roster, encrypted."""
    roster = {c: secure_aggregation.parse_public_keys(keys) for c, keys in request.roster.items()}
    secrets = {name: bytes.fromhex(state[name]) for name in ("seed", "mask", "share")}
    require_first_time(state, "roster")
    require_quorum(config, policy, len(roster), len(roster))
    ours = secure_aggregation.PublicKeys(
        secure_aggregation.derive_public_key(secrets["mask"]),
        secure_aggregation.derive_public_key(secrets["share"]),
        hashlib.sha256(secrets["seed"]).digest(),
    )
    if roster.get(centre) != ours or not roster.keys() <= set(config.federation.centres):
        raise Refused("the roster of this sum has another key for it, or a name that is no centre of the run")
    if len({key for keys in roster.values() for key in (keys.mask_key, keys.share_key)}) < 2 * len(roster):
        raise Refused("the roster of this sum has one key twice")
    needed, bound = secure_aggregation.compute_min_survivors(config, len(roster)), request.sum_id.encode()
    seeds, keys = (
        secure_aggregation.shamir_split(secrets[name], needed, len(roster)) for name in ("seed", "mask")
    )
    mine, sealed = b"", {}
    for peer, seed, key in zip(sorted(roster), seeds, keys, strict=True):
        if peer == centre:
            mine = seed + key
        else:
            nonce, cipher = (
                os.urandom(12),
                ChaCha20Poly1305(
                    secure_aggregation.derive_shared_key(
                        secrets["share"], roster[peer].share_key, b"shares" + bound
                    )
                ),
            )
            sealed[peer] = to_byte_array(
                nonce + cipher.encrypt(nonce, seed + key, f"{centre} to {peer}".encode())
            )
    write_state(
        work_dir,
        state | {"roster": {c: k.tobytes().hex() for c, k in request.roster.items()}, "mine": mine.hex()},
    )
    return ShareKeysReply(centre, sealed)


def mask_input(
    work_dir: Path,
    state: dict[str, Any],
    config: Config,
    centre: str,
    request: MaskedInputRequest,
    policy: Policy,
) -> MaskedInputReply:
    """The numbers, masked towards everyone who sent a share."""
    roster = {c: to_byte_array(bytes.fromhex(keys)) for c, keys in state.get("roster", {}).items()}
    require_first_time(state, "held")
    require_quorum(config, policy, len(roster), len(request.shares) + 1)
    held = {centre: state["mine"]}
    private = bytes.fromhex(state["share"])
    for peer, sealed in request.shares.items():
        if peer == centre or peer not in roster:
            raise Refused("it was sent a share of a centre that has no part in this sum")
        key = secure_aggregation.derive_shared_key(
            private,
            secure_aggregation.parse_public_keys(roster[peer]).share_key,
            b"shares" + request.sum_id.encode(),
        )
        try:
            data = sealed.tobytes()
            held[peer] = (
                ChaCha20Poly1305(key).decrypt(data[:12], data[12:], f"{peer} to {centre}".encode()).hex()
            )
        except (InvalidTag, ValueError) as error:
            raise Refused(
                f"the share that came in the name of '{peer}' was not made for it, or was changed on the way"
            ) from error
    width = secure_aggregation.bytes_per_parameter(config)
    with np.load(work_dir / "numbers.npz") as numbers:
        values, exact = (
            numbers["values"].astype(secure_aggregation.ring_dtype(width)),
            numbers["exact"].view(np.uint64),
        )
    bound = b"mask" + secure_aggregation.hash_mask_context(request.sum_id, roster, held)
    secure_aggregation.add_mask(
        secure_aggregation.expand_seed(bytes.fromhex(state["seed"])), 1, exact, values
    )
    for peer in request.shares:
        common = secure_aggregation.derive_shared_key(
            bytes.fromhex(state["mask"]), secure_aggregation.parse_public_keys(roster[peer]).mask_key, bound
        )
        secure_aggregation.add_mask(common, secure_aggregation.compute_pair_sign(centre, peer), exact, values)
    write_state(
        work_dir, state | {"held": held}
    )  # before anything leaves: a second answer would be to another set of centres
    return MaskedInputReply(centre, secure_aggregation.pack_ring_values(values, width), exact)


def reveal_shares(
    work_dir: Path, state: dict[str, Any], config: Config, centre: str, request: UnmaskRequest, policy: Policy
) -> UnmaskReply:
    """A share of each survivor's seed and of each drop-out's key. After it this centre's secrets of the sum are gone."""
    held, survivors = (
        {c: bytes.fromhex(both) for c, both in state.get("held", {}).items()},
        sorted(set(request.survivors)),
    )
    if centre not in survivors or not set(survivors) <= held.keys():
        raise Refused("the survivors of this sum are not of those who masked their numbers for it")
    require_quorum(config, policy, len(state["roster"]), len(survivors))
    path = work_dir.parent / "done.json"
    done: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    name = (
        request.sum_id.rpartition("/")[0] if request.sum_id.startswith("train") else request.sum_id
    )  # a round is one sum, whatever it is told
    if done.setdefault(name, survivors) != survivors:
        raise Refused(
            f"it was in this sum before, with {', '.join(done[name])}: it may be repeated with the same centres only, as else the "
            "difference would show single ones; wait for those who are missing, then resume"
        )
    atomic_write(path, json.dumps(done).encode(), 0o600)
    (work_dir / "state.json").unlink()
    if not request.sum_id.startswith("train"):
        shutil.rmtree(work_dir)
    return UnmaskReply(
        centre,
        {
            c: to_byte_array(both[:SEED_BYTES] if c in survivors else both[SEED_BYTES:])
            for c, both in held.items()
        },
    )


def require_first_time(state: Mapping[str, Any], step_name: str) -> None:
    """Raises Refused for a step that was taken already."""
    if step_name in state:
        raise Refused(
            "it has taken this step of the sum already; a sum that was broken off must be begun again"
        )


def require_quorum(config: Config, policy: Policy, num_started: int, num_present: int) -> None:
    """Raises Refused where a sum would be over too few centres."""
    needed = max(secure_aggregation.compute_min_survivors(config, num_started), policy.min_centres)
    if num_present < needed:
        raise Refused(f"a sum over {num_present} centres is not opened here: {needed} are needed")


def to_byte_array(data: bytes) -> ByteArray:
    return np.frombuffer(data, np.uint8)


def write_state(work_dir: Path, state: Mapping[str, Any]) -> None:
    atomic_write(work_dir / "state.json", json.dumps(state).encode(), 0o600)
