"""Studies from a folder into which a scanner, a router or a person puts files; no file is changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from pydicom.dataset import Dataset

from client.imaging.readers.dicom_series import is_dicom
from client.ingest.selection import DicomStudy, StudyFilter
from client.ingest.study_source import FOREIGN_IMAGE_REASON, ImageSink
from common.utils.errors import ConsiliumError

HEADER_KEYWORDS = ["StudyInstanceUID", "PatientID", "AccessionNumber", "StudyDate"]


class FileStamp(NamedTuple):
    """What changes when a file is written to."""

    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class StudyHeader:
    """What a file says of its study."""

    study_uid: str
    patient_id: str
    accession_number: str
    study_date: str


@dataclass(frozen=True)
class _KnownFile:
    """A file's header as it was last read; None when the file is damaged or not DICOM."""

    stamp: FileStamp
    first_seen: float  # time.monotonic() when the file was first seen with this stamp
    header: StudyHeader | None


@dataclass(frozen=True)
class _StudyFile:
    """A DICOM file at the time of a search."""

    path: Path
    stamp: FileStamp
    is_settled: bool
    header: StudyHeader


def open_folder_source(root: Path, settle_seconds: float) -> FolderSource:
    """Return the studies below a folder; raises ConsiliumError when it is not a folder."""
    if not root.is_dir():
        raise ConsiliumError(f"{root} is not a folder; give the folder that contains the studies")
    return FolderSource(root, settle_seconds)


class FolderSource:
    """A study source that reads a folder.

    A study is offered once none of its files has changed for `settle_seconds`. A file's header is read again
    only when the file has changed.
    """

    def __init__(self, root: Path, settle_seconds: float) -> None:
        self._root = root
        self._settle_seconds = settle_seconds
        self._known_files: dict[Path, _KnownFile] = {}
        self._paths_by_study: dict[str, list[Path]] = {}
        self.not_offered: Counter[str] = Counter()

    def find_studies(self, study_filter: StudyFilter) -> Iterator[DicomStudy]:
        """Yield the complete studies within the filter's dates."""
        self.not_offered.clear()
        for study_uid, files in self._group_files_by_study().items():
            header = files[0].header
            if not all(file.is_settled for file in files):
                self.not_offered["studies that are still arriving"] += 1
            elif _is_in_date_range(header.study_date, study_filter):
                self._paths_by_study[study_uid] = [file.path for file in files]
                version = self._compute_version(files)
                yield DicomStudy(study_uid, header.patient_id, header.accession_number, version)

    def fetch_study(self, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
        """Put the files of a study that was found into the sink."""
        for path in self._paths_by_study[study.uid]:
            try:
                dataset = _read_image(path)
            except OSError:
                raise ConsiliumError("one of its files cannot be read or was moved away") from None
            except Exception:  # a damaged file can fail in any way
                sink.skip("its file is damaged")
                continue
            if (
                str(dataset.get("StudyInstanceUID", "")) != study.uid
            ):  # the file was replaced since the search
                sink.skip(FOREIGN_IMAGE_REASON)
                continue
            sink.add(dataset)

    def _group_files_by_study(self) -> dict[str, list[_StudyFile]]:
        files_by_study: dict[str, list[_StudyFile]] = defaultdict(list)
        for path in _list_files(self._root):
            try:
                file = self._examine_file(path)
            except OSError:  # moved away since it was listed
                continue
            if file is None:
                self.not_offered["files that are damaged or not DICOM"] += 1
            else:
                files_by_study[file.header.study_uid].append(file)
        return files_by_study

    def _examine_file(self, path: Path) -> _StudyFile | None:
        """Return the file's header and whether it is settled; None when it is damaged or not DICOM."""
        stat = path.stat()
        stamp = FileStamp(stat.st_size, stat.st_mtime_ns)
        known_file = self._known_files.get(path)
        if known_file is None or known_file.stamp != stamp:
            known_file = _KnownFile(stamp, time.monotonic(), _read_header(path))
            self._known_files[path] = known_file
        if known_file.header is None:
            return None
        age = time.time() - stat.st_mtime
        observed = time.monotonic() - known_file.first_seen  # the file's time may be another machine's
        is_settled = max(age, observed) >= self._settle_seconds
        return _StudyFile(path, stamp, is_settled, known_file.header)

    def _compute_version(self, files: list[_StudyFile]) -> str:
        """Return a hash of the files' names, sizes and times; journals on disk hold it."""
        lines = []
        for file in files:
            size, mtime_ns = file.stamp
            lines.append(f"{file.path.relative_to(self._root)} ({size}, {mtime_ns})")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _list_files(root: Path) -> Iterator[Path]:
    """Yield every file below the folder in order, but for hidden ones, which are still being written."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name != "DICOMDIR":
                yield Path(folder, name)


def _read_header(path: Path) -> StudyHeader | None:
    """Read a file's header; None when the file is incomplete, damaged or not DICOM."""
    if not is_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list[Any](HEADER_KEYWORDS))
        values = [str(dataset.get(keyword) or "") for keyword in HEADER_KEYWORDS]
    except Exception:  # a damaged file can fail in any way
        return None
    header = StudyHeader(*values)
    return header if header.study_uid else None


def _read_image(path: Path) -> Dataset:
    """Read a whole file; raises when its transfer syntax is missing or unknown."""
    dataset = pydicom.dcmread(path)
    _ = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    return dataset


def _is_in_date_range(date: str, study_filter: StudyFilter) -> bool:
    """Return whether a YYYYMMDD date is selected; a study without a date is in no range."""
    if not study_filter.date_range:
        return True
    if not date:
        return False
    latest = study_filter.until or "9"  # later than any date
    return study_filter.since <= date <= latest
