"""Overrides and files cannot read the environment of the machine that composes a configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.config.compose import CONFIG_DIR, compose_config
from common.utils.errors import ConsiliumError


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:CONSILIUM_TEST_SECRET}",
        "'${oc.env:CONSILIUM_TEST_SECRET}'",
        r"$\{oc.env:CONSILIUM_TEST_SECRET\}",
        "${oc.decode:${oc.env:CONSILIUM_TEST_SECRET}}",
        "${recipe}",
        "[a,'${oc.env:CONSILIUM_TEST_SECRET}']",
    ],
)
@pytest.mark.parametrize("key", ["federation.data_root", "+federation.data_root", "recipe", "stage.name"])
def test_an_override_reads_neither_the_environment_nor_other_keys(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv("CONSILIUM_TEST_SECRET", "the password")
    with pytest.raises(ConsiliumError, match="has an interpolation") as caught:
        compose_config([f"{key}={value}"])
    assert "the password" not in str(caught.value)


def test_an_interpolation_of_a_file_stays_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the files come from others."""
    monkeypatch.setenv("CONSILIUM_TEST_SECRET", "the password")
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    path = configs / "config.yaml"
    path.write_text(path.read_text() + "federation: {data_root: '${oc.env:CONSILIUM_TEST_SECRET}'}\n")
    assert compose_config([], configs).federation.data_root == "${oc.env:CONSILIUM_TEST_SECRET}"


@pytest.mark.parametrize("override", ["hydra.searchpath=[/tmp]", "+hydra.run.dir=/tmp", "~hydra.job=x"])
def test_an_override_sets_nothing_of_hydra_itself(override: str) -> None:
    with pytest.raises(ConsiliumError, match="is for Hydra itself"):
        compose_config([override])
