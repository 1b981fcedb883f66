"""Checks of a whole configuration: names that refer to other names, and settings that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from common.config.effects.find import check_effects
from common.config.normalise import stage_tasks
from common.config.recipe_checks import (
    check_batch_norms_exist,
    check_classes,
    check_evaluation,
    check_local_layers,
    check_server_learning_rate,
)
from common.config.schema import AggregationConfig, Config, SecureAggregationConfig
from common.utils.errors import ConsiliumError, suggest

RESERVED_TASK_NAMES = ("backbone", "decoder")  # groups of the model's parameters


def validate_config(config: Config) -> None:
    """Raise ConsiliumError, one sentence, for a normalised configuration that does not hold.

    It contradicts itself, or sets a key that has no effect given the others. The coordinator checks its
    configuration by this, and a centre what it is sent.
    """
    check_contradictions(config)
    check_effects(config)


def check_contradictions(config: Config) -> None:
    """Raise ConsiliumError for names that refer to nothing, and for settings that exclude each other."""
    _check_tasks(config)
    check_classes(config)
    _check_stages(config)
    check_local_layers(config)
    check_server_learning_rate(config)
    _check_robust_rule(config)
    _raise_first("privacy=central", _find_central_dp_conflicts(config))
    if config.privacy.dp_level == "patient":
        check_patient_dp(config)
    if config.privacy.secagg:
        _raise_first("privacy.secagg", _find_secagg_conflicts(config, config.privacy.secagg))
    check_evaluation(config)


def check_patient_dp(config: Config) -> None:
    """Raise ConsiliumError for what would reveal more about a patient than ``privacy=patient`` promises.

    A centre checks this too, for every configuration that it is sent.
    """
    _raise_first("privacy=patient", _find_patient_dp_conflicts(config))


def _raise_first(subject: str, conflicts: Iterator[str]) -> None:
    for conflict in conflicts:
        raise ConsiliumError(f"{subject}: {conflict}")


def _check_tasks(config: Config) -> None:
    if not config.stages:
        raise ConsiliumError("every stage of the recipe has 0 rounds; set some, e.g. stage.rounds=8")
    for name, task in config.tasks.items():
        if name in RESERVED_TASK_NAMES:
            raise ConsiliumError(
                f"a task cannot be called '{name}', which is a part of the model; rename the task"
            )
        if task.type == "segmentation" and (task.label_column or name) == "lungs":
            raise ConsiliumError(
                f"task '{name}' would learn the column 'lungs', which our lung segmentation fills in; "
                "rename the column"
            )
    for name, stage in config.stages.items():
        for task_name in stage.tasks:
            if task_name not in config.tasks:
                raise ConsiliumError(
                    f"stages.{name}.tasks names '{task_name}', which the recipe "
                    f"lacks{suggest(task_name, config.tasks)}"
                )
    if not config.tasks:
        raise ConsiliumError("the recipe has no tasks; it needs at least one under `tasks:`")


def _check_stages(config: Config) -> None:
    for name, stage in config.stages.items():
        check_batch_norms_exist(config, name)
        server_heads = [
            task for task in stage_tasks(config, stage) if config.tasks[task].head_update != "local"
        ]
        if not server_heads:
            continue
        if "heads" in stage.local_layers:
            raise ConsiliumError(
                f"stages.{name}.local_layers keeps the heads at the centres, but the server updates the "
                f"head of task '{server_heads[0]}'; set its head_update: local"
            )
        if "all" in stage.local_layers:
            raise ConsiliumError(
                f"stages.{name}.local_layers=[all] exchanges nothing, but the server updates the head of "
                f"task '{server_heads[0]}'; set its head_update: local"
            )


def _count_training_centres(config: Config) -> int:
    """Return how many centres train in a round, each with an update of its own."""
    federation = config.federation
    if federation.mode != "federated":
        return 1
    left_out = 1 if federation.evaluation == "loco" else 0
    return len(federation.centres) - len(federation.held_out_centres) - left_out


def _check_robust_rule(config: Config) -> None:
    settings = config.aggregation
    available = _count_training_centres(config)
    if settings.robust_rule != "none" and available < settings.min_contributions:
        raise ConsiliumError(
            f"aggregation.robust_rule={settings.robust_rule} with "
            f"aggregation.num_byzantine={settings.num_byzantine} needs "
            f"{settings.min_contributions} updates in a round, and here there are {available}; "
            "add centres or choose another rule"
        )


def _find_central_dp_conflicts(config: Config) -> Iterator[str]:
    if config.privacy.dp_level != "central":
        return
    mode = config.federation.mode
    robust_rule = config.aggregation.robust_rule
    cross_site = config.evaluation.cross_site
    if mode != "federated":
        yield f"federation.mode={mode} has no updates of several centres to hide one among; use federated"
    if robust_rule != "none":
        yield (
            f"aggregation.robust_rule={robust_rule} does not sum updates, so its noise cannot be calibrated; "
            "leave it out (updates are clipped anyway)"
        )
    if cross_site != "none":
        yield f"evaluation.cross_site={cross_site} shows each centre's own model to the others; leave it out"
    for name, task in config.tasks.items():
        if task.head_update == "moments" or task.num_clusters:
            yield (
                f"task '{name}' uses sums of features, which get no noise; "
                "set its head_update: local or anchored, and give it classes"
            )
    for name, stage in config.stages.items():
        if "all" in stage.local_layers or "batch_norm" in stage.local_layers:
            yield (
                f"stages.{name}.local_layers={stage.local_layers} keeps parameters that are not exchanged; "
                "leave it out"
            )


def _find_patient_dp_conflicts(config: Config) -> Iterator[str]:
    if config.federation.mode == "local":
        yield "federation.mode=local exchanges no weights, so there is nothing to protect"
    if not config.privacy.count_noise_multiplier:
        yield "privacy.count_noise_multiplier is 0, but exact counts reveal patients; set it to 5, say"
    cross_site = config.evaluation.cross_site
    yield from _find_cross_validation_conflicts(config)
    if config.privacy.query_noise_multiplier and cross_site != "none":
        yield (
            f"evaluation.cross_site={cross_site} asks for more scores than epsilon is planned for; leave it "
            "out"
        )
    yield from _find_revealing_tasks(config)
    yield from _find_revealing_stages(config)


def _find_cross_validation_conflicts(config: Config) -> Iterator[str]:
    """Yield a cross-validation with exact scores, which are of patients that another fold trains on."""
    federation = config.federation
    if config.privacy.query_noise_multiplier:
        return
    remedy = "set privacy.query_noise_multiplier, or use federation.evaluation=holdout"
    rule = "sends exact scores of patients that another fold trains on"
    if federation.evaluation != "holdout":
        yield f"federation.evaluation={federation.evaluation} {rule}; {remedy}"
    if federation.fold is not None:
        yield f"federation.fold={federation.fold} {rule}; {remedy}"


def _find_revealing_tasks(config: Config) -> Iterator[str]:
    noisy_scores = config.privacy.query_noise_multiplier > 0
    for name, task in config.tasks.items():
        if task.type == "contrastive":
            yield (
                f"task '{name}' contrasts a scan with a queue of others, so that a patient's gradient "
                "depends on other "
                "patients; use inpainting"
            )
        if task.head_update == "moments":
            yield (
                f"task '{name}' sends class moments of the features without noise; set its head_update: "
                "local or anchored"
            )
        if task.num_clusters:
            yield f"task '{name}' sends sums of features for its clusters without noise; give it classes"
        if noisy_scores and task.type not in ("binary", "multiclass"):
            yield (
                f"task '{name}' ({task.type}) is scored by sums that one patient can change without bound; "
                "set privacy.query_noise_multiplier=0"
            )
        if task.prior == "local":
            yield (
                f"task '{name}' has the centre's own class counts in the loss of every patient; "
                "set its prior: global or none"
            )


def _find_revealing_stages(config: Config) -> Iterator[str]:
    for name, stage in config.stages.items():
        if "batch_norm" in stage.local_layers:
            yield (
                f"stages.{name}.local_layers=[batch_norm] keeps batch norms, which are replaced by group "
                "norms; leave it out"
            )
        if "all" in stage.local_layers:
            yield (
                f"stages.{name}.local_layers=[all] exchanges no weights, so there is nothing to protect; "
                "run that stage without privacy"
            )
        if stage.sampling_ratios:
            yield (
                f"stages.{name}.sampling_ratios draws scans by their label, but every patient must have "
                "the same "
                "probability; leave it empty"
            )
        if stage.autotune:
            yield (
                f"stages.{name}.autotune=true trains on patients without protection to time it; "
                "set precision and channels_last yourself"
            )
        if stage.precision == "fp16":
            yield (
                f"stages.{name}.precision=fp16 skips a step when one patient's gradient overflows; use "
                "bf16 or fp32"
            )


def _find_secagg_conflicts(config: Config, settings: SecureAggregationConfig) -> Iterator[str]:
    federation = config.federation
    aggregation = config.aggregation
    if federation.mode != "federated":
        yield f"federation.mode={federation.mode} exchanges nothing between centres; use federated"
    if all("all" in stage.local_layers for stage in config.stages.values()):
        yield "no stage exchanges weights (local_layers: [all]); use privacy=none"
    if len(federation.centres) - len(federation.held_out_centres) < 3:
        yield "a sum over fewer than 3 centres reveals to each the other's numbers; train with 3 or more"
    if aggregation.max_norm_ratio != AggregationConfig().max_norm_ratio:
        yield (
            f"aggregation.max_norm_ratio={aggregation.max_norm_ratio:g} compares single updates, which "
            "nobody sees; "
            "leave it out (privacy.secagg.clip_value limits what one can do)"
        )
    if aggregation.robust_rule != "none":
        yield (
            f"aggregation.robust_rule={aggregation.robust_rule} compares single updates, which nobody sees; "
            "leave one of the two out"
        )
    if config.privacy.dp_level == "central":
        yield (
            "privacy.dp_level=central clips each centre's update at the coordinator, which sees none; use "
            "patient"
        )
    if config.privacy.query_noise_multiplier and settings.scope == "all":
        yield (
            "privacy.query_noise_multiplier puts noise on each centre's scores, which scope=all hides "
            "anyway; set it to 0"
        )
    if config.evaluation.cross_site != "none":
        yield (
            f"evaluation.cross_site={config.evaluation.cross_site} needs each centre's own model, which "
            "nobody sees; "
            "leave it out"
        )
    if settings.scope == "all":
        yield from _find_hidden_score_conflicts(config)


def _find_hidden_score_conflicts(config: Config) -> Iterator[str]:
    """Yield what needs a centre's own scores, which ``privacy.secagg.scope=all`` hides."""
    federation = config.federation
    reduction = config.evaluation.reduction
    if reduction != "pooled":
        yield (
            f"scope=all hides each centre's scores, which evaluation.reduction={reduction} needs; set "
            "evaluation.reduction=pooled"
        )
    if federation.held_out_centres or federation.evaluation == "loco":
        yield "scope=all hides each centre's scores, which federation.evaluation=loco needs; use scope=model"
    for name, stage in config.stages.items():
        if "all" in stage.local_layers:
            yield f"stages.{name}.local_layers=[all] is selected by each centre's own scores; use scope=model"
