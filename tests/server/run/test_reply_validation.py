"""What the gate refuses, field by field, and the reason that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.protocol.messages import BaseWeightsMissing, JoinReply, Refusal, StatisticsReply
from common.utils.errors import RefusalCode
from server.run.reply_fields import make_plain
from server.run.reply_validation import REPLY_TYPES, validate_reply
from tests.server.run.honest_replies import HIDDEN, PLAIN, make_exchanges, make_public_keys, make_run

EXCHANGES = make_exchanges()
Change = Callable[[Any], object]


def put(path: str, value: object) -> Change:
    """Return a change that replaces a field, or an entry of a field: ``losses.covid``."""

    def apply(reply: Any) -> None:
        field, _, key = path.partition(".")
        if key:
            getattr(reply, field)[key] = value
        else:
            setattr(reply, field, value)

    return apply


def put_cell(path: str, value: float) -> Change:
    """Return a change that replaces the first value of an array."""

    def apply(reply: Any) -> None:
        field, _, key = path.partition(".")
        container = getattr(reply, field)
        array = np.array(container[key] if key else container)
        array.reshape(-1)[0] = value
        put(path, array)(reply)

    return apply


def drop(path: str) -> Change:
    """Return a change that removes an entry of a field."""

    def apply(reply: Any) -> None:
        field, _, key = path.partition(".")
        del getattr(reply, field)[key]

    return apply


def put_all_shares(num_bytes: int) -> Change:
    """Return a change that gives all shares another length."""
    return put("shares", dict.fromkeys(["north", "east", "south"], np.zeros(num_bytes, np.uint8)))


HIST, LOSS, COUNTS = "sums.west/covid/hist", "sums.west/covid/loss", "sums.west/train/covid"
CASES: list[tuple[str, Change, str]] = [
    ("join", put("centre", "east"), "names another centre as its sender"),
    ("join", put("cohorts", ["west", "east"]), "cohorts is not a list of at most 1"),
    ("join", put("cohorts", ["east"]), "cohorts has an entry that was not asked for"),
    ("join", put("cohorts", []), "cohorts is empty"),
    ("join", put("fingerprint", "a" * 101), "fingerprint is not a text of at most 100"),
    ("join", put("sources", ["a\nb"]), "sources is not a text"),
    ("join", put("sources", ["../a"]), "cannot be the name of a class"),
    ("join", put("sources", ["a", "a"]), "sources names something twice"),
    ("join", put("sources", [f"s{k}" for k in range(65)]), "sources is not a list of at most 64"),
    ("join", put("columns", ["age"]), "columns has an entry that was not asked for"),
    ("join", put("scans.train", -1), "scans is not a whole number"),
    ("join", put("scans.train", True), "scans is not a whole number"),
    ("join", put("scans.train", 10**13), "scans is not a whole number"),
    ("join", put("scans.other", 1), "scans has more than 3 entries"),
    ("join", put("scans", {"other": 1}), "scans has an entry that was not asked for"),
    ("join", put("skipped.a\0b", 1), "skipped is not a text"),
    ("join", put("skipped", {str(k): 1 for k in range(65)}), "skipped has more than 64 entries"),
    ("join", put("versions.torch", "\x1b[31m"), "versions is not a text"),
    ("join", put("versions.a\nb", "1"), "versions is not a text"),
    ("join", put("device", "\0"), "device is not a text"),
    ("join", put("notes", ["a" * 501]), "notes is not a text of at most 500"),
    ("join", put("policy", {"labels": [["a\0"]]}), "policy is not a text"),
    ("join", put("policy", {"epsilon": float("nan")}), "policy has a number that is not finite"),
    ("join", put("policy", {"a": 10**400}), "policy has a number that is not finite"),
    ("join", put("policy", {"a": [[[[1]]]]}), "policy is nested too deeply"),
    ("join", put("policy", {str(k): 1 for k in range(300)}), "policy has more than 500 entries"),
    ("counts", put_cell(COUNTS, np.nan), "sum 'west/train/covid' has a value that is not finite"),
    ("counts", put_cell(COUNTS, -1.0), "has a negative value"),
    ("counts", put_cell(COUNTS, 0.5), "a value that is no number of scans"),
    ("counts", put_cell(COUNTS, 1e13), "a value that is no number of scans"),
    ("counts", put(COUNTS, np.ones(4)), "has the wrong shape: 4 instead of 3"),
    ("counts", put(COUNTS, np.ones(3, np.float32)), "is not an array of float64"),
    ("counts", put("sums.east/train/covid", np.ones(3)), "not asked for, or that is of another centre"),
    ("counts", put("sums.west/all/covid", np.ones(3)), "not asked for, or that is of another centre"),
    ("counts", put("sums.west/mass/covid", np.ones(1)), "not asked for, or that is of another centre"),
    ("counts", put("seconds", float("inf")), "seconds is not a finite number"),
    ("counts", put("seconds", -1.0), "seconds is not a finite number"),
    ("counts", put("sum_id", "a"), "part of a secure sum, and this run has none here"),
    ("counts", put("public_keys", make_public_keys()), "part of a secure sum, and this run has none here"),
    ("scores", put_cell(HIST, -1.0), "has a negative value"),
    ("scores", put_cell(HIST, 0.5), "a value that is no number of scans"),
    ("scores", put_cell(LOSS, -0.5), "has a negative value"),
    ("scores", put(LOSS, np.array([1.0, 0.5])), "a value that is no number of scans"),
    ("scores", drop(LOSS), "sums has no losses of task 'covid'"),
    ("scores", put("sums.east/covid/hist", np.zeros((2, 8))), "of another centre"),
    ("quality", put_cell("sums.west/quality/area", -1.0), "has a negative value"),
    ("quality", put("sums.west/quality/other", np.ones(1)), "was not asked for"),
    ("moments", drop("sums.square"), "sums has only some of the moments"),
    ("moments", put_cell("sums.square", -1.0), "cannot be the squares of the features"),
    ("moments", put_cell("sums.sum", 1e6), "cannot be the squares of the features"),
    ("moments", put("sums.square", np.triu(np.ones((8, 8))) * 1e9), "cannot be the squares"),
    ("moments", put("sums.square", np.eye(8) * 1e20), "cannot be the squares"),
    ("moments", put("sums.n", np.array([15.0, 0.0, 15.0])), "has features of a group without scans"),
    ("moments", put_cell("sums.n", 0.5), "a value that is no number of scans"),
    ("clusters", put_cell("sums.square", 0.0), "cannot be the squares of the features"),
    ("clusters", put("sums.square", np.full(2, 1e20)), "cannot be the squares"),
    ("hidden", put("sums.west/train/covid", np.ones(3)), "sums has an entry that was not asked for"),
    ("hidden", put("public_keys", None), "public_keys is not an array of uint8"),
    ("hidden", put("public_keys", make_public_keys()[:95]), "public_keys has the wrong shape"),
    ("hidden", put("public_keys", np.zeros(96, np.uint8)), "a key that no secret can be agreed on with"),
    ("hidden", put("public_keys", make_public_keys()[[*range(32), *range(32), *range(64, 96)]]), "key twice"),
    ("hidden", put("sum_id", "a\0"), "sum_id is not a text"),
    ("train int8", put("scans", -1), "scans is not a whole number"),
    ("train int8", put("steps", 10**13), "steps is not a whole number"),
    ("train int8", put("seconds", float("nan")), "seconds is not a finite number"),
    ("train int8", put("epsilon", 1.0), "epsilon is not spent in this run"),
    ("train int8", put("losses.other", [1.0, 2.0]), "losses has an entry that was not asked for"),
    ("train int8", put("losses.covid", [1.0]), "is not a sum and a number of scans"),
    ("train int8", put("losses.covid", [1.0, 2.0, 3.0]), "is not a sum and a number of scans"),
    ("train int8", put("losses.covid", [1.0, -2.0]), "losses of task 'covid' is not a finite number"),
    ("train int8", put("losses.covid", [float("nan"), 2.0]), "losses of task 'covid' is not a finite"),
    ("train int8", put_cell("int_buffers", -1), "int_buffers has a negative value"),
    ("train int8", put_cell("int_buffers", 2**62), "int_buffers has a value beyond"),
    ("train int8", put("int_buffers", np.zeros(1, np.int64)), "int_buffers has the wrong shape"),
    ("train int8", put("delta", np.zeros(3, np.float32)), "delta has the wrong shape: 3 instead of 0"),
    ("train int8", drop("encoded_delta.rest"), "does not have the arrays codes, scales and rest"),
    ("train int8", put("encoded_delta.more", np.zeros(1)), "does not have the arrays codes, scales and rest"),
    ("train int8", put("encoded_delta.codes", np.zeros(9, np.int8)), "codes has the wrong shape"),
    ("train int8", put("encoded_delta.scales", np.zeros(9, np.uint16)), "scales has the wrong shape"),
    ("train int8", put_cell("encoded_delta.rest", np.inf), "rest has a value that is not finite"),
    ("train int4", put("encoded_delta.codes", np.zeros(9000, np.uint8)), "longer than its codes are"),
    ("train fp32", put("delta", np.zeros(3, np.float32)), "delta has the wrong shape"),
    ("train fp32", put("encoded_delta.codes", np.zeros(1)), "encoded_delta has an entry"),
    ("train masked", put("delta", np.zeros(3, np.float32)), "delta has the wrong shape: 3 instead of 0"),
    ("train masked", put("public_keys", None), "public_keys is not an array of uint8"),
    ("share keys", drop("shares.east"), "shares are not for the other centres of the sum"),
    ("share keys", put("shares.west", np.zeros(85, np.uint8)), "shares are not for the other centres"),
    ("share keys", put("shares.east", np.zeros(75, np.uint8)), "wrong shape: 75 instead of 85"),
    ("share keys", put_all_shares(75), "shares cannot be of two secrets"),
    ("share keys", put_all_shares(200_000), "shares cannot be of two secrets"),
    ("unmask", put("shares.other", np.zeros(16, np.uint8)), "shares has an entry"),
    ("unmask", put("shares.north", np.zeros(32, np.uint8)), "wrong shape: 32 instead of 16"),
    ("unmask", put("shares.east", np.zeros(16, np.uint8)), "wrong shape: 16 instead of 32"),
]


@pytest.mark.parametrize(("name", "change", "reason"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_each_field_is_validated(name: str, change: Change, reason: str) -> None:
    exchange = EXCHANGES[name]
    run = make_run(exchange.config)
    reply = copy.deepcopy(exchange.reply)
    assert validate_reply(run, "west", exchange.request, reply) is reply
    change(reply)
    refusal = validate_reply(run, "west", exchange.request, reply)
    assert isinstance(refusal, Refusal)
    assert (refusal.centre, refusal.code, refusal.permanent) == ("west", RefusalCode.BAD_REPLY, False)
    assert refusal.reason.startswith("bad reply: ")
    assert reason in refusal.reason


@pytest.mark.parametrize("asked", EXCHANGES)
@pytest.mark.parametrize("answered", EXCHANGES)
def test_a_reply_of_another_kind_is_refused(asked: str, answered: str) -> None:
    request, reply = EXCHANGES[asked].request, EXCHANGES[answered].reply
    received = validate_reply(make_run(EXCHANGES[asked].config), "west", request, reply)
    if not isinstance(reply, REPLY_TYPES[type(request)] | BaseWeightsMissing):
        assert isinstance(received, Refusal)
    if isinstance(reply, BaseWeightsMissing) and asked != "missing":  # no request but that one needs a cache
        assert isinstance(received, Refusal)


def test_a_pooled_centre_speaks_for_the_centres_of_the_run_only() -> None:
    exchange = EXCHANGES["join"]
    reply = copy.deepcopy(exchange.reply)
    assert isinstance(reply, JoinReply)
    reply.centre = "pooled"
    reply.cohorts = ["north", "east"]
    run = make_run(PLAIN)
    assert validate_reply(run, "pooled", exchange.request, reply) is reply
    reply.cohorts = ["north", "elsewhere"]
    assert isinstance(validate_reply(run, "pooled", exchange.request, reply), Refusal)


def test_a_centre_answers_for_the_cohorts_that_it_joined_with() -> None:
    exchange = EXCHANGES["counts"]
    run = make_run(PLAIN)
    run.membership.members["west"].cohorts = ["west", "east"]
    reply = StatisticsReply("west", {"east/train/covid": np.ones(3)})
    assert validate_reply(run, "west", exchange.request, reply) is reply


def test_a_refusal_is_shown_in_one_plain_line_under_the_name_of_its_sender() -> None:
    reply = Refusal("east", "the disk\n is\0 full\x1b" + "!" * 10_000, code=RefusalCode.ERROR)
    refusal = validate_reply(make_run(HIDDEN), "west", EXCHANGES["counts"].request, reply)
    assert isinstance(refusal, Refusal)
    assert (refusal.centre, refusal.code) == ("west", RefusalCode.ERROR)
    assert refusal.reason.startswith("the disk is\ufffd full\ufffd!")
    assert len(refusal.reason) == 500
    assert make_plain("Zürich, 3 °C") == "Zürich, 3 °C"
