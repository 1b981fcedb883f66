"""Measure what each defence gains against each attack, and what it costs.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.attacks [--only hostile|membership|inversion]
    [--out DIR] [--seeds 1]

The attacks are a hostile centre, membership inference and gradient inversion (tests/attacks.py) on small
phantom hospitals. Finished results stay in DIR and are not computed again; DIR/table.md holds the tables,
README.md what they say.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.attacks import ATTACKS, Hostile, measure_damage
from tests.benchmarks.attack_leaks import (
    INVERSION_DEFENCES,
    MEMBERSHIP_DEFENCES,
    compose_small_config,
    measure_inversion,
    measure_membership,
)
from tests.benchmarks.measuring import format_header, format_row, time_result

Result = dict[str, Any]

NO_SCREENING = "aggregation.max_norm_ratio=1e9"
FIVE_CENTRES = "federation.centres=[north,east,south,west,harbour]"
DEFENCES = {
    "none": [NO_SCREENING],
    "norm screening": [],
    "median": [NO_SCREENING, "aggregation.robust_rule=median"],
    "trimmed mean": [NO_SCREENING, "aggregation.robust_rule=trimmed_mean"],
    "screening + median": ["aggregation.robust_rule=median"],
    "none, five centres": [NO_SCREENING, FIVE_CENTRES],
    "Krum, five centres": [NO_SCREENING, FIVE_CENTRES, "aggregation.robust_rule=krum"],
    "none, group norm": [NO_SCREENING, "backbone.norm=group"],
    "patient, epsilon 8": [NO_SCREENING, "privacy=patient"],
    "central, epsilon 50": [
        NO_SCREENING,
        "privacy=central",
        "privacy.epsilon=50",
        "privacy.adaptive_clip_quantile=0.5",
    ],
}
# Against these only the back-door is run, beside the run without an attack.
BACKDOOR_ONLY_DEFENCES = [
    "none, five centres",
    "Krum, five centres",
    "none, group norm",
    "patient, epsilon 8",
    "central, epsilon 50",
]


def measure_hostile(out: Path, seed: int, attack: str, defence: str) -> Result:
    """Run one federation of four (or five) centres, of which `east` attacks."""
    config = compose_small_config(out, *DEFENCES[defence], f"seed={seed}")
    run_id = re.sub(r"\W+", "-", f"{attack} {defence} {seed}")
    runs_dir = out / "runs"
    for budget_file in out.glob("data/*/.consilium/budget/*"):
        budget_file.unlink()  # each run's privacy loss is counted alone
    shutil.rmtree(runs_dir, ignore_errors=True)
    transport = Hostile(len(config.federation.centres), attack)
    try:
        result = start_run(config, transport, runs_dir, open_ledger(runs_dir), run_id)
    except ConsiliumError as error:  # the model is spoilt: no centre can score it
        return {"worst": None, "fooled": None, "why": str(error)[:120]}
    worst_auc, fooled = measure_damage(runs_dir / run_id / "model.safetensors", config)
    left_out = sorted({exclusion.centre for exclusion in result.left_out})
    return {"worst": worst_auc, "fooled": fooled, "left out": left_out}


def load_or_measure(out: Path, name: str, measure: Callable[[], Result]) -> Result:
    """Return a result from its file, or measure it now; print it in one line."""
    path = out / "results" / f"{name}.json"
    if not path.exists():
        measured, timing = time_result(measure)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured | {"seconds": timing.wall, "cpu": timing.cpu}))
    result: Result = json.loads(path.read_text())
    values = []
    for key, value in result.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        values.append(f"{key} {text}")
    print(f"{name:48} {'  '.join(values)}", flush=True)
    return result


def format_mean(results: list[Result], key: str, if_undefined: str = "") -> str:
    """The mean over the results; "" if there are none."""
    if not results:
        return ""
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return if_undefined
    return f"{np.mean(values):.2f}"


def tabulate_inversion(out: Path, seeds: range) -> list[str]:
    lines = ["\n" + format_header(["inversion", "PSNR, dB", "of a flat picture", "SSIM"])]
    for defence in INVERSION_DEFENCES:
        results = []
        for seed in seeds:
            measure = partial(measure_inversion, seed, defence)
            results.append(load_or_measure(out, f"inversion {defence} {seed}", measure))
        means = [format_mean(results, key) for key in ("psnr", "flat", "ssim")]
        lines.append(format_row([defence, *means]))
    return lines


def tabulate_hostile(out: Path, seeds: range) -> list[str]:
    lines = ["\n" + format_header(["worst honest centre's AUC / fooled by the trigger", *ATTACKS])]
    for defence in DEFENCES:
        cells = []
        for attack in ATTACKS:
            results = []
            if defence not in BACKDOOR_ONLY_DEFENCES or attack in ("none", "back-door"):
                for seed in seeds:
                    measure = partial(measure_hostile, out, seed, attack, defence)
                    results.append(load_or_measure(out, f"hostile {attack} {defence} {seed}", measure))
            worst_auc = format_mean(results, "worst", "spoilt")
            cells.append(f"{worst_auc} / {format_mean(results, 'fooled', '–')}")
        lines.append(format_row([defence, *cells]))
    return lines


def tabulate_membership(out: Path, seeds: range) -> list[str]:
    titles = ["membership", "AUC", "found at 5 % false", "right inside", "right outside"]
    lines = ["\n" + format_header(titles)]
    for data in ("phantom", "ct_multisource"):
        for name, defence in MEMBERSHIP_DEFENCES.items():
            results = []
            for seed in seeds:
                measure = partial(measure_membership, out, data, seed, defence)
                results.append(load_or_measure(out, f"membership {data} {name} {seed}", measure))
            means = [format_mean(results, key) for key in ("auc", "tpr", "right inside", "right outside")]
            lines.append(format_row([f"{data}, {name}", *means]))
    return lines


TABLES = {
    "inversion": tabulate_inversion,
    "hostile": tabulate_hostile,
    "membership": tabulate_membership,
}


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", choices=["", *TABLES], help="one table; default: all three")
    parser.add_argument("--out", type=Path, default=Path("data/attacks"), help="folder of the results")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.basicConfig(filename=out / "log.txt", level=logging.WARNING)
    seeds = range(1, arguments.seeds + 1)
    lines: list[str] = []
    for name, tabulate in TABLES.items():
        if arguments.only in ("", name):
            lines += tabulate(out, seeds)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
