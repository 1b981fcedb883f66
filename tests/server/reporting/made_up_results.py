"""Results as runs leave them, with every part, for what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.config.schema import Config, EvaluationConfig, Task
from common.learning.metrics import (
    compute_binary_metrics,
    compute_challenge_score,
    compute_multiclass_metrics,
    compute_regression_sums,
    compute_score_histogram,
    explain_undefined_binary,
    explain_undefined_multiclass,
    summarise_centres,
)
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.protocol.messages import Sums
from server.analysis import score_tables as tables

CENTRES = ("north", "east", "south", "west")
STAGES = (("pretraining", 3), ("main", 6))


def scored(hists: dict[str, Any]) -> dict[str, Any]:
    """A binary task's part of a result."""
    per_centre = {centre: compute_binary_metrics(hist) for centre, hist in hists.items()}
    views = summarise_centres(per_centre, compute_binary_metrics(np.sum(list(hists.values()), axis=0)))
    shown = {
        centre: {**values, "loss": 0.4, "reasons": explain_undefined_binary(hists[centre])}
        for centre, values in per_centre.items()
    }
    return {
        "centres": shown,
        **views,
        "hist": {c: h.tolist() for c, h in hists.items()},
        "challenge_score": compute_challenge_score(hists.values()),
    }


def sourced(centres: tuple[str, ...], right: float) -> dict[str, Any]:
    """The source task's part: each centre sees one class."""
    confusions = {}
    for k, centre in enumerate(centres):
        confusions[centre] = np.zeros((len(centres), len(centres)))
        confusions[centre][k, [k, (k + 1) % len(centres)]] = [30 * right, 30 * (1 - right)]
    per_centre = {centre: compute_multiclass_metrics(c) for centre, c in confusions.items()}
    views = summarise_centres(
        per_centre, compute_multiclass_metrics(np.sum(list(confusions.values()), axis=0))
    )
    return {
        "centres": {
            c: {**v, "reasons": explain_undefined_multiclass(confusions[c])} for c, v in per_centre.items()
        },
        **views,
    }


def sample(centres: tuple[str, ...] = CENTRES) -> dict[str, Any]:
    """A finished federated run's result, as saved in metrics.json: every part that a report may show. The third centre has one class."""
    bits = np.random.default_rng(4)

    def scores(skill: float) -> dict[str, Any]:
        hists = {}
        for k, centre in enumerate(centres):
            truth = bits.integers(0, 2, 60).astype(float) * (k != 2)
            hists[centre] = compute_score_histogram(
                bits.normal(0, 2, 60) + skill * (1 - 0.15 * (k % 4)) * (2 * truth - 1), truth
            )
        return scored(hists)

    stages = []
    for stage, (name, count) in enumerate(STAGES):
        start: dict[str, Any] = {
            "round": 0,
            "seconds": 0.0,
            "bytes_up": 0,
            "bytes_down": 0,
            "weights": {},
            "effective": {},
            "centres": {},
        }
        rounds = [{**start, "val": {"covid": scores(0.3 + stage), "source": sourced(centres, 0.4)}}]
        for r in range(1, count + 1):
            there = [
                c for k, c in enumerate(centres) if (stage, r, k) != (1, 3, 1)
            ]  # east drops out of a round
            replies: dict[str, dict[str, Any]] = {}
            for k, c in enumerate(there):
                replies[c] = {
                    "loss": 0.7 / (r + stage) + 0.05 * (k % 5),
                    "scans": 30 + k,
                    "steps": 4,
                    "seconds": 2.0 + 0.7 * (k % 6),
                }
                replies[c] |= {"norm": 0.4, "accepted": True, "reason": None}
            if (stage, r) == (1, 5):
                replies[centres[-1]] |= {
                    "accepted": False,
                    "reason": "update not finite",
                    "loss": float("nan"),
                }
            used = [c for c in there if replies[c]["accepted"]]
            share = {c: (2.0 if c == centres[0] else 1.0) / (len(used) + 1) for c in used}
            weights = {"backbone": share, "covid": share, "source": dict.fromkeys(used, 1 / len(used))}
            val = scores(0.4 + 0.25 * r + stage)
            del val["hist"]
            rounds.append(
                {
                    "round": r,
                    "seconds": 7.5 + 0.3 * r,
                    "bytes_up": 9_400_000 * len(there),
                    "bytes_down": 9_400_000 * len(centres),
                    "weights": weights,
                    "effective": {part: 1 / sum(w * w for w in of.values()) for part, of in weights.items()},
                    "centres": replies,
                    "val": {"covid": val, "source": sourced(centres, 0.5 + 0.05 * r)},
                }
            )
        stages.append(
            {"name": name, "rounds": rounds, "best": {"stage": name, "round": count - 1, "value": 0.91}}
        )
    counts = {"train": 338, "val": 88, "test": 60}
    return {
        "run": "2026-03-01-multisource-7f3a",
        "recipe": "multisource",
        "mode": "federated",
        "seed": 1,
        "status": "finished",
        "started": "2026-03-01 12:00 UTC",
        "seconds": 154.2,
        "config": {
            "recipe": "multisource",
            "evaluation": {"task": "covid", "metric": "auc"},
            "aggregation": {"tau": 1.0},
        },
        "centres": {
            c: {
                "counts": {
                    s: {
                        "covid": {
                            "no covid": n - 3 * k % n,
                            "covid": 0 if k == 2 else n // 2,
                            "unlabelled": 0.0,
                        },
                        "source": {**{other: n if other == c else 0 for other in centres}, "unlabelled": k},
                    }
                    for s, n in counts.items()
                },
                "sources": [c],
                "skipped": k,
                "skipped_why": {"no pixel data": k} if k else {},
                "versions": {"consilium": "0.1.0", "torch": "2.15"},
                "device": "cpu",
            }
            for k, c in enumerate(centres)
        },
        "stages": stages,
        "test": {"covid": scores(1.6), "source": sourced(centres, 0.8)},
        "left_out": [
            {
                "stage": "main",
                "round": 3,
                "centre": centres[1],
                "reason": "no reply before the deadline of 60 s",
            },
            {"stage": "main", "round": 5, "centre": centres[-1], "reason": "update not finite"},
        ],
        "notes": ["Resumed once, after round 2 of main."],
    }


TASKS = {
    "moco": Task(type="contrastive"),
    "covid": Task(),
    "finding": Task(type="multiclass", classes=["none", "typical", "other"]),
    "brixia": Task(type="regression", label_columns=["left", "right"]),
    "lesion": Task(type="segmentation", severity_column="severity"),
}


def answered(seed: int, skill: float) -> Sums:
    """All kinds: west has masks only, south neither masks nor scores, and of south's scans one class."""
    random = np.random.default_rng(seed)
    sums: Sums = {}
    for k, c in enumerate(CENTRES):
        n = {task: 40 for task in TASKS} | ({"covid": 0, "finding": 0, "brixia": 0} if c == "west" else {})
        n |= {"brixia": 0, "lesion": 0} if c == "south" else {}
        truth = random.integers(0, 2, n["covid"]) * float(c != "south")
        target = random.integers(0, 4, (n["brixia"], 2)).astype(float)
        mask = (random.uniform(size=(n["lesion"], 1, 16, 16)) < 0.2).astype(np.uint8)
        share = mask.mean((1, 2, 3))
        sums |= {
            f"{c}/covid/hist": compute_score_histogram(
                random.normal(size=len(truth)) + skill * (2 * truth - 1), truth
            ),
            f"{c}/finding/confusion": random.integers(1, 9, (3, 3)) * float(n["finding"] > 0)
            + skill * n["finding"] * np.eye(3),
            f"{c}/brixia/regression": compute_regression_sums(
                target + random.normal(0, 1 / (1 + skill), target.shape), target
            ),
            f"{c}/lesion/overlap": compute_overlap_sums(
                np.clip(mask * skill / 2 + random.uniform(0, 0.6, mask.shape), 0, 1), mask
            ),
            f"{c}/lesion/joint": compute_joint_histogram(
                share + random.normal(0, 0.02, len(share)),
                100 * share,
                AFFECTED_FRACTION_EDGES,
                SEVERITY_EDGES,
            ),
        }
        sums |= {
            f"{c}/{task}/loss": np.array([n[task] * (1 + 0.1 * k) / (1 + skill), n[task]]) for task in TASKS
        }
    return sums


def mixed(
    stages: dict[str, tuple[int, list[str]]], task: str = "covid", metric: Any = "auc"
) -> dict[str, Any]:
    """A run of {stage: (rounds, tasks)}, judged by `task`; the last stage's tasks are tested."""
    config = Config(recipe="mixed", tasks=TASKS, evaluation=EvaluationConfig(task=task, metric=metric))
    result: dict[str, Any] = {**sample(), "recipe": "mixed", "stages": []}
    result["config"]["evaluation"] = {"task": task, "metric": metric}
    for name, (count, of) in stages.items():
        rounds: list[dict[str, Any]] = []
        for r in range(count + 1):
            replies = {
                c: {
                    "loss": 1 / (1 + r),
                    "scans": 40,
                    "steps": 4,
                    "seconds": 2.0,
                    "accepted": True,
                    "reason": "",
                }
                for c in CENTRES
                if r
            }
            entry = {
                "round": r,
                "seconds": 2.0,
                "bytes_up": 1,
                "bytes_down": 1,
                "weights": {},
                "effective": {},
                "centres": replies,
            }
            rounds.append({**entry, "val": tables.score_table(answered(r, 0.3 * r), config, of)})
        value = tables.selection_score(rounds[-1]["val"], config.evaluation)
        result["stages"].append(
            {"name": name, "rounds": rounds, "best": {"stage": name, "round": count, "value": value}}
        )
    result["test"] = tables.score_table(answered(99, 1.5), config, of, with_sums=True)
    return result
