"""The centre's answers to the coordinator's requests: plain functions, no Flower. `answer` is the only door, and it never raises."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import time
import traceback
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from client.data.cohort import find_label_columns
from client.data.loading import clear_dataset_cache, load_centre_cohort, load_datasets
from client.federation import (
    cluster_labels,
    error_feedback,
    noisy_counts,
    parameter_cache,
    personal_parameters,
    secure_aggregation,
)
from client.federation.local_round import (
    build_model,
    open_privacy_account,
    personal_dir,
    train_local_round,
    unnormalised_weights,
)
from client.federation.query_handlers import QUERY_HANDLERS, QueryContext
from client.imaging.slice_store import SliceStore
from client.site import egress_log, privacy_budget
from client.site.config import Site, cohort_state_dir, local_cohorts, reply_name, safe_filename, state_dir
from client.site.policy import Policy, authorise, describe_policy, filter_reply, load_policy
from client.training.autotune import use_threads
from common.config.compose import parse_config
from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.privacy.secure_aggregation import COMBINED_COHORT, hides_statistics, uses_secagg
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    BaseWeightsMissing,
    JoinReply,
    JoinRequest,
    Refusal,
    Reply,
    Request,
    StatisticsReply,
    StatisticsRequest,
    TrainRequest,
)
from common.utils.errors import ConsiliumError, PermanentlyRefused, Refused
from common.utils.log_setup import log_context

log = logging.getLogger("consilium.centre")


def handle_request(site: Site, request: Request) -> Reply:
    """Do what the request asks and the policy allows, or say why not. What leaves is recorded first (client/site/egress_log.py)."""
    of_round: dict[str, str | int] = (
        {"stage": request.stage, "round": request.round} if isinstance(request, TrainRequest) else {}
    )
    with log_context(run=request.run_id, kind=type(request).__name__, centre=site.centre, **of_round):
        return _handle_and_record(site, request)


def _handle_and_record(site: Site, request: Request) -> Reply:
    reply = _dispatch_request(site, request)
    try:
        if folder := _egress_dir(site, request):
            egress_log.record_reply(folder, request, reply)
    except Refused as refused:
        return Refusal(reply.centre, str(refused))
    return reply


def _egress_dir(site: Site, request: Request) -> Path | None:
    """The state folder of the site; None of a node that has no part in the run."""
    if site.centre:
        return cohort_state_dir(site, Path(site.data)) if site.data or site.state else None
    try:
        config = parse_config(request.config)
        return state_dir(site, config) if local_cohorts(site, config) else None
    except ConsiliumError:
        return None  # of a simulation whose configuration nobody understands


def _dispatch_request(site: Site, request: Request) -> Reply:
    """An unexpected error is named by type and place only: its text may hold a path or a name."""
    centre = site.centre or f"node {site.index}"
    try:
        config = parse_config(request.config)
        centre = reply_name(site, config) or centre
        if not local_cohorts(site, config) and not isinstance(request, JoinRequest):
            raise Refused(f"node {site.index} has no part in this run")
        policy = load_policy(site.policy)
        authorise(policy, request, config, datetime.now())
        limit_gpu_memory(policy.gpu_memory, site)
        site = replace(site, min_cell_count=max(site.min_cell_count, policy.min_cell_count))
        if isinstance(request, JoinRequest):
            return handle_join(site, config, policy)
        folder = state_dir(site, config)
        if not isinstance(request, TrainRequest | StatisticsRequest):
            return filter_reply(
                policy, secure_aggregation.handle_step(folder, config, centre, request, policy)
            )
        request = parameter_cache.restore_parameters(folder, config, request)
        if isinstance(request, StatisticsRequest):
            said = filter_reply(policy, handle_query(site, config, request, policy), request.name)
            return (
                secure_aggregation.mask_statistics(folder, config, request, said)
                if uses_secagg(config, request)
                else said
            )
        if not uses_secagg(config, request):
            return filter_reply(policy, train_local_round(site, config, request, policy))
        if again := secure_aggregation.cached_update(folder, request):
            return again
        return secure_aggregation.mask_update(
            folder,
            config,
            request,
            train_local_round(site, config, request, policy),
            unnormalised_weights(site, config),
        )
    except parameter_cache.MissingBaseError:
        return BaseWeightsMissing(centre)
    except Refused as refused:
        return Refusal(centre, str(refused), isinstance(refused, PermanentlyRefused))
    except ConsiliumError as error:  # its sentence may name a file: that stays in a hospital
        log.error("%s", error)
        return Refusal(
            centre,
            str(error)
            if not site.centre
            else f"{_error_location(error)}; the sentence is in the centre's log",
        )
    except Exception as error:
        log.error(
            "%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
        )  # its text stays out of the log too
        return Refusal(
            centre, f"{type(error).__name__} in {_error_location(error)}; the centre's log has the rest"
        )


def _error_location(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).stem}.{frame.name}, line {frame.lineno}"


def handle_join(site: Site, config: Config, policy: Policy) -> JoinReply:
    """Make everything ready, and say what there is."""
    clear_dataset_cache()
    own = local_cohorts(site, config)
    held, skipped = load_datasets(site, config) if own else ({}, [])
    tables = [load_centre_cohort(site, config, centre, path) for centre, path in own.items()]
    asked = {
        c for name, task in config.tasks.items() for c in task_label_columns(name, task)
    }  # what else the table holds is nobody's business
    columns = sorted({c for table in tables for c in [*find_label_columns(table), "source"] if c in asked})
    sources = sorted({str(s) for table in tables for s in table["source"]})
    for name, task in config.tasks.items():
        if missing := [c for c in task_label_columns(name, task) if own and c not in columns]:
            log.warning(
                "no column '%s' for task '%s': this centre adds nothing to it", ", ".join(missing), name
            )
    hidden = hides_statistics(config)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "timm", "flwr")} | {
        "python": platform.python_version()
    }
    return JoinReply(
        centre=reply_name(site, config),
        cohorts=list(own),
        fingerprint=fingerprint_code(),
        sources=sources,
        columns=columns,
        scans={}
        if hidden or config.privacy.query_noise_multiplier
        else {split: len(scans) for split, scans in held.items()},
        skipped={} if hidden else dict(Counter(s.reason for s in skipped)),
        versions=versions,
        device=str(site.resolve_device()),
        policy=dict(describe_policy(policy)),
    )


def handle_query(site: Site, config: Config, request: StatisticsRequest, policy: Policy) -> StatisticsReply:
    """One additive query (client/federation/query_handlers.py), with the noise that `privacy.query_noise_multiplier` asks for, charged before it leaves."""
    if request.name not in QUERY_HANDLERS:
        raise Refused(f"query '{request.name}' is not one this centre answers: {', '.join(QUERY_HANDLERS)}")
    if config.privacy.dp_level == "patient" and (
        request.name not in ("counts", "scores") or (request.name, request.split) == ("scores", "train")
    ):
        raise Refused(
            f"query '{request.name}' would tell of training scans without noise, which privacy=patient does not allow"
        )
    if request.split == "test":
        error_feedback.delete_residuals(state_dir(site, config), request.run_id)
        secure_aggregation.delete_train_sum(state_dir(site, config), request.run_id)
    began = time.perf_counter()
    scans, _ = load_datasets(site, config)
    stage = config.stages[request.stage] if request.stage else next(iter(config.stages.values()))
    model = None
    if request.weights is not None:
        model = build_model(site, config, stage, request.weights, request.run_id, request.personal_rounds)
        if request.split == "test" and request.personal_rounds:
            personal_parameters.record_test_state(
                personal_dir(site, config), request.run_id, request.personal_rounds, request.weights
            )
    if request.split not in scans or (request.task and request.task not in config.tasks):
        raise Refused(f"there is no split '{request.split}' or no task '{request.task}' to answer for")
    told = config.privacy.query_noise_multiplier
    if told:
        scans = {
            split: noisy_counts.cap_scans_per_patient(some, config.privacy.max_scans_per_patient)
            for split, some in scans.items()
        }
    features = state_dir(site, config) / "features" / safe_filename(request.run_id)
    stores = {
        centre: SliceStore(cohort_state_dir(site, path) / "slices")
        for centre, path in local_cohorts(site, config).items()
    }
    question = QueryContext(
        scans,
        request.split,
        config,
        stage,
        model,
        request.task,
        1
        if told
        else site.min_cell_count,  # noise comes first: one scan more may add 1 to a cell and no more
        site.resolve_device(),
        request.centroids,
        features,
        stores,
    )
    with use_threads(site.threads):
        sums = QUERY_HANDLERS[request.name](question)
        if request.name == "counts" and uses_secagg(config, request):
            sums |= {
                f"{COMBINED_COHORT}/mass/{t}": np.array([value])
                for t, value in unnormalised_weights(site, config).items()
            }
        if request.clustering_id:
            cluster_labels.save_cluster_labels(state_dir(site, config), request.clustering_id, question)
            shutil.rmtree(features, ignore_errors=True)
    if told:
        privacy_budget.record_charge(open_privacy_account(site, config, policy), (told, 1.0, 1), request)
        sums = noisy_counts.add_noise(sums, config, request.name, site.min_cell_count)
    return StatisticsReply(reply_name(site, config), sums, time.perf_counter() - began)


def limit_gpu_memory(gibibytes: float, site: Site) -> None:
    """Let training take no more of the GPU's memory than the policy says."""
    if gibibytes and (device := site.resolve_device()).type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * 2**30 / whole), device)
