"""Bring a hospital's studies into its cohort: find, fetch, de-identify, keep, write down; a kill at any moment costs one study's work.

A study is fetched into a hidden folder beside its place, image by image and de-identified in memory: what identifies never touches this disk.
Then it takes its place at once, gets its row, and last its line in the journal. Each of the three may be repeated without harm, so
a study without its line is simply done again. Names come from the site's key, so it lands where it was.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import logging
import os
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pydicom.dataset import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.imaging.skipped import SkippedItem
from client.imaging.readers.dicom_series import choose_series, find_series
from client.ingest.cohort_table import (
    join_labels,
    read_cohort_table,
    read_labels,
    upsert_row,
    write_cohort_table,
)
from client.ingest.deidentify import deidentify_dataset, exclusion_reason
from client.ingest.journal import append_to_journal, read_journal
from client.ingest.pseudonyms import load_site_key, make_patient_pseudonym, make_pseudonym
from client.ingest.selection import DicomStudy, StudyFilter, StudySource, is_listed
from common.utils.errors import ConsiliumError

# They log addresses with UIDs in them, and values.
SILENCED_LOGGERS = (
    "pynetdicom",
    "dicomweb_client",
    "urllib3",
    "requests",
    "pydicom",
    "retrying",
    "dicomanonymizer",
)


@dataclass(frozen=True)
class IngestPaths:
    """Where things go: `table` is the cohort's, images lie in `dicom` beside it, what identifies or names in `state`."""

    cohort_table: Path
    state_dir: Path
    centre: str
    seed: int = 0
    labels_path: Path | None = None
    keep_mapping: bool = False


@dataclass
class IngestSummary:
    """What an ingest did; `skipped` names studies by their new names."""

    added: int = 0
    already_present: int = 0
    empty: int = 0
    failed: int = 0
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class StudyWriter:
    """The images of one study, de-identified and written to `folder/<series>/<image>.dcm` as they come; what was passed over is counted."""

    def __init__(self, folder: Path, key: bytes, study_filter: StudyFilter) -> None:
        self.folder, self.key, self.study_filter = folder, key, study_filter
        self.skipped_counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # archives may send over several connections
        folder.mkdir(parents=True)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count what is passed over."""
        with self._lock:
            self.skipped_counts[reason] += count

    def add(self, dataset: Dataset) -> None:
        """Keep an image, or count why not."""
        try:
            reason = exclusion_reason(dataset, self.study_filter)
            clean = None if reason else deidentify_dataset(dataset, self.key)
        except Exception:  # a damaged object fails in any way, and what cannot be de-identified is not kept
            reason, clean = "a damaged object that cannot be de-identified", None
        if clean is None:
            self.skip(reason)
            return
        place = self.folder / str(clean.SeriesInstanceUID)
        place.mkdir(exist_ok=True)
        clean.save_as(place / f"{clean.SOPInstanceUID}.dcm", enforce_file_format=True)

    def keep_chosen_series(self) -> dict[str, str] | None:
        """Keep the study's one series that is read (client/imaging/readers/dicom_series.py); its patient and modality, None when there is none."""
        found, damaged, _ = find_series(self.folder)
        if damaged:
            self.skip("damaged headers", damaged)
        if not found:
            return None
        chosen, _ = choose_series(found)
        kept = chosen.files[0].parent
        for series in [one for one in self.folder.iterdir() if one != kept]:
            self.skip(
                "another series of the study is thinner, or axial where this is not",
                len(list(series.iterdir())),
            )
            shutil.rmtree(series)
        return {"patient": chosen.patient_id, "modality": chosen.modality}


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConsiliumError(f"another ingest is at work in {folder}; wait for it, or stop it") from None
        yield


@contextmanager
def _silence_loggers() -> Iterator[None]:
    """Nothing that libraries say is written anywhere, at any level: it quotes addresses with UIDs in them, and values."""
    loggers = [logging.getLogger(word) for word in SILENCED_LOGGERS]
    before = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


def ingest_studies(
    source: StudySource,
    study_filter: StudyFilter,
    paths: IngestPaths,
    console: Console,
    interval: float = 0,
    on_summary: Callable[[IngestSummary], None] | None = None,
) -> IngestSummary:
    """Bring in what is wanted and not yet here; with `every` seconds again and again, `report`ing each time that something happened.

    Raises ConsiliumError when the source cannot be asked, a table is wrong or the disk is full; a study that fails is told of and tried next time.
    """
    folder = paths.state_dir / "ingest"
    with _silence_loggers(), _exclusive_lock(folder):
        key = load_site_key(folder)
        labels, notes = _load_labels(paths, key)
        said: set[tuple[str, str]] = set()
        while True:
            try:
                done = _ingest_once(source, study_filter, paths, key, labels, console)
            except ConsiliumError as error:
                if not interval:
                    raise
                done = IngestSummary(notes=[str(error)])  # the archive may come back
            done.notes = notes + done.notes
            if not interval:
                return done
            news = {(one.path, one.reason) for one in done.skipped} | {("", note) for note in done.notes}
            if on_summary and (done.added or news - said):
                on_summary(done)
            said |= news
            time.sleep(interval)


def _load_labels(paths: IngestPaths, key: bytes) -> tuple[pd.DataFrame, list[str]]:
    if paths.labels_path is None:
        return pd.DataFrame(), []
    labels, left = read_labels(paths.labels_path, key)
    return labels, [
        f"column '{c}' of the labels is not taken: it may identify, or has a meaning of its own" for c in left
    ]


def _ingest_once(
    source: StudySource,
    study_filter: StudyFilter,
    paths: IngestPaths,
    key: bytes,
    labels: pd.DataFrame,
    console: Console,
) -> IngestSummary:
    folder, done = paths.state_dir / "ingest", IngestSummary()
    dicom = paths.cohort_table.parent / "dicom"
    shutil.rmtree(dicom / ".incoming", ignore_errors=True)  # a killed one's
    journal = read_journal(folder)
    studies = {
        make_pseudonym(key, "study", study.uid): study
        for study in source.find_studies(study_filter)
        if is_listed(study, study_filter)
    }
    if paths.keep_mapping:
        _write_mapping(folder / "mapping.csv", studies, key)
    todo = [scan for scan, study in studies.items() if not _is_done(journal.get(scan), study)]
    done.already_present = len(studies) - len(todo)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        progress = bar.add_task("studies", total=len(todo))
        for scan in todo:
            line = _ingest_study(source, study_filter, paths, key, scan, studies[scan])
            if line != journal.get(scan):
                append_to_journal(folder, line)
                journal[scan] = line
            done.added += line["outcome"] == "came"
            done.empty += line["outcome"] == "empty"
            done.failed += line["outcome"] == "failed"
            done.skipped += [
                SkippedItem(scan, f"{count} x {reason}") for reason, count in line["passed"].items()
            ]
            if line["outcome"] != "came":
                done.skipped.append(SkippedItem(scan, line["reason"]))
            bar.advance(progress)
    if not labels.empty and paths.cohort_table.exists():
        table = read_cohort_table(paths.cohort_table)
        joined = join_labels(
            table.copy(), labels, {scan: line["accession"] for scan, line in journal.items()}
        )
        if not joined.equals(table):
            write_cohort_table(joined, paths.cohort_table)
    done.notes += [f"{count} {what}" for what, count in source.not_offered.items()]
    return done


def _is_done(line: dict[str, Any] | None, study: DicomStudy) -> bool:
    return line is not None and line["outcome"] != "failed" and line["version"] == study.version


def _ingest_study(
    source: StudySource,
    study_filter: StudyFilter,
    paths: IngestPaths,
    key: bytes,
    scan: str,
    study: DicomStudy,
) -> dict[str, Any]:
    """Bring one study in; its line for the journal."""
    home = paths.cohort_table.parent / "dicom" / scan
    incoming = StudyWriter(home.parent / ".incoming" / scan, key, study_filter)
    line: dict[str, Any] = {"study": scan, "version": study.version, "outcome": "came", "reason": ""}
    line["accession"] = (
        make_pseudonym(key, "accession", study.accession_number) if study.accession_number.strip() else ""
    )
    try:
        source.fetch_study(study, study_filter, incoming)
        known = incoming.keep_chosen_series()
        if known is None:
            line |= {"outcome": "empty", "reason": "it holds no image to take"}
        else:
            _move_into_place(incoming.folder, home)
            path = home.relative_to(paths.cohort_table.parent).as_posix()
            row = {
                "scan": scan,
                "path": path,
                "patient": known["patient"],
                "source": paths.centre,
                "modality": known["modality"],
            }
            write_cohort_table(
                upsert_row(read_cohort_table(paths.cohort_table), row, paths.seed), paths.cohort_table
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise ConsiliumError(
                f"{paths.cohort_table.parent} cannot be written to ({error.strerror}); what came before is kept"
            ) from None
        why = (
            str(error)
            if isinstance(error, ConsiliumError)
            else f"it cannot be brought in ({type(error).__name__})"
        )
        line |= {"outcome": "failed", "reason": f"{why}; tried again next time"}
    finally:
        shutil.rmtree(incoming.folder, ignore_errors=True)
    return line | {"passed": dict(sorted(incoming.skipped_counts.items()))}


def _move_into_place(fresh: Path, home: Path) -> None:
    """`fresh` becomes `home`; an older `home` goes (images were added to the study, or a kill came before its line)."""
    if home.exists():
        old = home.parent / ".incoming" / f"{home.name}.old"
        home.rename(old)
        fresh.rename(home)
        shutil.rmtree(old)
    else:
        fresh.rename(home)


def _write_mapping(path: Path, studies: dict[str, DicomStudy], key: bytes) -> None:
    """`mapping.csv`: which study and patient became which; for its owner's eyes only, as it undoes all the rest."""
    rows: dict[str, list[str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {row[0]: row for row in list(csv.reader(file))[1:]}
    for scan, study in studies.items():
        rows[scan] = [
            scan,
            make_patient_pseudonym(key, study.patient_id, study.uid),
            study.uid,
            study.patient_id,
            study.accession_number,
        ]
    fresh = path.with_name("mapping.new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", newline="") as file:
        csv.writer(file).writerows(
            [["scan", "patient", "StudyInstanceUID", "PatientID", "AccessionNumber"], *rows.values()]
        )
    fresh.replace(path)
