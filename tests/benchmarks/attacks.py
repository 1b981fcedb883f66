"""What each defence buys against each attack, and what it costs.

A hostile centre, membership inference, gradient inversion.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.attacks [--only hostile|membership|inversion]
    [--out DIR] [--seeds 1]

Phantom hospitals in small (tests/attacks.py says how each attack goes); what is finished is kept in DIR and
not done again. README.md has the tables.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.data.batch import Batch
from client.data.dataset import ScanDataset, concat_datasets, iterate_batches, iterate_slices
from client.data.loading import load_datasets
from client.phantom.chest_ct import draw_chest
from client.phantom.federation import write_federation
from client.phantom.profiles import CENTRE_PROFILES
from client.site.config import resolve_data_root
from client.training.dp_sgd import DPParams, poisson_batches, rows_by_patient
from client.training.trainer import TrainSpec, run_inference, train
from common.config.compose import compose_config
from common.config.schema import AugmentConfig, Compression, Config, OptimiserConfig, Stage, Task
from common.modeling.parameters import build_layout, get_model_weights
from common.privacy.accountant import solve_noise_multiplier
from common.protocol.update_codec import decode_update, encode_update
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.initial_model import build_initial_model
from tests.attacks import ATTACKS, Hostile, Tiny, infer_membership, invert_update, measure_damage, psnr, ssim
from tests.benchmarks import real_ct
from tests.in_process_federation import sites

SMALL = [
    "federation.phantom.scale=0.1", "stage.rounds=8", "stage.tasks=[covid]",
    "evaluation.checkpoint_selection=last", "aggregation.compression=fp32",
    "federation.round_retries=0", "federation.quorum=0.5",
]  # fmt: skip
OPEN = "aggregation.max_norm_ratio=1e9"
FIVE = "federation.centres=[north,east,south,west,harbour]"
DEFENCES = {
    "none": [OPEN],
    "norm screening": [],
    "median": [OPEN, "aggregation.robust_rule=median"],
    "trimmed mean": [OPEN, "aggregation.robust_rule=trimmed_mean"],
    "screening + median": ["aggregation.robust_rule=median"],
    "none, five centres": [OPEN, FIVE],
    "Krum, five centres": [OPEN, FIVE, "aggregation.robust_rule=krum"],
    "none, group norm": [OPEN, "backbone.norm=group"],
    "patient, epsilon 8": [OPEN, "privacy=patient"],
    "central, epsilon 50": [
        OPEN,
        "privacy=central",
        "privacy.epsilon=50",
        "privacy.adaptive_clip_quantile=0.5",
    ],
}
FEW = [
    d for d in DEFENCES if "epsilon" in d or "group" in d or "five" in d
]  # against these not every attack is run


def config_of(out: Path, *more: str) -> Config:
    return compose_config([*SMALL, f"federation.data_root={out}/data", *more])


def hostile(out: Path, seed: int, attack: str, defence: str) -> dict[str, Any]:
    """One federation of four (or five) centres, of which `east` attacks."""
    config, run = (
        config_of(out, *DEFENCES[defence], f"seed={seed}"),
        re.sub(r"\W+", "-", f"{attack} {defence} {seed}"),
    )
    for book in out.glob("data/*/.consilium/budget/*"):
        book.unlink()  # each run's privacy is counted alone
    try:
        shutil.rmtree(out / "runs", ignore_errors=True)
        result = start_run(
            config,
            Hostile(len(config.federation.centres), attack),
            out / "runs",
            open_ledger(out / "runs"),
            run,
        )
    except ConsiliumError as error:  # the model is spoilt: no centre can score it
        return {"worst": None, "fooled": None, "why": str(error)[:120]}
    worst, fooled = measure_damage(out / "runs" / run / "model.safetensors", config)
    return {
        "worst": worst,
        "fooled": fooled,
        "left out": sorted({exclusion.centre for exclusion in result.left_out}),
    }


def pool(out: Path, data: str, scans: int = 96) -> tuple[Config, ScanDataset]:
    """Scans of all centres, one a patient."""
    if data == "phantom":
        config = config_of(out)
        assert config.federation.phantom is not None
        write_federation(resolve_data_root(config), config.federation.phantom, config.federation.centres)
    else:
        weights = f"backbone.weights={real_ct.data_folder()}/weights/mobilenetv1_075_tfjs_imagenet.pth"
        config = compose_config(
            [
                *real_ct.BASE,
                "stage.tasks=[covid]",
                weights,
                f"federation.data_root={real_ct.prepared(real_ct.data_folder(), out)}",
            ]
        )
    held = [
        part
        for site in sites(len(config.federation.centres))
        for part in load_datasets(site, config)[0].values()
    ]
    whole = concat_datasets(held)
    firsts = np.array([rows[0] for rows in rows_by_patient(whole).values()])
    return config, whole.subset(np.random.default_rng(1).permutation(firsts)[:scans])


def members(
    out: Path, data: str, seed: int, target: float, models: int = 8, epochs: int = 20
) -> dict[str, Any]:
    """Likelihood-ratio attack on models of one half of the scans each.

    `target`: each patient's epsilon, 0 for none, < 0 for the norms of the private models alone. The real
    slices' models begin from ImageNet's weights.
    """
    config, scans = pool(out, data)
    backbone = replace(
        config.backbone, norm=("group" if data == "phantom" else "frozen") if target else "batch"
    )
    tasks = {"covid": config.tasks["covid"]}
    stage = Stage(
        batch_size=12,
        precision="bf16" if data == "phantom" else "fp32",
        optimiser=OptimiserConfig(lr=2e-3 if data == "phantom" else 3e-4),
    )
    rng = np.random.default_rng(seed)
    # each scan in half of the models: the likelihood ratio wants both kinds of shadow
    inside = np.stack([rng.permutation(models) < models // 2 for _ in range(len(scans))], axis=1)
    y, confidence, right = scans.targets["covid"], np.zeros((models, len(scans))), []
    for k in range(models):
        own = scans.subset(np.flatnonzero(inside[k]))
        steps, odds = epochs * -(-len(own) // stage.batch_size), stage.batch_size / len(own)
        model = build_initial_model(replace(config, backbone=backbone, tasks=tasks, seed=k))
        if target > 0:
            noise = solve_noise_multiplier(target, 1e-5, ((odds, steps),))
            patients, hidden = (
                poisson_batches(own, tasks, odds, steps, k),
                DPParams(1.0, noise, stage.batch_size),
            )
            train(model, patients, TrainSpec(stage, tasks, num_steps=steps, seed=k, dp_params=hidden))
        else:
            batches = iterate_batches(own, tasks, stage, steps, k)
            train(model, batches, TrainSpec(stage, tasks, num_steps=steps, seed=k))
        z = (
            run_inference(model, iterate_slices(scans, 32), lambda m, x: m(x, ["covid"]))["covid"][:, 0]
            .double()
            .numpy()
        )
        confidence[k] = np.where(y == 1, z, -z)
        right.append([np.mean(confidence[k][inside[k]] > 0), np.mean(confidence[k][~inside[k]] > 0)])
    auc, found = infer_membership(confidence, inside)
    return {
        "auc": auc,
        "tpr": found,
        "right inside": float(np.mean(right, 0)[0]),
        "right outside": float(np.mean(right, 0)[1]),
    }


MEMBERS = {"none": 0.0, "none, their norms": -1.0, "patient, epsilon 8": 8.0, "patient, epsilon 1": 1.0}


def inversion(out: Path, seed: int, defence: str, size: int = 32, steps: int = 400) -> dict[str, Any]:
    """One contribution of one picture (or eight) by one step of SGD, as it would leave the centre, and the
    picture that the attack makes of it.
    """
    tasks = {"covid": Task()}
    stage = Stage(
        batch_size=8,
        optimiser=OptimiserConfig("sgd", lr=0.001, momentum=0.0, weight_decay=0.0, schedule="constant"),
        augment=off(),
        channels_last=False,
    )
    torch.manual_seed(seed)
    made = Tiny(size)
    model, layout = copy.deepcopy(made), build_layout(made)
    count = 8 if defence == "eight scans a step" else 1
    volumes = [
        draw_chest(
            np.random.default_rng(seed + i),
            np.random.default_rng(i),
            CENTRE_PROFILES["north"].scanner,
            True,
            10,
            64,
        )[0]
        for i in range(count)
    ]
    pictures = torch.stack(
        [shrunk(np.clip((v[4:5] + 1000) / 1300 * 255, 0, 255), size) for v in volumes]
    )  # [B, 1, H, W] uint8
    batch = Batch(pictures, {"covid": torch.ones(count)})
    if defence == "patient, epsilon 8":
        protection = DPParams(
            1.0, solve_noise_multiplier(8.0, 1e-5, ((1.0, 1),)), 1.0
        )  # as loud as one step of all patients needs
        train(made, [{"one": batch}], TrainSpec(stage, tasks, seed=seed, dp_params=protection))  # type: ignore[arg-type]
    else:
        num_steps = 5 if defence == "five steps" else 1
        train(made, [batch] * num_steps, TrainSpec(stage, tasks, seed=seed))  # type: ignore[arg-type]
    delta = get_model_weights(made, layout).floats - get_model_weights(model, layout).floats
    if defence in ("int8", "int4"):
        codec: Compression = "int8" if defence == "int8" else "int4"
        delta = decode_update(encode_update(delta, layout, codec)[0], layout, codec)
    parts = [torch.from_numpy(delta[e.span].reshape(e.shape).copy()) for e in layout.floats]
    found = invert_update(model, parts, torch.ones(1), (1, 1, size, size), steps, seed)
    true = max((p[0] / 255 for p in pictures), key=lambda p: psnr(found[0, 0], p))
    return {
        "psnr": psnr(found[0, 0], true),
        "ssim": ssim(found[0, 0], true),
        "flat": psnr(torch.full_like(true, float(true.mean())), true),
    }


INVERSIONS = ["none", "int8", "int4", "five steps", "eight scans a step", "patient, epsilon 8"]


def off() -> AugmentConfig:
    return AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)


def shrunk(slices: np.ndarray, size: int) -> torch.Tensor:
    """The first slice of a scan [S, H, W] as uint8 [1, size, size]."""
    x = torch.from_numpy(np.array(slices[:1]))[None].float()
    return torch.nn.functional.interpolate(x, (size, size), mode="area")[0].round().byte()


def kept(out: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from its file, or made now; its line goes to the screen."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        began, cpu = time.perf_counter(), time.process_time()
        found = make() | {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    found = json.loads(path.read_text())
    print(
        f"{name:48} "
        + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()),
        flush=True,
    )
    return found


def cell(found: list[dict[str, Any]], key: str, spoilt: str) -> str:
    values = [f[key] for f in found if f[key] is not None]
    return "" if not found else spoilt if not values else f"{np.mean(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("data/attacks"))
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    out, seeds = given.out.resolve(), range(1, given.seeds + 1)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.basicConfig(filename=out / "log.txt", level=logging.WARNING)
    parts = [given.only] if given.only else ["inversion", "hostile", "membership"]
    text = []
    if "inversion" in parts:
        text.append("\n| inversion | PSNR, dB | of a flat picture | SSIM |\n|---|---|---|---|")
        for d in INVERSIONS:
            some = [kept(out, f"inversion {d} {s}", lambda d=d, s=s: inversion(out, s, d)) for s in seeds]  # type: ignore[misc]
            text.append(
                f"| {d} | {cell(some, 'psnr', '')} | {cell(some, 'flat', '')} | {cell(some, 'ssim', '')} |"
            )
    if "hostile" in parts:
        text.append(
            f"\n| worst honest centre's AUC / fooled by the trigger | {' | '.join(ATTACKS)} |\n"
            + "|---" * (len(ATTACKS) + 1)
            + "|"
        )
        for d in DEFENCES:
            row = [
                [
                    kept(out, f"hostile {a} {d} {s}", lambda a=a, d=d, s=s: hostile(out, s, a, d))
                    for s in seeds
                ]  # type: ignore[misc]
                if d not in FEW or a in ("none", "back-door")
                else []
                for a in ATTACKS
            ]
            text.append(
                f"| {d} | "
                + " | ".join(f"{cell(r, 'worst', 'spoilt')} / {cell(r, 'fooled', '–')}" for r in row)
                + " |"
            )
    if "membership" in parts:
        text.append(
            "\n| membership | AUC | found at 5 % false | right inside | right outside "
            "|\n|---|---|---|---|---|"
        )
        for data, (d, target) in itertools.product(("phantom", "ct_multisource"), MEMBERS.items()):
            some = [
                kept(out, f"membership {data} {d} {s}", lambda a=data, t=target, s=s: members(out, a, s, t))
                for s in seeds
            ]  # type: ignore[misc]
            text.append(
                f"| {data}, {d} | "
                + " | ".join(cell(some, k, "") for k in ("auc", "tpr", "right inside", "right outside"))
                + " |"
            )
    (out / "table.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
