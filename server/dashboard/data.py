"""What the data page shows: label counts, image statistics and the drift of each centre."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from server.analysis.score_tables import group_counts_by_class
from server.dashboard.charts import MAX_CENTRE_LINES, NUM_SELECTED_CENTRES, with_legend
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring import centre_reports, run_info
from server.reporting.centre_tables import build_label_count_tables
from server.reporting.figures import build_image_statistics_figures
from server.reporting.ledger_records import load_image_statistics
from server.run.records import ImageStatistic


class Drift(NamedTuple):
    """How far each centre's histogram is from that of all others."""

    statistic: str
    distances: dict[str, float]  # {centre: Jensen-Shannon distance}


def data_view(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Return what the data page shows of a run."""
    statistics = load_image_statistics(ledger, row["id"])
    reports = centre_reports.load_centre_reports(ledger, row["id"])
    centres = run_info.list_cohorts(row)
    config = run_info.load_config_with_sources(row, reports)
    drawn = {name: keep_most_drifted(statistic) for name, statistic in statistics.items()}
    drifts = []
    for statistic in statistics.values():
        if statistic.drift:
            drifts.append(Drift(statistic.name, statistic.drift))
    counts = {}
    for centre, report in reports.items():
        counts[centre] = group_counts_by_class(centre_reports.select_known_counts(report, config), config)
    return {
        "figures": list(map(with_legend, build_image_statistics_figures(drawn, centres))),
        "drifts": drifts,
        "centres": centres,
        "label_counts": build_label_count_tables(counts),
        "has_image_statistics": bool(statistics),
    }


def keep_most_drifted(statistic: ImageStatistic) -> ImageStatistic:
    """Return the statistic with only those of many centres that are farthest from the others."""
    if len(statistic.centres) <= MAX_CENTRE_LINES:
        return statistic
    farthest = sorted(statistic.drift, key=lambda centre: -statistic.drift[centre])[:NUM_SELECTED_CENTRES]
    centres = {name: fractions for name, fractions in statistic.centres.items() if name in farthest}
    return replace(statistic, centres=centres)
