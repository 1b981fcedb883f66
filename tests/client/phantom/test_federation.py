"""Made-up hospitals have the counts and labels they should, and are safe to write twice or be killed over."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pydicom

from client.data.cohort import load_cohort
from client.phantom.federation import CHEST_HEIGHT, _make_rng, make_scan_table, write_centre, write_federation
from client.phantom.labels import derive_labels
from client.phantom.profiles import CENTRE_PROFILES, plan_scan_counts
from common.config.schema import PhantomConfig
from tests.client.phantom.tiny_federation import TINY, drawn, rows_of

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
