"""A round at this centre: local training from the received weights, what it costs in privacy, what of it stays here and what may leave."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from client.data.cohort import load_cohort
from client.data.dataset import ScanDataset, count_round_steps, iterate_batches
from client.data.loading import load_datasets
from client.federation import error_feedback, noisy_counts, personal_parameters
from client.federation.query_handlers import count_classes
from client.site import privacy_budget
from client.site.config import Site, local_cohorts, reply_name, state_dir
from client.site.policy import Policy
from client.training import dp_sgd
from client.training.autotune import autotune, use_threads
from client.training.objective import Batch
from client.training.trainer import train
from common.config.compose import check_patient_dp, stage_tasks
from common.config.schema import Config, Stage
from common.learning.class_imbalance import compute_logit_adjustment, unnormalised_weight
from common.learning.losses import class_names
from common.learning.seeds import derive_seed
from common.modeling.model import Model, check_no_batch_norm, make_model
from common.modeling.parameters import (
    EMPTY_PARAMS,
    Weights,
    build_layout,
    get_model_weights,
    set_model_weights,
)
from common.privacy.accountant import Charge, compute_epsilon, solve_noise_multiplier
from common.privacy.secure_aggregation import hides_statistics, uses_secagg
from common.protocol.messages import TrainReply, TrainRequest
from common.protocol.update_codec import Arrays, select_codec
from common.utils.errors import ConsiliumError, PermanentlyRefused, Refused


def train_local_round(site: Site, config: Config, request: TrainRequest, policy: Policy) -> TrainReply:
    """One round of local training from the received weights. With `privacy=patient` it is charged to the cohort's budget before it leaves."""
    began = time.perf_counter()
    centre, stage = reply_name(site, config), config.stages[request.stage]
    tasks = {t: config.tasks[t] for t in stage_tasks(config, stage)}
    held = load_datasets(site, config)[0]["train"]
    scans = held.select_labelled(list(tasks)) if len(held) else held
    if not len(scans):
        if hides_statistics(config):  # the coordinator cannot know, and shall not wait for it
            raise PermanentlyRefused(f"no training scan is labelled for {', '.join(tasks)}")
        raise Refused(
            f"{len(held)} training scans, none labelled for {', '.join(tasks)}; check the cohort's split and label columns"
        )
    account = open_privacy_account(site, config, policy) if config.privacy.dp_level == "patient" else None
    if account and (again := privacy_budget.cached_reply(account, request)):
        return again
    adjustments = {}
    for name, task in tasks.items():
        if task.prior != "none":
            own = count_classes(scans.targets[name], len(class_names(name, task)))[:-1]
            counts = request.global_counts[name] if task.prior == "global" else own
            adjustments[name] = torch.tensor(
                compute_logit_adjustment(counts, task.tau, task.logit_adjustment), dtype=torch.float32
            )
    count = site.threads
    if stage.autotune:
        choice = autotune(site, config, stage, tasks, scans, state_dir(site, config))
        stage, count = (
            replace(stage, precision=choice.precision, channels_last=choice.channels_last),
            choice.num_threads,
        )
    model = build_model(site, config, stage, request.weights, request.run_id, request.personal_rounds)
    seed = derive_seed(config.seed, request.stage, request.round, centre)
    protection = None
    if account:
        price, protection = plan_privacy(config, held, request, model)
        privacy_budget.check_affordable(account, price)
        _, odds, steps = price
        some: Iterable[Batch | dp_sgd.PatientBatches] = dp_sgd.poisson_batches(
            scans, tasks, odds, steps, seed
        )
    else:
        steps = count_round_steps(scans, stage, request.mean_centre_scans)
        some = iterate_batches(scans, tasks, stage, steps, seed)
    with use_threads(count):
        report = train(
            model, some, stage, tasks, adjustments,
            dp_params=protection, stage_progress=((request.round - 1) / stage.rounds, request.round / stage.rounds),
            num_steps=steps, lr_scale=request.lr_scale, seed=seed, device=site.resolve_device(),
        )  # fmt: skip
    layout = build_layout(model)
    after = get_model_weights(model, layout)
    delta = after.floats - request.weights.floats
    if stage.local_layers:
        folder = personal_dir(site, config)
        personal_parameters.save_parameters(
            folder,
            request.run_id,
            request.stage,
            request.round,
            after,
            personal_parameters.personal_mask(layout, stage.local_layers),
        )
        personal_parameters.prune_parameters(
            folder, request.run_id, stage, request.stage, [*request.rounds_to_keep, request.round]
        )
        if "all" in stage.local_layers:
            delta = EMPTY_PARAMS
    arrays: Arrays = {}
    if len(delta) and (codec := select_codec(config)) != "fp32" and not uses_secagg(config, request):
        arrays, delta = (
            error_feedback.encode_with_feedback(state_dir(site, config), request, delta, layout, codec),
            EMPTY_PARAMS,
        )
    seen = (
        round(protection.expected_patients * steps) if protection else report.scans_seen
    )  # how many were drawn is nobody's business
    losses = {t: list(v) for t, v in report.losses.items()}
    contribution = TrainReply(
        centre, delta, after.int_buffers, seen, report.steps, losses, time.perf_counter() - began, arrays
    )
    if account:
        contribution.epsilon = compute_epsilon(
            privacy_budget.record_charge(account, price, request), config.privacy.delta
        )
        privacy_budget.cache_reply(account, request, contribution)
    return contribution


def unnormalised_weights(site: Site, config: Config) -> dict[str, float]:
    """{task: what this site's training scans weigh, before it is divided by all centres' sum}."""
    scans = load_datasets(site, config)[0]["train"]
    cells = {
        t: count_classes(scans.targets[t], len(class_names(t, task)), site.min_cell_count)[:-1]
        for t, task in config.tasks.items()
    }
    return {t: unnormalised_weight(n, config.aggregation) for t, n in cells.items()}


def open_privacy_account(site: Site, config: Config, policy: Policy) -> privacy_budget.PrivacyAccount:
    """The privacy budget of this site's patients: all in its tables, whichever of them a run takes."""
    tables = [load_cohort(path, centre) for centre, path in local_cohorts(site, config).items()]
    marks = privacy_budget.hash_patients(str(patient) for table in tables for patient in table["patient"])
    return privacy_budget.PrivacyAccount(
        state_dir(site, config) / "budget", marks, policy.epsilon, policy.delta
    )


def plan_privacy(
    config: Config, dataset: ScanDataset, request: TrainRequest, model: Model
) -> tuple[Charge, dp_sgd.DPParams]:
    """What a round of the stage costs, and what protects it: the noise is the run's, planned over all rounds of all its stages. Raises Refused
    for a configuration that protects nobody."""
    paces = {
        n: dp_sgd.sampling_plan(dataset.select_labelled(stage_tasks(config, s)), s, request.mean_centre_scans)
        for n, s in config.stages.items()
    }
    plan = tuple(
        (odds, steps * config.stages[n].rounds) for n, (patients, odds, steps) in paces.items() if patients
    )
    answers = (
        ((config.privacy.query_noise_multiplier, 1.0, noisy_counts.planned_answers(config)),)
        if config.privacy.query_noise_multiplier
        else ()
    )
    try:
        check_patient_dp(config)
        check_no_batch_norm(model)
        noise = config.privacy.noise_multiplier or solve_noise_multiplier(
            config.privacy.epsilon, config.privacy.delta, plan, answers
        )
    except ConsiliumError as error:
        raise Refused(str(error)) from error
    patients, odds, steps = paces[request.stage]
    return (noise, odds, steps), dp_sgd.DPParams(config.privacy.clip_norm, noise, odds * patients)


def build_model(
    site: Site,
    config: Config,
    stage: Stage,
    weights: Weights,
    run_id: str,
    personal_rounds: list[tuple[str, int]],
) -> Model:
    """The model with the received weights and this centre's personal ones laid over."""
    model = make_model(config.backbone, config.tasks, 0, stage.channels_last, stage.grad_checkpointing)
    set_model_weights(
        model,
        build_layout(model),
        personal_parameters.overlay_parameters(
            personal_dir(site, config), run_id, [(s, int(r)) for s, r in personal_rounds], weights
        ),
    )
    return model


def personal_dir(site: Site, config: Config) -> Path:
    """Where this site's personal weights lie; the pooled site's with the first centre."""
    return state_dir(site, config) / ("pooled" if config.federation.mode == "central" else "personal")
