"""Name a recipe by its content: a digest of everything that decides what is computed and what leaves.

A hospital approves a recipe by this digest (client/site/approvals.py), since a recipe's name is a text that
the coordinator writes. Left out is what changes neither: names, seed, centres, timeouts, folders; the file of
the initial weights, which no centre can check; and what the coordinator fills in when a run starts. What it
fills in is bounded elsewhere: classes of a `source` task are plain texts of a limited number
(common/config/names.py); the number of clusters, their classes and their id follow from the recipe and the
run (client/federation/request_validation.py); the fold of a k-fold cross-validation is one of its folds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from common.config.parse import config_to_dict, parse_config
from common.config.schema import Config, FederationConfig, Task

CONTENT_VERSION = 1  # raised when the same content is written in another way
SOURCE_COLUMN = "source"


def compute_recipe_digest(config: Config) -> str:
    """Return the SHA-256, 64 hexadecimal digits, of a validated configuration's content.

    It is the same for the recipe as it is composed, for a run of it as the coordinator has completed it, and
    for each run of a k-fold cross-validation.
    """
    content = json.dumps(_describe_content(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()


def list_recipe_digests(config: Config) -> list[str]:
    """Return the digests of the recipes that a run may belong to: its own first.

    A run with one centre held out may be one of a leave-one-centre-out cross-validation.
    """
    digests = [compute_recipe_digest(config)]
    federation = config.federation
    if (
        federation.evaluation == "holdout"
        and federation.fold is None
        and len(federation.held_out_centres) == 1
    ):
        cross_validation = replace(federation, evaluation="loco", held_out_centres=[])
        digests.append(compute_recipe_digest(replace(config, federation=cross_validation)))
    return digests


def takes_classes_from_sources(name: str, task: Task) -> bool:
    """Return whether the coordinator fills in a task's classes: the federation's sources."""
    return task.type == "multiclass" and not task.bin_edges and (task.label_column or name) == SOURCE_COLUMN


def _describe_content(config: Config) -> dict[str, Any]:
    """Return the content as JSON values; tasks and stages in their order, on which the weights' depends."""
    parsed = parse_config(config_to_dict(config))  # numbers of one kind, whether composed or received
    values = config_to_dict(parsed)
    backbone = dict(values["backbone"])
    del backbone["weights"]
    return {
        "version": CONTENT_VERSION,
        "tasks": [_describe_task(name, task, values["tasks"][name]) for name, task in parsed.tasks.items()],
        "stages": list(values["stages"].items()),
        "backbone": backbone,
        "preprocess": values["preprocess"],
        "aggregation": values["aggregation"],
        "privacy": values["privacy"],
        "evaluation": values["evaluation"],
        "mode": parsed.federation.mode,
        "splits": _describe_splits(parsed.federation),
    }


def _describe_task(name: str, task: Task, values: dict[str, Any]) -> list[Any]:
    settings = dict(values)
    del settings["clustering_id"]
    if task.num_clusters or takes_classes_from_sources(name, task):
        del settings["classes"]
    return [name, settings]


def _describe_splits(federation: FederationConfig) -> dict[str, Any]:
    """Return which patients are trained on, validated on and tested on."""
    held_out = sorted(federation.held_out_centres)
    if federation.evaluation == "kfold" or federation.fold is not None:
        return {"evaluation": "kfold", "folds": federation.folds, "held_out_centres": held_out}
    return {"evaluation": federation.evaluation, "held_out_centres": held_out}
