"""What a hospital's policy lets through, and what it says to the operator when it does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import egress
from client.answer import answer
from client.phantom import write_centre
from client.policy import Policy, describe, joined_bins, load_policy, permit, release, suppressed
from client.scans import forget
from client.site import Site
from common.compose import compose, to_dict
from common.errors import ConsiliumError, Refused
from common.fingerprint import fingerprint
from common.messages import Answer, Hello, Presence, Query, Refusal, Train
from common.metrics import binary_metrics
from common.schema import Phantom
from common.weights import Weights

CONFIG = compose(["recipe=triage"])
NOON = datetime(2026, 1, 1, 12, 0)
NOTHING = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
TRAIN = Train("run", {}, "main", 1, NOTHING)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(recipes=["multisource"]), "does not allow the recipe 'triage' (allowed: multisource)"),
        (Policy(fingerprints=["abc"]), f"does not allow the code '{fingerprint()}' (allowed: abc)"),
        (Policy(labels=["covid", "lesion"]), "does not allow the label 'severity' (allowed: covid, lesion)"),
        (Policy(queries=["scores"]), "does not allow the query 'counts' (allowed: scores)"),
        (Policy(hours="19:00-07:00"), "computes from 19:00-07:00 only; it is 12:00 there"),
        (Policy(secure_aggregation=True), "requires secure aggregation"),
        (Policy(epsilon=3), "requires differential privacy (epsilon at most 3)"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_rule(policy: Policy, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        permit(policy, Query("run", {}, "counts", ""), CONFIG, NOON)
    assert sentence in str(caught.value)


def test_a_limit_on_epsilon_is_met_by_a_private_run_and_by_no_other() -> None:
    permit(Policy(epsilon=3), TRAIN, compose(["privacy=patient"]), NOON)  # client/budget.py counts
    assert "delta" not in describe(Policy())
    assert describe(Policy(epsilon=3)) == {"epsilon": 3, "delta": 1e-5, "smallest_cell": 1}
    with pytest.raises(ValueError, match="delta is 1"):
        Policy(delta=1)


def test_what_is_allowed_passes() -> None:
    policy = Policy(
        recipes=["triage"], fingerprints=[fingerprint()], labels=["covid", "lesion", "severity"], queries=["counts"], hours="08:00-18:00"
    )
    permit(policy, Query("run", {}, "counts", ""), CONFIG, NOON)
    permit(policy, TRAIN, CONFIG, NOON)
    permit(replace(policy, hours="19:00-07:00"), Hello("run", {}), CONFIG, NOON)  # saying who one is computes nothing
    for hour, minute in ((19, 0), (23, 59), (6, 59)):
        permit(replace(policy, hours="19:00-07:00"), TRAIN, CONFIG, NOON.replace(hour=hour, minute=minute))


def test_a_reply_too_large_stays() -> None:
    reply = Answer("north", {"north/train/covid": np.zeros(3)})
    assert release(Policy(max_bytes=24), reply) == reply
    with pytest.raises(Refused, match="lets 23 bytes leave in a message; this one would have 24"):
        release(Policy(max_bytes=23), reply)


def test_counts_of_a_task_called_like_a_sum_are_left_alone() -> None:
    reply = Answer("north", {"north/train/loss": np.array([9.0, 0.0, 0.0])})
    assert release(Policy(smallest_cell=5), reply, "counts") == reply


ROWS = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(lambda n: np.array(n, float))


@given(ROWS, st.integers(1, 8))
def test_no_filled_bin_holds_fewer_and_nobody_is_lost(row: np.ndarray, least: int) -> None:
    out = joined_bins(row, least)
    assert not ((out > 0) & (out < least)).any()
    assert out.sum() == (row.sum() if row.sum() >= least else 0)


def test_joined_bins_leave_the_auc_about_as_it_was() -> None:
    rng = np.random.default_rng(0)
    hist = np.stack([np.histogram(rng.normal(m, 1, 400), 256, (-8, 8))[0] for m in (-0.7, 0.7)]).astype(float)
    before, after = (binary_metrics(h)["auc"] for h in (hist, suppressed({"a/covid/hist": hist}, 5)["a/covid/hist"]))
    assert before is not None
    assert after == pytest.approx(before, abs=0.01)


def test_sums_over_few_scans_stay() -> None:
    few = {
        "a/finding/confusion": np.array([[9.0, 1.0], [0.0, 4.0]]),
        "a/age/regression": np.arange(9.0),
        "a/age/loss": np.array([7.0, 3.0]),
        "a/covid/loss": np.array([7.0, 30.0]),
    }
    kept = suppressed(few, 5)
    assert kept["a/finding/confusion"].tolist() == [[9, 0], [0, 0]]
    assert not kept["a/age/regression"].any()
    assert not kept["a/age/loss"].any()
    assert kept["a/covid/loss"].tolist() == [7, 30]
    clusters = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.array([5.0, 6.0])}
    kept = suppressed(clusters, 5)
    assert (kept["n"].tolist(), kept["square"].tolist(), kept["sum"].sum(axis=1).tolist()) == ([9, 0], [5, 0], [3, 0])
    moments = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.ones((3, 3))}
    assert not any(value.any() for value in suppressed(moments, 5).values())
    assert suppressed(moments | {"n": np.array([9.0, 0.0])}, 5)["square"].all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("recipe: [a]", "unknown key 'recipe'; did you mean 'recipes'"),
        ("recipes: multisource", "recipes is 'multisource'; it must be of type list"),
        ("smallest_cell: 0", "smallest_cell must be 1 or more"),
        ("smallest_cell: yes", "smallest_cell is True"),
        ("hours: at night", "hours 'at night' are none; write them like 19:00-07:00"),
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
    folder = write_centre(tmp_path, "north", Phantom(scale=0.02, slices=12, pixels=64))
    (tmp_path / "policy.yaml").write_text("recipes: [multisource]\nqueries: [counts]\nsmallest_cell: 5\n")
    assert describe(load_policy(str(tmp_path / "policy.yaml"))) == {"recipes": ["multisource"], "queries": ["counts"], "smallest_cell": 5}
    site = Site(centre="north", data=str(folder), device="cpu", policy=str(tmp_path / "policy.yaml"))
    config = to_dict(compose(["federation=folder", "federation.centres=[north]", "preprocess.size=32"]))
    forget()
    assert isinstance(answer(site, Hello("run", config)), Presence)
    counts = answer(site, Query("run", config, "counts", ""))
    assert isinstance(counts, Answer)
    assert all(((n == 0) | (n >= 5)).all() for n in counts.sums.values())
    refused = answer(site, Query("run", config, "moments", ""))
    assert isinstance(refused, Refusal)
    assert "does not allow the query 'moments'" in refused.reason
    assert [entry["kind"] for entry in egress.read(folder / ".consilium")] == ["Presence", "Answer", "Refusal"]
