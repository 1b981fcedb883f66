"""Check single fields of a centre's reply. Each function raises `BadReply` for a field that cannot be used.

A fault's text says which field is wrong and how, in our words: nothing that a centre wrote is repeated,
because the text goes to logs, the ledger and pages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_COUNT = 10**12  # of anything that is counted; products of two such counts are exact enough as floats
MAX_NUMBER = 1e30  # of any other number; its square is finite
MAX_NAME_LENGTH = 100  # characters of a name, a version or a device
MAX_SENTENCE_LENGTH = 500  # characters of a reason or a note
MAX_ENTRIES = 64  # of a dict or list that people read
REPLACEMENT = "\ufffd"


class BadReply(Exception):
    """A reply cannot be used. The text names the field and the fault."""


def make_plain(text: str, max_length: int = MAX_SENTENCE_LENGTH) -> str:
    """Return a text in one line of printable characters, shortened to `max_length`."""
    words = text[: 4 * max_length].split()
    plain = "".join(char if char.isprintable() else REPLACEMENT for char in " ".join(words))
    return plain if len(plain) <= max_length else plain[: max_length - 3] + "..."


def is_plain(text: object, max_length: int = MAX_NAME_LENGTH) -> bool:
    """Tell whether something is a text in one line of printable characters, and not too long."""
    return isinstance(text, str) and len(text) <= max_length and text.isprintable()


def require_text(field: str, text: object, max_length: int = MAX_NAME_LENGTH) -> None:
    """Require a text of printable characters."""
    if not is_plain(text, max_length):
        raise BadReply(f"{field} is not a text of at most {max_length} printable characters")


def require_texts(field: str, texts: object, max_number: int, max_length: int = MAX_NAME_LENGTH) -> None:
    """Require a list of different texts of printable characters."""
    if not isinstance(texts, list) or len(texts) > max_number:
        raise BadReply(f"{field} is not a list of at most {max_number}")
    for text in texts:
        require_text(field, text, max_length)
    if len(set(texts)) < len(texts):
        raise BadReply(f"{field} names something twice")


def require_count(field: str, value: object) -> None:
    """Require a whole number from 0 to MAX_COUNT."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise BadReply(f"{field} is not a whole number from 0 to {MAX_COUNT}")


def require_number(field: str, value: object) -> None:
    """Require a finite number from 0 to MAX_NUMBER."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_NUMBER:  # type: ignore[operator]  # false for NaN
        raise BadReply(f"{field} is not a finite number from 0 on")


def require_counts_by_name(field: str, counts: object, max_number: int, max_length: int) -> None:
    """Require {text: whole number}."""
    if not isinstance(counts, dict) or len(counts) > max_number:
        raise BadReply(f"{field} has more than {max_number} entries, or none by name")
    for name, count in counts.items():
        require_text(field, name, max_length)
        require_count(field, count)


def require_keys(field: str, values: Mapping[str, object], expected: Collection[str]) -> None:
    """Require that only these keys are there."""
    if not values.keys() <= set(expected):
        raise BadReply(f"{field} has an entry that was not asked for")


def require_array(field: str, array: object, dtype: str, shape: tuple[int, ...]) -> None:
    """Require an array of a type and shape."""
    if not isinstance(array, np.ndarray) or str(array.dtype) != dtype:
        raise BadReply(f"{field} is not an array of {dtype}")
    if array.shape != shape:
        raise BadReply(f"{field} has the wrong shape: {_describe(array.shape)} instead of {_describe(shape)}")


def require_finite(field: str, array: NDArray[Any]) -> None:
    """Require numbers that are finite, and whose squares are."""
    if array.size and not -MAX_NUMBER <= float(array.min()) <= float(array.max()) <= MAX_NUMBER:
        raise BadReply(f"{field} has a value that is not finite")


def require_not_negative(field: str, array: NDArray[Any]) -> None:
    """Require numbers from 0 on."""
    if array.size and float(array.min()) < 0:
        raise BadReply(f"{field} has a negative value")


def require_whole(field: str, array: NDArray[Any]) -> None:
    """Require whole numbers from 0 to MAX_COUNT: numbers of scans or pixels, also where noise was added."""
    require_finite(field, array)
    require_not_negative(field, array)
    if array.size and (float(array.max()) > MAX_COUNT or (array != np.rint(array)).any()):
        raise BadReply(f"{field} has a value that is no number of scans")


def require_settings(field: str, value: object, max_items: int = 500, depth: int = 4) -> None:
    """Require nested dicts and lists of plain texts, finite numbers and true or false, not too many."""
    if count_settings(field, value, depth) > max_items:
        raise BadReply(f"{field} has more than {max_items} entries")


def count_settings(field: str, value: object, depth: int) -> int:
    """Return the number of entries in nested settings, each of which is checked."""
    if isinstance(value, dict | list) and depth > 0:
        number = len(value)
        if isinstance(value, dict):
            for name in value:
                require_text(field, name)
        for item in value.values() if isinstance(value, dict) else value:
            number += count_settings(field, item, depth - 1)
        return number
    if isinstance(value, str):
        require_text(field, value, MAX_SENTENCE_LENGTH)
    elif isinstance(value, int | float):
        if not abs(value) <= MAX_NUMBER:  # true for NaN
            raise BadReply(f"{field} has a number that is not finite")
    elif value is not None:
        raise BadReply(f"{field} is nested too deeply")
    return 1


def _describe(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single value"
