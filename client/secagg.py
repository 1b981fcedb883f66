"""A centre's part in a secure sum (common/secagg.py). Every message may run in a process of its own, so what it must remember lies on disk.

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

from client.policy import Policy
from client.site import safe
from common import secagg
from common.blank import blank, nameless
from common.errors import Refused
from common.files import write_whole
from common.imbalance import part_weights
from common.messages import Answer, Contribution, Mask, Masked, Query, Share, Shares, Step, Sums, Train, Unmask, Unmasked, facts_json, pack
from common.model import layout_for
from common.schema import Config
from common.secagg import Bytes
from common.weights import NONE

OWN = ("personal", "keep")  # of a request: what differs between centres
SIZE = 16  # bytes of a seed; a share of it, then one of the key, are what a centre holds of another


# --- before the first step: the numbers -----------------------------------------------------------------------------------------------


def sum_of(request: Train | Query) -> str:
    """The name of a sum: equal at all centres that were told the same, to the bit of the weights."""
    arrays, facts = pack(request)
    told = hashlib.sha256(facts_json({key: value for key, value in facts.items() if key not in OWN}).encode())
    if request.weights is not None:
        told.update(request.weights.digest.encode())
    for name in sorted(name for name in arrays if not name.startswith("weights.")):
        told.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    kind = f"train/{request.stage}/{request.round}" if isinstance(request, Train) else f"query/{request.name}/{request.stage}"
    return f"{kind}/{told.hexdigest()}"


def masked_change(folder: Path, config: Config, request: Train, said: Contribution, masses: Mapping[str, float]) -> Contribution:
    """The contribution without what comes masked. `masses` {task: the part of this centre's in those of the request}."""
    settings, layout = secagg.settings_of(config), layout_for(config)
    if not np.isfinite(said.delta).all():
        raise Refused("its change of the weights is not finite")
    weights = {t: masses[t] / total for t, total in request.masses.items() if total > 0}
    parts = dict.fromkeys(layout.groups(), 0.0) | part_weights(weights, config.tasks)
    values, sums = secagg.weighed(said.delta, parts, layout, settings)
    said = dataclasses.replace(said, delta=NONE, sum=sum_of(request))
    if settings.hide == "all":
        said = dataclasses.replace(said, integers=request.weights.integers, scans=0, steps=0, losses={}, epsilon=None)
    keep(place_of(folder, request.run, said.sum), config, values, sums, said)
    return dataclasses.replace(said, keys=new_keys(place_of(folder, request.run, said.sum), said.sum))


def kept(folder: Path, request: Train) -> Contribution | None:
    """What the centre said of a round that it has trained already, with the same numbers behind it and new keys."""
    sum_, place = sum_of(request), place_of(folder, request.run, "train")
    try:
        facts = json.loads((place / "said.json").read_text())
    except FileNotFoundError:
        return None
    if facts["sum"] != sum_:
        return None
    with np.load(place / "numbers.npz") as numbers:
        said = Contribution(**facts, delta=NONE, integers=numbers["integers"])
    return dataclasses.replace(said, keys=new_keys(place, sum_))


def masked_answer(folder: Path, config: Config, request: Query, said: Answer) -> Answer:
    """The answer without its sums, which come masked."""
    sums = nameless(said.sums, blank(request, config, layout_for(config)))
    said = dataclasses.replace(said, sums={}, sum=sum_of(request))
    keep(place_of(folder, request.run, said.sum), config, np.empty(0, np.int32), sums, None)
    return dataclasses.replace(said, keys=new_keys(place_of(folder, request.run, said.sum), said.sum))


def place_of(folder: Path, run: str, sum_: str) -> Path:
    """Where a sum is worked on: one of a kind at a time."""
    kind = "train" if sum_.startswith("train") else "query"
    return folder / "secagg" / safe(run) / kind


def keep(place: Path, config: Config, values: NDArray[np.int32], sums: Sums, said: Contribution | None) -> None:
    """Put the numbers of a new sum in place of the last one's. Raises Refused for numbers that cannot be added."""
    exact = secagg.exact(secagg.joined(sums), len(config.federation.centres))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    integers = said.integers if said else np.empty(0, np.int64)
    data = io.BytesIO()
    np.savez(data, values=values, exact=exact, integers=integers)
    write_whole(place / "numbers.npz", data.getvalue(), 0o600)
    if said:
        write_whole(place / "said.json", facts_json({k: v for k, v in pack(said)[1].items() if k not in ("kind", "keys")}).encode(), 0o600)


def new_keys(place: Path, sum_: str) -> Bytes:
    """Secrets for one sum; what was agreed on before is forgotten. Returns their public part, uint8 [96]."""
    seed, mask, share = os.urandom(SIZE), os.urandom(32), os.urandom(32)
    write(place, {"sum": sum_, "seed": seed.hex(), "mask": mask.hex(), "share": share.hex()})
    return array(secagg.public_of(mask) + secagg.public_of(share) + hashlib.sha256(seed).digest())


def forget(folder: Path, run: str) -> None:
    """The numbers of the last round are wanted no more."""
    shutil.rmtree(place_of(folder, run, "train"), ignore_errors=True)


# --- the steps ------------------------------------------------------------------------------------------------------------------------


def step(folder: Path, config: Config, centre: str, request: Step, policy: Policy) -> Shares | Masked | Unmasked:
    """Take part in the next step of a sum. Raises Refused for a step out of turn, and where it would tell of too few centres."""
    place = place_of(folder, request.run, request.sum)
    try:
        state = json.loads((place / "state.json").read_text())
    except FileNotFoundError:
        state = {}
    if state.get("sum") != request.sum:
        raise Refused("it has no part in this sum any more; it must be begun again")
    if isinstance(request, Share):
        return share(place, state, config, centre, request, policy)
    if isinstance(request, Mask):
        return mask(place, state, config, centre, request, policy)
    return unmask(place, state, config, centre, request, policy)


def share(place: Path, state: dict[str, Any], config: Config, centre: str, request: Share, policy: Policy) -> Shares:
    """Of both secrets a share for everyone in the roster, encrypted."""
    roster = {c: secagg.public(keys) for c, keys in request.roster.items()}
    secrets = {name: bytes.fromhex(state[name]) for name in ("seed", "mask", "share")}
    once(state, "roster")
    enough(config, policy, len(roster), len(roster))
    ours = secagg.Public(secagg.public_of(secrets["mask"]), secagg.public_of(secrets["share"]), hashlib.sha256(secrets["seed"]).digest())
    if roster.get(centre) != ours or not roster.keys() <= set(config.federation.centres):
        raise Refused("the roster of this sum has another key for it, or a name that is no centre of the run")
    if len({key for keys in roster.values() for key in (keys.mask, keys.share)}) < 2 * len(roster):
        raise Refused("the roster of this sum has one key twice")
    needed, bound = secagg.threshold(config, len(roster)), request.sum.encode()
    seeds, keys = (secagg.split(secrets[name], needed, len(roster)) for name in ("seed", "mask"))
    mine, sealed = b"", {}
    for peer, seed, key in zip(sorted(roster), seeds, keys, strict=True):
        if peer == centre:
            mine = seed + key
        else:
            nonce, cipher = os.urandom(12), ChaCha20Poly1305(secagg.agreed(secrets["share"], roster[peer].share, b"shares" + bound))
            sealed[peer] = array(nonce + cipher.encrypt(nonce, seed + key, f"{centre} to {peer}".encode()))
    write(place, state | {"roster": {c: k.tobytes().hex() for c, k in request.roster.items()}, "mine": mine.hex()})
    return Shares(centre, sealed)


def mask(place: Path, state: dict[str, Any], config: Config, centre: str, request: Mask, policy: Policy) -> Masked:
    """The numbers, masked towards everyone who sent a share."""
    roster = {c: array(bytes.fromhex(keys)) for c, keys in state.get("roster", {}).items()}
    once(state, "held")
    enough(config, policy, len(roster), len(request.shares) + 1)
    held = {centre: state["mine"]}
    private = bytes.fromhex(state["share"])
    for peer, sealed in request.shares.items():
        if peer == centre or peer not in roster:
            raise Refused("it was sent a share of a centre that has no part in this sum")
        key = secagg.agreed(private, secagg.public(roster[peer]).share, b"shares" + request.sum.encode())
        try:
            data = sealed.tobytes()
            held[peer] = ChaCha20Poly1305(key).decrypt(data[:12], data[12:], f"{peer} to {centre}".encode()).hex()
        except (InvalidTag, ValueError) as error:
            raise Refused(f"the share that came in the name of '{peer}' was not made for it, or was changed on the way") from error
    width = secagg.bytes_of(config)
    with np.load(place / "numbers.npz") as numbers:
        values, exact = numbers["values"].astype(secagg.ring(width)), numbers["exact"].view(np.uint64)
    bound = b"mask" + secagg.context(request.sum, roster, held)
    secagg.add_mask(secagg.stretched(bytes.fromhex(state["seed"])), 1, exact, values)
    for peer in request.shares:
        common = secagg.agreed(bytes.fromhex(state["mask"]), secagg.public(roster[peer]).mask, bound)
        secagg.add_mask(common, secagg.pair_sign(centre, peer), exact, values)
    write(place, state | {"held": held})  # before anything leaves: a second answer would be to another set of centres
    return Masked(centre, secagg.packed(values, width), exact)


def unmask(place: Path, state: dict[str, Any], config: Config, centre: str, request: Unmask, policy: Policy) -> Unmasked:
    """A share of each survivor's seed and of each drop-out's key. After it this centre's secrets of the sum are gone."""
    held, survivors = {c: bytes.fromhex(both) for c, both in state.get("held", {}).items()}, sorted(set(request.survivors))
    if centre not in survivors or not set(survivors) <= held.keys():
        raise Refused("the survivors of this sum are not of those who masked their numbers for it")
    enough(config, policy, len(state["roster"]), len(survivors))
    path = place.parent / "done.json"
    done: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    name = request.sum.rpartition("/")[0] if request.sum.startswith("train") else request.sum  # a round is one sum, whatever it is told
    if done.setdefault(name, survivors) != survivors:
        raise Refused(
            f"it was in this sum before, with {', '.join(done[name])}: it may be repeated with the same centres only, as else the "
            "difference would show single ones; wait for those who are missing, then resume"
        )
    write_whole(path, json.dumps(done).encode(), 0o600)
    (place / "state.json").unlink()
    if not request.sum.startswith("train"):
        shutil.rmtree(place)
    return Unmasked(centre, {c: array(both[:SIZE] if c in survivors else both[SIZE:]) for c, both in held.items()})


def once(state: Mapping[str, Any], what: str) -> None:
    """Raises Refused for a step that was taken already."""
    if what in state:
        raise Refused("it has taken this step of the sum already; a sum that was broken off must be begun again")


def enough(config: Config, policy: Policy, began: int, there: int) -> None:
    """Raises Refused where a sum would be over too few centres."""
    needed = max(secagg.threshold(config, began), policy.smallest_federation)
    if there < needed:
        raise Refused(f"a sum over {there} centres is not opened here: {needed} are needed")


def array(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def write(place: Path, state: Mapping[str, Any]) -> None:
    write_whole(place / "state.json", json.dumps(state).encode(), 0o600)
