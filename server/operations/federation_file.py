"""`federation.yaml`: who takes part, and where the coordinator is reached. No secret stands in it."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from common.config.schema import config_dataclass
from common.utils.errors import ConsiliumError, suggest


@config_dataclass
class CentreEntry:
    """What the coordinator proposes for one hospital; the hospital may change all of it in its own files."""

    device: str = "cuda"  # auto | cpu | cuda | cuda:1 ...
    data: str = "/srv/consilium/data"  # the folder with cohort.csv on the hospital's machine
    state: str = "/srv/consilium/state"  # its folder for slices, budget and egress log
    public_key: str = ""  # file, beside federation.yaml, that `consilium-centre key` made there; empty: the key is made here


@config_dataclass
class FederationFile:
    """The whole of `federation.yaml`."""

    address: str  # host:port that hospitals reach
    centres: dict[str, CentreEntry]
    name: str = "consilium"
    sans: list[str] = field(
        default_factory=list
    )  # further names and addresses that the coordinator's certificate is for
    days: int = 397  # the coordinator's certificate is good for
    warn: int = 45  # days before expiry
    image: str = "consilium-centre:0.1.0"  # what a hospital starts; with a digest (name@sha256:...) it is that image and no other

    @property
    def host(self) -> str:
        """The address without its port."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The address's port."""
        return int(self.address.rpartition(":")[2])


NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_FILE_ADAPTER: TypeAdapter[FederationFile] = TypeAdapter(FederationFile)


def load_federation_file(path: Path) -> FederationFile:
    """Raises ConsiliumError, one sentence naming the file and the key."""
    try:
        federation = _FILE_ADAPTER.validate_python(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConsiliumError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = CentreEntry if where.startswith("centres.") else FederationFile
            raise ConsiliumError(
                f"{path}: unknown key '{where}'{suggest(str(first['loc'][-1]), known.__dataclass_fields__)}"
            ) from error
        raise ConsiliumError(f"{path}: {where or 'the file'}: {first['msg']}") from error
    if (
        not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}", federation.address)
        or not 0 < federation.port < 65536
    ):
        raise ConsiliumError(
            f"{path}: address is '{federation.address}'; it must be host:port, e.g. consilium.example.org:443"
        )
    for name in [federation.name, *federation.centres]:
        if not NAME_PATTERN.fullmatch(name) or name == "coordinator":
            raise ConsiliumError(
                f"{path}: '{name}' is no name for a centre: letters, digits, '.', '_' and '-', at most 63; not 'coordinator'"
            )
    if not federation.centres:
        raise ConsiliumError(f"{path}: it names no centre; write centres: {{north: {{}}}}")
    if federation.days < 1:
        raise ConsiliumError(f"{path}: days is {federation.days}; it must be 1 or more")
    return federation
