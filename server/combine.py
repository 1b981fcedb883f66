"""From the contributions that arrived to the next weights: by which rule, weighed how, hidden by what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from common.compose import active
from common.messages import Contribution
from common.schema import Stage
from common.secagg import averaged, blank_change, settings_of
from server.aggregation import Spooled, group_weights, outliers, step, weighted_sum
from server.broadcast import rounded
from server.central import protected
from server.counts import counted, weights_in_sum
from server.robust import combined, krum, too_few
from server.secagg import Summed, TooFew, summed
from server.state import Paused, Run, leave_out

log = logging.getLogger("consilium.server")


def screened(run: Run, arrived: Mapping[str, Spooled]) -> dict[str, str]:
    """{centre: reason} of those too large to be used. With `privacy=central` all are clipped, and one centre's norm must not decide on another."""
    if run.config.privacy.kind == "central":
        return {}
    return outliers({c: s.norm for c, s in arrived.items()}, run.config.aggregation.outlier)


def secretly_added(run: Run, said: Mapping[str, Contribution], quorum: int) -> tuple[Summed | None, dict[str, str]]:
    """The sum of the changes that came masked, None where too few centres stayed for it; and {centre: why it is not in the sum}."""
    size = sum(e.stop - e.start for e in run.layout.floats if e.parameter)
    try:
        found = summed(run, said, size, blank_change(run.layout), quorum)
    except TooFew as few:
        log.warning("%s", few)
        return None, few.why
    if clipped := found.sums["clipped"][0]:
        log.warning("%d values of the changes were cut off at privacy.secagg.clip", clipped)
        run.ledger.event(run.id, "clipped", f"{clipped:.0f} values of all centres' changes lay beyond privacy.secagg.clip")
    return found, found.why


def combine(
    run: Run,
    name: str,
    stage: Stage,
    round: int,
    arrived: dict[str, Spooled],
    facts: dict[str, dict[str, Any]],
    found: Summed | None = None,
) -> dict[str, Any]:
    """Make the next weights of a round's contributions and drop the run's old ones; returns {group: {centre: weight}}. `facts` learn who was left
    out and what the round cost in privacy; `found` is the sum of changes that nobody saw alone. Raises Paused when too few teach some group for the
    rule to protect it."""
    settings = run.config.aggregation
    if settings.robust == "krum":
        why = f"one of the {settings.hostile} of {len(arrived)} contributions that lie farthest from their nearest (Krum)"
        for centre in krum(list(arrived.values()), run.layout, settings.hostile):
            facts[centre].update(accepted=False, reason=why)
            leave_out(run, name, round, centre, why)
            del arrived[centre]
    spooled = list(arrived.values())
    if found:  # added up already
        update = averaged(found.values, found.sums, run.layout, settings_of(run.config))
        run.weights = rounded(run, step(run.weights, update, spooled, settings, run.layout, run.moments))
        return weights_in_sum(run, stage, sorted(arrived))
    counts = {c: {t: counted(run, c, t) for t in run.config.tasks} for c in arrived}
    weights = group_weights(counts, settings, {t: run.config.tasks[t] for t in active(run.config, stage)})
    if few := too_few(weights, settings):
        raise Paused(f"stage '{name}' round {round}: {few}")
    if run.config.privacy.kind == "central":
        update, cost = protected(run, stage, spooled, weights)
        for centre in arrived:
            facts[centre].update(cost)
    elif settings.robust in ("median", "trimmed"):
        update = combined(spooled, weights, run.layout, settings)
    else:
        update = weighted_sum(spooled, weights, run.layout)
    run.weights = rounded(run, step(run.weights, update, spooled, settings, run.layout, run.moments))
    return weights
