"""What the privacy page shows: each centre's privacy loss, and what left it by kind of message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from server.ledger import tables, views
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.centre_reports import CentreReport, load_centre_reports
from server.monitoring.run_info import list_expected_centres
from server.reporting.ledger_records import index_rows

MESSAGE_KINDS = {  # {activity of the ledger's table `progress`: content of the centres' replies}
    "handshake": "name, sources, software versions and scan counts, sent when a centre joins",
    "train": "weight updates, counts and losses",
    "secure sum": "the same, masked: only the sum over centres can be read",
    "scores": "score histograms and other sums, for the metrics",
    "counts": "scans per class",
    "moments": "means and covariances of features by class",
    "clusters": "sums of a clustering step",
    "quality": "histograms of lung area, slice positions and intensity",
}


class EpsilonBudget(NamedTuple):
    """A centre's privacy loss against the limit of its policy."""

    centre: str
    spent: float | None = None  # None: nothing was counted yet
    limit: float | None = None  # None: no limit
    stage: str = ""  # of the round that was counted last
    round: int = 0

    @property
    def spent_percent(self) -> float | None:
        """Return the part of the limit that is spent, in percent."""
        if self.spent is None or not self.limit:
            return None
        return 100 * self.spent / self.limit


class MessageTotal(NamedTuple):
    """How much of one kind of message left a centre."""

    messages: int
    bytes: int | None  # None: not recorded


class CentreTraffic(NamedTuple):
    """What left a centre."""

    centre: str
    totals: list[MessageTotal | None]  # of each kind; None: no message of it


def privacy_view(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Return what the privacy page shows of a run."""
    reports = load_centre_reports(ledger, row["id"])
    centres = list(dict.fromkeys([*list_expected_centres(row), *reports]))
    last_accepted = index_rows(views.last_accepted(ledger, row["id"]), "centre")
    budgets = []
    for centre in centres:
        limit = reports.get(centre, CentreReport()).epsilon_limit
        budgets.append(_make_budget(centre, limit, last_accepted.get(centre)))
    totals = _read_message_totals(ledger, row["id"])
    sent_kinds = {kind for _, kind in totals}
    kinds = [kind for kind in MESSAGE_KINDS if kind in sent_kinds]
    return {
        "settings": row["config"].get("privacy", {}),
        "budgets": budgets,
        "kinds": {kind: MESSAGE_KINDS[kind] for kind in kinds},
        "traffic": _tabulate_traffic(totals, centres, kinds),
    }


def _make_budget(centre: str, limit: float | None, contribution: Row | None) -> EpsilonBudget:
    if contribution is None:
        return EpsilonBudget(centre, limit=limit)
    return EpsilonBudget(centre, contribution["epsilon"], limit, contribution["stage"], contribution["round"])


def _read_message_totals(ledger: Ledger, run_id: str) -> dict[tuple[str, str], MessageTotal]:
    """Return {(centre, kind of message): total}."""
    progress = tables.progress.c
    query = (
        sa.select(
            progress.centre,
            progress.activity,
            sa.func.count().label("messages"),
            sa.func.sum(progress.bytes_up).label("bytes"),
        )
        .where(progress.run_id == run_id, progress.centre.is_not(None))
        .group_by(progress.centre, progress.activity)
    )
    totals = {}
    for row in ledger.read(query):
        totals[row["centre"], row["activity"]] = MessageTotal(row["messages"], row["bytes"])
    return totals


def _tabulate_traffic(
    totals: dict[tuple[str, str], MessageTotal], centres: Sequence[str], kinds: Sequence[str]
) -> list[CentreTraffic]:
    senders = [centre for centre, _ in totals]
    traffic = []
    for centre in dict.fromkeys([*centres, *senders]):
        traffic.append(CentreTraffic(centre, [totals.get((centre, kind)) for kind in kinds]))
    return traffic
