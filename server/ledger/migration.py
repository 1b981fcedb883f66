"""Copy a ledger of version 0.1.0 into a new one. The old one is only read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from common.config.renamed_keys import upgrade_config
from common.utils.errors import ConsiliumError
from server.ledger import tables
from server.ledger.database import (
    Database,
    insert_batches,
    iterate_batches,
    parse_address,
    read_as_of_now,
)
from server.ledger.ledger import ArtifactKind, Ledger
from server.ledger.reader import Row

# {kind in 0.1.0: kind today}
ARTIFACT_KINDS = {"quality": ArtifactKind.IMAGE_STATISTICS, "matrix": ArtifactKind.CROSS_SITE}
ACTIVITIES = {"meet": "handshake"}


def migrate_ledger(old_address: str, new_address: str) -> int:
    """Copy a ledger of version 0.1.0 into a new one, which may be of the other kind of database.

    All rows are copied or none, so that an interrupted migration can be repeated. The audit trail stays
    verifiable: its hashes cover the same texts.

    Args:
        old_address: the ledger of 0.1.0, for example ``sqlite:///runs/ledger.db``.
        new_address: an address where there is no ledger yet.

    Returns:
        How many rows were copied.

    Raises:
        ConsiliumError: there is no ledger of 0.1.0 at the old address, or the new one has rows already.
    """
    old_ledger = OldLedger(old_address)
    new_ledger = Ledger(new_address)
    count = 0
    try:
        with old_ledger.transaction(read_only=True) as source, new_ledger.transaction() as destination:
            read_as_of_now(source)
            _require_empty(destination, new_ledger.address)
            for table in tables.schema.sorted_tables:
                if table is not tables.schema_version:
                    count += _copy_table(source, destination, table)
    finally:
        old_ledger.close()
        new_ledger.close()
    return count


def has_old_form(address: str) -> bool:
    """Tell whether the ledger at an address is of 0.1.0, and not of this version.

    Raises:
        ConsiliumError: there is no ledger.
    """
    ledger = _UncheckedLedger(address)
    ledger.close()
    if tables.schema_version.name in ledger.table_names:
        return False
    if tables.runs.name in ledger.table_names:
        return True
    raise _no_ledger(ledger.address)


class _UncheckedLedger(Database):
    """The database of a ledger of any version."""

    table_names: list[str]

    def __init__(self, address: str) -> None:
        """Open the database. Raises ConsiliumError where there is none."""
        _require_file(address)
        super().__init__(address)

    def _prepare_tables(self, connection: sa.Connection) -> None:
        self.table_names = sa.inspect(connection).get_table_names()


class OldLedger(Database):
    """The database of a ledger of version 0.1.0, open for reading."""

    def __init__(self, address: str) -> None:
        """Open the database. Raises ConsiliumError where there is no such ledger."""
        _require_file(address)
        super().__init__(address)

    def _prepare_tables(self, connection: sa.Connection) -> None:
        table_names = sa.inspect(connection).get_table_names()
        if tables.schema_version.name in table_names:
            raise ConsiliumError(
                f"the ledger {self.address} has this version's form already; nothing is to be migrated"
            )
        missing = {old_table.name for old_table in OLD_TABLES.values()} - set(table_names)
        if missing:
            names = ", ".join(sorted(missing))
            raise ConsiliumError(f"{self.address} is not a ledger of version 0.1.0: it has no table {names}")


def _require_file(address: str) -> None:
    """Raise ConsiliumError where the file of a SQLite ledger is missing: opening it would make a new one."""
    url = parse_address(address)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise _no_ledger(url.render_as_string())


def _no_ledger(shown_address: str) -> ConsiliumError:
    return ConsiliumError(f"there is no ledger at {shown_address}; give the address of the old one")


def _require_empty(connection: sa.Connection, shown_address: str) -> None:
    for table in tables.schema.sorted_tables:
        is_filled = table is not tables.schema_version and connection.scalar(sa.select(table.c.id).limit(1))
        if is_filled:
            raise ConsiliumError(
                f"the ledger {shown_address} has rows already; give the address of a new one"
            )


def _copy_table(source: sa.Connection, destination: sa.Connection, table: sa.Table) -> int:
    old_table = OLD_TABLES[table.name]
    columns = []
    for column in table.columns:
        if column.name not in old_table.new_columns:
            old_name = old_table.renamed_columns.get(column.name, column.name)
            columns.append(sa.column(old_name, column.type).label(column.name))
    query = sa.select(*columns).select_from(sa.table(old_table.name)).order_by(sa.column("id"))
    batches = ([old_table.convert(row) for row in batch] for batch in iterate_batches(source, query))
    return insert_batches(destination, table, batches)


# --- what has another form today


def _keep_row(row: Row) -> Row:
    return row


def _convert_run(row: Row) -> Row:
    """Rename the configuration's keys, and tell a fold of a cross-validation by its id, as 0.1.0 did."""
    config = upgrade_config(row["config"])
    federation = config.get("federation", {})
    fold = federation.get("fold")
    held_out_centres = federation.get("held_out_centres", [])
    parent_run_id = None
    if fold is not None:
        parent_run_id = _remove_suffix(row["id"], f"-fold-{fold}")
    elif held_out_centres:
        centres = re.sub("[^A-Za-z0-9._-]", "-", "-".join(held_out_centres))
        parent_run_id = _remove_suffix(row["id"], f"-without-{centres}")
    return row | {"config": config, "parent_run_id": parent_run_id}


def _remove_suffix(text: str, suffix: str) -> str | None:
    """Return the text without the suffix; None where it does not end with it."""
    return text.removesuffix(suffix) if text.endswith(suffix) else None


def _convert_scores(row: Row) -> Row:
    """Give the scores the form of `server.run.records.TaskScores`."""
    empty: Row = {"macro": {}, "pooled": {}, "worst": {}, "spread": {}, "challenge_score": None}
    centres = {centre: convert_centre_scores(values) for centre, values in row["centres"].items()}
    return row | {"summaries": empty | row["summaries"], "centres": centres}


def convert_centre_scores(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a centre's scores of 0.1.0, metrics and loss in one dict, in the form of `CentreScores`."""
    metrics = {name: value for name, value in values.items() if name not in ("loss", "reasons")}
    loss = values.get("loss")
    if metrics.keys() <= {"n"}:  # of a task that is measured by its loss alone, which is a metric too
        metrics["loss"] = loss
    return {"metrics": metrics, "loss": loss, "reasons": dict(values.get("reasons", {}))}


def _convert_progress(row: Row) -> Row:
    return row | {"activity": ACTIVITIES.get(row["activity"], row["activity"])}


def _convert_artifact(row: Row) -> Row:
    kind = ARTIFACT_KINDS[row["kind"]]
    if kind == ArtifactKind.IMAGE_STATISTICS:
        content = {name: convert_image_statistic(statistic) for name, statistic in row["content"].items()}
    else:
        content = convert_cross_site(row["content"])
    return row | {"kind": kind, "content": content}


def convert_image_statistic(statistic: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image statistic of 0.1.0 in the form of `server.run.records.ImageStatistic`."""
    return {("bin_edges" if name == "edges" else name): value for name, value in statistic.items()}


def convert_cross_site(matrix: Mapping[str, Any]) -> dict[str, Any]:
    """Return cross-site scores of 0.1.0 in the form of `server.run.records.CrossSiteScores`."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for task, scores_by_model in matrix["tasks"].items():
        tasks[task] = {}
        for trained_at, scores in scores_by_model.items():
            tasks[task][trained_at] = {c: convert_centre_scores(values) for c, values in scores.items()}
    return {**matrix, "tasks": tasks}


@dataclass(frozen=True)
class OldTable:
    """A table of 0.1.0, and how its rows become those of today's table."""

    name: str
    renamed_columns: dict[str, str] = field(default_factory=dict)  # {name today: name in 0.1.0}
    new_columns: tuple[str, ...] = ()  # which 0.1.0 did not have
    convert: Callable[[Row], Row] = _keep_row  # of a row whose columns have today's names


_RUN = {"run_id": "run"}
OLD_TABLES = {  # {table's name today: ...}
    "runs": OldTable("runs", {"code_fingerprint": "code"}, ("parent_run_id",), _convert_run),
    "events": OldTable("events", _RUN, ("code",)),
    "centres": OldTable("centres", _RUN | {"metadata": "facts"}),
    "rounds": OldTable("rounds", _RUN | {"close_reason": "closed_because"}),
    "contributions": OldTable("contributions", _RUN, ("code", "clip_norm")),
    "group_weights": OldTable(
        "shares",
        _RUN | {"group": "part", "effective_centres": "effective", "centre_weights": "weights"},
    ),
    "scores": OldTable("scores", _RUN | {"summaries": "views"}, convert=_convert_scores),
    "progress": OldTable(
        "progress",
        _RUN | {"activity": "doing", "asked_centres": "asked"},
        ("code",),
        _convert_progress,
    ),
    "audit": OldTable(
        "audit",
        _RUN
        | {
            "actor": "who",
            "action": "what",
            "reason": "why",
            "previous_hash": "previous",
            "entry_hash": "hash",
        },
    ),
    "accounts": OldTable("accounts", {"password_hash": "password"}),
    "artifacts": OldTable("evidence", _RUN | {"content": "body"}, convert=_convert_artifact),
}
