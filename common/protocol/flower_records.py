"""Our messages in Flower's records: arrays in an ArrayRecord, facts as one JSON text in a ConfigRecord.

An array's bytes are the array's own memory on both ways: a model of 256 MB is not copied to be sent, and not copied when it has come. So nothing
may write to an array that has been sent or received.
"""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.protocol.messages import Reply, Request, metadata_to_json, pack_message, unpack_message

RAW_STYPE = "consilium.raw"  # in place of Flower's "numpy.ndarray", a whole .npy file


def to_records(message: Request | Reply) -> RecordDict:
    """A fresh RecordDict (Flower shares and mutates records between messages when they are reused)."""
    arrays, facts = pack_message(message)
    record = ArrayRecord()  # not made of them all at once: that insists on bytes
    for name, array in arrays.items():
        record[name] = _to_flower_array(np.ascontiguousarray(array))
    return RecordDict({"arrays": record, "metadata": ConfigRecord({"json": metadata_to_json(facts)})})


def from_records(content: RecordDict) -> Request | Reply:
    """The message inside. Raises KeyError, TypeError or ValueError for a record that is none of ours."""
    # Not by `content.array_records`: that leaves a cycle behind, which holds a model a message until Python next looks for cycles.
    arrays, facts = content["arrays"], content["metadata"]
    if not isinstance(arrays, ArrayRecord) or not isinstance(facts, ConfigRecord):
        raise TypeError("its records are of other kinds")
    return unpack_message(
        {name: _from_flower_array(array) for name, array in arrays.items()}, json.loads(str(facts["json"]))
    )


def _to_flower_array(array: NDArray[np.generic]) -> Array:
    wrapped = Array(str(array.dtype), array.shape, RAW_STYPE, b"")
    wrapped.data = array.reshape(-1).view(np.uint8)  # type: ignore[assignment]  # any buffer will do
    return wrapped


def _from_flower_array(wrapped: Array) -> NDArray[np.generic]:
    if wrapped.stype != RAW_STYPE:
        raise ValueError(f"an array as {wrapped.stype} instead of {RAW_STYPE}")
    return np.frombuffer(wrapped.data, np.dtype(wrapped.dtype)).reshape(wrapped.shape)
