"""File names of predicted masks."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

MAX_NAME_LENGTH = 150  # of a scan's name in a file name; file systems allow 255 bytes for the whole


def make_mask_filename(scan: str, task: str) -> str:
    """Return the file name of a scan's mask; no two pairs of scan and task share one.

    Characters that file names cannot hold are quoted ('/' becomes %2F); long names end in a hash after "%-",
    which no quoted name contains.
    """
    name = quote(scan, safe="")
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[:120]}%-{hashlib.sha256(scan.encode()).hexdigest()[:24]}"
    quoted_task = quote(task, safe="").replace("_", "%5F")
    return f"{name}_{quoted_task}.nii.gz"
