"""Our messages in Flower's records: arrays in an ArrayRecord, facts as one JSON text in a ConfigRecord."""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.messages import Reply, Request, facts_json, pack, unpack


def to_records(message: Request | Reply) -> RecordDict:
    """A fresh RecordDict (Flower shares and mutates records between messages when they are reused)."""
    arrays, facts = pack(message)
    return RecordDict(
        {
            "arrays": ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()}),
            "facts": ConfigRecord({"json": facts_json(facts)}),
        }
    )


def from_records(content: RecordDict) -> Request | Reply:
    """The message inside. Raises KeyError, TypeError or ValueError for a record that is none of ours."""
    # Not by `content.array_records`: that leaves a cycle behind, which holds a model a message until Python next looks for cycles.
    arrays, facts = content["arrays"], content["facts"]
    if not isinstance(arrays, ArrayRecord) or not isinstance(facts, ConfigRecord):
        raise TypeError("its records are of other kinds")
    return unpack({name: array.numpy() for name, array in arrays.items()}, json.loads(str(facts["json"])))
