"""Who has how many labels: which centres train in a stage, global class counts, weights of secure sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.config.normalise import stage_tasks
from common.config.schema import Stage
from common.learning.class_imbalance import unnormalised_weight, weights_by_group
from common.learning.losses import class_names
from common.learning.metrics import Array
from common.privacy.count_noise import count_noise_std, estimate_counts, has_label_columns
from common.privacy.secure_aggregation import COMBINED_COHORT, hides_statistics
from common.protocol.sum_key import LabelCountKey, LabelWeightKey
from server.run.run_state import NoLabelledScans, Run


class Participants(NamedTuple):
    """Who trains in a stage."""

    centres: list[str]
    mean_scans: float  # labelled training scans of the average centre


def participating_centres(run: Run, stage: Stage) -> Participants:
    """Return the centres that have labels for a stage's tasks; one that has not joined yet may have some.

    Raises:
        NoLabelledScans: no centre has a label for any of the tasks.
    """
    tasks = stage_tasks(run.config, stage)
    scans = _count_stage_scans(run, tasks)
    held_out = run.config.federation.held_out_centres
    centres = []
    for centre in run.expected_centres:
        may_have_labels = scans.get(centre, 1) != 0
        if may_have_labels and centre not in held_out:
            centres.append(centre)
    labelled_scans = [count for count in scans.values() if count]
    if not centres or not labelled_scans:
        raise NoLabelledScans(
            f"no centre has a labelled training scan for the tasks {', '.join(tasks)}; "
            "fill a label column or drop the tasks"
        )
    return Participants(centres, float(np.mean(labelled_scans)))


def _count_stage_scans(run: Run, tasks: Sequence[str]) -> dict[str, float]:
    """Return {member: its labelled training scans for the stage's task that has most}.

    It is 0 for a member without labels only: noisy counts are estimates (`count_labels`).
    """
    members = run.membership.members
    if hides_statistics(run.config):  # only the total is known; a centre without labels declines by itself
        global_counts = global_label_counts(run)
        total = max(sum(global_counts[task]) for task in tasks)
        return dict.fromkeys(members, total / max(len(members), 1))
    scans = {}
    for centre in run.expected_centres:
        if centre in members:
            scans[centre] = max(count_labels(run, centre, task)[:-1].sum() for task in tasks)
    return scans


def count_labels(run: Run, centre: str, task: str) -> Array:
    """Return a centre's training scans by class of a task, then unlabelled [K + 1], over all its cohorts.

    Where the counts have noise they are estimates above 0, but for a centre that does not train, or without
    the task's label columns, whose labelled scans are 0.
    """
    cohorts = [centre]
    if centre in run.membership.members:
        cohorts = run.membership.members[centre].cohorts
    total = np.zeros(len(class_names(task, run.config.tasks[task])) + 1)
    for cohort in cohorts:
        key = str(LabelCountKey(cohort, "train", task))
        if key in run.membership.label_counts:
            total = total + run.membership.label_counts[key]
    if not count_noise_std(run.config):
        return total
    total = estimate_counts(total, run.config)
    if not _may_have_labels(run, centre, task):
        total[:-1] = 0
    return total


def _may_have_labels(run: Run, centre: str, task: str) -> bool:
    """Return whether a centre trains and has the label columns of a task; one that is away may have them."""
    if centre in run.config.federation.held_out_centres:
        return False
    member = run.membership.members.get(centre)
    return member is None or has_label_columns(member.columns, task, run.config.tasks[task])


def global_label_counts(run: Run) -> dict[str, list[float]]:
    """Return {task: labelled training scans per class [K], over all centres}, for the global prior."""
    if count_noise_std(run.config):
        return _estimate_global_counts(run)
    counts_by_task: dict[str, list[Array]] = defaultdict(list)
    for text, counts in run.membership.label_counts.items():
        key = LabelCountKey.parse(text)
        if key.split == "train":
            counts_by_task[key.task].append(counts)
    return {task: np.sum(counts_by_task[task], axis=0)[:-1].tolist() for task in run.config.tasks}


def _estimate_global_counts(run: Run) -> dict[str, list[float]]:
    """Return the global label counts of a run whose counts have noise."""
    global_counts = {}
    for name, task in run.config.tasks.items():
        total = np.zeros(len(class_names(name, task)))
        if hides_statistics(run.config):
            key = str(LabelCountKey(COMBINED_COHORT, "train", name))
            total = run.membership.label_counts[key][:-1]
        else:
            for centre in run.membership.members:
                total = total + count_labels(run, centre, name)[:-1]
        global_counts[name] = estimate_counts(total, run.config).tolist()
    return global_counts


def total_label_weights(run: Run, stage: Stage) -> dict[str, float]:
    """Return {task: sum of all training centres' weights before normalisation}.

    In a secure sum each centre divides by it to find its own weight.
    """
    tasks = stage_tasks(run.config, stage)
    totals = dict.fromkeys(tasks, 0.0)
    if hides_statistics(run.config):
        for task in tasks:
            key = str(LabelWeightKey(COMBINED_COHORT, task))
            totals[task] = float(run.membership.label_counts[key][0])
        return totals
    for centre in run.membership.members:
        if centre not in run.config.federation.held_out_centres:
            for task in tasks:
                totals[task] += _label_weight(run, centre, task)
    return totals


def secure_sum_weights(run: Run, stage: Stage, centres: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return {"backbone", "decoder" or head: {centre: its weight in a secure sum over these centres}}.

    Empty where the run hides the counts.
    """
    if hides_statistics(run.config):
        return {}
    totals = total_label_weights(run, stage)
    weights_by_centre = {}
    for centre in centres:
        task_weights = {}
        for task, total in totals.items():
            if total:
                task_weights[task] = _label_weight(run, centre, task) / total
        weights_by_centre[centre] = weights_by_group(task_weights, run.config.tasks)
    group_weights: dict[str, dict[str, float]] = {}
    for group in weights_by_centre[centres[0]]:
        total = sum(weights_by_centre[centre][group] for centre in centres)
        divisor = total or 1.0  # a group that nobody trains has weights of 0
        group_weights[group] = {c: weights_by_centre[c][group] / divisor for c in centres}
    return group_weights


def _label_weight(run: Run, centre: str, task: str) -> float:
    return unnormalised_weight(count_labels(run, centre, task)[:-1], run.config.aggregation)
