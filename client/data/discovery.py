"""Find the scans in a hospital's folder, whatever its layout: rows of a cohort, and what was passed over with the reason.

Labels, splits and sources are taken from a manifest, from `labels.csv`, or from the folders' names. The COV19-CT-DB (PHAROS) layout is
the last: covid1, covid2, non-covid1..3, validation/val/{covid,non-covid}, with CSVs of `ct_scan_name, data_centre`. Scan names collide
there between the classes (136 of 564 COVID training scans would get the wrong source), so the source is looked up by (class, split, name)
and a scan is called by its path.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

from client.imaging.readers.dicom_series import Series, choose_series, is_dicom, find_series
from client.imaging.readers.nifti import NIFTI_SUFFIXES
from client.imaging.readers.image_files import IMAGE_SUFFIXES, natural_sort_key
from common.utils.errors import ConsiliumError

IGNORED_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".md", ".xml", ".pdf", ".xlsx", ".parquet", ".html", ".zip", ".png.md5")  # no scans, and no news
MASK_NAME_PATTERN = re.compile(r"(^|[^a-z])(mask|masks|seg|segmentation|label|lesion|gt)([^a-z]|$)")
COLUMN_ALIASES = {"file": "path", "image": "path", "filename": "path", "patient_id": "patient", "data_centre": "source"}
SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True)
class SkippedItem:
    """Something that did not become, or did not stay, a scan of the cohort. Its path is for eyes at the centre only."""

    path: str
    reason: str


def normalise_split(text: object) -> str:
    """train | val | test from the usual spellings; anything else comes back as it is."""
    word = str(text).strip().lower()
    return SPLIT_ALIASES.get(word, word)


def infer_label(name: str) -> float:
    """1 for a folder or file called covid..., 0 for non-covid..., normal, healthy, NaN for any other."""
    word = re.sub(r"[-_ ]?\d*$", "", name.strip().lower())
    if re.fullmatch(r"(non?|not)[-_ ]?covid|normal|healthy|negative|control", word):
        return 0.0
    return 1.0 if re.fullmatch(r"(ct[-_ ]?)?covid([-_ ]?19)?|positive", word) else float("nan")


def discover_scans(folder: Path) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Rows of scan, path (absolute), patient, labels, and source, split, window and series where they are known.

    Raises ConsiliumError when the folder or manifest is not there or a table in it cannot be read.
    """
    if not folder.exists():
        raise ConsiliumError(f"{folder} is not there; check the path")
    folder = folder.resolve()
    for listed in (folder, folder / "manifest.csv", folder / "manifest.parquet"):
        if listed.is_file():
            return _read_manifest(listed)
    rows, skipped = _walk_folder(folder)
    rows.sort(key=lambda row: natural_sort_key(str(row["scan"])))
    for row in rows:
        parts = [*str(row["scan"]).split("/")[:-1], Path(row["scan"]).stem]
        labels = [infer_label(p) for p in parts[:-1] if not np.isnan(infer_label(p))]
        splits = [normalise_split(p) for p in parts[:-1] if normalise_split(p) in ("train", "val", "test")]
        if labels:
            row["covid"] = labels[-1]
        if splits:
            row["split"] = splits[-1]
    _fill_sources(folder, rows)
    table = pd.DataFrame(rows)
    for name in ("labels.csv", "labels.parquet"):
        if (folder / name).is_file() and len(table):
            table, unmatched = _join_labels(table, _read_table(folder / name), folder)
            if unmatched:
                skipped.append(SkippedItem(str(folder / name), f"{unmatched} of its rows name no scan that was found"))
    return table, skipped


def _walk_folder(folder: Path) -> tuple[list[dict[str, Any]], list[SkippedItem]]:
    rows: list[dict[str, Any]] = []
    skipped: list[SkippedItem] = []
    any_dicom = False
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(root)
        files = [here / n for n in sorted(names, key=natural_sort_key) if not n.startswith(".")]
        for file in [f for f in files if not f.is_file() or f.stat().st_size == 0]:
            skipped.append(SkippedItem(str(file), "the file is empty" if file.is_file() else "it is a link that leads nowhere, or no file"))
            files.remove(file)
        pictures = [f for f in files if f.name.lower().endswith(IMAGE_SUFFIXES)]
        nifti = [f for f in files if f.name.lower().endswith(NIFTI_SUFFIXES)]
        rest = [f for f in files if not f.name.lower().endswith((*IMAGE_SUFFIXES, *NIFTI_SUFFIXES))]
        dicom = {f for f in rest if is_dicom(f)}
        odd = Counter(
            f.suffix.lower() or "no suffix" for f in rest if f not in dicom and not f.name.lower().endswith(IGNORED_SUFFIXES) and f.name != "DICOMDIR"
        )
        skipped += [SkippedItem(root, f"{n} files ({kind}) are neither DICOM, NIfTI, JPEG nor PNG") for kind, n in odd.items()]
        if dicom and pictures:
            skipped.append(SkippedItem(root, f"{len(pictures)} pictures beside DICOM files were taken for previews"))
        elif pictures:
            rows += [_make_row(folder, p) for p in _group_images(folder, here, pictures)]
        for file in nifti:
            reason = _nifti_exclusion_reason(file)
            if reason:
                skipped.append(SkippedItem(str(file), reason))
            else:
                rows.append(_make_row(folder, file))
        any_dicom |= bool(dicom)
    if any_dicom:
        found, why = _find_dicom_studies(folder)
        rows += found
        skipped += why
    return rows, skipped


def _make_row(folder: Path, path: Path, patient: str = "") -> dict[str, Any]:
    scan = path.relative_to(folder).as_posix()
    return {"scan": scan, "path": str(path), "patient": patient or scan}


def _group_images(folder: Path, here: Path, pictures: Sequence[Path]) -> list[Path]:
    """A folder of pictures is one scan when their names differ by a number only; else, and in a class's folder, each picture is one."""
    numbered = len({re.sub(r"\d+", "#", p.name.lower()) for p in pictures}) == 1
    if here == folder or len(pictures) == 1 or not numbered or not np.isnan(infer_label(here.name)):
        return list(pictures)
    return [here]


def _nifti_exclusion_reason(file: Path) -> str:
    """Why a NIfTI file is not a scan, by its name and header; empty when it may be one."""
    if MASK_NAME_PATTERN.search(file.name.lower()):
        return "its name says that it is a mask, not a scan"
    try:
        shape = tuple(getattr(nibabel.load(file), "shape", ()))
    except Exception as error:  # nibabel fails in many ways on damaged files
        return f"its NIfTI header cannot be read ({type(error).__name__})"
    return "" if len(shape) in (3, 4) else f"it has {len(shape)} dimensions; a scan has 3"


def _find_dicom_studies(folder: Path) -> tuple[list[dict[str, Any]], list[SkippedItem]]:
    """One row a DICOM study: its thinnest axial series, or a radiograph."""
    series, damaged, other = find_series(folder)
    skipped = [SkippedItem(str(folder), f"{damaged} files have a damaged DICOM header")] if damaged else []
    if other:
        skipped.append(SkippedItem(str(folder), f"DICOM of other kinds was passed over: {', '.join(sorted(other))}"))
    studies: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for one in series:
        studies[one.patient_id, one.study_uid or str(one.files[0].parent)].append(one)
    homes = {one.series_uid: _series_path(one) for one in series}
    rows = []
    for (patient, _), found in studies.items():
        chosen, _ = choose_series(found)
        home = homes[chosen.series_uid]
        row = _make_row(folder, home, patient)
        if home.is_dir() and any(s is not chosen and (home == homes[s.series_uid] or home in homes[s.series_uid].parents) for s in series):
            row["series"] = chosen.series_uid  # others lie there too: say which
            row["scan"] += f"#{chosen.series_number if chosen.series_number is not None else 0}"
        rows.append(row)
        skipped += [
            SkippedItem(str(homes[s.series_uid]), "another series of the same study is thinner, or axial where this is not")
            for s in found
            if s is not chosen
        ]
    seen: Counter[str] = Counter()
    for row in rows:  # several studies in one folder may number their series alike
        seen[row["scan"]] += 1
        if seen[row["scan"]] > 1:
            row["scan"] += f".{seen[row['scan']]}"
    return rows, skipped


def _series_path(series: Series) -> Path:
    """The file of a one-file series, else the folder that holds all its files."""
    files = series.files
    return files[0] if len(files) == 1 else Path(os.path.commonpath([f.parent for f in files]))


def _read_table(path: Path) -> pd.DataFrame:
    """A small table with every identifier as text. Raises ConsiliumError when it cannot be read."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, skipinitialspace=True)
    except Exception as error:  # pandas and pyarrow fail in many ways
        raise ConsiliumError(f"{path} cannot be read as a table ({type(error).__name__}); save it as CSV (UTF-8) or parquet") from error
    table.columns = [COLUMN_ALIASES.get(str(c).strip().lower(), str(c).strip()) for c in table.columns]
    if table.columns.duplicated().any():
        raise ConsiliumError(f"{path} has two columns for '{table.columns[table.columns.duplicated()][0]}'; remove one")
    return table


def _parse_label_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Label columns as numbers where all of their values are numbers."""
    for column in [c for c in table.columns if c not in ("scan", "path", "patient", "source", "split", "series")]:
        numbers = pd.to_numeric(table[column], errors="coerce")
        if (numbers.notna() == table[column].notna()).all():
            table[column] = numbers.astype(float)
    if "split" in table:
        table["split"] = table["split"].map(normalise_split, na_action="ignore")
    return table


def _read_manifest(path: Path) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """A table that lists the scans: path (or file, image), and where known label (taken for covid), patient, split, source ..."""
    table = _read_table(path)
    if "path" not in table:
        raise ConsiliumError(f"{path} has no column path, file or image; name one so")
    if "covid" not in table and "label" in table:
        table = table.rename(columns={"label": "covid"})
    table = _parse_label_columns(table[[c for c in table.columns if not c.startswith("Unnamed")]])
    table["path"] = table["path"].map(lambda p: str((path.parent / p).resolve()), na_action="ignore")
    skipped, keep = [], []
    twice = table["path"].duplicated() & (table["series"].duplicated() if "series" in table else True)
    for place, again in zip(table["path"], twice, strict=True):
        reason = "a row without a path" if not isinstance(place, str) else "listed twice" if again else "the file is not there"
        keep.append(isinstance(place, str) and not again and Path(place).exists())
        if not keep[-1]:
            skipped.append(SkippedItem(str(place), reason))
    table = table[keep].reset_index(drop=True)
    if "scan" not in table:
        table["scan"] = [os.path.relpath(p, path.parent) for p in table["path"]]
        table["scan"] += table["series"].radd("#").fillna("") if "series" in table else ""
    if table["scan"].duplicated().any():
        raise ConsiliumError(
            f"{path}: {int(table['scan'].duplicated().sum())} scans have the name of another; each needs a name of its own"
        )
    table["patient"] = table["patient"].fillna(table["scan"]) if "patient" in table else table["scan"]
    return table, skipped


def _fill_sources(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Fill `source` from CSVs of `ct_scan_name, data_centre`, by (class, split, name); what lies in no split's folder is training."""
    known: dict[tuple[float, str, str], str] = {}
    listed = False
    for file in sorted([*folder.glob("*.csv"), *folder.glob("*/*.csv")]):
        head = file.open(encoding="utf-8", errors="replace").readline().lower()
        if "ct_scan_name" not in head:
            continue
        table, word, listed = _read_table(file), file.relative_to(folder).as_posix().lower(), True
        if "source" not in table:
            raise ConsiliumError(f"{file} has ct_scan_name but no data_centre; add that column or remove the file")
        label = 0.0 if re.search(r"non?[-_ ]?covid", word) else 1.0 if "covid" in word else None
        if label is None:
            raise ConsiliumError(
                f"{file} does not say whose scans it lists: names collide between classes; call it e.g. train_non_covid.csv"
            )
        split = "val" if "val" in word else "test" if "test" in word else "train"
        for name, source in zip(table["ct_scan_name"], table["source"], strict=True):
            if isinstance(name, str) and isinstance(source, str):
                known[label, split, Path(name.strip()).name.removesuffix(".npy")] = re.sub(r"\.0$", "", source.strip())
    if not listed:
        return
    for row in rows:
        row.setdefault("split", "train")
        row["source"] = known.get((row.get("covid", float("nan")), row["split"], Path(row["path"]).name), float("nan"))


def _join_labels(table: pd.DataFrame, labels: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, int]:
    """Join `labels.csv` by path, scan or patient (the first of these that it has); its columns come before what folders' names said."""
    key = next((k for k in ("path", "scan", "patient") if k in labels), None)
    if key is None:
        raise ConsiliumError(f"{folder / 'labels.csv'} has no column path, scan or patient to find its scans by; add one")
    labels = _parse_label_columns(labels.dropna(subset=[key]))
    names = labels[key].astype(str).str.strip()
    if names.duplicated().any():
        raise ConsiliumError(f"{folder / 'labels.csv'} labels {int(names.duplicated().sum())} scans twice; keep one row of each")
    place = {name.rstrip("/"): k for k, name in enumerate(names)}
    short = Counter(Path(p).name for p in table["path"])

    def find(row: Any) -> int:
        if key == "patient":
            return place.get(row.patient, -1)
        name = Path(row.path).name
        ways = [row.scan, row.path, os.path.relpath(row.path, folder)]
        if short[name] == 1:  # a bare name is good enough where it cannot mean two
            ways += [name, re.sub(r"(\.nii)?\.[a-z]+(\.gz)?$", "", name, flags=re.IGNORECASE)]
        return next((place[w] for w in ways if w in place), -1)

    at = np.array([find(row) for row in table.itertuples()])
    for column in [c for c in labels.columns if c not in (key, "scan", "path")]:
        values = labels[column].to_numpy()
        new = pd.Series([values[k] if k >= 0 else np.nan for k in at], index=table.index)
        table[column] = new.where(new.notna(), table[column]) if column in table else new
    return table, len(place) - len(set(at[at >= 0].tolist()))
