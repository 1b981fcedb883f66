"""The records of a run's result: to plain values and back, and their JSON Schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from common.utils.errors import RefusalCode
from server.run.records import (
    SCHEMA_VERSION,
    BestRound,
    CentreRound,
    CentreScores,
    Exclusion,
    RoundRecord,
    RunResult,
    RunStatus,
    StageRecord,
    TaskScores,
    WorstCentre,
    metrics_schema,
    parse_result,
    result_to_dict,
)


def make_result() -> RunResult:
    scores = TaskScores(
        centres={"north": CentreScores({"auc": 0.8, "f1": None}, loss=0.4, reasons={"f1": "one class only"})},
        macro={"auc": 0.8, "f1": None},
        pooled={"auc": 0.8, "f1": None},
        worst={"auc": WorstCentre(0.8, "north")},
        spread={"auc": 0.0},
        challenge_score=0.7,
    )
    record = RoundRecord(
        round=1,
        seconds=2.5,
        weights={"backbone": {"north": 1.0}},
        effective_centres={"backbone": 1.0},
        centres={
            "north": CentreRound(accepted=True, scans=12, steps=3, loss=0.5),
            "east": CentreRound(accepted=False, reason="not connected", code=RefusalCode.OFFLINE),
        },
        validation={"covid": scores},
    )
    stage = StageRecord(
        "main", rounds=[RoundRecord(0), record], best=BestRound("main", 1, 0.8), finished=True
    )
    result = RunResult("r", "multisource", "federated", 1, "2026-01-01T00:00:00+00:00", {"seed": 1})
    exclusion = Exclusion("main", 1, "east", "not connected", RefusalCode.OFFLINE)
    return replace(
        result, status=RunStatus.FINISHED, stages=[stage], test={"covid": scores}, left_out=[exclusion]
    )


def to_json_values(result: RunResult) -> Any:
    return json.loads(json.dumps(result_to_dict(result)))


def test_result_survives_json() -> None:
    result = make_result()
    assert parse_result(to_json_values(result)) == result


def test_schema_describes_the_metrics_file() -> None:
    schema = metrics_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(to_json_values(make_result()), schema)
    assert schema["$id"] == f"consilium/metrics.json/{SCHEMA_VERSION}"


def test_published_schema_is_the_generated_one() -> None:
    """Write it again with `python -m server.run.records > docs/metrics.schema.json`."""
    published = Path(__file__).parents[3] / "docs" / "metrics.schema.json"
    assert json.loads(published.read_text()) == metrics_schema()


@pytest.mark.parametrize(("key", "value"), [("status", "half done"), ("stages", [{}]), ("seed", None)])
def test_values_of_another_form_are_refused(key: str, value: Any) -> None:
    values = to_json_values(make_result()) | {key: value}
    with pytest.raises(ValidationError):
        parse_result(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, metrics_schema())


def test_loss_is_read_like_a_metric() -> None:
    scores = CentreScores({"auc": 0.8}, loss=0.4)
    assert (scores.get_metric("auc"), scores.get_metric("loss"), scores.get_metric("f1")) == (0.8, 0.4, None)
