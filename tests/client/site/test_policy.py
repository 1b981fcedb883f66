"""What a hospital's policy lets through, and what it says to the operator when it does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.loading import clear_dataset_cache
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site import egress_log
from client.site.config import Site
from client.site.policy import (
    Policy,
    authorise,
    describe_policy,
    filter_reply,
    load_policy,
    merge_small_bins,
    suppress_small_cells,
)
from common.config.compose import compose_config, config_to_dict
from common.config.schema import PhantomConfig
from common.learning.metrics import compute_binary_metrics
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
from common.utils.errors import ConsiliumError, Refused

CONFIG = compose_config(["recipe=triage"])
NOON = datetime(2026, 1, 1, 12, 0)
NOTHING = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
TRAIN = TrainRequest("run", {}, "main", 1, NOTHING)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(recipes=["multisource"]), "does not allow the recipe 'triage' (allowed: multisource)"),
        (Policy(fingerprints=["abc"]), f"does not allow the code '{fingerprint_code()}' (allowed: abc)"),
        (
            Policy(allowed_labels=["covid", "lesion"]),
            "does not allow the label 'severity' (allowed: covid, lesion)",
        ),
        (Policy(queries=["scores"]), "does not allow the query 'counts' (allowed: scores)"),
        (Policy(allowed_hours="19:00-07:00"), "computes from 19:00-07:00 only; it is 12:00 there"),
        (Policy(require_secure_aggregation=True), "requires secure aggregation"),
        (Policy(epsilon=3), "requires differential privacy (epsilon at most 3)"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_rule(policy: Policy, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        authorise(policy, StatisticsRequest("run", {}, "counts", ""), CONFIG, NOON)
    assert sentence in str(caught.value)


def test_a_limit_on_epsilon_is_met_by_a_private_run_and_by_no_other() -> None:
    authorise(
        Policy(epsilon=3), TRAIN, compose_config(["privacy=patient"]), NOON
    )  # client/site/privacy_budget.py counts
    assert "delta" not in describe_policy(Policy())
    assert describe_policy(Policy(epsilon=3)) == {"epsilon": 3, "delta": 1e-5, "min_cell_count": 1}
    with pytest.raises(ValueError, match="delta is 1"):
        Policy(delta=1)


def test_what_is_allowed_passes() -> None:
    policy = Policy(
        recipes=["triage"],
        fingerprints=[fingerprint_code()],
        allowed_labels=["covid", "lesion", "severity"],
        queries=["counts"],
        allowed_hours="08:00-18:00",
    )
    authorise(policy, StatisticsRequest("run", {}, "counts", ""), CONFIG, NOON)
    authorise(policy, TRAIN, CONFIG, NOON)
    authorise(
        replace(policy, allowed_hours="19:00-07:00"), JoinRequest("run", {}), CONFIG, NOON
    )  # saying who one is computes nothing
    for hour, minute in ((19, 0), (23, 59), (6, 59)):
        authorise(
            replace(policy, allowed_hours="19:00-07:00"),
            TRAIN,
            CONFIG,
            NOON.replace(hour=hour, minute=minute),
        )


def test_a_reply_too_large_stays() -> None:
    reply = StatisticsReply("north", {"north/train/covid": np.zeros(3)})
    assert filter_reply(Policy(max_message_bytes=24), reply) == reply
    with pytest.raises(Refused, match="lets 23 bytes leave in a message; this one would have 24"):
        filter_reply(Policy(max_message_bytes=23), reply)


def test_counts_of_a_task_called_like_a_sum_are_left_alone() -> None:
    reply = StatisticsReply("north", {"north/train/loss": np.array([9.0, 0.0, 0.0])})
    assert filter_reply(Policy(min_cell_count=5), reply, "counts") == reply


ROWS = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(lambda n: np.array(n, float))


@given(ROWS, st.integers(1, 8))
def test_no_filled_bin_holds_fewer_and_nobody_is_lost(row: np.ndarray, least: int) -> None:
    out = merge_small_bins(row, least)
    assert not ((out > 0) & (out < least)).any()
    assert out.sum() == (row.sum() if row.sum() >= least else 0)


def test_joined_bins_leave_the_auc_about_as_it_was() -> None:
    rng = np.random.default_rng(0)
    hist = np.stack([np.histogram(rng.normal(m, 1, 400), 256, (-8, 8))[0] for m in (-0.7, 0.7)]).astype(float)
    before, after = (
        compute_binary_metrics(h)["auc"]
        for h in (hist, suppress_small_cells({"a/covid/hist": hist}, 5)["a/covid/hist"])
    )
    assert before is not None
    assert after == pytest.approx(before, abs=0.01)


def test_sums_over_few_scans_stay() -> None:
    few = {
        "a/finding/confusion": np.array([[9.0, 1.0], [0.0, 4.0]]),
        "a/age/regression": np.arange(9.0),
        "a/age/loss": np.array([7.0, 3.0]),
        "a/covid/loss": np.array([7.0, 30.0]),
    }
    kept = suppress_small_cells(few, 5)
    assert kept["a/finding/confusion"].tolist() == [[9, 0], [0, 0]]
    assert not kept["a/age/regression"].any()
    assert not kept["a/age/loss"].any()
    assert kept["a/covid/loss"].tolist() == [7, 30]
    clusters = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.array([5.0, 6.0])}
    kept = suppress_small_cells(clusters, 5)
    assert (kept["n"].tolist(), kept["square"].tolist(), kept["sum"].sum(axis=1).tolist()) == (
        [9, 0],
        [5, 0],
        [3, 0],
    )
    moments = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.ones((3, 3))}
    assert not any(value.any() for value in suppress_small_cells(moments, 5).values())
    assert suppress_small_cells(moments | {"n": np.array([9.0, 0.0])}, 5)["square"].all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("recipe: [a]", "unknown key 'recipe'; did you mean 'recipes'"),
        ("recipes: multisource", "recipes is 'multisource'; it must be of type list"),
        ("min_cell_count: 0", "min_cell_count must be 1 or more"),
        ("min_cell_count: yes", "min_cell_count is True"),
        ("allowed_hours: at night", "allowed_hours 'at night' are none; write them like 19:00-07:00"),
        ("- a", "cannot be read"),
    ],
)
def test_a_wrong_policy_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConsiliumError) as caught:
        load_policy(str(tmp_path / "policy.yaml"))
    assert sentence in str(caught.value)
    with pytest.raises(ConsiliumError, match="nothing leaves until it can"):
        load_policy(str(tmp_path / "none.yaml"))


def test_a_hospital_enforces_its_policy_and_records_what_leaves(tmp_path: Path) -> None:
    folder = write_centre(tmp_path, "north", PhantomConfig(scale=0.02, num_slices=12, image_size=64))
    (tmp_path / "policy.yaml").write_text("recipes: [multisource]\nqueries: [counts]\nmin_cell_count: 5\n")
    assert describe_policy(load_policy(str(tmp_path / "policy.yaml"))) == {
        "recipes": ["multisource"],
        "queries": ["counts"],
        "min_cell_count": 5,
    }
    site = Site(centre="north", data=str(folder), device="cpu", policy=str(tmp_path / "policy.yaml"))
    config = config_to_dict(
        compose_config(["federation=folder", "federation.centres=[north]", "preprocess.image_size=32"])
    )
    clear_dataset_cache()
    assert isinstance(handle_request(site, JoinRequest("run", config)), JoinReply)
    counts = handle_request(site, StatisticsRequest("run", config, "counts", ""))
    assert isinstance(counts, StatisticsReply)
    assert all(((n == 0) | (n >= 5)).all() for n in counts.sums.values())
    refused = handle_request(site, StatisticsRequest("run", config, "moments", ""))
    assert isinstance(refused, Refusal)
    assert "does not allow the query 'moments'" in refused.reason
    assert [entry["kind"] for entry in egress_log.read_entries(folder / ".consilium")] == [
        "JoinReply",
        "StatisticsReply",
        "Refusal",
    ]
