"""Rows of the ledger as the records that reports are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from server.ledger.ledger import ArtifactKind, Ledger
from server.ledger.reader import Row
from server.run.records import (
    CentreRound,
    CrossSiteScores,
    ImageStatistic,
    parse_cross_site,
    parse_image_statistics,
)

CONTRIBUTION_FIELDS = [field.name for field in dataclasses.fields(CentreRound)]


def index_rows(rows: Iterable[Row], column: str) -> dict[str, Row]:
    """Return {value of a column: row}; of several rows with the same value, the last."""
    return {row[column]: row for row in rows}


def parse_contribution(row: Row) -> CentreRound:
    """Build a centre's part in a round from a row of the table `contributions`."""
    values = {name: row[name] for name in CONTRIBUTION_FIELDS if row[name] is not None}
    return CentreRound(**values)  # the record's default stands for NULL


def load_image_statistics(ledger: Ledger, run_id: str) -> dict[str, ImageStatistic]:
    """Return a run's image statistics by name; {} where none were collected."""
    return parse_image_statistics(ledger.read_artifacts(run_id).get(ArtifactKind.IMAGE_STATISTICS, {}))


def load_cross_site_scores(ledger: Ledger, run_id: str) -> CrossSiteScores | None:
    """Return a run's cross-site scores, if they were computed."""
    artifacts = ledger.read_artifacts(run_id)
    if ArtifactKind.CROSS_SITE not in artifacts:
        return None
    return parse_cross_site(artifacts[ArtifactKind.CROSS_SITE])
