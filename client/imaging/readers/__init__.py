"""Reading a scan from whatever a hospital keeps it as: DICOM, NIfTI, a folder of slices, one picture."""

from __future__ import annotations

import os
from pathlib import Path

from client.imaging.readers.dicom import open_dicom, read_dicom
from client.imaging.readers.dicom_series import is_dicom
from client.imaging.readers.image_files import (
    IMAGE_SUFFIXES,
    open_slice_folder,
    read_image_file,
    read_slice_folder,
)
from client.imaging.readers.nifti import NIFTI_SUFFIXES, read_nifti
from client.imaging.readers.volume import LazyVolume, Volume
from common.utils.errors import ConsiliumError

__all__ = ["LazyVolume", "Volume", "detect_format", "open_scan", "read_scan"]

MAX_FILES_PROBED = 200  # files of a folder that are looked at before deciding that it holds no DICOM


def detect_format(path: Path) -> str | None:
    """What `path` is kept as: "dicom" | "nifti" | "slices" | "image", or None. Opens few files and reads a few bytes of each.

    A folder is "dicom" when it, or a folder below it (a study with a folder for each series), holds a DICOM file; pictures beside
    DICOM files are previews. A folder is "nifti" when it holds exactly one NIfTI file.
    """
    if path.is_file():
        name = path.name.lower()
        if name.endswith(NIFTI_SUFFIXES):
            return "nifti"
        if name.endswith(IMAGE_SUFFIXES):
            return "image"
        return "dicom" if is_dicom(path) else None
    if not path.is_dir():
        return None
    here = [
        entry.name.lower() for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")
    ]
    pictures = sum(name.endswith(IMAGE_SUFFIXES) for name in here)
    nifti = sum(name.endswith(NIFTI_SUFFIXES) for name in here)
    seen = 0
    for root, folders, files in os.walk(path):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith((*IMAGE_SUFFIXES, *NIFTI_SUFFIXES)):
                continue
            if is_dicom(Path(root, file)):
                return "dicom"
            seen += 1
            if seen >= MAX_FILES_PROBED:
                folders.clear()
                break
    if nifti == 1:
        return "nifti"
    return "slices" if pictures else None


def open_scan(path: Path, series_uid: str | None = None) -> Volume | LazyVolume:
    """The scan at `path` with its slices unread, where they can be read one by one and nothing looks odd; else as `read_scan`."""
    kind = detect_format(path)
    if kind == "dicom":
        return open_dicom(path, series_uid)
    unread = open_slice_folder(path) if kind == "slices" else None
    return unread or read_scan(path, series_uid)


def read_scan(path: Path, series_uid: str | None = None) -> Volume:
    """The scan at `path`: a DICOM folder or file, `.nii`/`.nii.gz`, a folder of JPEG/PNG slices, or a single picture.

    `series` is a SeriesInstanceUID and picks among several DICOM series; without it the thinnest axial one is read.
    Raises ConsiliumError where nothing can be read; what a person should know of a scan that can be read is in its notes.
    """
    if not path.exists():
        raise ConsiliumError(f"{path} does not exist; correct the path in the cohort's table")
    kind = detect_format(path)
    if kind == "dicom":
        return read_dicom(path, series_uid)
    if kind == "nifti":
        return read_nifti(
            path
            if path.is_file()
            else next(p for p in sorted(path.iterdir()) if p.name.lower().endswith(NIFTI_SUFFIXES))
        )
    if kind == "slices":
        return read_slice_folder(path)
    if kind == "image":
        return read_image_file(path)
    if path.is_dir() and sum(p.name.lower().endswith(NIFTI_SUFFIXES) for p in path.iterdir()) > 1:
        raise ConsiliumError(f"{path} holds several NIfTI files; name one of them as the scan")
    raise ConsiliumError(
        f"{path} holds no DICOM, no NIfTI file and no JPEG or PNG pictures; correct the path or export the scan as one of these"
    )
