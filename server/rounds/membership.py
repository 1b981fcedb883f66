"""Who takes part: the handshake with the centres at the start, and their readmission after an outage."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from common.config.compose import prepare_config
from common.config.normalise import stage_tasks
from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.privacy.count_noise import count_noise_std
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, JoinRequest, Refusal, Reply, StatisticsRequest
from common.protocol.sum_key import LabelCountKey
from common.utils.errors import ConsiliumError, RefusalCode
from server.analysis.additive_queries import query_sum
from server.analysis.federated_clustering import fit_clusters
from server.analysis.score_tables import create_result
from server.run.operator_commands import apply_pending_commands
from server.run.records import FittedTask
from server.run.reply_fields import MAX_NAME_LENGTH, make_plain
from server.run.reply_validation import validate_reply
from server.run.run_state import NoCentreReplied, NoLabelledScans, Run, RunPaused, group_by_reason, to_refusal

log = logging.getLogger("consilium.server")


# --- the handshake


def admit_centres(run: Run) -> None:
    """Admit the centres that are there.

    Raises RunPaused where they are fewer than the quorum, ConsiliumError where no centre has a label column
    of a task.
    """
    refusals = handshake(run, run.expected_centres, run.config.federation.join_timeout)
    _require_quorum(run, refusals)
    _check_label_columns(run)


def readmit_centres(run: Run) -> None:
    """Admit centres that were away and are back; not those whose labels cannot be counted."""
    absent = _absent_centres(run)
    if not absent:
        return
    handshake(run, absent, 0.0)
    returned = [centre for centre in absent if centre in run.membership.members]
    if not returned:
        return
    try:
        collect_counts(run, returned)
    except NoCentreReplied:  # the others go on; these are asked again before the next round
        for centre in returned:
            del run.membership.members[centre]


def handshake(run: Run, centres: list[str], timeout: float) -> dict[str, Refusal]:
    """Ask who is there, for up to `timeout` seconds, and return the refusals by centre.

    A centre is refused that runs other code than the coordinator, or whose reply is not valid.
    """
    refusals: dict[str, Refusal] = {}
    started = time.monotonic()
    run.ledger.log_progress(run.run_id, *run.position, "handshake", asked_centres=centres)
    request = JoinRequest(run.run_id, run.config_values)
    for received in run.transport.discover(request, centres, timeout):
        if received is None:
            apply_pending_commands(run)
            continue
        centre = make_plain(received.centre, MAX_NAME_LENGTH)
        reply = _check_join(run, centre, request, received.reply)
        if isinstance(reply, JoinReply):
            if centre not in centres:
                log.info("%s takes no part in this run", centre)
                continue
            run.membership.members[centre] = reply
        else:
            refusals[centre] = reply
        _log_handshake(run, centre, refusals.get(centre), time.monotonic() - started)
    run.membership.refusals |= refusals
    for centre, refusal in refusals.items():
        run.ledger.log_event(run.run_id, "refused", refusal.reason, centre, refusal.code)
        log.warning("%s: %s", centre, refusal.reason)
    return refusals


def _check_join(run: Run, centre: str, request: JoinRequest, reply: Reply) -> JoinReply | Refusal:
    """Return the reply with which a centre joins; a refusal where it cannot take part."""
    reply = validate_reply(run, centre, request, reply)
    if not isinstance(reply, JoinReply):
        return to_refusal(centre, reply)
    if centre in run.membership.members:
        reason = "a second node says that it is this centre; the first one remains"
        return Refusal(centre, reason, code=RefusalCode.BAD_REPLY)
    here = fingerprint_code()
    if reply.fingerprint == here:
        return reply
    reason = f"runs other code ({reply.fingerprint}, here {here}); install the same version"
    return Refusal(centre, reason, code=RefusalCode.BAD_REPLY)


def _log_handshake(run: Run, centre: str, refusal: Refusal | None, seconds: float) -> None:
    run.ledger.log_progress(
        run.run_id,
        *run.position,
        "handshake",
        centre=centre,
        seconds=seconds,
        reason=refusal.reason if refusal else None,
        code=refusal.code if refusal else None,
    )


def _absent_centres(run: Run) -> list[str]:
    return [centre for centre in run.expected_centres if centre not in run.membership.members]


def _require_quorum(run: Run, refusals: Mapping[str, Refusal]) -> None:
    num_expected = len(run.expected_centres)
    num_members = len(run.membership.members)
    if num_members >= run.quorum:
        return
    absent = _absent_centres(run)
    reasons = {centre: refusals[centre].reason for centre in absent if centre in refusals}
    explanation = group_by_reason(reasons)
    if not explanation:
        explanation = (
            f"no reply from {', '.join(absent)}; start more nodes "
            f"(simulation: --federation-config num-supernodes={num_expected})"
        )
    raise RunPaused(
        f"{num_members} of {num_expected} centres are ready, {run.quorum} are needed ({explanation})"
    )


def _check_label_columns(run: Run) -> None:
    columns: set[str] = set()
    for member in run.membership.members.values():
        columns.update(member.columns)
    for name, task in run.config.tasks.items():
        for column in task_label_columns(name, task):
            if column not in columns:
                raise ConsiliumError(
                    f"no centre has a column '{column}' for task '{name}'; fill it at one centre, "
                    f"or set tasks.{name}.label_column to the column's name"
                )


# --- what the run takes from its centres


def fit_to_centres(run: Run) -> None:
    """Complete a new run's configuration by what its centres hold, count their labels, and begin the result.

    Raises NoLabelledScans where a task has no labelled training scan at any centre.
    """
    config = fill_source_classes(run.config, _list_sources(run))
    run.set_config(fit_clusters(run, config))
    collect_counts(run, list(run.membership.members))
    check_labelled_scans(run)
    counts = run.membership.label_counts
    run.result = create_result(run.run_id, run.config, run.membership.members, counts)
    for name, task in run.config.tasks.items():
        run.result.fitted_tasks[name] = FittedTask(task.classes, task.clustering_id)
    run.result.notes += secagg_notes(run.config)
    if hides_statistics(run.config):
        run.result.label_counts = {key: array.tolist() for key, array in counts.items()}
    write_config(run)


def count_again(run: Run) -> None:
    """Count the labels of a resumed run, where the result does not hold the counts already."""
    for key, counts in run.result.label_counts.items():
        run.membership.label_counts[key] = np.array(counts)
    collect_counts(run, list(run.membership.members))
    write_config(run)


def write_config(run: Run) -> None:
    """Write the run's configuration to its folder."""
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(run.config_values, sort_keys=False))


def collect_counts(run: Run, centres: list[str]) -> None:
    """Ask centres for their scans of each class, from which the prior and the centres' weights are computed.

    Counts that only exist as a secure sum are collected once: the difference to a second sum, with the
    centres that joined later, would reveal the counts of these.
    """
    if not (hides_statistics(run.config) and run.membership.label_counts):
        request = StatisticsRequest(run.run_id, run.config_values, "counts", "")
        run.membership.label_counts |= query_sum(run, dict.fromkeys(centres, request))
    for centre in centres:
        run.ledger.add_centre(run.run_id, centre, _describe_member(run, run.membership.members[centre]))


def _describe_member(run: Run, member: JoinReply) -> dict[str, Any]:
    counts = {}
    for key, array in run.membership.label_counts.items():
        if LabelCountKey.parse(key).cohort in member.cohorts:
            counts[key] = array.tolist()
    return {
        "counts": counts,
        "sources": member.sources,
        "versions": member.versions,
        "skipped": member.skipped,
        "device": member.device,
        "scans": member.scans,
        "policy": member.policy,
        "fingerprint": member.fingerprint,
    }


def check_labelled_scans(run: Run) -> None:
    """Raise NoLabelledScans where a task of a stage has no labelled training scan at any centre."""
    if count_noise_std(run.config):  # noisy counts do not tell, and `_check_label_columns` has asked already
        return
    labelled_tasks = set()
    for text, array in run.membership.label_counts.items():
        key = LabelCountKey.parse(text)
        if key.split == "train" and array[:-1].sum():
            labelled_tasks.add(key.task)
    for stage in run.config.stages.values():
        if not stage.rounds:
            continue
        for task in stage_tasks(run.config, stage):
            if task not in labelled_tasks:
                raise NoLabelledScans(
                    f"no centre has a labelled training scan for task '{task}'; "
                    "fill the column or drop the task"
                )


def _list_sources(run: Run) -> list[str]:
    """Return the sources of all scans; a centre that has not joined counts as the source of its own name."""
    sources = set(_absent_centres(run))
    for member in run.membership.members.values():
        sources.update(member.sources)
    return sorted(sources)


def fill_source_classes(config: Config, sources: list[str]) -> Config:
    """Return the configuration with the sources as the classes of every multi-class task that names none."""
    tasks = {}
    for name, task in config.tasks.items():
        if task.type == "multiclass" and not task.classes:
            task = replace(task, classes=sources)
        tasks[name] = task
    return prepare_config(replace(config, tasks=tasks))


def restore_tasks(config: Config, fitted_tasks: Mapping[str, FittedTask]) -> Config:
    """Return a resumed run's configuration with the classes and clusterings that it was started with."""
    tasks = {}
    for name, task in config.tasks.items():
        fitted = fitted_tasks[name]
        tasks[name] = replace(task, classes=fitted.classes, clustering_id=fitted.clustering_id)
    return prepare_config(replace(config, tasks=tasks))


def secagg_notes(config: Config) -> list[str]:
    """Return what secure aggregation hides from the coordinator, for the report."""
    notes = []
    if config.privacy.secagg:
        notes.append(
            "secure aggregation: no update was seen alone, so none was screened by its norm; "
            "privacy.secagg.clip_value limits each"
        )
    if hides_statistics(config):
        notes.append(
            "privacy.secagg.scope=all: no centre's own scores are known; 'all' stands for all centres' "
            "scans, of which macro and worst are computed too"
        )
        notes.append(
            "privacy.secagg.scope=all: image statistics are not compared, because they are each centre's own"
        )
    return notes
