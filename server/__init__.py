"""The coordinator. Never imports ``client``."""

from pathlib import Path

import common

# Other projects have packages of this name too; one that comes first on the path would be imported instead.
_ROOT = Path(__file__).resolve().parents[1]
if Path(common.__file__ or "").resolve().parent != _ROOT / "common":
    raise ImportError(
        f"another project's package 'common' ({common.__file__}) comes before Consilium's; "
        f"use a Python environment of its own, or put {_ROOT} first in PYTHONPATH"
    )
