"""Check what the coordinator asks of a secure sum, so that it cannot make the sum show one centre's numbers.

See common/privacy/secure_aggregation/cover.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from client.federation.secure_sum_store import HeldShares
from common.config.normalise import stage_tasks
from common.config.schema import Config
from common.privacy import secure_aggregation
from common.protocol.messages import TrainRequest
from common.utils.errors import RefusalCode, Refused

ROUNDING = 1e-6  # relative; totals of `scope: all` were themselves summed in steps of 2^-24


def compute_shares_of_weight(
    config: Config, request: TrainRequest, label_weights: Mapping[str, float]
) -> dict[str, float]:
    """Return {task: this centre's part of the weight of all centres} for the tasks that any has labels for.

    `label_weights` is {task: this centre's weight}. Raises Refused unless the request's totals name the tasks
    of the stage, and none is smaller than this centre's own weight.
    """
    totals = request.total_label_weight
    tasks = stage_tasks(config, config.stages[request.stage])
    if totals.keys() != set(tasks):
        raise _refused("total_label_weight does not name the tasks of the stage")
    shares = {}
    for task in tasks:
        total = totals[task]
        weight = label_weights[task]
        if not math.isfinite(total) or total < 0 or weight > total * (1 + ROUNDING):
            raise _refused(f"total_label_weight of task '{task}' cannot be a sum with this centre's weight")
        if total > 0:
            shares[task] = weight / total
    return shares


def require_own_cover(
    held: Mapping[str, HeldShares], centre: str, piece_names: Sequence[str], min_centres: int
) -> None:
    """Raise Refused where fewer than `min_centres` centres, with this one, add to a piece in like measure."""
    magnitudes = _list_magnitudes(held, held.keys())
    uncovered = secure_aggregation.find_uncovered(magnitudes, centre, min_centres)
    if uncovered.size:
        name = piece_names[uncovered[0]]
        raise _refused(
            f"fewer than {min_centres - 1} other centres add in like measure to '{name}', "
            "so that the sum would show this centre's numbers; leave out what few centres have labels for, "
            "or weigh the centres more evenly (aggregation.tau)"
        )


def require_cover_of_all(held: Mapping[str, HeldShares], survivors: Collection[str]) -> None:
    """Raise Refused where the sum over the survivors would show the numbers of any of them."""
    magnitudes = _list_magnitudes(held, survivors)
    for survivor in survivors:
        if secure_aggregation.find_uncovered(magnitudes, survivor).size:
            raise _refused("the sum over these centres would show the numbers of one of them")


def _list_magnitudes(
    held: Mapping[str, HeldShares], centres: Collection[str]
) -> dict[str, secure_aggregation.Magnitudes]:
    magnitudes = {centre: held[centre].magnitudes for centre in centres}
    if len({len(sizes) for sizes in magnitudes.values()}) > 1:
        raise _refused("the centres do not add the same pieces")
    return magnitudes


def _refused(reason: str) -> Refused:
    return Refused(f"this centre takes no part in the secure sum: {reason}", RefusalCode.POLICY)
