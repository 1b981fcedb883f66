"""A cohort's scans ready to train on: memory-mapped slices and masks, targets, and batches drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.training.objective import Batch
from common.utils.errors import Refused
from common.config.schema import LabelKind, Stage, Task
from common.learning.losses import IGNORE_INDEX

OptionalMask = NDArray[np.uint8] | None


@dataclass
class ScanDataset:
    """`slices` N arrays uint8 [S, H, W] (memory maps); `targets` {task: float [N], or [N, R] of a regression; NaN = missing}, where a mask's
    says only whether there is one; `cohort` [N] the centre of each scan; `masks` {task: N masks uint8 [S, H, W] or None}; `lungs` likewise,
    1 right, 2 left, empty when no task asks for them; `extra` {task: float [N]} what else the cohort says: the known severity beside a mask,
    of a clustered task which scans take part (not NaN)."""

    slices: list[NDArray[np.uint8]]
    targets: dict[str, NDArray[np.float64]]
    centres: list[str]
    store_keys: list[str] = field(default_factory=list)  # in the store
    masks: dict[str, list[OptionalMask]] = field(default_factory=dict)
    lung_masks: list[OptionalMask] = field(default_factory=list)
    extra_targets: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    patient_ids: list[str] = field(default_factory=list)  # [N] whose scan it is, for `privacy=patient` and never sent
    views: list[ScanDataset] = field(default_factory=list)  # the same scans with other slices, for training

    def __len__(self) -> int:
        return len(self.slices)

    def has_label(self, task: str) -> NDArray[np.bool_]:
        """[N]: which scans have the label; of a regression all of its columns."""
        known = np.isfinite(self.targets[task])
        return np.asarray(known.all(axis=1) if known.ndim > 1 else known)

    def subset(self, rows: NDArray[np.integer]) -> ScanDataset:
        """Some of the scans."""
        return ScanDataset(
            [self.slices[i] for i in rows],
            {t: y[rows] for t, y in self.targets.items()},
            [self.centres[i] for i in rows],
            [self.store_keys[i] for i in rows] if self.store_keys else [],
            {t: [masks[i] for i in rows] for t, masks in self.masks.items()},
            [self.lung_masks[i] for i in rows] if self.lung_masks else [],
            {t: y[rows] for t, y in self.extra_targets.items()},
            [self.patient_ids[i] for i in rows] if self.patient_ids else [],
            [drawn.subset(rows) for drawn in self.views],
        )

    def select_labelled(self, tasks: Sequence[str]) -> ScanDataset:
        """The scans that have a label for any of the tasks: the others would teach nothing."""
        known = np.any([self.has_label(t) for t in tasks], axis=0)
        return self if known.all() else self.subset(np.flatnonzero(known))

    def targets_for(self, task: str, rows: NDArray[np.integer]) -> Tensor:
        """The targets of some scans, as the loss wants them (common/learning/losses.py)."""
        if task not in self.masks:
            return torch.from_numpy(self.targets[task][rows])
        unknown = np.full(self.slices[int(rows[0])].shape, IGNORE_INDEX, np.uint8)
        found = [unknown if (mask := self.masks[task][i]) is None else mask for i in rows]
        return torch.from_numpy(np.stack(found))


def concat_datasets(datasets: Sequence[ScanDataset]) -> ScanDataset:
    """The scans of several cohorts of one configuration, in their order."""
    whole = datasets[0].subset(np.arange(len(datasets[0])))
    for part in datasets[1:]:
        whole.slices += part.slices
        whole.centres += part.centres
        whole.store_keys += part.store_keys
        whole.lung_masks += part.lung_masks
        whole.patient_ids += part.patient_ids
        for name in whole.masks:
            whole.masks[name] += part.masks[name]
        whole.views = [concat_datasets(pair) for pair in zip(whole.views, part.views, strict=True)]
        for mine, others in ((whole.targets, part.targets), (whole.extra_targets, part.extra_targets)):
            for name in mine:
                mine[name] = np.concatenate([mine[name], others[name]])
    return whole


def stack_batch(slices: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 [B, S, H, W]. Raises Refused when a CT and a radiograph would share a batch."""
    if len({s.shape for s in slices}) > 1:
        raise Refused(
            "scans of different slice counts in one cohort (CT and radiographs?); add a column modality and set preprocess.modality=CT or XR"
        )
    return torch.from_numpy(np.stack(slices))


def count_round_steps(scans: ScanDataset, stage: Stage, mean_centre_scans: float = 0.0) -> int:
    """Optimiser steps of a round: `stage.local_steps`, or those of `stage.local_epochs` passes over the centre's scans, or with `stage.local_steps_mode: equal` over
    as many as the `average` centre has.

    A centre of many steps moves the model further whatever its weight: by passes over its own scans FedAvg's weight is n_c squared in effect
    (Wang et al., "Tackling the objective inconsistency problem", NeurIPS 2020). Pooled cohorts take the sum of what each would take
    alone, so that central, federated and local runs spend equal numbers of steps.
    """
    total = 0
    for centre in sorted(set(scans.centres)):
        n = mean_centre_scans if stage.local_steps_mode == "equal" and mean_centre_scans else scans.centres.count(centre)
        per_pass = n / stage.batch_size
        total += stage.local_steps or max(1, round((max(1, math.floor(per_pass)) if stage.drop_last else math.ceil(per_pass)) * stage.local_epochs))
    return total


def iterate_batches(scans: ScanDataset, tasks: Mapping[str, Task], stage: Stage, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches, shuffled anew each pass, or drawn by kind of label (`stage.sampling_ratios`); the order depends on the seed and the scans' number
    and labels only."""
    generator = np.random.default_rng(seed)
    if stage.sampling_ratios:
        odds = sampling_probabilities(scans, tasks, stage.sampling_ratios)
        for _ in range(steps):
            yield make_batch(scans, tasks, generator.choice(len(scans), stage.batch_size, p=odds), generator)
        return
    done = 0
    while done < steps:
        order = generator.permutation(len(scans))
        for start in range(0, len(order), stage.batch_size):
            rows = order[start : start + stage.batch_size]
            short = len(rows) < stage.batch_size
            if done == steps or (short and stage.drop_last and len(scans) >= stage.batch_size):
                break
            if len(rows) == 1 < stage.batch_size and len(order) > 1 and len(scans.slices[0]) == 1:
                rows = order[-2:]  # batch norm cannot learn from one picture alone
            yield make_batch(scans, tasks, rows, generator)
            done += 1


def make_batch(scans: ScanDataset, tasks: Mapping[str, Task], rows: NDArray[np.integer], generator: np.random.Generator) -> Batch:
    """A batch of these rows, each with one of its choices of slices."""
    views = [scans, *scans.views]
    which = generator.integers(len(views), size=len(rows)) if scans.views else np.zeros(len(rows), int)
    slices = stack_batch([views[k].slices[i] for k, i in zip(which, rows, strict=True)])
    targets = {t: scans.targets_for(t, rows) for t in tasks}
    for t in tasks if scans.views else []:
        if t in scans.masks:
            targets[t] = torch.cat([views[k].target(t, rows[n : n + 1]) for n, k in enumerate(which)])
    return Batch(slices, targets, torch.from_numpy(rows))


def sampling_probabilities(scans: ScanDataset, tasks: Mapping[str, Task], ratios: Mapping[LabelKind, float]) -> NDArray[np.float64]:
    """[N], each scan's odds to be drawn, so that the kinds of label come in their shares (triage, arXiv 2006.01441, section 4.4). What a centre
    lacks is divided among what it has. Raises Refused where it has none of them."""
    kinds = np.full(len(scans), "unlabelled")
    binary = next((t for t, task in tasks.items() if task.type == "binary"), None)
    if binary:
        kinds[scans.targets[binary] == 0], kinds[scans.targets[binary] == 1] = "negative", "positive"
    for task in scans.masks.keys() & tasks.keys():
        affected = [mask is not None and (binary is None or scans.targets[binary][i] != 0) for i, mask in enumerate(scans.masks[task])]
        kinds[affected] = "masked"
    odds = np.zeros(len(scans))
    for kind, share in ratios.items():
        if (kinds == kind).any():
            odds[kinds == kind] = share / (kinds == kind).sum()
    if not odds.sum():
        raise Refused(f"no training scan is of a kind that stage.sampling_ratios names ({', '.join(ratios)}); give another kind a share")
    return np.asarray(odds / odds.sum())


def iterate_slices(scans: ScanDataset, batch_size: int) -> Iterator[Tensor]:
    """All scans in order, uint8 [B, S, H, W]."""
    for start in range(0, len(scans), batch_size):
        yield stack_batch(scans.slices[start : start + batch_size])
