"""Loading a site's data sets: splits, folds, held-out centres, modality, and targets of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.cluster_label_store import load_cluster_labels
from client.data.loading import assign_splits, clear_dataset_cache, list_mask_columns, load_datasets
from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.schema import Config, ContrastiveConfig, FederationConfig, PreprocessConfig, Stage, Task
from common.utils.errors import ConsiliumError, RefusalCode, Refused
from tests.in_process_federation import phantom_config

CENTRES = ["north", "south"]
NAN = np.nan


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    clear_dataset_cache()


# --- folds ------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([f"p{i}" for i in range(12)]), min_size=1, max_size=30), st.integers(3, 7))
def test_every_patient_is_once_in_test_and_once_in_validation_with_all_scans(
    patients: list[str], folds: int
) -> None:
    table = pd.DataFrame({"patient": patients, "split": "train"})
    splits_by_fold = []
    for fold in range(folds):
        federation = FederationConfig(centres=CENTRES, folds=folds, fold=fold)
        splits_by_fold.append(assign_splits(table, federation, "north"))
    splits = np.stack(splits_by_fold)
    for scan_splits in splits.T:
        assert sorted(scan_splits) == ["test"] + ["train"] * (folds - 2) + ["val"]
    for patient in set(patients):
        patient_splits = splits[:, table["patient"] == patient]
        assert (patient_splits == patient_splits[:, :1]).all()


def test_folds_are_about_equal_and_do_not_depend_on_other_patients() -> None:
    table = pd.DataFrame({"patient": [f"x{i}" for i in range(400)], "split": "train"})
    federation = FederationConfig(centres=CENTRES, fold=2)
    splits = assign_splits(table, federation, "north")
    assert 50 < (splits == "test").sum() < 110
    assert 50 < (splits == "val").sum() < 110
    fewer = table.iloc[::3].reset_index(drop=True)
    np.testing.assert_array_equal(assign_splits(fewer, federation, "south"), splits[::3])


def test_a_held_out_centre_only_tests_and_others_keep_their_splits() -> None:
    table = pd.DataFrame({"patient": list("abc"), "split": ["train", "val", "test"]})
    federation = FederationConfig(centres=CENTRES, held_out_centres=["south"])
    assert assign_splits(table, federation, "south").tolist() == ["test"] * 3
    assert assign_splits(table, federation, "north").tolist() == ["train", "val", "test"]


# --- what a scan is, by the table's row -------------------------------------------------------------------

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
    """Write nine radiographs and one CT.

    Radiograph i is grey 20 i throughout. Its mask covers the left half; for odd i there is none.
    """
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
    federation_config = FederationConfig(centres=CENTRES, **federation)  # type: ignore[arg-type]
    return Config(tasks=tasks, stages={"main": Stage()}, preprocess=preprocess, federation=federation_config)


def site(hospital: Path) -> Site:
    return Site(centre="north", data=str(hospital), state=str(hospital / "state"), device="cpu")


def test_targets_of_every_kind_belong_to_their_slices(hospital: Path) -> None:
    datasets, skipped = load_datasets(site(hospital), config())
    assert skipped == []
    sizes = {split: len(scans) for split, scans in datasets.items()}
    assert sizes == {"train": 5, "val": 2, "test": 2}  # without the CT
    train = datasets["train"]
    assert [int(s[0, 8, 8]) for s in train.slices] == [0, 20, 120, 140, 160]
    np.testing.assert_array_equal(train.targets["sick"], [0, 1, NAN, 0, 1])
    # the sums are 0+0+1, 1+0+1, 2+2+1, missing, 0+3+1
    np.testing.assert_array_equal(train.targets["total"], [0, 1, 2, NAN, 1])
    regions = [[0, 0, 1], [1, 0, 1], [2, 2, 1], [3, NAN, 1], [0, 3, 1]]
    np.testing.assert_array_equal(train.targets["regions"], regions)
    np.testing.assert_array_equal(train.targets["age"], [[40], [41], [46], [47], [48]])
    assert train.has_label("regions").tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(train.targets["spot"], [1, NAN, 1, NAN, 1])
    assert [None if m is None else int(m.sum()) for m in train.masks["spot"]] == [0, None, 128, None, 128]
    assert [m is None for m in train.masks["other"]] == [True] * 5  # no such column at this centre
    assert np.isnan(train.targets["other"]).all()
    np.testing.assert_array_equal(train.extra_targets["spot"], [0, 10, 60, 70, 80])
    np.testing.assert_array_equal(datasets["val"].extra_targets["spot"], [NAN, 30])
    np.testing.assert_array_equal(train.extra_targets["soft"], [1, 1, NAN, 1, 1])
    assert np.isnan(train.targets["soft"]).all()  # nobody has clustered yet
    assert train.targets["fill"].tolist() == train.targets["moco"].tolist() == [0.0] * 5
    assert len(train.lung_masks) == 5  # for the severity


def test_an_unreadable_mask_loses_the_label_but_not_the_scan(hospital: Path) -> None:
    datasets, skipped = load_datasets(site(hospital), config({"spot": TASKS["spot"]}, modality="any"))
    train = datasets["train"]
    assert len(train) == 6
    assert [s.reason for s in skipped] == ["the mask in column 'drawn': it is not there"]
    assert train.masks["spot"][-1] is None
    assert np.isnan(train.targets["spot"][-1])


def test_folds_and_held_out_centres_apply_to_loaded_scans(hospital: Path) -> None:
    tested: list[str] = []
    for fold in range(3):
        datasets, _ = load_datasets(site(hospital), config({"sick": Task()}, folds=3, fold=fold))
        assert sum(map(len, datasets.values())) == N
        tested += datasets["test"].store_keys
    assert len(tested) == len(set(tested)) == N
    datasets, _ = load_datasets(site(hospital), config({"sick": Task()}, held_out_centres=["north"]))
    assert {split: len(scans) for split, scans in datasets.items()} == {"train": 0, "val": 0, "test": N}


def test_cluster_labels_are_matched_by_scan_and_a_held_out_centre_has_none(hospital: Path) -> None:
    unclustered = {"soft": TASKS["soft"]}
    keys = load_datasets(site(hospital), config(unclustered)).by_split["train"].store_keys
    (hospital / "state" / "labels").mkdir()
    (hospital / "state" / "labels" / "run-soft.json").write_text(f'{{"{keys[3]}": 1, "{keys[0]}": 0}}')
    clustered = {"soft": replace(TASKS["soft"], clustering_id="run-soft")}
    datasets, _ = load_datasets(site(hospital), config(clustered))
    np.testing.assert_array_equal(datasets["train"].targets["soft"], [0, NAN, NAN, 1, NAN])
    lost = {"soft": replace(TASKS["soft"], clustering_id="run-lost")}
    with pytest.raises(Refused, match="the cluster labels of this run are missing"):
        load_datasets(site(hospital), config(lost))
    datasets, _ = load_datasets(site(hospital), config(lost, held_out_centres=["north"]))
    assert np.isnan(datasets["test"].targets["soft"]).all()
    with pytest.raises(Refused, match="is not a valid name of a run or stage"):
        load_cluster_labels(hospital, "../run", keys)


def test_mask_columns_are_listed_once() -> None:
    assert list_mask_columns(config()) == ["drawn", "other", "lungs"]
    assert list_mask_columns(config({"sick": Task()})) == []
    task = Task(type="segmentation", label_column="m")
    assert list_mask_columns(config({"x": task, "y": task})) == ["m"]


def write_north(root: Path, config: Config) -> None:
    assert config.federation.phantom is not None
    write_centre(root, "north", config.federation.phantom)


def test_training_scans_get_further_views(tmp_path: Path) -> None:
    node = Site(index=0, device="cpu")
    single_view = phantom_config(tmp_path, "preprocess.num_slices=4")
    three_views = phantom_config(tmp_path, "preprocess.num_views=2", "preprocess.num_slices=4")
    write_north(tmp_path, single_view)
    datasets, _ = load_datasets(node, three_views)
    expected = load_datasets(node, single_view).by_split["train"]
    train = datasets["train"]
    assert [len(scans.views) for scans in datasets.values()] == [2, 0, 0]
    pairs = zip(train.slices, expected.slices, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)  # the evaluation's choice stays
    for view in train.views:
        assert [s.shape for s in view.slices] == [s.shape for s in train.slices]
        pairs = zip(view.slices, train.slices, strict=True)
        assert sum(not np.array_equal(a, b) for a, b in pairs) > len(train) / 2


def test_loading_a_phantom_that_was_not_drawn_is_refused_and_draws_nothing(tmp_path: Path) -> None:
    node = Site(index=0, device="cpu")
    with pytest.raises(
        Refused, match=r"^centre 'north' has no phantom data; run `consilium-centre phantom`"
    ) as refused:
        load_datasets(node, phantom_config(tmp_path))
    assert refused.value.code == RefusalCode.NO_DATA
    assert list(tmp_path.iterdir()) == []
    write_north(tmp_path, phantom_config(tmp_path))
    other_settings = phantom_config(tmp_path, "federation.phantom.seed=8")
    with pytest.raises(
        Refused, match=r"were drawn with other federation\.phantom settings; run `consilium-centre phantom`"
    ):
        load_datasets(node, other_settings)


def test_files_are_read_again_only_after_the_cache_is_cleared(hospital: Path) -> None:
    settings = config({"sick": Task()})
    first = load_datasets(site(hospital), settings)
    (hospital / "cohort.csv").unlink()
    assert load_datasets(site(hospital), config({"sick": Task()})) is first
    clear_dataset_cache()
    with pytest.raises(ConsiliumError, match="its cohort table is not there"):
        load_datasets(site(hospital), settings)
