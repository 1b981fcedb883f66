"""Who is there, what do they hold, and do they run the same code: the beginning of a run, and the return of a centre that was away."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from common.compose import active, check, to_dict
from common.errors import ConsiliumError
from common.fingerprint import fingerprint
from common.messages import Hello, Presence, Query
from common.schema import Config
from common.secagg import hides_all
from common.tasks import columns_of
from server import scores
from server.orders import heed
from server.queries import ask
from server.soft_labels import cluster
from server.state import Paused, Run, Unlabelled, by_reason, reason_of

log = logging.getLogger("consilium.server")


def greet(run: Run) -> None:
    """Meet the centres at the start: enough of them, with a column for every task. Raises Paused or ConsiliumError."""
    refused = meet(run, run.expected, run.config.federation.wait)
    if len(run.presence) < run.quorum:
        absent = [c for c in run.expected if c not in run.presence]
        why = by_reason({c: refused[c] for c in absent if c in refused})
        more = f"start more nodes (simulation: --federation-config num-supernodes={len(run.expected)})"
        help_ = f"nothing heard from {', '.join(absent)}; {more}"
        raise Paused(f"{len(run.presence)} of {len(run.expected)} centres are ready, {run.quorum} are needed ({why or help_})")
    columns = sorted({c for p in run.presence.values() for c in p.columns})
    for name, task in run.config.tasks.items():
        for column in columns_of(name, task):
            if column not in columns:
                raise ConsiliumError(
                    f"no centre has a column '{column}' for task '{name}'; fill it at one centre, or set tasks.{name}.label to the column's name"
                )
    if not run.result:
        # One that comes late is not without a class: its source is as a rule its own name.
        sources = sorted({s for p in run.presence.values() for s in p.sources} | (set(run.expected) - set(run.presence)))
        run.config = cluster(run, with_sources(run.config, sources))
        count(run, list(run.presence))
        for name in [t for stage in run.config.stages.values() if stage.rounds for t in active(run.config, stage)]:
            if not any(n[:-1].sum() for key, n in run.counts.items() if key.endswith(f"/train/{name}")):
                raise Unlabelled(f"no centre has a labelled training scan for task '{name}'; fill the column or drop the task")
        run.result = scores.new_result(run.id, run.config, run.presence, run.counts)
        run.result["filled"] = {n: [t.classes, t.clustering] for n, t in run.config.tasks.items()}
        run.result["notes"] += unseen(run)
        if hides_all(run.config):
            run.result["counts"] = {key: n.tolist() for key, n in run.counts.items()}
    else:
        run.counts = {key: np.array(n) for key, n in run.result.get("counts", {}).items()}
        count(run, list(run.presence))
    (run.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(run.config), sort_keys=False))


def unseen(run: Run) -> list[str]:
    """What secure aggregation leaves unseen, for the report."""
    said = []
    if run.config.privacy.secagg:
        said.append("secure aggregation: no contribution was seen alone, so none was screened by its norm; privacy.secagg.clip limits each")
    if hides_all(run.config):
        said.append(
            "privacy.secagg.hide=all: no centre's own scores are known; 'all' are all centres' scans, of which macro and worst are too"
        )
        said.append("privacy.secagg.hide=all: data quality is not compared, which looks at each centre's histograms")
    return said


def meet(run: Run, centres: list[str], wait: float) -> dict[str, str]:
    """Hear who is there, up to `wait` seconds; a centre that runs other code has no part. Returns {centre: why it was refused}."""
    refused: dict[str, str] = {}
    began = time.monotonic()
    run.ledger.progress(run.id, *run.at, "meet", asked=centres)
    for received in run.transport.greet(Hello(run.id, to_dict(run.config)), centres, wait):
        if received is None:
            heed(run)
            continue
        reply = received.reply
        if not isinstance(reply, Presence):
            refused[received.centre] = reason_of(reply)
        elif reply.fingerprint != fingerprint():
            refused[received.centre] = f"runs other code ({reply.fingerprint}, here {fingerprint()}); install the same version"
        elif received.centre in centres:
            run.presence[received.centre] = reply
        why_not, seconds = refused.get(received.centre), time.monotonic() - began
        run.ledger.progress(run.id, *run.at, "meet", centre=received.centre, seconds=seconds, reason=why_not)
    run.refused |= refused
    for centre, why in refused.items():
        run.ledger.event(run.id, "refused", why, centre)
        log.warning("%s: %s", centre, why)
    return refused


def count(run: Run, centres: list[str]) -> None:
    """Ask how many scans of each class there are; prior and centre weights come from these counts."""
    if not (hides_all(run.config) and run.counts):  # a second sum, with those who came later, would differ by their own counts
        run.counts |= ask(run, {c: Query(run.id, to_dict(run.config), "counts", "") for c in centres})
    for centre in centres:
        said = run.presence[centre]
        held = {key: n.tolist() for key, n in run.counts.items() if key.split("/")[0] in said.cohorts}
        facts = {"counts": held, "sources": said.sources, "versions": said.versions, "skipped": said.skipped, "device": said.device}
        facts |= {"scans": said.scans, "policy": said.policy, "fingerprint": said.fingerprint}
        run.ledger.add_centre(run.id, centre, facts)


def readmit(run: Run) -> None:
    """A centre that was away and is back takes part again."""
    absent = [c for c in run.expected if c not in run.presence]
    if absent:
        meet(run, absent, 0.0)
        back = [c for c in absent if c in run.presence]
        if back:
            count(run, back)


def with_sources(config: Config, sources: list[str]) -> Config:
    """The configuration with the federation's sources as the classes of every task that names none."""
    tasks = {n: replace(t, classes=sources) if t.kind == "multiclass" and not t.classes else t for n, t in config.tasks.items()}
    return check(replace(config, tasks=tasks))


def filled(config: Config, known: dict[str, list[Any]]) -> Config:
    """The configuration of a run that goes on, with the classes and clusterings that its beginning found."""
    tasks = {n: replace(t, classes=known[n][0], clustering=known[n][1]) for n, t in config.tasks.items()}
    return check(replace(config, tasks=tasks))
