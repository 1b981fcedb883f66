"""From a site's cohort to scans by split: folds, unseen centres, modality, and every kind of target beside its slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.federation import cluster_labels
from client.data.loading import clear_dataset_cache, list_mask_columns, load_datasets, assign_splits
from client.site.config import Site
from common.utils.errors import Refused
from common.config.schema import Config, ContrastiveConfig, FederationConfig, PreprocessConfig, Stage, Task
from tests.in_process_federation import phantom_config

CENTRES = ["north", "south"]
NAN = np.nan


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    yield
    clear_dataset_cache()


# --- folds ------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([f"p{i}" for i in range(12)]), min_size=1, max_size=30), st.integers(3, 7))
def test_every_patient_is_tested_once_and_validates_once_and_stays_together(patients: list[str], folds: int) -> None:
    table = pd.DataFrame({"patient": patients, "split": "train"})
    found = np.stack([assign_splits(table, FederationConfig(centres=CENTRES, folds=folds, fold=k), "north") for k in range(folds)])
    for column in found.T:
        assert sorted(column) == ["test"] + ["train"] * (folds - 2) + ["val"]
    for patient in set(patients):
        own = found[:, [p == patient for p in patients]]
        assert (own == own[:, :1]).all()


def test_folds_are_about_equal_and_do_not_depend_on_who_else_is_there() -> None:
    table = pd.DataFrame({"patient": [f"x{i}" for i in range(400)], "split": "train"})
    federation = FederationConfig(centres=CENTRES, fold=2)
    found = assign_splits(table, federation, "north")
    assert 50 < (found == "test").sum() < 110
    assert 50 < (found == "val").sum() < 110
    some = table.iloc[::3].reset_index(drop=True)
    np.testing.assert_array_equal(assign_splits(some, federation, "south"), found[::3])


def test_an_unseen_centre_only_tests_and_others_keep_their_own_splits() -> None:
    table = pd.DataFrame({"patient": list("abc"), "split": ["train", "val", "test"]})
    federation = FederationConfig(centres=CENTRES, held_out_centres=["south"])
    assert assign_splits(table, federation, "south").tolist() == ["test"] * 3
    assert assign_splits(table, federation, "north").tolist() == ["train", "val", "test"]


# --- what a scan is, by the table's row -------------------------------------------------------------------------------------------------

SCORES = ["a", "b", "c"]
TASKS = {
    "sick": Task(),
    "total": Task(type="multiclass", label_columns=SCORES, bin_edges=[1, 4], classes=["<=1", "<=4", ">4"]),
    "regions": Task(type="regression", label_columns=SCORES),
    "age": Task(type="regression"),
    "spot": Task(type="segmentation", label_column="drawn", severity_column="share"),
    "other": Task(type="segmentation"),
    "soft": Task(type="multiclass", label_column="sick", num_clusters=[2], classes=["0", "1"]),
    "fill": Task(type="inpainting"),
    "moco": Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=8)),
}
N = 9


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Nine films and one CT; film i is grey 20 i throughout, its mask covers the left half but where i is odd: then there is none."""
    for i in range(N + 1):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40), 20 * i, np.uint8))
        mask = np.zeros((40, 40), np.uint8)
        mask[:, : 20 if i else 0] = 255  # that of scan 0 is empty
        cv2.imwrite(str(tmp_path / f"mask{i}.png"), mask)
    number = np.arange(N)
    films = pd.DataFrame(
        {
            "scan": [f"s{i}" for i in number],
            "path": [f"{i}.png" for i in number],
            "patient": [f"p{i // 2}" for i in number],
            "split": ["train", "train", "val", "val", "test", "test", "train", "train", "train"],
            "modality": "XR",
            "sick": [0, 1, NAN, 1, 0, 1, NAN, 0, 1],
            "a": number % 4,
            "b": [0, 0, 1, 3, 1, 0, 2, NAN, 3],
            "c": 1,
            "age": [40 + i if i != 3 else NAN for i in number],
            "drawn": [f"mask{i}.png" if i % 2 == 0 else NAN for i in number],
            "share": [NAN if i == 2 else 10 * i for i in number],
        }
    )
    ct = films.iloc[:1].assign(scan="ct", path=f"{N}.png", patient="ct", modality="CT", drawn="gone.png")
    pd.concat([films, ct]).to_csv(tmp_path / "cohort.csv", index=False)
    return tmp_path


def config(tasks: dict[str, Task] = TASKS, modality: str = "XR", **federation: object) -> Config:
    preprocess = PreprocessConfig(modality=modality, num_slices=1, image_size=16, crop="none")  # type: ignore[arg-type]
    return Config(tasks=tasks, stages={"main": Stage()}, preprocess=preprocess, federation=FederationConfig(centres=CENTRES, **federation))  # type: ignore[arg-type]


def site(hospital: Path) -> Site:
    return Site(centre="north", data=str(hospital), state=str(hospital / "state"), device="cpu")


def test_every_kind_of_target_lies_beside_its_slices(hospital: Path) -> None:
    held, skipped = load_datasets(site(hospital), config())
    assert skipped == []
    assert {split: len(scans) for split, scans in held.items()} == {"train": 5, "val": 2, "test": 2}  # the CT is not part
    train = held["train"]
    assert [int(s[0, 8, 8]) for s in train.slices] == [0, 20, 120, 140, 160]
    np.testing.assert_array_equal(train.targets["sick"], [0, 1, NAN, 0, 1])
    np.testing.assert_array_equal(train.targets["total"], [0, 1, 2, NAN, 1])  # 0+0+1, 1+0+1, 2+2+1, missing, 0+3+1
    np.testing.assert_array_equal(train.targets["regions"], [[0, 0, 1], [1, 0, 1], [2, 2, 1], [3, NAN, 1], [0, 3, 1]])
    np.testing.assert_array_equal(train.targets["age"], [[40], [41], [46], [47], [48]])
    assert train.has_label("regions").tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(train.targets["spot"], [1, NAN, 1, NAN, 1])
    assert [None if m is None else int(m.sum()) for m in train.masks["spot"]] == [0, None, 128, None, 128]
    assert [m is None for m in train.masks["other"]] == [True] * 5  # no such column at this centre
    assert np.isnan(train.targets["other"]).all()
    np.testing.assert_array_equal(train.extra_targets["spot"], [0, 10, 60, 70, 80])
    np.testing.assert_array_equal(held["val"].extra_targets["spot"], [NAN, 30])
    np.testing.assert_array_equal(train.extra_targets["soft"], [1, 1, NAN, 1, 1])
    assert np.isnan(train.targets["soft"]).all()  # nobody has clustered yet
    assert train.targets["fill"].tolist() == train.targets["moco"].tolist() == [0.0] * 5
    assert len(train.lung_masks) == 5  # the burden asks for them


def test_a_mask_that_cannot_be_read_costs_its_label_and_not_its_scan(hospital: Path) -> None:
    held, skipped = load_datasets(site(hospital), config({"spot": TASKS["spot"]}, modality="any"))
    assert len(held["train"]) == 6
    assert [s.reason for s in skipped] == ["the mask in column 'drawn': it is not there"]
    assert held["train"].masks["spot"][-1] is None
    assert np.isnan(held["train"].targets["spot"][-1])


def test_folds_and_unseen_centres_go_by_patient_through_the_whole(hospital: Path) -> None:
    tested: list[str] = []
    for fold in range(3):
        held, _ = load_datasets(site(hospital), config({"sick": Task()}, folds=3, fold=fold))
        assert sum(map(len, held.values())) == N
        tested += held["test"].store_keys
    assert len(tested) == len(set(tested)) == N
    held, _ = load_datasets(site(hospital), config({"sick": Task()}, unseen=["north"]))
    assert {split: len(scans) for split, scans in held.items()} == {"train": 0, "val": 0, "test": N}


def test_clusters_come_back_by_scan_and_an_unseen_centre_has_none(hospital: Path) -> None:
    found = {"soft": TASKS["soft"]}
    held, _ = load_datasets(site(hospital), config(found))
    (hospital / "state" / "labels").mkdir()
    keys = held["train"].store_keys
    (hospital / "state" / "labels" / "run-soft.json").write_text(f'{{"{keys[3]}": 1, "{keys[0]}": 0}}')
    named = {"soft": Task(type="multiclass", label_column="sick", num_clusters=[2], classes=["0", "1"], clustering_id="run-soft")}
    held, _ = load_datasets(site(hospital), config(named))
    np.testing.assert_array_equal(held["train"].targets["soft"], [0, NAN, NAN, 1, NAN])
    gone = {"soft": Task(type="multiclass", label_column="sick", num_clusters=[2], classes=["0", "1"], clustering_id="run-gone")}
    with pytest.raises(Refused, match="its cluster labels of this run are gone"):
        load_datasets(site(hospital), config(gone))
    held, _ = load_datasets(site(hospital), config(gone, unseen=["north"]))
    assert np.isnan(held["test"].targets["soft"]).all()
    with pytest.raises(Refused, match="is not a name for a run or a stage"):
        cluster_labels.load_cluster_labels(hospital, "../run", keys)


def test_masks_that_tasks_need_are_asked_for_once() -> None:
    assert list_mask_columns(config()) == ["drawn", "other", "lungs"]
    assert list_mask_columns(config({"sick": Task()})) == []
    assert list_mask_columns(config({"x": Task(type="segmentation", label_column="m"), "y": Task(type="segmentation", label_column="m")})) == ["m"]


def test_training_gets_other_choices_of_slices_too(tmp_path: Path) -> None:
    config = phantom_config(tmp_path, "preprocess.num_views=2", "preprocess.num_slices=4")
    scans, _ = load_datasets(Site(index=0, device="cpu"), config)
    plain, _ = load_datasets(Site(index=0, device="cpu"), phantom_config(tmp_path, "preprocess.num_slices=4"))
    train = scans["train"]
    assert [len(split.views) for split in scans.values()] == [2, 0, 0]
    assert all(np.array_equal(a, b) for a, b in zip(train.slices, plain["train"].slices, strict=True))  # evaluation's own choice stays
    for other in train.views:
        assert [s.shape for s in other.slices] == [s.shape for s in train.slices]
        assert sum(not np.array_equal(a, b) for a, b in zip(other.slices, train.slices, strict=True)) > len(train) / 2
