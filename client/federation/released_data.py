"""Load the data that exact numbers may be made of: whole groups of patients, as the release book has them.

Where `min_cell_count` is 1 these are all scans. Otherwise scans and labels that are in no complete group are
left aside, in counts, scores and training alike, so that all numbers agree with each other: none of them, nor
any sum or difference of them, is about fewer patients than `min_cell_count`. What gets noise instead
(`privacy=patient`) is not divided into groups.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.data.loading import load_datasets
from client.federation.run_context import RunContext
from client.site.release_book import (
    Question,
    ReleaseBook,
    ReleasedAnswer,
    check_questions,
    locate_book,
    open_book,
)
from client.site.release_groups import ScanCell, form_groups, select_complete
from common.config.schema import Config, Task
from common.learning.losses import UNSUPERVISED_TYPES, task_label_columns
from common.utils.errors import RefusalCode, Refused

ScanDatasets = dict[str, ScanDataset]  # {split: scans}
ALL_SCANS = Question([], "scans")

log = logging.getLogger("consilium.centre")


def load_released_datasets(context: RunContext) -> ScanDatasets:
    """Return the centre's scans by split that exact numbers may be made of. Raises as `select_released`."""
    return select_released(context, load_datasets(context.site, context.config).by_split)


def select_released(context: RunContext, datasets: Mapping[str, ScanDataset]) -> ScanDatasets:
    """Return those of the scans that exact numbers may be made of, and note them in the release book.

    Raises Refused for a question that may not be answered beside those answered before, and where fewer
    patients are left than a number may stand for.
    """
    min_patients = context.site.min_cell_count
    if min_patients <= 1:
        return dict(datasets)
    questions = list_questions(context.config)
    with open_book(locate_book(context.state_dir, context.outer_anchor)) as book:
        splits = describe_splits(context.config)
        check_questions(book, [ALL_SCANS, *questions.values()], splits)
        released = _select_scans(book, datasets, min_patients)
        if not any(len(dataset) for dataset in released.values()):
            raise Refused("too few patients have scans for this run here", RefusalCode.NO_DATA)
        for name, question in questions.items():
            _select_labels(book, released, name, question, context)
        book.splits = splits
    _log_what_is_left_aside(datasets, released)
    return released


def describe_splits(config: Config) -> str:
    """Return how the run divides patients, whichever of the folds it is."""
    if config.federation.fold is None:
        return "own splits"
    return f"{config.federation.folds} folds"


def list_questions(config: Config) -> dict[str, Question]:
    """Return {task: the question about the cohort's columns that it asks}; none for tasks without labels."""
    questions = {}
    for name, task in config.tasks.items():
        if task.type not in UNSUPERVISED_TYPES:
            questions[name] = describe_question(name, task, config)
    return questions


def describe_question(name: str, task: Task, config: Config) -> Question:
    """Return what a task asks about which columns. The names of task and classes' order do not matter."""
    if task.num_clusters:
        return Question([task.label_column] if task.label_column else [], "clusters")
    columns = sorted(set(task_label_columns(name, task)))
    if task.type == "regression":
        return Question(columns, "numbers")
    if task.type == "segmentation":
        if task.severity_column:
            columns = sorted({*columns, task.severity_column})
        return Question(columns, "masks", {"threshold": f"{task.threshold:g}"})
    if task.type == "binary":
        return Question(columns, "classes", {"histogram bins": str(config.evaluation.histogram_bins)})
    if task.bin_edges:
        edges = ", ".join(f"{edge:g}" for edge in task.bin_edges)
        return Question(columns, "classes", {"edges": edges})
    if columns == ["source"]:  # its classes are the sources that a run knows
        return Question(columns, "classes")
    return Question(columns, "classes", {"classes": ", ".join(sorted(task.classes))})


def _select_scans(book: ReleaseBook, datasets: Mapping[str, ScanDataset], min_patients: int) -> ScanDatasets:
    """Return the scans that are in a complete group."""
    cells: dict[str, ScanCell] = {}
    for dataset in datasets.values():
        cells |= _mark_scans(book, dataset, [""] * len(dataset))
    selected = _admit(book, ALL_SCANS, cells, min_patients)
    released = {}
    for split, dataset in datasets.items():
        is_kept = _find_marked(book, dataset, selected)
        released[split] = dataset.subset(np.flatnonzero(is_kept))
    return released


def _select_labels(
    book: ReleaseBook, datasets: Mapping[str, ScanDataset], name: str, question: Question, context: RunContext
) -> None:
    """Leave aside the labels of a task that are in no complete group."""
    task = context.config.tasks[name]
    min_patients = context.site.min_cell_count
    cells: dict[str, ScanCell] = {}
    for dataset in datasets.values():
        cells |= _mark_scans(book, dataset, _name_classes(dataset, name, task))
    selected = _admit(book, question, cells, min_patients)
    for dataset in datasets.values():
        leave_labels_aside(dataset, name, _find_marked(book, dataset, selected))
        if task.num_clusters:
            _round_clusters(book, dataset, name, min_patients)


def leave_labels_aside(dataset: ScanDataset, task: str, is_kept: NDArray[np.bool_]) -> None:
    """Remove a task's labels from all scans but those kept, [N], in every view."""
    targets = dataset.targets[task].copy()
    targets[~is_kept] = np.nan
    dataset.targets[task] = targets
    if task in dataset.masks:
        for row in np.flatnonzero(~is_kept):
            dataset.masks[task][row] = None
    if task in dataset.extra_targets:
        dataset.extra_targets[task] = np.where(is_kept, dataset.extra_targets[task], np.nan)
    for view in dataset.views:
        leave_labels_aside(view, task, is_kept)


def _round_clusters(book: ReleaseBook, dataset: ScanDataset, name: str, min_patients: int) -> None:
    """Leave aside the cluster of patients who do not fill a group of their cluster.

    These groups are not kept, because every clustering divides the patients in another way.
    """
    clusters = dataset.targets[name].copy()
    cells = _mark_scans(book, dataset, _name_indices(clusters, []))
    selected = select_complete(form_groups([], cells, min_patients), cells)
    clusters[~_find_marked(book, dataset, selected)] = np.nan
    dataset.targets[name] = clusters


def _name_classes(dataset: ScanDataset, name: str, task: Task) -> list[str | None]:
    """Return [N]: the class of each scan for a task's question; None without a label."""
    if task.num_clusters:
        return _name_indices(dataset.extra_targets[name], ["", "takes part"])
    if task.type == "regression":
        return _name_indices(np.where(dataset.has_label(name), 0.0, np.nan), ["labelled"])
    if task.type == "segmentation":
        severities = dataset.extra_targets.get(name, np.full(len(dataset), np.nan))
        without_mask = np.where(np.isfinite(severities), 1.0, np.nan)
        return _name_indices(np.where(dataset.has_label(name), 0.0, without_mask), ["mask", "severity only"])
    return _name_indices(dataset.targets[name], [] if task.bin_edges else task.classes)


def _name_indices(indices: NDArray[np.float64], classes: Sequence[str]) -> list[str | None]:
    names: list[str | None] = [None] * len(indices)
    for row in np.flatnonzero(np.isfinite(indices)):
        index = int(indices[row])
        names[row] = classes[index] if classes else str(index)
    return names


def _mark_scans(
    book: ReleaseBook, dataset: ScanDataset, class_names: Sequence[str | None]
) -> dict[str, ScanCell]:
    """Return {mark of a scan: its cell} of the scans that have a class."""
    cells = {}
    for row, class_name in enumerate(class_names):
        if class_name is None:
            continue
        cell = f"{dataset.centres[row]}/{dataset.divisions[row]}/{class_name}"
        patient = book.mark(f"patient/{dataset.patient_ids[row]}")
        cells[book.mark(f"scan/{dataset.scan_ids[row]}")] = ScanCell(patient, cell)
    return cells


def _admit(
    book: ReleaseBook, question: Question, cells: Mapping[str, ScanCell], min_patients: int
) -> set[str]:
    """Return the marks of the scans in complete groups, after new groups are added to the book."""
    answer = book.find_answer(question)
    groups = answer.groups if answer else []
    new_groups = form_groups(groups, cells, min_patients)
    if new_groups and answer is None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        answer = ReleasedAnswer(question, time)
        book.answers.append(answer)
    if answer is None:
        return set()
    answer.groups.extend(new_groups)
    return select_complete(answer.groups, cells)


def _find_marked(book: ReleaseBook, dataset: ScanDataset, marks: set[str]) -> NDArray[np.bool_]:
    """Return [N]: whether each scan's mark is among those given."""
    return np.array([book.mark(f"scan/{scan}") in marks for scan in dataset.scan_ids], dtype=bool)


def _log_what_is_left_aside(datasets: Mapping[str, ScanDataset], released: Mapping[str, ScanDataset]) -> None:
    """Tell the hospital's own log what does not fill a group."""
    num_left = sum(len(dataset) - len(released[split]) for split, dataset in datasets.items())
    if num_left:
        log.info("%d scans are left aside: their patients fill no group (min_cell_count)", num_left)
    for name in next(iter(datasets.values())).targets:
        before = sum(int(dataset.has_label(name).sum()) for dataset in datasets.values())
        after = sum(int(dataset.has_label(name).sum()) for dataset in released.values())
        if after < before:
            log.info("%d labels of task '%s' are left aside (min_cell_count)", before - after, name)


# --- numbers that follow from released ones -------------------------------------------------------


def min_scans_of_patients(datasets: Collection[ScanDataset], min_patients: int) -> int:
    """Return the number of scans that `min_patients` patients or more surely have together.

    It is one more than the scans of the `min_patients - 1` patients with the most scans.
    """
    num_scans: Counter[str] = Counter()
    for dataset in datasets:
        num_scans.update(dataset.patient_ids)
    return 1 + sum(count for _, count in num_scans.most_common(min_patients - 1))


def count_epoch_scans(dataset: ScanDataset, tasks: Collection[str]) -> dict[str, int]:
    """Return {cohort: scans of a pass over a released data set}, which follow from the counts of its labels.

    The number of scans with a label for any of the tasks would tell how many have one label and not another.
    """
    sizes: dict[str, int] = {}
    centres = np.array(dataset.centres)
    for centre in sorted(set(dataset.centres)):
        is_own = centres == centre
        num_labels = sum(int(dataset.has_label(task)[is_own].sum()) for task in tasks)
        sizes[centre] = min(num_labels, int(is_own.sum()))
    return sizes
