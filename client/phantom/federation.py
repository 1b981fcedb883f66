"""Made-up hospitals: chest CTs drawn from ellipses, written as DICOM series, with the first paper's imbalance; a film with each.

What is the paper's (arXiv 2604.03320, true counts): scans and COVID scans per centre in training, 338/340/204/340 with
175/175/39/175, and in validation, 88/90/45/87 with 43/43/-/42. What is ours: the third centre has 8 COVID of 45 in validation (the
paper has none, which would leave that centre without an AUC), the test split copies the validation's counts, and every cell is scaled
by `Phantom.scale` but keeps at least 4 scans of each class in training and 3 elsewhere. No pixel is a patient's.

Hospitals differ as scanners do (noise, kernel, HU offset, spacing, field of view, positioning, slice order, compression), so that the
source can be told from the pixels and the shift between centres is real.

Every visit is two scans, a CT and its projection as a radiograph (client/phantom/chest_xray.py). What is known of them follows from what was drawn,
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

from client.phantom.chest_ct import GroundTruth, Scanner, draw_chest
from client.phantom.chest_xray import (
    compute_zone_fractions,
    project_mask,
    project_radiograph,
    write_radiograph,
)
from common.config.schema import PhantomConfig

DRAWING_MODULES = ("chest_ct.py", "federation.py", "chest_xray.py")
# A change of the drawing rewrites the federations that lie on disk.
DRAWING_VERSION = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in DRAWING_MODULES)
).hexdigest()[:16]
MARKER_FILE = "phantom.json"
SPLITS = ("train", "val", "test")
CT_LABELS = ["severity", "lesion", "transition", "target"]
RADIOGRAPH_LABELS = [*(f"brixia_{zone}" for zone in "abcdef"), "outcome", "finding", "infection", "lungs"]
LOWEST_SLICE_Z = -150.0  # mm, of a CT's lowest slice
CHEST_HEIGHT = 300.0  # mm of a chest on its film; a CT of few slices would make a flat one
MIN_LUNG_DEPTH = 60.0  # mm of air that let a lung be seen on the film: not behind the diaphragm
BRIXIA_THRESHOLDS = (0.05, 0.3, 0.6)  # affected share of a zone from which its score is 1, 2, 3


@dataclass(frozen=True)
class CentreProfile:
    """One hospital's scanner, how many CTs it has ((all, COVID) in train and in val = test), and which labels it knows."""

    train_counts: tuple[int, int]
    val_counts: tuple[int, int]
    scanner: Scanner
    known_labels: tuple[str, ...]  # of the labels (brixia: all six zones'); covid is known everywhere


# The only place that says who knows what.
CENTRE_PROFILES = {
    "north": CentreProfile(
        (338, 175),
        (88, 43),
        Scanner("Boreal", 360, 5.0, 30, -0.6, 0, (0, 0), 0),
        ("severity", "lesion", "transition", "outcome", "finding", "infection"),
    ),
    "east": CentreProfile(
        (340, 175),
        (90, 43),
        Scanner("Levant", 420, 6.0, 40, 0.8, 20, (12, -10), 3, feet_first=True),
        ("severity", "transition", "outcome", "finding", "lungs"),
    ),
    "south": CentreProfile(
        (204, 39),
        (45, 8),
        Scanner("Austral", 390, 8.0, 75, -0.9, -25, (-15, 8), -5, rle_compressed=True),
        ("lesion", "transition", "brixia", "outcome", "finding", "lungs"),
    ),
    "west": CentreProfile(
        (340, 175),
        (87, 42),
        Scanner("Occident", 340, 7.0, 22, -1.2, 35, (5, 4), 0),
        ("severity", "target", "brixia", "finding", "infection"),
    ),
}


def plan_scan_counts(profile: CentreProfile, settings: PhantomConfig) -> dict[str, tuple[int, int]]:
    """Scans to write per split: `(without COVID, with COVID)`, scaled, never below 4 of a class in train or 3 in val and test."""
    cells = {
        "train": (profile.train_counts, 4),
        "val": (profile.val_counts, 3),
        "test": (profile.val_counts, 3),
    }
    return {
        split: (
            max(least, round((total - covid) * settings.scale)),
            max(least, round(covid * settings.scale)),
        )
        for split, ((total, covid), least) in cells.items()
    }


def _make_rng(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def write_ct_series(
    folder: Path,
    voxels: np.ndarray,
    scanner: Scanner,
    uid_parts: tuple[object, ...],
    patient_id: str,
    rng: np.random.Generator,
) -> None:
    """`voxels [Z, N, N]` int16 HU as CT Image Storage, one file a slice, file names shuffled."""
    uid = partial(_make_uid, *uid_parts)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality, ds.Manufacturer, ds.BodyPartExamined = "CT", scanner.manufacturer, "CHEST"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = (
        f"Phantom^{patient_id}",
        patient_id,
        "",
        "O",
    )
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = (
        "20200401",
        "120000",
        "1",
        "",
        "",
    )
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (
        uid("study"),
        uid("series"),
        uid("frame"),
    )
    ds.SeriesNumber, ds.AcquisitionNumber, ds.KVP, ds.PositionReferenceIndicator = 2, 1, 120, ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = voxels.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    mm = scanner.field_of_view / voxels.shape[2]
    ds.PixelSpacing, ds.SliceThickness = [f"{mm:.6g}"] * 2, scanner.slice_spacing
    ds.ImageOrientationPatient = [-1 if scanner.feet_first else 1, 0, 0, 0, 1, 0]
    ds.PatientPosition = "FFS" if scanner.feet_first else "HFS"
    corner = (voxels.shape[2] - 1) / 2 * mm
    stored = (voxels[:, :, ::-1] if scanner.feet_first else voxels).astype(np.int32) + 1024
    for z, name in enumerate(rng.permutation(len(voxels))):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(z)
        ds.InstanceNumber = z + 1 if scanner.feet_first else len(voxels) - z
        place = LOWEST_SLICE_Z + z * scanner.slice_spacing
        ds.ImagePositionPatient = [
            f"{corner if scanner.feet_first else -corner:.6g}",
            f"{-corner:.6g}",
            f"{place:.6g}",
        ]
        ds.SliceLocation = f"{place:.6g}"
        ds.PixelData = stored[z].astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        if scanner.rle_compressed:
            ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)


def _make_uid(*names: object) -> UID:
    return generate_uid(entropy_srcs=[str(n) for n in names])


def make_scan_table(centre: str, settings: PhantomConfig, profile: CentreProfile) -> pd.DataFrame:
    """The centre's CTs: scan, path, patient, source, split, modality, covid; about one patient in fifteen comes twice, within a split."""
    rng = _make_rng(settings.seed, centre, "list")
    rows: list[tuple[str, str, float]] = []
    for split, cell in plan_scan_counts(profile, settings).items():
        for covid, number in enumerate(cell):
            for k in range(number):
                again = k > 0 and rng.random() < 1 / 15
                rows.append(
                    (rows[-1][0] if again else f"{centre[:1].upper()}{len(rows):04d}", split, float(covid))
                )
    scans = [f"{centre}-{k:04d}" for k in range(len(rows))]
    order = rng.permutation(len(rows))  # so that a scan's number tells nothing
    table = pd.DataFrame([rows[k] for k in order], columns=["patient", "split", "covid"])
    table.insert(0, "scan", scans)
    table.insert(1, "path", [f"dicom/{s}" for s in scans])
    table.insert(3, "source", centre)
    table.insert(5, "modality", "CT")
    return table


def derive_labels(
    truth: GroundTruth, rng: np.random.Generator, pixel_mm: float, slice_mm: float
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """What is known of a visit's CT, of its radiograph, and the radiograph's masks, by column; `mm` per pixel and `slice_mm` per slice of it.

    Severity is the affected per cent of the worse lung (arXiv 2006.01441). The zones are Brixia's (Borghesi & Maroldi, Radiol. Med. 2020):
    A, B, C are the thirds of the patient's right lung from above, D, E, F those of the left one.
    """
    noise, readers = rng.standard_normal(), rng.random(6)
    sides = [truth.lungs == side for side in (1, 2)]
    shares = [100 * int((truth.lesion & side).sum()) / max(int(side.sum()), 1) for side in sides]
    severity = round(max(shares), 2)
    lesion = project_mask(truth.lesion, pixel_mm, slice_mm)
    lungs = [project_mask(side, pixel_mm, slice_mm, MIN_LUNG_DEPTH) for side in sides]
    scores = map(
        _score_zone, [share for lung in lungs for share in compute_zone_fractions(lung, lesion)], readers
    )
    film: dict[str, Any] = {f"brixia_{zone}": score for zone, score in zip("abcdef", scores, strict=True)}
    film["outcome"] = float(
        severity + 8 * noise > 10
    )  # the course depends on the burden, and on what no picture shows
    film["finding"] = _classify_finding(shares, truth.lesion)
    return {"severity": severity}, film, {"infection": lesion, "lungs": lungs[0] | lungs[1]}


def _score_zone(share: float, reader: float) -> float:
    """A zone's score 0..3; one reader in ten (`reader` is uniform in 0..1) gives a point too many or too few."""
    score = int(np.searchsorted(BRIXIA_THRESHOLDS, share, side="right"))
    return float(np.clip(score + (reader > 0.95) - (reader < 0.05), 0, 3))


def _classify_finding(shares: list[float], lesion: np.ndarray) -> str:
    """The class of a film by where the lesions lie, as in SIIM-FISABIO-RSNA: typical is both lungs, much of them, and rather below."""
    if not lesion.any():
        return "negative"
    area = lesion.sum(axis=(1, 2))
    height = float(area @ (np.arange(len(area)) + 0.5)) / (area.sum() * len(area))
    if min(shares) < 4 or height > 0.52:
        return "atypical"
    return "typical" if max(shares) >= 16 else "indeterminate"


def write_visit(
    folder: Path, row: dict[str, Any], settings: PhantomConfig, profile: CentreProfile
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one visit's CT, its radiograph and their masks below `folder`; returns the cohort's two rows, `row` being the CT's without labels.

    The labels draw from a generator of their own, so that they may change without a voxel changing.
    """
    scan, patient, scanner, holds = row["scan"], row["patient"], profile.scanner, profile.known_labels
    names = (settings.seed, row["source"], scan)
    person, visit = _make_rng(settings.seed, row["source"], patient), _make_rng(*names)
    voxels, truth = draw_chest(
        person, visit, scanner, bool(row["covid"]), settings.num_slices, settings.image_size
    )
    (folder / row["path"]).mkdir(parents=True)
    write_ct_series(folder / row["path"], voxels, scanner, names, patient, visit)
    mm, slice_mm = scanner.field_of_view / settings.image_size, CHEST_HEIGHT / settings.num_slices
    film = {**row, "scan": f"{scan}-xr", "path": f"xr/{scan}.dcm", "modality": "XR"}
    write_radiograph(
        folder / film["path"],
        project_radiograph(voxels, mm, slice_mm),
        mm,
        names,
        patient,
        scanner.manufacturer,
    )

    of_ct, of_film, masks = derive_labels(truth, _make_rng(*names, "labels"), mm, slice_mm)
    of_ct |= {"transition": row["covid"], "target": row["covid"], "lesion": f"masks/{scan}.nii.gz"}
    of_film |= {name: f"masks/{scan}-{name}.png" for name in masks}
    ct = row | {k: v for k, v in of_ct.items() if k in holds}
    film |= {k: v for k, v in of_film.items() if k.split("_")[0] in holds}
    if "lesion" in ct:
        write_mask(folder / ct["lesion"], truth.lesion, scanner)
    for name in masks.keys() & film.keys():
        (folder / film[name]).write_bytes(
            cv2.imencode(".png", 255 * masks[name].astype(np.uint8))[1].tobytes()
        )
    return ct, film


def write_mask(path: Path, mask: np.ndarray, scanner: Scanner) -> None:
    """`mask [Z, N, N]` as NIfTI where `write_series` puts the voxels; a NIfTI's millimetres run to the right, the front and the head."""
    mm = scanner.field_of_view / mask.shape[2]
    corner = (mask.shape[2] - 1) / 2 * mm
    affine = np.diag([-mm, -mm, scanner.slice_spacing, 1.0])
    affine[:3, 3] = corner, corner, LOWEST_SLICE_Z
    image = nibabel.Nifti1Image(mask.astype(np.uint8).transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
    nibabel.save(image, path)


def _select_profile(centre: str, centre_index: int | None) -> CentreProfile:
    """The four by name; any other name takes one of their profiles, by its place in the federation or else by its letters."""
    if centre in CENTRE_PROFILES:
        return CENTRE_PROFILES[centre]
    place = centre_index if centre_index is not None else int(hashlib.sha256(centre.encode()).hexdigest(), 16)
    return list(CENTRE_PROFILES.values())[place % len(CENTRE_PROFILES)]


def _is_finished(folder: Path, settings: PhantomConfig, profile: CentreProfile) -> bool:
    try:
        return bool(json.loads((folder / MARKER_FILE).read_text()) == _make_marker(settings, profile))
    except (OSError, ValueError):
        return False


def _make_marker(settings: PhantomConfig, profile: CentreProfile) -> object:
    return json.loads(
        json.dumps({"version": DRAWING_VERSION, "settings": asdict(settings), "hospital": asdict(profile)})
    )


@contextmanager
def _exclusive_lock(root: Path) -> Iterator[None]:
    """One writer of `root` at a time; the lock falls with its process, however that ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_centre(
    root: Path,
    centre: str,
    settings: PhantomConfig,
    centre_index: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one made-up hospital to `root/<centre>`: `dicom/<scan>/NNN.dcm`, `xr/<scan>.dcm`, `masks/`, `cohort.csv`; returns it.

    The same settings give the same files, byte for byte. A finished folder of the same settings is left as it is, one of other settings
    is replaced as a whole; a process killed on the way leaves a folder that the next one clears away.
    """
    root, hospital = Path(root), _select_profile(centre, centre_index)
    folder = root / centre
    if _is_finished(folder, settings, hospital):
        return folder
    with _exclusive_lock(root):
        if _is_finished(folder, settings, hospital):  # another process was faster
            return folder
        for stale in root.glob(f".{centre}-*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root))
        work.chmod(0o755)
        table = make_scan_table(centre, settings, hospital)
        bar = progress.add_task(centre, total=len(table)) if progress else None
        for folder_name in ("dicom", "xr", "masks"):
            (work / folder_name).mkdir()
        visits = []
        for row in table.to_dict("records"):
            visits.append(write_visit(work, {str(k): v for k, v in row.items()}, settings, hospital))
            if progress and bar is not None:
                progress.advance(bar)
        cohort = pd.DataFrame(
            [row for rows in zip(*visits, strict=True) for row in rows]
        )  # the CTs, then the radiographs
        cohort = cohort.reindex(
            columns=[*table.columns, *(c for c in CT_LABELS + RADIOGRAPH_LABELS if c in cohort)]
        )
        cohort.to_csv(work / "cohort.csv", index=False)
        (work / MARKER_FILE).write_text(json.dumps(_make_marker(settings, hospital), indent=1))
        if folder.exists():
            folder.rename(Path(tempfile.mkdtemp(prefix=f".{centre}-", dir=root)) / "old")
        work.rename(folder)
        for stale in root.glob(f".{centre}-*"):
            shutil.rmtree(stale)
    return folder


def write_federation(
    root: Path, settings: PhantomConfig, centres: Iterable[str] = tuple(CENTRE_PROFILES)
) -> None:
    """Write every centre of a made-up federation under `root`; at once back when all are finished already."""
    names = list(centres)
    if all(_is_finished(Path(root) / c, settings, _select_profile(c, k)) for k, c in enumerate(names)):
        return
    with Progress() as progress:
        for k, centre in enumerate(names):
            write_centre(root, centre, settings, k, progress)
