"""Studies from a folder into which a scanner, a router or a person puts files; they are read and never changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom

from client.imaging.readers.dicom_series import is_dicom
from client.ingest.selection import DicomStudy, ImageSink, StudyFilter, StudySource
from common.utils.errors import ConsiliumError

HEADER_KEYWORDS = [
    "StudyInstanceUID",
    "PatientID",
    "AccessionNumber",
    "StudyDate",
    "Modality",
    "BodyPartExamined",
]
FileStamp = tuple[int, int]  # bytes, ns


def open_folder_source(root: Path, settle_seconds: float) -> StudySource:
    """The folder `root`; a study is complete once none of its files has changed for `quiet` seconds. Headers are read once a file."""
    if not root.is_dir():
        raise ConsiliumError(f"{root} is no folder; give the folder that studies are put into")
    heads: dict[Path, tuple[FileStamp, float, dict[str, str] | None]] = {}
    files: dict[str, list[Path]] = {}
    left: Counter[str] = Counter()

    def head(path: Path) -> tuple[FileStamp, bool, dict[str, str] | None]:
        """The file's stamp, whether it rests, and what its header says (None: no DICOM)."""
        stat = path.stat()
        stamp = stat.st_size, stat.st_mtime_ns
        known = heads.get(path)
        if known is None or known[0] != stamp:
            known = heads[path] = (stamp, time.monotonic(), _read_header(path))
        rests = (
            time.time() - stat.st_mtime >= settle_seconds or time.monotonic() - known[1] >= settle_seconds
        )  # its clock may be another machine's
        return stamp, rests, known[2]

    def find(wanted: StudyFilter) -> Iterator[DicomStudy]:
        parts: dict[str, list[tuple[Path, FileStamp, bool, dict[str, str]]]] = defaultdict(list)
        left.clear()
        for path in _list_files(root):
            try:
                stamp, rests, said = head(path)
            except OSError:  # moved away since it was listed
                continue
            if said is None:
                left["files that are no DICOM, or damaged"] += 1
            else:
                parts[said["StudyInstanceUID"]].append((path, stamp, rests, said))
        for uid, found in parts.items():
            said = found[0][3]
            if not all(rests for _, _, rests, _ in found):
                left["studies that are still arriving"] += 1
            elif _is_in_date_range(said["StudyDate"], wanted):
                files[uid] = [path for path, *_ in found]
                stamps = "\n".join(f"{path.relative_to(root)} {stamp}" for path, stamp, *_ in found)
                yield DicomStudy(
                    uid,
                    said["PatientID"],
                    said["AccessionNumber"],
                    hashlib.sha256(stamps.encode()).hexdigest()[:16],
                )

    def fetch(study: DicomStudy, wanted: StudyFilter, taker: ImageSink) -> None:
        for path in files[study.uid]:
            try:
                dataset = pydicom.dcmread(path)
                dataset.file_meta.TransferSyntaxUID.is_encapsulated  # noqa: B018 - a header that lacks it cannot be read on
            except OSError:
                raise ConsiliumError("a file of it cannot be read, or was moved away") from None
            except Exception:  # a damaged file fails in any way
                taker.skip("a damaged file")
                continue
            taker.add(dataset)

    return StudySource(find, fetch, left)


def _list_files(root: Path) -> Iterator[Path]:
    """Every file below `root` in order; those whose names begin with a dot are still being written."""
    for here, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(here, n) for n in sorted(names) if not n.startswith(".") and n != "DICOMDIR")


def _read_header(path: Path) -> dict[str, str] | None:
    if not is_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list[Any](HEADER_KEYWORDS))
        said = {tag: str(dataset.get(tag) or "") for tag in HEADER_KEYWORDS}
    except Exception:  # half a file, or a damaged one
        return None
    return said if said["StudyInstanceUID"] else None


def _is_in_date_range(date: str, study_filter: StudyFilter) -> bool:
    """A study without a date is not from any asked day."""
    return (
        study_filter.since <= date <= (study_filter.until or "9")
        if study_filter.date_range and date
        else not study_filter.date_range
    )
