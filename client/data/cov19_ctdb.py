"""Sources of scans in the COV19-CT-DB (PHAROS) layout.

Folders are covid1, covid2, non-covid1..3 and validation/val/{covid,non-covid}, beside CSVs of `ct_scan_name,
data_centre`. Scan names collide between the classes (by name alone 136 of 564 COVID training scans would get
the wrong source), so the source is looked up by class, split and name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from client.data.found_scan import FoundScan
from client.data.manifest import read_table
from common.utils.errors import ConsiliumError


class ScanKey(NamedTuple):
    """What identifies a scan in this layout."""

    label: float | None
    split: str | None
    name: str


def fill_sources(folder: Path, scans: Iterable[FoundScan]) -> None:
    """Fill the scans' sources from the folder's CSVs, if there are any.

    Scans that lie in no split's folder are for training. Raises ConsiliumError when a CSV has no data_centre
    column or does not name its class.
    """
    csv_files = sorted([*folder.glob("*.csv"), *folder.glob("*/*.csv")])
    files = list(filter(_lists_sources, csv_files))
    if not files:
        return
    sources: dict[ScanKey, str] = {}
    for file in files:
        sources |= _read_sources(file, folder)
    for scan in scans:
        scan.split = scan.split or "train"
        key = ScanKey(scan.covid, scan.split, Path(scan.path).name)
        scan.source = sources.get(key, math.nan)


def _lists_sources(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "ct_scan_name" in file.readline().lower()


def _read_sources(path: Path, folder: Path) -> dict[ScanKey, str]:
    """Read the sources of one CSV, whose path says of which class and split it is."""
    table = read_table(path)
    if "source" not in table:
        raise ConsiliumError(
            f"{path} has ct_scan_name but no data_centre; add that column or remove the file"
        )
    words = path.relative_to(folder).as_posix().lower()
    label = _label_of_table(words)
    if label is None:
        raise ConsiliumError(
            f"{path} does not say of which class its scans are, and names collide between classes; "
            "call it for example train_non_covid.csv"
        )
    split = _split_of_table(words)
    sources: dict[ScanKey, str] = {}
    for _, name, source in table[["ct_scan_name", "source"]].dropna().itertuples():
        scan_name = Path(name.strip()).name.removesuffix(".npy")
        sources[ScanKey(label, split, scan_name)] = re.sub(r"\.0$", "", source.strip())
    return sources


def _label_of_table(words: str) -> float | None:
    if re.search(r"non?[-_ ]?covid", words):
        return 0.0
    if "covid" in words:
        return 1.0
    return None


def _split_of_table(words: str) -> str:
    for split in ("val", "test"):
        if split in words:
            return split
    return "train"
