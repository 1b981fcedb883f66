"""Runs that belong together: leave-one-centre-out and k-fold evaluation. Each part is an ordinary run with its own folder and ledger rows.

`loco` trains without each centre in turn and tests on all of that centre's scans; `kfold` gives every patient one turn in the test split. One
that was interrupted goes on where it stopped: its finished parts are kept, the unfinished one is resumed. A part that cannot be trained, because only
the centre left out has the labels, is named in the summary and the others go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config.compose import config_to_dict, parse_config, stage_tasks
from common.config.schema import Config
from common.protocol.messages import Sums, add_sums
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError
from server.analysis.score_tables import score_table
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import (
    find_run_dir,
    load_run_config,
    make_command_scope,
    resume_run,
    start_run,
)
from server.run.operator_commands import fold_name
from server.run.run_state import NoLabelledScans
from server.run.transport import Transport

log = logging.getLogger("consilium.server")
SUMMARY_FILE = "crossval.json"


def expand_folds(config: Config) -> dict[str, Config]:
    """{name: configuration} of a cross-validation's runs; empty for a run of its own."""
    federation = config.federation
    if federation.evaluation == "loco":
        if len(federation.centres) < 2:
            raise ConsiliumError(
                "federation.evaluation=loco needs two centres or more; one trains while the other is left out"
            )
        made = {fold_name(None, [c]): replace(federation, held_out_centres=[c]) for c in federation.centres}
        if len(made) < len(federation.centres):
            raise ConsiliumError(
                f"the parts of the cross-validation would have equal names ({', '.join(made)}); rename one of the centres"
            )
    elif federation.evaluation == "kfold":
        made = {fold_name(k, []): replace(federation, fold=k) for k in range(federation.folds)}
    else:
        return {}
    return {name: replace(config, federation=replace(f, evaluation="holdout")) for name, f in made.items()}


def start_run_or_folds(
    config: Config, transport: Transport, runs_dir: Path, ledger: Ledger, run_id: str
) -> dict[str, Any]:
    """A new run, or a cross-validation of several. Returns the run's result, or the summary. Raises ConsiliumError."""
    if not expand_folds(config):
        return start_run(config, transport, runs_dir, ledger, run_id)
    folder = runs_dir / run_id
    if folder.exists():
        raise ConsiliumError(
            f"{folder} exists already; give the new cross-validation another id, or resume this one"
        )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
    return run_folds(config, transport, runs_dir, ledger, run_id)


def run_folds(
    config: Config, transport: Transport, runs_dir: Path, ledger: Ledger, run_id: str
) -> dict[str, Any]:
    """The parts of a cross-validation that are not finished yet, then its summary."""
    parts, of = expand_folds(config), make_command_scope(ledger, run_id)
    results, untrained = {}, {}
    for number, (name, part) in enumerate(parts.items(), 1):
        own = f"{run_id}-{name}"
        log.info("%s: %s (%d of %d)", config.federation.evaluation, name, number, len(parts))
        try:
            if (runs_dir / own / "metrics.json").is_file():
                results[name] = json.loads((runs_dir / own / "metrics.json").read_text())
            elif (runs_dir / own / "config.yaml").exists():
                results[name] = resume_run(own, transport, runs_dir, ledger, of)
            else:
                results[name] = start_run(part, transport, runs_dir, ledger, own, of)
        except NoLabelledScans as error:
            log.warning("%s: %s", name, error)
            untrained[name] = str(error)
    if not results:
        raise ConsiliumError(
            f"no part of cross-validation '{run_id}' can be trained: {next(iter(untrained.values()))}"
        )
    found = {
        "run": run_id,
        "evaluation": config.federation.evaluation,
        "untrained": untrained,
        **summarise_folds(results),
    }
    atomic_write(
        runs_dir / run_id / SUMMARY_FILE, json.dumps(found, indent=1).encode()
    )  # its presence says that all are finished
    return found


def resume_run_or_folds(run_id: str, transport: Transport, runs_dir: Path, ledger: Ledger) -> dict[str, Any]:
    """Go on with an interrupted run or cross-validation. Raises ConsiliumError."""
    folder = find_run_dir(runs_dir, run_id)
    config = load_run_config(folder)
    if not expand_folds(config):
        return resume_run(run_id, transport, runs_dir, ledger)
    if (folder / SUMMARY_FILE).is_file():
        raise ConsiliumError(f"cross-validation '{folder.name}' is finished; there is nothing to resume")
    return run_folds(config, transport, runs_dir, ledger, folder.name)


def summarise_folds(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parts say together: `test` as of a run, from the sum of their sums (of `loco` only what the centre left out says), so that every
    scan counts once; and each part's own mean over centres (of `loco`, that centre's)."""
    total: Sums = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        unseen = result["config"]["federation"]["held_out_centres"]
        add_sums(
            total,
            {
                key: np.array(sums)
                for key, sums in result["test_sums"].items()
                if not unseen or key.split("/")[0] in unseen
            },
        )
        parts[name] = {
            task: views["centres"].get(unseen[0], {}) if unseen else views["macro"]
            for task, views in result["test"].items()
        }
    last = next(iter(results.values()))
    config = parse_config(last["config"])
    test = score_table(
        total, config, stage_tasks(config, config.stages[last["stages"][-1]["name"]]), with_sums=True
    )
    return {
        "recipe": config.recipe,
        "mode": config.federation.mode,
        "config": last["config"],
        "parts": parts,
        "test": test,
    }
