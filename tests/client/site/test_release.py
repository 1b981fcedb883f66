"""Every kind of reply has its filter, and numbers about few patients do not pass it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest

from client.site.policy import Policy
from client.site.release import REPLY_FILTERS, ReleaseRules, filter_reply
from common.protocol.messages import JoinReply, Reply, StatisticsReply, TrainReply
from common.utils.errors import Refused

FIVE = ReleaseRules(Policy(min_cell_count=5), min_patients=5, min_scans=7)
EMPTY = np.empty(0, np.float32)


@dataclass
class UnknownReply:
    """A reply that nobody has written a filter for."""

    centre: str = "north"


def test_every_kind_of_reply_has_a_filter_and_no_other_leaves() -> None:
    assert set(REPLY_FILTERS) == set(get_args(Reply))
    with pytest.raises(Refused, match="of a kind that may not leave"):
        filter_reply(ReleaseRules(Policy()), UnknownReply())  # type: ignore[arg-type]


def test_training_losses_of_few_scans_and_exact_times_do_not_leave() -> None:
    losses = {"covid": [0.88, 1.0], "source": [9.0, 20.0]}
    reply = TrainReply("north", EMPTY, EMPTY.astype(np.int64), 20, 4, losses, seconds=1.25)
    filtered = filter_reply(FIVE, reply)
    assert isinstance(filtered, TrainReply)
    assert filtered.losses == {"covid": [0.0, 0.0], "source": [9.0, 20.0]}
    assert filtered.seconds == 2.0
    assert filter_reply(ReleaseRules(Policy()), reply) == reply


def test_join_reply_has_no_small_number() -> None:
    scans = {"train": 20, "val": 4, "test": 5}
    reply = JoinReply("north", ["north"], "f", ["north"], ["covid"], scans, {"it is empty": 2}, {}, "cpu")
    filtered = filter_reply(FIVE, reply)
    assert isinstance(filtered, JoinReply)
    assert (filtered.scans, filtered.skipped) == ({"train": 20, "test": 5}, {})


def test_scores_are_rounded_to_scans_that_stand_for_enough_patients() -> None:
    sums = {"north/covid/loss": np.array([3.0, 6.0]), "north/source/confusion": np.array([[9.0, 5.0]])}
    filtered = filter_reply(FIVE, StatisticsReply("north", sums, 0.5))
    assert isinstance(filtered, StatisticsReply)
    assert filtered.sums["north/covid/loss"].tolist() == [0, 0]
    assert filtered.sums["north/source/confusion"].tolist() == [[7, 7]]


def test_reply_that_is_too_large_does_not_leave() -> None:
    reply = StatisticsReply("north", {"north/train/covid": np.zeros(3)})
    assert filter_reply(ReleaseRules(Policy(max_message_bytes=24)), reply) == reply
    with pytest.raises(Refused, match="allows messages of at most 23 bytes, and this one would have 24"):
        filter_reply(ReleaseRules(Policy(max_message_bytes=23)), reply)


def test_counts_of_a_task_named_like_a_statistic_are_unchanged() -> None:
    reply = StatisticsReply("north", {"north/train/loss": np.array([10.0, 0.0, 0.0])}, 1.0)
    rules = ReleaseRules(Policy(min_cell_count=5), 5, 5, "counts")
    assert filter_reply(rules, reply) == reply
