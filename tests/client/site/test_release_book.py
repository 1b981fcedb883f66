"""The release book: a column is asked in one way, whatever the coordinator calls it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.federation.released_data import describe_splits, list_questions
from client.site import release_book
from client.site.config import Site, outer_anchor
from client.site.release_book import Question, ReleaseBook, ReleasedAnswer, check_questions, count_answer
from client.site.release_groups import ReleaseGroup
from common.config.compose import compose_config
from common.config.schema import Config, Task
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused

RECIPES = ["multisource", "multisource_personal", "triage", "prognosis", "finegrained", "transfer"]


def ask(book: ReleaseBook, config: Config) -> None:
    """Check a configuration's questions and note them as answered."""
    questions = list(list_questions(config).values())
    splits = describe_splits(config)
    check_questions(book, questions, splits)
    book.splits = splits
    for question in questions:
        if book.find_answer(question) is None:
            book.answers.append(ReleasedAnswer(question, "2026-01-01"))


def make_config(task: Task, name: str = "severity", federation: dict[str, object] | None = None) -> Config:
    config = compose_config(["recipe=multisource", "federation=folder", "federation.centres=[north,south]"])
    federation_config = replace(config.federation, **(federation or {}))  # type: ignore[arg-type]
    return replace(config, tasks={name: task}, federation=federation_config)


def test_all_recipes_are_answered_one_after_another_and_again() -> None:
    book = ReleaseBook(key="00")
    for recipe in RECIPES * 2:
        ask(book, compose_config([f"recipe={recipe}"]))


AGE = Task(type="multiclass", label_columns=["age"], bin_edges=[57.0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (AGE, replace(AGE, bin_edges=[60.0])),
        (AGE, replace(AGE, bin_edges=[57.0, 60.0])),
        (AGE, replace(AGE, bin_edges=[], classes=["56", "57"])),
        (AGE, Task(label_column="age")),
        (
            Task(type="multiclass", classes=["a", "b"]),
            Task(type="multiclass", classes=["a", "b", "c"]),
        ),
        (Task(type="segmentation"), Task(type="segmentation", threshold=0.4)),
    ],
)
def test_another_question_about_the_same_column_is_refused(first: Task, second: Task) -> None:
    book = ReleaseBook(key="00")
    ask(book, make_config(first))
    ask(book, make_config(first))
    with pytest.raises(PermanentlyRefused, match=r"was asked before as .* releases --forget") as caught:
        ask(book, make_config(second))
    assert caught.value.code == RefusalCode.POLICY


def test_names_and_the_order_of_classes_make_no_other_question() -> None:
    book = ReleaseBook(key="00")
    task = Task(type="multiclass", label_column="grade", classes=["a", "b", "c"])
    ask(book, make_config(task, "severity"))
    ask(book, make_config(replace(task, classes=["c", "a", "b"]), "another_name"))
    assert len(book.answers) == 1
    with pytest.raises(PermanentlyRefused):
        ask(book, make_config(replace(task, classes=["x", "y"]), "another_name"))


def test_other_bins_of_scores_are_refused() -> None:
    book = ReleaseBook(key="00")
    config = make_config(Task())
    ask(book, config)
    with pytest.raises(PermanentlyRefused, match="histogram bins 254"):
        ask(book, replace(config, evaluation=replace(config.evaluation, histogram_bins=254)))


def test_column_is_not_asked_for_in_ever_new_sums() -> None:
    book = ReleaseBook(key="00")
    for other in ("b", "c", "d"):
        task = Task(type="multiclass", label_columns=["a", other], bin_edges=[1.0])
        ask(book, make_config(task))
    with pytest.raises(PermanentlyRefused, match="column 'a' was asked for in 3 ways before"):
        ask(book, make_config(Task(type="regression", label_columns=["a", "e"])))


@pytest.mark.parametrize("splits", [{"fold": 0, "folds": 4}, {"fold": None}])
def test_patients_are_divided_in_one_way_only(splits: dict[str, object]) -> None:
    book = ReleaseBook(key="00")
    for fold in range(5):
        ask(book, make_config(Task(), federation={"fold": fold, "folds": 5}))
    ask(book, make_config(Task(), federation={"fold": 0, "folds": 5, "held_out_centres": ["north"]}))
    with pytest.raises(PermanentlyRefused, match="were counted by 5 folds"):
        ask(book, make_config(Task(), federation=splits))


def test_run_gets_as_many_scores_as_its_recipe_needs_and_a_repetition_is_free() -> None:
    book = ReleaseBook(key="00")
    for digest in ("a", "b", "a", "b"):
        count_answer(book, "run", digest, 2)
    with pytest.raises(PermanentlyRefused, match="has asked for 2 scores"):
        count_answer(book, "run", "c", 2)
    count_answer(book, "another", "c", 2)


def test_book_is_written_when_it_changes_and_never_half(tmp_path: Path) -> None:
    file = release_book.locate_book(tmp_path, None)
    group = ReleaseGroup("north/train/1", {"p1": ["s1"]})
    with release_book.open_book(file):
        pass
    assert not file.path.exists()
    with release_book.open_book(file) as book:
        book.answers.append(ReleasedAnswer(Question(["covid"], "classes"), "2026-01-01", [group]))
        mark = book.mark("patient/1")
    with contextlib.suppress(RuntimeError), release_book.open_book(file) as book:
        assert book.answers[0].groups == [group]
        assert book.mark("patient/1") == mark
        book.answers.clear()
        raise RuntimeError
    assert release_book.read_book(file).answers
    release_book.forget_releases(file)
    forgotten = release_book.read_book(file)
    assert not forgotten.answers
    assert forgotten.mark("patient/1") != mark


@pytest.mark.parametrize("content", [None, '{"key": "00"}', "{"])
def test_book_that_is_missing_replaced_or_damaged_lets_nothing_leave(
    tmp_path: Path, content: str | None
) -> None:
    file = release_book.locate_book(tmp_path, None)
    with release_book.open_book(file) as book:
        book.splits = "own splits"
    if content is None:
        file.path.unlink()
    else:
        file.path.write_text(content)
    with pytest.raises(Refused, match="release book is"), release_book.open_book(file):
        pass


def test_command_lists_the_book_and_forgets_it_when_confirmed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "site.yaml").write_text(f"centre: north\ndata: {data}\nstate: {tmp_path / 'state'}\n")
    site = Site("north", str(data), str(tmp_path / "state"))
    file = release_book.locate_book(tmp_path / "state", outer_anchor(site, data))
    group = ReleaseGroup("north/train/1", {"p1": ["s1"], "p2": ["s2"]})
    with release_book.open_book(file) as book:
        book.splits = "own splits"
        book.answers.append(ReleasedAnswer(Question(["covid"], "classes"), "2026-01-01", [group]))
    words = ["releases", "--site", str(tmp_path / "site.yaml")]
    listed = CliRunner().invoke(app, words)
    assert "classes of covid: since 2026-01-01, by own splits, 2 patients" in listed.output
    assert CliRunner().invoke(app, [*words, "--forget"], input="n\n").exit_code == 1
    assert release_book.read_book(file).answers
    num_lines = len((tmp_path / "state" / "egress.jsonl").read_text().splitlines())
    assert CliRunner().invoke(app, [*words, "--forget"], input="y\n").exit_code == 0
    assert not release_book.read_book(file).answers
    assert len((tmp_path / "state" / "egress.jsonl").read_text().splitlines()) == num_lines + 1
    assert "nothing was released" in CliRunner().invoke(app, words).output
