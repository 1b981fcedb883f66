"""Who is there, what do they hold, and do they run the same code: the beginning of a run, and the return of a centre that was away."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from common.config.compose import config_to_dict, stage_tasks, validate_config
from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, JoinRequest, StatisticsRequest
from common.utils.errors import ConsiliumError
from server.analysis import score_tables
from server.analysis.additive_queries import query_sum
from server.analysis.federated_clustering import fit_clusters
from server.run.operator_commands import apply_pending_commands
from server.run.run_state import NoLabelledScans, Run, RunPaused, group_by_reason, refusal_reason

log = logging.getLogger("consilium.server")


def admit_centres(run: Run) -> None:
    """Meet the centres at the start: enough of them, with a column for every task. Raises Paused or ConsiliumError."""
    refused = handshake(run, run.expected_centres, run.config.federation.join_timeout)
    if len(run.members) < run.quorum:
        absent = [c for c in run.expected_centres if c not in run.members]
        why = group_by_reason({c: refused[c] for c in absent if c in refused})
        more = (
            f"start more nodes (simulation: --federation-config num-supernodes={len(run.expected_centres)})"
        )
        help_ = f"nothing heard from {', '.join(absent)}; {more}"
        raise RunPaused(
            f"{len(run.members)} of {len(run.expected_centres)} centres are ready, {run.quorum} are needed ({why or help_})"
        )
    columns = sorted({c for p in run.members.values() for c in p.columns})
    for name, task in run.config.tasks.items():
        for column in task_label_columns(name, task):
            if column not in columns:
                raise ConsiliumError(
                    f"no centre has a column '{column}' for task '{name}'; fill it at one centre, or set tasks.{name}.label_column to the column's name"
                )
    if not run.result:
        # One that comes late is not without a class: its source is as a rule its own name.
        sources = sorted(
            {s for p in run.members.values() for s in p.sources}
            | (set(run.expected_centres) - set(run.members))
        )
        run.config = fit_clusters(run, fill_source_classes(run.config, sources))
        collect_counts(run, list(run.members))
        for name in [
            t for stage in run.config.stages.values() if stage.rounds for t in stage_tasks(run.config, stage)
        ]:
            if not any(n[:-1].sum() for key, n in run.label_counts.items() if key.endswith(f"/train/{name}")):
                raise NoLabelledScans(
                    f"no centre has a labelled training scan for task '{name}'; fill the column or drop the task"
                )
        run.result = score_tables.create_result(run.run_id, run.config, run.members, run.label_counts)
        run.result["filled"] = {n: [t.classes, t.clustering_id] for n, t in run.config.tasks.items()}
        run.result["notes"] += secagg_notes(run)
        if hides_statistics(run.config):
            run.result["counts"] = {key: n.tolist() for key, n in run.label_counts.items()}
    else:
        run.label_counts = {key: np.array(n) for key, n in run.result.get("counts", {}).items()}
        collect_counts(run, list(run.members))
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(config_to_dict(run.config), sort_keys=False))


def secagg_notes(run: Run) -> list[str]:
    """What secure aggregation leaves unseen, for the report."""
    said = []
    if run.config.privacy.secagg:
        said.append(
            "secure aggregation: no contribution was seen alone, so none was screened by its norm; privacy.secagg.clip_value limits each"
        )
    if hides_statistics(run.config):
        said.append(
            "privacy.secagg.scope=all: no centre's own scores are known; 'all' are all centres' scans, of which macro and worst are too"
        )
        said.append(
            "privacy.secagg.scope=all: data quality is not compared, which looks at each centre's histograms"
        )
    return said


def handshake(run: Run, centres: list[str], timeout: float) -> dict[str, str]:
    """Hear who is there, up to `wait` seconds; a centre that runs other code has no part. Returns {centre: why it was refused}."""
    refused: dict[str, str] = {}
    began = time.monotonic()
    run.ledger.log_progress(run.run_id, *run.stage_and_round, "meet", asked=centres)
    for received in run.transport.discover(
        JoinRequest(run.run_id, config_to_dict(run.config)), centres, timeout
    ):
        if received is None:
            apply_pending_commands(run)
            continue
        reply = received.reply
        if not isinstance(reply, JoinReply):
            refused[received.centre] = refusal_reason(reply)
        elif reply.fingerprint != fingerprint_code():
            refused[received.centre] = (
                f"runs other code ({reply.fingerprint}, here {fingerprint_code()}); install the same version"
            )
        elif received.centre in centres:
            run.members[received.centre] = reply
        why_not, seconds = refused.get(received.centre), time.monotonic() - began
        run.ledger.log_progress(
            run.run_id, *run.stage_and_round, "meet", centre=received.centre, seconds=seconds, reason=why_not
        )
    run.refusals |= refused
    for centre, why in refused.items():
        run.ledger.log_event(run.run_id, "refused", why, centre)
        log.warning("%s: %s", centre, why)
    return refused


def collect_counts(run: Run, centres: list[str]) -> None:
    """Ask how many scans of each class there are; prior and centre weights come from these counts."""
    if not (
        hides_statistics(run.config) and run.label_counts
    ):  # a second sum, with those who came later, would differ by their own counts
        run.label_counts |= query_sum(
            run, {c: StatisticsRequest(run.run_id, config_to_dict(run.config), "counts", "") for c in centres}
        )
    for centre in centres:
        said = run.members[centre]
        held = {key: n.tolist() for key, n in run.label_counts.items() if key.split("/")[0] in said.cohorts}
        facts = {
            "counts": held,
            "sources": said.sources,
            "versions": said.versions,
            "skipped": said.skipped,
            "device": said.device,
        }
        facts |= {"scans": said.scans, "policy": said.policy, "fingerprint": said.fingerprint}
        run.ledger.add_centre(run.run_id, centre, facts)


def readmit_centres(run: Run) -> None:
    """A centre that was away and is back takes part again."""
    absent = [c for c in run.expected_centres if c not in run.members]
    if absent:
        handshake(run, absent, 0.0)
        back = [c for c in absent if c in run.members]
        if back:
            collect_counts(run, back)


def fill_source_classes(config: Config, sources: list[str]) -> Config:
    """The configuration with the federation's sources as the classes of every task that names none."""
    tasks = {
        n: replace(t, classes=sources) if t.type == "multiclass" and not t.classes else t
        for n, t in config.tasks.items()
    }
    return validate_config(replace(config, tasks=tasks))


def restore_classes(config: Config, saved_classes: dict[str, list[Any]]) -> Config:
    """The configuration of a run that goes on, with the classes and clusterings that its beginning found."""
    tasks = {
        n: replace(t, classes=saved_classes[n][0], clustering_id=saved_classes[n][1])
        for n, t in config.tasks.items()
    }
    return validate_config(replace(config, tasks=tasks))
