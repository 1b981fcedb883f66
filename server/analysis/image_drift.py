"""Compare the centres' images: histograms of image statistics, and each centre's distance from the others.

Asked once a run, as an additive query.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.privacy.secure_aggregation import hides_statistics
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import StatisticsRequest, Sums
from server.analysis.additive_queries import query_per_centre, select_by_cohort
from server.ledger.ledger import ArtifactKind
from server.run.records import ImageStatistic, parse_image_statistics
from server.run.run_state import Run

QUERY_NAME = "quality"


def collect_image_statistics(run: Run) -> None:
    """Ask every member of the run; the statistics go to the result and the ledger. A centre may decline.

    Nobody is asked with `privacy.dp_level=patient`, because the histograms describe training scans without
    noise, nor where no centre may be seen alone. A resumed run takes them from the ledger.
    """
    if not run.config.evaluation.image_statistics:
        return
    if run.config.privacy.dp_level == "patient" or hides_statistics(run.config):
        return
    saved = run.ledger.read_artifacts(run.run_id).get(ArtifactKind.IMAGE_STATISTICS)
    if saved:
        run.result.image_statistics = parse_image_statistics(saved)
        return
    request = StatisticsRequest(run.run_id, run.config_values, QUERY_NAME, "")
    requests = dict.fromkeys(run.membership.members, request)
    statistics = summarise_histograms(query_per_centre(run, requests, "image statistics"))
    run.result.image_statistics = statistics
    content = {name: dataclasses.asdict(statistic) for name, statistic in statistics.items()}
    run.ledger.add_artifact(run.run_id, ArtifactKind.IMAGE_STATISTICS, content)


def summarise_histograms(sums: Sums) -> dict[str, ImageStatistic]:
    """Return every image statistic by name, from the centres' histograms [bins].

    Their keys are `SumKey(cohort, "quality", name)`.
    """
    statistics = {}
    for name, measure in IMAGE_STATISTICS.items():
        histograms = {}
        scans = {}
        fractions = {}
        for cohort, histogram in select_by_cohort(sums, QUERY_NAME, name).items():
            num_scans = float(histogram.sum())
            if num_scans:
                histograms[cohort] = histogram
                scans[cohort] = num_scans
                fractions[cohort] = (histogram / num_scans).round(6).tolist()
        statistics[name] = ImageStatistic(
            name=measure.name,
            unit=measure.unit,
            bin_edges=measure.bin_edges.tolist(),
            scans=scans,
            centres=fractions,
            drift=compute_drift(histograms),
        )
    return statistics


def compute_drift(histograms: Sums) -> dict[str, float]:
    """Return {centre: Jensen-Shannon distance between its histogram and that of all others together}.

    The distance (Endres and Schindelin, "A new metric for probability distributions", IEEE Trans. Inf. Theory
    49:1858, 2003, base 2) is 0 for equal histograms and 1 for those with nothing in common. A single centre
    has none.
    """
    if len(histograms) < 2:
        return {}
    total = np.sum(list(histograms.values()), axis=0)
    drift = {}
    for centre, histogram in histograms.items():
        others = (total - histogram).clip(0)
        drift[centre] = round(float(jensenshannon(histogram, others, base=2)), 4)
    return drift
