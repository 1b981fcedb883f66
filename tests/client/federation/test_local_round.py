"""A round at a centre, for every recipe: reproducible bits, what it trains, what stays, and what leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from client.federation.handlers import handle_request
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout
from common.protocol.messages import JoinReply, JoinRequest, StatisticsReply, StatisticsRequest, TrainRequest
from tests.client.hospital import (
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


def make_layout(config: Config) -> Layout:
    return build_layout(make_model(config.backbone, config.tasks, 1))


def test_round_gives_the_same_bits_each_time_and_others_in_another_round(hospital: Path) -> None:
    config = make_config()
    first, repeated, second_round = (
        expect_train_reply(handle_request(make_site(hospital), train_request(config, round_number)))
        for round_number in (1, 1, 2)
    )
    assert (first.centre, first.scans, first.steps) == ("north", 8, 2)
    assert first.delta.shape == initial_weights(config).floats.shape
    assert first.delta.dtype == np.float32
    assert np.isfinite(first.delta).all()
    assert float(np.abs(first.delta).max()) > 0
    assert first.losses["covid"][1] == 8
    np.testing.assert_array_equal(first.delta, repeated.delta)
    assert not np.array_equal(first.delta, second_round.delta)


def test_scores_change_with_the_weights(hospital: Path) -> None:
    config = make_config("stage.local_epochs=10")
    before = initial_weights(config)
    delta = expect_train_reply(handle_request(make_site(hospital), train_request(config))).delta
    after = Weights(before.floats + delta, before.int_buffers)
    losses = []
    for weights in (before, after):
        request = StatisticsRequest("run", config_to_dict(config), "scores", "main", "train", "", weights)
        reply = handle_request(make_site(hospital), request)
        assert isinstance(reply, StatisticsReply)
        assert reply.sums["north/covid/hist"].sum() == 8
        losses.append(reply.sums["north/covid/loss"])
    assert [num_scans for _, num_scans in losses] == [8, 8]
    assert not np.array_equal(*losses)


def test_local_batch_norms_stay_and_are_used_in_the_next_round(hospital: Path, tmp_path: Path) -> None:
    """The batch norms received make no difference from the second round on."""
    config = make_config("stage.local_layers=[batch_norm]")
    site = make_site(hospital, state=str(tmp_path))
    weights = initial_weights(config)
    layout = make_layout(config)
    is_norm = np.zeros(layout.size, bool)
    for slot in layout.floats:
        is_norm[slot.span] = slot.is_batch_norm
    first_round = train_request(config, 1, weights, personal_rounds=[("main", 0)])
    expect_train_reply(handle_request(site, first_round))
    with_other_norms = Weights(
        np.where(is_norm, 3.0, weights.floats).astype(np.float32), weights.int_buffers + 100
    )
    shared, kept = [], []
    for received in (weights, with_other_norms):
        second_round = train_request(config, 2, received, personal_rounds=[("main", 1)], rounds_to_keep=[1])
        reply = expect_train_reply(handle_request(site, second_round))
        assert not reply.delta[is_norm].any()
        np.testing.assert_array_equal(reply.int_buffers, received.int_buffers)
        shared.append((received.floats + reply.delta)[~is_norm])
        kept.append(load_file(tmp_path / "personal" / "run" / "main" / "00002.safetensors")["floats"])
    np.testing.assert_array_equal(shared[0], shared[1])
    np.testing.assert_array_equal(kept[0], kept[1])
    # Before round 1 nothing was stored, so the norms received are used.
    first_round = train_request(config, 1, with_other_norms, personal_rounds=[("main", 0)])
    reply = expect_train_reply(handle_request(site, first_round))
    assert not np.allclose((with_other_norms.floats + reply.delta)[~is_norm], shared[0], atol=1e-3)


@pytest.mark.parametrize("later_layers", ["[]", "[heads]"])
def test_values_that_stayed_once_do_not_leave_by_a_later_message(
    hospital: Path, tmp_path: Path, later_layers: str
) -> None:
    """A message of the same run calls batch norms shared, and lays the stored ones over."""
    site = make_site(hospital, state=str(tmp_path))
    honest = make_config("stage.local_layers=[batch_norm]")
    expect_train_reply(handle_request(site, train_request(honest)))
    hostile = make_config(f"stage.local_layers={later_layers}", "tasks.source.head_update=local")
    weights = initial_weights(hostile)
    request = train_request(hostile, 2, weights, personal_rounds=[("main", 1)], lr_scale=1e-6)
    reply = expect_train_reply(handle_request(site, request))
    for slot in make_layout(hostile).floats:
        if slot.is_batch_norm:
            assert not reply.delta[slot.span].any()
    np.testing.assert_array_equal(reply.int_buffers, weights.int_buffers)


def test_nothing_leaves_when_all_layers_are_local(hospital: Path, tmp_path: Path) -> None:
    request = train_request(make_config("federation.mode=local"))
    reply = handle_request(make_site(hospital, state=str(tmp_path)), request)
    assert expect_train_reply(reply).delta.size == 0
    np.testing.assert_array_equal(expect_train_reply(reply).int_buffers, request.weights.int_buffers)
    assert len(list((tmp_path / "personal" / "run" / "main").iterdir())) == 1


def test_other_tasks_are_trained_when_one_has_no_labels(
    hospital_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_csv(hospital_copy / "cohort.csv").drop(columns="covid")
    table.to_csv(hospital_copy / "cohort.csv", index=False)
    config = make_config()
    joined = handle_request(make_site(hospital_copy), JoinRequest("run", config_to_dict(config)))
    assert isinstance(joined, JoinReply)
    assert joined.columns == ["source"]
    warning = "the cohort has no column 'covid', so this centre does not contribute to task 'covid'"
    assert warning in caplog.text
    reply = expect_train_reply(handle_request(make_site(hospital_copy), train_request(config)))
    assert (reply.losses["covid"], reply.losses["source"][1]) == ([0.0, 0], 8)
    assert trained_groups(config, reply.delta) == {"backbone", "source"}


def trained_groups(config: Config, delta: np.ndarray) -> set[str]:
    """Return the groups of parameters that a round has changed."""
    return {slot.group for slot in make_layout(config).floats if np.any(delta[slot.span])}


def test_centre_with_one_class_is_trained_and_scored(hospital_copy: Path) -> None:
    set_columns(hospital_copy, covid=0)
    config = make_config()
    reply = expect_train_reply(handle_request(make_site(hospital_copy), train_request(config)))
    assert reply.losses["covid"][1] == 8
    request = StatisticsRequest(
        "run", config_to_dict(config), "scores", "main", "val", "", initial_weights(config)
    )
    scores = handle_request(make_site(hospital_copy), request)
    assert isinstance(scores, StatisticsReply), scores
    assert scores.sums["north/covid/hist"].sum(1).tolist() == [6, 0]


# --- every recipe ---------------------------------------------------------------------------------


def make_recipe(*overrides: str) -> Config:
    return make_config(*overrides, small=["preprocess.num_slices=1", "backbone.decoder.channels=[8,8,8,8,4]"])


@pytest.mark.parametrize(
    ("recipe", "columns"),
    [
        ("finegrained", ["finding", "infection"]),
        ("triage", ["covid", "lesion"]),
        ("prognosis", ["outcome"]),
    ],
)
def test_join_reply_names_requested_columns_only(hospital: Path, recipe: str, columns: list[str]) -> None:
    """The table also has severity, lesions and outcomes; what a recipe does not ask for is not disclosed."""
    config = make_recipe(f"recipe={recipe}")
    reply = handle_request(make_site(hospital), JoinRequest("run", config_to_dict(config)))
    assert isinstance(reply, JoinReply), reply
    assert (reply.columns, reply.skipped) == (columns, {})
    assert reply.scans == {"train": 8, "val": 6, "test": 6}
    assert "masks" not in repr(reply)


@pytest.mark.parametrize(
    ("overrides", "stage", "scans", "groups"),
    [
        (["recipe=finegrained"], "pretrain", {"moco": 8}, {"backbone", "moco"}),
        (
            ["recipe=finegrained", "stages.pretrain.tasks=[inpainting]"],
            "pretrain",
            {"inpainting": 8},
            {"backbone", "decoder", "inpainting"},
        ),
        (
            ["recipe=finegrained"],
            "main",
            {"finding": 8, "infection": 8},
            {"backbone", "decoder", "finding", "infection"},
        ),
        (["recipe=prognosis"], "main", {"outcome": 8, "brixia": 0}, {"backbone", "outcome"}),
    ],
)
def test_stage_trains_the_groups_that_its_tasks_use(
    hospital: Path, overrides: list[str], stage: str, scans: dict[str, int], groups: set[str]
) -> None:
    """It also gives the same bits each time, for self-supervised tasks too."""
    config = make_recipe(*overrides, "stage.local_epochs=1")
    request = TrainRequest("run", config_to_dict(config), stage, 1, initial_weights(config))
    first, repeated = (expect_train_reply(handle_request(make_site(hospital), request)) for _ in range(2))
    np.testing.assert_array_equal(first.delta, repeated.delta)
    assert {task: num_scans for task, (_, num_scans) in first.losses.items()} == scans
    assert trained_groups(config, first.delta) == groups
    assert np.isfinite(first.delta).all()


def test_coordinator_scales_the_learning_rate(hospital: Path) -> None:
    config = make_recipe(
        "recipe=prognosis",
        "stage.tasks=[outcome]",
        "stage.optimiser.name=sgd",
        "stage.local_epochs=1",
        "stage.batch_size=8",
    )
    tasks = {name: replace(task, dropout=0.0) for name, task in config.tasks.items()}
    config = replace(config, tasks=tasks)
    weights = initial_weights(config)
    deltas = []
    for lr_scale in (1.0, 0.5):
        request = TrainRequest("run", config_to_dict(config), "main", 1, weights, lr_scale=lr_scale)
        deltas.append(expect_train_reply(handle_request(make_site(hospital), request)).delta)
    head = [slot for slot in make_layout(config).floats if slot.group == "outcome"]
    for slot in head:  # of one step, half the rate is half the change
        np.testing.assert_allclose(deltas[1][slot.span], 0.5 * deltas[0][slot.span], rtol=1e-3, atol=1e-7)
    assert any(np.any(deltas[0][slot.span]) for slot in head)


# --- clusters -------------------------------------------------------------------------------------


def cluster_request(config: Config, run_id: str = "run", **fields: object) -> StatisticsRequest:
    values = config_to_dict(config)
    return StatisticsRequest(run_id, values, "clusters", "", "train", "soft", **fields)  # type: ignore[arg-type]


def test_cluster_labels_stay_and_only_sums_leave(hospital: Path, tmp_path: Path) -> None:
    config = make_recipe("recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2]")
    site = make_site(hospital, state=str(tmp_path))
    weights = initial_weights(config)
    centroids = np.random.default_rng(0).normal(size=(2, 96))
    reply = handle_request(site, cluster_request(config, weights=weights, centroids=centroids))
    assert isinstance(reply, StatisticsReply), reply
    shapes = {key: values.shape for key, values in reply.sums.items()}
    assert shapes == {"n": (2,), "sum": (2, 96), "square": (2,)}
    assert reply.sums["n"].sum() == 8

    mean_features = reply.sums["sum"].sum(0) / 8
    apart = np.stack([mean_features + 1e-3 * centroids[0], mean_features - 1e-3 * centroids[0]])
    without_weights = handle_request(site, cluster_request(config, centroids=apart))  # features are on disk
    assert isinstance(without_weights, StatisticsReply), without_weights
    storing = cluster_request(config, weights=weights, centroids=apart, clustering_id="run-soft")
    stored = handle_request(site, storing)
    assert isinstance(stored, StatisticsReply)
    np.testing.assert_array_equal(stored.sums["n"], without_weights.sums["n"])

    clustered = replace(config.tasks["soft"], clustering_id="run-soft")
    config_with_labels = replace(config, tasks=config.tasks | {"soft": clustered})
    count_request = StatisticsRequest("run", config_to_dict(config_with_labels), "counts", "")
    counts = handle_request(site, count_request)
    assert isinstance(counts, StatisticsReply)
    assert counts.sums["north/train/soft"].tolist() == [*without_weights.sums["n"].tolist(), 0]
    assert counts.sums["north/test/soft"].sum() == 6
    after_storing = handle_request(site, cluster_request(config, centroids=apart))
    assert "features of this run are missing" in refusal_reason(after_storing)
    other_site = make_site(hospital, state=str(tmp_path / "other"))
    assert "cluster labels of this run are missing" in refusal_reason(
        handle_request(other_site, count_request)
    )


def test_wrong_cluster_requests_are_refused(hospital: Path, tmp_path: Path) -> None:
    config = make_recipe("recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2]")
    site = make_site(hospital, state=str(tmp_path))
    weights = initial_weights(config)
    centroids = np.random.default_rng(0).normal(size=(2, 96))
    for request in (
        cluster_request(config, weights=weights, centroids=centroids[:, :7]),
        cluster_request(config, weights=weights, clustering_id="run-soft"),
        cluster_request(config, weights=weights, centroids=centroids, clustering_id=".."),
        cluster_request(config, "..", weights=weights, centroids=centroids),
    ):
        assert refusal_reason(handle_request(site, request))
