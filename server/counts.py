"""Who has how many labels of what: which centres teach in a stage, and the global prior."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.compose import active
from common.schema import Stage
from common.tasks import cells_of
from server.state import Run, Unlabelled


def training(run: Run, stage: Stage) -> tuple[list[str], float]:
    """The centres that have something to teach in a stage (one that has not answered yet may have), and the average one's training scans.

    Raises Unlabelled where nobody has a label for any of its tasks.
    """
    scans = {c: max(counted(run, c, t)[:-1].sum() for t in active(run.config, stage)) for c in run.expected if c in run.presence}
    teachers = [c for c in run.expected if scans.get(c, 1) and c not in run.config.federation.unseen]
    known = [n for n in scans.values() if n]
    if not teachers or not known:
        raise Unlabelled(
            f"no centre has a labelled training scan for the tasks {', '.join(active(run.config, stage))}; fill a column or drop them"
        )
    return teachers, float(np.mean(known))


def counted(run: Run, centre: str, task: str) -> Any:
    """A centre's training scans [K + 1] for a task, all its cohorts together."""
    width = len(cells_of(task, run.config.tasks[task])) + 1
    cohorts = run.presence[centre].cohorts if centre in run.presence else [centre]
    return sum((run.counts.get(f"{c}/train/{task}", np.zeros(width)) for c in cohorts), np.zeros(width))


def global_counts(run: Run) -> dict[str, list[float]]:
    """{task: labelled training scans per class, all centres}: the global prior."""
    return {t: np.sum([counted(run, c, t) for c in run.presence], axis=0)[:-1].tolist() for t in run.config.tasks}
