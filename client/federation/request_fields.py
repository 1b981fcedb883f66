"""What each field of a request must be, whatever the run: its type, its range, how long it may be.

A message is unpacked from JSON and arrays that the coordinator wrote, so nothing is known of a field before
it has been looked at here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from client.data.columns import SPLITS
from common.config.names import (
    MAX_CLUSTERING_ID_LENGTH,
    MAX_LIST_LENGTH,
    NAME_RULE,
    is_plain_name,
)
from common.modeling.parameters import Weights
from common.protocol.messages import Request
from common.utils.errors import Refused

MAX_ROUNDS = 100_000
MAX_COUNT = 1e12  # of scans, and of weights made of counts
MAX_SUM_ID_LENGTH = 400
MAX_SHARE_BYTES = 4096
PUBLIC_KEY_BYTES = 96
ENCODED_ARRAYS = ("values", "codes", "scales", "rest")  # common/protocol/update_codec.py
DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
SUM_ID_PATTERN = re.compile(r"[A-Za-z0-9._/-]+")


class FieldRule(NamedTuple):
    """What a field must be: a check, and its requirement in words."""

    is_valid: Callable[[Any], bool]
    requirement: str


def check_fields(request: Request) -> None:
    """Raise Refused for the first field of a request that is not of its type, out of range or too long."""
    for field in dataclasses.fields(request):
        rule = FIELD_RULES[field.name]
        if not rule.is_valid(getattr(request, field.name)):
            raise Refused(f"the request's '{field.name}' is not valid; it must be {rule.requirement}")


def _is_name_or_empty(value: Any) -> bool:
    return value == "" or is_plain_name(value)


def _is_clustering_id(value: Any) -> bool:
    return value == "" or is_plain_name(value, MAX_CLUSTERING_ID_LENGTH)


def _is_digest_or_empty(value: Any) -> bool:
    return value == "" or (isinstance(value, str) and bool(DIGEST_PATTERN.fullmatch(value)))


def _is_round(value: Any, first: int = 1) -> bool:
    return type(value) is int and first <= value <= MAX_ROUNDS


def _is_number(value: Any, highest: float = MAX_COUNT) -> bool:
    """Return whether a value is a finite number, 0 or more; True and False are none."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= highest


def _is_learning_rate_scale(value: Any) -> bool:
    return _is_number(value, 1.0) and value != 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= MAX_LIST_LENGTH


def _are_numbers(value: Any) -> bool:
    return _is_list(value) and all(map(_is_number, value))


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(map(is_plain_name, value))


def _are_rounds(value: Any) -> bool:
    return _is_list(value) and all(_is_round(entry, first=0) for entry in value)


def _is_personal_round(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and is_plain_name(value[0]) and _is_round(value[1], first=0)


def _are_personal_rounds(value: Any) -> bool:
    return _is_list(value) and all(map(_is_personal_round, value))


def _is_named(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    """Return whether a value is {plain name: valid value}, of not too many."""
    if not isinstance(value, Mapping) or len(value) > MAX_LIST_LENGTH:
        return False
    return all(is_plain_name(name) and is_valid(entry) for name, entry in value.items())


def _is_array(value: Any, dtype: type[np.generic], ndim: int = 1) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == ndim


def _are_weights_or_none(value: Any) -> bool:
    if value is None:
        return True
    is_weights = isinstance(value, Weights)
    return is_weights and _is_array(value.floats, np.float32) and _is_array(value.int_buffers, np.int64)


def _are_centroids_or_none(value: Any) -> bool:
    if value is None:
        return True
    if not _is_array(value, np.float64, ndim=2):
        return False
    return 1 <= len(value) <= MAX_LIST_LENGTH and bool(np.isfinite(value).all())


def _is_encoded_update(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(
        name in ENCODED_ARRAYS and isinstance(array, np.ndarray) and array.ndim == 1
        for name, array in value.items()
    )


def _is_public_key(value: Any) -> bool:
    return _is_array(value, np.uint8) and len(value) == PUBLIC_KEY_BYTES


def _is_share(value: Any) -> bool:
    return _is_array(value, np.uint8) and len(value) <= MAX_SHARE_BYTES


def _is_sum_id(value: Any) -> bool:
    return (
        isinstance(value, str) and len(value) <= MAX_SUM_ID_LENGTH and bool(SUM_ID_PATTERN.fullmatch(value))
    )


_NAME = f"a plain name ({NAME_RULE.format(100)})"
_NAME_OR_EMPTY = FieldRule(_is_name_or_empty, f"empty or {_NAME}")
_DIGEST = FieldRule(_is_digest_or_empty, "empty or 64 hexadecimal digits")
_COUNT = FieldRule(_is_number, "a finite number, 0 or more")
_PERSONAL_ROUNDS = FieldRule(_are_personal_rounds, "a list of [stage, round]")

FIELD_RULES: dict[str, FieldRule] = {  # {field: its rule}; a name means the same in every request
    "run_id": FieldRule(is_plain_name, _NAME),
    "config": FieldRule(lambda value: isinstance(value, dict), "a mapping of settings"),
    "name": FieldRule(is_plain_name, _NAME),
    "stage": _NAME_OR_EMPTY,
    "split": FieldRule(lambda value: value in SPLITS, f"one of {', '.join(SPLITS)}"),
    "task": _NAME_OR_EMPTY,
    "weights": FieldRule(_are_weights_or_none, "the model's float32 values and int64 counters"),
    "personal_rounds": _PERSONAL_ROUNDS,
    "centroids": FieldRule(_are_centroids_or_none, "a finite float64 array [clusters, features]"),
    "clustering_id": FieldRule(_is_clustering_id, f"empty or {_NAME}"),
    "base_digest": _DIGEST,
    "encoded_delta": FieldRule(_is_encoded_update, f"arrays of one dimension: {', '.join(ENCODED_ARRAYS)}"),
    "target_digest": _DIGEST,
    "round": FieldRule(_is_round, f"a whole number, 1 to {MAX_ROUNDS}"),
    "global_counts": FieldRule(lambda value: _is_named(value, _are_numbers), "finite counts by task"),
    "rounds_to_keep": FieldRule(_are_rounds, "a list of round numbers"),
    "mean_centre_scans": _COUNT,
    "lr_scale": FieldRule(_is_learning_rate_scale, "above 0 and at most 1"),
    "total_label_weight": FieldRule(lambda value: _is_named(value, _is_number), "finite numbers by task"),
    "sum_id": FieldRule(_is_sum_id, "the id of a secure sum"),
    "roster": FieldRule(lambda value: _is_named(value, _is_public_key), "96 bytes of public keys by centre"),
    "shares": FieldRule(lambda value: _is_named(value, _is_share), "shares, as bytes, by centre"),
    "survivors": FieldRule(_are_names, "a list of centres"),
}
