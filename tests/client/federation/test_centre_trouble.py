"""A centre in trouble with its data: what it replies to a request, without a name or a path."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.federation.handlers import handle_request
from client.site.config import Site
from common.protocol.messages import (
    JoinReply,
    Refusal,
)
from common.utils.errors import RefusalCode
from tests.client.federation.test_handlers import join_request
from tests.client.hospital import (
    PATIENT_NAME,
    expect_train_reply,
    initial_weights,
    make_config,
    make_site,
    refusal_reason,
    set_columns,
    train_request,
)
from tests.client.hospital import hospital as hospital
from tests.client.hospital import hospital_copy as hospital_copy


def test_corrupt_scans_are_counted_and_the_others_are_trained(
    hospital_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_csv(hospital_copy / "cohort.csv")
    training_scans = table[table["split"] == "train"]["path"].tolist()
    for file in (hospital_copy / training_scans[0]).iterdir():
        file.write_bytes(file.read_bytes()[:3000])  # cut short in the pixels
    for file in (hospital_copy / training_scans[1]).iterdir():
        file.write_bytes(b"no DICOM at all")
    shutil.rmtree(hospital_copy / training_scans[2])
    caplog.set_level(logging.DEBUG)
    reply = handle_request(make_site(hospital_copy), join_request())
    assert isinstance(reply, JoinReply), reply
    assert reply.scans == {"train": 5, "val": 6, "test": 6}
    assert sum(reply.skipped.values()) == 3
    assert "it is not there" in reply.skipped
    update = handle_request(make_site(hospital_copy), train_request(make_config()))
    assert expect_train_reply(update).scans == 5
    for text in (repr(reply), caplog.text):
        assert PATIENT_NAME not in text
        assert not [name for name in training_scans if name in text]


def test_cohort_without_a_readable_scan_is_refused(hospital_copy: Path) -> None:
    shutil.rmtree(hospital_copy / "dicom")
    reason = refusal_reason(handle_request(make_site(hospital_copy), join_request()))
    assert reason == ("no scan could be read; run `consilium-centre preprocess` there and read its list")


def test_missing_data_folder_is_refused_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / PATIENT_NAME / "gone"
    reason = refusal_reason(handle_request(make_site(missing), join_request()))
    assert reason == (
        "centre 'north' has no data: the `data` of site.yaml does not exist; "
        "write a cohort there with `consilium-centre cohort`"
    )
    assert PATIENT_NAME not in caplog.text
    no_data = handle_request(Site(centre="north"), join_request())
    assert "set `data` in site.yaml" in refusal_reason(no_data)
    assert isinstance(no_data, Refusal)
    assert no_data.code == RefusalCode.NO_DATA


def test_missing_folder_in_simulation_is_named_by_its_key(tmp_path: Path) -> None:
    reply = handle_request(Site(index=1), join_request(f"federation.data_root={tmp_path}"))
    assert isinstance(reply, Refusal)
    assert reply.centre == "south"
    assert "federation.data_root/south does not exist" in reply.reason


@pytest.mark.parametrize("text", ["", "scan,path,split,covid\n"])
def test_empty_cohort_is_refused_and_explained_in_the_log(
    hospital_copy: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (hospital_copy / "cohort.csv").write_text(text)
    reason = refusal_reason(handle_request(make_site(hospital_copy), join_request()))
    assert reason.endswith("see the centre's log")
    assert "centre 'north': its cohort table is empty; it must hold at least one scan" in caplog.text
    assert PATIENT_NAME not in caplog.text


def test_training_without_labels_for_the_stage_is_refused(hospital_copy: Path) -> None:
    set_columns(hospital_copy, covid=np.nan)
    reply = handle_request(make_site(hospital_copy), train_request(make_config("stage.tasks=[covid]")))
    assert refusal_reason(reply) == (
        "no training scan is labelled for covid; check the split and label columns of the cohort, and "
        "whether its policy leaves them aside because they are few"
    )
    assert isinstance(reply, Refusal)
    assert reply.code == RefusalCode.NO_DATA


def test_label_that_is_not_a_class_is_explained_in_the_log(
    hospital_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_columns(hospital_copy, covid=7)
    reason = refusal_reason(handle_request(make_site(hospital_copy), join_request()))
    assert reason.endswith("see the centre's log")
    assert "column 'covid' has 20 values that are neither 0 nor 1; write 0, 1 or nothing" in caplog.text


def test_loss_that_is_not_finite_is_refused(hospital: Path) -> None:
    weights = initial_weights(make_config())
    weights.floats[:] = np.nan
    reason = refusal_reason(
        handle_request(make_site(hospital), train_request(make_config(), weights=weights))
    )
    assert reason == "the loss became nan at step 0; lower stage.optimiser.lr or set stage.precision=fp32"
