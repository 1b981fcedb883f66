"""Made-up hospitals: chest CTs drawn from ellipses, written as DICOM series, with the first paper's imbalance; a film with each.

What is the paper's (arXiv 2604.03320, true counts): scans and COVID scans per centre in training, 338/340/204/340 with
175/175/39/175, and in validation, 88/90/45/87 with 43/43/-/42. What is ours: the third centre has 8 COVID of 45 in validation (the
paper has none, which would leave that centre without an AUC), the test split copies the validation's counts, and every cell is scaled
by `Phantom.scale` but keeps at least 4 scans of each class in training and 3 elsewhere. No pixel is a patient's.

Hospitals differ as scanners do (noise, kernel, HU offset, spacing, field of view, positioning, slice order, compression), so that the
source can be told from the pixels and the shift between centres is real.

Every visit is two scans, a CT and its projection as a radiograph (client/radiograph.py). What is known of them follows from what was drawn,
and differs from hospital to hospital (`Hospital.holds`), as in the papers, so that every recipe finds centres with and without its labels.
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
from typing import Any

import cv2
import nibabel
import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from rich.progress import Progress

from client.chest import Scanner, Truth, chest
from client.radiograph import project, project_mask, write_film, zone_shares
from common.schema import Phantom

DRAWING = ("chest.py", "phantom.py", "radiograph.py")
# A change of the drawing rewrites the federations that lie on disk.
VERSION = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in DRAWING)).hexdigest()[:16]
MARKER = "phantom.json"
SPLITS = ("train", "val", "test")
CT_LABELS = ["severity", "lesion", "transition", "target"]
FILM_LABELS = [*(f"brixia_{zone}" for zone in "abcdef"), "outcome", "finding", "infection", "lungs"]
BOTTOM = -150.0  # mm, of a CT's lowest slice
HEIGHT = 300.0  # mm of a chest on its film; a CT of few slices would make a flat one
LUNG = 60.0  # mm of air that let a lung be seen on the film: not behind the diaphragm
BRIXIA = (0.05, 0.3, 0.6)  # affected share of a zone from which its score is 1, 2, 3


@dataclass(frozen=True)
class Hospital:
    """One hospital's scanner, how many CTs it has ((all, COVID) in train and in val = test), and which labels it knows."""

    train: tuple[int, int]
    val: tuple[int, int]
    scanner: Scanner
    holds: tuple[str, ...]  # of the labels (brixia: all six zones'); covid is known everywhere


# The only place that says who knows what.
HOSPITALS = {
    "north": Hospital(
        (338, 175),
        (88, 43),
        Scanner("Boreal", 360, 5.0, 30, -0.6, 0, (0, 0), 0),
        ("severity", "lesion", "transition", "outcome", "finding", "infection"),
    ),
    "east": Hospital(
        (340, 175),
        (90, 43),
        Scanner("Levant", 420, 6.0, 40, 0.8, 20, (12, -10), 3, flipped=True),
        ("severity", "transition", "outcome", "finding", "lungs"),
    ),
    "south": Hospital(
        (204, 39),
        (45, 8),
        Scanner("Austral", 390, 8.0, 75, -0.9, -25, (-15, 8), -5, compressed=True),
        ("lesion", "transition", "brixia", "outcome", "finding", "lungs"),
    ),
    "west": Hospital(
        (340, 175),
        (87, 42),
        Scanner("Occident", 340, 7.0, 22, -1.2, 35, (5, 4), 0),
        ("severity", "target", "brixia", "finding", "infection"),
    ),
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
        place = BOTTOM + z * scanner.spacing
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
    """The centre's CTs: scan, path, patient, source, split, modality, covid; about one patient in fifteen comes twice, within a split."""
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
    table.insert(5, "modality", "CT")
    return table


def labels_of(
    truth: Truth, rng: np.random.Generator, mm: float, slice_mm: float
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """What is known of a visit's CT, of its radiograph, and the radiograph's masks, by column; `mm` per pixel and `slice_mm` per slice of it.

    Severity is the affected per cent of the worse lung (arXiv 2006.01441). The zones are Brixia's (Borghesi & Maroldi, Radiol. Med. 2020):
    A, B, C are the thirds of the patient's right lung from above, D, E, F those of the left one.
    """
    noise, readers = rng.standard_normal(), rng.random(6)
    sides = [truth.lungs == side for side in (1, 2)]
    shares = [100 * int((truth.lesion & side).sum()) / max(int(side.sum()), 1) for side in sides]
    severity = round(max(shares), 2)
    lesion = project_mask(truth.lesion, mm, slice_mm)
    lungs = [project_mask(side, mm, slice_mm, LUNG) for side in sides]
    scores = map(_score, [share for lung in lungs for share in zone_shares(lung, lesion)], readers)
    film: dict[str, Any] = {f"brixia_{zone}": score for zone, score in zip("abcdef", scores, strict=True)}
    film["outcome"] = float(severity + 8 * noise > 10)  # the course depends on the burden, and on what no picture shows
    film["finding"] = _finding(shares, truth.lesion)
    return {"severity": severity}, film, {"infection": lesion, "lungs": lungs[0] | lungs[1]}


def _score(share: float, reader: float) -> float:
    """A zone's score 0..3; one reader in ten (`reader` is uniform in 0..1) gives a point too many or too few."""
    score = int(np.searchsorted(BRIXIA, share, side="right"))
    return float(np.clip(score + (reader > 0.95) - (reader < 0.05), 0, 3))


def _finding(shares: list[float], lesion: np.ndarray) -> str:
    """The class of a film by where the lesions lie, as in SIIM-FISABIO-RSNA: typical is both lungs, much of them, and rather below."""
    if not lesion.any():
        return "negative"
    area = lesion.sum(axis=(1, 2))
    height = float(area @ (np.arange(len(area)) + 0.5)) / (area.sum() * len(area))
    if min(shares) < 4 or height > 0.52:
        return "atypical"
    return "typical" if max(shares) >= 16 else "indeterminate"


def write_visit(folder: Path, row: dict[str, Any], settings: Phantom, hospital: Hospital) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one visit's CT, its radiograph and their masks below `folder`; returns the cohort's two rows, `row` being the CT's without labels.

    The labels draw from a generator of their own, so that they may change without a voxel changing.
    """
    scan, patient, scanner, holds = row["scan"], row["patient"], hospital.scanner, hospital.holds
    names = (settings.seed, row["source"], scan)
    person, visit = _rng(settings.seed, row["source"], patient), _rng(*names)
    voxels, truth = chest(person, visit, scanner, bool(row["covid"]), settings.slices, settings.pixels)
    (folder / row["path"]).mkdir(parents=True)
    write_series(folder / row["path"], voxels, scanner, names, patient, visit)
    mm, slice_mm = scanner.fov / settings.pixels, HEIGHT / settings.slices
    film = {**row, "scan": f"{scan}-xr", "path": f"xr/{scan}.dcm", "modality": "XR"}
    write_film(folder / film["path"], project(voxels, mm, slice_mm), mm, names, patient, scanner.maker)

    of_ct, of_film, masks = labels_of(truth, _rng(*names, "labels"), mm, slice_mm)
    of_ct |= {"transition": row["covid"], "target": row["covid"], "lesion": f"masks/{scan}.nii.gz"}
    of_film |= {name: f"masks/{scan}-{name}.png" for name in masks}
    ct = row | {k: v for k, v in of_ct.items() if k in holds}
    film |= {k: v for k, v in of_film.items() if k.split("_")[0] in holds}
    if "lesion" in ct:
        write_mask(folder / ct["lesion"], truth.lesion, scanner)
    for name in masks.keys() & film.keys():
        (folder / film[name]).write_bytes(cv2.imencode(".png", 255 * masks[name].astype(np.uint8))[1].tobytes())
    return ct, film


def write_mask(path: Path, mask: np.ndarray, scanner: Scanner) -> None:
    """`mask [Z, N, N]` as NIfTI where `write_series` puts the voxels; a NIfTI's millimetres run to the right, the front and the head."""
    mm = scanner.fov / mask.shape[2]
    corner = (mask.shape[2] - 1) / 2 * mm
    affine = np.diag([-mm, -mm, scanner.spacing, 1.0])
    affine[:3, 3] = corner, corner, BOTTOM
    image = nibabel.Nifti1Image(mask.astype(np.uint8).transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
    nibabel.save(image, path)


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
    """Write one made-up hospital to `root/<centre>`: `dicom/<scan>/NNN.dcm`, `xr/<scan>.dcm`, `masks/`, `cohort.csv`; returns it.

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
        for folder_name in ("dicom", "xr", "masks"):
            (work / folder_name).mkdir()
        visits = []
        for row in table.to_dict("records"):
            visits.append(write_visit(work, {str(k): v for k, v in row.items()}, settings, hospital))
            if progress and bar is not None:
                progress.advance(bar)
        cohort = pd.DataFrame([row for rows in zip(*visits, strict=True) for row in rows])  # the CTs, then the radiographs
        cohort = cohort.reindex(columns=[*table.columns, *(c for c in CT_LABELS + FILM_LABELS if c in cohort)])
        cohort.to_csv(work / "cohort.csv", index=False)
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
