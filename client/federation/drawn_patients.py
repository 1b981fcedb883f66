"""See how many patients a round of training draws: the change of the weights is about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from client.data.batch import Batch
from client.data.dataset import ScanDataset
from common.utils.errors import RefusalCode, Refused


@dataclass
class DrawnPatients:
    """The patients in the batches of a round, for each task that they have a label for."""

    scans: ScanDataset
    tasks: Collection[str]
    num_scans: int  # scans of a pass, as they may be reported
    patients: dict[str, set[str]] = field(default_factory=dict)  # {task: whom batches had}

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and note whose scans they hold."""
        has_label = {task: self.scans.has_label(task) for task in self.tasks}
        for batch in batches:
            assert batch.rows is not None, "a batch of a round knows its rows"
            for row in batch.rows.tolist():
                for task in self.tasks:
                    if has_label[task][row]:
                        self.patients.setdefault(task, set()).add(self.scans.patient_ids[row])
            yield batch

    def require_enough_patients(self, min_patients: int) -> None:
        """Raise Refused where the round was about few patients only, for any of its tasks."""
        for task in self.tasks:
            num_patients = len(self.patients.get(task, ()))
            if 0 < num_patients < min_patients:
                raise Refused(
                    f"a round would train task '{task}' on fewer patients than this hospital's policy "
                    "allows; use larger batches, more steps or no stage.sampling_ratios",
                    RefusalCode.POLICY,
                )

    def count_labelled(self, task: str) -> int:
        """Return how many scans have the label."""
        return int(self.scans.has_label(task).sum())
