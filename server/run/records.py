"""The records of a run's result: what a checkpoint keeps and ``metrics.json`` publishes.

`RunResult` is the root. ``metrics.json`` is `result_to_dict(result)` as JSON; its JSON Schema
(`metrics_schema`) is generated from these classes, so a field added here is part of the published format and
needs a new `SCHEMA_VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter

from common.utils.errors import ConsiliumError, RefusalCode

SCHEMA_VERSION = 2  # 1 was 0.1.0's, which had no version number

Metrics = dict[str, float | None]  # {metric: value}; None where it is undefined


class RunStatus(StrEnum):
    """How far a run has come. `RUNNING` is only ever seen in an unfinished result."""

    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class WorstCentre:
    """The lowest value of a metric over the centres, and whose it is."""

    value: float | None
    centre: str | None


@dataclass
class CentreScores:
    """A centre's scores for one task."""

    metrics: Metrics
    loss: float | None = None  # mean over the labelled scans
    reasons: dict[str, str] = field(default_factory=dict)  # {metric: why it is undefined}

    def get_metric(self, name: str) -> float | None:
        """Return a metric, or the loss under the name "loss"; None where it is undefined or unknown."""
        return self.loss if name == "loss" else self.metrics.get(name)


@dataclass
class TaskScores:
    """One task's scores on one split: by centre, and over all centres."""

    centres: dict[str, CentreScores]
    macro: Metrics  # mean over the centres that have a value
    pooled: Metrics  # of all centres' sums together
    worst: dict[str, WorstCentre]  # {metric: ...}
    spread: Metrics  # best less worst
    challenge_score: float | None = None  # mean over sources of (F1+ + F1-) / 2; binary tasks only
    # {centre: histogram, confusion matrix, ... as nested lists}; test split only
    sums: dict[str, Any] = field(default_factory=dict)


@dataclass
class CentreRound:
    """What a centre contributed to a round, or why it was left out."""

    accepted: bool
    reason: str = ""
    code: RefusalCode | None = None  # of the reason, for programs; None where it was accepted
    scans: int | None = None  # None: unknown to the coordinator (secure aggregation with ``scope: all``)
    steps: int | None = None  # optimiser steps
    seconds: float | None = None
    loss: float | None = None  # mean training loss over the labelled scans
    epsilon: float | None = None  # spent by its patients so far, in all runs
    norm: float | None = None  # L2 norm of the update
    clip_norm: float | None = None  # the coordinator's clip norm (``privacy=central``)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class RoundRecord:
    """A round of training and its validation; round 0 is the validation of a stage's first weights."""

    round: int
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    weights: dict[str, dict[str, float]] = field(default_factory=dict)  # {parameter group: {centre: weight}}
    # {parameter group: 1 / sum of squared weights}
    effective_centres: dict[str, float] = field(default_factory=dict)
    centres: dict[str, CentreRound] = field(default_factory=dict)
    validation: dict[str, TaskScores] = field(default_factory=dict)  # {task: ...}


@dataclass
class BestRound:
    """The best round of a stage on validation."""

    stage: str
    round: int
    value: float | None  # of the metric that selects; None where no round had one


@dataclass
class StageRecord:
    """A stage's rounds, and the best of them."""

    name: str
    local_only: bool = False  # every parameter stays at the centres (``local_layers: [all]``)
    rounds: list[RoundRecord] = field(default_factory=list)
    best: BestRound | None = None  # of the shared model
    best_by_centre: dict[str, BestRound] = field(default_factory=dict)  # each centre's own, if `local_only`
    finished: bool = False


@dataclass
class CentreRecord:
    """Who took part, and what the centre holds."""

    counts: dict[str, dict[str, dict[str, float]]]  # {split: {task: {class or "unlabelled": scans}}}
    sources: list[str]
    skipped: int  # scans that could not be read
    skipped_by_reason: dict[str, int]
    versions: dict[str, str]  # {package: version}
    device: str


@dataclass
class Exclusion:
    """A centre that was left out of a round, and why."""

    stage: str
    round: int
    centre: str
    reason: str
    code: RefusalCode | None  # of the reason, for programs; None in a run of 0.1.0, which had no codes


@dataclass
class CrossSiteScores:
    """Scores of each centre's own model of the last round at every centre (``evaluation.cross_site``)."""

    stage: str
    round: int
    split: str
    tasks: dict[str, dict[str, dict[str, CentreScores]]]  # {task: {trained at: {scored at: ...}}}


@dataclass
class ImageStatistic:
    """A histogram of an image statistic over each centre's scans, and its distance from the others'."""

    name: str
    unit: str
    bin_edges: list[float]  # [bins + 1]
    scans: dict[str, float]  # {centre: scans counted}
    centres: dict[str, list[float]]  # {centre: fraction of its scans in each bin}
    drift: dict[str, float]  # {centre: Jensen-Shannon distance from all others, 0 to 1}


@dataclass
class FittedTask:
    """What the coordinator filled into a task when the run began."""

    classes: list[str]
    clustering_id: str


@dataclass
class RunResult:
    """Everything a run found out."""

    run_id: str
    recipe: str
    mode: str  # federated | central | local
    seed: int
    started: str  # ISO 8601, UTC
    config: dict[str, Any]  # as in config.yaml
    schema_version: int = SCHEMA_VERSION
    status: RunStatus = RunStatus.RUNNING
    seconds: float = 0.0
    centres: dict[str, CentreRecord] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    test: dict[str, TaskScores] = field(default_factory=dict)  # {task: ...}, of the best round
    left_out: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fitted_tasks: dict[str, FittedTask] = field(default_factory=dict)
    # {"cohort/split/task": scans per class, then unlabelled}; only with ``privacy.secagg.scope=all``
    label_counts: dict[str, list[float]] = field(default_factory=dict)
    image_statistics: dict[str, ImageStatistic] = field(default_factory=dict)
    cross_site: CrossSiteScores | None = None
    clip_norm: float | None = None  # the adaptive clip norm reached (``privacy=central``)
    # The test's sums as nested lists, for a cross-validation to add up.
    test_sums: dict[str, Any] = field(default_factory=dict)


@dataclass
class CrossValidationSummary:
    """What the runs of a cross-validation say together: the form of ``crossval.json``."""

    evaluation: str  # loco | kfold
    untrained: dict[str, str]  # {fold that could not be trained: why}
    folds: dict[
        str, dict[str, Metrics]
    ]  # {fold: {task: test metrics}}: mean over centres; loco: of the centre left out
    total: RunResult  # as of one run: `test` is computed from the sum of the folds' sums


_ADAPTER = TypeAdapter(RunResult)
_ROUND_ADAPTER = TypeAdapter(RoundRecord)
_SUMMARY_ADAPTER = TypeAdapter(CrossValidationSummary)
_CROSS_SITE_ADAPTER = TypeAdapter(CrossSiteScores)
_IMAGE_STATISTICS_ADAPTER = TypeAdapter(dict[str, ImageStatistic])


def result_to_dict(result: RunResult | CrossValidationSummary) -> dict[str, Any]:
    """Return plain values, as they stand in ``metrics.json``, ``crossval.json`` and in a checkpoint."""
    return dataclasses.asdict(result)


def parse_result(values: Any) -> RunResult:
    """Build the records from plain values.

    Raises:
        ConsiliumError: 0.1.0 wrote them.
        pydantic.ValidationError: they have another form.
    """
    _refuse_old_form(values)
    return _ADAPTER.validate_python(values)


def parse_round(values: Any) -> RoundRecord:
    """Build one round's record from plain values. Raises pydantic.ValidationError."""
    return _ROUND_ADAPTER.validate_python(values)


def parse_task_scores(row: Mapping[str, Any]) -> TaskScores:
    """Build a task's scores from a row of the ledger's table `scores`, with or without each centre's own.

    The values are not validated again: of a long run the console reads some 10,000 centres' scores a page.
    """
    summaries = row["summaries"]
    worst = {metric: WorstCentre(**lowest) for metric, lowest in summaries["worst"].items()}
    centres = {name: CentreScores(**scores) for name, scores in row.get("centres", {}).items()}
    return TaskScores(**{**summaries, "worst": worst}, centres=centres)


def parse_summary(values: Any) -> CrossValidationSummary:
    """Build a cross-validation's summary from plain values. Raises as `parse_result` does."""
    _refuse_old_form(values)
    return _SUMMARY_ADAPTER.validate_python(values)


def parse_cross_site(values: Any) -> CrossSiteScores:
    """Build cross-site scores from plain values (the ledger's artifact). Raises pydantic.ValidationError."""
    return _CROSS_SITE_ADAPTER.validate_python(values)


def parse_image_statistics(values: Any) -> dict[str, ImageStatistic]:
    """Build image statistics from plain values (the ledger's artifact). Raises pydantic.ValidationError."""
    return _IMAGE_STATISTICS_ADAPTER.validate_python(values)


def is_old_form(values: Any) -> bool:
    """Tell whether 0.1.0 wrote a result or a summary; it wrote no version."""
    return isinstance(values, Mapping) and "run" in values and "schema_version" not in values


def _refuse_old_form(values: Any) -> None:
    if is_old_form(values):
        raise ConsiliumError(
            f"the result of run '{values['run']}' was written by version 0.1.0; "
            "convert all finished runs with `consilium-server upgrade`"
        )


def metrics_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``metrics.json``, in which every field is present."""
    schema = _ADAPTER.json_schema(mode="serialization")
    schema["properties"]["schema_version"] = {"const": SCHEMA_VERSION, "title": "Schema Version"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"consilium/metrics.json/{SCHEMA_VERSION}",
        **schema,
        "title": "metrics.json of a Consilium run",
    }


if __name__ == "__main__":  # > docs/metrics.schema.json
    sys.stdout.write(json.dumps(metrics_schema(), indent=2) + "\n")
