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

from client.moco import Moco
from client.objective import Batch, Objective, autocast
from client.private import Patients, Protection, hide
from common.errors import Refused
from common.model import Model, shallow
from common.schema import Optimiser, Stage, Task
from common.seeds import derive
from common.tasks import labelled_rows

log = logging.getLogger("consilium.centre")


@dataclass
class Report:
    """What a round of local training did: optimiser steps, scans seen, {task: [summed loss, labelled scans]}."""

    steps: int = 0
    scans: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)


def train(
    model: Model,
    batches: Iterable[Batch | Patients],
    stage: Stage,
    tasks: Mapping[str, Task],
    adjustments: Mapping[str, Tensor],
    *,
    protection: Protection | None = None,
    progress: tuple[float, float] = (0.0, 1.0),
    steps: int = 1,
    rate: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Report:
    """Train in place on `steps` batches.

    `adjustments` [K] by task are added to the logits (common/imbalance.py); `progress` is the share of the stage done before and after this
    round, which the learning rate's schedule follows, and `rate` what the coordinator multiplies it by. The head of a task with `head: anchored`
    stays where it is while its gradient is summed; it moves once at the end by `-anchor_lr * sum of gradients`, so that the server's average of
    the deltas is a gradient step over all centres. A head with `head: moments` is fitted by the server and never moves here. With a `protection`
    a batch is the patients drawn, and the report says neither scans nor losses (client/private.py). Raises Refused when the loss is not finite.
    """
    device = torch.device(device)
    model.to(device).train()
    if stage.compile and any(map(shutil.which, ("g++", "clang++"))):
        model.encoder.compile(dynamic=False)
    elif stage.compile:
        log.warning("stage.compile: there is no C++ compiler here; trained without, to the same weights")
    heads = {t: list(model.heads[t].parameters()) for t in tasks}
    fixed = {id(p) for t, task in tasks.items() if task.head != "local" for p in heads[t]}
    idle = {id(p) for t, head in model.heads.items() if t not in tasks for p in head.parameters()}
    still = shallow(model, stage.freeze_share) | {n for n in model.state_dict() if any(fnmatch(n, pattern) for pattern in stage.freeze)}
    for name, p in model.named_parameters():
        p.requires_grad_(id(p) not in idle and name not in still)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in still:
            module.eval()  # in training mode its statistics would drift under frozen weights
    movable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in fixed]
    start = [p.detach().clone() for _, p in movable] if stage.proximal else []
    anchored = [p for t, task in tasks.items() if task.head == "anchored" for p in heads[t]]
    anchor_rates = [task.anchor_lr for t, task in tasks.items() if task.head == "anchored" for _ in heads[t]]
    anchor_sum = [torch.zeros_like(p) for p in anchored]
    optimiser = make_optimiser(movable, stage.optimiser, anchored)

    if any(task.kind == "contrast" for task in tasks.values()):
        objective: Objective = Moco(stage, tasks, adjustments, device, seed, model)
    else:
        objective = Objective(stage, tasks, adjustments, device, seed)
    scaler = torch.amp.GradScaler(device.type, enabled=stage.precision == "fp16" and device.type == "cuda")
    report = Report(losses={t: [0.0, 0.0] for t in tasks})
    parts = stage.accumulate
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # dropout
        for step, batch in enumerate(batches):
            lr = rate * learning_rate(stage.optimiser, progress[0] + (progress[1] - progress[0]) * step / max(steps, 1))
            for group in optimiser.param_groups:
                group["lr"] = lr * group["scale"]
            if protection is None:
                assert isinstance(batch, Batch)
                labelled = {t: int(labelled_rows(task, batch.targets[t]).sum()) for t, task in tasks.items()}
                sums, parts = _backward(model, objective, scaler, batch, parts, labelled)
                for t, (value, n) in sums.items():
                    if not math.isfinite(value):
                        raise Refused(f"the loss became {value} at step {step}; lower stage.optimiser.lr or set stage.precision=fp32")
                    report.losses[t][0] += value
                    report.losses[t][1] += n
                report.scans += len(batch.slices)
            else:
                assert not isinstance(batch, Batch), "a protected step wants the patients drawn (client/private.py)"
                moving = [p for p in (*(p for _, p in movable), *anchored) if p.requires_grad]
                hide(model, objective, batch, moving, protection, derive(seed, step))
            scale = scaler.get_scale()
            _step(optimiser, scaler, stage, [p for _, p in movable], start)
            if scaler.get_scale() >= scale:  # else fp16's gradients overflowed, and the step counts for nothing
                for total, p, pull in zip(anchor_sum, anchored, anchor_rates, strict=True):
                    if p.grad is not None:
                        total.add_(p.grad, alpha=pull)
            objective.stepped(model)
            report.steps += 1
    with torch.no_grad():
        for total, p in zip(anchor_sum, anchored, strict=True):
            p.sub_(total)
    return report


def _backward(
    model: Model, objective: Objective, scaler: torch.amp.GradScaler, batch: Batch, parts: int, labelled: Mapping[str, int]
) -> tuple[dict[str, tuple[float, int]], int]:
    """The batch's gradients, computed in `parts`, or in twice as many while the device's memory does not hold one. Returns {task: (summed loss,
    labelled scans)} and the number of parts that fitted. Raises Refused when a single scan does not fit."""
    drawn = objective.draws.get_state()
    while True:
        objective.draws.set_state(drawn)  # a batch begun again is changed at random as before
        model.zero_grad(set_to_none=True)
        sums = dict.fromkeys(labelled, (0.0, 0))
        try:
            for part in batch.parts(parts):
                losses = objective.loss(model, part, labelled)
                sums = {t: (value + sums[t][0], n + sums[t][1]) for t, (value, n) in losses.sums.items()}
                if losses.total.requires_grad:
                    scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
            return sums, parts
        except torch.OutOfMemoryError:
            if parts >= len(batch.slices):
                raise Refused(
                    "one scan does not fit the device's memory; set stage.checkpointing=true or a smaller preprocess.size"
                ) from None
        parts = min(2 * parts, len(batch.slices))
        log.warning("a batch of %d scans does not fit the device's memory; it is computed in %d parts", len(batch.slices), parts)


def _step(
    optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, stage: Stage, movable: list[nn.Parameter], start: list[Tensor]
) -> None:
    """One optimiser step with FedProx's pull towards the received weights (Li et al., MLSys 2020: mu/2 |w - w_global|^2)."""
    if all(p.grad is None for group in optimiser.param_groups for p in group["params"]):
        return  # a batch without labels; fp16's scaler refuses a step without gradients
    scaler.unscale_(optimiser)
    if stage.proximal:
        for p, origin in zip(movable, start, strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - origin, alpha=stage.proximal)
    if stage.optimiser.clip:
        nn.utils.clip_grad_norm_(movable, stage.optimiser.clip)
    scaler.step(optimiser)
    scaler.update()


def make_optimiser(
    parameters: list[tuple[str, nn.Parameter]], settings: Optimiser, anchored: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The stage's optimiser; heads and decoder have `head_lr` times its learning rate; weight decay spares vectors (biases and norms).

    `anchored` parameters are in it at learning rate 0, so that fp16's scaler looks after their gradients too.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters:
        decay = settings.weight_decay if p.ndim > 1 or settings.name != "adamw" else 0.0
        groups.setdefault((settings.head_lr if name.startswith(("heads.", "decoder.")) else 1.0, decay), []).append(p)
    made = [{"params": ps, "lr": settings.lr * scale, "scale": scale, "weight_decay": decay} for (scale, decay), ps in groups.items()]
    still = list(anchored) or ([] if made else [nn.Parameter(torch.zeros(1))])  # torch wants at least one parameter
    made += [{"params": still, "lr": 0.0, "scale": 0.0, "weight_decay": 0.0}] if still else []
    if settings.name == "sgd":
        return torch.optim.SGD(made, momentum=settings.momentum, fused=True)
    return (torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW)(made, fused=True)


def learning_rate(settings: Optimiser, done: float) -> float:
    """The learning rate when the share `done` in [0, 1] of the stage is behind; what a plateau takes off comes with the round."""
    return settings.lr if settings.schedule != "cosine" else settings.lr * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


@torch.no_grad()
def infer(
    model: Model,
    batches: Iterable[Tensor],
    outputs: Callable[[Model, Tensor], Mapping[str, Tensor]],
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """`outputs(model, slices in [0, 1])` on batches of uint8 slices [B, S, H, W], in evaluation mode, stacked over all scans [N, ...] on the CPU."""
    device = torch.device(device)
    model.to(device).eval()
    found: dict[str, list[Tensor]] = {}
    for slices in batches:
        with autocast(device, precision):
            result = outputs(model, slices.to(device, non_blocking=True).float().div_(255))
        for name, value in result.items():
            found.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in found.items()}
