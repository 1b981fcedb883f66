"""The rules for names and texts that cross the hospital's wall, checked where a configuration is parsed.

Names of runs, centres, tasks, stages and clusterings become names of files and folders, and parts of keys
such as ``cohort/split/task``; they are plain names. Names of classes, sources and columns are texts that
people chose; they are shown, and become no name of a file. Knows neither pydantic nor PyTorch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence, Sized

MAX_NAME_LENGTH = 100  # of a run's, centre's, task's or stage's name
MAX_CLUSTERING_ID_LENGTH = 200  # a run's id and a task's name
MAX_RUN_ID_IN_CLUSTERING = 80
MAX_TEXT_LENGTH = 200  # of a class's, source's or column's name
MAX_LIST_LENGTH = 1000  # of anything that a configuration lists
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
NAME_RULE = "use letters, digits, '.', '_' and '-', the first not '.' or '-', at most {}"
TEXT_RULE = "use at most {} printable characters, not '..' and no slash at the start"


def is_plain_name(name: object, max_length: int = MAX_NAME_LENGTH) -> bool:
    """Return whether a name can be the name of a file: it leads nowhere else and hides no character."""
    return isinstance(name, str) and len(name) <= max_length and bool(NAME_PATTERN.fullmatch(name))


def is_plain_text(text: object, max_length: int = MAX_TEXT_LENGTH) -> bool:
    """Return whether a text is short, has printable characters only, and is no path to somewhere else."""
    if not isinstance(text, str) or not 0 < len(text) <= max_length:
        return False
    for character in text:
        if unicodedata.category(character)[0] in "CZ" and character != " ":
            return False  # control characters, surrogates, changes of direction, separators of lines
    return ".." not in text and text[0] not in "/\\~"


def name_clustering(run_id: str, task: str) -> str:
    """Return the id under which the centres keep each scan's cluster of a run's task."""
    return f"{run_id[:MAX_RUN_ID_IN_CLUSTERING]}-{task}"


def require_plain_name(name: str, subject: str, max_length: int = MAX_NAME_LENGTH) -> None:
    """Raise ValueError for a name that is no plain name; `subject` says what it names."""
    if not is_plain_name(name, max_length):
        raise ValueError(f"{name[:40]!r} cannot be the name of {subject}; {NAME_RULE.format(max_length)}")


def require_plain_text(text: str, subject: str) -> None:
    """Raise ValueError for a text that is too long, not printable or a path; `subject` says what it is."""
    if not is_plain_text(text):
        raise ValueError(
            f"{text[:40]!r} cannot be the name of {subject}; {TEXT_RULE.format(MAX_TEXT_LENGTH)}"
        )


def require_plain_texts(texts: Sequence[str], subject: str) -> None:
    """Raise ValueError for a list that is too long, or that has a text which is no plain text."""
    require_short(texts, subject)
    for text in texts:
        require_plain_text(text, subject)


def require_short(values: Sized, subject: str) -> None:
    """Raise ValueError for a list or mapping with too many entries."""
    if len(values) > MAX_LIST_LENGTH:
        raise ValueError(f"{subject} has {len(values)} entries; at most {MAX_LIST_LENGTH} are read")
