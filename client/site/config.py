"""What is this centre's own: its name, data, device, state folder and smallest reportable cell. The coordinator cannot set any of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from common.config.schema import Config
from common.utils.errors import ConsiliumError, Refused, suggest

FLOWER_KEYS = (
    "site",
    "partition-id",
    "num-partitions",
)  # of a node configuration, beside a Site's own fields


@dataclass(frozen=True)
class Site:
    """`site.yaml`, or Flower's node configuration. In simulation `centre` is empty and `index` says which of the federation's centres this is."""

    centre: str = ""
    data: str = ""  # folder with cohort.csv, or a cohort table
    state: str = ""  # folder for slices and personal weights; empty: `.consilium` beside the data
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    num_workers: int = 1  # processes that read scans
    threads: int = 0  # of PyTorch; 0: its own choice
    min_cell_count: int = 1  # counts below this are reported as this; the policy's own comes on top
    pacs: str = ""  # where `consilium-centre ingest` takes studies from: https://..., dicom://AET@host:port or a folder
    policy: str = ""  # policy.yaml: what may leave (client/site/policy.py); empty: no limits of its own
    index: int = 0

    def resolve_device(self) -> torch.device:
        """The device to train on. Raises Refused when the named one is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise Refused(
                f"device '{self.device}' is none that PyTorch knows; set device: auto, cpu, cuda or cuda:1"
            ) from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise Refused(
                f"device '{self.device}' is asked for, but this machine shows {_describe_gpus()}; set device: cpu or auto"
            )
        return device


def _describe_gpus() -> str:
    count = torch.cuda.device_count()
    return f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"


def parse_site(values: Mapping[str, Any]) -> Site:
    """From Flower's node configuration, which may name a `site` file; what is set directly comes first.

    Raises ConsiliumError for an unknown key or a wrong type.
    """
    known: dict[str, type] = {f.name: type(getattr(Site, f.name)) for f in fields(Site)}
    given: dict[str, Any] = {}
    if "site" in values:
        path = Path(str(values["site"]))
        try:
            given = {
                k: v for k, v in dict(yaml.safe_load(path.read_text()) or {}).items() if v is not None
            }  # `data:` alone says nothing
        except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
            raise ConsiliumError(
                f"site file {path} cannot be read ({type(error).__name__}); it is YAML with keys {', '.join(known)}"
            ) from error
        for key in given:
            if key not in known:
                raise ConsiliumError(f"site file {path}: unknown key '{key}'{suggest(str(key), known)}")
    for key in values:
        if key not in known and key not in FLOWER_KEYS:
            raise ConsiliumError(f"node config: unknown key '{key}'{suggest(key, [*known, 'site'])}")
    given.update({k: v for k, v in values.items() if k in known})
    if "partition-id" in values:
        given["index"] = values["partition-id"]
    try:
        return Site(**{k: known[k](v) for k, v in given.items()})
    except (TypeError, ValueError) as error:
        raise ConsiliumError(
            f"site settings: {error}; expected types: {', '.join(f'{k} {t.__name__}' for k, t in known.items())}"
        ) from error


def resolve_data_root(config: Config) -> Path:
    """The federation's folder in simulation: `federation.data_root`, else `$CONSILIUM_DATA/<name>`, else `~/.cache/consilium/<name>`."""
    if config.federation.data_root:
        return Path(config.federation.data_root).expanduser().resolve()
    base = os.environ.get("CONSILIUM_DATA") or str(Path.home() / ".cache" / "consilium")
    return Path(base).resolve() / config.federation.name


def local_cohorts(site: Site, config: Config) -> dict[str, Path]:
    """{centre: its data} that this site answers for: its own cohort, or in simulation's central mode all of them at the first node.

    Empty for a node that has no part in this run. Raises Refused when a hospital is asked to pool.
    """
    if site.centre:
        if config.federation.mode == "central":
            raise Refused(
                "mode 'central' pools patients' data and is for simulation only; use federation.mode=federated"
            )
        if not site.data:
            raise Refused(f"centre '{site.centre}' has no data path; set `data` in site.yaml")
        return {site.centre: Path(site.data)}
    centres, root = config.federation.centres, resolve_data_root(config)
    if config.federation.mode == "central":
        return {c: root / c for c in centres} if site.index == 0 else {}
    return {c: root / c for c in centres[site.index : site.index + 1]}


def reply_name(site: Site, config: Config) -> str:
    """The name this site answers under: its centre's, or `pooled` in central mode; empty for a node that has no part in this run."""
    own = local_cohorts(site, config)
    return "pooled" if own and config.federation.mode == "central" else next(iter(own), "")


def cohort_state_dir(site: Site, data: Path) -> Path:
    """Where this site keeps slices and personal weights."""
    return Path(site.state) if site.state else (data if data.is_dir() else data.parent) / ".consilium"


def state_dir(site: Site, config: Config) -> Path:
    """The state folder for what belongs to the site rather than to one cohort; that of the first where data are pooled."""
    return cohort_state_dir(site, next(iter(local_cohorts(site, config).values())))


def safe_filename(name: str) -> str:
    """A run's or stage's name as a file name; the coordinator chooses it, so it must not reach out of the state folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise Refused(
            f"'{name[:40]}' is not a name for a run or a stage: letters, digits, '.', '_' and '-', at most 100"
        )
    return name
