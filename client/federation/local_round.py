"""Train a round at this centre: plan it, train, keep the layers that stay here, encode what leaves.

With `privacy=patient` the round is charged to the patients' privacy budget before its reply leaves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.batch import Batch
from client.data.dataset import ScanDataset, count_round_steps, iterate_batches
from client.data.loading import load_datasets
from client.federation import error_feedback, patient_exposure, personal_parameters
from client.federation.drawn_patients import DrawnPatients
from client.federation.label_counts import count_classes
from client.federation.local_model import build_model
from client.federation.privacy_plan import open_privacy_account, plan_privacy
from client.federation.released_data import count_epoch_scans, load_released_datasets
from client.federation.run_context import RunContext
from client.site import privacy_budget
from client.site.privacy_budget import PrivacyAccount
from client.training.autotune import autotune, use_threads
from client.training.dp_sgd import PatientBatches, poisson_batches
from client.training.trainer import TrainResult, TrainSpec, train
from common.config.normalise import stage_tasks
from common.config.schema import Config, Stage, Task
from common.learning.class_imbalance import compute_logit_adjustment
from common.learning.losses import class_names
from common.learning.seeds import derive_seed
from common.modeling.local_layers import LocalValues, find_local_values
from common.modeling.model import Model
from common.modeling.parameters import EMPTY_PARAMS, Layout, Weights, build_layout, get_model_weights
from common.privacy.accountant import Charge, compute_epsilon
from common.privacy.secure_aggregation import hides_statistics, uses_secagg
from common.protocol.messages import TrainReply, TrainRequest
from common.protocol.update_codec import Arrays, select_codec
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused


@dataclass(frozen=True)
class RoundPlan:
    """What a round trains, and how."""

    stage: Stage
    model: Model
    batches: Iterable[Batch | PatientBatches]
    spec: TrainSpec
    num_threads: int  # of PyTorch; 0: its own choice
    charge: Charge | None  # what the round costs in privacy; None: nothing is charged
    drawn: DrawnPatients | None = None  # None: not limited by the policy


@dataclass(frozen=True)
class EncodedDelta:
    """The change of the weights as it leaves, in one form or the other."""

    delta: NDArray[np.float32]  # [P], or empty
    encoded: Arrays  # in the run's codec, or empty


def train_local_round(context: RunContext, request: TrainRequest) -> TrainReply:
    """Train one round from the received weights.

    Raises Refused where no scan is labelled for the stage's tasks, and PermanentlyRefused where waiting would
    not help or the privacy budget does not suffice.
    """
    start = time.perf_counter()
    is_private = context.config.privacy.dp_level == "patient"
    if is_private:  # noise protects each patient, and who takes part must not depend on others
        dataset = load_datasets(context.site, context.config).by_split["train"]
    else:
        dataset = load_released_datasets(context)["train"]
    account = None
    if is_private:
        account = open_privacy_account(context)
        dataset = patient_exposure.select_trainable(account, dataset)
        cached = privacy_budget.cached_reply(account, request)
        if cached is not None:
            return cached
    scans = _select_labelled(context.config, dataset, request)
    plan = _plan_round(context, request, dataset, scans, account)
    if account is not None:
        patient_exposure.mark_trained(account, dataset)
    with use_threads(plan.num_threads):
        result = train(plan.model, plan.batches, plan.spec)
    if plan.drawn is not None:
        plan.drawn.require_enough_patients(context.site.min_cell_count)
    layout = build_layout(plan.model)
    trained = get_model_weights(plan.model, layout)
    # Before layers of earlier rounds are replaced or deleted: those may be in what was trained.
    kept_values = personal_parameters.find_kept_values(
        context.local_layers_dir, request.run_id, request.personal_rounds, plan.stage, layout
    )
    if plan.stage.local_layers:
        _keep_local_layers(context, request, plan.stage, layout, trained)
    leaving = _replace_kept_values(trained, request.weights, kept_values)
    update = _encode_delta(context, request, plan.stage, layout, leaving)
    reply = TrainReply(
        centre=context.centre,
        delta=update.delta,
        int_buffers=leaving.int_buffers,
        scans=_count_scans(plan, result),
        steps=result.steps,
        losses=_sum_losses(plan, result),
        seconds=time.perf_counter() - start,
        encoded_delta=update.encoded,
    )
    if account is not None and plan.charge is not None:
        charges = privacy_budget.record_charge(account, plan.charge, request)
        epsilon = compute_epsilon(charges, context.config.privacy.delta)
        # Steps and time follow from the number of patients.
        reply = replace(reply, scans=0, steps=0, seconds=0.0, epsilon=epsilon)
        privacy_budget.cache_reply(account, request, reply)
    return reply


def _select_labelled(config: Config, dataset: ScanDataset, request: TrainRequest) -> ScanDataset:
    """Return the training scans with a label for a task of the stage. Raises Refused when there is none."""
    tasks = stage_tasks(config, config.stages[request.stage])
    scans = dataset.select_labelled(tasks) if len(dataset) else dataset
    if len(scans):
        return scans
    names = ", ".join(tasks)
    # Where the coordinator does not know the exact counts, it must not wait for this centre.
    if hides_statistics(config) or config.privacy.dp_level == "patient":
        raise PermanentlyRefused(f"no training scan is labelled for {names}", RefusalCode.NO_DATA)
    raise Refused(
        f"no training scan is labelled for {names}; check the split and label columns of the cohort, and "
        "whether its policy leaves them aside because they are few",
        RefusalCode.NO_DATA,
    )


# --- plan -----------------------------------------------------------------------------------------


def _plan_round(
    context: RunContext,
    request: TrainRequest,
    dataset: ScanDataset,
    scans: ScanDataset,
    account: PrivacyAccount | None,
) -> RoundPlan:
    """Decide what the round trains and how.

    Raises PermanentlyRefused when the account does not allow its cost.
    """
    config = context.config
    stage = config.stages[request.stage]
    tasks = {name: config.tasks[name] for name in stage_tasks(config, stage)}
    adjustments = _compute_logit_adjustments(tasks, scans, request)
    num_threads = context.site.threads
    if stage.autotune:
        settings = autotune(context.site, config, stage, tasks, scans, context.state_dir)
        stage = replace(stage, precision=settings.precision, channels_last=settings.channels_last)
        num_threads = settings.num_threads
    model = build_model(context, stage, request.weights, request.personal_rounds)
    seed = derive_seed(config.seed, request.stage, request.round, context.centre)
    charge = dp_params = drawn = None
    batches: Iterable[Batch | PatientBatches]
    if account is not None:
        privacy = plan_privacy(config, dataset, request, model)
        privacy_budget.check_affordable(account, privacy.charge)
        charge = privacy.charge
        dp_params = privacy.dp_params
        steps = charge.steps
        batches = poisson_batches(scans, tasks, charge.sampling_rate, steps, seed)
    elif context.site.min_cell_count > 1:
        epoch_scans = count_epoch_scans(dataset, tasks)
        steps = count_round_steps(scans, stage, request.mean_centre_scans, epoch_scans)
        drawn = DrawnPatients(scans, tasks, sum(epoch_scans.values()))
        batches = drawn.watch(iterate_batches(scans, tasks, stage, steps, seed))
    else:
        steps = count_round_steps(scans, stage, request.mean_centre_scans)
        batches = iterate_batches(scans, tasks, stage, steps, seed)
    spec = TrainSpec(
        stage,
        tasks,
        adjustments,
        dp_params=dp_params,
        stage_progress=((request.round - 1) / stage.rounds, request.round / stage.rounds),
        num_steps=steps,
        lr_scale=request.lr_scale,
        seed=seed,
        device=context.site.resolve_device(),
    )
    return RoundPlan(stage, model, batches, spec, num_threads, charge, drawn)


def _compute_logit_adjustments(
    tasks: dict[str, Task], scans: ScanDataset, request: TrainRequest
) -> dict[str, Tensor]:
    """Return {task: [K] to add to the logits} of tasks with a prior: this centre's, or the federation's."""
    adjustments = {}
    for name, task in tasks.items():
        if task.prior == "none":
            continue
        if task.prior == "global":
            counts = request.global_counts[name]
        else:
            counts = count_classes(scans.targets[name], len(class_names(name, task)))[:-1].tolist()
        adjustment = compute_logit_adjustment(counts, task.tau, task.logit_adjustment)
        adjustments[name] = torch.tensor(adjustment, dtype=torch.float32)
    return adjustments


# --- keep and encode ------------------------------------------------------------------------------


def _keep_local_layers(
    context: RunContext, request: TrainRequest, stage: Stage, layout: Layout, trained: Weights
) -> None:
    """Store the layers that stay at the centre, and delete those of rounds that are not needed any more."""
    folder = context.local_layers_dir
    local_values = find_local_values(layout, stage.local_layers)
    personal_parameters.save_parameters(
        folder, request.run_id, request.stage, request.round, trained, local_values
    )
    rounds_to_keep = [*request.rounds_to_keep, request.round]
    personal_parameters.prune_parameters(folder, request.run_id, stage, request.stage, rounds_to_keep)


def _replace_kept_values(trained: Weights, received: Weights, kept_values: LocalValues) -> Weights:
    """Return the trained weights with the received values in place of those that stay at the centre.

    Their change is then exactly zero in everything that is computed from it: norm, codes, error feedback,
    numbers of a secure sum.
    """
    return Weights(
        np.where(kept_values.floats, received.floats, trained.floats),
        np.where(kept_values.int_buffers, received.int_buffers, trained.int_buffers),
    )


def _encode_delta(
    context: RunContext, request: TrainRequest, stage: Stage, layout: Layout, leaving: Weights
) -> EncodedDelta:
    """Return the change of the weights in the run's codec; `leaving` holds no value that stays here.

    A secure sum has its own grid and takes it as it is.
    """
    if "all" in stage.local_layers:
        return EncodedDelta(EMPTY_PARAMS, {})
    delta = leaving.floats - request.weights.floats
    codec = select_codec(context.config)
    if not len(delta) or codec == "fp32" or uses_secagg(context.config, request):
        return EncodedDelta(delta, {})
    encoded = error_feedback.encode_with_feedback(context.state_dir, request, delta, layout, codec)
    return EncodedDelta(EMPTY_PARAMS, encoded)


def _count_scans(plan: RoundPlan, result: TrainResult) -> int:
    """Return the scans seen, or, where the policy limits small numbers, what the counts of labels tell."""
    return result.scans_seen if plan.drawn is None else plan.drawn.num_scans


def _sum_losses(plan: RoundPlan, result: TrainResult) -> dict[str, list[float]]:
    """Return {task: [summed loss, labelled scans]}, for as many scans as may be told."""
    if plan.drawn is None:
        return {task: list(loss) for task, loss in result.losses.items()}
    losses = {}
    for task, (loss, num_seen) in result.losses.items():
        num_labelled = plan.drawn.count_labelled(task)
        mean_loss = loss / num_seen if num_seen else 0.0
        losses[task] = [mean_loss * num_labelled, float(num_labelled)]
    return losses
