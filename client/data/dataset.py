"""A cohort's scans ready to train on: memory-mapped slices and masks, targets, batches drawn from a seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.batch import Batch
from common.config.schema import LabelKind, Stage, Task
from common.learning.losses import IGNORE_INDEX
from common.utils.errors import Refused

T = TypeVar("T")
OptionalMask = NDArray[np.uint8] | None


@dataclass
class ScanDataset:
    """Scans with their targets; all lists have N entries, or none where nobody needs them.

    Attributes:
        slices: uint8 [S, H, W] each, memory-mapped.
        targets: {task: float [N], or [N, R] of a regression}; NaN is missing. Of a segmentation it only says
            whether there is a mask.
        centres: Whose scan each is.
        store_keys: The scans' keys in the slice store.
        masks: {task: uint8 [S, H, W] each, or None}.
        lung_masks: uint8 [S, H, W] each, 1 the right and 2 the left lung, or None.
        extra_targets: {task: float [N]} what else the cohort says: the known severity beside a mask; of a
            clustered task which scans take part (those that are not NaN).
        patient_ids: Whose scan each is, for `privacy=patient`; never sent.
        scan_ids: Which scan each is; never sent.
        divisions: The table's split, or the fold, and the modality of each: what a request can select it by.
        views: The same scans with other slices, for training.
    """

    slices: list[NDArray[np.uint8]]
    targets: dict[str, NDArray[np.float64]]
    centres: list[str]
    store_keys: list[str] = field(default_factory=list)
    masks: dict[str, list[OptionalMask]] = field(default_factory=dict)
    lung_masks: list[OptionalMask] = field(default_factory=list)
    extra_targets: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    patient_ids: list[str] = field(default_factory=list)
    scan_ids: list[str] = field(default_factory=list)
    divisions: list[str] = field(default_factory=list)
    views: list[ScanDataset] = field(default_factory=list)

    def __len__(self) -> int:
        """Return N."""
        return len(self.slices)

    def has_label(self, task: str) -> NDArray[np.bool_]:
        """Return [N]: whether each scan has the label, of a regression in all of its columns."""
        is_known = np.isfinite(self.targets[task])
        if is_known.ndim > 1:
            return np.asarray(is_known.all(axis=1))
        return np.asarray(is_known)

    def subset(self, rows: NDArray[np.integer]) -> ScanDataset:
        """Return the scans of these rows, in this order."""
        return ScanDataset(
            slices=_select(self.slices, rows),
            targets=_select_in_each(self.targets, rows),
            centres=_select(self.centres, rows),
            store_keys=_select(self.store_keys, rows),
            masks={task: _select(masks, rows) for task, masks in self.masks.items()},
            lung_masks=_select(self.lung_masks, rows),
            extra_targets=_select_in_each(self.extra_targets, rows),
            patient_ids=_select(self.patient_ids, rows),
            scan_ids=_select(self.scan_ids, rows),
            divisions=_select(self.divisions, rows),
            views=[view.subset(rows) for view in self.views],
        )

    def select_labelled(self, tasks: Sequence[str]) -> ScanDataset:
        """Return the scans that have a label for any of the tasks; the others have nothing to teach."""
        is_labelled = np.any([self.has_label(task) for task in tasks], axis=0)
        if is_labelled.all():
            return self
        return self.subset(np.flatnonzero(is_labelled))

    def targets_for(self, task: str, rows: NDArray[np.integer]) -> Tensor:
        """Return the targets of these rows in the form that the loss takes (common/learning/losses.py)."""
        if task not in self.masks:
            return torch.from_numpy(self.targets[task][rows])
        masks = np.full((len(rows), *self.slices[int(rows[0])].shape), IGNORE_INDEX, np.uint8)
        for index, row in enumerate(rows):
            mask = self.masks[task][row]
            if mask is not None:
                masks[index] = mask
        return torch.from_numpy(masks)


def _select(values: Sequence[T], rows: NDArray[np.integer]) -> list[T]:
    """Return the values of these rows; none where nobody needs any."""
    if not values:
        return []
    return [values[row] for row in rows]


def _select_in_each(
    arrays: Mapping[str, NDArray[np.float64]], rows: NDArray[np.integer]
) -> dict[str, NDArray[np.float64]]:
    return {name: values[rows] for name, values in arrays.items()}


def concat_datasets(datasets: Sequence[ScanDataset]) -> ScanDataset:
    """Return the scans of several cohorts of one configuration, cohort after cohort."""
    combined = datasets[0].subset(np.arange(len(datasets[0])))
    for dataset in datasets[1:]:
        combined.slices += dataset.slices
        combined.centres += dataset.centres
        combined.store_keys += dataset.store_keys
        combined.lung_masks += dataset.lung_masks
        combined.patient_ids += dataset.patient_ids
        combined.scan_ids += dataset.scan_ids
        combined.divisions += dataset.divisions
        for task in combined.masks:
            combined.masks[task] += dataset.masks[task]
        _extend_each(combined.targets, dataset.targets)
        _extend_each(combined.extra_targets, dataset.extra_targets)
        view_pairs = zip(combined.views, dataset.views, strict=True)
        combined.views = [concat_datasets(pair) for pair in view_pairs]
    return combined


def _extend_each(arrays: dict[str, NDArray[np.float64]], others: Mapping[str, NDArray[np.float64]]) -> None:
    for name, values in arrays.items():
        arrays[name] = np.concatenate([values, others[name]])


def stack_batch(slices: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Stack scans to uint8 [B, S, H, W]; raises Refused when a CT and a radiograph would share a batch."""
    shapes = {scan.shape for scan in slices}
    if len(shapes) > 1:
        raise Refused(
            "scans of different slice counts are in one cohort (CT and radiographs?); "
            "add a column modality and set preprocess.modality=CT or XR"
        )
    return torch.from_numpy(np.stack(slices))


def count_round_steps(
    scans: ScanDataset,
    stage: Stage,
    mean_centre_scans: float = 0.0,
    epoch_scans: Mapping[str, int] | None = None,
) -> int:
    """Count the optimiser steps of a round.

    They are `stage.local_steps`, or those of `stage.local_epochs` passes over the centre's scans. With
    `stage.local_steps_mode: equal` the passes are over as many scans as the mean centre has,
    `mean_centre_scans`: a centre of many steps moves the model further whatever its weight, so that by
    passes over its own scans FedAvg's weight is n_c squared in effect (Wang et al., "Tackling the objective
    inconsistency problem", NeurIPS 2020). Pooled cohorts take the sum of what each would take alone, so that
    central, federated and local runs spend equal numbers of steps. `epoch_scans` is {centre: scans of a pass}
    where these are not all.
    """
    num_steps = 0
    if epoch_scans is None:
        epoch_scans = Counter(scans.centres)
    for num_scans in epoch_scans.values():
        if stage.local_steps:
            num_steps += stage.local_steps
        elif stage.local_steps_mode == "equal" and mean_centre_scans:
            num_steps += _count_epoch_steps(mean_centre_scans, stage)
        else:
            num_steps += _count_epoch_steps(num_scans, stage)
    return num_steps


def _count_epoch_steps(num_scans: float, stage: Stage) -> int:
    """Count the steps of `stage.local_epochs` passes over this many scans, at least one."""
    batches_per_pass = math.ceil(num_scans / stage.batch_size)
    if stage.drop_last:
        batches_per_pass = max(1, math.floor(num_scans / stage.batch_size))
    return max(1, round(batches_per_pass * stage.local_epochs))


def iterate_batches(
    scans: ScanDataset, tasks: Mapping[str, Task], stage: Stage, steps: int, seed: int
) -> Iterator[Batch]:
    """Yield `steps` batches, shuffled anew each pass, or drawn by kind of label (`stage.sampling_ratios`).

    The order depends on nothing but the seed and the scans' number and labels.
    """
    generator = np.random.default_rng(seed)
    if stage.sampling_ratios:
        rows_of_batches = _sample_rows(scans, tasks, stage, generator)
    else:
        rows_of_batches = _shuffle_rows(scans, stage, generator)
    for rows in islice(rows_of_batches, steps):
        yield make_batch(scans, tasks, rows, generator)


def _sample_rows(
    scans: ScanDataset, tasks: Mapping[str, Task], stage: Stage, generator: np.random.Generator
) -> Iterator[NDArray[np.integer]]:
    """Yield the rows of batch after batch, drawn with replacement, without end."""
    probabilities = sampling_probabilities(scans, tasks, stage.sampling_ratios)
    while True:
        yield generator.choice(len(scans), stage.batch_size, p=probabilities)


def _shuffle_rows(
    scans: ScanDataset, stage: Stage, generator: np.random.Generator
) -> Iterator[NDArray[np.integer]]:
    """Yield the rows of batch after batch, pass after pass, without end."""
    num_scans = len(scans)
    has_single_slices = len(scans.slices[0]) == 1
    while True:
        order = generator.permutation(num_scans)
        for start in range(0, num_scans, stage.batch_size):
            rows = order[start : start + stage.batch_size]
            is_short = len(rows) < stage.batch_size
            if is_short and stage.drop_last and num_scans >= stage.batch_size:
                break
            if is_short and len(rows) == 1 and num_scans > 1 and has_single_slices:
                rows = order[-2:]  # batch norm cannot learn from one image alone
            yield rows


def make_batch(
    scans: ScanDataset, tasks: Mapping[str, Task], rows: NDArray[np.integer], generator: np.random.Generator
) -> Batch:
    """Make a batch of these rows, each in a random one of its views; with one view nothing is drawn."""
    targets = {task: scans.targets_for(task, rows) for task in tasks}
    if not scans.views:
        return Batch(stack_batch(_select(scans.slices, rows)), targets, torch.from_numpy(rows))
    all_views = [scans, *scans.views]
    view_indices = generator.integers(len(all_views), size=len(rows))
    views = [all_views[index] for index in view_indices]
    slices = stack_batch([view.slices[row] for view, row in zip(views, rows, strict=True)])
    for task in scans.masks.keys() & tasks.keys():
        masks = [view.targets_for(task, rows[k : k + 1]) for k, view in enumerate(views)]
        targets[task] = torch.cat(masks)
    return Batch(slices, targets, torch.from_numpy(rows))


def sampling_probabilities(
    scans: ScanDataset, tasks: Mapping[str, Task], ratios: Mapping[LabelKind, float]
) -> NDArray[np.float64]:
    """Return [N], each scan's probability to be drawn, so that the kinds of label come in their shares.

    Shares as in the triage paper (arXiv 2006.01441, section 4.4). The share of a kind that the centre lacks
    is divided among the others in proportion. Raises Refused when the centre has none of the kinds.
    """
    kinds = _label_kinds(scans, tasks)
    probabilities = np.zeros(len(scans))
    for kind, share in ratios.items():
        is_kind = kinds == kind
        if is_kind.any():
            probabilities[is_kind] = share / is_kind.sum()
    total = probabilities.sum()
    if not total:
        raise Refused(
            f"no training scan is of a kind that stage.sampling_ratios names ({', '.join(ratios)}); "
            "give another kind a share"
        )
    return np.asarray(probabilities / total)


def _label_kinds(scans: ScanDataset, tasks: Mapping[str, Task]) -> NDArray[np.str_]:
    """Return [N]: masked, positive, negative or unlabelled, by the first binary task and any mask.

    A negative scan stays negative with a mask, which must be empty.
    """
    kinds = np.full(len(scans), "unlabelled")
    is_negative = np.zeros(len(scans), dtype=bool)
    binary_tasks = [name for name, task in tasks.items() if task.type == "binary"]
    if binary_tasks:
        labels = scans.targets[binary_tasks[0]]
        is_negative = labels == 0
        kinds[is_negative] = "negative"
        kinds[labels == 1] = "positive"
    for task in scans.masks.keys() & tasks.keys():
        kinds[scans.has_label(task) & ~is_negative] = "masked"
    return kinds


def iterate_slices(scans: ScanDataset, batch_size: int) -> Iterator[Tensor]:
    """Yield all scans in order, uint8 [B, S, H, W]."""
    for start in range(0, len(scans), batch_size):
        yield stack_batch(scans.slices[start : start + batch_size])
