"""Find the scans in a hospital's folder, whatever its layout.

Labels, splits and sources come from a manifest (client/data/manifest.py), from `labels.csv`, from the
folders' names, or from the tables of the COV19-CT-DB layout (client/data/cov19_ctdb.py).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import pandas as pd

from client.data.columns import SPLITS, normalise_split
from client.data.cov19_ctdb import fill_sources
from client.data.found_scan import FoundScan
from client.data.manifest import join_labels, read_manifest, read_table
from client.imaging.readers.dicom_series import Series, choose_series, find_series, is_dicom
from client.imaging.readers.image_files import IMAGE_SUFFIXES, natural_sort_key
from client.imaging.readers.nifti import NIFTI_SUFFIXES
from client.imaging.skipped import SkippedItem
from common.utils.errors import ConsiliumError

# Files with these names are no scans, and not worth a report.
IGNORED_SUFFIXES = (
    ".csv",
    ".tsv",
    ".txt",
    ".json",
    ".md",
    ".xml",
    ".pdf",
    ".xlsx",
    ".parquet",
    ".html",
    ".zip",
    ".png.md5",
)
MASK_NAME_PATTERN = re.compile(r"(^|[^a-z])(mask|masks|seg|segmentation|label|lesion|gt)([^a-z]|$)")
NEGATIVE_NAME_PATTERN = re.compile(r"(non?|not)[-_ ]?covid|normal|healthy|negative|control")
POSITIVE_NAME_PATTERN = re.compile(r"(ct[-_ ]?)?covid([-_ ]?19)?|positive")


@dataclass
class FolderContents:
    """One folder's files by kind, in natural order."""

    images: list[Path] = field(default_factory=list)
    nifti: list[Path] = field(default_factory=list)
    dicom: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    unusable: list[SkippedItem] = field(default_factory=list)  # files that cannot be read, or are no scan


def infer_label(name: str) -> float:
    """Return 1 for a folder called covid..., 0 for non-covid..., normal, healthy..., NaN for any other."""
    word = re.sub(r"[-_ ]?\d*$", "", name.strip().lower())
    if NEGATIVE_NAME_PATTERN.fullmatch(word):
        return 0.0
    if POSITIVE_NAME_PATTERN.fullmatch(word):
        return 1.0
    return math.nan


def discover_scans(folder: Path) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Find the scans of a folder, or those that a manifest lists.

    Returns:
        A table with the columns scan, path (absolute), patient, labels, and source, split, window and series
        where they are known; and what was skipped.

    Raises:
        ConsiliumError: The folder or manifest does not exist, or a table in it cannot be read.
    """
    if not folder.exists():
        raise ConsiliumError(f"{folder} is not there; check the path")
    folder = folder.resolve()
    manifests = (folder, folder / "manifest.csv", folder / "manifest.parquet")
    manifest = next(filter(Path.is_file, manifests), None)
    if manifest is not None:
        return read_manifest(manifest)
    scans, skipped = _walk_folder(folder)
    scans.sort(key=lambda scan: natural_sort_key(scan.scan))
    for scan in scans:
        _label_by_folder_names(scan)
    fill_sources(folder, scans)
    table = pd.DataFrame([scan.to_row() for scan in scans])
    if table.empty:
        return table, skipped
    for path in filter(Path.is_file, (folder / "labels.csv", folder / "labels.parquet")):
        table, num_unmatched = join_labels(table, read_table(path), folder)
        if num_unmatched:
            reason = f"{num_unmatched} of its rows name no scan that was found"
            skipped.append(SkippedItem(str(path), reason))
    return table, skipped


def _label_by_folder_names(scan: FoundScan) -> None:
    """Set label and split where the folders above the scan are named after them; the innermost wins."""
    for folder_name in scan.scan.split("/")[:-1]:
        label = infer_label(folder_name)
        if not math.isnan(label):
            scan.covid = label
        split = normalise_split(folder_name)
        if split in SPLITS:
            scan.split = split


def _walk_folder(folder: Path) -> tuple[list[FoundScan], list[SkippedItem]]:
    """Find the scans below a folder: images and NIfTI folder by folder, DICOM over all folders."""
    scans: list[FoundScan] = []
    skipped: list[SkippedItem] = []
    has_dicom = False
    for root, folder_names, file_names in os.walk(folder):
        folder_names[:] = sorted(_without_hidden(folder_names))
        contents = _classify_files(Path(root), file_names)
        has_dicom = has_dicom or bool(contents.dicom)
        skipped += _list_unusable(root, contents)
        if not contents.dicom:  # else images are previews
            image_paths = _group_images(folder, Path(root), contents.images)
            scans += [FoundScan.at(path, folder) for path in image_paths]
        scans += [FoundScan.at(path, folder) for path in contents.nifti]
    if has_dicom:
        studies, skipped_series = _find_dicom_studies(folder)
        scans += studies
        skipped += skipped_series
    return scans, skipped


def _without_hidden(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _classify_files(folder: Path, names: Iterable[str]) -> FolderContents:
    contents = FolderContents()
    for name in sorted(_without_hidden(names), key=natural_sort_key):
        file = folder / name
        lower_name = name.lower()
        if not file.is_file():
            contents.unusable.append(SkippedItem(str(file), "it is a link that leads nowhere, or no file"))
        elif file.stat().st_size == 0:
            contents.unusable.append(SkippedItem(str(file), "the file is empty"))
        elif lower_name.endswith(IMAGE_SUFFIXES):
            contents.images.append(file)
        elif lower_name.endswith(NIFTI_SUFFIXES):
            reason = _nifti_exclusion_reason(file)
            if reason:
                contents.unusable.append(SkippedItem(str(file), reason))
            else:
                contents.nifti.append(file)
        elif is_dicom(file):
            contents.dicom.append(file)
        elif not lower_name.endswith(IGNORED_SUFFIXES) and name != "DICOMDIR":
            contents.unknown.append(file)
    return contents


def _list_unusable(folder: str, contents: FolderContents) -> list[SkippedItem]:
    """List what is no scan in a folder, files of one unknown kind together."""
    skipped = [*contents.unusable]
    suffix_counts = Counter(file.suffix.lower() or "no suffix" for file in contents.unknown)
    for suffix, count in suffix_counts.items():
        skipped.append(
            SkippedItem(folder, f"{count} files ({suffix}) are neither DICOM, NIfTI, JPEG nor PNG")
        )
    if contents.dicom and contents.images:
        reason = f"{len(contents.images)} pictures beside DICOM files were taken for previews"
        skipped.append(SkippedItem(folder, reason))
    return skipped


def _group_images(root: Path, folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return the scans that a folder's images make up.

    The folder is one scan when its images' names differ by a number only. Otherwise, and in a folder named
    after a class, every image is a scan.
    """
    name_patterns = {re.sub(r"\d+", "#", image.name.lower()) for image in images}
    is_one_scan = len(images) > 1 and len(name_patterns) == 1
    if is_one_scan and folder != root and math.isnan(infer_label(folder.name)):
        return [folder]
    return list(images)


def _nifti_exclusion_reason(file: Path) -> str:
    """Say why a NIfTI file is not a scan, by its name and header; empty when it may be one."""
    if MASK_NAME_PATTERN.search(file.name.lower()):
        return "its name says that it is a mask, not a scan"
    try:
        shape = tuple(getattr(nibabel.load(file), "shape", ()))
    except Exception as error:  # nibabel fails in many ways on damaged files
        return f"its NIfTI header cannot be read ({type(error).__name__})"
    if len(shape) not in (3, 4):
        return f"it has {len(shape)} dimensions; a scan has 3"
    return ""


def _find_dicom_studies(folder: Path) -> tuple[list[FoundScan], list[SkippedItem]]:
    """Find one scan for each DICOM study: its thinnest axial series, or a radiograph."""
    search = find_series(folder)
    skipped: list[SkippedItem] = []
    if search.damaged_files:
        reason = f"{search.damaged_files} files have a damaged DICOM header"
        skipped.append(SkippedItem(str(folder), reason))
    if search.other_kinds:
        kinds = ", ".join(sorted(search.other_kinds))
        skipped.append(SkippedItem(str(folder), f"DICOM of other kinds was passed over: {kinds}"))
    studies: defaultdict[tuple[str, str], list[Series]] = defaultdict(list)
    for series in search.series:
        study = series.study_uid or str(series.files[0].parent)
        studies[series.patient_id, study].append(series)
    paths = {series.series_uid: _series_path(series) for series in search.series}
    scans: list[FoundScan] = []
    for study_series in studies.values():
        chosen = choose_series(study_series).series
        scans.append(_make_dicom_scan(folder, chosen, search.series, paths))
        skipped += _list_other_series(study_series, chosen, paths)
    _number_repeated_names(scans)
    return scans, skipped


def _list_other_series(
    study_series: Iterable[Series], chosen: Series, paths: dict[str, Path]
) -> list[SkippedItem]:
    reason = "another series of the same study is thinner, or axial where this is not"
    others = [series for series in study_series if series is not chosen]
    return [SkippedItem(str(paths[series.series_uid]), reason) for series in others]


def _make_dicom_scan(
    folder: Path, chosen: Series, all_series: Iterable[Series], paths: dict[str, Path]
) -> FoundScan:
    """Make the scan of a chosen series, which names the series when its folder holds others, too."""
    path = paths[chosen.series_uid]
    scan = FoundScan.at(path, folder, chosen.patient_id)
    other_paths = [paths[series.series_uid] for series in all_series if series is not chosen]
    is_shared = any(path == other or path in other.parents for other in other_paths)
    if path.is_dir() and is_shared:
        scan.series = chosen.series_uid
        scan.scan += f"#{chosen.series_number or 0}"
    return scan


def _number_repeated_names(scans: Iterable[FoundScan]) -> None:
    """Make names unique: several studies in one folder may number their series alike."""
    counts: Counter[str] = Counter()
    for scan in scans:
        counts[scan.scan] += 1
        if counts[scan.scan] > 1:
            scan.scan += f".{counts[scan.scan]}"


def _series_path(series: Series) -> Path:
    """Return the file of a one-file series, else the folder that holds all its files."""
    if len(series.files) == 1:
        return series.files[0]
    return Path(os.path.commonpath([file.parent for file in series.files]))
