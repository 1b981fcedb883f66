"""Score a model: sums over the scans of each cohort and task that give metrics, and no scan's own score.

The statistics of a task are `hist` [2, bins] of a binary one, `confusion` [K, K] of a multiclass one,
`regression` (common/learning/metrics/), `overlap` and `joint` of a segmentation
(common/learning/segmentation_metrics.py), and of every task `loss` [2]: the summed loss and the number of
scans in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.dataset import ScanDataset, stack_batch
from client.federation.query_context import QueryContext
from client.imaging.severity import compute_severity
from client.training.moco import info_nce
from client.training.objective import mask_patches
from client.training.trainer import run_inference
from common.config.normalise import stage_tasks
from common.config.schema import Task
from common.learning.losses import compute_loss_sum, output_dim
from common.learning.metrics import compute_regression_sums, compute_score_histogram
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.modeling.model import Model
from common.protocol.messages import Sums
from common.protocol.sum_key import SumKey

Floats = NDArray[np.float64]
SELF_SUPERVISED_TYPES = ("inpainting", "contrastive")


@dataclass
class CohortScores:
    """What has been computed of one cohort's scores."""

    context: QueryContext
    model: Model
    cohort: str
    scans: ScanDataset
    tasks: Mapping[str, Task]  # those that some scan here has a label for
    sums: Sums = field(default_factory=dict)
    outputs: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, task: str, statistic: str, values: Floats) -> None:
        """Add values to a statistic of a task."""
        key = str(SumKey(self.cohort, task, statistic))
        self.sums[key] = self.sums.get(key, 0) + values

    def add_loss(self, task: str, loss: float, num_scans: int) -> None:
        """Add a summed loss over some scans."""
        self.add(task, "loss", np.array([loss, num_scans]))

    def predict(self, slices: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        """Return {task: outputs [B, ...]} of slices uint8 [B, S, H, W]."""
        return run_inference(
            self.model,
            [slices],
            lambda model, images: model(images, tasks),
            precision=self.context.stage.precision,
            device=self.context.device,
        )


def sum_scores(context: QueryContext) -> Sums:
    """Score the model on the requested split, cohort by cohort: {SumKey: statistic}."""
    sums: Sums = {}
    if context.model is None:
        return sums
    dataset = context.dataset
    for cohort in sorted(set(dataset.centres)):
        rows = np.flatnonzero([centre == cohort for centre in dataset.centres])
        scans = dataset.subset(rows)
        scores = CohortScores(context, context.model, cohort, scans, _select_tasks(context, scans))
        _score_cohort(scores)
        sums |= scores.sums
    return sums


def _select_tasks(context: QueryContext, scans: ScanDataset) -> dict[str, Task]:
    """Return the stage's tasks that some scan has a label or a known severity for."""
    tasks = {}
    for name in stage_tasks(context.config, context.stage):
        task = context.config.tasks[name]
        has_severity = task.severity_column and np.isfinite(scans.extra_targets[name]).any()
        if scans.has_label(name).any() or has_severity:
            tasks[name] = task
    return tasks


def _score_cohort(scores: CohortScores) -> None:
    if not scores.tasks:
        return
    num_scans = len(scores.scans)
    batch_size = scores.context.stage.batch_size
    for start in range(0, num_scans, batch_size):
        _score_batch(scores, np.arange(start, min(start + batch_size, num_scans)))
    for name, outputs in scores.outputs.items():
        _score_outputs(scores, name, torch.cat(outputs))


def _score_batch(scores: CohortScores, rows: NDArray[np.int64]) -> None:
    """Score one batch.

    Outputs of one vector a scan are collected. Masks and images are too large for that and are summed now.
    """
    slices = stack_batch([scores.scans.slices[row] for row in rows])
    supervised = [name for name, task in scores.tasks.items() if task.type not in SELF_SUPERVISED_TYPES]
    predictions = scores.predict(slices, supervised) if supervised else {}
    for name, output in predictions.items():
        if scores.tasks[name].type == "segmentation":
            _score_masks(scores, name, output, rows)
        else:
            scores.outputs[name].append(output)
    # The same random masks in every round, so that only the model makes a difference.
    generator = torch.Generator().manual_seed(int(rows[0]))
    for name, task in scores.tasks.items():
        if task.type == "inpainting":
            _score_inpainting(scores, name, slices, generator)
        elif task.type == "contrastive":
            _score_contrast(scores, name, slices, rows)


def _score_masks(scores: CohortScores, name: str, output: Tensor, rows: NDArray[np.int64]) -> None:
    """Compare predicted masks with the known ones, and the severity they give with the known severity."""
    task = scores.tasks[name]
    scans = scores.scans
    target = scans.targets_for(name, rows)
    loss, num_scans = compute_loss_sum(task, output, target)
    scores.add_loss(name, float(loss), num_scans)
    lesions = (output.sigmoid() >= task.threshold).numpy()
    scores.add(name, "overlap", compute_overlap_sums(lesions, target.numpy()))
    if name not in scans.extra_targets:
        return
    severities = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        lungs = scans.lung_masks[row]
        if lungs is not None:
            severities[i] = compute_severity(lesions[i], lungs)
    known_severities = scans.extra_targets[name][rows]
    joint = compute_joint_histogram(severities, known_severities, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)
    scores.add(name, "joint", joint)


def _score_inpainting(scores: CohortScores, name: str, slices: Tensor, generator: torch.Generator) -> None:
    """Compare what the model paints into masked patches with the image."""
    task = scores.tasks[name]
    images = slices.float() / 255
    masked_images, is_masked = mask_patches(images, task.mask_ratio, generator)
    output = scores.predict((masked_images * 255).round().byte(), [name])[name]
    loss, num_scans = compute_loss_sum(task, output, torch.where(is_masked, images, torch.nan))
    scores.add_loss(name, float(loss), num_scans)


def _score_contrast(scores: CohortScores, name: str, slices: Tensor, rows: NDArray[np.int64]) -> None:
    """Tell each scan's mirror image from those of the batch's other scans."""
    queries = scores.predict(slices, [name])[name]
    keys = scores.predict(slices.flip(-1), [name])[name]
    empty_queue = queries[:0]
    empty_queue_rows = torch.empty(0, dtype=torch.long)
    temperature = scores.tasks[name].contrastive.temperature
    losses = info_nce(queries, keys, torch.from_numpy(rows), empty_queue, empty_queue_rows, temperature)
    scores.add_loss(name, float(losses.sum()), len(rows))


def _score_outputs(scores: CohortScores, name: str, outputs: Tensor) -> None:
    """Sum up the outputs [N, K] of all of the cohort's scans for a task with a label a scan."""
    task = scores.tasks[name]
    targets = scores.scans.targets[name]
    if task.type == "binary":
        logits = outputs[:, 0].double().numpy()
        num_bins = scores.context.config.evaluation.histogram_bins
        scores.add(name, "hist", compute_score_histogram(logits, targets, num_bins))
    elif task.type == "regression":
        columns = targets.reshape(len(targets), -1)
        scores.add(name, "regression", compute_regression_sums(outputs.double().numpy(), columns))
    else:
        scores.add(name, "confusion", _count_confusions(outputs, targets, output_dim(task)))
    loss, num_scans = compute_loss_sum(task, outputs, torch.from_numpy(targets))
    scores.add_loss(name, float(loss), num_scans)


def _count_confusions(outputs: Tensor, targets: Floats, num_classes: int) -> Floats:
    """Return [K, K]: scans of each true class (row) and predicted class (column)."""
    is_labelled = np.isfinite(targets)
    true_classes = targets[is_labelled].astype(int)
    predicted_classes = outputs.argmax(1).numpy()[is_labelled]
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (true_classes, predicted_classes), 1)
    return confusion
