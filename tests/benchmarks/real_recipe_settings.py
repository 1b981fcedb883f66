"""The settings that real_recipes.py compares: four recipes on real data, each with its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.real_sets import (
    Cohorts,
    make_finegrained_cohorts,
    make_prognosis_cohorts,
    make_transfer_cohorts,
    make_triage_cohorts,
)


class Column(NamedTuple):
    """A score of the table."""

    task: str
    view: str  # a centre, macro or pooled
    metric: str


@dataclass(frozen=True)
class Bench:
    """One recipe on its real data."""

    make_cohorts: Callable[[Path, Path], Cohorts]  # called with the folders of the data and of the results
    base: list[str]  # overrides of all settings
    settings: dict[str, list[str]]  # {setting: its overrides}
    columns: dict[str, Column]  # {title: its score}


MOBILENET = [
    "federation=folder",
    "backbone=mobilenetv1_075",
    "stage.optimiser.name=adamw",
    "stage.optimiser.schedule=cosine",
    "evaluation.checkpoint_selection=last",
]
# Recipes on films fix the number of steps a round at every centre (pooled: their sum), so that settings with
# fewer labelled scans do not train less.
CXR = [
    *MOBILENET,
    "preprocess.image_size=96",
    "preprocess.crop=body",
    "stage.batch_size=16",
    "stage.optimiser.weight_decay=0.01",
]
BENCHES = {
    "prognosis": Bench(
        make_prognosis_cohorts,
        [
            *CXR,
            "recipe=prognosis",
            "preprocess.crop=lungs",
            "federation.evaluation=kfold",
            "stages.main.rounds=14",
            "stage.local_steps=6",
            "stage.optimiser.head_lr_scale=10",
            "evaluation.patience=0",
        ],
        {
            "multi-dataset multi-task, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "single task (outcome alone), federated": ["stage.tasks=[outcome]"],
            "fine-tuned (scores, then outcome), federated": [
                "stages.scores.rounds=5",
                "stages.main.tasks=[outcome]",
            ],
        },
        {
            "outcome accuracy": Column("outcome", "pooled", "accuracy"),
            "F1": Column("outcome", "pooled", "f1"),
            "G-mean": Column("outcome", "pooled", "gmean"),
            "AUC pooled": Column("outcome", "pooled", "auc"),
            "AUC hannover": Column("outcome", "hannover", "auc"),
            "Brixia bin accuracy": Column("brixia", "pooled", "accuracy"),
        },
    ),
    "finegrained": Bench(
        make_finegrained_cohorts,
        [
            *CXR,
            "recipe=finegrained",
            "tasks.finding.classes=[covid,viral,bacterial,other]",
            "tasks.finding.prior=global",
            "tasks.infection.label_column=lung_mask",
            "stages.main.rounds=8",
            "stages.pretrain.rounds=4",
            "stage.local_steps=15",
            "backbone.decoder.channels=[128,64,32,16,8]",
            "stage.optimiser.lr=3e-4",
            "stages.pretrain.optimiser.lr=3e-4",
            "stage.optimiser.head_lr_scale=10",
        ],
        {
            "MoCo, then both tasks, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "inpainting, then both tasks, federated": ["stages.pretrain.tasks=[inpainting]"],
            "ImageNet only, both tasks, federated": ["stages.pretrain.rounds=0"],
            "MoCo, then classification alone, federated": ["stages.main.tasks=[finding]"],
        },
        {
            "balanced accuracy": Column("finding", "pooled", "balanced_accuracy"),
            "F1 (mean over classes)": Column("finding", "pooled", "f1"),
            "accuracy": Column("finding", "pooled", "accuracy"),
            "lung Dice": Column("infection", "pooled", "dice"),
        },
    ),
    "triage": Bench(
        make_triage_cohorts,
        [
            *MOBILENET,
            "recipe=triage",
            "preprocess.num_slices=1",
            "preprocess.image_size=96",
            "preprocess.crop=body",
            "backbone.decoder.channels=[128,64,32,16,8]",
            "stage.batch_size=16",
            "stage.local_steps=15",
            "stage.optimiser.lr=3e-4",
            "stages.main.rounds=8",
        ],
        {
            "head on the full-resolution map, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "head on the latent features, federated": [
                "tasks.covid.head_input=features",
                "tasks.covid.hidden_dims=[]",
            ],
            "identification alone, federated": ["stage.tasks=[covid]", "stage.sampling_ratios={}"],
            "segmentation alone, federated": [
                "stage.tasks=[lesion]",
                "stage.sampling_ratios={}",
                "evaluation.task=lesion",
                "evaluation.metric=dice",
            ],
        },
        {
            "AUC mosmed_a": Column("covid", "mosmed_a", "auc"),
            "AUC mosmed_b": Column("covid", "mosmed_b", "auc"),
            "Dice semiseg": Column("lesion", "semiseg", "dice"),
            "Spearman mosmed": Column("lesion", "pooled", "spearman"),
        },
    ),
    "transfer": Bench(
        make_transfer_cohorts,
        [
            "federation=folder",
            "backbone=mobilenetv1_075",
            "recipe=transfer",
            "preprocess.num_slices=1",
            "preprocess.image_size=96",
            "preprocess.crop=body",
            "stages.transition.rounds=6",
            "stages.target.rounds=20",
        ],
        {
            "ImageNet only": ["stages.transition.rounds=0"],
            "hard labels, federated": [],
            "hard labels, pooled": ["federation.mode=central"],
            "soft labels, federated": ["stages.transition.tasks=[soft]"],
        },
        {
            "F1": Column("target", "ucsd", "f1"),
            "accuracy": Column("target", "ucsd", "accuracy"),
            "precision": Column("target", "ucsd", "precision"),
            "recall": Column("target", "ucsd", "sensitivity"),
            "AUC": Column("target", "ucsd", "auc"),
        },
    ),
}
