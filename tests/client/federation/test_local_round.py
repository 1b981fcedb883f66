"""A round at a centre, of every paper's recipe: the same bits each time, what it moves, what stays, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.federation.handlers import handle_request
from common.config.compose import compose_config, config_to_dict
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import JoinReply, JoinRequest, StatisticsReply, StatisticsRequest, TrainRequest
from tests.client.hospital import config_of, contribution, reason, relabel, site_of, start, train
from tests.client.hospital import copy as copy
from tests.client.hospital import hospital as hospital


def test_a_round_is_the_same_bits_each_time_and_differs_by_round(hospital: Path) -> None:
    config = config_of()
    one, two, other = (
        contribution(handle_request(site_of(hospital), train(config, round))) for round in (1, 1, 2)
    )
    assert (one.centre, one.scans, one.steps) == ("north", 8, 2)
    assert one.delta.shape == start(config).floats.shape
    assert one.delta.dtype == np.float32
    assert np.isfinite(one.delta).all()
    assert float(np.abs(one.delta).max()) > 0
    assert one.losses["covid"][1] == 8
    np.testing.assert_array_equal(one.delta, two.delta)
    assert not np.array_equal(one.delta, other.delta)


def test_scores_move_with_the_weights(hospital: Path) -> None:
    config = config_of("stage.local_epochs=10")
    weights = start(config)
    after = Weights(
        weights.floats + contribution(handle_request(site_of(hospital), train(config))).delta,
        weights.int_buffers,
    )
    replies = [
        handle_request(
            site_of(hospital),
            StatisticsRequest("run", config_to_dict(config), "scores", "main", "train", "", w),
        )
        for w in (weights, after)
    ]
    losses = [r.sums["north/covid/loss"] for r in replies if isinstance(r, StatisticsReply)]
    assert [n for _, n in losses] == [8, 8]
    assert not np.array_equal(*losses)
    assert all(r.sums["north/covid/hist"].sum() == 8 for r in replies if isinstance(r, StatisticsReply))


def test_what_is_personal_stays_and_comes_back(hospital: Path, tmp_path: Path) -> None:
    """With batch norms kept local, what others' batch norms are makes no difference from the second round on."""
    config, site = config_of("stage.local_layers=[batch_norm]"), site_of(hospital, state=str(tmp_path))
    weights = start(config)
    layout = build_layout(make_model(config.backbone, config.tasks, 1))
    norms = np.zeros(layout.size, bool)
    for e in layout.floats:
        norms[e.span] = e.is_batch_norm
    contribution(handle_request(site, train(config, 1, weights, personal=[("main", 0)])))
    others = Weights(np.where(norms, 3.0, weights.floats).astype(np.float32), weights.int_buffers + 100)
    after = []
    for received in (weights, others):
        reply = contribution(
            handle_request(site, train(config, 2, received, personal=[("main", 1)], keep=[1]))
        )
        after.append(received.floats + reply.delta)
    np.testing.assert_allclose(after[0], after[1], atol=1e-5)
    first = contribution(
        handle_request(site, train(config, 1, others, personal=[("main", 0)]))
    )  # nothing was kept before round 1
    assert not np.allclose(others.floats + first.delta, after[0], atol=1e-3)


def test_with_all_weights_personal_none_leave(hospital: Path, tmp_path: Path) -> None:
    reply = handle_request(site_of(hospital, state=str(tmp_path)), train(config_of("federation.mode=local")))
    assert contribution(reply).delta.size == 0
    assert len(list((tmp_path / "personal" / "run" / "main").iterdir())) == 1


def test_without_labels_for_one_task_it_trains_the_others(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_csv(copy / "cohort.csv").drop(columns="covid")
    table.to_csv(copy / "cohort.csv", index=False)
    config = config_of()
    said = handle_request(site_of(copy), JoinRequest("run", config_to_dict(config)))
    assert isinstance(said, JoinReply)
    assert said.columns == ["source"]
    assert "no column 'covid' for task 'covid': this centre adds nothing to it" in caplog.text
    reply = contribution(handle_request(site_of(copy), train(config)))
    assert (reply.losses["covid"], reply.losses["source"][1]) == ([0.0, 0], 8)
    layout = build_layout(make_model(config.backbone, config.tasks, 1))
    assert {e.group for e in layout.floats if np.any(reply.delta[e.span])} == {"backbone", "source"}


def test_a_centre_with_one_class_trains_and_is_scored(copy: Path) -> None:
    relabel(copy, covid=0)
    config = config_of()
    assert contribution(handle_request(site_of(copy), train(config))).losses["covid"][1] == 8
    reply = handle_request(
        site_of(copy),
        StatisticsRequest("run", config_to_dict(config), "scores", "main", "val", "", start(config)),
    )
    assert isinstance(reply, StatisticsReply), reply
    assert reply.sums["north/covid/hist"].sum(1).tolist() == [6, 0]


def recipe(*overrides: str) -> Config:
    few = [
        "federation=folder",
        "federation.centres=[north,south]",
        "preprocess.image_size=32",
        "preprocess.crop=none",
        "preprocess.num_slices=1",
    ]
    return compose_config(
        [
            *few,
            "stage.precision=fp32",
            "aggregation.compression=fp32",
            "stage.batch_size=4",
            "backbone.decoder.channels=[8,8,8,8,4]",
            *overrides,
        ]
    )


def test_only_asked_columns_are_named_and_films_are_no_ct(hospital: Path) -> None:
    """The table also holds severity, lesions and outcomes: what a recipe does not ask for is nobody's business."""
    for overrides, columns in (
        (["recipe=finegrained"], ["finding", "infection"]),
        (["recipe=triage"], ["covid", "lesion"]),
        (["recipe=prognosis"], ["outcome"]),
    ):
        said = handle_request(site_of(hospital), JoinRequest("run", config_to_dict(recipe(*overrides))))
        assert isinstance(said, JoinReply), said
        assert (said.columns, said.scans, said.skipped) == (columns, {"train": 8, "val": 6, "test": 6}, {})
        assert "masks" not in repr(said)


@pytest.mark.parametrize(
    ("overrides", "stage", "scans", "moved"),
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
def test_a_stage_moves_what_its_tasks_stand_on(
    hospital: Path, overrides: list[str], stage: str, scans: dict[str, int], moved: set[str]
) -> None:
    """And the same bits each time, self-supervised too."""
    config = recipe(*overrides, "stage.local_epochs=1")
    weights = start(config)
    request = TrainRequest("run", config_to_dict(config), stage, 1, weights)
    one, two = (contribution(handle_request(site_of(hospital), request)) for _ in range(2))
    np.testing.assert_array_equal(one.delta, two.delta)
    assert {t: n for t, (_, n) in one.losses.items()} == scans
    layout = build_layout(make_model(config.backbone, config.tasks, 1))
    assert {e.group for e in layout.floats if np.any(one.delta[e.span])} == moved
    assert np.isfinite(one.delta).all()


def test_the_rate_of_a_plateau_is_obeyed(hospital: Path) -> None:
    config = recipe(
        "recipe=prognosis",
        "stage.tasks=[outcome]",
        "stage.optimiser.name=sgd",
        "stage.local_epochs=1",
        "stage.batch_size=8",
    )
    tasks = {t: replace(task, dropout=0.0) for t, task in config.tasks.items()}
    config = replace(config, tasks=tasks)
    weights = start(config)
    layout = build_layout(make_model(config.backbone, config.tasks, 1))
    one, half = (
        contribution(
            handle_request(
                site_of(hospital),
                TrainRequest("run", config_to_dict(config), "main", 1, weights, lr_scale=rate),
            )
        ).delta
        for rate in (1.0, 0.5)
    )
    head = [e for e in layout.floats if e.group == "outcome"]
    for e in head:  # one step: half the rate is half the step
        np.testing.assert_allclose(half[e.span], 0.5 * one[e.span], rtol=1e-3, atol=1e-7)
    assert any(np.any(one[e.span]) for e in head)


def clusters(config: Config, run: str = "run", **more: object) -> StatisticsRequest:
    return StatisticsRequest(run, config_to_dict(config), "clusters", "", "train", "soft", **more)  # type: ignore[arg-type]


def test_clusters_are_kept_here_and_only_sums_leave(hospital: Path, tmp_path: Path) -> None:
    config = recipe("recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2]")
    site, weights = site_of(hospital, state=str(tmp_path)), start(config)
    centroids = np.random.default_rng(0).normal(size=(2, 96))
    reply = handle_request(site, clusters(config, weights=weights, centroids=centroids))
    assert isinstance(reply, StatisticsReply), reply
    assert {k: v.shape for k, v in reply.sums.items()} == {"n": (2,), "sum": (2, 96), "square": (2,)}
    assert reply.sums["n"].sum() == 8
    middle = reply.sums["sum"].sum(0) / 8
    apart = np.stack([middle + 1e-3 * centroids[0], middle - 1e-3 * centroids[0]])
    again = handle_request(site, clusters(config, centroids=apart))  # no weights: the features are here
    assert isinstance(again, StatisticsReply), again
    kept = handle_request(site, clusters(config, weights=weights, centroids=apart, clustering="run-soft"))
    assert isinstance(kept, StatisticsReply)
    np.testing.assert_array_equal(kept.sums["n"], again.sums["n"])
    named = replace(
        config, tasks=config.tasks | {"soft": replace(config.tasks["soft"], clustering_id="run-soft")}
    )
    counts = handle_request(site, StatisticsRequest("run", config_to_dict(named), "counts", ""))
    assert isinstance(counts, StatisticsReply)
    assert counts.sums["north/train/soft"].tolist() == [*again.sums["n"].tolist(), 0]
    assert counts.sums["north/test/soft"].sum() == 6
    assert "features of this run are gone" in reason(handle_request(site, clusters(config, centroids=apart)))
    for wrong in (
        clusters(config, weights=weights, centroids=centroids[:, :7]),
        clusters(config, weights=weights, clustering="run-soft"),
        clusters(config, weights=weights, centroids=apart, clustering=".."),
        clusters(config, "..", weights=weights, centroids=apart),
    ):
        assert reason(handle_request(site, wrong))
    assert "cluster labels of this run are gone" in reason(
        handle_request(
            site_of(hospital, state=str(tmp_path / "other")),
            StatisticsRequest("run", config_to_dict(named), "counts", ""),
        )
    )
