"""Made-up hospitals: chest CTs drawn from ellipses, written as DICOM series, with the first paper's imbalance.

What is the paper's (arXiv 2604.03320, true counts): scans and COVID scans per centre in training, 338/340/204/340 with
175/175/39/175, and in validation, 88/90/45/87 with 43/43/-/42. What is ours: the third centre has 8 COVID of 45 in validation (the
paper has none, which would leave that centre without an AUC), the test split copies the validation's counts, and every cell is scaled
by `Phantom.scale` but keeps at least 4 scans of each class in training and 3 elsewhere. No pixel is a patient's.

Hospitals differ as scanners do (noise, kernel, HU offset, spacing, field of view, positioning, slice order, compression), so that the
source can be told from the pixels and the shift between centres is real.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from rich.progress import Progress

from client.chest import Scanner, chest
from common.schema import Phantom

# A change of the drawing rewrites the federations that lie on disk.
VERSION = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("chest.py", "phantom.py"))).hexdigest()[:16]
MARKER = "phantom.json"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Hospital:
    """One hospital's scanner and how many scans it has: (all, COVID) in train and in val (= test)."""

    train: tuple[int, int]
    val: tuple[int, int]
    scanner: Scanner


HOSPITALS = {
    "north": Hospital((338, 175), (88, 43), Scanner("Boreal", 360, 5.0, 30, -0.6, 0, (0, 0), 0)),
    "east": Hospital((340, 175), (90, 43), Scanner("Levant", 420, 6.0, 40, 0.8, 20, (12, -10), 3, flipped=True)),
    "south": Hospital((204, 39), (45, 8), Scanner("Austral", 390, 8.0, 75, -0.9, -25, (-15, 8), -5, compressed=True)),
    "west": Hospital((340, 175), (87, 42), Scanner("Occident", 340, 7.0, 22, -1.2, 35, (5, 4), 0)),
}


def counts(hospital: Hospital, settings: Phantom) -> dict[str, tuple[int, int]]:
    """Scans to write per split: `(without COVID, with COVID)`, scaled, never below 4 of a class in train or 3 in val and test."""
    cells = {"train": (hospital.train, 4), "val": (hospital.val, 3), "test": (hospital.val, 3)}
    return {
        split: (max(least, round((total - covid) * settings.scale)), max(least, round(covid * settings.scale)))
        for split, ((total, covid), least) in cells.items()
    }


def _rng(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def write_series(
    folder: Path, voxels: np.ndarray, scanner: Scanner, names: tuple[object, ...], patient: str, rng: np.random.Generator
) -> None:
    """`voxels [Z, N, N]` int16 HU as CT Image Storage, one file a slice, file names shuffled."""
    uid = partial(_uid, *names)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality, ds.Manufacturer, ds.BodyPartExamined = "CT", scanner.maker, "CHEST"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = f"Phantom^{patient}", patient, "", "O"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "20200401", "120000", "1", "", ""
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid("study"), uid("series"), uid("frame")
    ds.SeriesNumber, ds.AcquisitionNumber, ds.KVP, ds.PositionReferenceIndicator = 2, 1, 120, ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = voxels.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    mm = scanner.fov / voxels.shape[2]
    ds.PixelSpacing, ds.SliceThickness = [f"{mm:.6g}"] * 2, scanner.spacing
    ds.ImageOrientationPatient = [-1 if scanner.flipped else 1, 0, 0, 0, 1, 0]
    ds.PatientPosition = "FFS" if scanner.flipped else "HFS"
    corner = (voxels.shape[2] - 1) / 2 * mm
    stored = (voxels[:, :, ::-1] if scanner.flipped else voxels).astype(np.int32) + 1024
    for z, name in enumerate(rng.permutation(len(voxels))):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(z)
        ds.InstanceNumber = z + 1 if scanner.flipped else len(voxels) - z
        place = -150 + z * scanner.spacing
        ds.ImagePositionPatient = [f"{corner if scanner.flipped else -corner:.6g}", f"{-corner:.6g}", f"{place:.6g}"]
        ds.SliceLocation = f"{place:.6g}"
        ds.PixelData = stored[z].astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        if scanner.compressed:
            ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)


def _uid(*names: object) -> UID:
    return generate_uid(entropy_srcs=[str(n) for n in names])


def scan_list(centre: str, settings: Phantom, hospital: Hospital) -> pd.DataFrame:
    """The centre's cohort: scan, path, patient, source, split, covid; about one patient in fifteen comes twice, within a split."""
    rng = _rng(settings.seed, centre, "list")
    rows: list[tuple[str, str, float]] = []
    for split, cell in counts(hospital, settings).items():
        for covid, number in enumerate(cell):
            for k in range(number):
                again = k > 0 and rng.random() < 1 / 15
                rows.append((rows[-1][0] if again else f"{centre[:1].upper()}{len(rows):04d}", split, float(covid)))
    scans = [f"{centre}-{k:04d}" for k in range(len(rows))]
    order = rng.permutation(len(rows))  # so that a scan's number tells nothing
    table = pd.DataFrame([rows[k] for k in order], columns=["patient", "split", "covid"])
    table.insert(0, "scan", scans)
    table.insert(1, "path", [f"dicom/{s}" for s in scans])
    table.insert(3, "source", centre)
    return table


def _hospital(centre: str, position: int | None) -> Hospital:
    """The four by name; any other name takes one of their profiles, by its place in the federation or else by its letters."""
    if centre in HOSPITALS:
        return HOSPITALS[centre]
    place = position if position is not None else int(hashlib.sha256(centre.encode()).hexdigest(), 16)
    return list(HOSPITALS.values())[place % len(HOSPITALS)]


def _finished(folder: Path, settings: Phantom, hospital: Hospital) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text()) == _marker(settings, hospital))
    except (OSError, ValueError):
        return False


def _marker(settings: Phantom, hospital: Hospital) -> object:
    return json.loads(json.dumps({"version": VERSION, "settings": asdict(settings), "hospital": asdict(hospital)}))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One writer of `root` at a time; the lock falls with its process, however that ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_centre(root: Path, centre: str, settings: Phantom, position: int | None = None, progress: Progress | None = None) -> Path:
    """Write one made-up hospital to `root/<centre>`: `dicom/<scan>/NNN.dcm` and `cohort.csv`; returns that folder.

    The same settings give the same files, byte for byte. A finished folder of the same settings is left as it is, one of other settings
    is replaced as a whole; a process killed on the way leaves a folder that the next one clears away.
    """
    root, hospital = Path(root), _hospital(centre, position)
    folder = root / centre
    if _finished(folder, settings, hospital):
        return folder
    with _alone(root):
        if _finished(folder, settings, hospital):  # another process was faster
            return folder
        for stale in root.glob(f".{centre}-*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root))
        work.chmod(0o755)
        table = scan_list(centre, settings, hospital)
        bar = progress.add_task(centre, total=len(table)) if progress else None
        for row in table.itertuples():
            names = (settings.seed, centre, row.scan)
            target = work / str(row.path)
            target.mkdir(parents=True)
            person, visit = _rng(settings.seed, centre, row.patient), _rng(*names)
            voxels, _ = chest(person, visit, hospital.scanner, bool(row.covid), settings.slices, settings.pixels)
            write_series(target, voxels, hospital.scanner, names, str(row.patient), visit)
            if progress and bar is not None:
                progress.advance(bar)
        table.to_csv(work / "cohort.csv", index=False)
        (work / MARKER).write_text(json.dumps(_marker(settings, hospital), indent=1))
        if folder.exists():
            folder.rename(Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root)) / "old")
        work.rename(folder)
        for stale in root.glob(f".{centre}-*"):
            shutil.rmtree(stale)
    return folder


def write_federation(root: Path, settings: Phantom, centres: Iterable[str] = tuple(HOSPITALS)) -> None:
    """Write every centre of a made-up federation under `root`; at once back when all are finished already."""
    names = list(centres)
    if all(_finished(Path(root) / c, settings, _hospital(c, k)) for k, c in enumerate(names)):
        return
    with Progress() as progress:
        for k, centre in enumerate(names):
            write_centre(root, centre, settings, k, progress)
