"""The label counts of a private run: drawn with noise once, charged once, and the same for every question.

They are kept in `budget/counts` in the state folder, one file a run. The centre's own weight in a secure sum
follows from what it has released, so that it fits the total that the coordinator computes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from client.data.columns import SPLITS, find_task_columns
from client.data.loading import load_centre_cohort, load_datasets
from client.federation import noisy_counts
from client.federation.label_counts import count_classes, count_labels
from client.federation.privacy_plan import open_privacy_account
from client.federation.released_data import load_released_datasets
from client.federation.run_context import RunContext
from client.site import privacy_budget
from client.site.config import local_cohorts, safe_filename
from common.config.parse import config_to_dict
from common.learning.class_imbalance import unnormalised_weight
from common.learning.losses import class_names
from common.privacy.accountant import Charge
from common.privacy.count_noise import estimate_counts, find_count_noise_multiplier, has_label_columns
from common.protocol.messages import StatisticsRequest, Sums
from common.protocol.sum_key import LabelCountKey
from common.utils.atomic_files import atomic_write
from common.utils.errors import RefusalCode, Refused


@dataclass(frozen=True)
class ReleasedCounts:
    """The content of a run's file. Its field names are the keys in the file, and no other key is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    question: str  # digest of the configuration, which says what is counted
    counts: dict[str, list[float]]  # {LabelCountKey: noisy counts [K + 1]}


_ADAPTER = TypeAdapter(ReleasedCounts)


def release_counts(context: RunContext) -> Sums:
    """Return the run's noisy counts {LabelCountKey: [K + 1]}; those that are drawn now are charged first.

    Raises PermanentlyRefused when the hospital's limit does not allow them, Refused when they cannot be kept.
    """
    path = context.budget_dir / "counts" / f"{safe_filename(context.run_id)}.json"
    question = _digest_question(context)
    released = _read_file(path)
    if released is not None and released.question == question:
        return {key: np.array(cells) for key, cells in released.counts.items()}
    exact_counts = _count_exactly(context)
    counts = noisy_counts.add_count_noise(exact_counts, context.config, context.site.min_cell_count)
    charge = Charge(find_count_noise_multiplier(context.config.privacy), 1.0, 1)
    request = StatisticsRequest(context.run_id, {}, "counts", "")
    privacy_budget.record_charge(open_privacy_account(context), charge, request)
    _write_file(path, question, counts)
    return counts


def weigh_centre(context: RunContext) -> dict[str, float]:
    """Return {task: this centre's weight in a secure sum, before division by the sum over all centres}.

    Under `privacy=patient` it follows from the counts that were released, otherwise from the exact ones.
    """
    if context.config.privacy.dp_level == "patient":
        counts = _estimate_training_counts(context)
    else:
        counts = _count_training_labels(context)
    aggregation = context.config.aggregation
    return {task: unnormalised_weight(cells, aggregation) for task, cells in counts.items()}


def _count_training_labels(context: RunContext) -> dict[str, NDArray[np.float64]]:
    """Return {task: labelled training scans of each class [K]}, exactly."""
    dataset = load_released_datasets(context)["train"]
    counts = {}
    for name, task in context.config.tasks.items():
        counts[name] = count_classes(dataset.targets[name], len(class_names(name, task)))[:-1]
    return counts


def _estimate_training_counts(context: RunContext) -> dict[str, NDArray[np.float64]]:
    """Return {task: labelled training scans of each class [K]}, as the coordinator estimates them."""
    released = release_counts(context)
    columns: set[str] = set().union(*find_cohort_columns(context).values())
    counts = {}
    for name, task in context.config.tasks.items():
        total = np.zeros(len(class_names(name, task)))
        if has_label_columns(columns, name, task):
            for cohort in local_cohorts(context.site, context.config):
                total = total + released[str(LabelCountKey(cohort, "train", name))][:-1]
            total = estimate_counts(total, context.config)
        counts[name] = total
    return counts


def _count_exactly(context: RunContext) -> Sums:
    """Count labels before noise, of `privacy.max_scans_per_patient` scans of each patient.

    Every cohort, split and task has its cells, also where there is no scan.
    """
    config = context.config
    datasets, _ = load_datasets(context.site, config)
    capped = {}
    for split, dataset in datasets.items():
        capped[split] = noisy_counts.cap_scans_per_patient(dataset, config.privacy.max_scans_per_patient)
    sums: Sums = {}
    for cohort in local_cohorts(context.site, config):
        for split in SPLITS:
            for name, task in config.tasks.items():
                key = str(LabelCountKey(cohort, split, name))
                sums[key] = np.zeros(len(class_names(name, task)) + 1)
    return sums | count_labels(capped, config)


def find_cohort_columns(context: RunContext) -> dict[str, set[str]]:
    """Return {cohort: the columns that tasks may take labels from} of the cohorts that this node holds."""
    columns = {}
    for cohort, path in local_cohorts(context.site, context.config).items():
        table = load_centre_cohort(context.site, context.config, cohort, path)
        columns[cohort] = find_task_columns(table)
    return columns


def _digest_question(context: RunContext) -> str:
    text = json.dumps(config_to_dict(context.config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_file(path: Path) -> ReleasedCounts | None:
    """Return the counts that were released; None where there are none: drawing anew is charged anew."""
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write_file(path: Path, question: str, counts: Sums) -> None:
    lists = {key: cells.tolist() for key, cells in counts.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"question": question, "counts": lists}).encode())
    except OSError as error:
        reason = f"the counts cannot be kept ({type(error).__name__}), so they do not leave"
        raise Refused(reason, RefusalCode.ERROR) from error
