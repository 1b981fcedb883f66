"""Split messages into named arrays and JSON metadata, and build messages from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import Weights
from common.protocol.messages import ArraysByName, Reply, Request

MESSAGE_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Request | Reply)}
ARRAY_DICT_FIELDS = ("sums", "encoded_delta", "roster", "shares")  # fields that are dicts of arrays
MESSAGE_TYPE_KEY = "kind"


class PackedMessage(NamedTuple):
    """A message in the form in which it travels."""

    arrays: ArraysByName  # by field name; `field/key` for arrays in a dict, `field.floats` for weights
    metadata: dict[str, Any]  # the other fields, JSON values, and the message's type under "kind"


def pack_message(message: Request | Reply) -> PackedMessage:
    """Split a message into arrays and JSON metadata. The arrays are not copied."""
    arrays: ArraysByName = {}
    metadata: dict[str, Any] = {MESSAGE_TYPE_KEY: type(message).__name__}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        elif isinstance(value, Weights):
            arrays[f"{field.name}.floats"] = value.floats
            arrays[f"{field.name}.int_buffers"] = value.int_buffers
        elif field.name in ARRAY_DICT_FIELDS:
            arrays.update({f"{field.name}/{key}": array for key, array in value.items()})
        else:
            metadata[field.name] = value
    return PackedMessage(arrays, metadata)


def unpack_message(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, Any]) -> Request | Reply:
    """Build the message that was split by `pack_message`.

    Raises:
        KeyError: The message's type or an array is missing.
        TypeError: The fields are not those of the message's type.
    """
    message_type = MESSAGE_TYPES[metadata[MESSAGE_TYPE_KEY]]
    fields = {name: value for name, value in metadata.items() if name != MESSAGE_TYPE_KEY}
    for field in dataclasses.fields(message_type):
        if f"{field.name}.floats" in arrays:
            fields[field.name] = Weights(
                np.asarray(arrays[f"{field.name}.floats"], np.float32),
                np.asarray(arrays[f"{field.name}.int_buffers"], np.int64),
            )
        elif field.name in ARRAY_DICT_FIELDS:
            fields[field.name] = _select_by_prefix(arrays, f"{field.name}/")
        elif field.name in arrays:
            fields[field.name] = arrays[field.name]
    message: Request | Reply = message_type(**fields)
    return message


def metadata_to_json(metadata: Mapping[str, Any]) -> str:
    """Return metadata as the JSON text that travels, with sorted keys."""
    return json.dumps(metadata, sort_keys=True)


def _select_by_prefix(arrays: Mapping[str, NDArray[np.generic]], prefix: str) -> ArraysByName:
    """Return the arrays whose names start with the prefix, without the prefix."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
