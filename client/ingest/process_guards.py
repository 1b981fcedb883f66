"""Guard an ingest: one at a time in a folder, and no log lines of libraries."""

from __future__ import annotations

import fcntl
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.utils.errors import ConsiliumError

# These libraries log values, and addresses that contain UIDs.
SILENCED_LOGGERS = (
    "pynetdicom",
    "dicomweb_client",
    "urllib3",
    "requests",
    "pydicom",
    "retrying",
    "dicomanonymizer",
)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other ingests out of a folder; raises ConsiliumError when one is running."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConsiliumError(
                f"another ingest is running in {folder}; wait until it ends, or stop it"
            ) from None
        yield


@contextmanager
def silence_loggers() -> Iterator[None]:
    """Discard what libraries log or warn of, at any level: it may contain identifiers."""
    loggers = [logging.getLogger(name) for name in SILENCED_LOGGERS]
    settings_before = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, settings_before, strict=True):
            logger.propagate = propagate
            logger.handlers = handlers
