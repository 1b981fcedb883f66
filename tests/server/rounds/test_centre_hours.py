"""A centre that is asked outside its hours comes later: the run neither fails nor waits for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from client.federation import handlers
from common.protocol.messages import Reply, Request, TrainRequest
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunStatus
from tests.in_process_federation import InProcess, phantom_config, sites


class Clock(datetime):
    """A clock that a test sets."""

    hour_now = 12

    @classmethod
    def now(cls, tz: object = None) -> Clock:
        return cls(2026, 1, 1, cls.hour_now, 30)


def test_centre_outside_its_hours_is_admitted_in_the_round_that_begins_within_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "datetime", Clock)
    (tmp_path / "policy.yaml").write_text("allowed_hours: 19:00-07:00\n")
    nodes = sites()
    nodes[3] = replace(nodes[3], policy=str(tmp_path / "policy.yaml"))
    config = phantom_config(tmp_path / "data", "federation.quorum=0.5", "evaluation.image_statistics=false")

    def reach_the_evening(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and request.round == 1:
            Clock.hour_now = 20
        return reply

    monkeypatch.setattr(Clock, "hour_now", 12)
    result = start_run(config, InProcess(nodes, reach_the_evening), tmp_path, open_ledger(tmp_path), "r")
    assert result.status == RunStatus.FINISHED
    _, first, second = result.stages[0].rounds
    refused = first.centres["west"]
    assert not refused.accepted
    assert "it takes part again from 19:00 on" in (refused.reason or "")
    assert second.centres["west"].accepted
