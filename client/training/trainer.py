"""Local training and inference: a model, batches, tasks, a stage. Knows nothing of federation, files or Flower."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from client.training.dp_sgd import DPParams, PatientBatches, privatise_gradient
from client.training.moco import MocoObjective
from client.training.objective import Batch, Objective, autocast_context
from common.config.schema import OptimiserConfig, Stage, Task
from common.learning.losses import find_labelled_rows
from common.learning.seeds import derive_seed
from common.modeling.model import Model, shallow_parameter_names
from common.utils.errors import Refused

log = logging.getLogger("consilium.centre")


@dataclass
class TrainResult:
    """What a round of local training did: optimiser steps, scans seen, {task: [summed loss, labelled scans]}."""

    steps: int = 0
    scans_seen: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)


def train(
    model: Model,
    batches: Iterable[Batch | PatientBatches],
    stage: Stage,
    tasks: Mapping[str, Task],
    logit_adjustments: Mapping[str, Tensor],
    *,
    dp_params: DPParams | None = None,
    stage_progress: tuple[float, float] = (0.0, 1.0),
    num_steps: int = 1,
    lr_scale: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Train in place on `steps` batches.

    `adjustments` [K] by task are added to the logits (common/learning/class_imbalance.py); `progress` is the share of the stage done before and after this
    round, which the learning rate's schedule follows, and `rate` what the coordinator multiplies it by. The head of a task with `head: anchored`
    stays where it is while its gradient is summed; it moves once at the end by `-anchor_lr * sum of gradients`, so that the server's average of
    the deltas is a gradient step over all centres. A head with `head: moments` is fitted by the server and never moves here. With a `protection`
    a batch is the patients drawn, and the report says neither scans nor losses (client/training/dp_sgd.py). Raises Refused when the loss is not finite.
    """
    device = torch.device(device)
    model.to(device).train()
    if stage.torch_compile and any(map(shutil.which, ("g++", "clang++"))):
        model.encoder.compile(dynamic=False)
    elif stage.torch_compile:
        log.warning(
            "stage.torch_compile: there is no C++ compiler here; trained without, to the same weights"
        )
    heads = {t: list(model.heads[t].parameters()) for t in tasks}
    fixed = {id(p) for t, task in tasks.items() if task.head_update != "local" for p in heads[t]}
    idle = {id(p) for t, head in model.heads.items() if t not in tasks for p in head.parameters()}
    still = shallow_parameter_names(model, stage.freeze_fraction) | {
        n for n in model.state_dict() if any(fnmatch(n, pattern) for pattern in stage.freeze)
    }
    for name, p in model.named_parameters():
        p.requires_grad_(id(p) not in idle and name not in still)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in still:
            module.eval()  # in training mode its statistics would drift under frozen weights
    movable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in fixed]
    start = [p.detach().clone() for _, p in movable] if stage.fedprox_mu else []
    anchored = [p for t, task in tasks.items() if task.head_update == "anchored" for p in heads[t]]
    anchor_rates = [
        task.server_head_lr for t, task in tasks.items() if task.head_update == "anchored" for _ in heads[t]
    ]
    anchor_sum = [torch.zeros_like(p) for p in anchored]
    optimiser = make_optimiser(movable, stage.optimiser, anchored)

    if any(task.type == "contrastive" for task in tasks.values()):
        objective: Objective = MocoObjective(stage, tasks, logit_adjustments, device, seed, model)
    else:
        objective = Objective(stage, tasks, logit_adjustments, device, seed)
    scaler = torch.amp.GradScaler(device.type, enabled=stage.precision == "fp16" and device.type == "cuda")
    report = TrainResult(losses={t: [0.0, 0.0] for t in tasks})
    parts = stage.grad_accum_steps
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # dropout
        for step, batch in enumerate(batches):
            lr = lr_scale * scheduled_learning_rate(
                stage.optimiser,
                stage_progress[0] + (stage_progress[1] - stage_progress[0]) * step / max(num_steps, 1),
            )
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"]
            if dp_params is None:
                assert isinstance(batch, Batch)
                labelled = {
                    t: int(find_labelled_rows(task, batch.targets[t]).sum()) for t, task in tasks.items()
                }
                sums, parts = _backward_in_parts(model, objective, scaler, batch, parts, labelled)
                for t, (value, n) in sums.items():
                    if not math.isfinite(value):
                        raise Refused(
                            f"the loss became {value} at step {step}; lower stage.optimiser.lr or set stage.precision=fp32"
                        )
                    report.losses[t][0] += value
                    report.losses[t][1] += n
                report.scans_seen += len(batch.slices)
            else:
                assert not isinstance(batch, Batch), (
                    "a protected step wants the patients drawn (client/training/dp_sgd.py)"
                )
                moving = [p for p in (*(p for _, p in movable), *anchored) if p.requires_grad]
                privatise_gradient(model, objective, batch, moving, dp_params, derive_seed(seed, step))
            scale = scaler.get_scale()
            _optimiser_step(optimiser, scaler, stage, [p for _, p in movable], start)
            if (
                scaler.get_scale() >= scale
            ):  # else fp16's gradients overflowed, and the step counts for nothing
                for total, p, pull in zip(anchor_sum, anchored, anchor_rates, strict=True):
                    if p.grad is not None:
                        total.add_(p.grad, alpha=pull)
            objective.after_step(model)
            report.steps += 1
    with torch.no_grad():
        for total, p in zip(anchor_sum, anchored, strict=True):
            p.sub_(total)
    return report


def _backward_in_parts(
    model: Model,
    objective: Objective,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    num_parts: int,
    num_labelled: Mapping[str, int],
) -> tuple[dict[str, tuple[float, int]], int]:
    """The batch's gradients, computed in `parts`, or in twice as many while the device's memory does not hold one. Returns {task: (summed loss,
    labelled scans)} and the number of parts that fitted. Raises Refused when a single scan does not fit."""
    drawn = objective.generator.get_state()
    while True:
        objective.generator.set_state(drawn)  # a batch begun again is changed at random as before
        model.zero_grad(set_to_none=True)
        sums = dict.fromkeys(num_labelled, (0.0, 0))
        try:
            for part in batch.split_into(num_parts):
                losses = objective.compute_loss(model, part, num_labelled)
                sums = {
                    t: (value + sums[t][0], n + sums[t][1]) for t, (value, n) in losses.sums_by_task.items()
                }
                if losses.total.requires_grad:
                    scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
            return sums, num_parts
        except torch.OutOfMemoryError:
            if num_parts >= len(batch.slices):
                raise Refused(
                    "one scan does not fit the device's memory; set stage.grad_checkpointing=true or a smaller preprocess.image_size"
                ) from None
        num_parts = min(2 * num_parts, len(batch.slices))
        log.warning(
            "a batch of %d scans does not fit the device's memory; it is computed in %d parts",
            len(batch.slices),
            num_parts,
        )


def _optimiser_step(
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    stage: Stage,
    movable: list[nn.Parameter],
    start: list[Tensor],
) -> None:
    """One optimiser step with FedProx's pull towards the received weights (Li et al., MLSys 2020: mu/2 |w - w_global|^2)."""
    if all(p.grad is None for group in optimiser.param_groups for p in group["params"]):
        return  # a batch without labels; fp16's scaler refuses a step without gradients
    scaler.unscale_(optimiser)
    if stage.fedprox_mu:
        for p, origin in zip(movable, start, strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - origin, alpha=stage.fedprox_mu)
    if stage.optimiser.max_grad_norm:
        nn.utils.clip_grad_norm_(movable, stage.optimiser.max_grad_norm)
    scaler.step(optimiser)
    scaler.update()


def make_optimiser(
    parameters: list[tuple[str, nn.Parameter]],
    settings: OptimiserConfig,
    anchored: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The stage's optimiser; heads and decoder have `head_lr` times its learning rate; weight decay spares vectors (biases and norms).

    `anchored` parameters are in it at learning rate 0, so that fp16's scaler looks after their gradients too.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters:
        decay = settings.weight_decay if p.ndim > 1 or settings.name != "adamw" else 0.0
        groups.setdefault(
            (settings.head_lr_scale if name.startswith(("heads.", "decoder.")) else 1.0, decay), []
        ).append(p)
    made = [
        {"params": ps, "lr": settings.lr * scale, "scale": scale, "weight_decay": decay}
        for (scale, decay), ps in groups.items()
    ]
    still = list(anchored) or (
        [] if made else [nn.Parameter(torch.zeros(1))]
    )  # torch wants at least one parameter
    made += [{"params": still, "lr": 0.0, "scale": 0.0, "weight_decay": 0.0}] if still else []
    if settings.name == "sgd":
        return torch.optim.SGD(made, momentum=settings.momentum, fused=True)
    return (torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW)(made, fused=True)


def scheduled_learning_rate(settings: OptimiserConfig, progress: float) -> float:
    """The learning rate when the share `done` in [0, 1] of the stage is behind; what a plateau takes off comes with the round."""
    return (
        settings.lr
        if settings.schedule != "cosine"
        else settings.lr * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    )


@torch.no_grad()
def run_inference(
    model: Model,
    batches: Iterable[Tensor],
    output_fn: Callable[[Model, Tensor], Mapping[str, Tensor]],
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """`outputs(model, slices in [0, 1])` on batches of uint8 slices [B, S, H, W], in evaluation mode, stacked over all scans [N, ...] on the CPU."""
    device = torch.device(device)
    model.to(device).eval()
    found: dict[str, list[Tensor]] = {}
    for slices in batches:
        with autocast_context(device, precision):
            result = output_fn(model, slices.to(device, non_blocking=True).float().div_(255))
        for name, value in result.items():
            found.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in found.items()}
