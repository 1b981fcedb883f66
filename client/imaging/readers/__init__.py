"""Reading a scan from whatever a hospital keeps it as: DICOM, NIfTI, a folder of slices, one picture.

Knows files and their formats, and nothing of lungs, slices to keep, or labels.
"""

from __future__ import annotations

import os
from enum import StrEnum
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

__all__ = ["LazyVolume", "ScanFormat", "Volume", "detect_format", "open_scan", "read_scan"]

MAX_FILES_PROBED = 200  # files of a folder that are opened before deciding that it holds no DICOM


class ScanFormat(StrEnum):
    """What a scan is kept as."""

    DICOM = "dicom"
    NIFTI = "nifti"
    SLICES = "slices"  # a folder of pictures
    IMAGE = "image"  # one picture


def detect_format(path: Path) -> ScanFormat | None:
    """Return the format of the scan at `path`, None where there is none; few files are opened.

    A folder is DICOM when it, or a folder below it (a study with a folder for each series), holds a DICOM
    file; pictures beside DICOM files are previews. A folder is NIfTI when it holds exactly one NIfTI file.
    """
    if path.is_file():
        return _detect_file_format(path)
    if not path.is_dir():
        return None
    if _holds_dicom(path):
        return ScanFormat.DICOM
    if len(_list_files(path, NIFTI_SUFFIXES)) == 1:
        return ScanFormat.NIFTI
    if _list_files(path, IMAGE_SUFFIXES):
        return ScanFormat.SLICES
    return None


def open_scan(path: Path, series_uid: str | None = None) -> Volume | LazyVolume:
    """Open the scan at `path` to be read slice by slice; read it where that is impossible.

    It is possible where the format allows it and nothing looks unusual.
    """
    scan_format = detect_format(path)
    if scan_format is ScanFormat.DICOM:
        return open_dicom(path, series_uid)
    if scan_format is ScanFormat.SLICES:
        opened = open_slice_folder(path)
        if opened is not None:
            return opened
    return read_scan(path, series_uid)


def read_scan(path: Path, series_uid: str | None = None) -> Volume:
    """Read the scan at `path`: DICOM, `.nii`/`.nii.gz`, a folder of JPEG or PNG slices, or a single picture.

    `series_uid` picks among several DICOM series; without it the thinnest axial one is read. The volume's
    notes say what a person should know of it.

    Raises:
        ConsiliumError: Nothing can be read.
    """
    if not path.exists():
        raise ConsiliumError(f"{path} does not exist; correct the path in the cohort's table")
    scan_format = detect_format(path)
    if scan_format is ScanFormat.DICOM:
        return read_dicom(path, series_uid)
    if scan_format is ScanFormat.NIFTI:
        return read_nifti(path if path.is_file() else _list_files(path, NIFTI_SUFFIXES)[0])
    if scan_format is ScanFormat.SLICES:
        return read_slice_folder(path)
    if scan_format is ScanFormat.IMAGE:
        return read_image_file(path)
    if path.is_dir() and len(_list_files(path, NIFTI_SUFFIXES)) > 1:
        raise ConsiliumError(f"{path} holds several NIfTI files; name one of them as the scan")
    raise ConsiliumError(
        f"{path} holds no DICOM, no NIfTI file and no JPEG or PNG pictures; "
        "correct the path or export the scan as one of these"
    )


def _detect_file_format(path: Path) -> ScanFormat | None:
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return ScanFormat.NIFTI
    if name.endswith(IMAGE_SUFFIXES):
        return ScanFormat.IMAGE
    if is_dicom(path):
        return ScanFormat.DICOM
    return None


def _list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the folder's own files with one of the suffixes, sorted, hidden ones left out."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and not entry.name.startswith(".") and entry.name.lower().endswith(suffixes)
    ]
    return [folder / name for name in sorted(names)]


def _holds_dicom(folder: Path) -> bool:
    """Check whether one of the first files of the folder and those below it is DICOM."""
    probed = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith((*IMAGE_SUFFIXES, *NIFTI_SUFFIXES)):
                continue
            if is_dicom(Path(root, name)):
                return True
            probed += 1
            if probed >= MAX_FILES_PROBED:
                # Go no deeper; of each folder beside this one the first file is still probed.
                folders.clear()
                break
    return False
