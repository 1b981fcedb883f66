"""The made-up hospitals: the same every time, imbalanced as said, proper DICOM, and safe to write twice or to be killed over."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from client.chest import chest
from client.cohort import label_counts, load_cohort
from client.phantom import HOSPITALS, counts, scan_list, write_centre, write_federation
from client.readers import read_scan
from common.schema import Phantom

TINY = Phantom(scale=0.001, slices=10, pixels=64)  # the least: 4 of a class in train, 3 in val and test
WRITE = """
import sys
from pathlib import Path
from client.phantom import Phantom, write_centre
write_centre(Path(sys.argv[1]), "south", Phantom(scale=0.001, slices=10, pixels=64))
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federation")
    write_federation(root, TINY)
    return root


def test_counts_are_the_papers_at_full_scale() -> None:
    train = [counts(h, Phantom(scale=1.0))["train"] for h in HOSPITALS.values()]
    assert [a + b for a, b in train] == [338, 340, 204, 340]
    assert [b for _, b in train] == [175, 175, 39, 175]
    val = [counts(h, Phantom(scale=1.0))["val"] for h in HOSPITALS.values()]
    assert [(a + b, b) for a, b in val] == [(88, 43), (90, 43), (45, 8), (87, 42)]
    assert counts(HOSPITALS["south"], Phantom(scale=0.1)) == {"train": (16, 4), "val": (4, 3), "test": (4, 3)}


def test_patients_stay_in_one_split_and_some_come_twice() -> None:
    for centre, hospital in HOSPITALS.items():
        df = scan_list(centre, Phantom(scale=0.5), hospital)
        assert df["scan"].is_unique
        assert df.groupby("patient")["split"].nunique().max() == 1
        assert df.groupby("patient")["covid"].nunique().max() == 1
        assert 0.02 < 1 - df["patient"].nunique() / len(df) < 0.12


def test_every_centre_loads_with_its_counts(federation: Path) -> None:
    for centre in HOSPITALS:
        df = load_cohort(federation / centre, centre)
        for split, least in (("train", 4), ("val", 3), ("test", 3)):
            assert label_counts(df[df["split"] == split], "covid").tolist() == [least, least]
        assert set(df["source"]) == {centre}
        assert all((federation / centre / p).is_dir() for p in df["path"])


def test_series_are_proper_dicom_out_of_order(federation: Path) -> None:
    syntaxes, orders = set(), set()
    for centre, hospital in HOSPITALS.items():
        df = load_cohort(federation / centre, centre)
        files = sorted((federation / centre / df["path"][0]).iterdir())
        heads = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
        z = [float(h.ImagePositionPatient[2]) for h in heads]
        assert z not in (sorted(z), sorted(z, reverse=True))
        assert len({h.SOPInstanceUID for h in heads}) == TINY.slices
        assert len({h.SeriesInstanceUID for h in heads}) == 1
        assert {h.PatientID for h in heads} == {df["patient"][0]}
        syntaxes.add(heads[0].file_meta.TransferSyntaxUID.name)
        orders.add(bool(np.corrcoef(z, [int(h.InstanceNumber) for h in heads])[0, 1] > 0))
        volume = read_scan(federation / centre / df["path"][0])
        assert volume.voxels.shape == (TINY.slices, 64, 64)
        assert volume.spacing == pytest.approx((hospital.scanner.spacing, hospital.scanner.fov / 64, hospital.scanner.fov / 64), rel=1e-4)
        assert len(volume.notes) == hospital.scanner.flipped  # a turned series is said to be one
    assert syntaxes == {"Explicit VR Little Endian", "RLE Lossless"}
    assert orders == {True, False}


def test_flipped_and_compressed_series_read_as_they_were_drawn(federation: Path) -> None:
    """Whatever way round a scanner writes, the reader gives the drawn voxels back, feet to head and the heart on the patient's left."""
    from client.phantom import _rng

    for centre, hospital in HOSPITALS.items():
        row = load_cohort(federation / centre, centre).iloc[0]
        person, visit = _rng(TINY.seed, centre, row["patient"]), _rng(TINY.seed, centre, row["scan"])
        drawn, _ = chest(person, visit, hospital.scanner, bool(row["covid"]), TINY.slices, TINY.pixels)
        np.testing.assert_array_equal(read_scan(federation / centre / row["path"]).voxels, drawn)


def test_lesions_are_in_covid_lungs_only() -> None:
    scanner = HOSPITALS["north"].scanner
    for seed in range(4):
        ill, mask = chest(np.random.default_rng(seed), np.random.default_rng(seed), scanner, True, 24, 64)
        assert mask.any()
        assert mask.mean() < 0.1
        well, none = chest(np.random.default_rng(seed), np.random.default_rng(seed), scanner, False, 24, 64)
        assert not none.any()
        assert ill[mask].mean() > well[mask].mean() + 100  # denser where the lesion is


def test_acquisition_tells_the_centres_apart() -> None:
    """Outside the body there is nothing but the scanner: noise and offset differ from centre to centre."""
    corners = {}
    for centre, hospital in HOSPITALS.items():
        voxels, _ = chest(np.random.default_rng(1), np.random.default_rng(2), hospital.scanner, False, 12, 64)
        corners[centre] = float(voxels[:, 20:44, 28:36].std()), float(np.median(voxels[:, 20:44, 28:36]))
    offsets = [m for _, m in corners.values()]
    assert max(offsets) - min(offsets) > 20


def test_the_same_settings_give_the_same_bytes(federation: Path, tmp_path: Path) -> None:
    again = write_centre(tmp_path, "south", TINY)
    assert contents(again) == contents(federation / "south")
    other = write_centre(tmp_path / "other", "south", Phantom(scale=0.001, slices=10, pixels=64, seed=8))
    assert contents(other) != contents(again)


def test_finished_is_left_alone_and_changed_is_rewritten(tmp_path: Path) -> None:
    folder = write_centre(tmp_path, "clinic", TINY, position=2)
    (folder / "mine.txt").write_text("a centre's own file")
    write_federation(tmp_path, TINY, ["x", "y", "clinic"])
    assert (folder / "mine.txt").exists()
    write_centre(tmp_path, "clinic", Phantom(scale=0.001, slices=11, pixels=64), position=2)
    assert not (folder / "mine.txt").exists()
    assert len(list((folder / "dicom").glob("*-0000/*.dcm"))) == 11
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.is_dir()]


def test_other_names_cycle_the_four_profiles(tmp_path: Path) -> None:
    write_federation(tmp_path, TINY, ["a", "b", "c", "d", "e"])
    makers = [
        pydicom.dcmread(next((tmp_path / c / "dicom" / f"{c}-0000").iterdir()), stop_before_pixels=True).Manufacturer
        for c in ("a", "b", "c", "d", "e")
    ]
    assert makers[:4] == [h.scanner.maker for h in HOSPITALS.values()]
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
