"""Answer the coordinator's requests. `handle_request` is the single entry point and never raises.

A request passes six steps: validate its fields and the whole of its configuration
(request_validation.py), check it against the hospital's policy and approvals, run its handler, release the
reply as far as the policy allows, and record what leaves in the egress log. Nothing here knows Flower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from client.data.loading import load_datasets
from client.federation import parameter_cache, secure_aggregation
from client.federation.change_without_data import compute_change_without_data
from client.federation.join import handle_join
from client.federation.local_round import train_local_round
from client.federation.released_counts import weigh_centre
from client.federation.released_data import min_scans_of_patients
from client.federation.request_fields import check_fields
from client.federation.request_validation import validate_request
from client.federation.run_context import RunContext, parse_run_config
from client.federation.statistics import handle_query
from client.site import approvals, egress_log
from client.site.config import Site, cohort_state_dir, local_cohorts, outer_anchor, reply_name, state_dir
from client.site.policy import authorise, load_policy
from client.site.release import ReleaseRules, filter_reply
from common.config.schema import Config
from common.privacy.secure_aggregation import uses_secagg
from common.protocol.messages import (
    BaseWeightsMissing,
    JoinRequest,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    SecureSumReply,
    SecureSumRequest,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
    UnmaskRequest,
)
from common.utils.error_reports import describe_location, format_stack
from common.utils.errors import ConsiliumError, PermanentlyRefused, RefusalCode, Refused
from common.utils.log_setup import log_context

log = logging.getLogger("consilium.centre")


def handle_request(site: Site, request: Request) -> Reply:
    """Do what a request asks as far as the policy allows, or refuse it. Never raises.

    A reply that cannot be recorded in the egress log is replaced by a refusal.
    """
    try:
        check_fields(request)
    except Exception as error:
        return refuse_malformed(site, error)
    log_fields: dict[str, Any] = {
        "run": request.run_id,
        "kind": type(request).__name__,
        "centre": site.centre,
    }
    if isinstance(request, TrainRequest):
        log_fields.update(stage=request.stage, round=request.round)
    with log_context(**log_fields):
        return _record(site, request, _answer(site, request))


def refuse_malformed(site: Site, error: Exception) -> Reply:
    """Refuse a message that is no request, or has fields that no request can have. Never raises.

    Nothing of the message is used, not even the name of its run, which the egress log therefore lacks.
    """
    refusal = _refuse(site, site.centre or f"node {site.index}", error)
    refusal.code = RefusalCode.BAD_REQUEST
    return _record(site, JoinRequest("", {}), refusal)


def _answer(site: Site, request: Request) -> Reply:
    """Take a request through every step but the last."""
    centre = site.centre or f"node {site.index}"
    try:
        config = parse_run_config(request.config)
        centre = reply_name(site, config) or centre
        validate_request(config, request)
        context = _check_policy(site, config, request)
        if isinstance(request, TrainRequest | StatisticsRequest):
            request = parameter_cache.restore_parameters(context.state_dir, context.config, request)
        reply = REQUEST_HANDLERS[type(request)](context, request)
        return _release(context, request, reply)
    except parameter_cache.MissingBaseError:
        return BaseWeightsMissing(centre)
    except Exception as error:
        return _refuse(site, centre, error)


def _check_policy(site: Site, config: Config, request: Request) -> RunContext:
    """Return the run that the request belongs to.

    Raises Refused for a request that the policy forbids, and for a recipe that is not approved.
    """
    if not local_cohorts(site, config) and not isinstance(request, JoinRequest):
        raise Refused(f"node {site.index} takes no part in this run", RefusalCode.NO_DATA)
    policy = load_policy(site.policy)
    now = datetime.now()
    authorise(policy, request, config, now)
    if policy.require_approval and local_cohorts(site, config):
        approvals.require_approval(state_dir(site, config), config, now.date())
    limit_gpu_memory(policy.gpu_memory, site)
    min_cell_count = max(site.min_cell_count, policy.min_cell_count)
    return RunContext(replace(site, min_cell_count=min_cell_count), config, policy, request.run_id)


def handle_train(context: RunContext, request: TrainRequest) -> TrainReply:
    """Train a round, or take the update of the same round trained before from an unfinished secure sum."""
    if uses_secagg(context.config, request):
        cached = secure_aggregation.cached_update(context.state_dir, request)
        if cached is not None:
            return cached
    return train_local_round(context, request)


def handle_secure_sum_step(context: RunContext, request: SecureSumRequest) -> SecureSumReply:
    """Take part in the next step of a secure sum."""
    return secure_aggregation.handle_step(
        context.state_dir, context.config, context.centre, request, context.policy
    )


REQUEST_HANDLERS: dict[type, Callable[[RunContext, Any], Reply]] = {
    JoinRequest: handle_join,
    StatisticsRequest: handle_query,
    TrainRequest: handle_train,
    ShareKeysRequest: handle_secure_sum_step,
    MaskedInputRequest: handle_secure_sum_step,
    UnmaskRequest: handle_secure_sum_step,
}


def _release(context: RunContext, request: Request, reply: Reply) -> Reply:
    """Return the reply as it may leave: filtered by the policy, masked for a secure sum."""
    reply = filter_reply(_make_release_rules(context, request), reply)
    if not uses_secagg(context.config, request):
        return reply
    if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
        if reply.sum_id:  # the cached reply to a round that was masked before
            return reply
        known_change = compute_change_without_data(context, request, reply.steps)
        return secure_aggregation.mask_update(
            context.state_dir, context.config, request, reply, weigh_centre(context), known_change
        )
    if isinstance(request, StatisticsRequest) and isinstance(reply, StatisticsReply):
        return secure_aggregation.mask_statistics(context.state_dir, context.config, request, reply)
    return reply


def _make_release_rules(context: RunContext, request: Request) -> ReleaseRules:
    """Return what the reply to a request is filtered by."""
    min_patients = context.site.min_cell_count
    if not isinstance(request, StatisticsRequest):
        return ReleaseRules(context.policy, min_patients)
    min_scans = min_patients
    if not context.config.privacy.query_noise_multiplier:
        datasets, _ = load_datasets(context.site, context.config)
        min_scans = min_scans_of_patients(datasets.values(), min_patients)
    return ReleaseRules(context.policy, min_patients, min_scans, request.name)


def _record(site: Site, request: Request, reply: Reply) -> Reply:
    """Write the reply into the egress log and return it, or a refusal where it cannot be written.

    A node that takes no part in the run has no log.
    """
    try:
        folder = _find_log_dir(site, request)
        if folder is not None:
            anchor = outer_anchor(site, Path(site.data)) if site.data else None
            egress_log.record_reply(folder, request, reply, anchor)
    except Exception as error:
        return _refuse(site, reply.centre, error)
    return reply


def _find_log_dir(site: Site, request: Request) -> Path | None:
    if site.centre:
        has_state = bool(site.data or site.state)
        return cohort_state_dir(site, Path(site.data)) if has_state else None
    if not request.config:
        return None
    try:
        config = parse_run_config(request.config)
        return state_dir(site, config) if local_cohorts(site, config) else None
    except ConsiliumError:
        return None  # a simulation with a wrong configuration


def _refuse(site: Site, centre: str, error: Exception) -> Refusal:
    """Turn an error into a refusal that holds no path, name or identifier.

    Only the text of a Refused is meant for the coordinator. Another error of ours may name a file, so its
    text stays in the hospital's log; the text of an unexpected error may hold anything, so it stays out of
    the log too.
    """
    if isinstance(error, Refused):
        return Refusal(centre, str(error), isinstance(error, PermanentlyRefused), error.code)
    location = describe_location(error)
    if isinstance(error, ConsiliumError):
        log.error("%s", error)
        reason = f"error in {location}; see the centre's log" if site.centre else str(error)
        return Refusal(centre, reason)
    log.error("%s", format_stack(error))
    return Refusal(centre, f"{type(error).__name__} in {location}; see the centre's log")


def limit_gpu_memory(gibibytes: float, site: Site) -> None:
    """Keep training below the policy's share of the GPU's memory; 0 sets no limit."""
    if not gibibytes:
        return
    device = site.resolve_device()
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        fraction = min(1.0, gibibytes * 2**30 / total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
