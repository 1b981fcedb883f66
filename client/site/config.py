"""Read the centre's own settings: name, data, device, state folder. The coordinator can set none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict

from client.site.yaml_records import check_keys, field_names, parse_record, read_yaml_mapping
from common.config.names import MAX_NAME_LENGTH, NAME_RULE, is_plain_name, require_plain_name
from common.config.schema import Config
from common.utils.errors import ConsiliumError, RefusalCode, Refused

FLOWER_KEYS = (
    "site",
    "partition-id",
    "num-partitions",
)  # keys of a node configuration that are no field of a Site
RENAMED_SITE_KEYS = {
    "smallest_cell": "min_cell_count",
    "workers": "num_workers",
}  # {key of 0.1.0: its name now}


@dataclass(frozen=True)
class Site:
    """The settings of `site.yaml` or of Flower's node configuration.

    In simulation `centre` is empty, and `index` selects one of the federation's centres.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(coerce_numbers_to_str=True)

    centre: str = ""
    data: str = ""  # a folder with cohort.csv, or a cohort table
    state: str = ""  # the folder for slices, budget and local weights; empty: `.consilium` beside the data
    anchor: str = ""  # a folder outside `state` that remembers the egress log's end; empty: beside the data
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    num_workers: int = 1  # processes that read scans
    threads: int = 0  # of PyTorch; 0: PyTorch's own choice
    min_cell_count: int = 1  # a smaller count is reported as this; the policy may ask for more
    pacs: str = (
        ""  # where `consilium-centre ingest` gets studies: https://..., dicom://AET@host:port or a folder
    )
    policy: str = ""  # path of policy.yaml (client/site/policy.py); empty: everything is allowed
    # The cohort names no patients, and each patient has one scan: then `privacy=patient` protects scans.
    scans_are_patients: bool = False
    index: int = 0  # in simulation: the number of the node

    def __post_init__(self) -> None:
        """Check the name, which stands in every reply. Raises ValueError."""
        if self.centre:
            require_plain_name(self.centre, "a centre")

    def resolve_device(self) -> torch.device:
        """Return the device to train on. Raises Refused when this machine does not have it."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            reason = f"unknown device '{self.device}'; use auto, cpu, cuda or cuda:1"
            raise Refused(reason, RefusalCode.ERROR) from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            reason = f"device '{self.device}' is not available: this machine has {_describe_gpus()}"
            raise Refused(f"{reason}; set device: cpu or auto", RefusalCode.ERROR)
        return device


def _describe_gpus() -> str:
    count = torch.cuda.device_count()
    if count == 0:
        return "no GPU"
    return "1 GPU" if count == 1 else f"{count} GPUs"


def parse_site(values: Mapping[str, Any]) -> Site:
    """Build a Site from Flower's node configuration.

    The configuration may name a site file under `site`; a value that it sets itself takes precedence over the
    file's. Raises ConsiliumError for a file that cannot be read, an unknown key or a wrong value.
    """
    valid_keys = field_names(Site)
    settings: dict[str, Any] = {}
    if "site" in values:
        settings = _read_site_file(Path(str(values["site"])), valid_keys)
    check_keys(values, [*valid_keys, *FLOWER_KEYS], "node config", RENAMED_SITE_KEYS)
    for key, value in values.items():
        if key in valid_keys:
            settings[key] = value
    if "site" in values and not settings.get("centre"):
        raise ConsiliumError(
            f'site file {values["site"]} names no centre; write centre: "NAME", in quotes '
            "(a simulation has no site file)"
        )
    if "partition-id" in values:
        settings["index"] = values["partition-id"]
    return parse_record(Site, settings, "site settings")


def _read_site_file(path: Path, valid_keys: list[str]) -> dict[str, Any]:
    remedy = f"write it as YAML with the keys {', '.join(valid_keys)}"
    settings = read_yaml_mapping(path, "site file", remedy)
    check_keys(settings, valid_keys, f"site file {path}", RENAMED_SITE_KEYS)
    centre = settings.get("centre")
    if centre is not None and not isinstance(centre, str):
        raise ConsiliumError(
            f"site file {path}: centre is {centre!r} to YAML, and no text; put the name in quotes"
        )
    return {key: value for key, value in settings.items() if value is not None}  # `data:` alone sets nothing


def resolve_data_root(config: Config) -> Path:
    """Return a simulated federation's folder.

    It is `federation.data_root`, else `$CONSILIUM_DATA/<federation>`, else `~/.cache/consilium/<federation>`.
    """
    if config.federation.data_root:
        return Path(config.federation.data_root).expanduser().resolve()
    parent = os.environ.get("CONSILIUM_DATA") or Path.home() / ".cache" / "consilium"
    return Path(parent).resolve() / config.federation.name


def local_cohorts(site: Site, config: Config) -> dict[str, Path]:
    """Return {centre: its data} of the cohorts that this node holds in the run.

    A hospital holds its own. In simulation a node holds that of the centre at its index; with
    `federation.mode=central` the first node holds all. A node that takes no part in the run holds none.

    Raises Refused when a hospital is asked to pool its data or its site file names no data.
    """
    is_central = config.federation.mode == "central"
    if site.centre:
        if is_central:
            reason = "mode 'central' pools patients' data and is for simulation only"
            raise Refused(f"{reason}; use federation.mode=federated")
        if not site.data:
            reason = f"centre '{site.centre}' has no data path; set `data` in site.yaml"
            raise Refused(reason, RefusalCode.NO_DATA)
        return {site.centre: Path(site.data)}
    centres = config.federation.centres[site.index : site.index + 1]
    if is_central:
        centres = config.federation.centres if site.index == 0 else []
    root = resolve_data_root(config)
    return {centre: root / centre for centre in centres}


def reply_name(site: Site, config: Config) -> str:
    """Return the name in this node's replies.

    It is the centre's, or `pooled` in central mode; a node that takes no part in the run has none.
    """
    cohorts = local_cohorts(site, config)
    if cohorts and config.federation.mode == "central":
        return "pooled"
    return next(iter(cohorts), "")


def cohort_state_dir(site: Site, data: Path) -> Path:
    """Return the state folder of a cohort, for its slices, budget, log and local weights."""
    if site.state:
        return Path(site.state)
    folder = data if data.is_dir() else data.parent
    return folder / ".consilium"


def outer_anchor(site: Site, data: Path) -> Path | None:
    """Return the file outside the state folder that remembers the end of the egress log.

    It is in the folder `anchor` of site.yaml, or else beside the data. None where that folder cannot be
    written or is part of the state folder, and in simulation.
    """
    if not site.centre:
        return None
    filename = f".consilium-anchor-{site.centre}.json"
    if site.anchor:
        return Path(site.anchor) / filename
    folder = data if data.is_dir() else data.parent
    is_in_state = folder.resolve().is_relative_to(cohort_state_dir(site, data).resolve())
    return None if is_in_state or not os.access(folder, os.W_OK) else folder / filename


def state_dir(site: Site, config: Config) -> Path:
    """Return the state folder of the node; where it pools several cohorts, that of the first."""
    first_cohort = next(iter(local_cohorts(site, config).values()))
    return cohort_state_dir(site, first_cohort)


def safe_filename(name: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """Return the name of a run, stage, clustering or digest, checked to be a plain file name.

    The coordinator chooses it, so it must not lead out of the state folder. Raises Refused otherwise.
    """
    if not is_plain_name(name, max_length):
        rule = NAME_RULE.format(max_length)
        raise Refused(f"{name[:40]!r} is not a valid name of a run or stage; {rule}")
    return name
