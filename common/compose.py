"""From `configs/` and the command line to a checked `Config`: Hydra composes, pydantic checks against the schema.

One override syntax, Hydra's: `group=choice` picks a file (`backbone=efficientnet_b7`), `path.to.key=value` sets a value. `stage.x=v` sets x for
every stage of the recipe, `stages.<name>.x=v` for one.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from common.errors import ConsiliumError, nearest
from common.schema import Aggregation, Config, SecureSums, Stage, Task

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def compose(overrides: Iterable[str] = (), configs: Path = CONFIGS) -> Config:
    """The configuration of a run. Raises ConsiliumError for an unknown choice or key (with the nearest valid one) or a value out of range."""
    given = list(overrides)
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in configs.iterdir() if p.is_dir()}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=os.fspath(configs), version_base="1.3"):
            base = hydra_compose("config", overrides=[o for o in given if o.partition("=")[0] in groups and _override(o, groups)])
            for o in given:  # a misspelt task would else be a new one
                where, _, name = o.partition("=")[0].rpartition(".")[0].partition(".")
                name = name.partition(".")[0]
                if where in ("tasks", "stages") and name not in base.get(where, {}):
                    raise ConsiliumError(f"override '{o}': the recipe has no {where[:-1]} '{name}'{nearest(name, base.get(where, {}))}")
            composed = hydra_compose("config", overrides=[_override(o, groups) for o in given])
        values = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConsiliumError(f"the configuration cannot be composed: {' '.join(str(error).split())[:300]}") from error
    common = values.pop("stage", {})
    keys = [o.lstrip("+~").partition("=")[0] for o in given]
    forced = [key for key in dict.fromkeys(keys) if key.startswith("stage.")]
    every = OmegaConf.create({"stage": common})
    stages = {}
    for name, own in (values.get("stages") or {"main": {}}).items():
        merged = OmegaConf.merge({"stage": common}, {"stage": own or {}})
        for key in forced:
            if key == "stage.rounds" and OmegaConf.select(merged, key) == 0:
                continue  # a stage that the recipe passes over is switched on by its name alone
            if f"stages.{name}.{key.removeprefix('stage.')}" not in keys:  # what names a stage comes before what names all
                OmegaConf.update(merged, key, OmegaConf.select(every, key))
        stages[name] = OmegaConf.to_container(merged)["stage"]  # type: ignore[call-overload, index]
    return check(config_from({**values, "stages": stages}))


def _override(text: str, groups: Mapping[str, list[str]]) -> str:
    """An override as Hydra wants it: keys that no file mentions may be set too (`++`); the schema refuses the unknown ones afterwards."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConsiliumError(f"override '{text}' has no '='; write key=value, e.g. aggregation.tau=0.5")
    if key in groups:
        if value not in groups[key]:
            raise ConsiliumError(f"{key} '{value}' is unknown{nearest(value, groups[key])}")
        return text
    return text if text.startswith(("+", "~")) else f"++{text}"


def config_from(values: Mapping[str, Any]) -> Config:
    """A Config from plain values, as they stand in `config.yaml` or came in a message. Raises ConsiliumError, one sentence."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(p) for p in first["loc"]]
        where = ".".join(path)
        if first["type"] == "unexpected_keyword_argument":
            raise ConsiliumError(f"unknown key '{where}'{nearest(path[-1], _names(path[:-1]))}") from error
        if first["type"] == "value_error":
            raise ConsiliumError(str(first["ctx"]["error"])) from error
        raise ConsiliumError(f"{where}={first['input']!r} is refused: {first['msg']}") from error


def _names(path: list[str]) -> list[str]:
    """The schema's field names at a path of keys."""
    kind: Any = Config
    for key in path:
        hint = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else typing.get_args(kind)[-1]
        own = () if typing.get_origin(hint) is dict else typing.get_args(hint)
        kind = next((a for a in own if dataclasses.is_dataclass(a)), hint)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def check(config: Config) -> Config:
    """What one value alone cannot tell: names that point at other names. Raises ConsiliumError."""
    if not config.tasks:
        raise ConsiliumError("the recipe has no tasks; it needs at least one under `tasks:`")
    stages = {n: s for n, s in config.stages.items() if s.rounds}
    if not stages:
        raise ConsiliumError("every stage of the recipe has 0 rounds; give one of them some, e.g. stage.rounds=8")
    used = {t for s in stages.values() for t in s.tasks or config.tasks} | {config.evaluation.task}
    config = dataclasses.replace(config, stages=stages, tasks={n: t for n, t in config.tasks.items() if n in used})
    for reserved in ("backbone", "decoder"):
        if reserved in config.tasks:
            raise ConsiliumError(f"a task cannot be called '{reserved}': so is a part of the model; choose another name")
    config = dataclasses.replace(config, tasks={n: named(n, t) for n, t in config.tasks.items()})
    for name, stage in config.stages.items():
        for task in stage.tasks:
            if task not in config.tasks:
                raise ConsiliumError(f"stages.{name}.tasks names '{task}', which the recipe lacks{nearest(task, config.tasks)}")
        anchored = [t for t in active(config, stage) if config.tasks[t].head != "local"]
        if anchored and "heads" in stage.personal:
            raise ConsiliumError(
                f"stages.{name}.personal keeps the heads at the centres, but task '{anchored[0]}' has one that the server moves; set its head: local"
            )
        if anchored and "all" in stage.personal:
            raise ConsiliumError(
                f"stages.{name}.personal=[all] exchanges nothing, but task '{anchored[0]}' has a head the server moves; set its head: local"
            )
    refuse_together(config)
    if config.privacy.kind == "patient":
        refuse_unprotected(config)
    if config.privacy.secagg:
        refuse_unhidden(config, config.privacy.secagg)
    if config.privacy.kind != "none" and config.backbone.norm == "batch":  # they tell of the batch; the one architecture of all centres
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, norm="group"))
    if config.federation.mode == "local" and config.federation.evaluation == "loco":
        raise ConsiliumError(
            "federation.evaluation=loco tests a centre that did not train, which a local model cannot be; use federated or central"
        )
    if config.evaluation.task not in config.tasks:
        raise ConsiliumError(f"evaluation.task '{config.evaluation.task}' is not a task{nearest(config.evaluation.task, config.tasks)}")
    if config.federation.mode == "local":
        stages = {n: dataclasses.replace(s, personal=["all"]) for n, s in config.stages.items()}
        tasks = {n: dataclasses.replace(t, head="local") for n, t in config.tasks.items()}
        return dataclasses.replace(config, stages=stages, tasks=tasks)
    return config


def refuse_unprotected(config: Config) -> None:
    """Raises ConsiliumError for what would tell more of a patient than `privacy=patient` promises. A centre asks it too, of what it is sent."""
    told = []
    if config.federation.mode == "local":
        told.append("federation.mode=local exchanges no weights, so there is nothing to protect")
    if config.privacy.queries and config.evaluation.matrix != "none":
        told.append(f"evaluation.matrix={config.evaluation.matrix} asks for more scores than the epsilon is planned for; leave it out")
    for name, task in config.tasks.items():
        if task.kind == "contrast":
            told.append(
                f"task '{name}' contrasts a scan with a queue of others, so that a patient's gradient depends on other patients; use inpainting"
            )
        if task.head == "moments":
            told.append(f"task '{name}' sends class moments of the features without noise; set its head: local or anchored")
        if task.clusters:
            told.append(f"task '{name}' sends sums of features for its clusters without noise; give it classes")
        if config.privacy.queries and task.kind not in ("binary", "multiclass"):
            told.append(
                f"task '{name}' ({task.kind}) is scored by sums that one patient can change without bound; set privacy.queries to 0"
            )
        if task.prior == "local":
            told.append(f"task '{name}' has the centre's own class counts in the loss of every patient; set its prior: global or none")
    for name, stage in config.stages.items():
        if "batch_norm" in stage.personal:
            told.append(f"stages.{name}.personal=[batch_norm] keeps batch norms, which are replaced by group norms; leave it out")
        if "all" in stage.personal:
            told.append(
                f"stages.{name}.personal=[all] exchanges no weights, so there is nothing to protect; run that stage without privacy"
            )
        if stage.sample:
            told.append(f"stages.{name}.sample draws scans by their label, but every patient must have the same odds; leave it empty")
        if stage.runtime == "auto":
            told.append(
                f"stages.{name}.runtime=auto trains on patients without protection to time it; set precision and channels_last yourself"
            )
        if stage.precision == "fp16":
            told.append(f"stages.{name}.precision=fp16 drops a step when one patient's gradient overflows; use bf16 or fp32")
    if told:
        raise ConsiliumError(f"privacy=patient: {told[0]}")


def refuse_unhidden(config: Config, settings: SecureSums) -> None:
    """Raises ConsiliumError for what cannot be had together with secure aggregation."""
    federation, told = config.federation, []
    if federation.mode != "federated":
        told.append(f"federation.mode={federation.mode} exchanges nothing between centres; use federated")
    if len(federation.centres) - len(federation.unseen) < 3:
        told.append("a sum over fewer than 3 centres tells each the other's numbers; it needs 3 or more that train")
    if config.aggregation.outlier != Aggregation().outlier:
        told.append(
            f"aggregation.outlier={config.aggregation.outlier:g} compares single contributions, which nobody sees; leave it out "
            "(privacy.secagg.clip limits what one can do)"
        )
    if config.aggregation.robust != "none":
        told.append(
            f"aggregation.robust={config.aggregation.robust} compares single contributions, which nobody sees; leave one of the two out"
        )
    if config.privacy.kind == "central":
        told.append("privacy.kind=central clips each centre's change at the coordinator, which sees none; use privacy.kind=patient")
    if config.privacy.queries:
        told.append("privacy.queries puts noise on counts, but the weights in a secure sum are made of exact ones; set it to 0")
    if config.evaluation.matrix != "none":
        told.append(f"evaluation.matrix={config.evaluation.matrix} needs each centre's own model, which nobody sees; leave it out")
    if settings.hide == "all":
        if config.evaluation.over != "pooled":
            told.append(f"hide=all leaves no centre's scores, so no evaluation.over={config.evaluation.over}; set evaluation.over=pooled")
        if federation.unseen or federation.evaluation == "loco":
            told.append("hide=all leaves no centre's scores, which federation.evaluation=loco is made of; use hide=model")
        if personal := [n for n, s in config.stages.items() if "all" in s.personal]:
            told.append(f"stages.{personal[0]}.personal=[all] is judged by each centre's own scores; use hide=model")
    if told:
        raise ConsiliumError(f"privacy.secagg: {told[0]}")


def refuse_together(config: Config) -> None:
    """Raises ConsiliumError for defences that this federation, or each other, make impossible."""
    robust, federation, told = config.aggregation.robust, config.federation, []
    teaching = len(federation.centres) - len(federation.unseen) - (federation.evaluation == "loco") if federation.mode == "federated" else 1
    if robust != "none" and teaching < config.aggregation.fewest:
        raise ConsiliumError(
            f"aggregation.robust={robust} against aggregation.hostile={config.aggregation.hostile} needs {config.aggregation.fewest} contributions "
            f"in a round, and here there are {teaching}; take part with more centres, or choose another rule"
        )
    if config.privacy.kind != "central":
        return
    if federation.mode != "federated":
        told.append(
            f"federation.mode={federation.mode} has no contributions of several centres, so that there is none to hide among others"
        )
    if robust != "none":
        told.append(f"aggregation.robust={robust} is no sum, on which the noise is reckoned; a contribution is clipped anyway")
    if config.evaluation.matrix != "none":
        told.append(f"evaluation.matrix={config.evaluation.matrix} shows each centre's own model to the others as it is; leave it out")
    for name, task in config.tasks.items():
        if task.head == "moments" or task.clusters:
            told.append(
                f"task '{name}' is made from sums of features, which get no noise; set its head: local or anchored, give it classes"
            )
    for name, stage in config.stages.items():
        if "all" in stage.personal or "batch_norm" in stage.personal:
            told.append(f"stages.{name}.personal={stage.personal} keeps weights at the centres that are not there or all; leave it out")
    if told:
        raise ConsiliumError(f"privacy=central: {told[0]}")


def named(name: str, task: Task) -> Task:
    """The task with the names of its classes, where its settings say how many there are."""
    if task.kind == "segmentation" and (task.label or name) == "lungs":
        raise ConsiliumError(f"task '{name}' would learn the column 'lungs', where our own lung finder fills in; call the column otherwise")
    if task.kind != "multiclass" or task.classes:
        return task
    if task.edges:
        text = [f"{edge:g}" for edge in task.edges]
        return dataclasses.replace(task, classes=[*(f"<={t}" for t in text), f">{text[-1]}"])
    return dataclasses.replace(task, classes=[str(k) for k in range(max(task.clusters))]) if task.clusters else task


def active(config: Config, stage: Stage) -> list[str]:
    """The tasks of a stage."""
    return stage.tasks or list(config.tasks)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values: what travels and what `config.yaml` holds."""
    return dataclasses.asdict(config)
