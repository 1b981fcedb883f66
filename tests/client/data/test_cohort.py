"""Cohorts: which scans are in, their labels, sources and splits, and the errors when something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.cohort import assign_split, build_cohort, filter_modality, load_cohort, save_cohort
from client.data.columns import find_label_columns
from client.phantom.chest_ct import draw_chest
from client.phantom.dicom_files import write_ct_series
from client.phantom.profiles import CENTRE_PROFILES
from common.utils.errors import ConsiliumError


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 20), 90, np.uint8))


def write_series(folder: Path, patient: str, *names: object, slices: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    voxels, _ = draw_chest(rng, rng, CENTRE_PROFILES["north"].scanner, True, slices, 64)
    write_ct_series(folder, voxels, CENTRE_PROFILES["north"].scanner, names, patient, rng)


def write_cov19_ctdb(folder: Path) -> Path:
    """Write four scans of one name, as in COV19-CT-DB: only class and split distinguish them."""
    scans = [
        "covid1/ct_scan_0",
        "covid2/ct_scan_9",
        "non-covid3/ct_scan_0",
        "validation/val/covid/ct_scan_0",
        "validation/val/non-covid/ct_scan_0",
    ]
    for scan in scans:
        for z in range(3):
            write_image(folder / scan / f"{z}.jpg")
    for name, text in {
        "train_covid.csv": "ct_scan_name,data_centre\nct_scan_0,0\nct_scan_9,1\n",
        "train_non_covid.csv": "ct_scan_name,data_centre\nct_scan_0,2\n",
        "validation_covid.csv": "ct_scan_name,data_centre\nct_scan_0,3\n",
        "validation_non_covid.csv": "ct_scan_name,data_centre\nct_scan_0,1\n",
    }.items():
        (folder / name).write_text(text)
    return folder


def test_colliding_names_keep_their_own_source(tmp_path: Path) -> None:
    df, skipped = build_cohort(write_cov19_ctdb(tmp_path / "data"), "greece")
    sources = {(row.covid, row.split, Path(row.path).name): row.source for row in df.itertuples()}
    assert sources == {
        (1.0, "train", "ct_scan_0"): "0",
        (1.0, "train", "ct_scan_9"): "1",
        (0.0, "train", "ct_scan_0"): "2",
        (1.0, "val", "ct_scan_0"): "3",
        (0.0, "val", "ct_scan_0"): "1",
    }
    assert df["scan"].is_unique
    assert not skipped


def test_a_table_of_sources_must_name_its_class(tmp_path: Path) -> None:
    folder = write_cov19_ctdb(tmp_path / "data")
    (folder / "train_covid.csv").rename(folder / "train.csv")
    with pytest.raises(ConsiliumError, match="collide"):
        build_cohort(folder, "greece")


NAMES = st.text(min_size=1, max_size=8)


@given(st.lists(NAMES, unique=True, max_size=30), NAMES, st.integers(0, 9))
def test_a_patients_split_does_not_change_when_others_are_added(
    others: list[str], patient: str, seed: int
) -> None:
    before = assign_split(patient, seed)
    assert before in ("train", "val", "test")
    for other in others:
        assign_split(other, seed)
    assert assign_split(patient, seed) == before


def test_splits_have_their_shares_and_depend_on_the_seed() -> None:
    splits = pd.Series([assign_split(f"P{k}", 3, (0.6, 0.3, 0.1)) for k in range(4000)])
    shares = splits.value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.03)
    assert shares["test"] == pytest.approx(0.1, abs=0.02)
    assert [assign_split(f"P{k}", 1) for k in range(50)] != [assign_split(f"P{k}", 2) for k in range(50)]
    assert {assign_split(f"P{k}", 1, (1, 0, 0)) for k in range(50)} == {"train"}


def test_dicom_folder_with_labels(tmp_path: Path) -> None:
    root = tmp_path / "dicom"
    write_series(root / "a" / "study1", "P1", "one")
    write_series(root / "b" / "study2", "P1", "two")
    write_series(root / "c", "P2", "three")
    for file in (root / "c").iterdir():
        file.rename(file.with_stem("first" + file.stem))
    write_series(root / "c", "P3", "four", slices=6)  # a second study among the first one's files
    (root / "c" / "notes.doc").write_text("hello")
    (root / "c" / "empty.dcm").write_bytes(b"")
    (root / "labels.csv").write_text("patient,covid,severity\nP1,1,mild\nP2,0,\nP9,1,severe\n")
    df, skipped = build_cohort(root, "north")
    assert sorted(df["patient"]) == ["P1", "P1", "P2", "P3"]
    assert df.groupby("patient")["split"].nunique().max() == 1
    by_patient = df.groupby("patient")["covid"].first()
    assert by_patient["P1"] == 1
    assert by_patient["P2"] == 0
    assert np.isnan(df.loc[df["patient"] == "P3", "covid"]).all()
    assert df.loc[df["path"].str.endswith("/c"), "series"].nunique() == 2
    assert df.loc[df["patient"] == "P1", "series"].isna().all()
    reasons = " ".join(s.reason for s in skipped)
    assert ".doc" in reasons
    assert "empty" in reasons
    assert "1 of its rows" in reasons


def test_other_series_of_a_study_are_listed_as_skipped(tmp_path: Path) -> None:
    root = tmp_path / "dicom"
    write_series(root / "thick", "P1", "one")
    write_series(root / "thin", "P1", "two")
    studies = [str(pydicom.dcmread(next((root / n).iterdir())).StudyInstanceUID) for n in ("thick", "thin")]
    for file in (root / "thin").iterdir():
        ds = pydicom.dcmread(file)
        ds.StudyInstanceUID = studies[0]
        ds.SliceThickness = 1.0
        ds.save_as(file)
    df, skipped = build_cohort(root, "north")
    assert [Path(p).name for p in df["path"]] == ["thin"]
    assert [Path(s.path).name for s in skipped] == ["thick"]


def test_nifti_and_images(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "nii" / "covid").mkdir(parents=True)
    scan = nibabel.Nifti1Image(np.zeros((5, 5, 4), np.int16), np.eye(4))
    mask = nibabel.Nifti1Image(np.zeros((5, 5, 4), np.uint8), np.eye(4))
    nibabel.save(scan, root / "nii" / "covid" / "one.nii.gz")
    nibabel.save(mask, root / "nii" / "covid" / "one_mask.nii.gz")
    (root / "nii" / "bad.nii").write_bytes(b"not a scan")
    for k in range(3):
        write_image(root / "slices" / "scan7" / f"IM{k}.png")  # one scan of three slices
        write_image(root / "normal" / f"{k}.png")  # three radiographs in a class's folder
    write_image(root / "xray" / "left.png")
    write_image(root / "xray" / "right.png")
    (root / "labels.csv").write_text("scan,covid\none,0\nscan7,1\n")
    df, skipped = build_cohort(root, "north")
    covid = dict(zip(df["scan"], df["covid"], strict=True))
    assert covid.pop("nii/covid/one.nii.gz") == 0  # labels.csv overrules the folder's name
    assert covid.pop("slices/scan7") == 1
    assert [covid.pop(f"normal/{k}.png") for k in range(3)] == [0, 0, 0]
    assert sorted(covid) == ["xray/left.png", "xray/right.png"]
    assert sorted(Path(s.path).name for s in skipped) == ["bad.nii", "one_mask.nii.gz"]


def test_a_manifest_is_translated_and_survives_saving(tmp_path: Path) -> None:
    for k in range(4):
        write_image(tmp_path / "img" / f"{k}.png")
    rows = {
        "file": [f"img/{k}.png" for k in range(4)] + ["img/none.png", "img/0.png"],
        "label": [1, 0, None, 1, 1, 1],
        "patient": ["007", "007", "8", None, "9", "9"],
        "split": ["valid", None, "test", None, None, None],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    df, skipped = build_cohort(tmp_path, "north")
    assert df["split"].tolist()[:3] == ["val", "val", "test"]  # the second scan follows its patient
    assert df["covid"].tolist()[:2] == [1, 0]
    assert np.isnan(df["covid"][2])
    assert sorted(s.reason for s in skipped) == ["listed twice", "the file is not there"]
    for name in ("cohort.csv", "cohort.parquet"):
        save_cohort(df, tmp_path / name)
        again = load_cohort(tmp_path / name, "north")
        assert again["path"].tolist() == [f"img/{k}.png" for k in range(4)]
        assert again["patient"].tolist() == df["patient"].tolist()
        np.testing.assert_array_equal(again["covid"], df["covid"])
    save_cohort(df, tmp_path / "elsewhere" / "cohort.csv")
    assert all(os.path.isabs(p) for p in load_cohort(tmp_path / "elsewhere", "north")["path"])


def test_a_patient_with_two_given_splits_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    write_image(tmp_path / "2.png")
    rows = {"path": ["1.png", "2.png"], "patient": "Meier", "split": ["train", "test"]}
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ConsiliumError, match="1 patients"):
        build_cohort(tmp_path / "m.csv", "north")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        ("scan,path,split\n", "empty"),
        ("scan,split\na,train\n", "lacks the column path"),
        ("scan,path,split\nMeier,x,train\nMeier,y,train\n", "1 scans stand twice"),
        ("scan,path,split\na,x,train\nb,y,Meier\n", "split in row 3"),
        (
            "scan,path,patient,split\na,x,Meier,train\nb,y,Meier,test\n",
            "1 patients stand in more than one split",
        ),
        ("scan,path,split\na,,train\n", "row 2 of its cohort table has no path"),
        ("scan,path,split,window_low\na,x,train,0\n", "one of window_low and window_high"),
        ("scan,path,split,window_low,window_high\na,x,train,9,1\n", "not below"),
        (
            "scan,path,split,modality\na,x,train,ct\nb,y,train,MR\n",
            "modality in row 3 of its cohort table is not CT or XR (1 such rows)",
        ),
        ('scan,path,split\n"a,b\n', "cannot be read"),
    ],
)
def test_wrong_tables_give_one_sentence_without_identifiers(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "Meier_1950.csv").write_text(text)
    with pytest.raises(ConsiliumError) as error:
        load_cohort(tmp_path / "Meier_1950.csv", "north")
    assert expected in str(error.value)
    assert "centre 'north'" in str(error.value)
    assert "Meier" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_missing_table_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="consilium-centre cohort") as error:
        load_cohort(tmp_path / "nowhere", "north")
    assert str(tmp_path) not in str(error.value)


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.exe").write_bytes(b"x")
    with pytest.raises(ConsiliumError, match=r"holds no scan \(1 skipped"):
        build_cohort(tmp_path, "north")
    with pytest.raises(ConsiliumError, match="is not there"):
        build_cohort(tmp_path / "none", "north")


def test_only_scans_of_the_modality_stay(tmp_path: Path) -> None:
    text = "scan,path,split,modality,lungs\na,x,train,ct,m.png\nb,y,train,XR,\nc,z,val,,\n"
    (tmp_path / "cohort.csv").write_text(text)
    df = load_cohort(tmp_path, "north")
    assert find_label_columns(df) == []
    assert filter_modality(df, "CT")["scan"].tolist() == ["a", "c"]
    assert filter_modality(df, "XR")["scan"].tolist() == ["b", "c"]
    assert filter_modality(df, "any") is df
    plain = df.drop(columns="modality")
    assert filter_modality(plain, "XR") is plain


def test_a_manifests_mask_paths_stay_valid(tmp_path: Path) -> None:
    for name in ("img/0.png", "img/1.png", "seg/0.png", "seg/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "mild").mkdir()  # a class of the same name is no path
    rows = {
        "path": ["img/0.png", "img/1.png"],
        "lesion": [None, "seg/1.png"],
        "lungs": ["seg/0.png", None],
        "grade": ["mild", "severe"],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    df, _ = build_cohort(tmp_path, "north")
    assert df["lesion"][1] == str(tmp_path / "seg" / "1.png")
    assert df["grade"].tolist() == ["mild", "severe"]
    save_cohort(df, tmp_path / "cohort.csv")
    again = load_cohort(tmp_path, "north")
    assert again["lesion"][1] == "seg/1.png"
    assert again["lungs"][0] == "seg/0.png"
    save_cohort(df, tmp_path / "other" / "cohort.csv")
    assert os.path.isabs(load_cohort(tmp_path / "other", "north")["lungs"][0])


def test_a_broken_link_is_listed_as_skipped(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "scan.png"), np.full((32, 32), 90, np.uint8))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    table, skipped = build_cohort(tmp_path, "north")
    assert len(table) == 1
    assert [Path(item.path).name for item in skipped] == ["gone.png"]
    assert skipped[0].reason == "it is a link that leads nowhere, or no file"
