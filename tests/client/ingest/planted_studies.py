"""Four studies of two patients with planted identifiers, and what the tests of an ingest share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage
from rich.console import Console

from client.ingest.pipeline import IngestPaths
from client.ingest.selection import StudyFilter
from client.phantom.dicom_files import write_ct_series, write_radiograph
from client.phantom.profiles import CENTRE_PROFILES
from tests.client.planted import plant

PATIENTS = ("PLANTED-A", "PLANTED-B")  # the first has three studies
IMAGES_PER_CT = 3
PROJECT_ROOT = Path(__file__).parents[3]
SILENT = Console(quiet=True)
YEAR_2020 = StudyFilter(since="20200101", until="20201231")


def write_studies(root: Path) -> None:
    """Write two CTs (one compressed) and a radiograph of one patient, a CT of another, and images to skip."""
    for study, centre, patient in (
        ("ct1", "north", PATIENTS[0]),
        ("ct2", "south", PATIENTS[0]),
        ("ct3", "north", PATIENTS[1]),
    ):
        _write_ct(root / f"PLANTED^{study}", study, centre, patient)
    _write_skipped_images(root / "PLANTED^ct1")
    radiograph = root / "PLANTED^film.dcm"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    write_radiograph(radiograph, pixels, 1.0, ("film",), "P", "Maker")
    dataset = plant(pydicom.dcmread(radiograph), PATIENTS[0], "PLANTED-film")
    dataset.StudyDate = "20200402"
    dataset.save_as(radiograph)


def _write_ct(folder: Path, study: str, centre: str, patient: str) -> None:
    folder.mkdir()
    rng = np.random.default_rng(len(study + centre))
    voxels = rng.integers(-1024, 1500, (IMAGES_PER_CT, 16, 16)).astype(np.int16)
    write_ct_series(folder, voxels, CENTRE_PROFILES[centre].scanner, (study,), "P", rng)
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = plant(pydicom.dcmread(path), patient, f"PLANTED-{study}", everywhere=number == 0)
        dataset.StudyDate = "20200401"
        dataset.save_as(path)


def _write_skipped_images(folder: Path) -> None:
    """Write an image with burned-in annotations, a secondary capture and a report into a CT's study."""
    first = pydicom.dcmread(folder / "000.dcm")
    burned, captured, report = (pydicom.dcmread(folder / "001.dcm") for _ in range(3))
    burned.BurnedInAnnotation = "YES"
    _set_sop_class(captured, SecondaryCaptureImageStorage)
    _set_sop_class(report, "1.2.840.10008.5.1.4.1.1.88.11")
    report.Modality = "SR"
    report.SeriesInstanceUID = f"{first.SeriesInstanceUID[:50]}.1"
    for number, dataset in enumerate((burned, captured, report)):
        dataset.SOPInstanceUID = f"{first.SOPInstanceUID[:50]}.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"other{number}.dcm")


def _set_sop_class(dataset: Dataset, uid: str) -> None:
    dataset.SOPClassUID = uid
    dataset.file_meta.MediaStorageSOPClassUID = uid


def make_paths(tmp_path: Path, labels_path: Path | None = None, keep_mapping: bool = False) -> IngestPaths:
    """Return the paths of an ingest into `tmp_path/data` and `tmp_path/state`."""
    table = tmp_path / "data" / "cohort.csv"
    table.parent.mkdir(exist_ok=True)
    return IngestPaths(table, tmp_path / "state", "north", labels_path=labels_path, keep_mapping=keep_mapping)


def ingest_command_line(*arguments: object) -> list[str]:
    """Return the command line of `consilium-centre ingest`."""
    program = "from client.cli import main; main()"
    return [sys.executable, "-c", program, "ingest", *map(str, arguments)]
