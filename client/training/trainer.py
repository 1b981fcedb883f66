"""Local training and inference: a model, batches, tasks, a stage; no federation, no files, no Flower."""

from __future__ import annotations

import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.data.batch import Batch
from client.training.anchored_heads import AnchoredHeads
from client.training.dp_sgd import DPParams, PatientBatches, privatise_gradient
from client.training.freezing import freeze, list_trainable
from client.training.moco import MocoObjective
from client.training.objective import Objective, autocast_context
from client.training.optimiser import LocalOptimiser, scheduled_learning_rate
from common.config.schema import Stage, Task
from common.learning.seeds import derive_seed
from common.modeling.model import Model
from common.utils.errors import Refused

log = logging.getLogger("consilium.centre")


@dataclass(frozen=True)
class TrainSpec:
    """What a round of local training is to do.

    Attributes:
        stage: The stage's settings.
        tasks: The tasks that the stage trains.
        logit_adjustments: {task: [K]} added to the logits (common/learning/class_imbalance.py).
        dp_params: Train by DP-SGD (client/training/dp_sgd.py); every batch then holds the patients drawn for
            a step.
        stage_progress: The share of the stage done before and after this round, for the learning-rate
            schedule.
        num_steps: Steps of the round, for the schedule.
        lr_scale: Factor of the coordinator's on the learning rate.
        seed: Of augmentation and dropout.
        device: Where to train.
    """

    stage: Stage
    tasks: Mapping[str, Task]
    logit_adjustments: Mapping[str, Tensor] = field(default_factory=dict)
    dp_params: DPParams | None = None
    stage_progress: tuple[float, float] = (0.0, 1.0)
    num_steps: int = 1
    lr_scale: float = 1.0
    seed: int = 0
    device: torch.device | str = "cpu"

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        start, end = self.stage_progress
        progress = start + (end - start) * step / max(self.num_steps, 1)
        return self.lr_scale * scheduled_learning_rate(self.stage.optimiser, progress)


@dataclass
class TrainResult:
    """What a round of local training did: optimiser steps, scans seen, {task: [summed loss, labelled scans]}.

    After DP-SGD it says neither scans nor losses: they would reveal who was drawn.
    """

    steps: int = 0
    scans_seen: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class TrainingState:
    """What the steps of a round share."""

    model: Model
    spec: TrainSpec
    objective: Objective
    optimiser: LocalOptimiser
    anchored_heads: AnchoredHeads
    num_parts: int  # parts that a batch is computed in; grows when the device's memory is too small
    result: TrainResult


def train(model: Model, batches: Iterable[Batch | PatientBatches], spec: TrainSpec) -> TrainResult:
    """Train the model in place, one step a batch.

    The head of a task with `head_update: anchored` moves once at the end
    (client/training/anchored_heads.py); one with `moments` is fitted by the server and never moves here.
    Raises Refused when the loss is not finite, or when a single scan does not fit the device's memory.
    """
    state = _prepare(model, spec)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(spec.seed)  # dropout
        for step, batch in enumerate(batches):
            state.optimiser.set_learning_rate(spec.learning_rate(step))
            if spec.dp_params is None:
                assert isinstance(batch, Batch), "a plain step takes a Batch"
                plain_step(state, step, batch)
            else:
                assert not isinstance(batch, Batch), "a DP-SGD step takes the patients drawn"
                dp_step(state, step, batch, spec.dp_params)
            if state.optimiser.step():
                state.anchored_heads.accumulate_gradients()
            state.objective.after_step(model)
            state.result.steps += 1
    state.anchored_heads.apply_displacements()
    return state.result


def _prepare(model: Model, spec: TrainSpec) -> TrainingState:
    """Freeze what the stage leaves alone, and make its objective and optimiser."""
    device = torch.device(spec.device)
    model.to(device).train()
    if spec.stage.torch_compile:
        _compile_encoder(model)
    freeze(model, spec.stage, spec.tasks)
    anchored_heads = AnchoredHeads(model, spec.tasks)
    trainable = list_trainable(model, spec.tasks)
    optimiser = LocalOptimiser(trainable, anchored_heads.parameters, spec.stage, device)
    return TrainingState(
        model=model,
        spec=spec,
        objective=_make_objective(model, spec, device),
        optimiser=optimiser,
        anchored_heads=anchored_heads,
        num_parts=spec.stage.grad_accum_steps,
        result=TrainResult(losses={task: [0.0, 0.0] for task in spec.tasks}),
    )


def _compile_encoder(model: Model) -> None:
    if shutil.which("g++") or shutil.which("clang++"):
        model.encoder.compile(dynamic=False)
    else:
        log.warning("stage.torch_compile is ignored: this machine has no C++ compiler; training takes longer")


def _make_objective(model: Model, spec: TrainSpec, device: torch.device) -> Objective:
    if any(task.type == "contrastive" for task in spec.tasks.values()):
        return MocoObjective(spec.stage, spec.tasks, spec.logit_adjustments, device, spec.seed, model)
    return Objective(spec.stage, spec.tasks, spec.logit_adjustments, device, spec.seed)


def plain_step(state: TrainingState, step: int, batch: Batch) -> None:
    """Compute a batch's gradients and record its losses; raises Refused when a loss is not finite."""
    sums_by_task = _compute_gradients(state, batch)
    for task, (loss_sum, num_labelled) in sums_by_task.items():
        if not math.isfinite(loss_sum):
            raise Refused(
                f"the loss became {loss_sum} at step {step}; "
                "lower stage.optimiser.lr or set stage.precision=fp32"
            )
        state.result.losses[task][0] += loss_sum
        state.result.losses[task][1] += num_labelled
    state.result.scans_seen += len(batch.slices)


def dp_step(state: TrainingState, step: int, patients: PatientBatches, dp_params: DPParams) -> None:
    """Compute the noisy gradient of the patients drawn for a step."""
    parameters = [*state.optimiser.parameters, *state.anchored_heads.parameters]
    moving = [parameter for parameter in parameters if parameter.requires_grad]
    seed = derive_seed(state.spec.seed, step)
    privatise_gradient(state.model, state.objective, patients, moving, dp_params, seed)


def _compute_gradients(state: TrainingState, batch: Batch) -> dict[str, tuple[float, int]]:
    """Compute a batch's gradients in `state.num_parts` parts, or in more when memory is too small.

    Returns {task: (summed loss, labelled scans)}. Raises Refused when a single scan does not fit.
    """
    num_labelled = state.objective.count_labelled(batch)
    random_state = state.objective.generator.get_state()
    while True:
        state.objective.generator.set_state(random_state)  # a repeated batch is augmented as before
        try:
            return _backward_in_parts(state, batch, num_labelled)
        except torch.OutOfMemoryError:
            if state.num_parts >= len(batch.slices):
                raise Refused(
                    "one scan does not fit the device's memory; "
                    "set stage.grad_checkpointing=true or a smaller preprocess.image_size"
                ) from None
        state.num_parts = min(2 * state.num_parts, len(batch.slices))
        log.warning(
            "a batch of %d scans does not fit the device's memory; it is computed in %d parts from now on",
            len(batch.slices),
            state.num_parts,
        )


def _backward_in_parts(
    state: TrainingState, batch: Batch, num_labelled: Mapping[str, int]
) -> dict[str, tuple[float, int]]:
    """Accumulate the gradients of the batch's parts; returns {task: (summed loss, labelled scans)}."""
    state.model.zero_grad(set_to_none=True)
    sums_by_task = dict.fromkeys(num_labelled, (0.0, 0))
    for part in batch.split_into(state.num_parts):
        losses = state.objective.compute_loss(state.model, part, num_labelled)
        for task, (loss_sum, count) in losses.sums_by_task.items():
            previous_sum, previous_count = sums_by_task[task]
            sums_by_task[task] = (loss_sum + previous_sum, count + previous_count)
        if losses.total.requires_grad:
            state.optimiser.backward(losses.total)
    return sums_by_task


@torch.no_grad()
def run_inference(
    model: Model,
    batches: Iterable[Tensor],
    output_fn: Callable[[Model, Tensor], Mapping[str, Tensor]],
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Run the model in evaluation mode and stack its outputs over all scans.

    Args:
        model: Is moved to the device.
        batches: uint8 slices [B, S, H, W].
        output_fn: Called with the model and slices in [0, 1]; returns {name: [B, ...]}.
        precision: fp32, bf16 or fp16.
        device: Where to compute.

    Returns:
        {name: float32 [N, ...]} on the CPU.
    """
    device = torch.device(device)
    model.to(device).eval()
    outputs: defaultdict[str, list[Tensor]] = defaultdict(list)
    for slices in batches:
        with autocast_context(device, precision):
            batch_outputs = output_fn(model, slices.to(device, non_blocking=True).float().div_(255))
        for name, value in batch_outputs.items():
            outputs[name].append(value.float().cpu())
    return {name: torch.cat(values) for name, values in outputs.items()}
