"""Read `federation.yaml`: who takes part, and where the coordinator is reached. It holds no secret."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from common.config.schema import config_dataclass
from common.utils.errors import ConsiliumError, suggest


@config_dataclass
class CentreEntry:
    """What the coordinator proposes for one hospital; the hospital may change all of it in its own files."""

    device: str = "cuda"  # auto | cpu | cuda | cuda:1 ...
    data: str = "/srv/consilium/data"  # the folder with cohort.csv on the hospital's machine
    state: str = "/srv/consilium/state"  # its folder for slices, privacy budget and egress log
    # The file, beside federation.yaml, that `consilium-centre key` made there. Empty: the key is made here.
    public_key: str = ""


@config_dataclass
class FederationFile:
    """The whole of `federation.yaml`."""

    address: str  # host:port that hospitals reach
    centres: dict[str, CentreEntry]
    name: str = "consilium"
    # Further names and addresses of the coordinator's certificate
    sans: list[str] = field(default_factory=list)
    days: int = 397  # validity of the coordinator's certificate
    warn: int = 45  # days before expiry
    image: str = "consilium-centre:0.2.0"  # that a hospital starts; name@sha256:... pins it

    @property
    def host(self) -> str:
        """Return the address without its port."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the address's port."""
        return int(self.address.rpartition(":")[2])


NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ADDRESS_PATTERN = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")
IMAGE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
# {field of CentreEntry: ...}. They become lines of settings.env, where a shell and compose read them.
_PATH_PATTERN = re.compile(r"/[A-Za-z0-9._/@+:, -]*")
_PATH_RULE = "an absolute path of letters, digits, spaces and . _ / @ + : , -"
ENTRY_PATTERNS = {
    "device": (re.compile("auto|cpu|cuda(:[0-9]+)?"), "auto, cpu, cuda or cuda:1"),
    "data": (_PATH_PATTERN, _PATH_RULE),
    "state": (_PATH_PATTERN, _PATH_RULE),
}
_FILE_ADAPTER: TypeAdapter[FederationFile] = TypeAdapter(FederationFile)


def load_federation_file(path: Path) -> FederationFile:
    """Read and check a federation file.

    Raises:
        ConsiliumError: one sentence naming the file and the key.
    """
    try:
        federation = _FILE_ADAPTER.validate_python(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConsiliumError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    except ValidationError as error:
        raise ConsiliumError(f"{path}: {_explain(error.errors()[0])}") from error
    problem = _find_problem(federation)
    if problem:
        raise ConsiliumError(f"{path}: {problem}")
    return federation


def _explain(details: Any) -> str:
    """Return what pydantic found, naming the key and the nearest valid one."""
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "string_type":
        return f"{key}: {details['input']!r} is no text to YAML; put it in quotes"
    if details["type"] != "unexpected_keyword_argument":
        return f"{key or 'the file'}: {details['msg']}"
    record = CentreEntry if key.startswith("centres.") else FederationFile
    return f"unknown key '{key}'{suggest(str(details['loc'][-1]), record.__dataclass_fields__)}"


def _find_problem(federation: FederationFile) -> str:
    """Return what is wrong with a federation's values, or nothing."""
    if not ADDRESS_PATTERN.fullmatch(federation.address) or not 0 < federation.port < 65536:
        return f"address is '{federation.address}'; it must be host:port, e.g. consilium.example.org:443"
    for name in [federation.name, *federation.centres]:
        if not NAME_PATTERN.fullmatch(name) or name == "coordinator":
            return (
                f"'{name}' cannot be a name; use letters, digits, '.', '_' and '-', at most 63, "
                "and not 'coordinator'"
            )
    for name, centre in federation.centres.items():
        for field_name, (pattern, rule) in ENTRY_PATTERNS.items():
            value = getattr(centre, field_name)
            if not pattern.fullmatch(value):
                return f"centres.{name}.{field_name} is {value!r}; it must be {rule}"
    if not IMAGE_PATTERN.fullmatch(federation.image):
        return f"image is {federation.image!r}; it must be a container image, e.g. consilium-centre:0.2.0"
    if not federation.centres:
        return "it names no centre; write centres: {north: {}}"
    if federation.days < 1:
        return f"days is {federation.days}; it must be 1 or more"
    return ""
