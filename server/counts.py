"""Who has how many labels of what: which centres teach in a stage, and the global prior."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.compose import active
from common.imbalance import mass, part_weights
from common.schema import Stage
from common.secagg import ALL, hides_all
from common.tasks import cells_of
from server.state import Run, Unlabelled


def training(run: Run, stage: Stage) -> tuple[list[str], float]:
    """The centres that have something to teach in a stage (one that has not answered yet may have), and the average one's training scans.

    Raises Unlabelled where nobody has a label for any of its tasks.
    """
    tasks = active(run.config, stage)
    scans = {c: max(counted(run, c, t)[:-1].sum() for t in tasks) for c in run.expected if c in run.presence}
    if hides_all(run.config):  # who has nothing to teach says so itself
        scans = dict.fromkeys(run.presence, max(sum(global_counts(run)[t]) for t in tasks) / max(len(run.presence), 1))
    teachers = [c for c in run.expected if scans.get(c, 1) and c not in run.config.federation.unseen]
    known = [n for n in scans.values() if n]
    if not teachers or not known:
        raise Unlabelled(f"no centre has a labelled training scan for the tasks {', '.join(tasks)}; fill a column or drop them")
    return teachers, float(np.mean(known))


def counted(run: Run, centre: str, task: str) -> Any:
    """A centre's training scans [K + 1] for a task, all its cohorts together."""
    width = len(cells_of(task, run.config.tasks[task])) + 1
    cohorts = run.presence[centre].cohorts if centre in run.presence else [centre]
    return sum((run.counts.get(f"{c}/train/{task}", np.zeros(width)) for c in cohorts), np.zeros(width))


def global_counts(run: Run) -> dict[str, list[float]]:
    """{task: labelled training scans per class, all centres}: the global prior."""
    return {t: np.sum([n for key, n in run.counts.items() if key.endswith(f"/train/{t}")], axis=0)[:-1].tolist() for t in run.config.tasks}


def masses(run: Run, stage: Stage) -> dict[str, float]:
    """{task: what all centres that train weigh together, before division}: by it a centre finds its weight for a secure sum on its own."""
    if hides_all(run.config):
        return {t: float(run.counts[f"{ALL}/mass/{t}"][0]) for t in active(run.config, stage)}
    train = [c for c in run.presence if c not in run.config.federation.unseen]
    return {t: sum(mass(counted(run, c, t)[:-1], run.config.aggregation) for c in train) for t in active(run.config, stage)}


def weights_in_sum(run: Run, stage: Stage, centres: list[str]) -> dict[str, dict[str, float]]:
    """{"backbone", "decoder" or head: {centre: its weight in a secure sum over these}}; empty where the run hides the counts."""
    if hides_all(run.config):
        return {}
    own = {
        c: {t: mass(counted(run, c, t)[:-1], run.config.aggregation) / all_ for t, all_ in masses(run, stage).items() if all_}
        for c in centres
    }
    parts = {c: part_weights(of, run.config.tasks) for c, of in own.items()}
    whole = {part: sum(of[part] for of in parts.values()) for part in parts[centres[0]]}
    return {part: {c: of[part] / (whole[part] or 1.0) for c, of in parts.items()} for part in whole}
