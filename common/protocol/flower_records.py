"""Convert messages to and from Flower's records: an ArrayRecord, and a ConfigRecord with JSON metadata.

Arrays are not copied in either direction: a record refers to the array's own memory, so that a model of 256
MB is held once. Do not write to an array that has been sent or received.
"""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.protocol.message_packing import metadata_to_json, pack_message, unpack_message
from common.protocol.messages import Reply, Request

RAW_STYPE = "consilium.raw"  # plain bytes, where Flower's own "numpy.ndarray" is a complete .npy file


def to_records(message: Request | Reply) -> RecordDict:
    """Return a new RecordDict with the message. Flower modifies records, so one must not be sent twice."""
    packed = pack_message(message)
    array_record = ArrayRecord()  # filled one by one: its constructor accepts only arrays that hold bytes
    for name, array in packed.arrays.items():
        array_record[name] = _to_flower_array(np.ascontiguousarray(array))
    metadata_record = ConfigRecord({"json": metadata_to_json(packed.metadata)})
    return RecordDict({"arrays": array_record, "metadata": metadata_record})


def from_records(content: RecordDict) -> Request | Reply:
    """Return the message in a RecordDict.

    Raises:
        KeyError: A record, the message's type or an array is missing.
        TypeError: A record or a field has the wrong type.
        ValueError: An array has another format, or the metadata are not JSON.
    """
    # `content.array_records` would create a reference cycle, which keeps the model in memory until the next
    # garbage collection.
    array_record = content["arrays"]
    metadata_record = content["metadata"]
    if not isinstance(array_record, ArrayRecord) or not isinstance(metadata_record, ConfigRecord):
        raise TypeError("the message's records must be an ArrayRecord and a ConfigRecord")
    arrays = {name: _from_flower_array(array) for name, array in array_record.items()}
    return unpack_message(arrays, json.loads(str(metadata_record["json"])))


def _to_flower_array(array: NDArray[np.generic]) -> Array:
    """Wrap a contiguous array without copying it."""
    wrapped = Array(str(array.dtype), array.shape, RAW_STYPE, b"")
    wrapped.data = array.reshape(-1).view(np.uint8)  # type: ignore[assignment]  # Flower accepts any buffer
    return wrapped


def _from_flower_array(wrapped: Array) -> NDArray[np.generic]:
    """Return a read-only view of a received array."""
    if wrapped.stype != RAW_STYPE:
        raise ValueError(f"expected an array of type {RAW_STYPE}, got {wrapped.stype}")
    return np.frombuffer(wrapped.data, np.dtype(wrapped.dtype)).reshape(wrapped.shape)
