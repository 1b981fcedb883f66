"""The stage in progress: what the steps of a round need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.schema import Stage
from server.run.records import StageRecord


@dataclass(frozen=True)
class ActiveStage:
    """A stage's name and settings, and the record of its rounds so far."""

    name: str
    settings: Stage
    record: StageRecord

    @property
    def local_only(self) -> bool:
        """Whether every parameter stays at the centres, so that nothing is aggregated."""
        return self.record.local_only

    @property
    def last_round(self) -> int:
        """The number of the last round that is finished."""
        return len(self.record.rounds) - 1
