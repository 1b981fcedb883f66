"""A recipe's digest follows from what is computed and released, and from nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from common.config.compose import compose_config, prepare_config
from common.config.names import name_clustering
from common.config.parse import config_to_dict, parse_config
from common.config.recipe_digest import compute_recipe_digest, list_recipe_digests
from common.config.schema import Config

BASE = ["federation=folder", "federation.centres=[north,south,west]"]


def digest_of(*overrides: str) -> str:
    return compute_recipe_digest(compose_config([*BASE, *overrides]))


def complete(config: Config, run_id: str = "run") -> Config:
    """Return a configuration as the coordinator completes it when a run starts, and as it travels."""
    tasks = {}
    for name, task in config.tasks.items():
        if task.num_clusters:
            task = replace(task, classes=["0", "1"], clustering_id=name_clustering(run_id, name))
        elif task.type == "multiclass" and not task.classes:
            task = replace(task, classes=["north", "south"])
        tasks[name] = task
    completed = prepare_config(replace(config, tasks=tasks))
    return parse_config(json.loads(json.dumps(config_to_dict(completed))))


@pytest.mark.parametrize("recipe", ["multisource", "triage", "transfer", "prognosis", "finegrained"])
def test_run_of_a_recipe_has_the_digest_of_the_recipe(recipe: str) -> None:
    config = compose_config([*BASE, f"recipe={recipe}"])
    assert compute_recipe_digest(complete(config)) == compute_recipe_digest(config)
    assert list_recipe_digests(config)[0] == compute_recipe_digest(config)


def test_clusters_that_the_federation_finds_are_not_part_of_the_digest() -> None:
    config = compose_config(
        [*BASE, "recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2,3]"]
    )
    assert compute_recipe_digest(complete(config)) == compute_recipe_digest(config)


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "federation.centres=[a,b,c,d]",
        "federation.name=elsewhere",
        "federation.data_root=/data",
        "federation.round_timeout=60",
        "federation.join_timeout=60",
        "federation.round_retries=0",
        "federation.quorum=0.5",
        "backbone.weights=timm",
        "recipe_name",
    ],
)
def test_what_changes_neither_computation_nor_release_leaves_the_digest(override: str) -> None:
    config = compose_config(BASE)
    if override == "recipe_name":
        assert compute_recipe_digest(replace(config, recipe="another")) == compute_recipe_digest(config)
    else:
        assert digest_of(override) == compute_recipe_digest(config)


@pytest.mark.parametrize(
    "override",
    [
        "recipe=triage",
        "tasks.covid.label_column=hiv",
        "tasks.covid.loss_weight=2",
        "stage.rounds=9",
        "stage.optimiser.lr=0.5",
        "stage.augment.p_flip=0.1",
        "stage.tasks=[covid]",
        "preprocess.num_slices=4",
        "backbone.name=resnet18",
        "aggregation.tau=0.5",
        "aggregation.compression=fp32",
        "evaluation.histogram_bins=4096",
        "evaluation.image_statistics=false",
        "evaluation.cross_site=last",
        "privacy=secagg",
        "federation.mode=local",
        "federation.held_out_centres=[west]",
        "federation.evaluation=kfold",
        "federation.evaluation=loco",
    ],
)
def test_what_changes_computation_or_release_changes_the_digest(override: str) -> None:
    assert digest_of(override) != digest_of()


def test_runs_of_a_cross_validation_belong_to_its_recipe_and_other_splits_do_not() -> None:
    config = compose_config([*BASE, "federation.evaluation=kfold", "federation.folds=4"])
    fold = replace(config, federation=replace(config.federation, evaluation="holdout", fold=2))
    assert list_recipe_digests(fold) == [compute_recipe_digest(config)]
    other_folds = replace(config, federation=replace(fold.federation, folds=12))
    assert compute_recipe_digest(config) not in list_recipe_digests(other_folds)
    loco = compose_config([*BASE, "federation.evaluation=loco"])
    without_one = replace(loco.federation, evaluation="holdout", held_out_centres=["west"])
    assert compute_recipe_digest(loco) in list_recipe_digests(replace(loco, federation=without_one))
    without_two = replace(without_one, held_out_centres=["west", "south"])
    assert compute_recipe_digest(loco) not in list_recipe_digests(replace(loco, federation=without_two))
    assert digest_of() not in list_recipe_digests(replace(loco, federation=without_one))
