"""Name the sums of additive queries.

Sums travel as a dict of arrays, so each needs a text for a key. The classes here are the only places that
write or read these texts; everywhere else a sum is named by its fields.
"""

from __future__ import annotations

from typing import NamedTuple


class SumKey(NamedTuple):
    """A statistic of one cohort for one task, such as the histogram of its scores."""

    cohort: str
    task: str
    statistic: str  # hist, confusion, regression, overlap, joint, loss, n, sum, square, ...

    def __str__(self) -> str:
        """Return the text under which the sum travels: ``cohort/task/statistic``."""
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> SumKey:
        """Read a key from its text. Raises ValueError when it does not have three parts."""
        cohort, task, statistic = text.split("/")
        return cls(cohort, task, statistic)


class LabelCountKey(NamedTuple):
    """The scans of one cohort and split by class of one task; the last count is of unlabelled scans."""

    cohort: str
    split: str  # train, val, test
    task: str

    def __str__(self) -> str:
        """Return the text under which the counts travel: ``cohort/split/task``."""
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> LabelCountKey:
        """Read a key from its text. Raises ValueError when it does not have three parts."""
        cohort, split, task = text.split("/")
        return cls(cohort, split, task)


class LabelWeightKey(NamedTuple):
    """A cohort's weight for one task before normalisation (common/learning/class_imbalance.py)."""

    cohort: str
    task: str

    def __str__(self) -> str:
        """Return the text under which the weight travels: ``cohort/mass/task``."""
        return f"{self.cohort}/mass/{self.task}"


def replace_cohort(key_text: str, cohort: str) -> str:
    """Return a key's text with another cohort. A key without a cohort (a text without "/") is unchanged."""
    _, separator, rest = key_text.partition("/")
    if not separator:
        return key_text
    return f"{cohort}/{rest}"
