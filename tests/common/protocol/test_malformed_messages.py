"""What is no message is refused with one kind of error, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.modeling.parameters import Weights
from common.protocol.flower_records import RAW_STYPE, from_records, to_records
from common.protocol.message_packing import MalformedMessageError, pack_message, unpack_message
from common.protocol.messages import JoinReply, StatisticsRequest, TrainReply, TrainRequest

WEIGHTS = Weights(np.ones(3, np.float32), np.ones(1, np.int64))
TRAIN = TrainRequest("r", {}, "main", 1, WEIGHTS, personal_rounds=[("main", 1)])
REPLY = TrainReply("west", np.ones(3, np.float32), np.ones(1, np.int64), 8, 2, {"covid": [1.0, 2.0]}, 0.5)
JOIN = JoinReply("west", ["west"], "f", [], [], {"train": 3}, {}, {}, "cpu")


def test_rounds_of_local_layers_arrive_as_they_were_sent() -> None:
    received = unpack_message(*pack_message(TRAIN))
    assert isinstance(received, TrainRequest)
    assert received.personal_rounds == [("main", 1)]


def test_what_may_be_absent_is_absent() -> None:
    received = unpack_message(*pack_message(StatisticsRequest("r", {}, "counts", "")))
    assert isinstance(received, StatisticsRequest)
    assert (received.weights, received.centroids) == (None, None)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("kind", "Nothing", "unknown type"),
        ("kind", ["TrainReply"], "unknown type"),
        ("centre", 3, "the field centre of a TrainReply"),
        ("scans", "8", "the field scans of a TrainReply"),
        ("scans", 8.5, "the field scans of a TrainReply"),
        ("scans", True, "the field scans of a TrainReply"),
        ("losses", {"covid": [1.0, "a"]}, "the field losses of a TrainReply"),
        ("losses", [[1.0, 2.0]], "the field losses of a TrainReply"),
        ("losses", {"covid": [[1.0], [2.0]]}, "the field losses of a TrainReply"),
        ("seconds", None, "the field seconds of a TrainReply"),
        ("extra", 1, "a field of a TrainReply"),
        ("delta", [1.0], "of a TrainReply"),
        ("centre", {1, 2}, "cannot be written as JSON"),
    ],
)
def test_fields_of_another_type_are_refused(key: str, value: Any, fault: str) -> None:
    arrays, metadata = pack_message(REPLY)
    with pytest.raises(MalformedMessageError, match=fault):
        unpack_message(arrays, {**metadata, key: value})


def test_missing_fields_are_refused() -> None:
    arrays, metadata = pack_message(REPLY)
    for key in ("kind", "centre", "scans", "losses"):
        with pytest.raises(MalformedMessageError):
            unpack_message(arrays, {name: value for name, value in metadata.items() if name != key})
    with pytest.raises(MalformedMessageError, match="needs the array delta"):
        unpack_message({"int_buffers": arrays["int_buffers"]}, metadata)
    arrays, metadata = pack_message(TRAIN)
    with pytest.raises(MalformedMessageError, match=r"needs the array weights.int_buffers"):
        unpack_message({"weights.floats": arrays["weights.floats"]}, metadata)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("delta", np.ones(3)),
        ("delta", np.array(["a"])),
        ("delta", np.array([object()])),
        ("int_buffers", np.ones(1, np.int32)),
        ("encoded_delta/codes", np.ones(3, np.complex64)),
        ("weights.floats", np.ones(3, np.float32)),
        ("other", np.ones(3)),
        ("", np.ones(3)),
    ],
)
def test_arrays_of_another_name_or_type_are_refused(name: str, array: np.ndarray) -> None:
    arrays, metadata = pack_message(REPLY)
    with pytest.raises(MalformedMessageError):
        unpack_message({**arrays, name: array}, metadata)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 100_000, '{"kind":' * 100_000, " " * 4_000_001, '{"kind": "JoinReply"}'],
)
def test_metadata_that_are_no_message_are_refused(text: str) -> None:
    records = RecordDict({"arrays": ArrayRecord(), "metadata": ConfigRecord({"json": text})})
    with pytest.raises(MalformedMessageError):
        from_records(records)


def test_other_records_are_refused() -> None:
    array_record, metadata_record = ArrayRecord(), ConfigRecord({"json": "{}"})
    for content in (
        {},
        {"arrays": array_record},
        {"arrays": metadata_record, "metadata": array_record},
        {"arrays": array_record, "metadata": ConfigRecord({"other": "{}"})},
        {"arrays": array_record, "metadata": ConfigRecord({"json": 3})},
        {"arrays": array_record, "metadata": metadata_record, "more": ConfigRecord()},
    ):
        with pytest.raises(MalformedMessageError):
            from_records(RecordDict(content))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("stype", "numpy.ndarray"),
        ("dtype", "O"),
        ("dtype", "f4,f4"),
        ("dtype", "nothing"),
        ("dtype", "float64"),
        ("shape", (4,)),
        ("shape", (-1,)),
        ("shape", (2**62, 4)),
        ("shape", (3, 1, 1, 1, 1)),
        ("shape", ("3",)),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(attribute: str, value: Any) -> None:
    records = to_records(REPLY)
    array_record = records["arrays"]
    assert isinstance(array_record, ArrayRecord)
    wrapped = Array("float32", (3,), RAW_STYPE, np.ones(3, np.float32).tobytes())
    setattr(wrapped, attribute, value)
    array_record["delta"] = wrapped
    with pytest.raises(MalformedMessageError):
        from_records(records)


def test_too_many_arrays_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.protocol.flower_records.MAX_ARRAYS", 1)
    with pytest.raises(MalformedMessageError, match="2 arrays; at most 1"):
        from_records(to_records(REPLY))


def test_a_fault_repeats_nothing_that_was_sent() -> None:
    arrays, metadata = pack_message(JOIN)
    for change in ({"hostile": 1}, {"scans": {"hostile": "hostile"}}, {"cohorts": ["a", {"hostile": 1}]}):
        with pytest.raises(MalformedMessageError) as raised:
            unpack_message(arrays, json.loads(json.dumps({**metadata, **change})))
        assert "hostile" not in str(raised.value)
        assert len(str(raised.value)) < 200
