"""Triggers in the database itself that refuse every change of a row, whatever program asks for it.

An owner of the database can drop them; a ledger that lacks one gets it again when it is opened, and the log
says so.
"""

from __future__ import annotations

import sqlalchemy as sa

from server.ledger import tables

APPEND_ONLY_ERROR = "the ledger is append-only"
_POSTGRESQL_FUNCTION = f"""
CREATE OR REPLACE FUNCTION consilium_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '{APPEND_ONLY_ERROR}'; END $$
"""
_POSTGRESQL_TRIGGER = """
CREATE TRIGGER {name} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION consilium_refuse()
"""
_SQLITE_TRIGGER = f"""
CREATE TRIGGER {{name}} {{event}} ON {{table}}
WHEN {{condition}}
BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY_ERROR}'); END
"""


def protect_tables(connection: sa.Connection) -> list[str]:
    """Create the triggers that the ledger's tables lack; return their names."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(_POSTGRESQL_FUNCTION))
        query = sa.text(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(:table) AND tgenabled <> 'D'"
        )
    else:
        query = sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :table")
    created = []
    for table in tables.schema.tables.values():
        existing = set(connection.scalars(query, {"table": table.name}))
        for name, statement in _list_triggers(table, connection.dialect.name).items():
            if name not in existing:
                connection.exec_driver_sql(statement)
                created.append(name)
    return created


def _list_triggers(table: sa.Table, dialect: str) -> dict[str, str]:
    """Return {name: statement that creates it} of a table's triggers."""
    if dialect == "postgresql":
        name = f"{table.name}_append_only"
        return {name: _POSTGRESQL_TRIGGER.format(name=name, table=table.name)}
    conditions = {
        ("UPDATE", "BEFORE UPDATE"): "TRUE",
        ("DELETE", "BEFORE DELETE"): "TRUE",
        # INSERT OR REPLACE deletes the rows with the same key without firing the triggers of DELETE.
        ("REPLACE", "BEFORE INSERT"): _key_exists(table),
        # A number between two others would put a row into the past. A number that is not set is -1 before the
        # insertion, so that a row of this number would block all others.
        ("BACKDATING", "AFTER INSERT"): (
            f"NEW.rowid < 1 OR NEW.rowid < (SELECT max(rowid) FROM {table.name})"
        ),
    }
    triggers = {}
    for (verb, event), condition in conditions.items():
        name = f"{table.name}_no_{verb}"
        triggers[name] = _SQLITE_TRIGGER.format(name=name, event=event, table=table.name, condition=condition)
    return triggers


def _key_exists(table: sa.Table) -> str:
    """Return SQLite's condition that a row has the number or a unique key of the new one."""
    keys = [["rowid"]]  # also of a table whose primary key is a text
    for constraint in table.constraints:
        if isinstance(constraint, (sa.PrimaryKeyConstraint, sa.UniqueConstraint)):
            keys.append([column.name for column in constraint.columns])
    conditions = []
    for key in keys:
        is_same = " AND ".join(f'"{column}" = NEW."{column}"' for column in key)
        conditions.append(f"EXISTS (SELECT 1 FROM {table.name} WHERE {is_same})")
    return " OR ".join(conditions)
