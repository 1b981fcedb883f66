"""Data quality: what the centres' scans look like, and how far each centre's lie from the others'. Asked once a run, as an additive query."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.config.compose import config_to_dict
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import StatisticsRequest, Sums
from server.analysis.additive_queries import query_per_centre
from server.run.run_state import Run


def collect_image_statistics(run: Run) -> None:
    """Ask every centre that is there; what they say goes to the result and the ledger. One that will not say is none the worse for it.

    Not with `privacy=patient`: the histograms tell of training scans without noise. Nor where no centre is seen alone: they are nothing but that.
    """
    if (
        not run.config.evaluation.image_statistics
        or run.config.privacy.dp_level == "patient"
        or hides_statistics(run.config)
    ):
        return
    if known := run.ledger.read_artifacts(run.run_id).get("quality"):  # a run that goes on
        run.result["quality"] = known
        return
    requests = {
        c: StatisticsRequest(run.run_id, config_to_dict(run.config), "quality", "") for c in run.members
    }
    run.result["quality"] = summarise_histograms(query_per_centre(run, requests, "data quality"))
    run.ledger.add_artifact(run.run_id, "quality", run.result["quality"])


def summarise_histograms(sums: Sums) -> dict[str, Any]:
    """{measure: {"name", "unit", "edges" [bins + 1], "scans": {centre: n}, "centres": {centre: shares [bins]}, "drift": {centre: distance}}}."""
    found = {}
    for name, measure in IMAGE_STATISTICS.items():
        own = {
            key.split("/")[0]: array
            for key, array in sorted(sums.items())
            if key.endswith(f"/quality/{name}") and array.sum()
        }
        found[name] = {
            "name": measure.name,
            "unit": measure.unit,
            "edges": measure.bin_edges.tolist(),
            "scans": {c: float(array.sum()) for c, array in own.items()},
            "centres": {c: (array / array.sum()).round(6).tolist() for c, array in own.items()},
            "drift": compute_drift(own),
        }
    return found


def compute_drift(histograms: Sums) -> dict[str, float]:
    """{centre: Jensen-Shannon distance (Endres and Schindelin 2003, base 2) between its histogram and that of all others together}: 0 alike, 1
    nothing in common. Nothing for a centre that has no other beside it."""
    total = np.sum(list(histograms.values()), axis=0)
    others = {c: total - array for c, array in histograms.items()}
    return {
        c: round(float(jensenshannon(array, others[c].clip(0), base=2)), 4)
        for c, array in histograms.items()
        if len(histograms) > 1
    }
