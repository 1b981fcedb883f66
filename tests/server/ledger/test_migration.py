"""A ledger of version 0.1.0 is refused, and loses nothing when it is migrated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from common.utils.errors import ConsiliumError
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.ledger.migration import migrate_ledger
from server.run.records import (
    CentreScores,
    TaskScores,
    WorstCentre,
    parse_cross_site,
    parse_image_statistics,
    parse_task_scores,
)
from tests.server.ledger.ledger_0_1_0 import RUN_ID, TIME, make_old_ledger, schema


@pytest.fixture(params=["sqlite", "postgresql"])
def old_address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    address = f"sqlite:///{tmp_path}/old.db"
    if request.param == "postgresql":
        address = request.getfixturevalue("postgresql")
    engine = sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:"))
    make_old_ledger(engine)
    yield address
    schema.drop_all(engine)  # the next test has the same PostgreSQL database
    engine.dispose()


@pytest.fixture
def migrated(old_address: str, tmp_path: Path) -> Ledger:
    address = f"sqlite:///{tmp_path}/new.db"
    assert migrate_ledger(old_address, address) == 16
    return Ledger(address)


def test_an_old_ledger_is_refused_with_the_command_that_migrates_it(old_address: str) -> None:
    with pytest.raises(ConsiliumError, match=r"written by version 0\.1\.0; .*consilium-server upgrade"):
        Ledger(old_address)


def test_run_rounds_and_contributions_are_migrated(migrated: Ledger) -> None:
    (run,) = migrated.read_runs()
    assert (run["id"], run["parent_run_id"], run["status"]) == (RUN_ID, "study", "finished")
    assert (run["created"], run["code_fingerprint"]) == (TIME, "abc")
    assert run["config"]["tasks"] == {"covid": {"type": "binary"}}
    assert run["config"]["federation"]["round_timeout"] == 60.0
    assert run["config"]["federation"]["held_out_centres"] == ["south"]
    assert [event["kind"] for event in migrated.read_events(RUN_ID)] == ["started", "left_out", "finished"]
    assert migrated.read_centres(RUN_ID)[0]["metadata"] == {"device": "cpu"}
    (round_row,) = migrated.read_rounds(RUN_ID)
    assert (round_row["started"], round_row["close_reason"]) == (TIME, "all replied")
    (contribution,) = migrated.read_contributions(RUN_ID)
    assert (contribution["accepted"], contribution["scans"], contribution["epsilon"]) == (True, 30, 1.5)
    assert (contribution["bytes_up"], contribution["code"]) == (5_000_000_000, None)
    (weights,) = migrated.read_group_weights(RUN_ID)
    assert (weights["group"], weights["effective_centres"]) == ("backbone", 1.0)
    assert weights["centre_weights"] == {"north": 1.0}


def test_scores_are_migrated_to_records(migrated: Ledger) -> None:
    covid, moco = map(parse_task_scores, migrated.read_scores(RUN_ID))
    assert covid == TaskScores(
        centres={
            "north": CentreScores({"n": 30.0, "auc": 0.9}, loss=0.4),
            "south": CentreScores({"n": 9.0, "auc": None}, loss=0.6, reasons={"auc": "one class only"}),
        },
        macro={"auc": 0.9},
        pooled={"n": 39.0, "auc": 0.8},
        worst={"auc": WorstCentre(0.9, "north")},
        spread={"auc": 0.0},
        challenge_score=0.7,
    )
    assert moco.centres["north"] == CentreScores({"n": 9.0, "loss": 1.5}, loss=1.5)
    assert moco.challenge_score is None


def test_artifacts_are_migrated_to_records(migrated: Ledger) -> None:
    artifacts = migrated.read_artifacts(RUN_ID)
    area = parse_image_statistics(artifacts["image_statistics"])["area"]
    assert (area.bin_edges, area.centres) == ([0.0, 1.0, 2.0], {"north": [0.5, 0.5]})
    cross_site = parse_cross_site(artifacts["cross_site"])
    assert cross_site.tasks["covid"]["north"]["north"] == CentreScores({"n": 30.0, "auc": 0.9}, loss=0.4)


def test_the_audit_trail_still_verifies_and_goes_on(migrated: Ledger) -> None:
    migrated.log_audit("ada", "stop", "the scanner moves", "study")
    entries = migrated.read_audit("study")
    assert [(entry["actor"], entry["action"]) for entry in entries] == [
        ("ada", "pause"),
        ("ada", "resume"),
        ("ada", "stop"),
    ]
    assert first_broken_link(migrated.read_audit()) is None
    assert migrated.read_accounts()[0]["password_hash"] == "$argon2id$"


def test_a_forged_entry_of_the_old_trail_is_still_found(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/old.db")
    make_old_ledger(engine)
    with engine.begin() as connection:
        audit = schema.tables["audit"]
        connection.execute(audit.update().where(audit.c.id == 2).values(who="eve"))
    engine.dispose()
    migrate_ledger(f"sqlite:///{tmp_path}/old.db", f"sqlite:///{tmp_path}/new.db")
    assert first_broken_link(Ledger(f"sqlite:///{tmp_path}/new.db").read_audit()) == 2


def test_ids_go_on_after_a_migration_to_postgresql(postgresql: str, tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/old.db")
    make_old_ledger(engine)
    engine.dispose()
    migrate_ledger(f"sqlite:///{tmp_path}/old.db", postgresql)
    ledger = Ledger(postgresql)
    ledger.log_event(RUN_ID, "resumed")
    assert [event["id"] for event in ledger.read_events(RUN_ID)] == [1, 2, 3, 4]


def test_a_migration_is_refused_without_an_old_ledger_or_onto_a_filled_one(tmp_path: Path) -> None:
    new_address = f"sqlite:///{tmp_path}/new.db"
    with pytest.raises(ConsiliumError, match="there is no ledger at"):
        migrate_ledger(f"sqlite:///{tmp_path}/old.db", new_address)
    assert not (tmp_path / "old.db").exists()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/old.db")
    make_old_ledger(engine)
    engine.dispose()
    migrate_ledger(f"sqlite:///{tmp_path}/old.db", new_address)
    with pytest.raises(ConsiliumError, match="has rows already"):
        migrate_ledger(f"sqlite:///{tmp_path}/old.db", new_address)
    with pytest.raises(ConsiliumError, match="nothing is to be migrated"):
        migrate_ledger(new_address, f"sqlite:///{tmp_path}/other.db")
    assert len(Ledger(new_address).read_events(RUN_ID)) == 3
