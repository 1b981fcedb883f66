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

from client.gather import Skipped
from client.ingest.deidentify import deidentify, unfit
from client.ingest.journal import read_journal, write_journal
from client.ingest.seal import name, patient_name, site_key
from client.ingest.table import join, put, read_labels, read_table, write_table
from client.ingest.wanted import Source, Study, Wanted, is_listed
from client.readers.headers import choose_series, scan_headers
from common.errors import ConsiliumError

# They log addresses with UIDs in them, and values.
TALKATIVE = ("pynetdicom", "dicomweb_client", "urllib3", "requests", "pydicom", "retrying", "dicomanonymizer")


@dataclass(frozen=True)
class Place:
    """Where things go: `table` is the cohort's, images lie in `dicom` beside it, what identifies or names in `state`."""

    table: Path
    state: Path
    centre: str
    seed: int = 0
    labels: Path | None = None
    keep_mapping: bool = False


@dataclass
class Done:
    """What an ingest did; `skipped` names studies by their new names."""

    came: int = 0
    before: int = 0
    empty: int = 0
    failed: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Incoming:
    """The images of one study, de-identified and written to `folder/<series>/<image>.dcm` as they come; what was passed over is counted."""

    def __init__(self, folder: Path, key: bytes, wanted: Wanted) -> None:
        self.folder, self.key, self.wanted = folder, key, wanted
        self.passed: Counter[str] = Counter()
        self._one = threading.Lock()  # archives may send over several connections
        folder.mkdir(parents=True)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count what is passed over."""
        with self._one:
            self.passed[reason] += count

    def take(self, dataset: Dataset) -> None:
        """Keep an image, or count why not."""
        try:
            reason = unfit(dataset, self.wanted)
            clean = None if reason else deidentify(dataset, self.key)
        except Exception:  # a damaged object fails in any way, and what cannot be de-identified is not kept
            reason, clean = "a damaged object that cannot be de-identified", None
        if clean is None:
            self.skip(reason)
            return
        place = self.folder / str(clean.SeriesInstanceUID)
        place.mkdir(exist_ok=True)
        clean.save_as(place / f"{clean.SOPInstanceUID}.dcm", enforce_file_format=True)

    def choose(self) -> dict[str, str] | None:
        """Keep the study's one series that is read (client/readers/headers.py); its patient and modality, None when there is none."""
        found, damaged, _ = scan_headers(self.folder)
        if damaged:
            self.skip("damaged headers", damaged)
        if not found:
            return None
        chosen, _ = choose_series(found)
        kept = chosen.files[0].parent
        for series in [one for one in self.folder.iterdir() if one != kept]:
            self.skip("another series of the study is thinner, or axial where this is not", len(list(series.iterdir())))
            shutil.rmtree(series)
        return {"patient": chosen.patient, "modality": chosen.modality}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConsiliumError(f"another ingest is at work in {folder}; wait for it, or stop it") from None
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing that libraries say is written anywhere, at any level: it quotes addresses with UIDs in them, and values."""
    loggers = [logging.getLogger(word) for word in TALKATIVE]
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


def ingest(
    source: Source, wanted: Wanted, place: Place, console: Console, every: float = 0, report: Callable[[Done], None] | None = None
) -> Done:
    """Bring in what is wanted and not yet here; with `every` seconds again and again, `report`ing each time that something happened.

    Raises ConsiliumError when the source cannot be asked, a table is wrong or the disk is full; a study that fails is told of and tried next time.
    """
    folder = place.state / "ingest"
    with _silence(), _alone(folder):
        key = site_key(folder)
        labels, notes = _labels(place, key)
        said: set[tuple[str, str]] = set()
        while True:
            try:
                done = _once(source, wanted, place, key, labels, console)
            except ConsiliumError as error:
                if not every:
                    raise
                done = Done(notes=[str(error)])  # the archive may come back
            done.notes = notes + done.notes
            if not every:
                return done
            news = {(one.path, one.reason) for one in done.skipped} | {("", note) for note in done.notes}
            if report and (done.came or news - said):
                report(done)
            said |= news
            time.sleep(every)


def _labels(place: Place, key: bytes) -> tuple[pd.DataFrame, list[str]]:
    if place.labels is None:
        return pd.DataFrame(), []
    labels, left = read_labels(place.labels, key)
    return labels, [f"column '{c}' of the labels is not taken: it may identify, or has a meaning of its own" for c in left]


def _once(source: Source, wanted: Wanted, place: Place, key: bytes, labels: pd.DataFrame, console: Console) -> Done:
    folder, done = place.state / "ingest", Done()
    dicom = place.table.parent / "dicom"
    shutil.rmtree(dicom / ".incoming", ignore_errors=True)  # a killed one's
    journal = read_journal(folder)
    studies = {name(key, "study", study.uid): study for study in source.find(wanted) if is_listed(study, wanted)}
    if place.keep_mapping:
        _write_mapping(folder / "mapping.csv", studies, key)
    todo = [scan for scan, study in studies.items() if not _is_done(journal.get(scan), study)]
    done.before = len(studies) - len(todo)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    with bar:
        progress = bar.add_task("studies", total=len(todo))
        for scan in todo:
            line = _study(source, wanted, place, key, scan, studies[scan])
            if line != journal.get(scan):
                write_journal(folder, line)
                journal[scan] = line
            done.came += line["outcome"] == "came"
            done.empty += line["outcome"] == "empty"
            done.failed += line["outcome"] == "failed"
            done.skipped += [Skipped(scan, f"{count} x {reason}") for reason, count in line["passed"].items()]
            if line["outcome"] != "came":
                done.skipped.append(Skipped(scan, line["reason"]))
            bar.advance(progress)
    if not labels.empty and place.table.exists():
        table = read_table(place.table)
        joined = join(table.copy(), labels, {scan: line["accession"] for scan, line in journal.items()})
        if not joined.equals(table):
            write_table(joined, place.table)
    done.notes += [f"{count} {what}" for what, count in source.left.items()]
    return done


def _is_done(line: dict[str, Any] | None, study: Study) -> bool:
    return line is not None and line["outcome"] != "failed" and line["version"] == study.version


def _study(source: Source, wanted: Wanted, place: Place, key: bytes, scan: str, study: Study) -> dict[str, Any]:
    """Bring one study in; its line for the journal."""
    home = place.table.parent / "dicom" / scan
    incoming = Incoming(home.parent / ".incoming" / scan, key, wanted)
    line: dict[str, Any] = {"study": scan, "version": study.version, "outcome": "came", "reason": ""}
    line["accession"] = name(key, "accession", study.accession) if study.accession.strip() else ""
    try:
        source.fetch(study, wanted, incoming)
        known = incoming.choose()
        if known is None:
            line |= {"outcome": "empty", "reason": "it holds no image to take"}
        else:
            _take_place(incoming.folder, home)
            path = home.relative_to(place.table.parent).as_posix()
            row = {"scan": scan, "path": path, "patient": known["patient"], "source": place.centre, "modality": known["modality"]}
            write_table(put(read_table(place.table), row, place.seed), place.table)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise ConsiliumError(f"{place.table.parent} cannot be written to ({error.strerror}); what came before is kept") from None
        why = str(error) if isinstance(error, ConsiliumError) else f"it cannot be brought in ({type(error).__name__})"
        line |= {"outcome": "failed", "reason": f"{why}; tried again next time"}
    finally:
        shutil.rmtree(incoming.folder, ignore_errors=True)
    return line | {"passed": dict(sorted(incoming.passed.items()))}


def _take_place(fresh: Path, home: Path) -> None:
    """`fresh` becomes `home`; an older `home` goes (images were added to the study, or a kill came before its line)."""
    if home.exists():
        old = home.parent / ".incoming" / f"{home.name}.old"
        home.rename(old)
        fresh.rename(home)
        shutil.rmtree(old)
    else:
        fresh.rename(home)


def _write_mapping(path: Path, studies: dict[str, Study], key: bytes) -> None:
    """`mapping.csv`: which study and patient became which; for its owner's eyes only, as it undoes all the rest."""
    rows: dict[str, list[str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {row[0]: row for row in list(csv.reader(file))[1:]}
    for scan, study in studies.items():
        rows[scan] = [scan, patient_name(key, study.patient, study.uid), study.uid, study.patient, study.accession]
    fresh = path.with_name("mapping.new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", newline="") as file:
        csv.writer(file).writerows([["scan", "patient", "StudyInstanceUID", "PatientID", "AccessionNumber"], *rows.values()])
    fresh.replace(path)
