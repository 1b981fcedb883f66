"""Additive queries: everything the coordinator may know about data is a sum over scans. One function a query, registered by its name.

A query takes the centre's scans of a split (and a model, where it needs one) and returns {key: array}; the server adds the arrays of all centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.dataset import Scans, in_order, stacked
from client.moco import contrast
from client.objective import paint
from client.quality import quality
from client.severity import severity
from client.store import Store
from client.trainer import infer
from common.compose import active
from common.errors import Refused
from common.messages import Sums
from common.metrics import histogram, regression_sums
from common.model import Model
from common.overlap import SEVERITY_EDGES, SHARE_EDGES, joint_histogram, overlap_sums
from common.schema import Config, Stage, Task
from common.tasks import cells_of, loss_sum, outputs_of

Floats = NDArray[np.float64]


@dataclass
class Question:
    """What a query is computed from; `model` has the asked weights, or is None when none came."""

    scans: Mapping[str, Scans]  # {split: scans}
    split: str
    config: Config
    stage: Stage
    model: Model | None
    task: str
    smallest_cell: int
    device: torch.device
    centroids: Floats | None = None  # clusters: [K, D]
    features: Path | None = None  # clusters: where the features are kept between the steps
    stores: Mapping[str, Store] = field(default_factory=dict)  # {cohort: where its slices are}, for what was noted beside them


def class_counts(targets: np.ndarray, cells: int, smallest_cell: int = 1) -> np.ndarray:
    """Scans per cell [K] (common/tasks.py `cells_of`), then the unlabelled [K + 1]. A cell that is not empty but too small to report counts as
    the smallest reportable size."""
    known = np.isfinite(targets).all(axis=1) if targets.ndim > 1 else np.isfinite(targets)
    where = targets[known].astype(int) if cells > 1 else np.zeros(int(known.sum()), int)
    counts = np.append(np.bincount(where, minlength=cells), len(targets) - len(where)).astype(np.float64)
    return np.where((counts > 0) & (counts < smallest_cell), smallest_cell, counts)


def counts(q: Question) -> Sums:
    """`cohort/split/task` -> [K + 1] (class_counts), for every split."""
    found: Sums = {}
    for split, scans in q.scans.items():
        for centre in sorted(set(scans.cohort)):
            own = np.array([c == centre for c in scans.cohort])
            for name, task in q.config.tasks.items():
                found[f"{centre}/{split}/{name}"] = class_counts(scans.targets[name][own], len(cells_of(name, task)), q.smallest_cell)
    return found


def scores(q: Question) -> Sums:
    """How the model does on the split, by cohort and task: `cohort/task/what` with what = `hist` [2, bins] of a binary task, `confusion` [K, K] of
    a multiclass one, `regression` as in common/metrics.py, `overlap` (and `joint`, severity predicted and known) as in common/overlap.py, and `loss`
    [2] = (sum, n) of every task. No scan's score leaves: only sums over the cohort. A task that no scan here has a label for is not computed."""
    whole = q.scans[q.split]
    found: Sums = {}
    if q.model is None:
        return found
    for centre in sorted(set(whole.cohort)):
        scans = whole.take(np.flatnonzero([c == centre for c in whole.cohort]))
        tasks = {t: q.config.tasks[t] for t in active(q.config, q.stage)}
        tasks = {t: task for t, task in tasks.items() if scans.labelled(t).any() or (task.burden and np.isfinite(scans.extra[t]).any())}
        kept: dict[str, list[Tensor]] = {}
        for start in range(0, len(scans), q.stage.batch) if tasks else []:
            rows = np.arange(start, min(start + q.stage.batch, len(scans)))
            for key, value in _of_batch(q, q.model, scans, rows, tasks).items():
                if isinstance(value, Tensor):  # a vector a scan: kept until all are there
                    kept.setdefault(key, []).append(value)
                else:
                    found[f"{centre}/{key}"] = found.get(f"{centre}/{key}", 0) + value
        for name, outputs in kept.items():
            z, task = torch.cat(outputs), tasks[name]
            y = scans.targets[name]
            if task.kind == "binary":
                found[f"{centre}/{name}/hist"] = histogram(z[:, 0].double().numpy(), y, q.config.evaluation.bins)
            elif task.kind == "regression":
                found[f"{centre}/{name}/regression"] = regression_sums(z.double().numpy(), y.reshape(len(y), -1))
            else:
                known = np.isfinite(y)
                confusion = np.zeros((outputs_of(task), outputs_of(task)))
                np.add.at(confusion, (y[known].astype(int), z.argmax(1).numpy()[known]), 1)
                found[f"{centre}/{name}/confusion"] = confusion
            summed, n = loss_sum(task, z, torch.from_numpy(y))
            found[f"{centre}/{name}/loss"] = np.array([float(summed), n])
    return found


def _of_batch(q: Question, model: Model, scans: Scans, rows: NDArray[np.integer], tasks: Mapping[str, Task]) -> dict[str, Tensor | Floats]:
    """What a batch of scans adds: {task: outputs [B, ...]} to be gathered, and {`task/what`: sums} of the tasks that are too big to gather."""
    slices = stacked([scans.slices[i] for i in rows])
    found: dict[str, Tensor | Floats] = {}

    def ask(pictures: Tensor, names: list[str]) -> dict[str, Tensor]:
        return infer(model, [pictures], lambda m, x: m(x, names), precision=q.stage.precision, device=q.device)

    plain = [t for t, task in tasks.items() if task.kind not in ("inpainting", "contrast")]
    for name, output in (ask(slices, plain) if plain else {}).items():
        if tasks[name].kind == "segmentation":
            target = scans.target(name, rows)
            summed, n = loss_sum(tasks[name], output, target)
            found[f"{name}/loss"] = np.array([float(summed), n])
            lesion = (output.sigmoid() >= tasks[name].cut).numpy()
            found[f"{name}/overlap"] = overlap_sums(lesion, target.numpy())
            if name in scans.extra:
                shares = [
                    severity(m, lungs) if (lungs := scans.lungs[i]) is not None else np.nan for m, i in zip(lesion, rows, strict=True)
                ]
                found[f"{name}/joint"] = joint_histogram(np.array(shares), scans.extra[name][rows], SHARE_EDGES, SEVERITY_EDGES)
        else:
            found[name] = output
    draws = torch.Generator().manual_seed(int(rows[0]))  # the same changes in every round: what is compared is the model
    for name, task in tasks.items():
        if task.kind == "inpainting":
            whole = slices.float() / 255
            painted, hidden = paint(whole, task.share, draws)
            summed, n = loss_sum(task, ask((painted * 255).round().byte(), [name])[name], torch.where(hidden, whole, torch.nan))
            found[f"{name}/loss"] = np.array([float(summed), n])
        elif task.kind == "contrast":  # a scan against its mirror image, told from the batch's others
            one, two = (ask(view, [name])[name] for view in (slices, slices.flip(-1)))
            nobody = torch.empty(0, dtype=torch.long)
            each = contrast(one, two, torch.from_numpy(rows), one[:0], nobody, task.contrast.temperature)
            found[f"{name}/loss"] = np.array([float(each.sum()), len(rows)])
    return found


def moments(q: Question) -> Sums:
    """Class moments of the pooled features f [D] for a source head fitted by the server: n [K], sum f [K, D], sum f f' [D, D]."""
    scans = q.scans[q.split]
    classes = outputs_of(q.config.tasks[q.task])
    if q.model is None or not len(scans):
        return {}
    found = infer(q.model, in_order(scans, q.stage.batch), lambda m, x: {"f": m.features(x)}, precision=q.stage.precision, device=q.device)
    y = scans.targets[q.task]
    known = np.isfinite(y)
    f, one_hot = found["f"].double().numpy()[known], np.eye(classes)[y[known].astype(int)]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ f, "square": f.T @ f}


def assigned(features: Floats, centroids: Floats) -> NDArray[np.int64]:
    """[N]: the nearest of the centroids [K, D] to each row of `features` [N, D]."""
    distance = (features**2).sum(1)[:, None] - 2 * features @ centroids.T + (centroids**2).sum(1)[None]
    return np.asarray(distance.argmin(1))


def pooled_features(q: Question) -> tuple[NDArray[np.integer], Floats]:
    """(rows, features [N, D]) of the split's scans that take part in a clustered task. Computed when weights come, then kept for the next steps,
    which send none. Raises Refused when they are gone."""
    scans = q.scans[q.split]
    rows = np.flatnonzero(np.isfinite(scans.extra.get(q.task, np.empty(0))))
    kept = q.features / f"{q.task}-{q.split}.npy" if q.features else None
    if not len(rows):
        return rows, np.empty((0, 0))
    if q.model is None:
        if kept is None or not kept.is_file():
            raise Refused("the features of this run are gone from its state folder; start the run anew")
        return rows, np.load(kept)
    some = in_order(scans.take(rows), q.stage.batch)
    features = infer(q.model, some, lambda m, x: {"f": m.features(x)}, precision=q.stage.precision, device=q.device)["f"].double().numpy()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, features)
    return rows, features


def clusters(q: Question) -> Sums:
    """One step of federated Lloyd k-means (server/kmeans.py): `n` [K], `sum` [K, D], `square` [K] (of |f|^2) of the scans nearest to each."""
    rows, features = pooled_features(q)
    if not len(rows) or q.centroids is None:
        return {}
    one_hot = np.eye(len(q.centroids))[assigned(features, q.centroids)]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": one_hot.T @ (features**2).sum(1)}


def looks(q: Question) -> Sums:
    """What the scans of all splits look like (client/quality.py)."""
    return quality(q.scans, q.stores, q.smallest_cell)


QUERIES: dict[str, Callable[[Question], Sums]] = {
    "counts": counts,
    "scores": scores,
    "moments": moments,
    "clusters": clusters,
    "quality": looks,
}
