"""The report's tables about centres: label counts, software and sources, image drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from server.reporting.labels import SPLIT_LABELS, format_number
from server.reporting.report_tables import HeaderCell, ReportTable, TableCell, TableRow, number_cells
from server.run.records import CentreRecord, ImageStatistic

UNLABELLED = "unlabelled"
MAX_CLASS_COLUMNS = 9
LabelCounts = Mapping[
    str, Mapping[str, Mapping[str, float]]
]  # {split: {task: {class or "unlabelled": scans}}}


def build_label_count_tables(counts: Mapping[str, LabelCounts]) -> list[ReportTable]:
    """Return one table a task: scans by centre, split and class. `counts`: {centre: its counts}."""
    tasks: dict[str, None] = {}
    splits: dict[str, None] = {}
    for centre_counts in counts.values():
        splits |= dict.fromkeys(centre_counts)
        for split_counts in centre_counts.values():
            tasks |= dict.fromkeys(split_counts)
    order = {split: position for position, split in enumerate(SPLIT_LABELS)}
    sorted_splits = sorted(splits, key=lambda split: order.get(split, len(order)))
    return [_label_count_table(task, counts, sorted_splits) for task in tasks]


def _label_count_table(task: str, counts: Mapping[str, LabelCounts], splits: Sequence[str]) -> ReportTable:
    classes = _list_classes(task, counts)
    columns = classes
    if len(classes) > MAX_CLASS_COLUMNS:
        classes.sort(key=lambda name: name == UNLABELLED)  # last
        columns = ["scans", "classes"]
        if classes[-1] == UNLABELLED:
            columns.append(UNLABELLED)
    rows = []
    total = np.zeros((len(splits), len(classes)))
    for centre, centre_counts in counts.items():
        table = _tabulate_counts(centre_counts, task, splits, classes)
        rows.append(TableRow([TableCell(centre), *_count_cells(table, columns)]))
        total += table
    rows.append(TableRow([TableCell("all"), *_count_cells(total, columns)], "view first"))
    groups = [HeaderCell("", False)]
    groups += [HeaderCell(SPLIT_LABELS.get(split, split), column_span=len(columns)) for split in splits]
    header = [HeaderCell("centre", False), *map(HeaderCell, columns * len(splits))]
    return ReportTable([groups, header], rows, f"{task}, scans")


def _tabulate_counts(
    counts: LabelCounts, task: str, splits: Sequence[str], classes: Sequence[str]
) -> NDArray[np.float64]:
    """Return a centre's counts [splits, classes]."""
    table = np.zeros((len(splits), len(classes)))
    for row, split in enumerate(splits):
        for name, scans in counts.get(split, {}).get(task, {}).items():
            table[row, classes.index(name)] = scans
    return table


def _list_classes(task: str, counts: Mapping[str, LabelCounts]) -> list[str]:
    classes: dict[str, None] = {}
    for centre_counts in counts.values():
        for split_counts in centre_counts.values():
            classes |= dict.fromkeys(split_counts.get(task, {}))
    return list(classes)


def _count_cells(counts: NDArray[np.float64], columns: Sequence[str]) -> list[TableCell]:
    """Return the counts [splits, classes] as cells.

    Where there are fewer columns than classes, they are the number of scans, of classes that have any, and of
    unlabelled scans (the last class), if that column is among them.
    """
    shown = counts
    if counts.shape[1] > len(columns):
        num_unlabelled_columns = int(UNLABELLED in columns)
        labelled = counts[:, : counts.shape[1] - num_unlabelled_columns]
        unlabelled = counts[:, counts.shape[1] - num_unlabelled_columns :]
        shown = np.column_stack([labelled.sum(1), (labelled > 0).sum(1), unlabelled])
    return [TableCell(format_number(float(count), 0) or "", "n") for count in shown.ravel()]


def build_centre_table(centres: Mapping[str, CentreRecord]) -> ReportTable:
    """Return each centre's sources, device, unreadable scans and software."""
    header = [
        HeaderCell("centre", False),
        HeaderCell("sources", False),
        HeaderCell("device", False),
        HeaderCell("unreadable scans"),
        HeaderCell("versions", False),
    ]
    rows = []
    for name, centre in centres.items():
        reasons = [f"{count} {reason}" for reason, count in centre.skipped_by_reason.items()]
        versions = [f"{package} {version}" for package, version in centre.versions.items()]
        cells = [
            TableCell(name),
            TableCell(", ".join(centre.sources), "text"),
            TableCell(centre.device, "text"),
            TableCell(str(centre.skipped), "n", "; ".join(reasons)),
            TableCell(", ".join(versions), "text"),
        ]
        rows.append(TableRow(cells))
    return ReportTable([header], rows)


def build_drift_table(image_statistics: Mapping[str, ImageStatistic]) -> ReportTable:
    """Return how far each centre's scans are from those of all other centres, by image statistic."""
    centres: dict[str, None] = {}
    for statistic in image_statistics.values():
        centres |= dict.fromkeys(statistic.centres)
    rows = []
    for centre in centres:
        distances = [statistic.drift.get(centre) for statistic in image_statistics.values()]
        rows.append(TableRow([TableCell(centre), *number_cells(distances, 2)]))
    names = [statistic.name for statistic in image_statistics.values()]
    return ReportTable(
        [[HeaderCell("centre", False), *map(HeaderCell, names)]],
        rows,
        "Distance between each centre's histogram and that of all other centres "
        "(Jensen-Shannon distance: 0 identical, 1 disjoint)",
    )
