"""A coordinator that sends whatever it likes: the centre refuses, never raises, and writes nowhere else."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from client.app import app
from client.federation.handlers import handle_request
from client.site import egress_log
from client.site.config import Site
from common.config.parse import config_to_dict
from common.protocol.flower_records import from_records, to_records
from common.protocol.message_packing import metadata_to_json, pack_message
from common.protocol.messages import (
    ArraysByName,
    JoinReply,
    JoinRequest,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    UnmaskRequest,
)
from common.utils.errors import RefusalCode
from tests.client.federation.told_numbers import list_numbers_of_scans
from tests.client.hospital import hospital as hospital
from tests.client.hospital import initial_weights, make_config, make_site, refusal_reason, train_request

CONFIG = make_config(
    "recipe=transfer",
    "preprocess.num_slices=1",
    "stages.transition.tasks=[soft]",
    "tasks.soft.num_clusters=[2]",
)
CLUSTERED = "soft"
NUM_MESSAGES = int(os.environ.get("CONSILIUM_FUZZ_MESSAGES", "150"))
ABSOLUTE = "absolute"  # stands for an absolute path, which no test knows beforehand
NAMES_THAT_LEAD_OUT = (
    ABSOLUTE,
    "../../../../planted",
    "..",
    "/tmp/../planted",
    "a/../../../../planted",
    ".planted",
)


def make_hospital_site(hospital: Path, root: Path) -> Site:
    """Return a site whose state folder lies four folders below `root`, where a test looks for other files."""
    return make_site(hospital, state=str(root / "a" / "b" / "c" / "state"))


def list_files_outside(root: Path) -> list[Path]:
    """List what was written below `root` beside the state folder."""
    state = root / "a" / "b" / "c" / "state"
    return [path for path in root.rglob("*") if path.is_file() and state not in path.parents]


def rename_task(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a configuration's values with another name of a task."""
    text = json.dumps(values).replace(json.dumps(old), json.dumps(new))
    return dict(json.loads(text))


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_OUT)
def test_no_name_in_a_request_becomes_a_file_outside_the_state_folder(
    hospital: Path, tmp_path: Path, name: str
) -> None:
    site = make_hospital_site(hospital, tmp_path)
    if name == ABSOLUTE:
        name = str(tmp_path / "planted")
    values = config_to_dict(CONFIG)
    weights = initial_weights(CONFIG)
    centroids = np.zeros((1, 96))
    query = StatisticsRequest("run", values, "clusters", "", "train", CLUSTERED, weights, centroids=centroids)
    assert isinstance(handle_request(site, query), StatisticsReply)  # as an honest coordinator sends it
    requests: list[Request] = [
        replace(query, config=rename_task(values, CLUSTERED, name), task=name),
        replace(query, clustering_id=name),
        replace(query, run_id=name),
        replace(query, split=name),
        replace(query, personal_rounds=[(name, 1)]),
        replace(query, base_digest=name),
        ShareKeysRequest("run", values, f"train/{name}", {}),
    ]
    replies = [handle_request(site, request) for request in requests]
    assert not list_files_outside(tmp_path)
    for reply in replies:
        assert refusal_reason(reply)


# --- malformed messages through Flower's own app --------------------------------------------------


def send_through_flower(site: Site, content: RecordDict, monkeypatch: pytest.MonkeyPatch) -> Reply:
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them before it starts an app
        monkeypatch.setattr(TaskIdentity, name, 1)
    node_config = {
        "centre": site.centre,
        "data": site.data,
        "state": site.state,
        "anchor": site.anchor,
        "device": "cpu",
    }
    context = Context(run_id=1, node_id=1, node_config=dict(node_config), state=RecordDict(), run_config={})
    message = Message(content=content, message_type="query", dst_node_id=1)
    reply = from_records(app(message, context).content)
    return reply  # type: ignore[return-value]


def make_records(metadata: str, arrays: ArrayRecord | None = None) -> RecordDict:
    return RecordDict({"arrays": arrays or ArrayRecord(), "metadata": ConfigRecord({"json": metadata})})


def make_bad_array(dtype: str, shape: list[int], stype: str = "consilium.raw") -> ArrayRecord:
    record = ArrayRecord()
    record["weights.floats"] = Array(dtype, tuple(shape), stype, b"12345678")
    return record


JOIN = '{"kind": "JoinRequest", "run_id": "r", "config": {}}'
MALFORMED = {
    "nothing": RecordDict(),
    "no json": make_records("not JSON"),
    "a list": make_records("[1, 2]"),
    "deep": make_records("[" * 100_000 + "]" * 100_000),
    "no kind": make_records("{}"),
    "unknown kind": make_records('{"kind": "Pixels"}'),
    "a kind that is no text": make_records('{"kind": ["JoinRequest"]}'),
    "a field too few": make_records('{"kind": "JoinRequest"}'),
    "a field too many": make_records('{"kind": "JoinRequest", "run_id": "r", "config": {}, "x": 1}'),
    "a reply": make_records('{"kind": "Refusal", "centre": "c", "reason": "r", "code": "nonsense"}'),
    "another reply": to_records(Refusal("north", "no")),
    "objects": make_records(JOIN, make_bad_array("O", [1])),
    "no type": make_records(
        '{"kind": "JoinRequest", "run_id": "r", "config": {}}', make_bad_array("zz", [1])
    ),
    "shape": make_records(JOIN, make_bad_array("f4", [-9])),
    "pickle": make_records('{"kind": "JoinRequest"}', make_bad_array("f4", [2], "numpy.ndarray")),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_message_that_cannot_be_read_is_refused_and_recorded(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: RecordDict
) -> None:
    site = make_hospital_site(hospital, tmp_path)
    reply = send_through_flower(site, content, monkeypatch)
    assert refusal_reason(reply)
    assert isinstance(reply, Refusal)
    assert (reply.centre, reply.code) == ("north", RefusalCode.BAD_REQUEST)
    assert [entry.kind for entry in egress_log.read_entries(Path(site.state))] == ["Refusal"]


# --- any change of a valid request ----------------------------------------------------------------

BAD_TEXTS = ("", "..", "../../../../planted", "a/b", "\x00", "\ud800", "x" * 5000, "main", "covid", "train")
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(BAD_TEXTS)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(BAD_TEXTS), inner, max_size=3)
    ),
    max_leaves=6,
)
ARRAYS: st.SearchStrategy[Any] = st.sampled_from(
    [
        np.zeros(0, np.float32),
        np.full(7, np.nan, np.float32),
        np.zeros((2, 96)),
        np.full((2, 96), np.inf),
        np.zeros(96, np.uint8),
        np.zeros((3, 3, 3), np.int64),
        np.array(["text"]),
        np.zeros(2, np.complex128),
        np.zeros(2, "datetime64[s]"),
    ]
)


def list_requests() -> list[Request]:
    """Return a valid request of every kind; the steps of a secure sum have none that was begun."""
    values = config_to_dict(CONFIG)
    keys: ArraysByName = {"north": np.zeros(96, np.uint8)}
    weights = initial_weights(CONFIG)
    training = train_request(make_config("stage.local_steps=1"))
    return [
        JoinRequest("run", values),
        StatisticsRequest("run", values, "counts", ""),
        StatisticsRequest(
            "run", values, "clusters", "", "train", CLUSTERED, weights, centroids=np.zeros((1, 96))
        ),
        training,
        ShareKeysRequest("run", values, "train/main/1/0", keys),
        MaskedInputRequest("run", values, "train/main/1/0", keys),
        UnmaskRequest("run", values, "train/main/1/0", ["north"]),
    ]


def change_value(data: st.DataObject, values: Any) -> Any:
    """Return JSON values with one entry, however deep, replaced, removed or added."""
    if isinstance(values, dict) and values and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(values)))
        action = data.draw(st.sampled_from(["inside", "inside", "remove", "rename"]))
        if action == "inside":
            values[key] = change_value(data, values[key])
        else:
            value = values.pop(key)
            if action == "rename":
                values[data.draw(st.sampled_from(BAD_TEXTS))] = value
        return values
    return data.draw(JSON_VALUES)


def change_message(data: st.DataObject, request: Request) -> RecordDict:
    """Return the records of a request with one to three changes of its metadata and arrays."""
    packed = pack_message(request)
    metadata = copy.deepcopy(packed.metadata)
    arrays = dict(packed.arrays)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["metadata", "metadata", "array", "field"]))
        if kind == "metadata":
            metadata = change_value(data, metadata)
        elif kind == "array":
            names = [*arrays, "run_id", "config", "weights.floats", "roster/x", "shares/../x", "name"]
            arrays[data.draw(st.sampled_from(names))] = data.draw(ARRAYS)
        elif isinstance(metadata, dict):
            metadata[data.draw(st.sampled_from(sorted(packed.metadata)))] = data.draw(JSON_VALUES)
    record = ArrayRecord()
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array)
        record[name] = Array(str(flat.dtype), flat.shape, "consilium.raw", flat.tobytes())
    return make_records(metadata_to_json(metadata), record)


@pytest.fixture(scope="module")
def valid_requests() -> list[Request]:
    return list_requests()


def test_requests_to_be_changed_are_valid(
    hospital: Path, tmp_path: Path, valid_requests: list[Request]
) -> None:
    replies = [handle_request(make_hospital_site(hospital, tmp_path), request) for request in valid_requests]
    assert [type(reply) for reply in replies[:4]] == [JoinReply, StatisticsReply, StatisticsReply, TrainReply]
    for reply in replies[4:]:
        assert "not part of the sum any more" in refusal_reason(reply)


@settings(
    max_examples=NUM_MESSAGES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_changed_request_never_raises_tells_no_small_number_and_writes_nothing_elsewhere(
    hospital: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    valid_requests: list[Request],
    data: st.DataObject,
) -> None:
    """Flower's app would turn an exception into an error of the node; here it fails the test."""
    request = data.draw(st.sampled_from(valid_requests))
    content = change_message(data, request)
    min_cell_count = data.draw(st.sampled_from([1, 4]))
    site = replace(make_hospital_site(hospital, tmp_path), min_cell_count=min_cell_count)
    reply = send_through_flower(site, content, monkeypatch)
    event(type(reply).__name__)
    assert reply.centre == "north"
    assert not list_files_outside(tmp_path)
    for number in list_numbers_of_scans(reply, CONFIG.tasks):
        assert number == 0 or number >= min_cell_count, reply
