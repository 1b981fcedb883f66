"""Data quality: what the centres' scans look like, and how far each centre's lie from the others'. Asked once a run, as an additive query."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.compose import to_dict
from common.messages import Query, Sums
from common.quality import MEASURES
from common.secagg import hides_all
from server.queries import apart
from server.state import Run


def survey(run: Run) -> None:
    """Ask every centre that is there; what they say goes to the result and the ledger. One that will not say is none the worse for it.

    Not with `privacy=patient`: the histograms tell of training scans without noise. Nor where no centre is seen alone: they are nothing but that.
    """
    if not run.config.evaluation.quality or run.config.privacy.kind == "patient" or hides_all(run.config):
        return
    if known := run.ledger.evidence(run.id).get("quality"):  # a run that goes on
        run.result["quality"] = known
        return
    requests = {c: Query(run.id, to_dict(run.config), "quality", "") for c in run.presence}
    run.result["quality"] = described(apart(run, requests, "data quality"))
    run.ledger.add_evidence(run.id, "quality", run.result["quality"])


def described(sums: Sums) -> dict[str, Any]:
    """{measure: {"name", "unit", "edges" [bins + 1], "scans": {centre: n}, "centres": {centre: shares [bins]}, "drift": {centre: distance}}}."""
    found = {}
    for name, measure in MEASURES.items():
        own = {key.split("/")[0]: array for key, array in sorted(sums.items()) if key.endswith(f"/quality/{name}") and array.sum()}
        found[name] = {
            "name": measure.name,
            "unit": measure.unit,
            "edges": measure.edges.tolist(),
            "scans": {c: float(array.sum()) for c, array in own.items()},
            "centres": {c: (array / array.sum()).round(6).tolist() for c, array in own.items()},
            "drift": drift(own),
        }
    return found


def drift(own: Sums) -> dict[str, float]:
    """{centre: Jensen-Shannon distance (Endres and Schindelin 2003, base 2) between its histogram and that of all others together}: 0 alike, 1
    nothing in common. Nothing for a centre that has no other beside it."""
    total = np.sum(list(own.values()), axis=0)
    others = {c: total - array for c, array in own.items()}
    return {c: round(float(jensenshannon(array, others[c].clip(0), base=2)), 4) for c, array in own.items() if len(own) > 1}
