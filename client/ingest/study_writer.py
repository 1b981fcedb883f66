"""Write the images of one study, de-identified in memory before the first byte reaches the disk."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path

from pydicom.dataset import Dataset

from client.imaging.readers.dicom_series import Series, choose_series, find_series
from client.ingest.deidentify import deidentify_dataset, exclusion_reason
from client.ingest.selection import StudyFilter


class StudyWriter:
    """An image sink that writes `folder/<series>/<image>.dcm` and counts the images that it skips."""

    def __init__(self, folder: Path, key: bytes, study_filter: StudyFilter) -> None:
        self.folder = folder
        self.key = key
        self.study_filter = study_filter
        self.skipped_counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # archives may send over several connections
        folder.mkdir(parents=True)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count images that are not taken."""
        with self._lock:
            self.skipped_counts[reason] += count

    def add(self, dataset: Dataset) -> None:
        """De-identify and write an image, or count why it is not taken."""
        try:
            reason = exclusion_reason(dataset, self.study_filter)
            if not reason:
                dataset = deidentify_dataset(dataset, self.key)
        except Exception:  # a damaged object can fail in any way; what cannot be de-identified is not written
            reason = "it is damaged and cannot be de-identified"
        if reason:
            self.skip(reason)
            return
        series_dir = self.folder / str(dataset.SeriesInstanceUID)
        series_dir.mkdir(exist_ok=True)
        dataset.save_as(series_dir / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)

    def keep_chosen_series(self) -> Series | None:
        """Delete all but the series that is read of a study, and return it; None when there is no series.

        The series is chosen as preprocessing chooses it (client/imaging/readers/dicom_series.py).
        """
        search = find_series(self.folder)
        if search.damaged_files:
            self.skip("its header is damaged", search.damaged_files)
        if not search.series:
            return None
        chosen = choose_series(search.series).series
        chosen_dir = chosen.files[0].parent
        for series_dir in list(self.folder.iterdir()):
            if series_dir != chosen_dir:
                num_images = len(list(series_dir.iterdir()))
                self.skip("its series is not axial, or thicker than another one of the study", num_images)
                shutil.rmtree(series_dir)
        return chosen


def move_into_place(incoming: Path, destination: Path) -> None:
    """Move a study's folder to its destination, replacing an older one.

    There is an older one when images were added to the study, or when an ingest was killed before it wrote
    the study's journal entry.
    """
    if not destination.exists():
        incoming.rename(destination)
        return
    replaced = incoming.with_name(f"{destination.name}.old")
    destination.rename(replaced)
    incoming.rename(destination)
    shutil.rmtree(replaced)
