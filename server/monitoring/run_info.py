"""What a run's row in the ledger says: its centres, cohorts and planned rounds."""

from __future__ import annotations

from collections.abc import Mapping

from common.config.parse import parse_config
from common.config.schema import Config
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.centre_reports import CentreReport, list_sources
from server.rounds.membership import fill_source_classes
from server.run.operator_commands import ACTIVE_STATUSES
from server.run.run_state import POOLED_CENTRE


def select_latest_run(ledger: Ledger) -> Row | None:
    """Return the run to show first: the latest that is active, or else the latest."""
    rows = ledger.read_runs()
    for row in reversed(rows):
        if row["status"] in ACTIVE_STATUSES:
            return row
    return rows[-1] if rows else None


def list_expected_centres(row: Row) -> list[str]:
    """Return the centres that a run asks: in a central run the one that holds all data."""
    if row["mode"] == "central":
        return [POOLED_CENTRE]
    return list_cohorts(row)


def list_cohorts(row: Row) -> list[str]:
    """Return the centres whose scans are scored and described, each by its name also in a central run."""
    return parse_config(row["config"]).federation.centres


def planned_rounds_by_stage(row: Row) -> dict[str, int]:
    """Return {stage: rounds that it has at most}, in the order of the stages; only those with rounds."""
    stages = parse_config(row["config"]).stages
    return {name: stage.rounds for name, stage in stages.items() if stage.rounds}


def load_config_with_sources(row: Row, reports: Mapping[str, CentreReport]) -> Config:
    """Return a run's configuration, with the sources as the classes of a task that names none.

    The ledger's configuration is from before the centres reported their sources. The source of a centre that
    has not joined is as a rule its own name.
    """
    sources = list_sources(reports.values()) | (set(list_expected_centres(row)) - reports.keys())
    return fill_source_classes(parse_config(row["config"]), sorted(sources))
