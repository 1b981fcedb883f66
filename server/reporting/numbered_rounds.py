"""A run's rounds in one sequence over all stages, as curves and tables show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.run.records import RoundRecord, RunResult


@dataclass(frozen=True)
class RoundPosition:
    """Where a round stands in a run."""

    number: int  # over all stages, from 1
    stage: str
    round: int  # in its stage; round 0 is the validation of the stage's first weights


@dataclass(frozen=True)
class NumberedRound(RoundPosition):
    """A round's record and where it stands in the run."""

    record: RoundRecord


Rounds = Sequence[NumberedRound]


def list_rounds(result: RunResult) -> list[NumberedRound]:
    """Return the rounds of all stages in their order."""
    rounds: list[NumberedRound] = []
    for stage in result.stages:
        for record in stage.rounds:
            rounds.append(NumberedRound(len(rounds) + 1, stage.name, record.round, record))
    return rounds


def select_indices(stages: Sequence[str], step: int) -> list[int]:
    """Return every `step`th index, and the first and the last index of each stage.

    `stages` holds the stage of each round.
    """
    last = len(stages) - 1
    selected = []
    for index, stage in enumerate(stages):
        is_first = index == 0 or stages[index - 1] != stage
        is_last = index == last or stages[index + 1] != stage
        if index % step == 0 or is_first or is_last:
            selected.append(index)
    return selected
