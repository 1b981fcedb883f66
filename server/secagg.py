"""The coordinator's half of a secure sum (common/secagg.py): it passes keys and encrypted shares on, adds masked numbers up as they arrive, and
takes the masks away with what the centres open.

Who stays away in a step is left out of it, down to the threshold. Nothing but the total is kept: memory does not grow with the centres. A sum
that fails is begun again with new keys; what it was about lies at the centres.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import secagg
from common.compose import to_dict
from common.errors import ConsiliumError
from common.messages import Answer, Contribution, Mask, Masked, Refusal, Reply, Request, Share, Shares, Sums, Unmask, Unmasked
from common.secagg import Bytes
from server.broadcast import send
from server.state import Paused, Run, by_reason, reason_of


class TooFew(ConsiliumError):
    """Fewer centres than a sum needs stayed to its end; nothing was opened. `why`: {centre: reason}."""

    def __init__(self, needed: int, stayed: int, why: Mapping[str, str]) -> None:
        super().__init__(f"{stayed} centres stayed in a secure sum that needs {needed} ({by_reason(why)})")
        self.why = dict(why)


@dataclass
class Summed:
    """The sum over `survivors`: `values` [V] on their grid, `sums` as in the blank. `why`: {centre that is not in it: reason}."""

    values: NDArray[np.signedinteger]
    sums: Sums
    survivors: list[str]
    why: dict[str, str]


def summed(run: Run, said: Mapping[str, Contribution | Answer], size: int, blank: Sums, least: int = 0) -> Summed:
    """Add up what the centres that have `said` their keys keep masked: `size` parameters and the sums of `blank`. Raises TooFew where fewer than
    the threshold, or than `least`, stay; the latter is asked before anything is opened."""
    why: dict[str, str] = {}
    name, roster = agreed_on(said, why)
    config, threshold = to_dict(run.config), secagg.threshold(run.config, len(roster))

    def enough(there: int, needed: int) -> None:
        if there < needed:
            raise TooFew(needed, there, why)

    enough(len(roster), max(threshold, least))
    boxes: dict[str, dict[str, Bytes]] = {}
    share = {c: Share(run.id, config, name, roster) for c in roster}
    for centre, reply in replies(run, share, why):
        if isinstance(reply, Shares) and reply.shares.keys() == roster.keys() - {centre}:
            boxes[centre] = reply.shares
        else:
            why[centre] = reason_of(reply)
    enough(len(boxes), max(threshold, least))

    width = secagg.bytes_of(run.config)
    values, exact = np.zeros(size, secagg.ring(width)), np.zeros(sum(a.size for a in blank.values()), np.uint64)
    survivors: list[str] = []
    mask = {c: Mask(run.id, config, name, {by: box[c] for by, box in boxes.items() if by != c}) for c in boxes}
    for centre, reply in replies(run, mask, why):
        if not isinstance(reply, Masked):
            why[centre] = reason_of(reply)
        elif reply.values.shape != (size * width,) or reply.values.dtype != np.uint8:
            why[centre] = f"wrong shape: {reply.values.size} bytes instead of {size * width}"
        elif reply.exact.shape != exact.shape or reply.exact.dtype != np.uint64:
            why[centre] = f"wrong shape: {reply.exact.size} sums instead of {exact.size}"
        else:
            values += secagg.unpacked(reply.values, width)
            exact += reply.exact
            survivors.append(centre)
    survivors.sort()
    enough(len(survivors), max(threshold, least))

    opened: dict[str, Unmasked] = {}
    unmask = {c: Unmask(run.id, config, name, survivors) for c in survivors}
    for centre, reply in replies(run, unmask, why):
        if isinstance(reply, Unmasked) and reply.shares.keys() == boxes.keys():
            opened[centre] = reply
        else:
            why[centre] = reason_of(reply)
    enough(len(opened), threshold)
    helpers = dict(list(opened.items())[:threshold])
    for centre in sorted(boxes):
        take_away(name, roster, sorted(boxes), survivors, centre, helpers, values, exact)
    absent = {c: reason for c, reason in why.items() if c not in survivors}  # who is silent at the end is in the sum all the same
    return Summed(secagg.signed(values, width), secagg.parted(secagg.inexact(exact), blank), survivors, absent)


def agreed_on(said: Mapping[str, Contribution | Answer], why: dict[str, str]) -> tuple[str, dict[str, Bytes]]:
    """The sum that most centres mean, and the public keys of those who do."""
    names = Counter(reply.sum for reply in said.values())
    name = max(names, key=lambda n: (names[n], n), default="")
    roster: dict[str, Bytes] = {}
    for centre, reply in sorted(said.items()):
        keys = reply.keys
        if reply.sum != name or keys is None or keys.dtype != np.uint8 or keys.shape != (96,):
            why[centre] = "means another sum than the others: it was told other settings or weights, or runs without secure aggregation"
        else:
            roster[centre] = keys
    return name, roster


def take_away(
    name: str, roster: Mapping[str, Bytes], members: list[str], survivors: list[str], centre: str, helpers: Mapping[str, Unmasked],
    values: secagg.Values, exact: NDArray[np.uint64],
) -> None:  # fmt: skip
    """A survivor's own mask, or those that a drop-out shares with the survivors, out of the total. Raises Paused for shares that do not fit."""
    numbers = {c: n for n, c in enumerate(sorted(roster), 1)}
    shares = {numbers[c]: reply.shares[centre].tobytes() for c, reply in helpers.items()}
    keys, size = secagg.public(roster[centre]), 16 if centre in survivors else 32
    secret = secagg.combined(shares) if {len(share) for share in shares.values()} == {size} else b""
    if size == 16:
        fits = hashlib.sha256(secret).digest() == keys.seed
    else:
        fits = len(secret) == 32 and secagg.public_of(secret) == keys.mask
    if not fits:
        raise Paused(f"the shares of {centre}'s secret do not fit together: a centre ({', '.join(helpers)}, {centre}) runs other code")
    if centre in survivors:
        secagg.add_mask(secagg.stretched(secret), -1, exact, values)
        return
    bound = b"mask" + secagg.context(name, roster, members)
    for peer in survivors:
        common = secagg.agreed(secret, secagg.public(roster[peer]).mask, bound)
        secagg.add_mask(common, -secagg.pair_sign(peer, centre), exact, values)


def replies(run: Run, requests: Mapping[str, Request], why: dict[str, str]) -> Iterator[tuple[str, Reply]]:
    """Each centre's reply as it comes; `why` there is none of one."""
    for received in send(run, requests):
        if isinstance(received.reply, Refusal):
            why[received.centre] = received.reply.reason
        else:
            yield received.centre, received.reply
