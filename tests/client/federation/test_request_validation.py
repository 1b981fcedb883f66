"""Each field of a request must be of its type and fit the run's configuration, or the request is refused."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.federation.handlers import handle_request
from client.federation.request_fields import FIELD_RULES, check_fields
from client.federation.request_validation import validate_request
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import EMPTY_PARAMS, Weights
from common.protocol.messages import (
    JoinRequest,
    MaskedInputRequest,
    Request,
    ShareKeysRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskRequest,
)
from common.utils.errors import Refused
from tests.client.hospital import hospital as hospital
from tests.client.hospital import initial_weights, make_config, make_site, refusal_reason, train_request

CONFIG = make_config("stage.rounds=3")
CLUSTERED = make_config(
    "recipe=transfer",
    "preprocess.num_slices=1",
    "stages.transition.tasks=[soft]",
    "tasks.soft.num_clusters=[2]",
)
KEYS = np.zeros(96, np.uint8)
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def training() -> TrainRequest:
    return train_request(CONFIG)


def query(config: Config, name: str, **fields: Any) -> StatisticsRequest:
    return StatisticsRequest("run", config_to_dict(config), name, **{"stage": "", **fields})


def test_every_field_of_every_request_has_a_rule() -> None:
    fields = {field.name for request in typing.get_args(Request) for field in dataclasses.fields(request)}
    assert fields == set(FIELD_RULES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", 7),
        ("run_id", np.zeros(3)),
        ("config", []),
        ("stage", None),
        ("stage", "a/b"),
        ("round", 0),
        ("round", True),
        ("round", 1.0),
        ("round", 10**9),
        ("weights", {}),
        ("weights", Weights(np.zeros(3), np.zeros(0, np.int64))),  # type: ignore[arg-type]
        ("global_counts", {"covid": [float("nan"), 1.0]}),
        ("global_counts", {"covid": [-1.0, 1.0]}),
        ("global_counts", {"../covid": [1.0, 1.0]}),
        ("global_counts", {"covid": ["1", "1"]}),
        ("personal_rounds", [("main", -1)]),
        ("personal_rounds", [("..", 1)]),
        ("personal_rounds", [["main"]]),
        ("personal_rounds", [("main", 1)] * 1001),
        ("rounds_to_keep", ["1"]),
        ("rounds_to_keep", [-1]),
        ("mean_centre_scans", float("inf")),
        ("mean_centre_scans", -1),
        ("lr_scale", float("nan")),
        ("lr_scale", 0),
        ("lr_scale", 1e9),
        ("total_label_weight", {"covid": float("inf")}),
        ("base_digest", "../x"),
        ("target_digest", "0" * 63),
        ("encoded_delta", {"extra": np.zeros(3)}),
        ("encoded_delta", {"codes": "text"}),
    ],
)
def test_training_request_with_a_wrong_field_is_refused(
    hospital: Path, training: TrainRequest, field: str, value: object
) -> None:
    check_fields(training)
    request = replace(training, **{field: value})  # type: ignore[arg-type]
    expected = f"the request's '{field}' is not valid; it must be"
    with pytest.raises(Refused, match=expected):
        check_fields(request)
    assert handle_request(make_site(hospital), request).reason  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "request_",
    [
        query(CONFIG, "../counts"),
        query(CONFIG, "counts", split="everything"),
        query(CONFIG, "counts", task="a/b"),
        query(CONFIG, "clusters", centroids=np.full((2, 3), np.nan)),
        query(CONFIG, "clusters", centroids=np.zeros(3)),
        query(CONFIG, "clusters", centroids=np.zeros((2, 3), np.float32)),
        query(CONFIG, "clusters", clustering_id="../x"),
        ShareKeysRequest("run", {}, "train/main/1/0", {"north": KEYS[:-1]}),
        ShareKeysRequest("run", {}, "train/main/1/0", {"..": KEYS}),
        ShareKeysRequest("run", {}, "train\n", {}),
        MaskedInputRequest("run", {}, "train/main/1/0", {"north": np.zeros(3)}),
        UnmaskRequest("run", {}, "train/main/1/0", "north"),  # type: ignore[arg-type]
        UnmaskRequest("run", {}, "x" * 500, ["north"]),
        JoinRequest("..", {}),
    ],
)
def test_other_request_with_a_wrong_field_is_refused(request_: Request) -> None:
    with pytest.raises(Refused, match="is not valid; it must be"):
        check_fields(request_)


def test_training_request_must_fit_the_run(training: TrainRequest) -> None:
    validate_request(CONFIG, training)
    weights = training.weights
    too_few = Weights(weights.floats[1:], np.zeros(0, np.int64))
    misfits = {
        "has no stage 'other'": replace(training, stage="other"),
        "has no stage ''": replace(training, stage=""),
        "has 3 rounds, and not 4": replace(training, round=4),
        "has no weights": replace(training, weights=None),  # type: ignore[arg-type]
        "weights and 0 counters": replace(training, weights=too_few),
        "neither complete nor a change": replace(training, base_digest=DIGEST),
        "no task 'age'": replace(training, global_counts={"age": [1.0]}),
        "not one for each of its classes": replace(training, global_counts={"covid": [1.0]}),
        "no global counts for the prior of task 'source'": replace(training, global_counts={}),
        "no task 'hiv'": replace(training, total_label_weight={"hiv": 1.0}),
        "no stage 'first'": replace(training, personal_rounds=[("first", 1)]),
        "no round 4": replace(training, personal_rounds=[("main", 4)]),
    }
    for sentence, request in misfits.items():
        with pytest.raises(Refused, match=sentence):
            validate_request(CONFIG, request)


def test_change_of_weights_names_what_it_changes(training: TrainRequest) -> None:
    coded = make_config("aggregation.compression=int8", "stage.rounds=3")
    empty = Weights(EMPTY_PARAMS, training.weights.int_buffers)
    change = replace(training, weights=empty, base_digest=DIGEST, target_digest=DIGEST)
    validate_request(coded, change)
    for request in (
        replace(change, target_digest=""),
        replace(change, weights=training.weights),
        replace(change, base_digest=""),
    ):
        with pytest.raises(Refused, match=r"neither complete nor a change|received 0 weights"):
            validate_request(coded, request)


def test_query_must_fit_the_run() -> None:
    centroids = np.zeros((2, 96))
    clusters = query(CLUSTERED, "clusters", task="soft", centroids=centroids)
    validate_request(CLUSTERED, clusters)
    misfits = [
        ("unknown query 'pixels'", CONFIG, query(CONFIG, "pixels")),
        ("no stage 'other'", CONFIG, query(CONFIG, "counts", stage="other")),
        ("no task 'age'", CONFIG, query(CONFIG, "counts", task="age")),
        ("no use for class moments", CONFIG, query(CONFIG, "moments", task="source")),
        ("no use for clusters", CONFIG, query(CONFIG, "clusters", task="covid", centroids=centroids)),
        ("no use for clusters", CLUSTERED, replace(clusters, task="")),
        ("needs centroids", CLUSTERED, replace(clusters, centroids=None)),
        (r"must be \[1 to 2, 96\]", CLUSTERED, replace(clusters, centroids=np.zeros((3, 96)))),
        (r"must be \[1 to 2, 96\]", CLUSTERED, replace(clusters, centroids=np.zeros((2, 95)))),
        ("clustering_id is not this run's", CLUSTERED, replace(clusters, clustering_id="other-soft")),
        ("has no centroids", CONFIG, query(CONFIG, "counts", centroids=centroids)),
        ("a change of weights, but no weights", CONFIG, query(CONFIG, "counts", base_digest=DIGEST)),
    ]
    for sentence, config, request in misfits:
        with pytest.raises(Refused, match=sentence):
            validate_request(config, request)
    unasked = make_config("evaluation.image_statistics=false")
    with pytest.raises(Refused, match="no use for image statistics"):
        validate_request(unasked, query(unasked, "quality"))


def test_steps_of_a_secure_sum_name_centres_of_the_run_only() -> None:
    for request in (
        ShareKeysRequest("run", {}, "train/main/1/0", {"north": KEYS, "mallory": KEYS}),
        MaskedInputRequest("run", {}, "train/main/1/0", {"mallory": KEYS}),
        UnmaskRequest("run", {}, "train/main/1/0", ["north", "mallory"]),
    ):
        with pytest.raises(Refused, match="names 'mallory', which is no centre of this run"):
            validate_request(CONFIG, request)


@pytest.mark.parametrize("make_request", [JoinRequest, TrainRequest, StatisticsRequest, UnmaskRequest])
def test_configuration_is_validated_in_full_in_every_message(
    hospital: Path, training: TrainRequest, make_request: type[Request]
) -> None:
    """Where it contradicts itself, as the coordinator's own checks say, and where it is not prepared."""
    values = config_to_dict(CONFIG)
    contradiction = {**values, "evaluation": {**values["evaluation"], "task": "nothing"}}
    unprepared = {**values, "stages": values["stages"] | {"empty": {**values["stages"]["main"], "rounds": 0}}}
    requests: dict[type, Any] = {
        JoinRequest: JoinRequest("run", values),
        TrainRequest: training,
        StatisticsRequest: query(CONFIG, "counts"),
        UnmaskRequest: UnmaskRequest("run", values, "train/main/1/0", ["north"]),
    }
    request = requests[make_request]
    for bad_values, sentence in (
        (contradiction, "'nothing' is not a task"),
        (unprepared, "lacks what follows"),
    ):
        reason = refusal_reason(handle_request(make_site(hospital), replace(request, config=bad_values)))
        assert reason.startswith("the run's configuration is refused: ")
        assert sentence in reason


def test_weights_of_a_request_are_those_of_its_model() -> None:
    weights = initial_weights(CONFIG)
    scores = query(CONFIG, "scores", stage="main", split="val", weights=weights)
    validate_request(CONFIG, scores)
    longer = Weights(np.append(weights.floats, np.float32(0)), weights.int_buffers)
    with pytest.raises(Refused, match="the two sides run different recipes or code"):
        validate_request(CONFIG, replace(scores, weights=longer))


def test_centre_refuses_what_the_run_has_no_use_for(hospital: Path) -> None:
    unasked = make_config("evaluation.image_statistics=false")
    reply = handle_request(make_site(hospital), query(unasked, "quality"))
    assert "no use for image statistics" in refusal_reason(reply)
