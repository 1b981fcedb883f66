"""Four recipes' real data sets as cohorts of centres.

Pictures stay where they are; those turned or linked lie in the benchmark's folder.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from client.data.cohort import assign_split
from tests.benchmarks.real_ct import WINDOWS

Rows = dict[str, pd.DataFrame]  # {centre: its cohort}, paths absolute


def prognosis_data(data: Path, out: Path) -> Rows:
    """Frontal radiographs of the Cohen collection.

    Three centres know outcomes (went to intensive care) only, two know Brixia scores only.

    Outcomes: the one real hospital, and publications by their publisher; a publisher's cases may all have
    ended the same way. No film is at two centres: one with both labels (43) is where its source belongs.
    """
    films, table = _films(data)
    zones = [f"brixia_{z}" for z in "abcdef"]
    for zone in zones:
        table[zone] = pd.to_numeric(films[f"brixia_S_{zone[-1].upper()}"])
    table["outcome"] = films["went_icu"].map({"Y": 1.0, "N": 0.0})
    scored = films["source"].isin(
        [
            "radiopaedia.org",
            "sirm.org",
            "pubs.rsna.org",
            "rad2share.com",
            "radiologyassistant.nl",
            "ams.edu.sg",
        ]
    )
    place = np.select(
        [
            films["source"] == "hannover",
            films["source"] == "eurorad.org",
            films["source"] == "radiopaedia.org",
            scored,
        ],
        ["hannover", "eurorad", "radiopaedia", "sirm"],
        "journals",
    )
    centres: Rows = {}
    for centre in ("hannover", "eurorad", "journals", "radiopaedia", "sirm"):
        scores = centre in ("radiopaedia", "sirm")
        own = table[place == centre].drop(columns=["outcome"] if scores else zones)
        own = own[own["brixia_a" if scores else "outcome"].notna()]
        centres[centre] = own
    return _split(_own_patients(centres))


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


def finegrained_data(data: Path, out: Path) -> Rows:
    """The same films with their finding in four classes, and lung masks where there are any (166).

    Centres by publisher.
    """
    films, table = _films(data)
    of = {finding: name for name, findings in FINDINGS.items() for finding in findings}
    table["finding"] = films["finding"].map(of).to_numpy()
    table["lung_mask"] = [
        str(data / "cxr_cohen" / m) if isinstance(m, str) else np.nan for m in films["mask"]
    ]
    known = {
        "radiopaedia.org": "radiopaedia",
        "eurorad.org": "eurorad",
        "hannover": "hannover",
        "sirm.org": "hannover",
    }
    place = films["source"].map(known).fillna("journals").to_numpy()
    return _split(
        _own_patients({c: table[place == c] for c in ("radiopaedia", "eurorad", "hannover", "journals")})
    )


def triage_data(data: Path, out: Path) -> Rows:
    """COVID-SemiSeg (98 slices, all infected, all with expert masks.

    Its official test split; turned upright) and MosMed (924 studies' middle slices; infected or not, severity
    CT-0 to 2, 50 with masks) as two centres by the hash of the study.
    """
    semi = data / "covid_semiseg"
    upright = out / "upright"
    rows = []
    sets = {
        "train": semi / "TrainingSet/LungInfection-Train/Doctor-label",
        "test": semi / "TestingSet/LungInfection-Test",
    }
    for split, folder in sets.items():
        for picture in sorted((folder / "Imgs").iterdir()):
            mask = next((folder / "GT").glob(f"{picture.stem}.*"))
            name = f"{split}-{picture.stem}"
            turned = [
                _turned(source, upright / kind / name)
                for kind, source in (("image", picture), ("mask", mask))
            ]
            part = "val" if split == "train" and int(picture.stem) % 5 == 0 else split
            rows.append(
                {
                    "scan": name,
                    "path": turned[0],
                    "patient": name,
                    "split": part,
                    "covid": 1.0,
                    "lesion": turned[1],
                }
            )
    centres = {"semiseg": pd.DataFrame(rows)}
    manifest = pd.read_csv(data / "ct_multisource" / "manifest.csv")
    manifest = manifest[manifest["source"] == "mosmed"].reset_index(drop=True)
    folder = data / "ct_multisource"
    places = [_slice(folder / f, out / "slices" / Path(f).stem) for f in manifest["file"]]
    masks = [str(folder / m) if isinstance(m, str) else np.nan for m in manifest["mask"]]
    table = pd.DataFrame(
        {
            "scan": manifest["file"],
            "path": places,
            "patient": manifest["patient"].fillna(manifest["file"]),
            "lesion": masks,
        }
    )
    table["covid"], table["severity"] = (
        manifest["label"].astype(float),
        manifest["severity"].str[-1].astype(float),
    )
    table["window_low"], table["window_high"] = WINDOWS["mosmed"]
    table["split"] = [assign_split(str(p)) for p in table["patient"]]
    half = np.array(
        [assign_split(str(p), seed=1, fractions=(0.5, 0.0, 0.5)) == "train" for p in table["patient"]]
    )
    return centres | {"mosmed_a": table[half], "mosmed_b": table[~half]}


def _turned(source: Path, target: Path) -> str:
    """COVID-SemiSeg's pictures lie on their side. A CT of one slice is a folder of one picture."""
    image = cv2.imread(str(source), cv2.IMREAD_GRAYSCALE)
    target.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(target / "slice.png"), cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE))
    return str(target)


def _slice(picture: Path, target: Path) -> str:
    target.mkdir(parents=True, exist_ok=True)
    link = target / f"slice{picture.suffix}"
    if not link.is_symlink():
        link.symlink_to(picture)
    return str(target)


def transfer_data(data: Path, out: Path) -> Rows:
    """Soares and MosMed know the transition's label, UCSD (official split) the target's."""
    manifest = pd.read_csv(data / "ct_multisource" / "manifest.csv", dtype={"label": float})
    centres: Rows = {}
    for centre, source in (("soares", "soares_saopaulo"), ("mosmed", "mosmed"), ("ucsd", "ucsd_covidct")):
        rows = manifest[manifest["source"] == source].reset_index(drop=True)
        places = [
            _slice(data / "ct_multisource" / f, out / "slices" / f"{centre}-{k:04d}")
            for k, f in enumerate(rows["file"])
        ]
        patients = rows["patient"].fillna(rows["file"])
        splits = [
            s if isinstance(s, str) else assign_split(str(p))
            for p, s in zip(patients, rows["split"], strict=True)
        ]
        table = pd.DataFrame({"scan": rows["file"], "path": places, "patient": patients, "split": splits})
        table["target" if centre == "ucsd" else "transition"] = rows["label"]
        if centre in WINDOWS:
            table["window_low"], table["window_high"] = WINDOWS[centre]
        centres[centre] = table
    return centres


def _films(data: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The Cohen collection without lateral views: its manifest, and a cohort of it without labels."""
    films = pd.read_csv(data / "cxr_cohen" / "manifest.csv", dtype={"patientid": str})
    films = films[films["view"] != "L"].reset_index(drop=True)
    paths = [str(data / "cxr_cohen" / f) for f in films["file"]]
    patients = films["patientid"].fillna(films["file"])
    return films, pd.DataFrame(
        {"path": paths, "scan": films["file"], "source": films["source"], "patient": patients}
    )


def _own_patients(centres: Rows) -> Rows:
    """A publisher numbers its patients for itself."""
    return {c: rows.assign(patient=[f"{c}-{p}" for p in rows["patient"]]) for c, rows in centres.items()}


def _split(centres: Rows) -> Rows:
    return {
        c: rows.assign(split=[assign_split(str(p)) for p in rows["patient"]]) for c, rows in centres.items()
    }
