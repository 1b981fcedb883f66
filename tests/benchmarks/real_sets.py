"""Arrange real data sets as cohorts of centres, for four recipes.

Pictures stay where they are; rotated and linked ones are written to the benchmark's folder.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from client.data.cohort import assign_split
from tests.benchmarks.real_ct_data import assign_splits, link_slice
from tests.benchmarks.real_ct_settings import CENTRES, WINDOWS

Cohorts = dict[str, pd.DataFrame]  # {centre: its cohort}, with absolute paths


# --- films of the Cohen collection

ZONES = [f"brixia_{zone}" for zone in "abcdef"]
SCORED_CENTRES = ("radiopaedia", "sirm")
SCORED_SOURCES = [
    "radiopaedia.org",
    "sirm.org",
    "pubs.rsna.org",
    "rad2share.com",
    "radiologyassistant.nl",
    "ams.edu.sg",
]
FINDINGS = {
    "covid": ["COVID-19", "COVID-19, ARDS"],
    "viral": ["SARS", "Varicella", "Influenza"],
    "bacterial": [
        "Streptococcus",
        "Klebsiella",
        "Mycoplasma Bacterial Pneumonia",
        "Legionella",
        "E.Coli",
        "Bacterial",
    ],
    "other": ["No Finding", "Pneumocystis", "Lipoid", "ARDS"],
}
FINEGRAINED_CENTRES = {
    "radiopaedia.org": "radiopaedia",
    "eurorad.org": "eurorad",
    "hannover": "hannover",
    "sirm.org": "hannover",
}


def make_prognosis_cohorts(data: Path, out: Path) -> Cohorts:
    """Frontal radiographs: three centres know only outcomes (intensive care), two only Brixia scores.

    Outcomes are those of the one real hospital, and of publications by their publisher; a publisher's cases
    may all have ended alike. No film is at two centres: one with both labels (43) is where its source
    belongs.
    """
    films, cohort = read_films(data)
    for zone in ZONES:
        cohort[zone] = pd.to_numeric(films[f"brixia_S_{zone[-1].upper()}"])
    cohort["outcome"] = films["went_icu"].map({"Y": 1.0, "N": 0.0})
    source = films["source"]
    conditions = [
        source == "hannover",
        source == "eurorad.org",
        source == "radiopaedia.org",
        source.isin(SCORED_SOURCES),
    ]
    centre_of_film = np.select(conditions, ["hannover", "eurorad", "radiopaedia", "sirm"], "journals")
    cohorts: Cohorts = {}
    for centre in ("hannover", "eurorad", "journals", *SCORED_CENTRES):
        films_here = cohort[centre_of_film == centre]
        if centre in SCORED_CENTRES:
            films_here = films_here.drop(columns=["outcome"])
            cohorts[centre] = films_here[films_here["brixia_a"].notna()]
        else:
            films_here = films_here.drop(columns=ZONES)
            cohorts[centre] = films_here[films_here["outcome"].notna()]
    return split_by_patient(separate_patients(cohorts))


def make_finegrained_cohorts(data: Path, out: Path) -> Cohorts:
    """The same films with their finding in four classes, and lung masks where there are any (166).

    Centres are publishers.
    """
    films, cohort = read_films(data)
    class_of_finding = {}
    for class_name, findings in FINDINGS.items():
        class_of_finding.update(dict.fromkeys(findings, class_name))
    cohort["finding"] = films["finding"].map(class_of_finding).to_numpy()
    cohort["lung_mask"] = list_mask_paths(data / "cxr_cohen", films["mask"])
    centre_of_film = films["source"].map(FINEGRAINED_CENTRES).fillna("journals").to_numpy()
    cohorts = {}
    for centre in ("radiopaedia", "eurorad", "hannover", "journals"):
        cohorts[centre] = cohort[centre_of_film == centre]
    return split_by_patient(separate_patients(cohorts))


def read_films(data: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The Cohen collection without lateral views: its manifest, and a cohort of it without labels."""
    folder = data / "cxr_cohen"
    films = pd.read_csv(folder / "manifest.csv", dtype={"patientid": str})
    films = films[films["view"] != "L"].reset_index(drop=True)
    columns = {
        "path": [str(folder / file) for file in films["file"]],
        "scan": films["file"],
        "source": films["source"],
        "patient": films["patientid"].fillna(films["file"]),
    }
    return films, pd.DataFrame(columns)


def list_mask_paths(folder: Path, files: pd.Series[str]) -> list[str | float]:
    """The path of each mask; NaN where there is none."""
    return [str(folder / file) if isinstance(file, str) else np.nan for file in files]


def separate_patients(cohorts: Cohorts) -> Cohorts:
    """Put the centre before each patient's number, because every publisher has its own numbering."""
    separated = {}
    for centre, cohort in cohorts.items():
        separated[centre] = cohort.assign(patient=[f"{centre}-{patient}" for patient in cohort["patient"]])
    return separated


def split_by_patient(cohorts: Cohorts) -> Cohorts:
    split_cohorts = {}
    for centre, cohort in cohorts.items():
        split_cohorts[centre] = cohort.assign(split=hash_splits(cohort["patient"]))
    return split_cohorts


def hash_splits(patients: pd.Series[str]) -> list[str]:
    return [assign_split(str(patient)) for patient in patients]


# --- CT slices


def make_triage_cohorts(data: Path, out: Path) -> Cohorts:
    """COVID-SemiSeg (98 slices, all infected) and MosMed (924 studies' middle slices) as three centres.

    COVID-SemiSeg has expert masks of all slices and its official test split. MosMed, divided in two by the
    hash of the study, has whether a study is infected, its severity (CT-0 to CT-2), and 50 masks.
    """
    mosmed = make_mosmed_cohort(data, out)
    is_first_half = []
    for patient in mosmed["patient"]:
        half = assign_split(str(patient), seed=1, fractions=(0.5, 0.0, 0.5))
        is_first_half.append(half == "train")
    in_first_half = np.array(is_first_half)
    return {
        "semiseg": make_semiseg_cohort(data, out),
        "mosmed_a": mosmed[in_first_half],
        "mosmed_b": mosmed[~in_first_half],
    }


def make_semiseg_cohort(data: Path, out: Path) -> pd.DataFrame:
    folder = data / "covid_semiseg"
    folders = {
        "train": folder / "TrainingSet/LungInfection-Train/Doctor-label",
        "test": folder / "TestingSet/LungInfection-Test",
    }
    rows = []
    for split, split_folder in folders.items():
        for picture in sorted((split_folder / "Imgs").iterdir()):
            mask = next((split_folder / "GT").glob(f"{picture.stem}.*"))
            name = f"{split}-{picture.stem}"
            is_validation = split == "train" and int(picture.stem) % 5 == 0
            row = {
                "scan": name,
                "path": rotate_upright(picture, out / "upright" / "image" / name),
                "patient": name,
                "split": "val" if is_validation else split,
                "covid": 1.0,
                "lesion": rotate_upright(mask, out / "upright" / "mask" / name),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def make_mosmed_cohort(data: Path, out: Path) -> pd.DataFrame:
    folder = data / "ct_multisource"
    manifest = pd.read_csv(folder / "manifest.csv")
    manifest = manifest[manifest["source"] == "mosmed"].reset_index(drop=True)
    patients = manifest["patient"].fillna(manifest["file"])
    window_low, window_high = WINDOWS["mosmed"]
    columns = {
        "scan": manifest["file"],
        "path": [link_slice(folder / file, out / "slices" / Path(file).stem) for file in manifest["file"]],
        "patient": patients,
        "lesion": list_mask_paths(folder, manifest["mask"]),
        "covid": manifest["label"].astype(float),
        "severity": manifest["severity"].str[-1].astype(float),
        "window_low": window_low,
        "window_high": window_high,
        "split": hash_splits(patients),
    }
    return pd.DataFrame(columns)


def rotate_upright(picture: Path, folder: Path) -> str:
    """Rotate a picture of COVID-SemiSeg, which lies on its side, into a folder of its own: a CT of one slice.

    Returns the folder's path.
    """
    image = cv2.imread(str(picture), cv2.IMREAD_GRAYSCALE)
    assert image is not None, picture
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "slice.png"), cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE))
    return str(folder)


def make_transfer_cohorts(data: Path, out: Path) -> Cohorts:
    """Soares and MosMed know the transition's label, UCSD (official split) the target's."""
    folder = data / "ct_multisource"
    manifest = pd.read_csv(folder / "manifest.csv", dtype={"label": float})
    cohorts: Cohorts = {}
    for centre in ("soares", "mosmed", "ucsd"):
        rows = manifest[manifest["source"] == CENTRES[centre]].reset_index(drop=True)
        paths = []
        for number, file in enumerate(rows["file"]):
            paths.append(link_slice(folder / file, out / "slices" / f"{centre}-{number:04d}"))
        patients = rows["patient"].fillna(rows["file"])
        splits = assign_splits(patients, rows["split"])
        cohort = pd.DataFrame({"scan": rows["file"], "path": paths, "patient": patients, "split": splits})
        label_column = "target" if centre == "ucsd" else "transition"
        cohort[label_column] = rows["label"]
        if centre in WINDOWS:
            cohort["window_low"], cohort["window_high"] = WINDOWS[centre]
        cohorts[centre] = cohort
    return cohorts
