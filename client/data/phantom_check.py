"""Whether a simulated centre's phantom data are there. Only `consilium-centre phantom` draws them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from common.config.schema import PhantomConfig
from common.utils.errors import RefusalCode, Refused

MARKER_FILENAME = "phantom.json"  # in a finished centre's folder: the settings that it was drawn with


def require_phantom(folder: Path, centre: str, settings: PhantomConfig) -> None:
    """Raise Refused when a centre's phantom was not drawn, or with other settings than the run's."""
    try:
        drawn_settings = json.loads((folder / MARKER_FILENAME).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(
            f"centre '{centre}' has no phantom data; "
            "run `consilium-centre phantom` with the settings of this run first",
            RefusalCode.NO_DATA,
        ) from None
    if drawn_settings != asdict(settings):
        raise Refused(
            f"the phantom data of centre '{centre}' were drawn with other federation.phantom settings; "
            "run `consilium-centre phantom` with the settings of this run first",
            RefusalCode.NO_DATA,
        )
