"""The centre's answers: what it says, that it never raises, and that no path, name or error text crosses the wall."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import client.data.loading
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.compose import compose_config, config_to_dict
from common.modeling.parameters import Weights
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    StatisticsReply,
    StatisticsRequest,
    TrainRequest,
)
from common.utils.errors import ConsiliumError
from tests.client.hospital import TINY, WHO, config_of, contribution, reason, relabel, site_of, start, train
from tests.client.hospital import copy as copy
from tests.client.hospital import hospital as hospital

# --- what a healthy centre says -------------------------------------------------------------------------------------------------------


def test_presence_tells_what_there_is_and_no_more(hospital: Path) -> None:
    said = handle_request(site_of(hospital), JoinRequest("run", config_to_dict(config_of())))
    assert isinstance(said, JoinReply), said
    assert (said.centre, said.cohorts, said.sources, said.device) == ("north", ["north"], ["north"], "cpu")
    assert said.scans == {"train": 8, "val": 6, "test": 6}
    assert said.columns == ["covid", "source"]
    assert (said.skipped, said.fingerprint) == ({}, fingerprint_code())
    assert WHO not in repr(said)
    patients = pd.read_csv(hospital / "cohort.csv")["patient"]
    assert not [p for p in patients if p in repr(said)]


def test_counts_are_the_tables(hospital: Path) -> None:
    reply = handle_request(
        site_of(hospital), StatisticsRequest("run", config_to_dict(config_of()), "counts", "")
    )
    assert isinstance(reply, StatisticsReply), reply
    assert {k: n.tolist() for k, n in reply.sums.items()} == {
        **{f"north/{split}/covid": [n, n, 0] for split, n in (("train", 4), ("val", 3), ("test", 3))},
        **{f"north/{split}/source": [n, 0, 0] for split, n in (("train", 8), ("val", 6), ("test", 6))},
    }
    hidden = handle_request(
        site_of(hospital, min_cell_count=5),
        StatisticsRequest("run", config_to_dict(config_of()), "counts", ""),
    )
    assert isinstance(hidden, StatisticsReply)
    assert hidden.sums["north/val/covid"].tolist() == [5, 5, 0]


def test_a_node_without_a_part_is_present_and_refuses(tmp_path: Path) -> None:
    config = config_of(f"federation.data_root={tmp_path}")
    said = handle_request(Site(index=7, device="cpu"), JoinRequest("run", config_to_dict(config)))
    assert isinstance(said, JoinReply)
    assert (said.centre, said.cohorts, said.scans) == ("", [], {})
    assert reason(handle_request(Site(index=7), train(config))) == "node 7 has no part in this run"


def test_a_made_up_centre_of_any_name_is_the_one_that_the_command_wrote(tmp_path: Path) -> None:
    """A name that is none of the four takes a profile by its place: the same for the command and for the node."""
    settings = [
        "federation.centres=[first,second]",
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
    ]
    config = compose_config(
        [
            *settings,
            "federation.phantom.image_size=64",
            "preprocess.image_size=32",
            "preprocess.crop=none",
            f"federation.data_root={tmp_path}",
        ]
    )
    assert config.federation.phantom is not None
    folder = write_centre(tmp_path, "second", config.federation.phantom, 1)
    written = (folder / "cohort.csv").stat().st_mtime_ns
    assert isinstance(
        handle_request(Site(index=1, device="cpu"), JoinRequest("run", config_to_dict(config))), JoinReply
    )
    assert (folder / "cohort.csv").stat().st_mtime_ns == written


# --- a centre in trouble --------------------------------------------------------------------------------------------------------------


def test_corrupt_scans_are_counted_and_the_centre_trains_on(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_csv(copy / "cohort.csv")
    train_scans = table[table["split"] == "train"]["path"].tolist()
    for file in (copy / train_scans[0]).iterdir():
        file.write_bytes(file.read_bytes()[:3000])  # cut short in the pixels
    for file in (copy / train_scans[1]).iterdir():
        file.write_bytes(b"no DICOM at all")
    shutil.rmtree(copy / train_scans[2])
    caplog.set_level(logging.DEBUG)
    said = handle_request(site_of(copy), JoinRequest("run", config_to_dict(config_of())))
    assert isinstance(said, JoinReply), said
    assert said.scans == {"train": 5, "val": 6, "test": 6}
    assert sum(said.skipped.values()) == 3
    assert "it is not there" in said.skipped
    assert contribution(handle_request(site_of(copy), train(config_of()))).scans == 5
    for text in (repr(said), caplog.text):
        assert WHO not in text
        assert not [name for name in train_scans if name in text]


def test_a_cohort_of_which_nothing_can_be_read(copy: Path) -> None:
    shutil.rmtree(copy / "dicom")
    said = reason(handle_request(site_of(copy), JoinRequest("run", config_to_dict(config_of()))))
    assert (
        said
        == "no scan could be read (20 were skipped); run `consilium-centre preprocess` there and read its list"
    )


def test_a_data_path_that_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = tmp_path / WHO / "gone"
    said = reason(handle_request(site_of(gone), JoinRequest("run", config_to_dict(config_of()))))
    assert said == (
        "centre 'north' has no data: the `data` of site.yaml does not exist; write a cohort there with `consilium-centre cohort`"
    )
    assert WHO not in caplog.text
    assert "set `data` in site.yaml" in reason(
        handle_request(Site(centre="north"), JoinRequest("run", config_to_dict(config_of())))
    )


def test_in_simulation_a_missing_folder_is_named_by_its_key(tmp_path: Path) -> None:
    reply = handle_request(
        Site(index=1), JoinRequest("run", config_to_dict(config_of(f"federation.data_root={tmp_path}")))
    )
    assert isinstance(reply, Refusal)
    assert (reply.centre, "federation.data_root/south does not exist" in reply.reason) == ("south", True)


@pytest.mark.parametrize("text", ["", "scan,path,split,covid\n"])
def test_an_empty_cohort(copy: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "cohort.csv").write_text(text)
    said = reason(handle_request(site_of(copy), JoinRequest("run", config_to_dict(config_of()))))
    assert "the sentence is in the centre's log" in said
    assert "centre 'north': its cohort table is empty; it must hold at least one scan" in caplog.text
    assert WHO not in caplog.text


def test_without_labels_for_the_stages_tasks_the_centre_says_so(copy: Path) -> None:
    relabel(copy, covid=np.nan)
    assert reason(handle_request(site_of(copy), train(config_of("stage.tasks=[covid]")))) == (
        "8 training scans, none labelled for covid; check the cohort's split and label columns"
    )


def test_a_label_that_is_no_class(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    relabel(copy, covid=7)
    assert "the sentence is in the centre's log" in reason(
        handle_request(site_of(copy), JoinRequest("run", config_to_dict(config_of())))
    )
    assert "column 'covid' has 20 values that are neither 0 nor 1; write 0, 1 or nothing" in caplog.text


def test_a_loss_that_is_not_finite(hospital: Path) -> None:
    weights = start(config_of())
    weights.floats[:] = np.nan
    said = reason(handle_request(site_of(hospital), train(config_of(), weights=weights)))
    assert said == "the loss became nan at step 0; lower stage.optimiser.lr or set stage.precision=fp32"


# --- a coordinator that asks for the wrong thing --------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_and_never_raise(hospital: Path) -> None:
    site, config = site_of(hospital), config_of()
    good = config_to_dict(config)
    wrong = start(config)
    wrong = Weights(wrong.floats[:-1], wrong.int_buffers)
    requests = [
        StatisticsRequest("run", good, "pixels", "main"),
        StatisticsRequest("run", good, "scores", "finetune", "val", "", start(config)),
        StatisticsRequest("run", good, "scores", "main", "everything", "", start(config)),
        StatisticsRequest("run", good, "moments", "main", "train", "age", start(config)),
        StatisticsRequest("run", good, "scores", "main", "val", "", wrong),
        JoinRequest("run", {**good, "secrets": 1}),
        JoinRequest("run", {**good, "seed": "one"}),
        TrainRequest("run", good, "finetune", 1, start(config)),
        train(config, weights=wrong),
        train(config, personal=[("..", 1)]),
        train(config_of("backbone.name=resnett18"), weights=start(config)),
        train(config_of("federation.mode=central")),
        replace(train(config, personal=[("main", 1)]), run_id=".."),
    ]
    for request in requests:
        assert reason(handle_request(site, request))
    assert (
        reason(handle_request(site, requests[0]))
        == "query 'pixels' is not one this centre answers: counts, scores, moments, clusters, quality"
    )
    assert "is for simulation only" in reason(handle_request(site, requests[-2]))
    assert "is not a name for a run or a stage" in reason(handle_request(site, requests[-1]))
    assert (
        "shows no GPU" in reason(handle_request(replace(site, device="cuda"), train(config)))
        or torch.cuda.is_available()
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "No such file", f"/data/{WHO}/scan"),
        KeyError(f"/data/{WHO}"),
        RuntimeError(f"{WHO}\nand more"),
    ],
)
def test_an_unexpected_errors_text_stays_out_of_the_refusal_and_the_log(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(client.data.loading, "preprocess_cohort", fails)
    said = reason(handle_request(site_of(hospital), JoinRequest("run", config_to_dict(config_of()))))
    assert said.startswith(f"{type(error).__name__} in test_answer.fails, line ")
    assert WHO not in caplog.text
    assert "fails" in caplog.text  # where it was, for whoever mends it


def test_a_sentence_of_ours_may_name_a_file_so_it_stays_in_a_hospital(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConsiliumError("the store is full; make room")

    monkeypatch.setattr(client.data.loading, "preprocess_cohort", fails)
    request = JoinRequest("run", config_to_dict(config_of(f"federation.data_root={tmp_path}")))
    said = reason(handle_request(site_of(hospital), request))
    assert "full" not in said
    assert said.endswith("the sentence is in the centre's log")
    assert "the store is full; make room" in caplog.text
    write_centre(tmp_path, "north", TINY)
    assert reason(handle_request(Site(index=0, device="cpu"), request)) == "the store is full; make room"
