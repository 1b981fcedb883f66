"""A run and its rounds as the coordinator writes them to a ledger."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from common.utils.errors import RefusalCode
from server.ledger.ledger import Ledger
from server.run.records import CentreRound, CentreScores, RoundRecord, TaskScores, WorstCentre

START = datetime(2020, 3, 1, 12, 0, tzinfo=UTC)
ACCEPTED = CentreRound(
    accepted=True,
    scans=30,
    steps=3,
    norm=0.5,
    loss=0.7,
    seconds=1.5,
    bytes_up=5_000_000_000,
    bytes_down=9,
)
LEFT_OUT = CentreRound(
    accepted=False,
    reason="not finite",
    code=RefusalCode.BAD_REPLY,
    scans=30,
    loss=math.nan,
    norm=math.inf,
)
SCORES = {
    "covid": TaskScores(
        centres={
            "north": CentreScores({"n": 30.0, "auc": 0.9}),
            "south": CentreScores(
                {"n": 9.0, "auc": None}, reasons={"auc": "one class only (no positive scan among 9)"}
            ),
        },
        macro={"auc": 0.9},
        pooled={"n": 39.0, "auc": 0.8},
        worst={"auc": WorstCentre(0.9, "north")},
        spread={"auc": 0.0},
        challenge_score=0.7,
    )
}


def start_run(address: str, run_id: str = "r1", parent_run_id: str | None = None) -> Ledger:
    ledger = Ledger(address)
    ledger.add_run(
        run_id,
        recipe="multisource",
        mode="federated",
        config={"seed": 1, "tasks": {"covid": {}}},
        code_fingerprint="abc",
        parent_run_id=parent_run_id,
    )
    return ledger


def close_round(
    ledger: Ledger, number: int, close_reason: str = "every centre replied", **contributions: CentreRound
) -> int:
    closed_round = RoundRecord(
        number,
        seconds=2.5,
        weights={"backbone": {"north": 0.75, "south": 0.25}, "covid": {"north": 1.0}},
        effective_centres={"backbone": 1.6, "covid": 1.0},
        centres=contributions or {"north": ACCEPTED, "south": LEFT_OUT},
        validation=SCORES,
    )
    return ledger.add_round("r1", "main", closed_round, started=START, close_reason=close_reason)
