"""The made-up hospitals.

The same every time, imbalanced as said, proper DICOM, labels that follow from what was drawn, and safe to
write twice or to be killed over.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest

from client.data.cohort import load_cohort
from client.imaging.readers import read_scan
from client.imaging.readers.nifti import read_nifti
from client.phantom.chest_ct import GroundTruth, draw_chest
from client.phantom.dicom_files import write_ct_series, write_mask
from client.phantom.federation import CHEST_HEIGHT, _make_rng, make_scan_table, write_centre, write_federation
from client.phantom.labels import derive_labels
from client.phantom.profiles import CENTRE_PROFILES, plan_scan_counts
from common.config.schema import PhantomConfig

# Which rows of which centres have a label, and no others.
HELD = {
    "severity": ("CT", {"north", "east", "west"}),
    "lesion": ("CT", {"north", "south"}),
    "transition": ("CT", {"north", "east", "south"}),
    "target": ("CT", {"west"}),
    **{f"brixia_{zone}": ("XR", {"south", "west"}) for zone in "abcdef"},
    "outcome": ("XR", {"north", "east", "south"}),
    "finding": ("XR", {"north", "east", "south", "west"}),
    "infection": ("XR", {"north", "west"}),
    "lungs": ("XR", {"east", "south"}),
}
TINY = PhantomConfig(
    scale=0.001, num_slices=10, image_size=64
)  # the least: 4 of a class in train, 3 in val and test
WRITE = """
import sys
from pathlib import Path
from client.phantom.federation import write_centre
from common.config.schema import PhantomConfig
write_centre(Path(sys.argv[1]), "south", PhantomConfig(scale=0.001, num_slices=10, image_size=64))
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def drawn(centre: str, row: pd.Series, settings: PhantomConfig = TINY) -> tuple[np.ndarray, GroundTruth]:
    """What a row of the cohort shows, drawn again."""
    person, visit = (
        _make_rng(settings.seed, centre, row["patient"]),
        _make_rng(settings.seed, centre, row["scan"].removesuffix("-xr")),
    )
    return draw_chest(
        person,
        visit,
        CENTRE_PROFILES[centre].scanner,
        bool(row["covid"]),
        settings.num_slices,
        settings.image_size,
    )


def rows_of(federation: Path, centre: str, modality: str) -> pd.DataFrame:
    df = load_cohort(federation / centre, centre)
    return df[df["modality"] == modality].reset_index(drop=True)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federation")
    write_federation(root, TINY)
    return root


def test_scan_counts_match_the_paper_at_full_scale() -> None:
    train = [plan_scan_counts(h, PhantomConfig(scale=1.0))["train"] for h in CENTRE_PROFILES.values()]
    assert [a + b for a, b in train] == [338, 340, 204, 340]
    assert [b for _, b in train] == [175, 175, 39, 175]
    val = [plan_scan_counts(h, PhantomConfig(scale=1.0))["val"] for h in CENTRE_PROFILES.values()]
    assert [(a + b, b) for a, b in val] == [(88, 43), (90, 43), (45, 8), (87, 42)]
    assert plan_scan_counts(CENTRE_PROFILES["south"], PhantomConfig(scale=0.1)) == {
        "train": (16, 4),
        "val": (4, 3),
        "test": (4, 3),
    }


def test_patients_stay_in_one_split_and_some_have_two_scans() -> None:
    for centre, hospital in CENTRE_PROFILES.items():
        df = make_scan_table(centre, PhantomConfig(scale=0.5), hospital)
        assert df["scan"].is_unique
        assert df.groupby("patient")["split"].nunique().max() == 1
        assert df.groupby("patient")["covid"].nunique().max() == 1
        assert 0.02 < 1 - df["patient"].nunique() / len(df) < 0.12


def test_every_centre_loads_with_its_counts(federation: Path) -> None:
    for centre in CENTRE_PROFILES:
        ct, films = rows_of(federation, centre, "CT"), rows_of(federation, centre, "XR")
        for df in (ct, films):
            for split, least in (("train", 4), ("val", 3), ("test", 3)):
                assert df.loc[df["split"] == split, "covid"].value_counts().to_dict() == {0: least, 1: least}
            assert set(df["source"]) == {centre}
        assert all((federation / centre / p).is_dir() for p in ct["path"])
        assert all((federation / centre / p).is_file() for p in films["path"])
        visit = ["patient", "split", "covid"]
        pd.testing.assert_frame_equal(ct[visit], films[visit])
        assert (films["scan"] == ct["scan"] + "-xr").all()


def test_every_centre_holds_its_own_labels(federation: Path) -> None:
    for centre in CENTRE_PROFILES:
        df = load_cohort(federation / centre, centre)
        for column, (modality, centres) in HELD.items():
            known = df[column].notna() if column in df else pd.Series(False, index=df.index)
            assert (known == ((df["modality"] == modality) & (centre in centres))).all(), (centre, column)
        for column in {"lesion", "infection", "lungs"} & set(df):
            assert all((federation / centre / path).is_file() for path in df[column].dropna())
        assert len(list((federation / centre / "masks").iterdir())) == sum(
            int(df[c].notna().sum()) for c in ("lesion", "infection", "lungs") if c in df
        )


def test_severity_and_masks_match_what_was_drawn(federation: Path) -> None:
    north, films = rows_of(federation, "north", "CT"), rows_of(federation, "north", "XR")
    for k, row in north.iterrows():
        _, truth = drawn("north", row)
        mask = read_nifti(federation / "north" / row["lesion"]).voxels
        np.testing.assert_array_equal(mask, truth.lesion)
        per_lung = [100 * mask[truth.lungs == side].mean() for side in (1, 2)]
        assert row["severity"] == pytest.approx(max(per_lung), abs=0.006)
        assert mask.any() == (row["covid"] == 1)
        shadow = cv2.imread(str(federation / "north" / films["infection"][k]), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(shadow)) <= {0, 255}
        assert shadow.shape == read_scan(federation / "north" / films["path"][k]).voxels.shape[1:]
        assert not shadow[:, ~mask.any(axis=(0, 1))].any()  # no shadow beside the columns that hold a lesion


@pytest.mark.parametrize("centre", ["north", "east"])
def test_lesion_mask_lies_on_its_series(tmp_path: Path, centre: str) -> None:
    """By the readers, and by the patient's coordinates as the two formats define them, `east` being written
    feet first and mirrored.
    """
    scanner = CENTRE_PROFILES[centre].scanner
    voxels, truth = draw_chest(np.random.default_rng(3), np.random.default_rng(3), scanner, True, 12, 64)
    (tmp_path / "series").mkdir()
    write_ct_series(tmp_path / "series", voxels, scanner, ("x",), "P", np.random.default_rng(0))
    write_mask(tmp_path / "mask.nii.gz", truth.lesion, scanner)
    volume, mask = read_scan(tmp_path / "series"), read_scan(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(mask.voxels, truth.lesion)
    assert mask.spacing == pytest.approx(volume.spacing, rel=1e-4)
    np.testing.assert_allclose(mask.positions, volume.positions, atol=1e-3)

    image = nibabel.load(tmp_path / "mask.nii.gz")
    inside, outside = [], []
    for file in (tmp_path / "series").iterdir():
        ds = pydicom.dcmread(file)
        rows, columns = np.mgrid[: ds.Rows, : ds.Columns]
        along, down = (
            np.array(ds.ImageOrientationPatient[:3], float),
            np.array(ds.ImageOrientationPatient[3:], float),
        )
        step = float(ds.PixelSpacing[0])
        lps = np.array(ds.ImagePositionPatient, float) + step * (
            columns[..., None] * along + rows[..., None] * down
        )
        ras = lps * [-1, -1, 1]
        i, j, k = (
            np.rint((ras - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T)
            .astype(int)
            .reshape(-1, 3)
            .T
        )
        affected = np.asarray(image.dataobj)[i, j, k].astype(bool).reshape(rows.shape)
        hu = ds.pixel_array.astype(int) - 1024
        inside += hu[affected].tolist()
        outside += hu[~affected & (hu < -500) & (hu > -980)].tolist()
    assert len(inside) == truth.lesion.sum()
    assert np.mean(inside) > np.mean(outside) + 150


def test_radiographs_have_every_class(federation: Path) -> None:
    films = pd.concat([rows_of(federation, centre, "XR") for centre in CENTRE_PROFILES])
    assert ((films["finding"] == "negative") == (films["covid"] == 0)).all()
    assert set(films["finding"]) == {"negative", "typical", "indeterminate", "atypical"}
    for zone in "abcdef":
        scores = films.groupby("covid")[f"brixia_{zone}"]
        assert set(films[f"brixia_{zone}"].dropna()) == {0, 1, 2, 3}
        assert scores.mean()[0.0] < 0.3 < 0.5 < scores.mean()[1.0]
    for centre in ("north", "east", "south"):
        severe = rows_of(federation, centre, "XR").groupby("split")["outcome"].nunique()
        assert (severe == 2).all(), centre


def test_outcomes_follow_severity_where_few_are_ill() -> None:
    """At the default scale; seven scans of `south` validate."""
    settings, scanner = PhantomConfig(), CENTRE_PROFILES["south"].scanner
    table = make_scan_table("south", settings, CENTRE_PROFILES["south"])
    outcomes = []
    for _, row in table.iterrows():
        rng = _make_rng(settings.seed, "south", row["scan"], "labels")
        truth = drawn("south", row, settings)[1]
        labels = derive_labels(truth, rng, scanner.field_of_view / 128, CHEST_HEIGHT / 24)
        outcomes.append(labels.radiograph["outcome"])
    table["outcome"] = outcomes
    assert (table.groupby("split")["outcome"].nunique() == 2).all()
    by_class = table.groupby("covid")["outcome"].mean()
    assert by_class[0.0] < 0.2 < 0.6 < by_class[1.0]


def test_series_are_valid_dicom_with_shuffled_file_names(federation: Path) -> None:
    syntaxes, orders = set(), set()
    for centre, hospital in CENTRE_PROFILES.items():
        df = rows_of(federation, centre, "CT")
        files = sorted((federation / centre / df["path"][0]).iterdir())
        heads = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
        z = [float(h.ImagePositionPatient[2]) for h in heads]
        assert z not in (sorted(z), sorted(z, reverse=True))
        assert len({h.SOPInstanceUID for h in heads}) == TINY.num_slices
        assert len({h.SeriesInstanceUID for h in heads}) == 1
        assert {h.PatientID for h in heads} == {df["patient"][0]}
        syntaxes.add(heads[0].file_meta.TransferSyntaxUID.name)
        orders.add(bool(np.corrcoef(z, [int(h.InstanceNumber) for h in heads])[0, 1] > 0))
        volume = read_scan(federation / centre / df["path"][0])
        assert volume.voxels.shape == (TINY.num_slices, 64, 64)
        assert volume.spacing == pytest.approx(
            (
                hospital.scanner.slice_spacing,
                hospital.scanner.field_of_view / 64,
                hospital.scanner.field_of_view / 64,
            ),
            rel=1e-4,
        )
        assert len(volume.notes) == hospital.scanner.feet_first  # a turned series is said to be one
    assert syntaxes == {"Explicit VR Little Endian", "RLE Lossless"}
    assert orders == {True, False}


def test_flipped_and_compressed_series_are_read_as_drawn(federation: Path) -> None:
    """Whatever way round a scanner writes, the reader gives the drawn voxels back, feet to head and the heart
    on the patient's left.
    """
    for centre in CENTRE_PROFILES:
        row = rows_of(federation, centre, "CT").iloc[0]
        voxels, _ = drawn(centre, row)
        np.testing.assert_array_equal(read_scan(federation / centre / row["path"]).voxels, voxels)


def test_only_covid_lungs_have_lesions() -> None:
    scanner = CENTRE_PROFILES["north"].scanner
    for seed in range(4):
        ill, truth = draw_chest(
            np.random.default_rng(seed), np.random.default_rng(seed), scanner, True, 24, 64
        )
        mask, columns = truth.lesion, np.arange(64)
        assert mask.any()
        assert mask.mean() < 0.1
        assert truth.lungs[mask].all()
        right, left = (
            (truth.lungs == side).sum(axis=(0, 1)) @ columns / (truth.lungs == side).sum() for side in (1, 2)
        )
        assert right < 32 < left  # columns run to the patient's left
        assert ill[(truth.lungs > 0) & ~mask].mean() < -600
        well, healthy = draw_chest(
            np.random.default_rng(seed), np.random.default_rng(seed), scanner, False, 24, 64
        )
        assert not healthy.lesion.any()
        assert ill[mask].mean() > well[mask].mean() + 100  # denser where the lesion is


def test_scanners_differ_outside_the_body() -> None:
    """Outside the body there is nothing but the scanner: noise and offset differ from centre to centre."""
    corners = {}
    for centre, hospital in CENTRE_PROFILES.items():
        voxels, _ = draw_chest(
            np.random.default_rng(1), np.random.default_rng(2), hospital.scanner, False, 12, 64
        )
        corners[centre] = float(voxels[:, 20:44, 28:36].std()), float(np.median(voxels[:, 20:44, 28:36]))
    offsets = [m for _, m in corners.values()]
    assert max(offsets) - min(offsets) > 20


def test_same_settings_give_the_same_bytes(federation: Path, tmp_path: Path) -> None:
    again = write_centre(tmp_path, "south", TINY)
    assert contents(again) == contents(federation / "south")
    other = write_centre(
        tmp_path / "other", "south", PhantomConfig(scale=0.001, num_slices=10, image_size=64, seed=8)
    )
    assert contents(other) != contents(again)


def test_finished_centre_stays_and_changed_settings_replace_it(tmp_path: Path) -> None:
    folder = write_centre(tmp_path, "clinic", TINY, centre_index=2)
    (folder / "mine.txt").write_text("a centre's own file")
    write_federation(tmp_path, TINY, ["x", "y", "clinic"])
    assert (folder / "mine.txt").exists()
    write_centre(tmp_path, "clinic", PhantomConfig(scale=0.001, num_slices=11, image_size=64), centre_index=2)
    assert not (folder / "mine.txt").exists()
    assert len(list((folder / "dicom").glob("*-0000/*.dcm"))) == 11
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.is_dir()]


def test_other_names_cycle_the_four_profiles(tmp_path: Path) -> None:
    write_federation(tmp_path, TINY, ["a", "b", "c", "d", "e"])
    makers = [
        pydicom.dcmread(
            next((tmp_path / c / "dicom" / f"{c}-0000").iterdir()), stop_before_pixels=True
        ).Manufacturer
        for c in ("a", "b", "c", "d", "e")
    ]
    assert makers[:4] == [h.scanner.manufacturer for h in CENTRE_PROFILES.values()]
    assert makers[4] == makers[0]


def test_killed_while_writing_leaves_nothing_that_looks_finished(federation: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)])
    while not list(tmp_path.glob(".south-*/dicom/*/*.dcm")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "south").exists()
    assert list(tmp_path.glob(".south-*"))
    write_centre(tmp_path, "south", TINY)
    assert contents(tmp_path / "south") == contents(federation / "south")
    assert not list(tmp_path.glob(".south-*"))


def test_two_writers_at_once_agree(federation: Path, tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)]) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert contents(tmp_path / "south") == contents(federation / "south")
