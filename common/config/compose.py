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

from common.config.schema import AggregationConfig, Config, SecureAggregationConfig, Stage, Task
from common.utils.errors import ConsiliumError, suggest

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_CONFIG_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def compose_config(overrides: Iterable[str] = (), config_dir: Path = CONFIG_DIR) -> Config:
    """The configuration of a run. Raises ConsiliumError for an unknown choice or key (with the nearest valid one) or a value out of range."""
    given = list(overrides)
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in config_dir.iterdir() if p.is_dir()}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=os.fspath(config_dir), version_base="1.3"):
            base = hydra_compose(
                "config",
                overrides=[
                    o for o in given if o.partition("=")[0] in groups and _to_hydra_override(o, groups)
                ],
            )
            for o in given:  # a misspelt task would else be a new one
                where, _, name = o.partition("=")[0].rpartition(".")[0].partition(".")
                name = name.partition(".")[0]
                if where in ("tasks", "stages") and name not in base.get(where, {}):
                    raise ConsiliumError(
                        f"override '{o}': the recipe has no {where[:-1]} '{name}'{suggest(name, base.get(where, {}))}"
                    )
            composed = hydra_compose("config", overrides=[_to_hydra_override(o, groups) for o in given])
        values = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConsiliumError(
            f"the configuration cannot be composed: {' '.join(str(error).split())[:300]}"
        ) from error
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
            if (
                f"stages.{name}.{key.removeprefix('stage.')}" not in keys
            ):  # what names a stage comes before what names all
                OmegaConf.update(merged, key, OmegaConf.select(every, key))
        stages[name] = OmegaConf.to_container(merged)["stage"]  # type: ignore[call-overload, index]
    return validate_config(parse_config({**values, "stages": stages}))


def _to_hydra_override(text: str, groups: Mapping[str, list[str]]) -> str:
    """An override as Hydra wants it: keys that no file mentions may be set too (`++`); the schema refuses the unknown ones afterwards."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConsiliumError(f"override '{text}' has no '='; write key=value, e.g. aggregation.tau=0.5")
    if key in groups:
        if value not in groups[key]:
            raise ConsiliumError(f"{key} '{value}' is unknown{suggest(value, groups[key])}")
        return text
    return text if text.startswith(("+", "~")) else f"++{text}"


def parse_config(values: Mapping[str, Any]) -> Config:
    """A Config from plain values, as they stand in `config.yaml` or came in a message. Raises ConsiliumError, one sentence."""
    try:
        return _CONFIG_ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(p) for p in first["loc"]]
        where = ".".join(path)
        if first["type"] == "unexpected_keyword_argument":
            raise ConsiliumError(
                f"unknown key '{where}'{suggest(path[-1], _field_names_at(path[:-1]))}"
            ) from error
        if first["type"] == "value_error":
            raise ConsiliumError(str(first["ctx"]["error"])) from error
        raise ConsiliumError(f"{where}={first['input']!r} is refused: {first['msg']}") from error


def _field_names_at(path: list[str]) -> list[str]:
    """The schema's field names at a path of keys."""
    kind: Any = Config
    for key in path:
        hint = (
            typing.get_type_hints(kind).get(key)
            if dataclasses.is_dataclass(kind)
            else typing.get_args(kind)[-1]
        )
        own = () if typing.get_origin(hint) is dict else typing.get_args(hint)
        kind = next((a for a in own if dataclasses.is_dataclass(a)), hint)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def validate_config(config: Config) -> Config:
    """What one value alone cannot tell: names that point at other names. Raises ConsiliumError."""
    if not config.tasks:
        raise ConsiliumError("the recipe has no tasks; it needs at least one under `tasks:`")
    stages = {n: s for n, s in config.stages.items() if s.rounds}
    if not stages:
        raise ConsiliumError(
            "every stage of the recipe has 0 rounds; give one of them some, e.g. stage.rounds=8"
        )
    used = {t for s in stages.values() for t in s.tasks or config.tasks} | {config.evaluation.task}
    config = dataclasses.replace(
        config, stages=stages, tasks={n: t for n, t in config.tasks.items() if n in used}
    )
    for reserved in ("backbone", "decoder"):
        if reserved in config.tasks:
            raise ConsiliumError(
                f"a task cannot be called '{reserved}': so is a part of the model; choose another name"
            )
    config = dataclasses.replace(config, tasks={n: fill_class_names(n, t) for n, t in config.tasks.items()})
    for name, stage in config.stages.items():
        for task in stage.tasks:
            if task not in config.tasks:
                raise ConsiliumError(
                    f"stages.{name}.tasks names '{task}', which the recipe lacks{suggest(task, config.tasks)}"
                )
        anchored = [t for t in stage_tasks(config, stage) if config.tasks[t].head_update != "local"]
        if anchored and "heads" in stage.local_layers:
            raise ConsiliumError(
                f"stages.{name}.local_layers keeps the heads at the centres, but task '{anchored[0]}' has one that the server moves; set its head: local"
            )
        if anchored and "all" in stage.local_layers:
            raise ConsiliumError(
                f"stages.{name}.local_layers=[all] exchanges nothing, but task '{anchored[0]}' has a head the server moves; set its head: local"
            )
    check_defences(config)
    if config.privacy.dp_level == "patient":
        check_patient_dp(config)
    if config.privacy.secagg:
        check_secagg(config, config.privacy.secagg)
    if (
        config.privacy.dp_level != "none" and config.backbone.norm == "batch"
    ):  # they tell of the batch; the one architecture of all centres
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, norm="group"))
    if config.federation.mode == "local" and config.federation.evaluation == "loco":
        raise ConsiliumError(
            "federation.evaluation=loco tests a centre that did not train, which a local model cannot be; use federated or central"
        )
    if config.evaluation.task not in config.tasks:
        raise ConsiliumError(
            f"evaluation.task '{config.evaluation.task}' is not a task{suggest(config.evaluation.task, config.tasks)}"
        )
    if config.federation.mode == "local":
        stages = {n: dataclasses.replace(s, local_layers=["all"]) for n, s in config.stages.items()}
        tasks = {n: dataclasses.replace(t, head_update="local") for n, t in config.tasks.items()}
        return dataclasses.replace(config, stages=stages, tasks=tasks)
    return config


def check_patient_dp(config: Config) -> None:
    """Raises ConsiliumError for what would tell more of a patient than `privacy=patient` promises. A centre asks it too, of what it is sent."""
    told = []
    if config.federation.mode == "local":
        told.append("federation.mode=local exchanges no weights, so there is nothing to protect")
    if config.privacy.query_noise_multiplier and config.evaluation.cross_site != "none":
        told.append(
            f"evaluation.cross_site={config.evaluation.cross_site} asks for more scores than the epsilon is planned for; leave it out"
        )
    for name, task in config.tasks.items():
        if task.type == "contrastive":
            told.append(
                f"task '{name}' contrasts a scan with a queue of others, so that a patient's gradient depends on other patients; use inpainting"
            )
        if task.head_update == "moments":
            told.append(
                f"task '{name}' sends class moments of the features without noise; set its head: local or anchored"
            )
        if task.num_clusters:
            told.append(
                f"task '{name}' sends sums of features for its clusters without noise; give it classes"
            )
        if config.privacy.query_noise_multiplier and task.type not in ("binary", "multiclass"):
            told.append(
                f"task '{name}' ({task.type}) is scored by sums that one patient can change without bound; set privacy.query_noise_multiplier to 0"
            )
        if task.prior == "local":
            told.append(
                f"task '{name}' has the centre's own class counts in the loss of every patient; set its prior: global or none"
            )
    for name, stage in config.stages.items():
        if "batch_norm" in stage.local_layers:
            told.append(
                f"stages.{name}.local_layers=[batch_norm] keeps batch norms, which are replaced by group norms; leave it out"
            )
        if "all" in stage.local_layers:
            told.append(
                f"stages.{name}.local_layers=[all] exchanges no weights, so there is nothing to protect; run that stage without privacy"
            )
        if stage.sampling_ratios:
            told.append(
                f"stages.{name}.sampling_ratios draws scans by their label, but every patient must have the same odds; leave it empty"
            )
        if stage.autotune:
            told.append(
                f"stages.{name}.autotune=true trains on patients without protection to time it; set precision and channels_last yourself"
            )
        if stage.precision == "fp16":
            told.append(
                f"stages.{name}.precision=fp16 drops a step when one patient's gradient overflows; use bf16 or fp32"
            )
    if told:
        raise ConsiliumError(f"privacy=patient: {told[0]}")


def check_secagg(config: Config, settings: SecureAggregationConfig) -> None:
    """Raises ConsiliumError for what cannot be had together with secure aggregation."""
    federation, told = config.federation, []
    if federation.mode != "federated":
        told.append(f"federation.mode={federation.mode} exchanges nothing between centres; use federated")
    if len(federation.centres) - len(federation.held_out_centres) < 3:
        told.append(
            "a sum over fewer than 3 centres tells each the other's numbers; it needs 3 or more that train"
        )
    if config.aggregation.max_norm_ratio != AggregationConfig().max_norm_ratio:
        told.append(
            f"aggregation.max_norm_ratio={config.aggregation.max_norm_ratio:g} compares single contributions, which nobody sees; leave it out "
            "(privacy.secagg.clip_value limits what one can do)"
        )
    if config.aggregation.robust_rule != "none":
        told.append(
            f"aggregation.robust_rule={config.aggregation.robust_rule} compares single contributions, which nobody sees; leave one of the two out"
        )
    if config.privacy.dp_level == "central":
        told.append(
            "privacy.dp_level=central clips each centre's change at the coordinator, which sees none; use privacy.dp_level=patient"
        )
    if config.privacy.query_noise_multiplier:
        told.append(
            "privacy.query_noise_multiplier puts noise on counts, but the weights in a secure sum are made of exact ones; set it to 0"
        )
    if config.evaluation.cross_site != "none":
        told.append(
            f"evaluation.cross_site={config.evaluation.cross_site} needs each centre's own model, which nobody sees; leave it out"
        )
    if settings.scope == "all":
        if config.evaluation.reduction != "pooled":
            told.append(
                f"hide=all leaves no centre's scores, so no evaluation.reduction={config.evaluation.reduction}; set evaluation.reduction=pooled"
            )
        if federation.held_out_centres or federation.evaluation == "loco":
            told.append(
                "hide=all leaves no centre's scores, which federation.evaluation=loco is made of; use hide=model"
            )
        if personal := [n for n, s in config.stages.items() if "all" in s.local_layers]:
            told.append(
                f"stages.{personal[0]}.local_layers=[all] is judged by each centre's own scores; use hide=model"
            )
    if told:
        raise ConsiliumError(f"privacy.secagg: {told[0]}")


def check_defences(config: Config) -> None:
    """Raises ConsiliumError for defences that this federation, or each other, make impossible."""
    robust, federation, told = config.aggregation.robust_rule, config.federation, []
    teaching = (
        len(federation.centres) - len(federation.held_out_centres) - (federation.evaluation == "loco")
        if federation.mode == "federated"
        else 1
    )
    if robust != "none" and teaching < config.aggregation.min_contributions:
        raise ConsiliumError(
            f"aggregation.robust_rule={robust} against aggregation.num_byzantine={config.aggregation.num_byzantine} needs {config.aggregation.min_contributions} contributions "
            f"in a round, and here there are {teaching}; take part with more centres, or choose another rule"
        )
    if config.privacy.dp_level != "central":
        return
    if federation.mode != "federated":
        told.append(
            f"federation.mode={federation.mode} has no contributions of several centres, so that there is none to hide among others"
        )
    if robust != "none":
        told.append(
            f"aggregation.robust_rule={robust} is no sum, on which the noise is reckoned; a contribution is clipped anyway"
        )
    if config.evaluation.cross_site != "none":
        told.append(
            f"evaluation.cross_site={config.evaluation.cross_site} shows each centre's own model to the others as it is; leave it out"
        )
    for name, task in config.tasks.items():
        if task.head_update == "moments" or task.num_clusters:
            told.append(
                f"task '{name}' is made from sums of features, which get no noise; set its head: local or anchored, give it classes"
            )
    for name, stage in config.stages.items():
        if "all" in stage.local_layers or "batch_norm" in stage.local_layers:
            told.append(
                f"stages.{name}.local_layers={stage.local_layers} keeps weights at the centres that are not there or all; leave it out"
            )
    if told:
        raise ConsiliumError(f"privacy=central: {told[0]}")


def fill_class_names(name: str, task: Task) -> Task:
    """The task with the names of its classes, where its settings say how many there are."""
    if task.type == "segmentation" and (task.label_column or name) == "lungs":
        raise ConsiliumError(
            f"task '{name}' would learn the column 'lungs', where our own lung finder fills in; call the column otherwise"
        )
    if task.type != "multiclass" or task.classes:
        return task
    if task.bin_edges:
        text = [f"{edge:g}" for edge in task.bin_edges]
        return dataclasses.replace(task, classes=[*(f"<={t}" for t in text), f">{text[-1]}"])
    return (
        dataclasses.replace(task, classes=[str(k) for k in range(max(task.num_clusters))])
        if task.num_clusters
        else task
    )


def stage_tasks(config: Config, stage: Stage) -> list[str]:
    """The tasks of a stage."""
    return stage.tasks or list(config.tasks)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain values: what travels and what `config.yaml` holds."""
    return dataclasses.asdict(config)
