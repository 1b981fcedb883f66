"""When the keys of privacy, aggregation, federation and evaluation have an effect."""

from __future__ import annotations

from common.config.effects.rule import UNSUPERVISED_TYPES, EffectRule, Scope

# --- what keys depend on --------------------------------------------------------------------------


def _uses_dp(scope: Scope) -> bool:
    return scope.config.privacy.dp_level != "none"


def _exchanges_updates(scope: Scope) -> bool:
    """Return whether the coordinator gets updates: some stage does not keep everything at the centres."""
    return any("all" not in stage.local_layers for stage in scope.config.stages.values())


def _combines_centres(scope: Scope) -> bool:
    return scope.config.federation.mode == "federated" and _exchanges_updates(scope)


def _screens_updates(scope: Scope) -> bool:
    return _combines_centres(scope) and scope.config.privacy.dp_level != "central"


def _is_adaptive(scope: Scope) -> bool:
    return scope.config.aggregation.method != "fedavg" and _exchanges_updates(scope)


def _splits_by_fold(scope: Scope) -> bool:
    federation = scope.config.federation
    return federation.evaluation == "kfold" or federation.fold is not None


def _compares_rounds_of_all(scope: Scope) -> bool:
    """Return whether some decision takes a score over the centres: the best round, or a plateau."""
    has_plateau = any(stage.optimiser.schedule == "plateau" for stage in scope.config.stages.values())
    return _exchanges_updates(scope) or has_plateau


def _shares_last_stage(scope: Scope) -> bool:
    last_stage = list(scope.config.stages.values())[-1]
    return scope.config.federation.mode == "federated" and not last_stage.local_layers


def _hides_scores(scope: Scope) -> bool:
    secagg = scope.config.privacy.secagg
    return secagg is not None and secagg.scope == "all"


def _asks_image_statistics(scope: Scope) -> bool:
    return scope.config.privacy.dp_level != "patient" and not _hides_scores(scope)


def _has_binary_task(scope: Scope) -> bool:
    return any(task.type == "binary" for task in scope.config.tasks.values())


def _computes_challenge_score(scope: Scope) -> bool:
    return _has_binary_task(scope) and not _hides_scores(scope)


def _selects_by_metric(scope: Scope) -> bool:
    task = scope.config.tasks.get(scope.config.evaluation.task)
    return task is not None and task.type not in UNSUPERVISED_TYPES


# --- the rules ------------------------------------------------------------------------------------

PRIVACY_RULES = (
    EffectRule(
        ("privacy.epsilon", "privacy.noise_multiplier", "privacy.delta", "privacy.clip_norm"),
        "without differential privacy",
        "add privacy=patient or privacy=central",
        _uses_dp,
    ),
    EffectRule(
        (
            "privacy.query_noise_multiplier",
            "privacy.count_noise_multiplier",
            "privacy.max_scans_per_patient",
        ),
        "without differential privacy of patients",
        "add privacy=patient",
        lambda scope: scope.config.privacy.dp_level == "patient",
    ),
    EffectRule(
        ("privacy.adaptive_clip_quantile",),
        "without central differential privacy",
        "add privacy=central",
        lambda scope: scope.config.privacy.dp_level == "central",
    ),
)

AGGREGATION_RULES = (
    EffectRule(
        ("aggregation.method",),
        "where nothing is exchanged",
        "use federation.mode=federated without stage.local_layers=[all]",
        _exchanges_updates,
    ),
    EffectRule(
        ("aggregation.server_lr",),
        "where nothing is exchanged",
        "use federation.mode=federated without stage.local_layers=[all]",
        _exchanges_updates,
        is_shared=True,
    ),
    EffectRule(
        ("aggregation.tau", "aggregation.weight_by", "aggregation.compression"),
        "where updates of several centres are not combined",
        "use federation.mode=federated without stage.local_layers=[all]",
        _combines_centres,
    ),
    EffectRule(
        ("aggregation.beta1", "aggregation.beta2", "aggregation.eps"),
        "without an adaptive server optimiser",
        "use aggregation=fedadam or aggregation=fedyogi",
        _is_adaptive,
    ),
    EffectRule(
        ("aggregation.max_norm_ratio",),
        "where no update is compared with the others",
        "use federation.mode=federated without privacy=central, whose clip norm limits every update",
        _screens_updates,
    ),
    EffectRule(
        ("aggregation.num_byzantine",),
        "without a robust rule",
        "set aggregation.robust_rule",
        lambda scope: scope.config.aggregation.robust_rule != "none",
    ),
)

FEDERATION_RULES = (
    EffectRule(
        ("federation.folds",),
        "without k-fold cross-validation",
        "use federation.evaluation=kfold",
        _splits_by_fold,
    ),
    EffectRule(
        ("federation.fold",),
        "beside federation.evaluation=kfold, which runs every fold",
        "use federation.evaluation=holdout for a single fold",
        lambda scope: scope.config.federation.evaluation != "kfold",
    ),
    EffectRule(
        ("federation.held_out_centres",),
        "beside federation.evaluation=loco, which holds out every centre in turn",
        "use federation.evaluation=holdout",
        lambda scope: scope.config.federation.evaluation != "loco",
    ),
    EffectRule(
        ("federation.quorum",),
        "with federation.mode=central, where one node has all data",
        "use federation.mode=federated",
        lambda scope: scope.config.federation.mode != "central",
    ),
)

EVALUATION_RULES = (
    EffectRule(
        ("evaluation.metric",),
        "with an evaluation.task that has no labels",
        "set evaluation.task to a task with labels",
        _selects_by_metric,
        is_shared=True,
    ),
    EffectRule(
        ("evaluation.reduction",),
        "where every centre selects its own model",
        "use federation.mode=federated without stage.local_layers=[all]",
        _compares_rounds_of_all,
        is_shared=True,
    ),
    EffectRule(
        ("evaluation.threshold", "evaluation.histogram_bins"),
        "without a binary task",
        "add one",
        _has_binary_task,
    ),
    EffectRule(
        ("evaluation.missing_class",),
        "without a binary task whose scores of single centres are known",
        "add one, without privacy.secagg.scope=all",
        _computes_challenge_score,
    ),
    EffectRule(
        ("evaluation.cross_site",),
        "where the last stage's updates are not whole models of single centres",
        "use federation.mode=federated without stage.local_layers",
        _shares_last_stage,
    ),
    EffectRule(
        ("evaluation.image_statistics",),
        "with privacy=patient or privacy.secagg.scope=all, where nobody is asked",
        "use privacy=none",
        _asks_image_statistics,
        allowed_anyway=(False,),
    ),
    EffectRule(
        ("evaluation.warmup",),
        "without early stopping",
        "set evaluation.patience",
        lambda scope: scope.config.evaluation.patience > 0,
    ),
)

RUN_RULES = (*PRIVACY_RULES, *AGGREGATION_RULES, *FEDERATION_RULES, *EVALUATION_RULES)
