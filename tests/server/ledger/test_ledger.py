"""What is written to the ledger is read back, on SQLite and on PostgreSQL where it is installed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from common.utils.errors import RefusalCode
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.run.records import CentreScores, TaskScores, parse_task_scores
from tests.server.ledger.ledger_rows import ACCEPTED, SCORES, START, close_round, start_run


def test_written_rows_are_read_back(address: str) -> None:
    ledger = start_run(address)
    ledger.add_centre("r1", "north", {"counts": {"train": {"covid": {"1": 3}}}, "device": "cpu"})
    ledger.log_event("r1", "left_out", "not finite", centre="south", code=RefusalCode.BAD_REPLY)
    assert close_round(ledger, 1) == 1
    ledger.add_metrics("r1", "main", 1, "test", SCORES)
    ledger.log_event("r1", "finished")

    reopened = Ledger(address)  # another process, later
    (run,) = reopened.read_runs()
    assert (run["id"], run["recipe"], run["status"]) == ("r1", "multisource", "finished")
    assert (run["code_fingerprint"], run["parent_run_id"]) == ("abc", None)
    assert run["config"]["tasks"] == {"covid": {}}
    assert run["since"] >= run["created"] > START
    events = reopened.read_events("r1")
    assert [event["kind"] for event in events] == ["started", "left_out", "finished"]
    assert [event["code"] for event in events] == [None, "bad_reply", None]
    assert reopened.read_centres("r1")[0]["metadata"] == {
        "counts": {"train": {"covid": {"1": 3}}},
        "device": "cpu",
    }
    (row,) = reopened.read_rounds("r1")
    assert (row["started"], row["seconds"], row["close_reason"]) == (START, 2.5, "every centre replied")
    north, south = reopened.read_contributions("r1")
    assert dataclasses.asdict(ACCEPTED).items() <= north.items()
    assert (south["accepted"], south["reason"], south["code"]) == (False, "not finite", "bad_reply")
    assert (south["loss"], south["norm"]) == (None, None)
    backbone, covid = reopened.read_group_weights("r1")
    assert (backbone["group"], backbone["effective_centres"]) == ("backbone", pytest.approx(1.6))
    assert backbone["centre_weights"] == {"north": 0.75, "south": 0.25}
    assert (covid["group"], covid["effective_centres"]) == ("covid", 1.0)
    assert covid["centre_weights"] == {"north": 1.0}
    val, test = reopened.read_scores("r1")
    assert (val["split"], val["attempt"], test["split"], test["task"]) == ("val", 1, "test", "covid")
    for row in (val, test):
        assert parse_task_scores(row) == SCORES["covid"]
    assert "centres" not in reopened.read_scores("r1", include_centres=False)[0]


def test_non_finite_values_are_null_also_inside_scores(address: str) -> None:
    ledger = start_run(address)
    scores = TaskScores(
        centres={"north": CentreScores({}, loss=math.nan)},
        macro={"loss": math.inf},
        pooled={},
        worst={},
        spread={},
    )
    ledger.add_metrics("r1", "main", 1, "test", {"covid": scores})
    (row,) = ledger.read_scores("r1")
    assert row["centres"] == {"north": {"metrics": {}, "loss": None, "reasons": {}}}
    assert row["summaries"]["macro"] == {"loss": None}


def test_sums_are_not_written_with_scores(address: str) -> None:
    ledger = start_run(address)
    with_sums = dataclasses.replace(SCORES["covid"], sums={"north": [[1.0], [2.0]]})
    ledger.add_metrics("r1", "main", 1, "test", {"covid": with_sums})
    assert parse_task_scores(ledger.read_scores("r1")[0]) == SCORES["covid"]


def test_a_repeated_round_is_a_higher_attempt_and_only_the_last_is_shown(address: str) -> None:
    ledger = start_run(address)
    assert close_round(ledger, 1) == 1
    assert close_round(ledger, 2, "below the quorum", north=ACCEPTED) == 1
    assert close_round(ledger, 2, "round timeout", south=ACCEPTED) == 2
    assert [(r["round"], r["attempt"], r["close_reason"]) for r in ledger.read_rounds("r1")] == [
        (1, 1, "every centre replied"),
        (2, 2, "round timeout"),
    ]
    assert [(c["round"], c["centre"]) for c in ledger.read_contributions("r1")] == [
        (1, "north"),
        (1, "south"),
        (2, "south"),
    ]
    assert [r["attempt"] for r in ledger.read_rounds("r1", all_attempts=True)] == [1, 1, 2]
    assert len(ledger.read_contributions("r1", all_attempts=True)) == 4
    assert {row["attempt"] for row in ledger.read_scores("r1") if row["round"] == 2} == {2}
    assert {row["attempt"] for row in ledger.read_group_weights("r1") if row["round"] == 2} == {2}


def test_the_status_is_the_last_status_event(address: str) -> None:
    ledger = start_run(address)
    start_run(address, "r2")
    assert ledger.read_status("r3") is None
    for kind in ("paused", "resumed", "left_out"):
        ledger.log_event("r1", kind)
    # Ordered by when the status was reached.
    assert [(run["id"], run["status"]) for run in ledger.read_runs()] == [
        ("r2", "started"),
        ("r1", "resumed"),
    ]
    run = ledger.read_run("r1")
    assert run is not None
    assert run["status"] == "resumed"
    assert ledger.read_run("r3") is None


def test_a_fold_names_its_cross_validation(address: str) -> None:
    ledger = start_run(address, "study-fold-0", parent_run_id="study")
    assert [run["parent_run_id"] for run in ledger.read_runs()] == ["study"]


def test_what_no_database_can_hold_is_replaced(address: str) -> None:
    ledger = start_run(address)
    text = "a\0b\ud800c"
    ledger.log_event("r1", "left_out", text, centre=text)
    ledger.log_progress("r1", "main", 1, "train", centre=text, reason=text)
    ledger.add_centre(
        "r1", text, {text: [text, math.nan, (math.inf, {"device": text})], "pair": "\U0001f600"}
    )
    ledger.log_audit(text, "exclude", text, "r1")
    assert ledger.read_events("r1")[-1]["detail"] == "a�b�c"
    metadata = {"a�b�c": ["a�b�c", None, [None, {"device": "a�b�c"}]], "pair": "\U0001f600"}
    (row,) = ledger.read_centres("r1")
    assert (row["centre"], row["metadata"]) == ("a�b�c", metadata)
    assert first_broken_link(ledger.read_audit()) is None
