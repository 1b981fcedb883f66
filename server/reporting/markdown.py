"""Report tables and names as Markdown that no name can break."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from server.reporting.report_tables import ReportTable, TableCell

MARKUP_CHARACTERS = re.compile(r"([\\`*_{}\[\]<>#|~])")


def format_table(table: ReportTable, caption: str) -> Iterator[str]:
    """Write a table as Markdown; where columns are grouped, each heading names its group."""
    columns = table.header_rows[-1]
    headings = [column.text for column in columns]
    if len(table.header_rows) > 1:
        groups: list[str] = []
        for group in table.header_rows[0]:
            groups += [group.text] * group.column_span
        headings = [f"{group} {text}".strip() for group, text in zip(groups, headings, strict=True)]
    yield f"**{escape_markdown(caption)}**\n"
    yield _format_row(map(escape_markdown, headings))
    alignments = ["--:" if column.is_numeric else "---" for column in columns]
    yield f"|{'|'.join(alignments)}|"
    for row in table.rows:
        yield _format_row(map(_format_cell, row.cells))
    yield ""
    for note in table.notes:
        yield f"{escape_markdown(note)}\n"


def _format_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _format_cell(cell: TableCell) -> str:
    return escape_markdown(f"{cell.text} {cell.subtext}")


def join_names(names: Sequence[str]) -> str:
    """Return names as Markdown, separated by commas."""
    return ", ".join(map(escape_markdown, names))


def escape_markdown(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    return MARKUP_CHARACTERS.sub(r"\\\1", " ".join(text.split()))
