"""Reading a scan from whatever a hospital keeps it as: DICOM, NIfTI, a folder of slices, one picture."""

from __future__ import annotations

import os
from pathlib import Path

from client.readers.dicom import open_dicom, read_dicom
from client.readers.headers import is_dicom
from client.readers.nifti import NIFTI, read_nifti
from client.readers.pictures import PICTURES, open_slices, read_picture, read_slices
from client.readers.volume import Unread, Volume
from common.errors import ConsiliumError

__all__ = ["Unread", "Volume", "open_scan", "read_scan", "scan_kind"]

LOOK_AT = 200  # files of a folder that are looked at before deciding that it holds no DICOM


def scan_kind(path: Path) -> str | None:
    """What `path` is kept as: "dicom" | "nifti" | "slices" | "image", or None. Opens few files and reads a few bytes of each.

    A folder is "dicom" when it, or a folder below it (a study with a folder for each series), holds a DICOM file; pictures beside
    DICOM files are previews. A folder is "nifti" when it holds exactly one NIfTI file.
    """
    if path.is_file():
        name = path.name.lower()
        if name.endswith(NIFTI):
            return "nifti"
        if name.endswith(PICTURES):
            return "image"
        return "dicom" if is_dicom(path) else None
    if not path.is_dir():
        return None
    here = [entry.name.lower() for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
    pictures = sum(name.endswith(PICTURES) for name in here)
    nifti = sum(name.endswith(NIFTI) for name in here)
    seen = 0
    for root, folders, files in os.walk(path):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith((*PICTURES, *NIFTI)):
                continue
            if is_dicom(Path(root, file)):
                return "dicom"
            seen += 1
            if seen >= LOOK_AT:
                folders.clear()
                break
    if nifti == 1:
        return "nifti"
    return "slices" if pictures else None


def open_scan(path: Path, series: str | None = None) -> Volume | Unread:
    """The scan at `path` with its slices unread, where they can be read one by one and nothing looks odd; else as `read_scan`."""
    kind = scan_kind(path)
    if kind == "dicom":
        return open_dicom(path, series)
    unread = open_slices(path) if kind == "slices" else None
    return unread or read_scan(path, series)


def read_scan(path: Path, series: str | None = None) -> Volume:
    """The scan at `path`: a DICOM folder or file, `.nii`/`.nii.gz`, a folder of JPEG/PNG slices, or a single picture.

    `series` is a SeriesInstanceUID and picks among several DICOM series; without it the thinnest axial one is read.
    Raises ConsiliumError where nothing can be read; what a person should know of a scan that can be read is in its notes.
    """
    if not path.exists():
        raise ConsiliumError(f"{path} does not exist; correct the path in the cohort's table")
    kind = scan_kind(path)
    if kind == "dicom":
        return read_dicom(path, series)
    if kind == "nifti":
        return read_nifti(path if path.is_file() else next(p for p in sorted(path.iterdir()) if p.name.lower().endswith(NIFTI)))
    if kind == "slices":
        return read_slices(path)
    if kind == "image":
        return read_picture(path)
    if path.is_dir() and sum(p.name.lower().endswith(NIFTI) for p in path.iterdir()) > 1:
        raise ConsiliumError(f"{path} holds several NIfTI files; name one of them as the scan")
    raise ConsiliumError(
        f"{path} holds no DICOM, no NIfTI file and no JPEG or PNG pictures; correct the path or export the scan as one of these"
    )
