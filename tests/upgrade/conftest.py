"""The folders of a hospital and a coordinator as 0.1.0 left them (state_0_1_0.md), unpacked for each test."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import yaml

from client.site.config import RENAMED_SITE_KEYS, Site, parse_site
from client.site.policy import RENAMED_POLICY_KEYS
from tests.server.conftest import database, postgresql  # noqa: F401
from tests.upgrade import tiny_backbone  # noqa: F401

ARCHIVE = Path(__file__).parent / "state_0_1_0.tar.gz"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recorded folders. They are the working directory, because the paths in their files are relative."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "state_0_1_0"
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def north(recorded: Path) -> Site:
    """The hospital `north`, whose staff changed the keys of its two files as the error messages asked."""
    hospital = recorded / "hospital_north"
    rename_keys(hospital / "site.yaml", RENAMED_SITE_KEYS)
    for policy in hospital.glob("policy*.yaml"):
        rename_keys(policy, RENAMED_POLICY_KEYS)
        remove_key(policy, "recipes")
    return parse_site({"site": "hospital_north/site.yaml"})


def remove_key(path: Path, key: str) -> None:
    """Remove a key at the top of a YAML file."""
    values = yaml.safe_load(path.read_text())
    values.pop(key, None)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def rename_keys(path: Path, renamed_keys: dict[str, str]) -> None:
    """Rename the keys at the top of a YAML file."""
    values = yaml.safe_load(path.read_text())
    renamed = {renamed_keys.get(key, key): value for key, value in values.items()}
    path.write_text(yaml.safe_dump(renamed, sort_keys=False))
