"""Write arrays to disk so that a reader finds a complete file or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def save_array(path: Path, array: NDArray[np.generic]) -> None:
    """Save an array as `.npy`, in place of an earlier one. Raises OSError.

    Unlike common/utils/atomic_files.py it does not wait for the disk: what is lost in a power failure here is
    computed or sent again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.save(file, array)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
