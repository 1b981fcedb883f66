"""`handle_request`: what a centre replies, that it never raises, and that no name or error text leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import client.data.loading
from client.federation import run_context
from client.federation.handlers import REQUEST_HANDLERS, handle_request
from client.phantom.federation import write_centre
from client.site.config import Site
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.modeling.parameters import Weights
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Request,
    StatisticsReply,
    StatisticsRequest,
    TrainRequest,
)
from common.utils.errors import ConsiliumError
from tests.client.hospital import (
    PATIENT_NAME,
    TINY_PHANTOM,
    initial_weights,
    make_config,
    make_site,
    refusal_reason,
    train_request,
)
from tests.client.hospital import hospital as hospital
from tests.client.hospital import hospital_copy as hospital_copy


def join_request(*overrides: str) -> JoinRequest:
    return JoinRequest("run", config_to_dict(make_config(*overrides)))


# --- a healthy centre -----------------------------------------------------------------------------


def test_every_request_has_a_handler() -> None:
    assert set(REQUEST_HANDLERS) == set(Request.__args__)


def test_join_reply_describes_the_data_without_identifiers(hospital: Path) -> None:
    reply = handle_request(make_site(hospital), join_request())
    assert isinstance(reply, JoinReply), reply
    assert (reply.centre, reply.cohorts, reply.sources, reply.device) == (
        "north",
        ["north"],
        ["north"],
        "cpu",
    )
    assert reply.scans == {"train": 8, "val": 6, "test": 6}
    assert reply.columns == ["covid", "source"]
    assert (reply.skipped, reply.fingerprint) == ({}, fingerprint_code())
    assert PATIENT_NAME not in repr(reply)
    patients = pd.read_csv(hospital / "cohort.csv")["patient"]
    assert not [patient for patient in patients if patient in repr(reply)]


def test_counts_are_those_of_the_table(hospital: Path, tmp_path: Path) -> None:
    request = StatisticsRequest("run", config_to_dict(make_config()), "counts", "")
    reply = handle_request(make_site(hospital), request)
    assert isinstance(reply, StatisticsReply), reply
    assert {key: counts.tolist() for key, counts in reply.sums.items()} == {
        "north/train/covid": [4, 4, 0],
        "north/val/covid": [3, 3, 0],
        "north/test/covid": [3, 3, 0],
        "north/train/source": [8, 0, 0],
        "north/val/source": [6, 0, 0],
        "north/test/source": [6, 0, 0],
    }
    in_threes = handle_request(make_site(hospital, min_cell_count=3, state=str(tmp_path)), request)
    assert isinstance(in_threes, StatisticsReply)
    assert in_threes.sums["north/val/covid"].tolist() == [3, 3, 0]
    assert in_threes.sums["north/train/source"].tolist() == [6, 0, 0]  # two of eight patients fill no group


def test_node_that_takes_no_part_joins_without_data_and_refuses_to_train(tmp_path: Path) -> None:
    config = make_config(f"federation.data_root={tmp_path}")
    reply = handle_request(Site(index=7, device="cpu"), JoinRequest("run", config_to_dict(config)))
    assert isinstance(reply, JoinReply)
    assert (reply.centre, reply.cohorts, reply.scans) == ("", [], {})
    refusal = handle_request(Site(index=7), train_request(config))
    assert refusal_reason(refusal) == "node 7 takes no part in this run"


def test_phantom_centre_of_any_name_is_the_one_that_the_command_wrote(tmp_path: Path) -> None:
    """Any other name than the four takes a profile by its position, for the command and the node alike."""
    config = compose_config(
        [
            "federation.centres=[first,second]",
            "federation.phantom.scale=0.001",
            "federation.phantom.num_slices=10",
            "federation.phantom.image_size=64",
            "preprocess.image_size=32",
            "preprocess.crop=none",
            f"federation.data_root={tmp_path}",
        ]
    )
    assert config.federation.phantom is not None
    folder = write_centre(tmp_path, "second", config.federation.phantom, 1)
    written = (folder / "cohort.csv").stat().st_mtime_ns
    reply = handle_request(Site(index=1, device="cpu"), JoinRequest("run", config_to_dict(config)))
    assert isinstance(reply, JoinReply)
    assert (folder / "cohort.csv").stat().st_mtime_ns == written


def test_configuration_of_a_run_is_parsed_once(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("seed=4711")
    num_parsed = 0
    parse_config = run_context.parse_config

    def count_and_parse(values: object) -> object:
        nonlocal num_parsed
        num_parsed += 1
        return parse_config(values)  # type: ignore[arg-type]

    monkeypatch.setattr(run_context, "parse_config", count_and_parse)
    request = StatisticsRequest("run", config_to_dict(config), "counts", "")
    for _ in range(3):
        assert isinstance(handle_request(make_site(hospital), request), StatisticsReply)
    assert num_parsed == 1


# --- wrong requests -------------------------------------------------------------------------------


def test_wrong_requests_are_refused_and_never_raise(hospital: Path) -> None:
    site = make_site(hospital)
    config = make_config()
    values = config_to_dict(config)
    weights = initial_weights(config)
    short_weights = Weights(weights.floats[:-1], weights.int_buffers)
    unknown_query = StatisticsRequest("run", values, "pixels", "main")
    central = train_request(make_config("federation.mode=central"))
    bad_run_id = replace(train_request(config, personal_rounds=[("main", 1)]), run_id="..")
    requests = [
        unknown_query,
        StatisticsRequest("run", values, "scores", "finetune", "val", "", weights),
        StatisticsRequest("run", values, "scores", "main", "everything", "", weights),
        StatisticsRequest("run", values, "moments", "main", "train", "age", weights),
        StatisticsRequest("run", values, "scores", "main", "val", "", short_weights),
        JoinRequest("run", {**values, "secrets": 1}),
        JoinRequest("run", {**values, "seed": "one"}),
        JoinRequest("run", {**values, "seed": {1, 2}}),
        TrainRequest("run", values, "finetune", 1, weights),
        train_request(config, weights=short_weights),
        train_request(config, personal_rounds=[("..", 1)]),
        train_request(make_config("backbone.name=resnett18"), weights=weights),
        central,
        bad_run_id,
    ]
    for request in requests:
        assert refusal_reason(handle_request(site, request))
    assert refusal_reason(handle_request(site, unknown_query)) == (
        "unknown query 'pixels'; this centre answers counts, scores, moments, clusters, quality"
    )
    assert "is for simulation only" in refusal_reason(handle_request(site, central))
    assert "the request's 'run_id' is not valid" in refusal_reason(handle_request(site, bad_run_id))
    if not torch.cuda.is_available():
        on_cuda = handle_request(replace(site, device="cuda"), train_request(config))
        assert "this machine has no GPU" in refusal_reason(on_cuda)


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "No such file", f"/data/{PATIENT_NAME}/scan"),
        KeyError(f"/data/{PATIENT_NAME}"),
        RuntimeError(f"{PATIENT_NAME}\nand more"),
    ],
)
def test_text_of_an_unexpected_error_stays_out_of_the_refusal_and_the_log(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(client.data.loading, "preprocess_cohort", fail)
    reason = refusal_reason(handle_request(make_site(hospital), join_request()))
    assert reason.startswith(f"{type(error).__name__} in test_handlers.fail, line ")
    assert PATIENT_NAME not in caplog.text
    assert "in fail" in caplog.text  # the place of the error, for whoever repairs it


def test_text_of_our_own_error_stays_in_the_hospital_because_it_may_name_a_file(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConsiliumError("the store is full; make room")

    monkeypatch.setattr(client.data.loading, "preprocess_cohort", fail)
    request = join_request(f"federation.data_root={tmp_path}")
    reason = refusal_reason(handle_request(make_site(hospital), request))
    assert "full" not in reason
    assert reason.endswith("see the centre's log")
    assert "the store is full; make room" in caplog.text
    write_centre(tmp_path, "north", TINY_PHANTOM)
    in_simulation = handle_request(Site(index=0, device="cpu"), request)
    assert refusal_reason(in_simulation) == "the store is full; make room"
