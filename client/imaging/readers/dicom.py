"""Reading DICOM files and folders: choose one series, then read or open it."""

from __future__ import annotations

from pathlib import Path

from client.imaging.readers.dicom_ct import open_ct, read_ct
from client.imaging.readers.dicom_geometry import format_count
from client.imaging.readers.dicom_radiograph import read_radiograph
from client.imaging.readers.dicom_series import Series, SeriesChoice, SeriesSearch, choose_series, find_series
from client.imaging.readers.volume import LazyVolume, Volume
from common.utils.errors import ConsiliumError


def read_dicom(path: Path, series_uid: str | None = None) -> Volume:
    """Read the scan in a DICOM file or folder.

    Without `series_uid` the thinnest axial series of the study is read, and the others are noted.

    Raises:
        ConsiliumError: There is no CT and no radiograph, there are several studies, or too little can be
        read.
    """
    choice = _select_series(path, series_uid)
    volume = _read_series(choice.series)
    volume.notes[:0] = choice.notes
    return volume


def open_dicom(path: Path, series_uid: str | None = None) -> Volume | LazyVolume:
    """Open the scan in a DICOM file or folder; read it as `read_dicom` does where it cannot be opened.

    It can be opened where the headers alone show that all slices are complete and where their pixels lie.
    """
    choice = _select_series(path, series_uid)
    scan = open_ct(choice.series) or _read_series(choice.series)
    scan.notes[:0] = choice.notes
    return scan


def _read_series(series: Series) -> Volume:
    if series.modality == "CT":
        return read_ct(series)
    return read_radiograph(series)


def _select_series(path: Path, series_uid: str | None) -> SeriesChoice:
    """Return the series to read, with notes on the others and on damaged files."""
    search = find_series(path)
    if not search.series:
        raise ConsiliumError(
            f"{path} holds no CT series and no radiograph in DICOM ({_describe_content(search)}); "
            "export the scan again or correct the path"
        )
    if series_uid is None:
        choice = _choose_of_one_study(path, search.series)
    else:
        choice = SeriesChoice(_find_by_uid(path, search.series, series_uid), [])
    damaged = search.damaged_files
    readable = len(choice.series.files)
    # Damaged headers count against the series: half a scan is not a scan.
    if damaged > readable:
        raise ConsiliumError(
            f"{path}: {damaged} of {damaged + readable} files are damaged; export the scan again"
        )
    notes = list(choice.notes)
    if damaged:
        notes.insert(0, f"{format_count(damaged, 'file')} with a damaged DICOM header left out.")
    return SeriesChoice(choice.series, notes)


def _describe_content(search: SeriesSearch) -> str:
    """Say what a folder without a scan holds."""
    if search.other_kinds:
        return f"only {', '.join(sorted(search.other_kinds))}"
    if search.damaged_files:
        return format_count(search.damaged_files, "damaged file")
    return "none at all"


def _choose_of_one_study(path: Path, candidates: list[Series]) -> SeriesChoice:
    studies = {series.study_uid for series in candidates}
    if len(studies) > 1:
        raise ConsiliumError(
            f"{path} holds {len(studies)} studies; give each its own folder, "
            "or name the series to read in the cohort's table"
        )
    return choose_series(candidates)


def _find_by_uid(path: Path, candidates: list[Series], series_uid: str) -> Series:
    for series in candidates:
        if series.series_uid == series_uid:
            return series
    raise ConsiliumError(
        f"{path} does not hold the series {series_uid}; correct the `series` column of the cohort's table"
    )
