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

from client.data.dataset import ScanDataset, iterate_slices, stack_batch
from client.federation.image_statistics import compute_image_statistics
from client.imaging.severity import compute_severity
from client.imaging.slice_store import SliceStore
from client.training.moco import info_nce
from client.training.objective import mask_patches
from client.training.trainer import run_inference
from common.config.compose import stage_tasks
from common.config.schema import Config, Stage, Task
from common.learning.losses import class_names, compute_loss_sum, output_dim
from common.learning.metrics import compute_regression_sums, compute_score_histogram
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.modeling.model import Model
from common.protocol.messages import Sums
from common.utils.errors import Refused

Floats = NDArray[np.float64]


@dataclass
class QueryContext:
    """What a query is computed from; `model` has the asked weights, or is None when none came."""

    datasets: Mapping[str, ScanDataset]  # {split: scans}
    split: str
    config: Config
    stage: Stage
    model: Model | None
    task_name: str
    min_cell_count: int
    device: torch.device
    centroids: Floats | None = None  # clusters: [K, D]
    features_dir: Path | None = None  # clusters: where the features are kept between the steps
    slice_stores: Mapping[str, SliceStore] = field(
        default_factory=dict
    )  # {cohort: where its slices are}, for what was noted beside them


def count_classes(targets: np.ndarray, num_classes: int, min_cell_count: int = 1) -> np.ndarray:
    """Scans per cell [K] (common/learning/losses.py `cells_of`), then the unlabelled [K + 1]. A cell that is not empty but too small to report counts as
    the smallest reportable size."""
    known = np.isfinite(targets).all(axis=1) if targets.ndim > 1 else np.isfinite(targets)
    where = targets[known].astype(int) if num_classes > 1 else np.zeros(int(known.sum()), int)
    counts = np.append(np.bincount(where, minlength=num_classes), len(targets) - len(where)).astype(
        np.float64
    )
    return np.where((counts > 0) & (counts < min_cell_count), min_cell_count, counts)


def sum_label_counts(context: QueryContext) -> Sums:
    """`cohort/split/task` -> [K + 1] (class_counts), for every split."""
    found: Sums = {}
    for split, scans in context.datasets.items():
        for centre in sorted(set(scans.centres)):
            own = np.array([c == centre for c in scans.centres])
            for name, task in context.config.tasks.items():
                found[f"{centre}/{split}/{name}"] = count_classes(
                    scans.targets[name][own], len(class_names(name, task)), context.min_cell_count
                )
    return found


def sum_scores(context: QueryContext) -> Sums:
    """How the model does on the split, by cohort and task: `cohort/task/what` with what = `hist` [2, bins] of a binary task, `confusion` [K, K] of
    a multiclass one, `regression` as in common/learning/metrics.py, `overlap` (and `joint`, severity predicted and known) as in common/learning/segmentation_metrics.py, and `loss`
    [2] = (sum, n) of every task. No scan's score leaves: only sums over the cohort. A task that no scan here has a label for is not computed."""
    whole = context.datasets[context.split]
    found: Sums = {}
    if context.model is None:
        return found
    for centre in sorted(set(whole.centres)):
        scans = whole.subset(np.flatnonzero([c == centre for c in whole.centres]))
        tasks = {t: context.config.tasks[t] for t in stage_tasks(context.config, context.stage)}
        tasks = {
            t: task
            for t, task in tasks.items()
            if scans.has_label(t).any()
            or (task.severity_column and np.isfinite(scans.extra_targets[t]).any())
        }
        kept: dict[str, list[Tensor]] = {}
        for start in range(0, len(scans), context.stage.batch_size) if tasks else []:
            rows = np.arange(start, min(start + context.stage.batch_size, len(scans)))
            for key, value in _score_batch(context, context.model, scans, rows, tasks).items():
                if isinstance(value, Tensor):  # a vector a scan: kept until all are there
                    kept.setdefault(key, []).append(value)
                else:
                    found[f"{centre}/{key}"] = found.get(f"{centre}/{key}", 0) + value
        for name, outputs in kept.items():
            z, task = torch.cat(outputs), tasks[name]
            y = scans.targets[name]
            if task.type == "binary":
                found[f"{centre}/{name}/hist"] = compute_score_histogram(
                    z[:, 0].double().numpy(), y, context.config.evaluation.histogram_bins
                )
            elif task.type == "regression":
                found[f"{centre}/{name}/regression"] = compute_regression_sums(
                    z.double().numpy(), y.reshape(len(y), -1)
                )
            else:
                known = np.isfinite(y)
                confusion = np.zeros((output_dim(task), output_dim(task)))
                np.add.at(confusion, (y[known].astype(int), z.argmax(1).numpy()[known]), 1)
                found[f"{centre}/{name}/confusion"] = confusion
            summed, n = compute_loss_sum(task, z, torch.from_numpy(y))
            found[f"{centre}/{name}/loss"] = np.array([float(summed), n])
    return found


def _score_batch(
    context: QueryContext,
    model: Model,
    scans: ScanDataset,
    rows: NDArray[np.integer],
    tasks: Mapping[str, Task],
) -> dict[str, Tensor | Floats]:
    """What a batch of scans adds: {task: outputs [B, ...]} to be gathered, and {`task/what`: sums} of the tasks that are too big to gather."""
    slices = stack_batch([scans.slices[i] for i in rows])
    found: dict[str, Tensor | Floats] = {}

    def ask(pictures: Tensor, names: list[str]) -> dict[str, Tensor]:
        return run_inference(
            model,
            [pictures],
            lambda m, x: m(x, names),
            precision=context.stage.precision,
            device=context.device,
        )

    plain = [t for t, task in tasks.items() if task.type not in ("inpainting", "contrastive")]
    for name, output in (ask(slices, plain) if plain else {}).items():
        if tasks[name].type == "segmentation":
            target = scans.targets_for(name, rows)
            summed, n = compute_loss_sum(tasks[name], output, target)
            found[f"{name}/loss"] = np.array([float(summed), n])
            lesion = (output.sigmoid() >= tasks[name].threshold).numpy()
            found[f"{name}/overlap"] = compute_overlap_sums(lesion, target.numpy())
            if name in scans.extra_targets:
                shares = [
                    compute_severity(m, lungs) if (lungs := scans.lung_masks[i]) is not None else np.nan
                    for m, i in zip(lesion, rows, strict=True)
                ]
                found[f"{name}/joint"] = compute_joint_histogram(
                    np.array(shares), scans.extra_targets[name][rows], AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
                )
        else:
            found[name] = output
    draws = torch.Generator().manual_seed(
        int(rows[0])
    )  # the same changes in every round: what is compared is the model
    for name, task in tasks.items():
        if task.type == "inpainting":
            whole = slices.float() / 255
            painted, hidden = mask_patches(whole, task.mask_ratio, draws)
            summed, n = compute_loss_sum(
                task, ask((painted * 255).round().byte(), [name])[name], torch.where(hidden, whole, torch.nan)
            )
            found[f"{name}/loss"] = np.array([float(summed), n])
        elif task.type == "contrastive":  # a scan against its mirror image, told from the batch's others
            one, two = (ask(view, [name])[name] for view in (slices, slices.flip(-1)))
            nobody = torch.empty(0, dtype=torch.long)
            each = info_nce(one, two, torch.from_numpy(rows), one[:0], nobody, task.contrastive.temperature)
            found[f"{name}/loss"] = np.array([float(each.sum()), len(rows)])
    return found


def sum_class_moments(context: QueryContext) -> Sums:
    """Class moments of the pooled features f [D] for a source head fitted by the server: n [K], sum f [K, D], sum f f' [D, D]."""
    scans = context.datasets[context.split]
    classes = output_dim(context.config.tasks[context.task_name])
    if context.model is None or not len(scans):
        return {}
    found = run_inference(
        context.model,
        iterate_slices(scans, context.stage.batch_size),
        lambda m, x: {"f": m.extract_features(x)},
        precision=context.stage.precision,
        device=context.device,
    )
    y = scans.targets[context.task_name]
    known = np.isfinite(y)
    f, one_hot = found["f"].double().numpy()[known], np.eye(classes)[y[known].astype(int)]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ f, "square": f.T @ f}


def nearest_centroid(features: Floats, centroids: Floats) -> NDArray[np.int64]:
    """[N]: the nearest of the centroids [K, D] to each row of `features` [N, D]."""
    distance = (features**2).sum(1)[:, None] - 2 * features @ centroids.T + (centroids**2).sum(1)[None]
    return np.asarray(distance.argmin(1))


def load_pooled_features(context: QueryContext) -> tuple[NDArray[np.integer], Floats]:
    """(rows, features [N, D]) of the split's scans that take part in a clustered task. Computed when weights come, then kept for the next steps,
    which send none. Raises Refused when they are gone."""
    scans = context.datasets[context.split]
    rows = np.flatnonzero(np.isfinite(scans.extra_targets.get(context.task_name, np.empty(0))))
    kept = context.features_dir / f"{context.task_name}-{context.split}.npy" if context.features_dir else None
    if not len(rows):
        return rows, np.empty((0, 0))
    if context.model is None:
        if kept is None or not kept.is_file():
            raise Refused("the features of this run are gone from its state folder; start the run anew")
        return rows, np.load(kept)
    some = iterate_slices(scans.subset(rows), context.stage.batch_size)
    features = (
        run_inference(
            context.model,
            some,
            lambda m, x: {"f": m.extract_features(x)},
            precision=context.stage.precision,
            device=context.device,
        )["f"]
        .double()
        .numpy()
    )
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, features)
    return rows, features


def sum_clusters(context: QueryContext) -> Sums:
    """One step of federated Lloyd k-means (server/analysis/kmeans.py): `n` [K], `sum` [K, D], `square` [K] (of |f|^2) of the scans nearest to each."""
    rows, features = load_pooled_features(context)
    if not len(rows) or context.centroids is None:
        return {}
    one_hot = np.eye(len(context.centroids))[nearest_centroid(features, context.centroids)]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": one_hot.T @ (features**2).sum(1)}


def sum_image_statistics(context: QueryContext) -> Sums:
    """What the scans of all splits look like (client/federation/image_statistics.py)."""
    return compute_image_statistics(context.datasets, context.slice_stores, context.min_cell_count)


QUERY_HANDLERS: dict[str, Callable[[QueryContext], Sums]] = {
    "counts": sum_label_counts,
    "scores": sum_scores,
    "moments": sum_class_moments,
    "clusters": sum_clusters,
    "quality": sum_image_statistics,
}
