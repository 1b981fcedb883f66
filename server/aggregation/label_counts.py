"""Who has how many labels of what: which centres teach in a stage, and the global prior."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.config.compose import stage_tasks
from common.config.schema import Stage
from common.learning.class_imbalance import unnormalised_weight, weights_by_group
from common.learning.losses import class_names
from common.privacy.secure_aggregation import COMBINED_COHORT, hides_statistics
from server.run.run_state import NoLabelledScans, Run


def participating_centres(run: Run, stage: Stage) -> tuple[list[str], float]:
    """The centres that have something to teach in a stage (one that has not answered yet may have), and the average one's training scans.

    Raises Unlabelled where nobody has a label for any of its tasks.
    """
    tasks = stage_tasks(run.config, stage)
    scans = {
        c: max(count_labels(run, c, t)[:-1].sum() for t in tasks)
        for c in run.expected_centres
        if c in run.members
    }
    if hides_statistics(run.config):  # who has nothing to teach says so itself
        scans = dict.fromkeys(
            run.members, max(sum(global_label_counts(run)[t]) for t in tasks) / max(len(run.members), 1)
        )
    teachers = [
        c for c in run.expected_centres if scans.get(c, 1) and c not in run.config.federation.held_out_centres
    ]
    known = [n for n in scans.values() if n]
    if not teachers or not known:
        raise NoLabelledScans(
            f"no centre has a labelled training scan for the tasks {', '.join(tasks)}; fill a column or drop them"
        )
    return teachers, float(np.mean(known))


def count_labels(run: Run, centre: str, task: str) -> Any:
    """A centre's training scans [K + 1] for a task, all its cohorts together."""
    width = len(class_names(task, run.config.tasks[task])) + 1
    cohorts = run.members[centre].cohorts if centre in run.members else [centre]
    return sum((run.label_counts.get(f"{c}/train/{task}", np.zeros(width)) for c in cohorts), np.zeros(width))


def global_label_counts(run: Run) -> dict[str, list[float]]:
    """{task: labelled training scans per class, all centres}: the global prior."""
    return {
        t: np.sum([n for key, n in run.label_counts.items() if key.endswith(f"/train/{t}")], axis=0)[
            :-1
        ].tolist()
        for t in run.config.tasks
    }


def total_label_weights(run: Run, stage: Stage) -> dict[str, float]:
    """{task: what all centres that train weigh together, before division}: by it a centre finds its weight for a secure sum on its own."""
    if hides_statistics(run.config):
        return {
            t: float(run.label_counts[f"{COMBINED_COHORT}/mass/{t}"][0])
            for t in stage_tasks(run.config, stage)
        }
    train = [c for c in run.members if c not in run.config.federation.held_out_centres]
    return {
        t: sum(unnormalised_weight(count_labels(run, c, t)[:-1], run.config.aggregation) for c in train)
        for t in stage_tasks(run.config, stage)
    }


def secure_sum_weights(run: Run, stage: Stage, centres: list[str]) -> dict[str, dict[str, float]]:
    """{"backbone", "decoder" or head: {centre: its weight in a secure sum over these}}; empty where the run hides the counts."""
    if hides_statistics(run.config):
        return {}
    own = {
        c: {
            t: unnormalised_weight(count_labels(run, c, t)[:-1], run.config.aggregation) / all_
            for t, all_ in total_label_weights(run, stage).items()
            if all_
        }
        for c in centres
    }
    parts = {c: weights_by_group(of, run.config.tasks) for c, of in own.items()}
    whole = {part: sum(of[part] for of in parts.values()) for part in parts[centres[0]]}
    return {part: {c: of[part] / (whole[part] or 1.0) for c, of in parts.items()} for part in whole}
