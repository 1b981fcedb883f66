"""What archives and folders have in common: the interface of a study source, and how answers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pydicom.dataset import Dataset

from client.ingest.selection import DicomStudy, StudyFilter, series_exclusion_reason
from common.utils.errors import ConsiliumError

STUDY_KEYWORDS = ("StudyInstanceUID", "PatientID", "AccessionNumber", "NumberOfStudyRelatedInstances")
SERIES_KEYWORDS = ("SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances")


FOREIGN_IMAGE_REASON = "it belongs to another study or series than was asked for"


class ImageSink(Protocol):
    """Where a source puts the images of a study; its methods may be called from another thread."""

    def add(self, dataset: Dataset) -> None:
        """Take an image, with its `file_meta`."""

    def skip(self, reason: str, count: int = 1) -> None:
        """Count images that the source does not fetch or cannot read."""


class StudySource(Protocol):
    """Where studies come from."""

    not_offered: Counter[str]  # {what the last search came across and cannot offer: number}

    def find_studies(self, study_filter: StudyFilter) -> Iterable[DicomStudy]:
        """Search for the selected studies; raises ConsiliumError when the source does not answer."""

    def fetch_study(self, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
        """Put the study's images into the sink.

        Raises ConsiliumError, without identifiers, when the study does not arrive complete.
        """


@dataclass(frozen=True)
class ArchiveSeries:
    """A series as its archive describes it."""

    uid: str = field(repr=False)
    modality: str
    body_part: str
    num_images: int | None  # None where the archive does not count


def parse_study_answer(answer: Dataset) -> DicomStudy:
    """Read an answer with STUDY_KEYWORDS; the number of images is the study's version."""
    uid, patient_id, accession_number, num_images = _read_texts(answer, STUDY_KEYWORDS)
    return DicomStudy(uid, patient_id, accession_number, version=num_images)


def iter_selected_series(
    answers: Iterable[Dataset], study_filter: StudyFilter, sink: ImageSink
) -> Iterator[ArchiveSeries]:
    """Yield the selected series among answers with SERIES_KEYWORDS, and count the others in the sink."""
    for answer in answers:
        series = _parse_series_answer(answer)
        reason = series_exclusion_reason(series.modality, series.body_part, study_filter)
        if not reason:
            yield series
        elif series.num_images is None:
            sink.skip(reason)
        else:
            sink.skip(reason, series.num_images)


def _parse_series_answer(answer: Dataset) -> ArchiveSeries:
    uid, modality, body_part, count = _read_texts(answer, SERIES_KEYWORDS)
    num_images = int(count) if count.isdigit() else None
    return ArchiveSeries(uid, modality, body_part, num_images)


def _read_texts(answer: Dataset, keywords: tuple[str, ...]) -> list[str]:
    """Return the values as text, missing ones as empty text."""
    return [str(answer.get(keyword) or "") for keyword in keywords]


def is_of_series(dataset: Dataset, study_uid: str, series_uid: str) -> bool:
    """Return whether an image belongs to the study and the series that were asked for."""
    uids = str(dataset.get("StudyInstanceUID", "")), str(dataset.get("SeriesInstanceUID", ""))
    return uids == (study_uid, series_uid)


def check_complete(num_received: int, series: ArchiveSeries) -> None:
    """Raise ConsiliumError when fewer images of a series arrived than the archive counts."""
    if series.num_images is not None and num_received < series.num_images:
        raise ConsiliumError(f"only {num_received} of a series' {series.num_images} images arrived")
