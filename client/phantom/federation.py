"""Made-up hospitals.

Chest CTs drawn from ellipses, written as DICOM series with the multi-source paper's imbalance.

Centres differ as scanners do (noise, kernel, HU offset, spacing, field of view, positioning, slice order,
compression), so that the source can be told from the pixels and the shift between centres is real. Every
visit is two scans, a CT and its projection as a radiograph. The labels follow from what was drawn, and differ
from centre to centre (client/phantom/profiles.py), so that every recipe finds centres with and without its
labels. No pixel is a patient's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from rich.progress import Progress

from client.data.phantom_check import MARKER_FILENAME
from client.phantom.chest_ct import draw_chest
from client.phantom.chest_xray import project_radiograph
from client.phantom.dicom_files import write_ct_series, write_mask, write_radiograph
from client.phantom.labels import CT_LABELS, RADIOGRAPH_LABELS, derive_labels
from client.phantom.profiles import CENTRE_PROFILES, CentreProfile, plan_scan_counts, select_profile
from common.config.schema import PhantomConfig

DRAWING_MODULES = (
    "chest_ct.py",
    "chest_xray.py",
    "dicom_files.py",
    "federation.py",
    "labels.py",
    "profiles.py",
    "scanner.py",
)
CHEST_HEIGHT = 300.0  # mm of a chest on its radiograph; a CT of few slices would make a flat one
REPEAT_RATE = 1 / 15  # of scans that are a patient's second

Row = dict[str, Any]  # one row of a cohort's table


def _hash_drawing() -> str:
    """Return a version of the drawing: a change of it replaces the federations that lie on disk."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in DRAWING_MODULES]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


DRAWING_VERSION = _hash_drawing()


def write_federation(
    root: Path, settings: PhantomConfig, centres: Iterable[str] = tuple(CENTRE_PROFILES)
) -> None:
    """Write every centre of a made-up federation under `root`; those that are finished already stay."""
    names = list(centres)
    if not list_unfinished_centres(root, settings, names):
        return
    with Progress() as progress:
        for centre_index, centre in enumerate(names):
            write_centre(root, centre, settings, centre_index, progress)


def list_unfinished_centres(root: Path, settings: PhantomConfig, centres: Iterable[str]) -> list[str]:
    """Return the centres of a made-up federation that are not there yet, or not with these settings."""
    unfinished = []
    for centre_index, centre in enumerate(centres):
        if not _is_finished(Path(root) / centre, settings, select_profile(centre, centre_index)):
            unfinished.append(centre)
    return unfinished


def write_centre(
    root: Path,
    centre: str,
    settings: PhantomConfig,
    centre_index: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one made-up centre to `root/<centre>`.

    `dicom/<scan>/NNN.dcm`, `xr/<scan>.dcm`, `masks/`, `cohort.csv`.

    The same settings give the same files, byte for byte. A finished folder of the same settings is left as it
    is, one of other settings is replaced as a whole. A killed process leaves a folder that the next one
    removes. Returns the folder.
    """
    root = Path(root)
    folder = root / centre
    profile = select_profile(centre, centre_index)
    if _is_finished(folder, settings, profile):
        return folder
    with _exclusive_lock(root):
        if _is_finished(folder, settings, profile):  # another process was faster
            return folder
        _remove_leftovers(root, centre)
        work = Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root))
        work.chmod(0o755)
        _write_scans(work, centre, settings, profile, progress)
        (work / MARKER_FILENAME).write_text(json.dumps(_make_marker(settings, profile), indent=1))
        if folder.exists():
            folder.rename(Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root)) / "old")
        work.rename(folder)
        _remove_leftovers(root, centre)
    return folder


def make_scan_table(centre: str, settings: PhantomConfig, profile: CentreProfile) -> pd.DataFrame:
    """Return the centre's CTs: scan, path, patient, source, split, modality, covid.

    About one patient in fifteen has two scans, within one split.
    """
    rng = _make_rng(settings.seed, centre, "list")
    rows: list[tuple[str, str, float]] = []
    for split, counts in plan_scan_counts(profile, settings).items():
        for covid, count in enumerate(counts):
            for k in range(count):
                patient = f"{centre[:1].upper()}{len(rows):04d}"
                if k > 0 and rng.random() < REPEAT_RATE:
                    patient = rows[-1][0]
                rows.append((patient, split, float(covid)))
    scans = [f"{centre}-{k:04d}" for k in range(len(rows))]
    order = rng.permutation(len(rows))  # so that a scan's number tells nothing
    table = pd.DataFrame([rows[k] for k in order], columns=["patient", "split", "covid"])
    table.insert(0, "scan", scans)
    table.insert(1, "path", [f"dicom/{scan}" for scan in scans])
    table.insert(3, "source", centre)
    table.insert(5, "modality", "CT")
    return table


def write_visit(folder: Path, row: Row, settings: PhantomConfig, profile: CentreProfile) -> tuple[Row, Row]:
    """Write one visit's CT, its radiograph and their masks below `folder`.

    `row` is the CT's row without labels. Returns the cohort's rows of the CT and of the radiograph. Labels
    draw from a generator of their own, so that they may change without a voxel changing.
    """
    scan = row["scan"]
    patient = row["patient"]
    scanner = profile.scanner
    uid_parts = (settings.seed, row["source"], scan)
    patient_rng = _make_rng(settings.seed, row["source"], patient)
    visit_rng = _make_rng(*uid_parts)
    has_covid = bool(row["covid"])
    voxels, truth = draw_chest(
        patient_rng, visit_rng, scanner, has_covid, settings.num_slices, settings.image_size
    )
    (folder / row["path"]).mkdir(parents=True)
    write_ct_series(folder / row["path"], voxels, scanner, uid_parts, patient, visit_rng)
    pixel_mm = scanner.field_of_view / settings.image_size
    slice_mm = CHEST_HEIGHT / settings.num_slices
    xr_path = f"xr/{scan}.dcm"
    radiograph = project_radiograph(voxels, pixel_mm, slice_mm)
    write_radiograph(folder / xr_path, radiograph, pixel_mm, uid_parts, patient, scanner.manufacturer)

    labels = derive_labels(truth, _make_rng(*uid_parts, "labels"), pixel_mm, slice_mm)
    labels.ct |= {"transition": row["covid"], "target": row["covid"], "lesion": f"masks/{scan}.nii.gz"}
    for name in labels.radiograph_masks:
        labels.radiograph[name] = f"masks/{scan}-{name}.png"
    ct_row = row | _select_known(labels.ct, profile)
    xr_row = {**row, "scan": f"{scan}-xr", "path": xr_path, "modality": "XR"}
    xr_row |= _select_known(labels.radiograph, profile)
    if "lesion" in ct_row:
        write_mask(folder / ct_row["lesion"], truth.lesion, scanner)
    for name, mask in labels.radiograph_masks.items():
        if name in xr_row:
            png = cv2.imencode(".png", 255 * mask.astype(np.uint8))[1]
            (folder / xr_row[name]).write_bytes(png.tobytes())
    return ct_row, xr_row


def _write_scans(
    folder: Path, centre: str, settings: PhantomConfig, profile: CentreProfile, progress: Progress | None
) -> None:
    """Write all scans of a centre and its cohort's table: the CTs first, then the radiographs."""
    table = make_scan_table(centre, settings, profile)
    task = progress.add_task(centre, total=len(table)) if progress else None
    for subfolder in ("dicom", "xr", "masks"):
        (folder / subfolder).mkdir()
    ct_rows = []
    xr_rows = []
    for record in table.to_dict("records"):
        row = {str(column): value for column, value in record.items()}
        ct_row, xr_row = write_visit(folder, row, settings, profile)
        ct_rows.append(ct_row)
        xr_rows.append(xr_row)
        if progress and task is not None:
            progress.advance(task)
    cohort = pd.DataFrame(ct_rows + xr_rows)
    label_columns = [column for column in CT_LABELS + RADIOGRAPH_LABELS if column in cohort]
    cohort.reindex(columns=[*table.columns, *label_columns]).to_csv(folder / "cohort.csv", index=False)


def _select_known(labels: Row, profile: CentreProfile) -> Row:
    """Return the labels that the centre knows; `brixia` stands for ``brixia_a`` to ``brixia_f``."""
    return {column: value for column, value in labels.items() if column.split("_")[0] in profile.known_labels}


def _make_rng(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def _is_finished(folder: Path, settings: PhantomConfig, profile: CentreProfile) -> bool:
    try:
        return bool(json.loads((folder / MARKER_FILENAME).read_text()) == _make_marker(settings, profile))
    except (OSError, ValueError):
        return False


def _make_marker(settings: PhantomConfig, profile: CentreProfile) -> object:
    marker = {"version": DRAWING_VERSION, "settings": asdict(settings), "profile": asdict(profile)}
    return json.loads(json.dumps(marker))  # as it is read back: tuples are lists


@contextmanager
def _exclusive_lock(root: Path) -> Iterator[None]:
    """Let one process write to `root` at a time; the lock ends with its process, however that ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(root: Path, centre: str) -> None:
    """Remove what a killed process left, and folders that were replaced."""
    for leftover in root.glob(f".{centre}-*"):
        shutil.rmtree(leftover)
