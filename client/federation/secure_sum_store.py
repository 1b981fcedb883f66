"""Keep on disk what a centre needs of a secure sum: its numbers, its secrets, who was in earlier sums.

Every message may be handled by a process of its own, so all of it is kept in files that their owner alone can
read: `secagg/<run>/train` and `secagg/<run>/query` in the state folder hold the present sum of a kind.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.site.config import safe_filename
from common.modeling.parameters import EMPTY_PARAMS
from common.privacy import secure_aggregation
from common.privacy.secure_aggregation import ByteArray, Magnitudes, PublicKeys, SumPieces
from common.protocol.message_packing import MESSAGE_TYPE_KEY, metadata_to_json, pack_message
from common.protocol.messages import StatisticsRequest, TrainReply, TrainRequest
from common.utils.atomic_files import atomic_write

SEED_BYTES = 16
KEY_BYTES = 32
OWNER_ONLY = 0o600  # file mode
STATE_FILENAME = "state.json"
NUMBERS_FILENAME = "numbers.npz"
REPLY_FILENAME = "said.json"
OPENED_FILENAME = "done.json"
# Fields of a request that differ between centres, and so are not part of a sum's id.
CENTRE_SPECIFIC_FIELDS = ("personal_rounds", "rounds_to_keep")


class SumKind(StrEnum):
    """What is summed. A centre works on one sum of a kind at a time."""

    TRAIN = "train"
    QUERY = "query"


class SumId(NamedTuple):
    """The identity of a sum, equal at all centres that received the same request and weights."""

    kind: SumKind
    occasion: str  # stage and round, or query and stage
    digest: str  # SHA-256 of the request

    def __str__(self) -> str:
        """Return the text under which the id travels: ``kind/occasion/digest``."""
        return f"{self.kind}/{self.occasion}/{self.digest}"

    @classmethod
    def parse(cls, text: str) -> SumId:
        """Read an id from its text; one that is not of a round is taken for one of a query."""
        kind, _, rest = text.partition("/")
        occasion, _, digest = rest.rpartition("/")
        return cls(SumKind.TRAIN if kind == SumKind.TRAIN else SumKind.QUERY, occasion, digest)

    @property
    def repetition_key(self) -> str:
        """Return what is equal for all sums of which only one may be opened: for training, the round."""
        return f"{self.kind}/{self.occasion}" if self.kind == SumKind.TRAIN else str(self)


def compute_sum_id(request: TrainRequest | StatisticsRequest) -> str:
    """Return the id of the sum that the reply to a request goes into."""
    arrays, metadata = pack_message(request)
    shared_metadata = {key: value for key, value in metadata.items() if key not in CENTRE_SPECIFIC_FIELDS}
    digest = hashlib.sha256(metadata_to_json(shared_metadata).encode())
    if request.weights is not None:
        digest.update(request.weights.digest.encode())
    for name in sorted(arrays):
        if not name.startswith("weights."):
            digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    if isinstance(request, TrainRequest):
        return str(SumId(SumKind.TRAIN, f"{request.stage}/{request.round}", digest.hexdigest()))
    return str(SumId(SumKind.QUERY, f"{request.name}/{request.stage}", digest.hexdigest()))


def sum_dir(folder: Path, run_id: str, kind: SumKind) -> Path:
    """Return the folder of the present sum of a kind."""
    return folder / "secagg" / safe_filename(run_id) / kind


# --- numbers --------------------------------------------------------------------------------------


class StoredNumbers(NamedTuple):
    """What a centre adds to a sum, before it is masked."""

    values: NDArray[np.int32]  # [V] parameters on their grid
    fixed_point_sums: NDArray[np.int64]  # [R]
    pieces: SumPieces


def store_numbers(work_dir: Path, numbers: StoredNumbers, reply: TrainReply | None) -> None:
    """Replace the numbers of the last sum by those of a new one, and keep the reply that goes with them."""
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True, mode=0o700)
    int_buffers = np.empty(0, np.int64) if reply is None else reply.int_buffers
    data = io.BytesIO()
    np.savez(
        data,
        values=numbers.values,
        exact=numbers.fixed_point_sums,
        integers=int_buffers,
        pieces=np.array(numbers.pieces.names),
        magnitudes=numbers.pieces.magnitudes,
    )
    atomic_write(work_dir / NUMBERS_FILENAME, data.getvalue(), OWNER_ONLY)
    if reply is not None:
        _, metadata = pack_message(reply)
        del metadata[MESSAGE_TYPE_KEY]
        metadata.pop("public_keys", None)
        atomic_write(work_dir / REPLY_FILENAME, metadata_to_json(metadata).encode(), OWNER_ONLY)


def load_numbers(work_dir: Path) -> StoredNumbers:
    """Return the numbers of the present sum."""
    with np.load(work_dir / NUMBERS_FILENAME) as numbers:
        pieces = SumPieces(numbers["pieces"].tolist(), numbers["magnitudes"])
        return StoredNumbers(numbers["values"], numbers["exact"], pieces)


def load_magnitudes(work_dir: Path) -> Magnitudes:
    """Return how large the numbers of the present sum are, piece by piece."""
    with np.load(work_dir / NUMBERS_FILENAME) as numbers:
        return np.asarray(numbers["magnitudes"])


def load_reply(work_dir: Path) -> TrainReply | None:
    """Return the reply that goes with the numbers of a round, without public keys; None: no round."""
    try:
        metadata = json.loads((work_dir / REPLY_FILENAME).read_text())
    except FileNotFoundError:
        return None
    with np.load(work_dir / NUMBERS_FILENAME) as numbers:
        return TrainReply(**metadata, delta=EMPTY_PARAMS, int_buffers=numbers["integers"])


def delete_train_sum(folder: Path, run_id: str) -> None:
    """Delete the numbers of the last round."""
    shutil.rmtree(sum_dir(folder, run_id, SumKind.TRAIN), ignore_errors=True)


# --- secrets and progress -------------------------------------------------------------------------


@dataclass(frozen=True)
class SumSecrets:
    """A centre's secrets for one sum."""

    seed: bytes  # of its own mask
    mask_key: bytes  # private key for the masks it shares with each peer
    share_key: bytes  # private key for encrypting shares

    @classmethod
    def generate(cls) -> SumSecrets:
        """Draw new secrets from the operating system."""
        return cls(os.urandom(SEED_BYTES), os.urandom(KEY_BYTES), os.urandom(KEY_BYTES))

    def public_keys(self) -> PublicKeys:
        """Return their public part."""
        return PublicKeys(
            secure_aggregation.derive_public_key(self.mask_key),
            secure_aggregation.derive_public_key(self.share_key),
            hashlib.sha256(self.seed).digest(),
        )


class HeldShares(NamedTuple):
    """What a centre holds of a peer, or of itself: shares of both secrets, and the size of its part."""

    seed_share: bytes
    key_share: bytes
    magnitudes: Magnitudes

    def pack(self) -> bytes:
        """Return the bytes that are encrypted for the holder."""
        return self.seed_share + self.key_share + self.magnitudes.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> HeldShares:
        """Read what `pack` wrote."""
        magnitudes = np.frombuffer(data[SEED_BYTES + KEY_BYTES :], np.uint8)
        return cls(data[:SEED_BYTES], data[SEED_BYTES : SEED_BYTES + KEY_BYTES], magnitudes)


@dataclass(frozen=True)
class SumState:
    """How far a centre is in the present sum."""

    sum_id: str
    secrets: SumSecrets
    roster: Mapping[str, bytes] | None = None  # after step 2: {centre: its public keys}
    own_shares: bytes = b""  # after step 2: this centre's own HeldShares, packed
    shares: Mapping[str, bytes] | None = None  # after step 3: {centre: its HeldShares, packed}

    def to_json(self) -> str:
        """Return the text of the state file."""
        values: dict[str, Any] = {
            "sum": self.sum_id,
            "seed": self.secrets.seed.hex(),
            "mask": self.secrets.mask_key.hex(),
            "share": self.secrets.share_key.hex(),
        }
        if self.roster is not None:
            values["roster"] = _to_hex(self.roster)
            values["mine"] = self.own_shares.hex()
        if self.shares is not None:
            values["held"] = _to_hex(self.shares)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> SumState:
        """Read the text of the state file."""
        values = json.loads(text)
        seed, mask_key, share_key = (bytes.fromhex(values[key]) for key in ("seed", "mask", "share"))
        state = cls(values["sum"], SumSecrets(seed, mask_key, share_key))
        if "roster" in values:
            own_shares = bytes.fromhex(values["mine"])
            state = replace(state, roster=_from_hex(values["roster"]), own_shares=own_shares)
        if "held" in values:
            state = replace(state, shares=_from_hex(values["held"]))
        return state


def _to_hex(data: Mapping[str, bytes]) -> dict[str, str]:
    return {centre: value.hex() for centre, value in data.items()}


def _from_hex(data: Mapping[str, str]) -> dict[str, bytes]:
    return {centre: bytes.fromhex(value) for centre, value in data.items()}


def start_sum(work_dir: Path, sum_id: str) -> ByteArray:
    """Draw secrets for a sum, in place of earlier ones. Returns their public part, uint8 [96]."""
    secrets = SumSecrets.generate()
    save_state(work_dir, SumState(sum_id, secrets))
    keys = secrets.public_keys()
    return to_byte_array(keys.mask_key + keys.share_key + keys.seed_digest)


def load_state(work_dir: Path) -> SumState | None:
    """Return the state of the present sum; None when there is none."""
    try:
        return SumState.from_json((work_dir / STATE_FILENAME).read_text())
    except FileNotFoundError:
        return None


def save_state(work_dir: Path, state: SumState) -> None:
    """Write the state of the present sum."""
    atomic_write(work_dir / STATE_FILENAME, state.to_json().encode(), OWNER_ONLY)


def delete_secrets(work_dir: Path, kind: SumKind) -> None:
    """Delete a sum's secrets, and its numbers unless they are a round's, which may have to be repeated."""
    (work_dir / STATE_FILENAME).unlink()
    if kind != SumKind.TRAIN:
        shutil.rmtree(work_dir)


class Opening(NamedTuple):
    """Which sum was opened on an occasion, and with whom."""

    digest: str  # of its request
    survivors: list[str]


def record_opening(work_dir: Path, sum_id: SumId, survivors: list[str]) -> Opening:
    """Note that a sum is opened, unless one was on the same occasion. Returns the first opening."""
    path = work_dir.parent / OPENED_FILENAME
    opened: dict[str, Any] = {}
    if path.exists():
        opened = json.loads(path.read_text())
    now = Opening(sum_id.digest, survivors)
    first = opened.setdefault(sum_id.repetition_key, now._asdict())
    if isinstance(first, list):  # of version 0.1.0: the survivors
        return Opening(sum_id.digest, first)
    if Opening(**first) == now:
        atomic_write(path, json.dumps(opened).encode(), OWNER_ONLY)
    return Opening(**first)


def to_byte_array(data: bytes) -> ByteArray:
    """Return bytes as uint8, as they travel in a message."""
    return np.frombuffer(data, np.uint8)
