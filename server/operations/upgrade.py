"""Upgrade a coordinator's ledger and results from version 0.1.0.

What 0.1.0 wrote is kept beside, with the suffix `.0.1.0`. A run that 0.1.0 did not finish stays as it is:
this version cannot finish it, because its checkpoints and its hospitals' files are those of the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from common.config.renamed_keys import upgrade_config
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError
from server.ledger.audit_trail import first_broken_link
from server.ledger.database import parse_address
from server.ledger.ledger import Ledger
from server.ledger.migration import has_old_form, migrate_ledger
from server.operations.backup import list_run_folders
from server.operations.result_migration import migrate_result, migrate_summary
from server.rounds.run_lifecycle import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, is_finished
from server.run.records import (
    CrossValidationSummary,
    RunResult,
    is_old_form,
    parse_result,
    result_to_dict,
)

KEPT_SUFFIX = ".0.1.0"
SQLITE_SUFFIXES = ("", "-wal", "-shm")


def upgrade_coordinator(
    runs_dir: Path, old_address: str, new_address: str, leave_unfinished: bool = False
) -> Iterator[str]:
    """Migrate the ledger and convert the results of all finished runs; yields sentences about what was done.

    It may be repeated after an interruption.

    Args:
        runs_dir: the folder of results.
        old_address: the ledger of 0.1.0. One that has been migrated already is left alone.
        new_address: where the ledger shall be; the same address replaces a SQLite file.
        leave_unfinished: go on although runs are unfinished.

    Raises:
        ConsiliumError: there are unfinished runs, the ledger is in use or not of 0.1.0, or a file cannot be
            read or written.
    """
    unfinished = [folder.name for folder in list_run_folders(runs_dir) if _is_old_and_unfinished(folder)]
    if unfinished and not leave_unfinished:
        raise ConsiliumError(
            f"only version 0.1.0 can finish these runs: {', '.join(unfinished)}; finish them with it first, "
            "or give them up with --leave-unfinished"
        )
    yield from _upgrade_ledger(old_address, new_address)
    for folder in list_run_folders(runs_dir):
        try:
            if is_finished(folder) and _upgrade_results(folder):
                yield f"run {folder.name}: converted"
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ConsiliumError(
                f"the results in {folder} cannot be converted ({type(error).__name__}: {error}); restore the "
                "folder, or move it away, and repeat the upgrade"
            ) from error
    for run_id in unfinished:
        yield f"run {run_id}: not finished, and cannot be resumed by this version"


# --- the ledger


def _upgrade_ledger(old_address: str, new_address: str) -> Iterator[str]:
    if not has_old_form(old_address):
        yield f"the ledger {_hide_password(old_address)} has the present form already"
        return
    if old_address != new_address:
        num_rows = migrate_ledger(old_address, new_address)
        yield f"{num_rows} rows copied to the ledger {_hide_password(new_address)}"
        yield _describe_audit_trail(new_address)
        return
    url = parse_address(old_address)
    if url.get_backend_name() != "sqlite":
        raise ConsiliumError(
            f"the ledger {_hide_password(old_address)} cannot be migrated in place; create an empty database "
            "and give its address with --to"
        )
    yield from _replace_sqlite_ledger(Path(url.database or ""))


def _replace_sqlite_ledger(path: Path) -> Iterator[str]:
    """Put the migrated ledger in the place of the old file, which gets the suffix `.0.1.0`."""
    old_copy = path.with_name(path.name + KEPT_SUFFIX)
    if old_copy.exists() and not old_copy.samefile(path):  # the same: an interrupted upgrade kept it
        raise ConsiliumError(f"{old_copy} exists already; move it away and repeat the upgrade")
    part = path.with_name(f".{path.name}.upgrade")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove_sqlite_file, part)
        _remove_sqlite_file(part)  # an interrupted upgrade left it
        num_rows = migrate_ledger(f"sqlite:///{path}", f"sqlite:///{part}")
        audit_sentence = _describe_audit_trail(f"sqlite:///{part}")
        if path.with_name(f"{path.name}-wal").exists():  # SQLite removes it when the last program closes
            raise ConsiliumError(
                f"the ledger {path} is open in another program; stop the coordinator and the console, and "
                "repeat the upgrade"
            )
        try:
            shutil.copymode(path, part)
            _keep_old_file(path)
            os.replace(part, path)
        except OSError as error:
            raise ConsiliumError(f"the ledger {path} cannot be replaced: {error.strerror}") from error
    yield f"{num_rows} rows of the ledger migrated; the old ledger is {old_copy}"
    yield audit_sentence


def _describe_audit_trail(address: str) -> str:
    """Verify the migrated audit trail, whose hashes are those of the old one."""
    ledger = Ledger(address)
    try:
        entries = ledger.read_audit()
    finally:
        ledger.close()
    broken = first_broken_link(entries)
    if broken is None:
        return f"the audit trail is intact ({len(entries)} entries)"
    return f"warning: the audit trail was changed at entry {broken} before the upgrade"


def _remove_sqlite_file(path: Path) -> None:
    for suffix in SQLITE_SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _hide_password(address: str) -> str:
    return parse_address(address).render_as_string(hide_password=True)


# --- the results


def _is_old_and_unfinished(folder: Path) -> bool:
    return not is_finished(folder) and _has_old_config(folder)


def _has_old_config(folder: Path) -> bool:
    values: dict[str, Any] = yaml.safe_load((folder / CONFIG_FILE).read_text())
    return upgrade_config(values) != values


def _upgrade_results(folder: Path) -> bool:
    """Convert a finished run's configuration and results; tells whether there was anything to convert."""
    changed = False
    for name in (METRICS_FILE, SUMMARY_FILE):
        path = folder / name
        if path.is_file():
            values = json.loads(path.read_text())
            if is_old_form(values):
                result = _migrate_values(folder, values)
                _replace_file(path, json.dumps(result_to_dict(result), indent=1))
                changed = True
    if _has_old_config(folder):
        config = upgrade_config(yaml.safe_load((folder / CONFIG_FILE).read_text()))
        _replace_file(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))
        changed = True
    return changed


def _migrate_values(folder: Path, values: dict[str, Any]) -> RunResult | CrossValidationSummary:
    if "parts" in values:
        return migrate_summary(values, _load_folds(folder, values["parts"]))
    return migrate_result(values)


def _load_folds(folder: Path, fold_names: Iterable[str]) -> dict[str, RunResult]:
    """Return {fold: result} of a cross-validation's folds whose results are still there."""
    folds = {}
    for fold in fold_names:
        path = folder.with_name(f"{folder.name}-{fold}") / METRICS_FILE
        if not path.is_file():
            continue
        values = json.loads(path.read_text())
        if is_old_form(values):
            folds[fold] = migrate_result(values)
        else:
            folds[fold] = parse_result(values)
    return folds


def _replace_file(path: Path, text: str) -> None:
    """Replace a file's text, and keep what 0.1.0 wrote beside it."""
    _keep_old_file(path)
    atomic_write(path, text.encode())


def _keep_old_file(path: Path) -> None:
    """Give a file of 0.1.0 a second name, under which it stays when the first one is replaced."""
    old_copy = path.with_name(path.name + KEPT_SUFFIX)
    if not old_copy.exists():  # else an interrupted upgrade kept it
        os.link(path, old_copy)
