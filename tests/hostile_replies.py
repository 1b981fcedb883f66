"""A hostile centre: honest replies, changed at random on their way to the coordinator."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.protocol.flower_records import RAW_STYPE
from common.protocol.message_packing import MESSAGE_TYPES, pack_message
from common.protocol.messages import Reply

MARKER = "hostile"  # is in every text that a hostile centre writes
HOSTILE_TEXTS = [
    f"../../../../{MARKER}",
    f"/tmp/{MARKER}",
    f"<script>{MARKER}</script>",
    f"{MARKER}\0",
    f"{MARKER}\n\x1b[31m",
    f"{MARKER}\ud800",
    MARKER * 20_000,
    "east",
    "east/covid/hist",
    "",
]
HOSTILE_VALUES: list[Any] = [
    *HOSTILE_TEXTS,
    None,
    True,
    -1,
    -0.5,
    0,
    1e308,
    float("nan"),
    float("inf"),
    2**70,
    10**400,
    [],
    {},
    [[1.0], [2.0, 3.0]],
    [1.0],
    {MARKER: {MARKER: [MARKER]}},
    [MARKER] * 2000,
]


@dataclass
class Wire:
    """A message as it travels; every part of it can be changed."""

    arrays: dict[str, Any]
    metadata: Any
    array_changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # {array: attributes of Flower's}
    text: str | None = None  # instead of the metadata's JSON

    def to_records(self) -> RecordDict:
        """Return Flower's records."""
        array_record = ArrayRecord()
        for name, array in self.arrays.items():
            values = np.ascontiguousarray(array)
            wrapped = Array(str(values.dtype), values.shape, RAW_STYPE, b"")
            wrapped.data = values.tobytes()
            for attribute, value in self.array_changes.get(name, {}).items():
                setattr(wrapped, attribute, value)
            array_record[name] = wrapped
        text = json.dumps(self.metadata) if self.text is None else self.text
        return RecordDict({"arrays": array_record, "metadata": ConfigRecord({"json": text})})


def put_on_wire(reply: Reply) -> Wire:
    """Return an honest reply as it travels."""
    arrays, metadata = pack_message(reply)
    return Wire(dict(arrays), copy.deepcopy(dict(metadata)))


def change(wire: Wire, dice: random.Random) -> None:
    """Change a message in one to three ways."""
    for _ in range(dice.randint(1, 3)):
        if wire.arrays and dice.random() < 0.5:
            _change_array(wire, dice)
        else:
            _change_metadata(wire, dice)


def _change_array(wire: Wire, dice: random.Random) -> None:
    name = dice.choice(sorted(wire.arrays))
    array = np.array(wire.arrays[name])
    match dice.randrange(12):
        case 0:
            del wire.arrays[name]
        case 1:
            wire.arrays[name] = array[:-1] if array.ndim else array
        case 2:
            wire.arrays[name] = array[None]
        case 3:
            dtype = dice.choice(["float32", "float64", "int64", "uint8", "bool"])
            wire.arrays[name] = np.zeros(array.shape, dtype)
        case 4:
            wire.arrays[name] = np.zeros((0,), array.dtype)
        case 5:
            wire.array_changes[name] = {"dtype": dice.choice(["O", "U4", "f4,f4", "", "int8", MARKER])}
        case 6:
            wire.array_changes[name] = {"shape": dice.choice([(-1,), (2**40,), (), (1,) * 70])}
        case 7:
            wire.array_changes[name] = {"stype": dice.choice(["numpy.ndarray", MARKER])}
        case 8:
            new_name = name.replace("west", dice.choice(["east", "all", f"../{MARKER}", "", "west/west"]))
            wire.arrays[new_name + dice.choice(["", MARKER])] = wire.arrays.pop(name)
        case _:
            wire.arrays[name] = _spoil_values(array, dice)


def _spoil_values(array: np.ndarray, dice: random.Random) -> np.ndarray:
    """Return the array with one value, or all, that an honest centre cannot have computed."""
    if array.dtype.kind in "fb":
        values = np.array([np.nan, np.inf, -np.inf, -1.0, -1e-9, 0.5, 1e300, 3.4e38])
    else:
        limits = np.iinfo(array.dtype)
        values = np.array([limits.max, limits.min, 0x7F80 % limits.max], array.dtype)
    spoilt = array.copy()
    with np.errstate(all="ignore"):
        filling = values.astype(array.dtype)[dice.randrange(len(values))]
    if dice.random() < 0.5 and array.size:
        spoilt.reshape(-1)[dice.randrange(array.size)] = filling
    else:
        spoilt[...] = filling
    return spoilt


def _change_metadata(wire: Wire, dice: random.Random) -> None:
    match dice.randrange(10):
        case 0:
            wire.metadata["kind"] = dice.choice([*MESSAGE_TYPES, MARKER, None, 3, []])
        case 1:
            wire.metadata[MARKER] = dice.choice(HOSTILE_VALUES)
        case 2:
            wire.metadata["centre"] = dice.choice(HOSTILE_TEXTS)
        case 3:
            texts = ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 5000, '"' + MARKER * 10**6]
            wire.text = dice.choice(texts)
        case _:
            _change_within(wire.metadata, dice)


def _change_within(values: dict[str, Any], dice: random.Random) -> None:
    """Replace, remove or add an entry somewhere in nested values."""
    if not values:
        return
    container: Any = values
    key: Any = dice.choice(sorted(values))
    while isinstance(container[key], dict | list) and container[key] and dice.random() < 0.6:
        container = container[key]
        key = dice.choice(list(container)) if isinstance(container, dict) else dice.randrange(len(container))
    hostile = copy.deepcopy(dice.choice(HOSTILE_VALUES))
    action = dice.randrange(4)
    if action == 0 and isinstance(container, dict):
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[dice.choice(HOSTILE_TEXTS)] = hostile
    else:
        container[key] = hostile
