"""Under `privacy=patient` nothing exact leaves about a patient who was or will be trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from client.data import loading
from client.site.anchored_files import accept_loss
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.protocol.messages import Refusal, StatisticsReply, TrainReply
from tests.client.federation.private_hospital import (
    count_scored,
    make_config,
    query,
    read_charges,
    train,
)
from tests.client.federation.private_hospital import hospital as hospital
from tests.client.federation.private_hospital import written_hospital as written_hospital


def count_patients(hospital: Path) -> dict[str, int]:
    table = pd.read_csv(hospital / "cohort.csv", dtype=str)
    table = table[table["modality"] == "CT"] if "modality" in table else table
    return {str(split): len(rows) for split, rows in table.groupby("split")}


def read_marks(hospital: Path) -> dict[str, Any]:
    path = hospital / ".consilium" / "budget" / "patients.json"
    return dict(json.loads(path.read_text()))


def with_federation(config: Config, **settings: Any) -> dict[str, Any]:
    """Return the configuration that a hostile coordinator sends, unchecked."""
    values = config_to_dict(config)
    values["federation"] |= settings
    return values


def test_no_exact_score_of_a_trained_patient_leaves_whatever_the_split(hospital: Path) -> None:
    config = make_config("preprocess.modality=CT")
    scans = count_patients(hospital)
    assert isinstance(train(hospital, config), TrainReply)
    all_as_test = with_federation(config, held_out_centres=["north"])
    assert count_scored(query(hospital, all_as_test, "scores", "test")) == scans["val"] + scans["test"]
    for folds, fold in ((3, 0), (3, 1), (3, 2), (20, 5)):
        reply = query(hospital, with_federation(config, folds=folds, fold=fold), "scores", "test")
        assert isinstance(reply, Refusal)
        assert "exact scores of patients that another fold trains on" in reply.reason
    as_training = query(hospital, config, "scores", "train")
    assert isinstance(as_training, Refusal)


def test_patients_who_were_scored_exactly_are_not_trained_on_afterwards(hospital: Path) -> None:
    config = make_config("preprocess.modality=CT")
    first = query(hospital, with_federation(config, held_out_centres=["north"]), "scores", "test")
    assert count_scored(first) == sum(count_patients(hospital).values())
    reply = train(hospital, config)
    assert isinstance(reply, Refusal)
    assert reply.permanent
    assert "exact statistics of all training patients have left" in reply.reason
    assert read_charges(hospital) == []


def test_training_leaves_out_the_patients_who_were_scored_exactly(hospital: Path) -> None:
    config = make_config("preprocess.modality=CT")
    scans = count_patients(hospital)
    assert count_scored(query(hospital, config, "scores", "val")) == scans["val"]
    table = pd.read_csv(hospital / "cohort.csv", dtype=str)
    table["split"] = table["split"].replace("val", "train")  # the hospital changes its splits
    table.to_csv(hospital / "cohort.csv", index=False)
    loading.clear_dataset_cache()
    assert isinstance(train(hospital, config), TrainReply)
    marks = read_marks(hospital)
    assert not set(marks["trained"]) & set(marks["disclosed"])
    val_patients = table[table["split"] == "train"]["patient"].nunique() - len(marks["trained"])
    assert val_patients == len(marks["disclosed"]) > 0


def test_two_private_runs_with_the_same_splits_are_trained_and_scored(hospital: Path) -> None:
    config = make_config("preprocess.modality=CT")
    scans = count_patients(hospital)
    for run_id in ("first", "second"):
        assert count_scored(query(hospital, config, "scores", "val", run_id)) == scans["val"]
        assert isinstance(train(hospital, config, run_id), TrainReply)
        loading.clear_dataset_cache()  # as in a new process
        assert count_scored(query(hospital, config, "scores", "val", run_id)) == scans["val"]
        assert count_scored(query(hospital, config, "scores", "test", run_id)) == scans["test"]


def test_whole_training_set_is_marked_at_the_first_charge(hospital: Path) -> None:
    """Also patients without a label for the first stage: a later stage trains on them."""
    table = pd.read_csv(hospital / "cohort.csv", dtype={"patient": str})
    is_first = table["patient"] == table[table["split"] == "train"]["patient"].iloc[0]
    table.loc[is_first, "covid"] = float("nan")
    table.to_csv(hospital / "cohort.csv", index=False)
    loading.clear_dataset_cache()
    assert isinstance(train(hospital, make_config()), TrainReply)
    assert len(read_marks(hospital)["trained"]) == table[table["split"] == "train"]["patient"].nunique()


def test_nothing_is_marked_where_nothing_can_be_paid(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("epsilon: 0.01\n")
    assert isinstance(train(hospital, make_config(), policy=str(tmp_path / "policy.yaml")), Refusal)
    assert not (hospital / ".consilium" / "budget" / "patients.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"trained": 3}', '{"trained": [], "disclosed": [], "x": 1}'])
def test_damaged_marks_stop_training_and_exact_scores(hospital: Path, text: str) -> None:
    config = make_config()
    path = hospital / ".consilium" / "budget" / "patients.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for reply in (train(hospital, config), query(hospital, config, "scores", "test")):
        assert isinstance(reply, Refusal)
        assert "marked in the centre's privacy budget cannot be read" in reply.reason
    assert path.read_text() == text


def test_lost_marks_stop_everything_until_the_hospital_accepts_the_loss(hospital: Path) -> None:
    config = make_config()
    assert isinstance(train(hospital, config), TrainReply)
    (hospital / ".consilium" / "budget" / "patients.json").unlink()
    for reply in (query(hospital, config, "scores", "test"), train(hospital, config, round_number=2)):
        assert isinstance(reply, Refusal)
        assert "list of marked patients is missing" in reply.reason
    accept_loss(hospital / ".consilium", None)
    reply = query(hospital, config, "scores", "test")
    assert isinstance(reply, Refusal)  # everybody in a charged cohort counts as trained on now
    assert "a private run trained on all patients of this split" in reply.reason
    assert isinstance(train(hospital, config, round_number=2), TrainReply)


def test_marks_hold_digests_and_no_identifier(hospital: Path) -> None:
    assert isinstance(train(hospital, make_config()), TrainReply)
    text = (hospital / ".consilium" / "budget" / "patients.json").read_text()
    table = pd.read_csv(hospital / "cohort.csv", dtype=str)
    assert not [patient for patient in table["patient"] if f'"{patient}"' in text]


def test_noisy_scores_are_of_every_patient_and_mark_nobody(hospital: Path) -> None:
    config = make_config("privacy.query_noise_multiplier=20")
    all_as_test = with_federation(config, held_out_centres=["north"])
    assert isinstance(train(hospital, config), TrainReply)
    reply = query(hospital, all_as_test, "scores", "test")
    assert isinstance(reply, StatisticsReply)
    assert read_marks(hospital)["disclosed"] == []
    assert [charge["noise"] for charge in read_charges(hospital)][1:] == [20.0]


def test_cohort_that_names_no_patients_is_refused_unless_scans_are_patients(hospital: Path) -> None:
    table = pd.read_csv(hospital / "cohort.csv", dtype=str)
    table.drop(columns="patient").to_csv(hospital / "cohort.csv", index=False)
    loading.clear_dataset_cache()
    config = make_config()
    for reply in (
        train(hospital, config),
        query(hospital, config, "counts"),
        query(hospital, config, "scores", "test"),
    ):
        assert isinstance(reply, Refusal)
        assert reply.permanent
        assert "set scans_are_patients: true in site.yaml" in reply.reason
    assert read_charges(hospital) == []
    assert isinstance(train(hospital, config, scans_are_patients=True), TrainReply)
    loading.clear_dataset_cache()
    some_missing = table.copy()
    some_missing.loc[some_missing.index[0], "patient"] = None
    some_missing.to_csv(hospital / "cohort.csv", index=False)
    assert isinstance(train(hospital, config, run_id="second"), Refusal)
    without_privacy = replace(
        config, privacy=replace(config.privacy, dp_level="none", epsilon=0.0, count_noise_multiplier=0.0)
    )
    assert isinstance(query(hospital, without_privacy, "counts"), StatisticsReply)
