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

from client.ingest.wanted import Source, Study, Taker, Wanted
from client.readers.headers import is_dicom
from common.errors import ConsiliumError

TAGS = ["StudyInstanceUID", "PatientID", "AccessionNumber", "StudyDate", "Modality", "BodyPartExamined"]
Stamp = tuple[int, int]  # bytes, ns


def watched(root: Path, quiet: float) -> Source:
    """The folder `root`; a study is complete once none of its files has changed for `quiet` seconds. Headers are read once a file."""
    if not root.is_dir():
        raise ConsiliumError(f"{root} is no folder; give the folder that studies are put into")
    heads: dict[Path, tuple[Stamp, float, dict[str, str] | None]] = {}
    files: dict[str, list[Path]] = {}
    left: Counter[str] = Counter()

    def head(path: Path) -> tuple[Stamp, bool, dict[str, str] | None]:
        """The file's stamp, whether it rests, and what its header says (None: no DICOM)."""
        stat = path.stat()
        stamp = stat.st_size, stat.st_mtime_ns
        known = heads.get(path)
        if known is None or known[0] != stamp:
            known = heads[path] = (stamp, time.monotonic(), _head(path))
        rests = time.time() - stat.st_mtime >= quiet or time.monotonic() - known[1] >= quiet  # its clock may be another machine's
        return stamp, rests, known[2]

    def find(wanted: Wanted) -> Iterator[Study]:
        parts: dict[str, list[tuple[Path, Stamp, bool, dict[str, str]]]] = defaultdict(list)
        left.clear()
        for path in _files(root):
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
            elif _in_time(said["StudyDate"], wanted):
                files[uid] = [path for path, *_ in found]
                stamps = "\n".join(f"{path.relative_to(root)} {stamp}" for path, stamp, *_ in found)
                yield Study(uid, said["PatientID"], said["AccessionNumber"], hashlib.sha256(stamps.encode()).hexdigest()[:16])

    def fetch(study: Study, wanted: Wanted, taker: Taker) -> None:
        for path in files[study.uid]:
            try:
                dataset = pydicom.dcmread(path)
                dataset.file_meta.TransferSyntaxUID.is_encapsulated  # noqa: B018 - a header that lacks it cannot be read on
            except OSError:
                raise ConsiliumError("a file of it cannot be read, or was moved away") from None
            except Exception:  # a damaged file fails in any way
                taker.skip("a damaged file")
                continue
            taker.take(dataset)

    return Source(find, fetch, left)


def _files(root: Path) -> Iterator[Path]:
    """Every file below `root` in order; those whose names begin with a dot are still being written."""
    for here, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(here, n) for n in sorted(names) if not n.startswith(".") and n != "DICOMDIR")


def _head(path: Path) -> dict[str, str] | None:
    if not is_dicom(path):
        return None
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list[Any](TAGS))
        said = {tag: str(dataset.get(tag) or "") for tag in TAGS}
    except Exception:  # half a file, or a damaged one
        return None
    return said if said["StudyInstanceUID"] else None


def _in_time(date: str, wanted: Wanted) -> bool:
    """A study without a date is not from any asked day."""
    return wanted.since <= date <= (wanted.until or "9") if wanted.dates and date else not wanted.dates
