"""Label counts of a private run leave with noise, once, and the centre's own weight follows from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.data import loading
from client.federation.handlers import handle_request
from client.federation.released_counts import weigh_centre
from client.federation.run_context import RunContext
from client.site.config import local_cohorts
from client.site.policy import Policy
from common.config.parse import config_to_dict
from common.learning.class_imbalance import unnormalised_weight
from common.privacy.count_noise import count_noise_std, estimate_counts
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    StatisticsReply,
    StatisticsRequest,
    Sums,
)
from tests.client.federation.private_hospital import hospital as hospital
from tests.client.federation.private_hospital import (
    make_config,
    make_site,
    make_weights,
    query,
    read_charges,
    train,
)
from tests.client.federation.private_hospital import written_hospital as written_hospital


def ask_counts(hospital: Path, *overrides: str, run_id: str = "run") -> Sums:
    reply = query(hospital, make_config(*overrides), "counts", run_id=run_id)
    assert isinstance(reply, StatisticsReply), reply
    return reply.sums


def test_the_same_question_gets_the_same_noisy_counts_and_is_charged_once(hospital: Path) -> None:
    first = ask_counts(hospital)
    loading.clear_dataset_cache()
    again = ask_counts(hospital)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert [(charge["noise"], charge["odds"], charge["steps"]) for charge in read_charges(hospital)] == [
        (5.0, 1.0, 1)
    ]
    ask_counts(hospital, "stage.rounds=3")  # what it counts could differ: it is drawn and paid anew
    assert len(read_charges(hospital)) == 2
    ask_counts(hospital, run_id="another")
    assert len(read_charges(hospital)) == 3


def test_counts_are_noisy_in_every_split_and_for_labels_that_nobody_has(hospital: Path) -> None:
    """Which cells there are depends on the configuration alone."""
    noise = ["privacy.count_noise_multiplier=1000", "tasks.covid.label_column=covid"]
    sums = ask_counts(hospital, *noise)
    assert set(sums) == {f"north/{split}/{task}" for split in ("train", "val", "test") for task in ("covid",)}
    cells = np.concatenate(
        [cells for run in range(4) for cells in ask_counts(hospital, *noise, run_id=f"{run}").values()]
    )
    # Noise of 1,000 patients: 36 cells, of which each is above 100 with a probability of 0.46.
    assert (cells > 100).any()
    reply = query(hospital, make_config(*noise, "federation.held_out_centres=[north]"), "counts")
    assert isinstance(reply, StatisticsReply)
    assert reply.sums.keys() == sums.keys()  # also where a split has no scan


def test_counts_that_cannot_be_kept_or_paid_do_not_leave(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("epsilon: 0.01\n")
    unpaid = query(hospital, make_config(), "counts", policy=str(tmp_path / "policy.yaml"))
    assert isinstance(unpaid, Refusal)
    assert unpaid.permanent
    (hospital / ".consilium" / "budget").mkdir(exist_ok=True)
    (hospital / ".consilium" / "budget" / "counts").write_text("a file where the folder should be")
    unkept = query(hospital, make_config(), "counts")
    assert isinstance(unkept, Refusal)
    assert "cannot be kept" in unkept.reason


def test_presence_and_time_tell_no_number_of_scans(hospital: Path) -> None:
    config = make_config()
    reply = handle_request(make_site(hospital), JoinRequest("run", config_to_dict(config)))
    assert isinstance(reply, JoinReply)
    assert (reply.scans, reply.skipped) == ({}, {})
    assert "covid" in reply.columns
    counts = query(hospital, config, "counts")
    scores = query(hospital, config, "scores", "test")
    assert isinstance(counts, StatisticsReply)
    assert isinstance(scores, StatisticsReply)
    assert (counts.seconds, scores.seconds) == (0.0, 0.0)


def test_weight_in_a_secure_sum_follows_from_the_released_counts(hospital: Path) -> None:
    config = make_config("aggregation.tau=0")
    context = RunContext(make_site(hospital), config, Policy(), "run")
    released = ask_counts(hospital, "aggregation.tau=0")
    expected = estimate_counts(released["north/train/covid"][:-1], config)
    assert expected.min() >= count_noise_std(config) > 0
    assert weigh_centre(context) == {"covid": unnormalised_weight(expected, config.aggregation)}
    assert len(read_charges(hospital)) == 1
    assert list(local_cohorts(context.site, config)) == ["north"]


def test_centre_without_a_tasks_column_weighs_nothing_however_the_noise_falls(hospital: Path) -> None:
    config = make_config("tasks.covid.label_column=never_recorded")
    context = RunContext(make_site(hospital), config, Policy(), "run")
    assert weigh_centre(context) == {"covid": 0.0}


def test_refusal_without_labels_tells_no_count(hospital: Path) -> None:
    reply = train(hospital, make_config("tasks.covid.label_column=never_recorded"))
    assert isinstance(reply, Refusal)
    assert reply.permanent
    assert reply.reason == "no training scan is labelled for covid"


def test_query_that_fails_is_not_charged(hospital: Path) -> None:
    config = make_config("privacy.query_noise_multiplier=20")
    unbounded = config_to_dict(config)
    unbounded["tasks"]["covid"] |= {"type": "regression", "label_column": "severity"}
    values = config_to_dict(config)
    weights = make_weights(config)
    requests = [
        StatisticsRequest("run", unbounded, "scores", "main", "test", weights=weights),
        StatisticsRequest("run", values, "scores", "main", "test"),  # without weights
        StatisticsRequest("run", values, "scores", "main", "everything", weights=weights),
        StatisticsRequest("run", values, "scores", "other", "test", weights=weights),
        StatisticsRequest("run", values, "moments", "main", "train", "covid", weights=weights),
    ]
    for request in requests:
        reply = handle_request(make_site(hospital), request)
        assert isinstance(reply, Refusal), reply
        assert "Error" not in reply.reason
    assert read_charges(hospital) == []
    paid = handle_request(
        make_site(hospital), StatisticsRequest("run", values, "scores", "main", "test", weights=weights)
    )
    assert isinstance(paid, StatisticsReply)
    assert set(paid.sums) == {"north/covid/hist", "north/covid/loss"}
    assert paid.sums["north/covid/loss"].tolist() == [0.0, 0.0]
    assert [(charge["noise"], charge["odds"], charge["steps"]) for charge in read_charges(hospital)] == [
        (20.0, 1.0, 1)
    ]
