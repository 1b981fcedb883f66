"""Which updates can be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.aggregation.screening import find_outliers, find_validation_error
from server.aggregation.stored_updates import store_update
from tests.server.aggregation.updates import LAYOUT, make_reply


def test_malformed_updates_and_norm_outliers_are_found() -> None:
    reply = make_reply("north", 1)
    assert find_validation_error(reply) == ""
    for value, reason in ((np.nan, "not finite"), (-np.inf, "not finite"), (-1e16, "which no training does")):
        bad_reply = make_reply("north", 1)
        bad_reply.delta[17] = value
        assert reason in find_validation_error(bad_reply)
    bad_reply.delta = bad_reply.delta[:0]  # every layer stays at the centres
    assert find_validation_error(bad_reply) == ""
    assert find_outliers({"a": 1.0, "b": 1.2, "c": 50.0}, 10).keys() == {"c"}
    assert find_outliers({"a": 1.0, "b": 1.2, "c": 5.0}, 10) == {}
    # Of two centres nobody can say which is the outlier.
    assert find_outliers({"a": 1.0}, 10) == find_outliers({"a": 1.0, "b": 50.0}, 10) == {}


def test_the_norm_leaves_out_batch_norm_statistics(tmp_path: Path) -> None:
    reply = make_reply("north", 1)
    parameters = LAYOUT.parameter_mask()
    reply.delta[~parameters] = 1e6
    norm = store_update(reply, LAYOUT, tmp_path).norm
    assert norm == pytest.approx(np.linalg.norm(reply.delta[parameters].astype(np.float64)))
