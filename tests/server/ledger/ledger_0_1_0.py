"""A ledger as version 0.1.0 made it: its tables, and a run with a row in each of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from common.utils.hash_chain import GENESIS_HASH, append_hash

TIME = datetime(2026, 4, 3, 12, 0, tzinfo=UTC)
RUN_ID = "study-without-south"
OLD_SCORES = {
    "north": {"n": 30.0, "auc": 0.9, "loss": 0.4, "reasons": {}},
    "south": {"n": 9.0, "auc": None, "loss": 0.6, "reasons": {"auc": "one class only"}},
}
OLD_SUMMARIES = {
    "macro": {"auc": 0.9},
    "pooled": {"n": 39.0, "auc": 0.8},
    "worst": {"auc": {"value": 0.9, "centre": "north"}},
    "spread": {"auc": 0.0},
    "challenge_score": 0.7,
}
schema = sa.MetaData()


def _define_run_table(name: str, *columns: sa.Column[Any]) -> None:
    sa.Table(
        name,
        schema,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run", sa.ForeignKey("runs.id"), nullable=False),
        *columns,
    )


def _time(name: str = "time") -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _round_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("stage", sa.String),
        sa.Column("round", sa.Integer),
        sa.Column("attempt", sa.Integer),
    ]


def _text_columns(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.String) for name in names]


def _json_columns(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.JSON(none_as_null=True)) for name in names]


def _number_columns(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.Float) for name in names]


sa.Table(
    "runs",
    schema,
    sa.Column("id", sa.String, primary_key=True),
    _time("created"),
    *_text_columns("recipe", "mode"),
    *_json_columns("config"),
    *_text_columns("code"),
)
_define_run_table("events", _time(), *_text_columns("kind", "centre", "detail"))
_define_run_table("centres", _time(), *_text_columns("centre"), *_json_columns("facts"))
_define_run_table(
    "rounds",
    *_round_columns(),
    _time("started"),
    *_number_columns("seconds"),
    *_text_columns("closed_because"),
)
_define_run_table(
    "contributions",
    *_round_columns(),
    *_text_columns("centre"),
    sa.Column("accepted", sa.Boolean),
    *_text_columns("reason"),
    *_number_columns("scans", "steps", "norm", "loss", "epsilon", "seconds", "bytes_up", "bytes_down"),
)
_define_run_table(
    "shares",
    *_round_columns(),
    *_text_columns("part"),
    *_number_columns("effective"),
    *_json_columns("weights"),
)
_define_run_table(
    "scores", *_round_columns(), *_text_columns("split", "task"), *_json_columns("views", "centres")
)
_define_run_table(
    "progress",
    _time(),
    *_round_columns()[:2],
    *_text_columns("doing"),
    *_json_columns("asked"),
    *_text_columns("centre"),
    *_number_columns("seconds"),
    *_text_columns("reason"),
    *_number_columns("bytes_up", "bytes_down"),
)
sa.Table(
    "audit",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    _time(),
    *_text_columns("who", "what", "run", "centre", "why", "previous", "hash"),
)
sa.Table(
    "accounts",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    _time(),
    *_text_columns("name", "role", "password"),
)
_define_run_table("evidence", _time(), *_text_columns("kind"), *_json_columns("body"))


def make_old_ledger(engine: sa.Engine) -> None:
    """Create the tables and insert the run."""
    round_key = {"run": RUN_ID, "stage": "main", "round": 1, "attempt": 1}
    reply = {"scans": 30, "steps": 3, "norm": 0.5, "loss": 0.7, "epsilon": 1.5, "seconds": 1.5}
    traffic = {"bytes_up": 5_000_000_000, "bytes_down": 9}
    config = {
        "seed": 1,
        "tasks": {"covid": {"kind": "binary"}},
        "federation": {"centres": ["north", "south"], "deadline": 60.0, "fold": None, "unseen": ["south"]},
    }
    local_scores = {"north": {"north": OLD_SCORES["north"]}}
    histograms = {"name": "lung area", "unit": "", "edges": [0.0, 1.0, 2.0], "scans": {"north": 30.0}}
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": [
            {
                "id": RUN_ID,
                "created": TIME,
                "recipe": "multisource",
                "mode": "federated",
                "config": config,
                "code": "abc",
            }
        ],
        "events": [
            {"run": RUN_ID, "time": TIME, "kind": "started", "centre": None, "detail": ""},
            {
                "run": RUN_ID,
                "time": TIME,
                "kind": "left_out",
                "centre": "south",
                "detail": "no reply within 60 s",
            },
            {"run": RUN_ID, "time": TIME, "kind": "finished", "centre": None, "detail": ""},
        ],
        "centres": [{"run": RUN_ID, "time": TIME, "centre": "north", "facts": {"device": "cpu"}}],
        "rounds": [{**round_key, "started": TIME, "seconds": 2.5, "closed_because": "all replied"}],
        "contributions": [
            {**round_key, "centre": "north", "accepted": True, "reason": "", **reply, **traffic}
        ],
        "shares": [{**round_key, "part": "backbone", "effective": 1.0, "weights": {"north": 1.0}}],
        "scores": [
            {**round_key, "split": "val", "task": "covid", "views": OLD_SUMMARIES, "centres": OLD_SCORES},
            {
                **round_key,
                "split": "val",
                "task": "moco",
                "views": {
                    "macro": {"loss": 1.5},
                    "pooled": {"n": 9.0, "loss": 1.5},
                    "worst": {},
                    "spread": {},
                },
                "centres": {"north": {"n": 9.0, "loss": 1.5, "reasons": {}}},
            },
        ],
        "progress": [
            {"run": RUN_ID, "time": TIME, "stage": "", "round": 0, "doing": "meet", "asked": ["north"]},
        ],
        "audit": _chain_entries("pause", "resume"),
        "accounts": [{"time": TIME, "name": "ada", "role": "operator", "password": "$argon2id$"}],
        "evidence": [
            {
                "run": RUN_ID,
                "time": TIME,
                "kind": "quality",
                "body": {"area": {**histograms, "centres": {"north": [0.5, 0.5]}, "drift": {}}},
            },
            {
                "run": RUN_ID,
                "time": TIME,
                "kind": "matrix",
                "body": {"stage": "main", "round": 1, "split": "val", "tasks": {"covid": local_scores}},
            },
        ],
    }
    with engine.begin() as connection:
        schema.create_all(connection)
        for table_name, table_rows in rows.items():
            connection.execute(schema.tables[table_name].insert(), table_rows)


def _chain_entries(*actions: str) -> list[dict[str, Any]]:
    entries = []
    previous_hash = GENESIS_HASH
    for action in actions:
        entry = {
            "time": TIME.isoformat(),
            "who": "ada",
            "what": action,
            "run": "study",
            "centre": "",
            "why": "maintenance",
        }
        sealed = append_hash(entry, previous_hash)
        previous_hash = sealed["hash"]
        entries.append(sealed | {"time": TIME})
    return entries
