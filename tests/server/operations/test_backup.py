"""Backed up while a run is on, restored elsewhere, resumed there.

The same weights. On SQLite and on a real PostgreSQL, from each to the other.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import load_file

from common.protocol.messages import Reply, Request, TrainRequest
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.ledger.tables import schema
from server.operations.backup import link_runs, restore_backup, write_backup
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run import checkpoint
from server.run.records import RoundRecord, RunResult, StageRecord
from tests.in_process_federation import InProcess, phantom_config, sites


class Lost(Exception):
    """The coordinator's machine is."""


@pytest.mark.parametrize("way", ["from SQLite to PostgreSQL", "from PostgreSQL to SQLite"])
def test_run_backed_up_in_a_round_is_resumed_elsewhere(way: str, postgresql: str, tmp_path: Path) -> None:
    """The backup is made while the third of four rounds is trained.

    The machine is lost a round later; the other one repeats the third.
    """
    config = phantom_config(tmp_path, "stage.rounds=4", "aggregation=fedadam")
    start_run(config, InProcess(sites()), tmp_path / "whole", open_ledger(tmp_path / "whole"), "r")
    old, new, file = tmp_path / "old", tmp_path / "new", tmp_path / "back-up.tar"
    addresses = [f"sqlite:///{tmp_path}/ledger.db", postgresql]
    was, now = (
        Ledger(address) for address in (addresses if way.startswith("from SQLite") else reversed(addresses))
    )

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and request.round == 4:
            raise Lost
        if isinstance(request, TrainRequest) and (centre, request.round) == ("east", 3):
            said.extend(write_backup(file, old, was))
        return reply

    said: list[str] = []
    was.add_account("ada", "operator", None)
    was.log_audit("ada", "start", "a trial")
    with pytest.raises(Lost):
        start_run(config, InProcess(sites(), hook), old, was, "r")
    assert said[0] == "run r: can be resumed after round 2 of stage 'main'"
    assert file.stat().st_mode & 0o777 == 0o600
    assert said[0] in list(restore_backup(file, new, now))
    assert now.read_status("r") == "started"
    assert [row["round"] for row in now.read_rounds("r")] == [0, 1, 2]
    for table in schema.sorted_tables:
        if table.name == "schema_version":
            continue  # each ledger says its own
        rows, copied = (ledger.read(sa.select(table).order_by(table.c.id)) for ledger in (was, now))
        assert copied == rows[: len(copied)]
        assert bool(copied) == bool(rows), table.name
    assert now.read(
        sa.select(schema.tables["progress"].c.id).where(schema.tables["progress"].c.asked_centres.is_(None))
    )  # null is null again
    resume_run("latest", InProcess(sites()), new, now)
    assert now.read_status("r") == "finished"
    assert [row["round"] for row in now.read_rounds("r")] == [0, 1, 2, 3, 4]  # its own numbers went on
    found, whole = (
        load_file(new / "r" / "model.safetensors"),
        load_file(tmp_path / "whole" / "r" / "model.safetensors"),
    )
    for name, tensor in whole.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    with pytest.raises(ConsiliumError, match="already holds runs"):
        list(restore_backup(file, new, now))


def test_damaged_backup_is_refused(tmp_path: Path) -> None:
    """One bit, or the end, missing: nothing is restored."""
    runs = tmp_path / "runs"
    write_round(runs, 0)
    ledger = open_ledger(runs)
    with pytest.raises(ConsiliumError, match="knows no run in"):  # of another coordinator
        list(write_backup(tmp_path / "whole.tar", runs, ledger))
    ledger.add_run("r", recipe="multisource", mode="federated", config={}, code_fingerprint="")
    list(write_backup(tmp_path / "whole.tar", runs, ledger))
    whole = (tmp_path / "whole.tar").read_bytes()
    at = whole.index(b"\x11\x22\x33\x44")  # in the weights
    for number, damaged in enumerate([whole[:at] + b"\x10" + whole[at + 1 :], whole[: at - 600], b"no tar"]):
        (tmp_path / "damaged.tar").write_bytes(damaged)
        there = tmp_path / f"new{number}"
        with pytest.raises(ConsiliumError, match=r"damaged\.tar is not an intact back-up"):
            list(restore_backup(tmp_path / "damaged.tar", there, open_ledger(there)))
        assert {path.name.partition("-")[0] for path in there.iterdir()} == {"ledger.db"}
    told = list(restore_backup(tmp_path / "whole.tar", tmp_path / "new", open_ledger(tmp_path / "new")))
    assert told == ["run r: can be resumed after round 0 of stage 'main'", "1 runs and 2 rows of the ledger"]


def test_backup_between_two_checkpoints_has_a_whole_one(tmp_path: Path) -> None:
    """However fast rounds close, what is linked meanwhile has a whole checkpoint, the newest of then."""
    runs, over = tmp_path / "runs", threading.Event()

    def close_rounds() -> None:
        number = 0
        while not over.is_set():
            number += 1
            write_round(runs, number)

    write_round(runs, 0)
    thread = threading.Thread(target=close_rounds)
    thread.start()
    try:
        for number in range(10):
            before = checkpoint.load_latest(runs / "r")
            link_runs(runs, tmp_path / f"at{number}")
            found = checkpoint.load_latest(tmp_path / f"at{number}" / "r")
            assert before is not None
            assert found is not None
            assert found.recovery_note == ""
            assert found.round >= before.round
            assert (found.weights["w"] == found.round + 0x44332211).all()
    finally:
        over.set()
        thread.join()


def write_round(runs: Path, round_number: int) -> None:
    """Write a round's checkpoint of a run in progress."""
    (runs / "r").mkdir(parents=True, exist_ok=True)
    (runs / "r" / "config.yaml").touch()
    rounds = [RoundRecord(number) for number in range(round_number + 1)]
    result = RunResult(
        "r", "multisource", "federated", 1, "", {}, stages=[StageRecord("main", rounds=rounds)]
    )
    weights = {"w": np.full(3, round_number + 0x44332211)}
    checkpoint.write_checkpoint(runs / "r", checkpoint.Checkpoint("main", round_number, weights, result))
