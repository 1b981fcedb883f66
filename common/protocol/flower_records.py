"""Convert messages to and from Flower's records: an ArrayRecord, and a ConfigRecord with JSON metadata.

Arrays are not copied in either direction: a record refers to the array's own memory, so that a model of 256
MB is held once. Do not write to an array that has been sent or received.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.protocol.message_packing import (
    ARRAY_DICT_DTYPES,
    ARRAY_DTYPES,
    MAX_ARRAYS,
    MalformedMessageError,
    metadata_to_json,
    pack_message,
    parse_metadata,
    unpack_message,
)
from common.protocol.messages import Reply, Request

RAW_STYPE = "consilium.raw"  # plain bytes, where Flower's own "numpy.ndarray" is a complete .npy file
RAW_DTYPES = {*ARRAY_DTYPES.values(), *itertools.chain.from_iterable(ARRAY_DICT_DTYPES.values())}
MAX_DIMENSIONS = 4  # of an array


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
        MalformedMessageError: A record is missing or of another kind, or they hold no message.
    """
    # `content.array_records` would create a reference cycle, which keeps the model in memory until the next
    # garbage collection.
    if set(content) != {"arrays", "metadata"}:
        raise MalformedMessageError("the records are not those of a message")
    array_record = content["arrays"]
    metadata_record = content["metadata"]
    if not isinstance(array_record, ArrayRecord) or not isinstance(metadata_record, ConfigRecord):
        raise MalformedMessageError("the message's records must be an ArrayRecord and a ConfigRecord")
    text = metadata_record.get("json")
    if not isinstance(text, str):
        raise MalformedMessageError("the message has no metadata in JSON")
    metadata = parse_metadata(text)
    if len(array_record) > MAX_ARRAYS:
        raise MalformedMessageError(
            f"the message has {len(array_record)} arrays; at most {MAX_ARRAYS} are read"
        )
    arrays = {name: _from_flower_array(array) for name, array in array_record.items()}
    return unpack_message(arrays, metadata)


def _to_flower_array(array: NDArray[np.generic]) -> Array:
    """Wrap a contiguous array without copying it."""
    wrapped = Array(str(array.dtype), array.shape, RAW_STYPE, b"")
    wrapped.data = array.reshape(-1).view(np.uint8)  # type: ignore[assignment]  # Flower accepts any buffer
    return wrapped


def _from_flower_array(wrapped: Array) -> NDArray[np.generic]:
    """Return a read-only view of a received array."""
    if wrapped.stype != RAW_STYPE:
        raise MalformedMessageError(f"an array is not of the type {RAW_STYPE}")
    if wrapped.dtype not in RAW_DTYPES:
        raise MalformedMessageError("an array holds no numbers of a known type")
    shape = tuple(wrapped.shape)
    dtype = np.dtype(wrapped.dtype)
    is_shape = all(isinstance(size, int) and size >= 0 for size in shape) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or math.prod(shape) * dtype.itemsize != len(wrapped.data):
        raise MalformedMessageError("an array's shape does not fit its data")
    return np.frombuffer(wrapped.data, dtype).reshape(shape)
