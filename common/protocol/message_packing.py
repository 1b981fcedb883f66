"""Split messages into named arrays and JSON metadata, and build messages from what was received.

`unpack_message` believes nothing: a message has exactly the fields of its type, each of the declared type, or
it is refused with a `MalformedMessageError`. What a field may say is for the two sides to check
(client/federation/handlers.py, server/run/reply_validation.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from common.modeling.parameters import Weights
from common.protocol.messages import ArraysByName, Reply, Request

MESSAGE_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Request | Reply)}
MESSAGE_TYPE_KEY = "kind"
WEIGHTS_FIELDS = ("weights",)
ARRAY_DTYPES = {  # fields that are one array
    "delta": "float32",
    "int_buffers": "int64",
    "public_keys": "uint8",
    "centroids": "float64",
    "values": "uint8",
    "fixed_point_sums": "uint64",
}
ARRAY_DICT_DTYPES = {  # fields that are dicts of arrays
    "sums": ("float64",),
    "encoded_delta": ("float32", "float16", "int8", "uint8", "uint16"),
    "roster": ("uint8",),
    "shares": ("uint8",),
}
ARRAY_FIELDS = {*WEIGHTS_FIELDS, *ARRAY_DTYPES, *ARRAY_DICT_DTYPES}
MAX_METADATA_CHARS = 4_000_000  # a configuration has some thousands
MAX_ARRAYS = 100_000


class MalformedMessageError(ValueError):
    """What was received is no message. The text names the field and the fault, and repeats no content."""


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
        elif field.name in ARRAY_DICT_DTYPES:
            arrays.update({f"{field.name}/{key}": array for key, array in value.items()})
        else:
            metadata[field.name] = value
    return PackedMessage(arrays, metadata)


def metadata_to_json(metadata: Mapping[str, Any]) -> str:
    """Return metadata as the JSON text that travels, with sorted keys."""
    return json.dumps(metadata, sort_keys=True)


def parse_metadata(text: str) -> dict[str, Any]:
    """Return the metadata in the JSON text that travelled.

    Raises:
        MalformedMessageError: It is too long, no JSON, or no JSON object.
    """
    if len(text) > MAX_METADATA_CHARS:
        raise MalformedMessageError(
            f"the metadata have {len(text)} characters; at most {MAX_METADATA_CHARS} are read"
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedMessageError("the metadata are not JSON") from None
    if not isinstance(metadata, dict):
        raise MalformedMessageError("the metadata are not a JSON object")
    return metadata


def unpack_message(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, Any]) -> Request | Reply:
    """Build the message that was split by `pack_message`.

    Raises:
        MalformedMessageError: The type is unknown, a field is missing or unknown, or has another type.
    """
    kind = metadata.get(MESSAGE_TYPE_KEY)
    if not isinstance(kind, str) or kind not in MESSAGE_TYPES:
        raise MalformedMessageError("the message is of an unknown type")
    message_type = MESSAGE_TYPES[kind]
    fields = _parse_fields(message_type, metadata)
    remaining = dict(arrays)
    for field in dataclasses.fields(message_type):
        if field.name in ARRAY_FIELDS:
            fields.update(_take_array_field(kind, field, remaining))
    if remaining:
        raise MalformedMessageError(f"a {kind} has no such array: {len(remaining)} arrays are not its fields")
    message: Request | Reply = message_type(**fields)
    return message


def _parse_fields(message_type: type[Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that are JSON values, each of its declared type."""
    values = {}
    for name, value in metadata.items():
        is_absent_array = name in ARRAY_FIELDS and value is None
        if name != MESSAGE_TYPE_KEY and not is_absent_array:
            values[name] = value
    try:
        return dict(METADATA_MODELS[message_type].model_validate_json(json.dumps(values)))
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(part) for part in details["loc"] if part in message_type.__dataclass_fields__)
        field = f"the field {path}" if path else "a field"
        fault = details["msg"].split("\n")[0][:100]
        raise MalformedMessageError(f"{field} of a {message_type.__name__}: {fault}") from None
    except (TypeError, ValueError, RecursionError):
        raise MalformedMessageError(
            f"the metadata of a {message_type.__name__} cannot be written as JSON"
        ) from None


def _metadata_model(message_type: type[Any]) -> type[BaseModel]:
    """Return the pydantic model of a message's fields that are not arrays; it converts no types."""
    hints = get_type_hints(message_type)
    definitions: dict[str, Any] = {}
    for field in dataclasses.fields(message_type):
        if field.name in ARRAY_FIELDS:
            continue
        default: Any = ...
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = Field(default_factory=field.default_factory)
        definitions[field.name] = (hints[field.name], default)
    return create_model(
        message_type.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **definitions
    )


METADATA_MODELS = {message_type: _metadata_model(message_type) for message_type in MESSAGE_TYPES.values()}


def _take_array_field(
    kind: str, field: dataclasses.Field[Any], remaining: dict[str, NDArray[np.generic]]
) -> dict[str, Any]:
    """Return {field: its value}, taken out of the remaining arrays; {} for one that may be absent and is."""
    name = field.name
    if name in ARRAY_DICT_DTYPES:
        return {name: _take_by_prefix(kind, name, remaining)}
    if name in WEIGHTS_FIELDS and f"{name}.floats" in remaining:
        floats = _take_array(kind, f"{name}.floats", ("float32",), remaining)
        int_buffers = _take_array(kind, f"{name}.int_buffers", ("int64",), remaining)
        return {name: Weights(floats, int_buffers)}
    if name in ARRAY_DTYPES and name in remaining:
        return {name: _take_array(kind, name, (ARRAY_DTYPES[name],), remaining)}
    if field.default is dataclasses.MISSING:
        raise MalformedMessageError(f"a {kind} needs the array {name}")
    return {}


def _take_by_prefix(kind: str, name: str, remaining: dict[str, NDArray[np.generic]]) -> ArraysByName:
    """Return the arrays whose names start with `name/`, without the prefix."""
    prefix = f"{name}/"
    taken: ArraysByName = {}
    for full_name in [key for key in remaining if key.startswith(prefix)]:
        array = remaining.pop(full_name)
        _require_dtype(kind, name, array, ARRAY_DICT_DTYPES[name])
        taken[full_name.removeprefix(prefix)] = array
    return taken


def _take_array(
    kind: str, name: str, dtypes: tuple[str, ...], remaining: dict[str, NDArray[np.generic]]
) -> Any:
    if name not in remaining:
        raise MalformedMessageError(f"a {kind} needs the array {name}")
    array = remaining.pop(name)
    _require_dtype(kind, name, array, dtypes)
    return array


def _require_dtype(kind: str, name: str, array: NDArray[np.generic], dtypes: tuple[str, ...]) -> None:
    if str(array.dtype) not in dtypes:
        raise MalformedMessageError(
            f"the array {name} of a {kind} has the wrong type; it must be {' or '.join(dtypes)}"
        )
