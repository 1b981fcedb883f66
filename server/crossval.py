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

from common.compose import active, config_from, to_dict
from common.errors import ConsiliumError
from common.files import write_whole
from common.messages import Sums, add
from common.schema import Config
from server.ledger import Ledger
from server.orders import part_name
from server.runs import begin, config_of, find, resume, study
from server.scores import table
from server.state import Unlabelled
from server.transport import Transport

log = logging.getLogger("consilium.server")
SUMMARY = "crossval.json"


def parts_of(config: Config) -> dict[str, Config]:
    """{name: configuration} of a cross-validation's runs; empty for a run of its own."""
    federation = config.federation
    if federation.evaluation == "loco":
        if len(federation.centres) < 2:
            raise ConsiliumError("federation.evaluation=loco needs two centres or more; one trains while the other is left out")
        made = {part_name(None, [c]): replace(federation, unseen=[c]) for c in federation.centres}
        if len(made) < len(federation.centres):
            raise ConsiliumError(f"the parts of the cross-validation would have equal names ({', '.join(made)}); rename one of the centres")
    elif federation.evaluation == "kfold":
        made = {part_name(k, []): replace(federation, fold=k) for k in range(federation.folds)}
    else:
        return {}
    return {name: replace(config, federation=replace(f, evaluation="holdout")) for name, f in made.items()}


def carry_out(config: Config, transport: Transport, runs: Path, ledger: Ledger, run: str) -> dict[str, Any]:
    """A new run, or a cross-validation of several. Returns the run's result, or the summary. Raises ConsiliumError."""
    if not parts_of(config):
        return begin(config, transport, runs, ledger, run)
    folder = runs / run
    if folder.exists():
        raise ConsiliumError(f"{folder} exists already; give the new cross-validation another id, or resume this one")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return play(config, transport, runs, ledger, run)


def play(config: Config, transport: Transport, runs: Path, ledger: Ledger, run: str) -> dict[str, Any]:
    """The parts of a cross-validation that are not finished yet, then its summary."""
    parts, of = parts_of(config), study(ledger, run)
    results, untrained = {}, {}
    for number, (name, part) in enumerate(parts.items(), 1):
        own = f"{run}-{name}"
        log.info("%s: %s (%d of %d)", config.federation.evaluation, name, number, len(parts))
        try:
            if (runs / own / "metrics.json").is_file():
                results[name] = json.loads((runs / own / "metrics.json").read_text())
            elif (runs / own / "config.yaml").exists():
                results[name] = resume(own, transport, runs, ledger, of)
            else:
                results[name] = begin(part, transport, runs, ledger, own, of)
        except Unlabelled as error:
            log.warning("%s: %s", name, error)
            untrained[name] = str(error)
    if not results:
        raise ConsiliumError(f"no part of cross-validation '{run}' can be trained: {next(iter(untrained.values()))}")
    found = {"run": run, "evaluation": config.federation.evaluation, "untrained": untrained, **summary(results)}
    write_whole(runs / run / SUMMARY, json.dumps(found, indent=1).encode())  # its presence says that all are finished
    return found


def take_up(run: str, transport: Transport, runs: Path, ledger: Ledger) -> dict[str, Any]:
    """Go on with an interrupted run or cross-validation. Raises ConsiliumError."""
    folder = find(runs, run)
    config = config_of(folder)
    if not parts_of(config):
        return resume(run, transport, runs, ledger)
    if (folder / SUMMARY).is_file():
        raise ConsiliumError(f"cross-validation '{folder.name}' is finished; there is nothing to resume")
    return play(config, transport, runs, ledger, folder.name)


def summary(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parts say together: `test` as of a run, from the sum of their sums (of `loco` only what the centre left out says), so that every
    scan counts once; and each part's own mean over centres (of `loco`, that centre's)."""
    total: Sums = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        unseen = result["config"]["federation"]["unseen"]
        add(total, {key: np.array(sums) for key, sums in result["test_sums"].items() if not unseen or key.split("/")[0] in unseen})
        parts[name] = {task: views["centres"].get(unseen[0], {}) if unseen else views["macro"] for task, views in result["test"].items()}
    last = next(iter(results.values()))
    config = config_from(last["config"])
    test = table(total, config, active(config, config.stages[last["stages"][-1]["name"]]), with_sums=True)
    return {"recipe": config.recipe, "mode": config.federation.mode, "config": last["config"], "parts": parts, "test": test}
