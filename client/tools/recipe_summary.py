"""Say in plain words what a run of a recipe would compute, send and cost a hospital."""

from __future__ import annotations

import math
from collections.abc import Iterator

from common.config.normalise import stage_tasks
from common.config.recipe_digest import takes_classes_from_sources
from common.config.schema import Config, Stage, Task
from common.learning.losses import UNSUPERVISED_TYPES, list_read_columns
from common.modeling.model import parameter_layout
from common.modeling.parameters import Layout
from common.privacy.secure_aggregation import bytes_per_parameter, hides_statistics
from common.protocol.update_codec import count_channels, select_codec

BYTES_PER_CODE = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}
BYTES_PER_SCALE = 2
BYTES_PER_FLOAT = 4
TASK_WORDS = {
    "binary": "yes or no",
    "multiclass": "one of several classes",
    "regression": "numbers",
    "segmentation": "a mask",
    "inpainting": "the scan itself, of which a part is hidden (no labels)",
    "contrastive": "telling a scan from others (no labels)",
}


def describe_recipe(config: Config) -> Iterator[str]:
    """Yield lines of text about a validated configuration: what it computes, what it sends, what it costs."""
    yield "What it computes"
    yield f"  model: {config.backbone.name}, {parameter_layout(config).num_parameters:,} parameters"
    for name, task in config.tasks.items():
        yield f"  task {name}: {_describe_task(name, task)}"
    for name, stage in config.stages.items():
        yield f"  stage {name}: {_describe_stage(config, stage)}"
    yield f"  evaluation: {_describe_evaluation(config)}"
    yield "What leaves this hospital"
    yield f"  {_describe_updates(config)}"
    for statistic in _list_statistics(config):
        yield f"  {statistic}"
    yield "What it costs"
    yield f"  privacy: {_describe_privacy(config)}"
    yield from _describe_traffic(config)


def _describe_task(name: str, task: Task) -> str:
    parts = [TASK_WORDS[task.type]]
    columns = list_read_columns(name, task)
    if columns:
        parts.append(f"from the columns {', '.join(columns)}")
    if task.num_clusters:
        numbers = ", ".join(map(str, task.num_clusters))
        parts.append(f"classes: clusters of the scans' features, their number one of {numbers}")
    elif task.bin_edges:
        edges = ", ".join(f"{edge:g}" for edge in task.bin_edges)
        parts.append(f"classes by the edges {edges}")
    elif takes_classes_from_sources(name, task):
        parts.append("classes: the sources of all hospitals' scans")
    elif task.classes:
        parts.append(f"classes: {', '.join(task.classes)}")
    if task.prior == "global":
        parts.append("weighed by the classes' frequencies over all hospitals")
    return "; ".join(parts)


def _describe_stage(config: Config, stage: Stage) -> str:
    work = f"passes over the training scans in each: {stage.local_epochs:g}"
    if stage.local_steps is not None:
        work = f"steps in each: {stage.local_steps}"
    text = f"{stage.rounds} rounds ({work}) for {', '.join(stage_tasks(config, stage))}"
    if stage.local_layers:
        text += f"; these parts of the model stay here: {', '.join(stage.local_layers)}"
    return text


def _describe_evaluation(config: Config) -> str:
    evaluation = config.evaluation
    federation = config.federation
    text = f"{evaluation.metric} of task {evaluation.task}, on validation after each round and on test once"
    if federation.fold is not None or federation.evaluation == "kfold":
        text += f"; cross-validation: {federation.folds} runs, in each of which other patients are tested"
    elif federation.evaluation == "loco":
        text += "; cross-validation: a run for each hospital, which it does not train in and tests entirely"
    elif federation.held_out_centres:
        text += f"; all scans of {', '.join(federation.held_out_centres)} are tested, and none trained on"
    if evaluation.cross_site != "none":
        text += "; this hospital's own model is sent to the other hospitals and scored there"
    return text


def _describe_updates(config: Config) -> str:
    if config.privacy.secagg:
        return "the change of the model's weights, masked: the coordinator sees the sum over hospitals only"
    if all("all" in stage.local_layers for stage in config.stages.values()):
        return "no weights"
    return "this hospital's own change of the model's weights, after every round"


def _list_statistics(config: Config) -> Iterator[str]:
    """Yield the sums over scans that the run asks for."""
    visibility = (
        "masked, so that only sums over all hospitals are seen" if hides_statistics(config) else "by split"
    )
    yield f"numbers of scans in each class of each task, and without a label; {visibility}"
    statistics = {
        "binary": f"histograms of the scores in {config.evaluation.histogram_bins} bins, by class",
        "multiclass": "confusion matrices",
        "regression": "sums of predictions and labels, their squares and products",
        "segmentation": "overlaps of predicted and known masks",
    }
    for task_type, words in statistics.items():
        if any(task.type == task_type for task in config.tasks.values()):
            yield f"{words}; and summed losses"
    if any(task.type in UNSUPERVISED_TYPES for task in config.tasks.values()):
        yield "summed losses of the tasks without labels"
    for name, task in config.tasks.items():
        if task.head_update == "moments":
            yield f"task {name}: sums of the scans' features by class, and of their products"
        if task.num_clusters:
            yield f"task {name}: sums of the scans' features by cluster"
    if config.evaluation.image_statistics and config.privacy.dp_level != "patient":
        yield "histograms of image statistics (brightness, contrast and the like), once"
    yield "names of the columns asked for and of sources; numbers of scans, skipped scans, steps and seconds"


def _describe_privacy(config: Config) -> str:
    privacy = config.privacy
    runs = ""
    if config.federation.evaluation != "holdout" or config.federation.fold is not None:
        runs = " in each run of the cross-validation, and all of them add up"
    if privacy.dp_level == "patient":
        cost = f"epsilon {privacy.epsilon:g}"
        if not privacy.epsilon:
            cost = (
                f"noise of {privacy.noise_multiplier:g} times the clip norm; its epsilon follows from "
                "the number of patients here"
            )
        scores = "counts and scores get noise too"
        if not privacy.query_noise_multiplier:
            scores = "counts get noise too, and scores are exact, of patients who are never trained on"
        return f"patients are protected by {cost} at delta {privacy.delta:g}{runs}; {scores}"
    if privacy.dp_level == "central":
        return "noise is added by the coordinator, who sees this hospital's change without it"
    return "no differential privacy: nothing limits what can be read out of what leaves"


def _describe_traffic(config: Config) -> Iterator[str]:
    """Yield the estimated bytes of each stage and of the run: weights only, beside which sums are small."""
    layout = parameter_layout(config)
    first = layout.size * BYTES_PER_FLOAT
    total_up = 0
    total_down = first
    yield f"  bytes to receive at the start: about {format_bytes(first)}"
    for name, stage in config.stages.items():
        up, down = estimate_round_bytes(config, stage, layout)
        total_up += up * stage.rounds
        total_down += down * stage.rounds
        yield f"  stage {name}, each round: about {format_bytes(up)} up, {format_bytes(down)} down"
    yield f"  the whole run: about {format_bytes(total_up)} up, {format_bytes(total_down)} down"


def estimate_round_bytes(config: Config, stage: Stage, layout: Layout) -> tuple[int, int]:
    """Return the bytes of weights that a centre sends and receives in a round of a stage."""
    if "all" in stage.local_layers:
        return 0, 0
    down = _count_encoded_bytes(config, layout)
    if select_codec(config) == "fp32":
        down *= 2  # in full for training and for validation
    if config.privacy.secagg:
        rest = (layout.size - layout.num_parameters) * 8
        return layout.num_parameters * bytes_per_parameter(config) + rest, down
    return _count_encoded_bytes(config, layout), down


def _count_encoded_bytes(config: Config, layout: Layout) -> int:
    codec = select_codec(config)
    if codec == "fp32":
        return layout.size * BYTES_PER_FLOAT
    num_channels = sum(count_channels(slot) for slot in layout.parameter_slots)
    codes = math.ceil(layout.num_parameters * BYTES_PER_CODE[codec])
    rest = (layout.size - layout.num_parameters) * BYTES_PER_FLOAT
    return codes + num_channels * BYTES_PER_SCALE + rest


def format_bytes(number: int) -> str:
    """Return a number of bytes in the unit in which it is read easily."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    if number >= 1e6:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e3:.0f} kB"
