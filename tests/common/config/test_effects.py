"""A key that has no effect given the others is refused, on the command line, in a file and at a centre."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.config.compose import CONFIG_DIR, compose_config, keep_effective_overrides, prepare_config
from common.config.effects.find import ALWAYS_EFFECTIVE, EFFECT_RULES, IneffectiveKey
from common.config.schema import (
    AggregationConfig,
    Config,
    EvaluationConfig,
    OptimiserConfig,
    PrivacyConfig,
    Stage,
    Task,
)
from common.config.validate import validate_config
from common.utils.errors import ConsiliumError


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            "privacy.epsilon=3",
            "privacy.epsilon=3 has no effect without differential privacy; add privacy=patient or "
            "privacy=central, or leave it out",
        ),
        (
            "privacy.noise_multiplier=1",
            "privacy.noise_multiplier=1 has no effect without differential privacy",
        ),
        ("privacy.clip_norm=2", "privacy.clip_norm=2 has no effect without differential privacy"),
        ("privacy=central privacy.dp_level=none", "privacy.epsilon=8 has no effect"),
        ("privacy.max_scans_per_patient=3", "without differential privacy of patients"),
        ("privacy=patient privacy.adaptive_clip_quantile=0.5", "without central differential privacy"),
        (
            "privacy=secagg stage.local_layers=[all] tasks.source.head_update=local",
            "no stage exchanges weights",
        ),
        ("privacy=central aggregation.max_norm_ratio=5", "where no update is compared with the others"),
        ("aggregation.method=fedadam", "use aggregation=fedadam, which sets 0.003"),
        ("aggregation.beta1=0.5", "without an adaptive server optimiser"),
        ("aggregation.num_byzantine=2", "without a robust rule"),
        ("aggregation=fedavg federation.mode=local", "aggregation.method=fedavg has no effect"),
        ("aggregation.compression=fp32 federation.mode=local", "aggregation.compression=fp32 has no effect"),
        ("aggregation.tau=0.5 federation.mode=central", "aggregation.tau=0.5 has no effect"),
        ("federation.folds=5", "without k-fold cross-validation"),
        ("federation.evaluation=kfold federation.fold=1", "federation.fold=1 has no effect"),
        ("federation.evaluation=loco federation.held_out_centres=[north]", "held_out_centres=[north] has no"),
        ("evaluation.metric=dice", "evaluation.metric=dice has no effect on task 'covid', which is binary"),
        (
            "recipe=prognosis evaluation.task=regions stage.tasks=[regions] evaluation.metric=auc",
            "use one of r2",
        ),
        ("recipe=multisource_personal evaluation.task=source", "evaluation.task 'source' has no effect"),
        ("evaluation.warmup=3", "without early stopping"),
        ("recipe=finegrained evaluation.histogram_bins=64", "without a binary task"),
        ("recipe=finegrained evaluation.missing_class=zero", "without a binary task"),
        ("privacy=patient evaluation.image_statistics=true", "where nobody is asked"),
        ("federation.mode=local evaluation.cross_site=last", "not whole models of single centres"),
        ("recipe=prognosis preprocess.num_slices=4", "a radiograph is one picture"),
        ("recipe=prognosis preprocess.window=[0,100]", "a radiograph is one picture"),
        (
            "preprocess.full_lung_search=true preprocess.selection=kds_paper",
            "full_lung_search=true has no effect",
        ),
        ("backbone.num_groups=8", "without group norms"),
        ("backbone.decoder.channels=[8]", "without a decoder"),
        ("recipe=triage backbone.slice_pooling=max", "no head reads pooled features"),
        ("backbone.norm=group stage.local_layers=[batch_norm]", "which leaves no batch norm"),
        ("tasks.covid.tau=1", "tasks.covid.tau=1 has no effect with prior: none"),
        ("tasks.covid.dice_weight=2", "in a task without masks"),
        ("tasks.covid.mask_ratio=0.5", "in a task that masks nothing"),
        ("tasks.covid.server_head_lr=0.1", "set its head_update: anchored"),
        ("tasks.covid.contrastive.temperature=0.5", "set its type: contrastive"),
        ("tasks.covid.label_columns=[a,b]", "name the column in label_column"),
        ("stage.tasks=[covid] tasks.source.tau=2", "no stage that is played has the task"),
        ("recipe=transfer stages.transition.rounds=0 stages.transition.freeze_fraction=1", "has no rounds"),
        ("stage.optimiser.momentum=0.5", "set optimiser.name=sgd"),
        ("stage.optimiser.plateau_factor=0.5", "set optimiser.schedule=plateau"),
        ("stage.augment.p_cutout=0 stage.augment.cutout_num_holes=3", "with p_cutout=0"),
        ("stage.local_steps=3 stage.local_epochs=2", "beside local_steps"),
        ("recipe=transfer stages.transition.tasks=[soft] tasks.soft.classes=[a,b]", "which have numbers"),
        ("recipe=prognosis tasks.brixia.classes=[low,high]", "name one class more than edges"),
    ],
)
def test_key_without_effect_is_refused_in_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(overrides.split())
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_key_that_is_given_its_default_in_vain_is_refused_too() -> None:
    with pytest.raises(IneffectiveKey, match=r"privacy.clip_norm=1 has no effect"):
        compose_config(["privacy.clip_norm=1"])


@pytest.mark.parametrize(
    "config",
    [
        replace(compose_config([]), privacy=PrivacyConfig(epsilon=3)),
        replace(compose_config([]), aggregation=AggregationConfig(beta1=0.5)),
        replace(compose_config([]), evaluation=EvaluationConfig(warmup=1)),
    ],
)
def test_centre_refuses_by_the_same_check_what_it_is_sent(config: Config) -> None:
    with pytest.raises(IneffectiveKey, match="has no effect"):
        validate_config(config)
    with pytest.raises(IneffectiveKey, match="has no effect"):
        prepare_config(config)


def test_override_that_takes_the_effect_from_a_files_key_sets_it_back() -> None:
    """Whoever switches early stopping off need not know that the recipe's file names a warm-up."""
    config = compose_config(["recipe=prognosis", "evaluation.patience=0", "stage.augment.p_affine=0"])
    assert config.evaluation.warmup == 0
    assert config.stages["main"].augment.translate == 0.2
    validate_config(config)


def test_override_for_all_stages_need_only_have_an_effect_in_one() -> None:
    overrides = ["recipe=finegrained", "stage.sampling_ratios={masked: 1}"]
    stages = compose_config(overrides).stages
    assert stages["pretrain"].sampling_ratios == {}  # contrasts scans, whatever their labels
    assert stages["main"].sampling_ratios == {"masked": 1.0}
    with pytest.raises(
        IneffectiveKey, match=r"stages.pretrain.sampling_ratios={'masked': 1.0} has no effect"
    ):
        compose_config(["recipe=finegrained", "stages.pretrain.sampling_ratios={masked: 1}"])


def test_recipe_file_that_sets_a_key_in_vain_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    recipe = folder / "recipe" / "multisource.yaml"
    recipe.write_text(recipe.read_text() + "\nprivacy:\n  clip_norm: 2.0\n")
    for overrides in ([], ["stage.rounds=3"], ["federation=folder", "federation.centres=[a,b]"]):
        with pytest.raises(IneffectiveKey, match=r"privacy.clip_norm=2 has no effect"):
            compose_config(overrides, folder)
    compose_config(["privacy=patient"], folder)


@pytest.mark.parametrize("recipe", [path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml")])
def test_every_recipe_composes_with_every_backbone_and_mode(recipe: str) -> None:
    for backbone in (CONFIG_DIR / "backbone").glob("*.yaml"):
        compose_config([f"recipe={recipe}", f"backbone={backbone.stem}"])
    for mode in ("central", "local"):
        compose_config([f"recipe={recipe}", f"federation.mode={mode}"])


def test_comparison_leaves_out_what_has_no_effect_in_a_mode() -> None:
    overrides = ["aggregation=fedadam", "aggregation.tau=0.5", "stage.rounds=2", "federation.quorum=0.5"]
    local = keep_effective_overrides(overrides, fixed=["federation.mode=local"])
    central = keep_effective_overrides(overrides, fixed=["federation.mode=central"])
    assert local == ["stage.rounds=2", "federation.quorum=0.5"]
    assert central == ["stage.rounds=2"]
    with pytest.raises(ConsiliumError, match="did you mean 'tau'"):
        keep_effective_overrides(["aggregation.tua=1"], fixed=["federation.mode=local"])


def test_no_key_has_two_rules() -> None:
    keys = [key for rule in EFFECT_RULES for key in rule.keys]
    assert len({*keys, *ALWAYS_EFFECTIVE}) == len(keys) + len(ALWAYS_EFFECTIVE)


def test_names_with_dots_do_not_confuse_the_rules() -> None:
    config = Config(tasks={"covid": Task()}, stages={"a.b": Stage(optimiser=OptimiserConfig(momentum=0.5))})
    with pytest.raises(IneffectiveKey, match=r"stages.a.b.optimiser.momentum=0.5 has no effect"):
        prepare_config(config)


# --- a stage's own value wins -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.main.optimiser={lr: 0.1}", "stage.optimiser.lr=0.2"],
        ["stages.main.optimiser.lr=0.1", "stage.optimiser={lr: 0.2}"],
        ["stage.optimiser={lr: 0.2}", "stages.main.optimiser={lr: 0.1}"],
    ],
)
def test_stages_own_value_wins_however_it_is_written(overrides: list[str]) -> None:
    assert compose_config(overrides).stages["main"].optimiser.lr == 0.1


def test_override_of_all_stages_wins_over_a_stages_file_key_by_key() -> None:
    overrides = [
        "recipe=transfer",
        "stage.optimiser={lr: 0.2, momentum: 0.5}",
        "stages.target.optimiser.lr=0.1",
    ]
    stages = compose_config(overrides).stages
    assert (stages["transition"].optimiser.lr, stages["target"].optimiser.lr) == (0.2, 0.1)
    assert (stages["transition"].optimiser.momentum, stages["target"].optimiser.momentum) == (0.5, 0.5)
