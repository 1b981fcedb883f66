"""Names and texts in a configuration: what may become a file name, a key or a text on a page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.config.compose import compose_config
from common.config.names import is_plain_name, is_plain_text, name_clustering
from common.config.parse import config_to_dict, parse_config
from common.config.schema import Config, FederationConfig, Task
from common.utils.errors import ConsiliumError

BAD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    ".hidden",
    "-rf",
    "a b",
    "a\n",
    "a\0b",
    "é",
    "x" * 101,
)
BAD_TEXTS = ("", "a\nb", "a\0b", "\u202eabc", "\ud800", "../x", "/etc/passwd", "~root", "x" * 201)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_is_no_file_name_is_not_plain(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "20240101-120000-run-federated-ab12", "a.b_c-d", "_x", "7", "x" * 100])
def test_usual_names_are_plain(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_text_that_hides_something_or_is_a_path_is_not_plain(text: str) -> None:
    assert not is_plain_text(text)


@pytest.mark.parametrize("text", ["<=10", "COVID-19 (PCR)", "GE/Siemens", "Köln", "non-small cell"])
def test_usual_texts_are_plain(text: str) -> None:
    assert is_plain_text(text)


def rename(config: Config, **changes: object) -> dict[str, object]:
    return {**config_to_dict(config), **changes}


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name])
def test_configuration_with_a_name_that_is_no_file_name_is_refused_when_it_is_parsed(name: str) -> None:
    """Also where an object is made otherwise, as the coordinator does when it fills in the sources."""
    config = compose_config()
    values = config_to_dict(config)
    stage = values["stages"]["main"]
    task = values["tasks"]["covid"]
    federation = values["federation"]
    bad_configurations = (
        rename(config, tasks={name: task}),
        rename(config, stages={name: stage}),
        rename(config, recipe=name),
        rename(config, federation={**federation, "name": name}),
        rename(config, federation={**federation, "centres": [name, "north"]}),
        rename(config, backbone={**values["backbone"], "name": name}),
    )
    for bad_values in bad_configurations:
        with pytest.raises(ConsiliumError, match="cannot be the name of"):
            parse_config(bad_values)
    with pytest.raises(ValueError, match="cannot be the name of a task"):
        replace(config, tasks={name: Task()})


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_classes_and_columns_are_printable_texts(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a task's classes"):
        Task(type="multiclass", classes=["a", text])
    if text:
        with pytest.raises(ValueError, match="cannot be the name of a column"):
            Task(label_column=text)
        with pytest.raises(ValueError, match="cannot be the name of a column"):
            Task(type="segmentation", severity_column=text)


def test_clustering_id_is_a_file_name_also_of_a_long_run_and_task() -> None:
    with pytest.raises(ValueError, match="cannot be the name of a clustering"):
        Task(clustering_id="../labels")
    clustering_id = name_clustering("r" * 100, "t" * 100)
    assert Task(type="multiclass", num_clusters=[2], clustering_id=clustering_id).clustering_id


def test_backbone_from_a_disk_or_the_internet_is_refused() -> None:
    for name in ("hf-hub:someone/model", "local-dir:/etc"):
        with pytest.raises(ConsiliumError, match="cannot be the name of a backbone"):
            compose_config([f"backbone.name='{name}'"])


def test_numbers_that_are_not_finite_and_endless_lists_are_refused() -> None:
    config = config_to_dict(compose_config())
    tasks = {"covid": {**config["tasks"]["covid"], "grad_scale": float("nan")}}
    with pytest.raises(ConsiliumError, match=r"tasks\.covid\.grad_scale is nan; it must be a finite number"):
        parse_config({**config, "tasks": tasks})
    with pytest.raises(ValueError, match=r"federation\.centres has 1001 entries; at most 1000"):
        FederationConfig(centres=[f"c{number}" for number in range(1001)])
    with pytest.raises(ValueError, match="hidden_dims"):
        Task(hidden_dims=[10**9])
