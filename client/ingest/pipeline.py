"""Bring a hospital's studies into its cohort; an interruption at any moment costs at most one study's work.

A study is fetched into a hidden folder beside its destination, image by image and de-identified in memory:
identifying data never reaches the disk. Then its folder is moved into place, its row is written to the cohort
table, and last its entry to the journal. Each of these steps can be repeated without harm, so a study without
a journal entry is simply ingested again; its pseudonyms come from the site's key and are the same each time.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.imaging.readers.dicom_series import Series
from client.imaging.skipped import SkippedItem
from client.ingest.cohort_table import (
    CohortRow,
    LabelTable,
    join_labels,
    read_cohort_table,
    read_labels,
    upsert_row,
    write_cohort_table,
)
from client.ingest.journal import JournalEntry, Outcome, append_to_journal, read_journal
from client.ingest.process_guards import exclusive_lock, silence_loggers
from client.ingest.pseudonym_mapping import update_mapping
from client.ingest.pseudonyms import load_site_key, make_pseudonym
from client.ingest.selection import DicomStudy, StudyFilter, is_listed
from client.ingest.study_source import StudySource
from client.ingest.study_writer import StudyWriter, move_into_place
from common.utils.errors import ConsiliumError

UNWRITABLE_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class IngestPaths:
    """Where an ingest reads and writes, and how it fills the cohort table."""

    cohort_table: Path
    state_dir: Path
    centre: str  # the `source` of new rows
    seed: int = 0  # of the splits
    labels_path: Path | None = None
    keep_mapping: bool = False  # write the table that links pseudonyms to identifiers

    @property
    def ingest_dir(self) -> Path:
        """The folder of the key, the journal and the mapping."""
        return self.state_dir / "ingest"

    @property
    def dicom_dir(self) -> Path:
        """The folder of the studies."""
        return self.cohort_table.parent / "dicom"

    @property
    def incoming_dir(self) -> Path:
        """The folder of studies that are being fetched."""
        return self.dicom_dir / ".incoming"


@dataclass
class IngestSummary:
    """What an ingest did, in numbers of studies; `skipped` names studies by their pseudonyms."""

    added: int = 0
    already_present: int = 0
    empty: int = 0
    failed: int = 0
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_entry(self, entry: JournalEntry) -> None:
        """Count a study's outcome and list what was skipped of it."""
        match entry.outcome:
            case Outcome.INGESTED:
                self.added += 1
            case Outcome.EMPTY:
                self.empty += 1
            case Outcome.FAILED:
                self.failed += 1
        for reason, count in entry.skipped_counts.items():
            self.skipped.append(SkippedItem(entry.study, f"{count} image(s) skipped: {reason}"))
        if entry.outcome != Outcome.INGESTED:
            self.skipped.append(SkippedItem(entry.study, entry.reason))


@dataclass(frozen=True)
class _IngestJob:
    """What every pass of an ingest needs."""

    source: StudySource
    study_filter: StudyFilter
    paths: IngestPaths
    key: bytes
    labels: LabelTable | None
    console: Console


def ingest_studies(
    source: StudySource,
    study_filter: StudyFilter,
    paths: IngestPaths,
    console: Console,
    interval: float = 0,
    on_summary: Callable[[IngestSummary], None] | None = None,
) -> IngestSummary:
    """Ingest the selected studies that are not in the cohort yet.

    A study that fails is listed in the summary and tried again by the next ingest.

    Args:
        source: The archive or folder.
        study_filter: Which studies, and which of their series, to take.
        paths: Where to write.
        console: For the progress bar.
        interval: Seconds between passes over the source; 0 makes one pass.
        on_summary: With an interval: called after each pass that has something new to report.

    Raises:
        ConsiliumError: The source does not answer (with an interval, the next pass tries again), a table is
            wrong, the disk is full, or another ingest is running.
    """
    with silence_loggers(), exclusive_lock(paths.ingest_dir):
        key = load_site_key(paths.ingest_dir)
        labels = None
        if paths.labels_path is not None:
            labels = read_labels(paths.labels_path, key)
        job = _IngestJob(source, study_filter, paths, key, labels, console)
        if interval:
            _ingest_repeatedly(job, interval, on_summary)
        summary = _ingest_once(job)
        summary.notes = _label_notes(labels) + summary.notes
        return summary


def _ingest_repeatedly(
    job: _IngestJob, interval: float, on_summary: Callable[[IngestSummary], None] | None
) -> NoReturn:
    reported: set[SkippedItem] = set()
    while True:
        try:
            summary = _ingest_once(job)
        except ConsiliumError as error:  # the archive may be available again later
            summary = IngestSummary(notes=[str(error)])
        summary.notes = _label_notes(job.labels) + summary.notes
        messages = set(summary.skipped)
        messages.update(SkippedItem("", note) for note in summary.notes)
        has_news = summary.added or not messages <= reported
        if on_summary and has_news:
            on_summary(summary)
        reported |= messages
        time.sleep(interval)


def _label_notes(labels: LabelTable | None) -> list[str]:
    if labels is None:
        return []
    explanation = "it may identify a patient, or its name has another meaning in a cohort table"
    return [
        f"column '{column}' of the labels table is ignored: {explanation}"
        for column in labels.ignored_columns
    ]


def _ingest_once(job: _IngestJob) -> IngestSummary:
    """Make one pass over the source."""
    paths = job.paths
    shutil.rmtree(paths.incoming_dir, ignore_errors=True)  # of an ingest that was killed
    journal = read_journal(paths.ingest_dir)
    studies = _find_listed_studies(job)
    if paths.keep_mapping:
        update_mapping(paths.ingest_dir / "mapping.csv", studies, job.key)
    pending = [scan for scan, study in studies.items() if not _is_done(journal.get(scan), study)]
    summary = IngestSummary(already_present=len(studies) - len(pending))
    with _make_progress_bar(job.console) as progress:
        for scan in progress.track(pending, description="studies"):
            entry = _ingest_study(job, scan, studies[scan])
            if entry != journal.get(scan):
                append_to_journal(paths.ingest_dir, entry)
                journal[scan] = entry
            summary.add_entry(entry)
    _update_labels(job, journal)
    summary.notes += [f"{count} {items}" for items, count in job.source.not_offered.items()]
    return summary


def _find_listed_studies(job: _IngestJob) -> dict[str, DicomStudy]:
    """Return {pseudonym: study}; the pseudonym is the study's `scan` in the cohort table."""
    studies = {}
    for study in job.source.find_studies(job.study_filter):
        if is_listed(study, job.study_filter):
            studies[make_pseudonym(job.key, "study", study.uid)] = study
    return studies


def _is_done(entry: JournalEntry | None, study: DicomStudy) -> bool:
    return entry is not None and entry.outcome != Outcome.FAILED and entry.version == study.version


def _ingest_study(job: _IngestJob, scan: str, study: DicomStudy) -> JournalEntry:
    """Ingest one study and return its journal entry; raises ConsiliumError when the disk is full."""
    writer = StudyWriter(job.paths.incoming_dir / scan, job.key, job.study_filter)
    outcome = Outcome.INGESTED
    reason = ""
    try:
        job.source.fetch_study(study, job.study_filter, writer)
        series = writer.keep_chosen_series()
        if series is None:
            outcome = Outcome.EMPTY
            reason = "it contains no image to take"
        else:
            _add_to_cohort(job.paths, scan, writer.folder, series)
    except Exception as error:  # one damaged study must not keep the others away
        _raise_if_unwritable(error, job.paths.cohort_table.parent)
        outcome = Outcome.FAILED
        reason = f"{_describe_failure(error)}; it will be tried again by the next ingest"
    finally:
        shutil.rmtree(writer.folder, ignore_errors=True)
    accession = ""
    if study.accession_number.strip():
        accession = make_pseudonym(job.key, "accession", study.accession_number)
    skipped_counts = dict(sorted(writer.skipped_counts.items()))
    return JournalEntry(scan, study.version, outcome, accession, reason, skipped_counts)


def _add_to_cohort(paths: IngestPaths, scan: str, incoming: Path, series: Series) -> None:
    study_dir = paths.dicom_dir / scan
    move_into_place(incoming, study_dir)
    row = CohortRow(
        scan=scan,
        path=study_dir.relative_to(paths.cohort_table.parent).as_posix(),
        patient=series.patient_id,
        source=paths.centre,
        modality=series.modality,
    )
    table = read_cohort_table(paths.cohort_table)
    write_cohort_table(upsert_row(table, row, paths.seed), paths.cohort_table)


def _raise_if_unwritable(error: Exception, folder: Path) -> None:
    """Raise ConsiliumError for an error that every further study would meet, too."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE_DISK_ERRORS:
        raise ConsiliumError(
            f"{folder} cannot be written to ({error.strerror}); free space or make it writable, "
            "and start the ingest again: studies that are complete are kept"
        ) from None


def _describe_failure(error: Exception) -> str:
    """Return the message of our own errors; others may quote identifiers and give only their type."""
    if isinstance(error, ConsiliumError):
        return str(error)
    return f"it cannot be ingested ({type(error).__name__})"


def _update_labels(job: _IngestJob, journal: dict[str, JournalEntry]) -> None:
    """Write the labels into the cohort table, where they change it."""
    if job.labels is None or not job.paths.cohort_table.exists():
        return
    table = read_cohort_table(job.paths.cohort_table)
    accessions = {scan: entry.accession for scan, entry in journal.items()}
    labelled_table = join_labels(table, job.labels, accessions)
    if not labelled_table.equals(table):
        write_cohort_table(labelled_table, job.paths.cohort_table)


def _make_progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
