"""What the answer to a query looks like when nothing is in it: in a secure sum every centre's vector must have the same places.

No centre has a name there: its sums count as those of the cohort `all`.
"""

from __future__ import annotations

import numpy as np

from common.compose import active
from common.errors import Refused
from common.messages import Query, Sums
from common.metrics import histogram, regression_sums
from common.overlap import SEVERITY_EDGES, SHARE_EDGES, joint_histogram, overlap_sums
from common.schema import Config, Task
from common.secagg import ALL
from common.tasks import cells_of, outputs_of
from common.weights import Layout

SPLITS = ("train", "val", "test")
NO = np.empty(0)


def blank(query: Query, config: Config, layout: Layout) -> Sums:
    """{key: zeros} of a query's answer (client/queries.py), `cohort` being `all`; counts also have the masses behind the centres' weights.

    Raises Refused for a query that is none of ours.
    """
    if query.name == "counts":
        cells = {t: len(cells_of(t, task)) + 1 for t, task in config.tasks.items()}
        found = {f"{ALL}/{split}/{t}": np.zeros(n) for split in SPLITS for t, n in cells.items()}
        return found | {f"{ALL}/mass/{t}": np.zeros(1) for t in cells}
    if query.name == "scores":
        tasks = {t: config.tasks[t] for t in active(config, config.stages[query.stage])}
        return {f"{ALL}/{t}/{what}": sums for t, task in tasks.items() for what, sums in scored(task, config.evaluation.bins).items()}
    if query.name == "moments":
        k, d = next(e.shape for e in layout.floats if e.group == query.task and len(e.shape) == 2)
        return {"n": np.zeros(k), "sum": np.zeros((k, d)), "square": np.zeros((d, d))}
    if query.name == "clusters" and query.centroids is not None:
        k, d = query.centroids.shape
        return {"n": np.zeros(k), "sum": np.zeros((k, d)), "square": np.zeros(k)}
    raise Refused(f"query '{query.name}' cannot be answered in a secure sum")


def scored(task: Task, bins: int) -> Sums:
    """{what: zeros} that a model is measured by at a task."""
    loss = {"loss": np.zeros(2)}
    if task.kind == "binary":
        return loss | {"hist": histogram(NO, NO, bins)}
    if task.kind == "multiclass":
        return loss | {"confusion": np.zeros((outputs_of(task), outputs_of(task)))}
    if task.kind == "regression":
        none = np.empty((0, outputs_of(task)))
        return loss | {"regression": regression_sums(none, none)}
    if task.kind == "segmentation":
        pixels = np.empty((0, 1), np.uint8)
        joint = {"joint": joint_histogram(NO, NO, SHARE_EDGES, SEVERITY_EDGES)} if task.burden else {}
        return loss | joint | {"overlap": overlap_sums(pixels == 1, pixels)}
    return loss


def nameless(sums: Sums, empty: Sums) -> Sums:
    """A centre's sums in the places of `empty`, its cohorts' names replaced. Raises Refused for a sum that has no place there."""
    found = {key: array.copy() for key, array in empty.items()}
    for key, array in sums.items():
        place = f"{ALL}/{key.partition('/')[2]}" if "/" in key else key
        if place not in found or found[place].shape != np.shape(array):
            raise Refused(f"its answer has a '{key.rpartition('/')[2]}' that no other centre's would have")
        found[place] += array
    return found
