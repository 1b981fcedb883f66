"""Find the real data, and arrange the three CT sources as a federation of three centres."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd

from client.data.cohort import assign_split, save_cohort
from client.imaging.preprocess import preprocess_cohort
from client.imaging.slice_store import SliceStore
from common.utils.errors import ConsiliumError
from tests.benchmarks.real_ct_settings import CENTRES, PREPROCESS, WINDOWS

ROOT = Path(__file__).resolve().parents[2]


def find_data_folder() -> Path:
    """The folder of the real data: `$CONSILIUM_REAL_DATA`, else `../shared/data` beside the repository.

    Raises ConsiliumError if the data are not there.
    """
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("CONSILIUM_REAL_DATA") or default).expanduser().resolve()
    if not (folder / "ct_multisource" / "manifest.csv").is_file():
        raise ConsiliumError(
            f"{folder} holds no ct_multisource/manifest.csv; set CONSILIUM_REAL_DATA to the folder of "
            "the real data"
        )
    return folder


def imagenet_override(data: Path) -> str:
    """The override that starts training from ImageNet's weights."""
    return f"backbone.weights={data}/weights/mobilenetv1_075_tfjs_imagenet.pth"


def link_slice(picture: Path, folder: Path) -> str:
    """Make a folder of one linked picture, which is read as a CT of one slice; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"slice{picture.suffix}"
    if not link.is_symlink():
        link.symlink_to(picture)
    return str(folder)


def assign_splits(patients: pd.Series[str], official_splits: pd.Series[str]) -> list[str]:
    """The official split where there is one, else by the hash of the patient."""
    splits = []
    for patient, official_split in zip(patients, official_splits, strict=True):
        has_split = isinstance(official_split, str)
        splits.append(official_split if has_split else assign_split(str(patient)))
    return splits


def write_federation(data: Path, out: Path) -> Path:
    """Write a folder with a cohort.csv for each source; return the federation's root.

    Each slice gets a folder of its own, so that it is read as a CT of one slice, not as a radiograph, and its
    body is found. UCSD keeps its official split; the others are divided by the hash of the patient (soares:
    of the picture, because it names no patients, so that slices of one patient may be on both sides).
    """
    manifest = pd.read_csv(data / "ct_multisource" / "manifest.csv", dtype=str)
    root = out / "federation"
    for centre, source in CENTRES.items():
        rows = manifest[manifest["source"] == source].reset_index(drop=True)
        paths = []
        for file in rows["file"]:
            folder = root / centre / "scans" / hashlib.sha256(file.encode()).hexdigest()[:16]
            paths.append(link_slice(data / "ct_multisource" / file, folder))
        patients = rows["patient"].str.strip().fillna(rows["file"])
        window_low, window_high = WINDOWS.get(centre, (np.nan, np.nan))
        columns = {
            "scan": rows["file"],
            "path": paths,
            "patient": patients,
            "source": centre,
            "split": assign_splits(patients, rows["split"]),
            "covid": rows["label"],
            "window_low": window_low,
            "window_high": window_high,
        }
        save_cohort(pd.DataFrame(columns), root / centre / "cohort.csv")
    return root


def prepare_federation(data: Path, out: Path, num_workers: int = 1) -> Path:
    """Write the federation and preprocess every picture; return the root."""
    root = write_federation(data, out)
    for centre in CENTRES:  # once, before the runs read them
        folder = root / centre
        cohort = pd.read_csv(folder / "cohort.csv")
        store = SliceStore(folder / ".consilium" / "slices")
        skipped = preprocess_cohort(cohort, folder, PREPROCESS, store, num_workers).skipped
        print(f"{centre}: {len(cohort)} scans, {len(skipped)} skipped", flush=True)
    return root
