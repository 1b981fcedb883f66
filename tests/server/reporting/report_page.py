"""A report's HTML as a reader sees it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID_ELEMENTS = ("meta", "br")


class Page(HTMLParser):
    """The text, the tables' cells, the elements and the scripts of a page; checks that it is well-formed."""

    def __init__(self, text: str) -> None:
        """Parse a page."""
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open_elements: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open_elements.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        """Check that the innermost element ends."""
        assert self.open_elements.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        if "script" in self.open_elements:
            self.scripts[-1] += data
        elif "style" not in self.open_elements:
            self.text += data
            if "td" in self.open_elements or "th" in self.open_elements:
                self.rows[-1][-1] += data

    def find_row(self, heading: str, min_cells: int = 0) -> list[str]:
        """Return the first row with this first cell and at least so many cells."""
        return next(row for row in self.rows if row and row[0] == heading and len(row) >= min_cells)
