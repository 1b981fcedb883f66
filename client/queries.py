"""Additive queries: everything the coordinator may know about data is a sum over scans. One function a query, registered by its name.

A query takes the centre's scans of a split (and a model, where it needs one) and returns {key: array}; the server adds the arrays of all centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from client.dataset import Scans, in_order
from client.trainer import infer
from common.messages import Sums
from common.metrics import histogram
from common.model import Model
from common.schema import Config, Stage, Task
from common.tasks import outputs_of, stage_loss


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


def class_counts(targets: np.ndarray, task: Task, smallest_cell: int = 1) -> np.ndarray:
    """Scans per class [K], then the unlabelled [K + 1]. A cell that is not empty but too small to report counts as the smallest reportable size."""
    classes = 2 if task.kind == "binary" else len(task.classes)
    labelled = targets[np.isfinite(targets)]
    counts = np.append(np.bincount(labelled.astype(int), minlength=classes), len(targets) - len(labelled)).astype(np.float64)
    return np.where((counts > 0) & (counts < smallest_cell), smallest_cell, counts)


def counts(q: Question) -> Sums:
    """`cohort/split/task` -> [K + 1] (class_counts), for every split."""
    found: Sums = {}
    for split, scans in q.scans.items():
        for centre in sorted(set(scans.cohort)):
            own = np.array([c == centre for c in scans.cohort])
            for name, task in q.config.tasks.items():
                found[f"{centre}/{split}/{name}"] = class_counts(scans.targets[name][own], task, q.smallest_cell)
    return found


def scores(q: Question) -> Sums:
    """How the model does on the split, by cohort and task: `cohort/task/hist` [2, bins] of a binary task, `cohort/task/confusion` [K, K] of
    a multiclass one, `cohort/task/loss` [2] = (sum, n). No scan's score leaves: only how many fall into a bin."""
    scans = q.scans[q.split]
    if q.model is None or not len(scans):
        return {}
    tasks = {t: q.config.tasks[t] for t in (q.stage.tasks or list(q.config.tasks))}
    logits = infer(q.model, in_order(scans, q.stage.batch), lambda m, x: m(x, list(tasks)), precision=q.stage.precision, device=q.device)
    found: Sums = {}
    for centre in sorted(set(scans.cohort)):
        own = np.array([c == centre for c in scans.cohort])
        for name, task in tasks.items():
            z, y = logits[name][torch.from_numpy(own)], scans.targets[name][own]
            if task.kind == "binary":
                found[f"{centre}/{name}/hist"] = histogram(z[:, 0].double().numpy(), y, q.config.evaluation.bins)
            else:
                known = np.isfinite(y)
                pairs = np.stack([y[known].astype(int), z.argmax(1).numpy()[known]])
                confusion = np.zeros((outputs_of(task), outputs_of(task)))
                np.add.at(confusion, (pairs[0], pairs[1]), 1)
                found[f"{centre}/{name}/confusion"] = confusion
            losses = stage_loss({name: task}, {name: z}, {name: torch.from_numpy(y)}, {})
            found[f"{centre}/{name}/loss"] = np.array(losses.sums[name], dtype=np.float64)
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


QUERIES: dict[str, Callable[[Question], Sums]] = {"counts": counts, "scores": scores, "moments": moments}
