"""Results with every part that a report may show, made up without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.config.parse import config_to_dict
from common.config.schema import Config, EvaluationConfig, MetricName, Task
from common.learning.class_imbalance import compute_effective_centres
from common.learning.metrics import compute_regression_sums, compute_score_histogram
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.protocol.messages import Sums
from common.utils.errors import RefusalCode
from server.analysis.score_tables import compute_scores, get_selection_score
from server.run.records import (
    BestRound,
    CentreRecord,
    CentreRound,
    Exclusion,
    RoundRecord,
    RunResult,
    RunStatus,
    StageRecord,
    TaskScores,
    WorstCentre,
)

CENTRES = ("north", "east", "south", "west")
STAGES = {"pretraining": 3, "main": 6}  # {stage: rounds}
NUM_SCANS = {"train": 338, "val": 88, "test": 60}
ONE_CLASS_CENTRE = 2  # index of the centre whose scans are all negative
BYTES = 9_400_000  # of a message with weights
TASKS = {
    "moco": Task(type="contrastive"),
    "covid": Task(),
    "finding": Task(type="multiclass", classes=["none", "typical", "other"]),
    "brixia": Task(type="regression", label_columns=["left", "right"]),
    "lesion": Task(type="segmentation", severity_column="severity"),
}


# ---- a run of two stages of a binary task and the source task


def make_result(centres: Sequence[str] = CENTRES) -> RunResult:
    """Return a finished federated run's result. The third centre has scans of one class only."""
    config = Config(recipe="multisource", tasks={"covid": Task(), "source": _source_task(centres)})
    maker = _ScoreMaker(config, centres, np.random.default_rng(4))
    stages = [_make_stage(maker, index, name) for index, name in enumerate(STAGES)]
    return RunResult(
        run_id="2026-03-01-multisource-7f3a",
        recipe="multisource",
        mode="federated",
        seed=1,
        started="2026-03-01 12:00 UTC",
        config={"recipe": "multisource", "aggregation": {"tau": 1.0}},
        status=RunStatus.FINISHED,
        seconds=154.2,
        centres={name: _make_centre(centres, index) for index, name in enumerate(centres)},
        stages=stages,
        test=maker.make_scores(1.6, 0.8, with_sums=True),
        left_out=[
            Exclusion(
                "main", 3, centres[1], "no reply before the round timeout of 60 s", RefusalCode.OFFLINE
            ),
            Exclusion("main", 5, centres[-1], "update not finite", RefusalCode.BAD_REPLY),
        ],
        notes=["Resumed once, after round 2 of main."],
    )


def _source_task(centres: Sequence[str]) -> Task:
    return Task(type="multiclass", classes=list(centres), inference=False)


@dataclass
class _ScoreMaker:
    """Makes scores up from random predictions of a given skill."""

    config: Config
    centres: Sequence[str]
    random: np.random.Generator

    def make_scores(
        self, skill: float, source_accuracy: float, with_sums: bool = False
    ) -> dict[str, TaskScores]:
        """Return the scores of both tasks; each centre sees one class of the source task."""
        sums: Sums = {}
        for index in range(len(self.centres)):  # their indices for names: a hostile name may hold a slash
            labels = self.random.integers(0, 2, 60).astype(float) * (index != ONE_CLASS_CENTRE)
            separation = skill * (1 - 0.15 * (index % 4)) * (2 * labels - 1)
            logits = self.random.normal(0, 2, 60) + separation
            confusion = np.zeros((len(self.centres), len(self.centres)))
            confusion[index, index] = 30 * source_accuracy
            confusion[index, (index + 1) % len(self.centres)] = 30 * (1 - source_accuracy)
            sums[f"{index}/covid/hist"] = compute_score_histogram(logits, labels)
            sums[f"{index}/covid/loss"] = np.array([24.0, 60.0])
            sums[f"{index}/source/confusion"] = confusion
            sums[f"{index}/source/loss"] = np.array([15.0, 30.0])
        scores = compute_scores(sums, self.config, ["covid", "source"], with_sums)
        return {task: self._name_centres(task_scores) for task, task_scores in scores.items()}

    def _name_centres(self, scores: TaskScores) -> TaskScores:
        worst = {}
        for metric, lowest in scores.worst.items():
            name = None if lowest.centre is None else self.centres[int(lowest.centre)]
            worst[metric] = WorstCentre(lowest.value, name)
        centres = {name: scores.centres[str(index)] for index, name in enumerate(self.centres)}
        sums = {self.centres[int(index)]: values for index, values in scores.sums.items()}
        return replace(scores, centres=centres, worst=worst, sums=sums)


def _make_stage(maker: _ScoreMaker, index: int, name: str) -> StageRecord:
    first = RoundRecord(0, validation=maker.make_scores(0.3 + index, 0.4))
    rounds = [first]
    for number in range(1, STAGES[name] + 1):
        rounds.append(_make_round(maker, index, number))
    return StageRecord(name, rounds=rounds, best=BestRound(name, STAGES[name] - 1, 0.91), finished=True)


def _make_round(maker: _ScoreMaker, stage: int, number: int) -> RoundRecord:
    """Return a round.

    In the stage main, the second centre misses round 3, and the last centre's update of round 5 is left out.
    """
    present = list(maker.centres)
    if (stage, number) == (1, 3):
        present.remove(maker.centres[1])
    replies = {}
    for index, centre in enumerate(present):
        loss = 0.7 / (number + stage) + 0.05 * (index % 5)
        seconds = 2.0 + 0.7 * (index % 6)
        replies[centre] = CentreRound(True, scans=30 + index, steps=4, seconds=seconds, loss=loss, norm=0.4)
    if (stage, number) == (1, 5):
        refused = replies[maker.centres[-1]]
        refused.accepted = False
        refused.reason = "update not finite"
        refused.code = RefusalCode.BAD_REPLY
        refused.loss = float("nan")
    accepted = [centre for centre, reply in replies.items() if reply.accepted]
    unequal = dict.fromkeys(accepted, 1 / (len(accepted) + 1))
    if maker.centres[0] in unequal:
        unequal[maker.centres[0]] *= 2
    equal = dict.fromkeys(accepted, 1 / len(accepted))
    weights = {"backbone": unequal, "covid": unequal, "source": equal}
    return RoundRecord(
        number,
        seconds=7.5 + 0.3 * number,
        bytes_up=BYTES * len(present),
        bytes_down=BYTES * len(maker.centres),
        weights=weights,
        effective_centres={group: compute_effective_centres(values) for group, values in weights.items()},
        centres=replies,
        validation=maker.make_scores(0.4 + 0.25 * number + stage, 0.5 + 0.05 * number),
    )


def _make_centre(centres: Sequence[str], index: int) -> CentreRecord:
    counts: dict[str, dict[str, dict[str, float]]] = {}
    for split, num_scans in NUM_SCANS.items():
        positives = 0 if index == ONE_CLASS_CENTRE else num_scans // 2
        sources: dict[str, float] = {name: 0 for name in centres}
        sources[centres[index]] = num_scans
        negatives = num_scans - 3 * index % num_scans
        counts[split] = {
            "covid": {"no covid": negatives, "covid": positives, "unlabelled": 0.0},
            "source": {**sources, "unlabelled": index},
        }
    return CentreRecord(
        counts=counts,
        sources=[centres[index]],
        skipped=index,
        skipped_by_reason={"no pixel data": index} if index else {},
        versions={"consilium": "0.1.0", "torch": "2.15"},
        device="cpu",
    )


# ---- a run whose stages train different tasks


def make_mixed_result(
    stages: Mapping[str, tuple[int, list[str]]], task: str = "covid", metric: MetricName = "auc"
) -> RunResult:
    """Return a run of {stage: (rounds, tasks)} whose best round is selected by `task`.

    The last stage's tasks are tested.
    """
    evaluation = EvaluationConfig(task=task, metric=metric)
    config = Config(recipe="mixed", tasks=TASKS, evaluation=evaluation)
    records = []
    tasks: list[str] = []
    for name, (num_rounds, tasks) in stages.items():
        rounds = [_make_mixed_round(config, tasks, number) for number in range(num_rounds + 1)]
        value = get_selection_score(rounds[-1].validation, evaluation)
        records.append(StageRecord(name, rounds=rounds, best=BestRound(name, num_rounds, value)))
    return replace(
        make_result(),
        recipe="mixed",
        config=config_to_dict(config),
        stages=records,
        test=compute_scores(make_sums(99, 1.5), config, tasks, with_sums=True),
    )


def _make_mixed_round(config: Config, tasks: list[str], number: int) -> RoundRecord:
    replies = {}
    if number > 0:
        for centre in CENTRES:
            replies[centre] = CentreRound(True, scans=40, steps=4, seconds=2.0, loss=1 / (1 + number))
    validation = compute_scores(make_sums(number, 0.3 * number), config, tasks)
    return RoundRecord(number, seconds=2.0, bytes_up=1, bytes_down=1, centres=replies, validation=validation)


def make_sums(seed: int, skill: float) -> Sums:
    """Return the centres' sums for `TASKS`.

    West has masks only; south has neither masks nor severity scores, and its scans are of one class.
    """
    random = np.random.default_rng(seed)
    sums: Sums = {}
    for index, centre in enumerate(CENTRES):
        num_scans = dict.fromkeys(TASKS, 40)
        if centre == "west":
            num_scans |= {"covid": 0, "finding": 0, "brixia": 0}
        if centre == "south":
            num_scans |= {"brixia": 0, "lesion": 0}
        labels = random.integers(0, 2, num_scans["covid"]) * float(centre != "south")
        severity = random.integers(0, 4, (num_scans["brixia"], 2)).astype(float)
        masks = (random.uniform(size=(num_scans["lesion"], 1, 16, 16)) < 0.2).astype(np.uint8)
        affected = masks.mean((1, 2, 3))
        logits = random.normal(size=len(labels)) + skill * (2 * labels - 1)
        confusion = random.integers(1, 9, (3, 3)) * float(num_scans["finding"] > 0)
        sums |= {
            f"{centre}/covid/hist": compute_score_histogram(logits, labels),
            f"{centre}/finding/confusion": confusion + skill * num_scans["finding"] * np.eye(3),
            f"{centre}/brixia/regression": compute_regression_sums(
                severity + random.normal(0, 1 / (1 + skill), severity.shape), severity
            ),
            f"{centre}/lesion/overlap": compute_overlap_sums(
                np.clip(masks * skill / 2 + random.uniform(0, 0.6, masks.shape), 0, 1), masks
            ),
            f"{centre}/lesion/joint": compute_joint_histogram(
                affected + random.normal(0, 0.02, len(affected)),
                100 * affected,
                AFFECTED_FRACTION_EDGES,
                SEVERITY_EDGES,
            ),
        }
        for task, count in num_scans.items():
            sums[f"{centre}/{task}/loss"] = np.array([count * (1 + 0.1 * index) / (1 + skill), count])
    return sums
