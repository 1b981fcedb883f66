"""Keep the release book: which question was asked about the patients first, and about whom it was answered.

`releases/book.json` in the state folder is used where the policy's `min_cell_count` is above 1. Questions
are known by the columns of the cohort's table and by how their values are divided, never by a name that the
coordinator chooses. A column is asked in one way only: another way (other edges, classes, bins, thresholds)
would single out patients by the difference of two answers, and is refused without a look at the data. So is
another division into splits. Who is counted is fixed in groups (client/site/release_groups.py), so that the
same question gets the same answer until enough patients for another group have come.

Patients and scans are known by marks: digests made with a key that is in the book and nowhere else. The
egress log vouches for the file (client/site/anchored_files.py): one that is deleted or replaced is noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from client.site.anchored_files import AnchoredFile, lock_folder, read_anchored_file, write_anchored_file
from client.site.release_groups import ReleaseGroup
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused

BOOK_FILENAME = "releases/book.json"  # in the state folder
MARK_LENGTH = 24  # hexadecimal digits of a mark
MAX_QUESTIONS_PER_COLUMN = 3  # of different sets of columns or kinds: a score, its sum with others, both sums
MAX_RUNS = 200  # whose answers are counted; the first ones are dropped
REMEDY = "the hospital can begin a new book with `consilium-centre releases --forget`"


@dataclass(frozen=True)
class Question:
    """What is asked about a set of columns. Its field names are the keys in the book."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    columns: list[str]  # sorted; none: the scans themselves
    kind: str  # classes, numbers, mask, clusters or scans
    details: dict[str, str] = field(default_factory=dict)  # edges, classes, bins, threshold

    def describe(self) -> str:
        """Return the question in words."""
        subject = "the scans"
        if self.columns:
            subject = f"{self.kind} of {', '.join(self.columns)}"
        details = [f"{name} {value}" for name, value in self.details.items()]
        return f"{subject} ({'; '.join(details)})" if details else subject

    def has_same_subject(self, other: Question) -> bool:
        """Return whether both are about the same columns in the same way, but for the details."""
        return self.columns == other.columns and self.kind == other.kind


@dataclass
class ReleasedAnswer:
    """A question that was answered, and about whom. Its field names are the keys in the book."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    question: Question
    first_time: str  # ISO 8601, UTC
    groups: list[ReleaseGroup] = field(default_factory=list)

    def count_patients(self) -> int:
        """Return how many patients the answer is about."""
        return len({patient for group in self.groups for patient in group.patients})


@dataclass
class ReleaseBook:
    """The content of `book.json`. Its field names are the keys in the file, and no other key is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: str  # hexadecimal; of the marks
    splits: str = ""  # how patients were divided: "own splits" or "5 folds"; empty: nothing was released
    answers: list[ReleasedAnswer] = field(default_factory=list)
    scored: dict[str, list[str]] = field(default_factory=dict)  # {mark of a run: digests of its requests}

    def mark(self, identifier: str) -> str:
        """Return the mark of a patient, a scan or a run."""
        digest = hmac.new(bytes.fromhex(self.key), identifier.encode(), hashlib.sha256)
        return digest.hexdigest()[:MARK_LENGTH]

    def find_answer(self, question: Question) -> ReleasedAnswer | None:
        """Return the answer to the same question; None: it was not asked before."""
        for answer in self.answers:
            if answer.question.has_same_subject(question):
                return answer
        return None


_BOOK_ADAPTER = TypeAdapter(ReleaseBook)


def check_questions(book: ReleaseBook, questions: Sequence[Question], splits: str) -> None:
    """Raise PermanentlyRefused where a question was asked in another way before, or with other splits."""
    if book.splits and splits != book.splits:
        raise _refuse(
            f"this hospital's patients were counted by {book.splits}, and counts by {splits} would single "
            "some of them out"
        )
    known = [answer.question for answer in book.answers]
    for question in questions:
        _check_question(known, question)
        known.append(question)


def _check_question(known: Sequence[Question], question: Question) -> None:
    others = []
    for earlier in known:
        if earlier == question:
            return
        if earlier.has_same_subject(question):
            raise _refuse(
                f"the question about {question.describe()} was asked before as {earlier.describe()}, and "
                "both answers together would single patients out"
            )
        others.append(earlier)
    for column in question.columns:
        questions = [earlier for earlier in others if column in earlier.columns]
        if len(questions) >= MAX_QUESTIONS_PER_COLUMN:
            described = ", and ".join(earlier.describe() for earlier in questions)
            raise _refuse(
                f"column '{column}' was asked for in {len(questions)} ways before: {described}; one more "
                "would single patients out"
            )


def count_answer(book: ReleaseBook, run_id: str, digest: str, max_answers: int) -> None:
    """Note that a model is scored for a run. The same request again counts once.

    Raises PermanentlyRefused when the run has asked for as many as its recipe needs.
    """
    digests = book.scored.setdefault(book.mark(f"run/{run_id}"), [])
    if digest in digests:
        return
    if len(digests) >= max_answers:
        raise _refuse(f"this run has asked for {len(digests)} scores, and its recipe needs {max_answers}")
    digests.append(digest)
    for run in list(book.scored)[:-MAX_RUNS]:
        del book.scored[run]


def _refuse(reason: str) -> PermanentlyRefused:
    return PermanentlyRefused(f"{reason}; {REMEDY}", RefusalCode.POLICY)


# --- the file -------------------------------------------------------------------------------------


def locate_book(state_dir: Path, outer_anchor: Path | None) -> AnchoredFile:
    """Return where a centre's book is; the egress log vouches for it."""
    return AnchoredFile(state_dir, BOOK_FILENAME, "release book", outer_anchor)


@contextlib.contextmanager
def open_book(file: AnchoredFile) -> Iterator[ReleaseBook]:
    """Yield the book, and write it when the block has changed it and ends without an error.

    Other processes wait meanwhile. Raises Refused when it cannot be read or written, and PermanentlyRefused
    when it is not as it was last written: then nothing leaves.
    """
    try:
        with lock_folder(file.path.parent):
            book = read_book(file)
            before = _to_json(book)
            yield book
            after = _to_json(book)
            if after != before:
                write_anchored_file(file, after, len(book.answers))
    except OSError as error:
        raise _unusable(error) from error


def read_book(file: AnchoredFile) -> ReleaseBook:
    """Return the book; an empty one with a new key when there is none. Raises Refused."""
    try:
        data = read_anchored_file(file)
        return ReleaseBook(key=secrets.token_hex(32)) if data is None else _BOOK_ADAPTER.validate_json(data)
    except (OSError, ValueError) as error:
        raise _unusable(error) from error


def forget_releases(file: AnchoredFile) -> None:
    """Begin a new book. What was released before can then be combined with what will be.

    The egress log records it. Raises Refused when the book cannot be written.
    """
    try:
        with lock_folder(file.path.parent):
            write_anchored_file(file, _to_json(ReleaseBook(key=secrets.token_hex(32))), 0)
    except OSError as error:
        raise _unusable(error) from error


def _to_json(book: ReleaseBook) -> bytes:
    return json.dumps(dataclasses.asdict(book), indent=1).encode()


def _unusable(error: Exception) -> Refused:
    return Refused(
        f"the centre's release book cannot be used ({type(error).__name__}), so nothing leaves; restore it "
        "from a backup at the centre",
        RefusalCode.POLICY,
    )
