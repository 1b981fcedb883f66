"""Configuration: one schema, one override syntax, and a sentence for what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from common.config.compose import CONFIG_DIR, compose_config, prepare_config
from common.config.normalise import stage_tasks
from common.config.parse import config_to_dict, parse_config
from common.config.schema import Config, EvaluationConfig, Stage, Task
from common.config.validate import validate_config
from common.utils.errors import ConsiliumError


@pytest.mark.parametrize("group", [p.name for p in CONFIG_DIR.iterdir() if p.is_dir()])
def test_every_configuration_file_composes(group: str) -> None:
    for file in (CONFIG_DIR / group).glob("*.yaml"):
        extra = ["federation.centres=[a,b]"] if (group, file.stem) == ("federation", "folder") else []
        assert compose_config([f"{group}={file.stem}", *extra]).tasks


def test_configuration_survives_a_round_trip_through_json() -> None:
    config = compose_config(["stage.rounds=3"])
    assert parse_config(json.loads(json.dumps(config_to_dict(config)))) == config
    assert asdict(config)["stages"]["main"]["rounds"] == 3


def test_stage_override_applies_to_all_stages_and_stages_override_to_one() -> None:
    assert compose_config(["stage.rounds=3", "stage.optimiser.lr=0.5"]).stages["main"].optimiser.lr == 0.5
    assert compose_config(["stage.rounds=3", "stages.main.rounds=4"]).stages["main"].rounds == 4


def test_local_mode_keeps_every_parameter_at_the_centre() -> None:
    config = compose_config(["federation.mode=local"])
    assert all(s.local_layers == ["all"] for s in config.stages.values())
    assert all(t.head_update == "local" for t in config.tasks.values())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("recipe=multisorce", "recipe 'multisorce' is unknown; did you mean 'multisource'?"),
        ("backbone=smal", "did you mean 'small'"),
        ("aggregation.tua=1", "unknown key 'aggregation.tua'; did you mean 'tau'?"),
        ("stage.rouds=2", "did you mean 'rounds'"),
        ("tasks.covd.tau=1", "the recipe has no task 'covd'; did you mean 'covid'?"),
        ("aggregation.tau=5", r"aggregation.tau is 5.0; it must be in \[0, 2\]"),
        ("stage.rounds=-1", "stage.rounds is -1"),
        ("stage.rounds=many", "stages.main.rounds='many' is refused"),
        ("aggregation.method=fedsgd", "aggregation.method='fedsgd' is refused"),
        ("aggregation.tau", "has no '='"),
        ("federation=folder", "federation.centres is empty"),
        ("federation.centres=[a,a]", "names a centre twice"),
        ("evaluation.task=covd", "did you mean 'covid'"),
        ("preprocess.window=[300,-1000]", "the first value must be the lower one"),
        ("stage.tasks=[covd]", "did you mean 'covid'"),
        ("stage.local_layers=[all]", "exchanges nothing"),
        ("stage.rounds=0", "every stage of the recipe has 0 rounds"),
        ("evaluation.metric=rho", "evaluation.metric='rho' is refused"),
        ("federation.folds=2", "federation.folds is 2; it must be 3 or more"),
        (
            "federation.held_out_centres=[north,east,south,west]",
            r"it must name some of federation.centres, not all",
        ),
        ("stage.sampling_ratios={masked: -1}", "no share may be below 0"),
        ("stage.sampling_ratios={affected: 1}", "stages.main.sampling_ratios.affected"),
        (
            "stage.local_layers=[heads]",
            "keeps the heads at the centres, but the server updates the head of task 'source'; set its "
            "head_update: local",
        ),
    ],
)
def test_invalid_override_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConsiliumError, match=sentence) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


def test_layers_that_stay_in_one_stage_stay_in_all_later_ones() -> None:
    config = compose_config(["stage.local_layers=[batch_norm]", "tasks.source.head_update=local"])
    main = config.stages["main"]
    for later_layers in (["batch_norm"], ["all"]):
        later = replace(main, local_layers=later_layers)
        validate_config(replace(config, stages={"main": main, "later": later}))
    later = replace(main, local_layers=["heads"])
    with pytest.raises(
        ConsiliumError, match=r"stages\.later\.local_layers lacks 'batch_norm', which stage 'main' keeps at"
    ):
        validate_config(replace(config, stages={"main": main, "later": later}))


def test_centre_that_does_not_train_has_no_layers_of_its_own() -> None:
    with pytest.raises(ConsiliumError, match="tests a centre that does not train and so has none of its own"):
        compose_config(["stage.local_layers=[batch_norm]", "federation.evaluation=loco"])


# --- the papers' recipes ---

RECIPES = {  # the tasks of each stage that is played, and what is looked at
    "multisource": ({"main": ["covid", "source"]}, "CT"),
    "prognosis": ({"main": ["outcome", "brixia"]}, "XR"),
    "finegrained": ({"pretrain": ["moco"], "main": ["finding", "infection"]}, "XR"),
    "triage": ({"main": ["covid", "lesion"]}, "CT"),
    "transfer": ({"transition": ["transition"], "target": ["target"]}, "CT"),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipe_has_its_stages_and_only_their_tasks(recipe: str) -> None:
    stages, modality = RECIPES[recipe]
    config = compose_config([f"recipe={recipe}"])
    assert {name: stage_tasks(config, stage) for name, stage in config.stages.items()} == stages
    assert set(config.tasks) == {t for tasks in stages.values() for t in tasks}
    assert config.preprocess.modality == modality
    assert config.evaluation.task in list(stages.values())[-1]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (
            ["recipe=prognosis", "stages.scores.rounds=2"],
            {"scores": ["brixia"], "main": ["outcome", "brixia"]},
        ),
        (["recipe=prognosis", "stage.tasks=[outcome,right,left]"], {"main": ["outcome", "right", "left"]}),
        (
            ["recipe=prognosis", "stage.tasks=[outcome,regions]", "stage.rounds=3"],
            {"main": ["outcome", "regions"]},
        ),
        (["recipe=prognosis", "stage.tasks=[outcome]"], {"main": ["outcome"]}),
        (
            ["recipe=finegrained", "stages.pretrain.tasks=[inpainting]"],
            {"pretrain": ["inpainting"], "main": ["finding", "infection"]},
        ),
        (["recipe=finegrained", "stages.pretrain.rounds=0"], {"main": ["finding", "infection"]}),
        (["recipe=finegrained", "stages.main.tasks=[finding]"], {"pretrain": ["moco"], "main": ["finding"]}),
        (["recipe=triage", "stage.tasks=[covid]"], {"main": ["covid"]}),
        (
            ["recipe=transfer", "stages.transition.tasks=[soft]"],
            {"transition": ["soft"], "target": ["target"]},
        ),
        (["recipe=transfer", "stages.transition.rounds=0"], {"target": ["target"]}),
    ],
)
def test_variants_named_in_recipe_comments_compose(
    overrides: list[str], stages: dict[str, list[str]]
) -> None:
    config = compose_config(overrides)
    assert {name: stage_tasks(config, stage) for name, stage in config.stages.items()} == stages


def test_class_names_follow_from_bin_edges_and_clusters() -> None:
    assert compose_config(["recipe=prognosis"]).tasks["brixia"].classes == ["<=4", "<=9", "<=14", ">14"]
    soft = compose_config(["recipe=transfer", "stages.transition.tasks=[soft]"]).tasks["soft"]
    assert soft.classes == [str(k) for k in range(16)]
    assert compose_config(["recipe=multisource"]).tasks["source"].classes == []  # the federation's


def test_loco_needs_a_shared_model() -> None:
    assert (
        compose_config(["federation.evaluation=kfold", "federation.mode=local"]).federation.evaluation
        == "kfold"
    )
    with pytest.raises(
        ConsiliumError, match="loco tests a centre that did not train, which a local model cannot be"
    ):
        compose_config(["federation.evaluation=loco", "federation.mode=local"])


@pytest.mark.parametrize(("name", "label"), [("lungs", ""), ("lung", "lungs")])
def test_task_may_not_learn_our_own_lung_segmentation(name: str, label: str) -> None:
    """The column is filled by our finder where a hospital has none.

    A model would be scored on what we made up.
    """
    given = Config(
        tasks={name: Task(type="segmentation", label_column=label)},
        stages={"main": Stage()},
        evaluation=EvaluationConfig(task=name),
    )
    with pytest.raises(
        ConsiliumError, match="would learn the column 'lungs', which our lung segmentation fills in"
    ):
        prepare_config(given)


# --- privacy ---


def test_privacy_replaces_batch_norm_by_group_norm() -> None:
    assert compose_config([]).privacy.dp_level == "none"
    assert compose_config([]).backbone.norm == "batch"
    config = compose_config(["privacy=patient", "backbone=efficientnet_b7", "stage.precision=bf16"])
    assert config.backbone.norm == "group"
    assert (config.privacy.epsilon, config.privacy.noise_multiplier) == (8.0, 0.0)
    kept = compose_config(
        [
            "privacy=patient",
            "backbone.norm=frozen",
            "backbone.weights=imagenet.pth",
            "backbone=efficientnet_b7",
            "stage.precision=bf16",
        ]
    )
    assert kept.backbone.norm == "frozen"
    assert (
        compose_config(
            ["privacy=patient", "privacy.noise_multiplier=1.1", "privacy.epsilon=0"]
        ).privacy.noise_multiplier
        == 1.1
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["privacy=patients"], "did you mean 'patient'"),
        (
            ["privacy.epsilon=0"],
            "privacy.epsilon is 0.0 and privacy.noise_multiplier 0.0: one follows from the other",
        ),
        (["privacy.noise_multiplier=1"], "privacy.epsilon is 8.0 and privacy.noise_multiplier 1.0"),
        (["privacy.epsilon=-1"], "privacy.epsilon is -1.0"),
        (["privacy.epsilon=51"], "privacy.epsilon is 51.0"),
        (["privacy.noise_multiplier=0.1", "privacy.epsilon=0"], "privacy.noise_multiplier is 0.1"),
        (["privacy.delta=0"], "privacy.delta is 0.0"),
        (["privacy.clip_norm=0"], "privacy.clip_norm is 0.0"),
        (["backbone.num_groups=0"], "backbone.num_groups is 0"),
        (["recipe=finegrained"], "task 'moco' contrasts a scan with a queue of others"),
        (["tasks.source.head_update=moments"], "task 'source' sends class moments"),
        (["tasks.source.prior=local"], "task 'source' has the centre's own class counts"),
        (["recipe=transfer", "stages.transition.tasks=[soft]"], "task 'soft' sends sums of features"),
        (["recipe=triage"], "stages.main.sampling_ratios draws scans by their label"),
        (["stage.local_layers=[batch_norm]"], "keeps batch norms, which are replaced by group norms"),
        (["stage.local_layers=[all]", "tasks.source.head_update=local"], "exchanges no weights"),
        (["federation.mode=local"], "exchanges no weights"),
        (["stage.precision=fp16"], "precision=fp16"),
        (["stage.autotune=true"], "autotune=true trains on patients without protection"),
        (["federation.evaluation=loco"], "sends exact scores of patients that another fold trains on"),
        (["federation.evaluation=kfold"], "sends exact scores of patients that another fold trains on"),
        (["federation.fold=2"], "sends exact scores of patients that another fold trains on"),
        (["privacy.count_noise_multiplier=0"], "exact counts reveal patients"),
        (["privacy.count_noise_multiplier=0.1"], "it must be 0.3 to 1000"),
    ],
)
def test_patient_dp_refuses_what_would_reveal_more(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config(["privacy=patient", *overrides])
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
