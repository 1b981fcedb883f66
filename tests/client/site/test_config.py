"""The centre's own settings come from its site file, and decide for which cohorts a node replies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.site.config import (
    Site,
    cohort_state_dir,
    local_cohorts,
    parse_site,
    reply_name,
    resolve_data_root,
    safe_filename,
)
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import JoinRequest, Refusal
from common.utils.errors import ConsiliumError, RefusalCode, Refused

CONFIG = compose_config()
CENTRAL = compose_config(["federation.mode=central"])


def write_site_file(folder: Path, text: str) -> dict[str, str]:
    """Write a site file and return the node configuration that names it."""
    path = folder / "site.yaml"
    path.write_text(text)
    return {"site": str(path)}


def test_in_central_mode_the_first_node_holds_all_cohorts() -> None:
    assert [reply_name(Site(index=i), CENTRAL) for i in range(4)] == ["pooled", "", "", ""]
    assert list(local_cohorts(Site(index=0), CENTRAL)) == CENTRAL.federation.centres


def test_in_simulation_each_node_holds_one_cohort_and_the_rest_none() -> None:
    assert [reply_name(Site(index=i), CONFIG) for i in range(6)] == [*CONFIG.federation.centres, "", ""]
    assert [list(local_cohorts(Site(index=i), CONFIG)) for i in (1, 5)] == [["east"], []]


def test_hospital_replies_for_itself_whatever_its_index_and_the_mode(tmp_path: Path) -> None:
    site = Site(centre="st-elsewhere", data=str(tmp_path), index=2)
    assert local_cohorts(site, CONFIG) == {"st-elsewhere": tmp_path}
    assert reply_name(site, compose_config(["federation.mode=local"])) == "st-elsewhere"


def test_hospital_refuses_to_pool() -> None:
    with pytest.raises(Refused, match="pools patients' data and is for simulation only"):
        local_cohorts(Site(centre="st-elsewhere", data="/data"), CENTRAL)


def test_hospital_without_data_names_the_key_to_set() -> None:
    reason = r"^centre 'st-elsewhere' has no data path; set `data` in site\.yaml$"
    with pytest.raises(Refused, match=reason) as caught:
        local_cohorts(Site(centre="st-elsewhere"), CONFIG)
    assert caught.value.code == RefusalCode.NO_DATA


def test_node_configuration_takes_precedence_over_the_site_file(tmp_path: Path) -> None:
    values = write_site_file(
        tmp_path, "centre: north\ndata: /data\nnum_workers: 4\ndevice: cpu\nmin_cell_count: 5\n"
    )
    expected = Site(centre="north", data="/data", num_workers=4, device="cpu", min_cell_count=5)
    assert parse_site(values) == expected
    overridden = parse_site({**values, "data": "/other", "num_workers": "2"})
    assert overridden == replace(expected, data="/other", num_workers=2)
    assert parse_site({"partition-id": 3, "num-partitions": 4}) == Site(index=3)
    assert parse_site({}) == Site()


def test_key_without_a_value_has_its_default(tmp_path: Path) -> None:
    assert parse_site(write_site_file(tmp_path, "centre: north\ndata:\nstate:\n")) == Site(centre="north")


@pytest.mark.parametrize("text", ["7", "012", "1.10", "no", "2026-01-01", "[north]"])
def test_name_that_is_no_text_to_yaml_is_refused(tmp_path: Path, text: str) -> None:
    """012 would be centre 10, and `no` centre False; in quotes they are names."""
    with pytest.raises(ConsiliumError, match="no text; put the name in quotes"):
        parse_site(write_site_file(tmp_path, f"centre: {text}\n"))
    if text != "[north]":
        assert parse_site(write_site_file(tmp_path, f'centre: "{text}"\n')).centre == text


@pytest.mark.parametrize("text", ["", "data: /data\n", "centre:\n", "centre: null\n", "centre: ''\n"])
def test_site_file_without_a_name_is_no_simulation(tmp_path: Path, text: str) -> None:
    """The coordinator would choose the data; a simulation has no site file."""
    node_config = write_site_file(tmp_path, text)
    with pytest.raises(ConsiliumError, match="names no centre"):
        parse_site(node_config)
    assert parse_site(node_config | {"centre": "north"}).centre == "north"
    assert parse_site({"partition-id": "2"}) == Site(index=2)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("dataa", "did you mean 'data'"),
        ("min_cell_cout", "did you mean 'min_cell_count'"),
        ("zzz", "valid: "),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path: Path, key: str, hint: str) -> None:
    with pytest.raises(ConsiliumError, match=f"site.yaml: unknown key '{key}'; {hint}"):
        parse_site(write_site_file(tmp_path, f"centre: north\n{key}: 1\n"))
    with pytest.raises(ConsiliumError, match=f"node config: unknown key '{key}'; {hint}"):
        parse_site({"centre": "north", key: "1"})


@pytest.mark.parametrize(
    ("old_key", "new_key"), [("smallest_cell", "min_cell_count"), ("workers", "num_workers")]
)
def test_key_of_the_previous_version_is_refused_with_its_new_name(
    tmp_path: Path, old_key: str, new_key: str
) -> None:
    with pytest.raises(ConsiliumError, match=f"site.yaml: '{old_key}' is now '{new_key}'; rename it$"):
        parse_site(write_site_file(tmp_path, f"centre: north\n{old_key}: 2\n"))
    with pytest.raises(ConsiliumError, match=f"^node config: '{old_key}' is now '{new_key}'; rename it$"):
        parse_site({"centre": "north", old_key: "2"})


@pytest.mark.parametrize(
    "text", ["[a, b]", "[1, 2]", "7", "just words", "a: b: c", "centre: 'north", "\tcentre: north", "\0"]
)
def test_site_file_that_is_not_a_mapping_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    sentence = r"site\.yaml cannot be read \(\w+\); write it as YAML with the keys centre, data, "
    with pytest.raises(ConsiliumError, match=sentence):
        parse_site(write_site_file(tmp_path, text))


def test_missing_site_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"cannot be read \(FileNotFoundError\)"):
        parse_site({"site": str(tmp_path / "site.yaml")})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_workers": "many"}, "num_workers is 'many'; it should be a valid integer"),
        ({"partition-id": "first"}, "index is 'first'; it should be a valid integer"),
        ({"threads": []}, r"threads is \[\]; it should be a valid integer"),
    ],
)
def test_value_of_a_wrong_type_is_refused_with_the_right_type(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConsiliumError, match=f"^site settings: {sentence}"):
        parse_site(values)


def test_wrong_site_file_reaches_the_coordinator_as_a_refusal_without_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is handled by Flower's ClientApp."""
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them before it starts an app
        monkeypatch.setattr(TaskIdentity, name, 1)
    config = write_site_file(tmp_path, "centre: north\ndataa: /data\n")
    context = Context(run_id=1, node_id=1, node_config=dict(config), state=RecordDict(), run_config={})
    message = Message(
        content=to_records(JoinRequest("run", config_to_dict(CONFIG))), message_type="query", dst_node_id=1
    )
    reply = from_records(app(message, context).content)
    assert reply == Refusal("", "the centre's site settings are wrong; see the centre's log")


def test_device_is_returned_or_refused_in_one_sentence() -> None:
    assert Site(device="cpu").resolve_device() == torch.device("cpu")
    assert Site(device="auto").resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    missing = rf"^device 'cuda:{count}' is not available: this machine has .*; set device: cpu or auto$"
    with pytest.raises(Refused, match=missing):
        Site(device=f"cuda:{count}").resolve_device()
    with pytest.raises(Refused, match=r"^unknown device 'gpu'; use auto, cpu, cuda or cuda:1$"):
        Site(device="gpu").resolve_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_on_a_machine_without_a_gpu() -> None:
    with pytest.raises(Refused, match="this machine has no GPU; set device: cpu or auto"):
        Site(device="cuda").resolve_device()


def test_simulated_federations_folder_is_set_or_has_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_data_root(compose_config([f"federation.data_root={tmp_path}"])) == tmp_path
    monkeypatch.setenv("CONSILIUM_DATA", str(tmp_path / "data"))
    assert resolve_data_root(CONFIG) == tmp_path / "data" / "phantom"
    monkeypatch.delenv("CONSILIUM_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data_root(CONFIG) == tmp_path / ".cache" / "consilium" / "phantom"


def test_state_folder_is_beside_the_data_by_default(tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.touch()
    assert cohort_state_dir(Site(), tmp_path) == cohort_state_dir(Site(), table) == tmp_path / ".consilium"
    assert cohort_state_dir(Site(state="/state"), tmp_path) == Path("/state")


@pytest.mark.parametrize("name", ["main", "20240101-120000-run-federated-ab12", "a.b_c-d", "x" * 100])
def test_names_of_runs_and_stages_are_file_names(name: str) -> None:
    assert safe_filename(name) == name
