"""What is the centre's own: read from its site file, never from the coordinator; which node answers for whom."""

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
from common.config.compose import compose_config, config_to_dict
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import JoinRequest, Refusal
from common.utils.errors import ConsiliumError, Refused

CONFIG = compose_config()
CENTRAL = compose_config(["federation.mode=central"])


def site_file(folder: Path, text: str) -> dict[str, str]:
    path = folder / "site.yaml"
    path.write_text(text)
    return {"site": str(path)}


def test_in_central_mode_only_the_node_that_pools_answers() -> None:
    assert [reply_name(Site(index=i), CENTRAL) for i in range(4)] == ["pooled", "", "", ""]
    assert list(local_cohorts(Site(index=0), CENTRAL)) == CENTRAL.federation.centres


def test_in_simulation_each_node_is_one_centre_and_the_rest_have_no_part() -> None:
    assert [reply_name(Site(index=i), CONFIG) for i in range(6)] == [*CONFIG.federation.centres, "", ""]
    assert [list(local_cohorts(Site(index=i), CONFIG)) for i in (1, 5)] == [["east"], []]


def test_a_hospital_answers_for_itself_whatever_the_index_and_the_mode(tmp_path: Path) -> None:
    site = Site(centre="st-elsewhere", data=str(tmp_path), index=2)
    assert local_cohorts(site, CONFIG) == {"st-elsewhere": tmp_path}
    assert reply_name(site, compose_config(["federation.mode=local"])) == "st-elsewhere"


def test_a_hospital_refuses_to_pool() -> None:
    with pytest.raises(Refused, match="pools patients' data and is for simulation only"):
        local_cohorts(Site(centre="st-elsewhere", data="/data"), CENTRAL)


def test_a_hospital_without_data_says_which_key_to_set() -> None:
    with pytest.raises(Refused, match=r"^centre 'st-elsewhere' has no data path; set `data` in site\.yaml$"):
        local_cohorts(Site(centre="st-elsewhere"), CONFIG)


def test_a_site_file_is_read_and_what_the_node_is_told_directly_comes_first(tmp_path: Path) -> None:
    values = site_file(
        tmp_path, "centre: north\ndata: /data\nnum_workers: 4\ndevice: cpu\nmin_cell_count: 5\n"
    )
    expected = Site(centre="north", data="/data", num_workers=4, device="cpu", min_cell_count=5)
    assert parse_site(values) == expected
    assert parse_site({**values, "data": "/other", "num_workers": "2"}) == replace(
        expected, data="/other", num_workers=2
    )
    assert parse_site({"partition-id": 3, "num-partitions": 4}) == Site(index=3)
    assert parse_site({}) == Site()


def test_a_key_without_a_value_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    assert parse_site(site_file(tmp_path, "centre: north\ndata:\nstate:\n")) == Site(centre="north")
    assert parse_site(site_file(tmp_path, "")) == Site()


@pytest.mark.parametrize(
    ("key", "tail"),
    [
        ("dataa", "did you mean 'data'"),
        ("min_cell_cout", "did you mean 'min_cell_count'"),
        ("zzz", "valid: "),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, tail: str) -> None:
    with pytest.raises(ConsiliumError, match=f"site.yaml: unknown key '{key}'; {tail}"):
        parse_site(site_file(tmp_path, f"centre: north\n{key}: 1\n"))
    with pytest.raises(ConsiliumError, match=f"node config: unknown key '{key}'; {tail}"):
        parse_site({"centre": "north", key: "1"})


@pytest.mark.parametrize(
    "text", ["[a, b]", "[1, 2]", "7", "just words", "a: b: c", "centre: 'north", "\tcentre: north", "\0"]
)
def test_a_site_file_that_is_no_mapping_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        ConsiliumError, match=r"site\.yaml cannot be read \(\w+\); it is YAML with keys centre, data, "
    ):
        parse_site(site_file(tmp_path, text))


def test_a_site_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"cannot be read \(FileNotFoundError\)"):
        parse_site({"site": str(tmp_path / "site.yaml")})


@pytest.mark.parametrize("values", [{"num_workers": "many"}, {"partition-id": "first"}, {"threads": []}])
def test_a_value_of_a_wrong_type_names_the_types(values: dict[str, str]) -> None:
    with pytest.raises(
        ConsiliumError, match=r"site settings: .* expected types: centre str, .*num_workers int"
    ):
        parse_site(values)


def test_a_wrong_site_file_reaches_the_coordinator_as_a_refusal_without_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Flower's own door."""
    for name in (
        "_run_id",
        "_node_id",
        "_task_id",
    ):  # of this process, as Flower sets them before it starts an app
        monkeypatch.setattr(TaskIdentity, name, 1)
    config = site_file(tmp_path, "centre: north\ndataa: /data\n")
    context = Context(run_id=1, node_id=1, node_config=dict(config), state=RecordDict(), run_config={})
    message = Message(
        content=to_records(JoinRequest("run", config_to_dict(CONFIG))), message_type="query", dst_node_id=1
    )
    reply = from_records(app(message, context).content)
    assert reply == Refusal("", "its site settings are wrong; the sentence is in the centre's log")


def test_the_device_is_there_or_a_sentence() -> None:
    assert Site(device="cpu").resolve_device() == torch.device("cpu")
    assert Site(device="auto").resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    with pytest.raises(
        Refused,
        match=rf"^device 'cuda:{count}' is asked for, but this machine shows .*; set device: cpu or auto$",
    ):
        Site(device=f"cuda:{count}").resolve_device()
    with pytest.raises(Refused, match=r"^device 'gpu' is none that PyTorch knows; set device: "):
        Site(device="gpu").resolve_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_one() -> None:
    with pytest.raises(Refused, match="shows no GPU; set device: cpu or auto"):
        Site(device="cuda").resolve_device()


def test_the_federations_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_data_root(compose_config([f"federation.data_root={tmp_path}"])) == tmp_path
    monkeypatch.setenv("CONSILIUM_DATA", str(tmp_path / "data"))
    assert resolve_data_root(CONFIG) == tmp_path / "data" / "phantom"
    monkeypatch.delenv("CONSILIUM_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data_root(CONFIG) == tmp_path / ".cache" / "consilium" / "phantom"


def test_state_lies_beside_the_data_unless_said(tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.touch()
    assert cohort_state_dir(Site(), tmp_path) == cohort_state_dir(Site(), table) == tmp_path / ".consilium"
    assert cohort_state_dir(Site(state="/state"), tmp_path) == Path("/state")


@pytest.mark.parametrize("name", ["main", "20240101-120000-run-federated-ab12", "a.b_c-d", "x" * 100])
def test_names_of_runs_and_stages(name: str) -> None:
    assert safe_filename(name) == name
