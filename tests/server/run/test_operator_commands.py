"""Operators' commands to a run in progress, and the audit trail that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import load_file

from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from common.utils.errors import ConsiliumError, RefusalCode
from server.ledger import tables
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run import operator_commands
from server.run.operator_commands import excluded_centres, issue_command
from server.run.transport import ReceivedReply
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(autouse=True)
def poll_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_commands, "POLL_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def test_paused_stopped_and_resumed_run_has_the_same_weights(phantom: Path, tmp_path: Path) -> None:
    """`pause` takes effect after the round, `stop` at once; the resumed run obeys neither again."""
    ledger = open_ledger(tmp_path)
    commands = {1: "pause", 2: "stop"}  # by round

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and centre == "east" and request.round in commands:
            issue_command(ledger, "anna", commands.pop(request.round), "the scanner is moved", "r")
        return reply

    config = phantom_config(phantom)
    with pytest.raises(ConsiliumError, match="is paused: by order of anna: the scanner is moved"):
        start_run(config, InProcess(sites(), hook), tmp_path, ledger, "r")
    assert [row["round"] for row in ledger.read_rounds("r")] == [0, 1]
    with pytest.raises(ConsiliumError, match="is paused: there is nothing to stop"):
        issue_command(ledger, "anna", "stop", "", "r")
    with pytest.raises(ConsiliumError, match="is stopped: by order of anna"):
        resume_run("r", InProcess(sites(), hook), tmp_path, ledger)
    assert [row["round"] for row in ledger.read_rounds("r")] == [0, 1]
    resume_run("r", InProcess(sites(), hook), tmp_path, ledger)
    kinds = [event["kind"] for event in ledger.read_events("r")]
    assert kinds == ["started", "paused", "resumed", "stopped", "resumed", "finished"]
    start_run(config, InProcess(sites()), tmp_path, ledger, "whole")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "r" / "model.safetensors")[name], tensor)


def test_excluded_centre_is_not_waited_for(phantom: Path, tmp_path: Path) -> None:
    """West is silent in round 1 until it is excluded; after its readmission it trains in round 3."""
    ledger = open_ledger(tmp_path)

    class WestIsSilent(InProcess):
        def send_and_receive(
            self, requests: Mapping[str, Request], timeout: float
        ) -> Iterator[ReceivedReply | None]:  # type: ignore[override]
            first = next(iter(requests.values()))
            if isinstance(first, TrainRequest) and first.round == 1:
                others = {centre: request for centre, request in requests.items() if centre != "west"}
                yield from super().send_and_receive(others, timeout)
                issue_command(ledger, "ben", "exclude", "its line is down", "r", "west")
                yield None
                raise AssertionError("waited for an excluded centre")
            if isinstance(first, TrainRequest) and first.round == 3:
                assert list(requests) == ["north", "east", "south", "west"]
            yield from super().send_and_receive(requests, timeout)

    def readmit_in_round_2(centre: str, request: Request, reply: Reply) -> Reply:
        is_round_2 = isinstance(request, TrainRequest) and request.round == 2
        if is_round_2 and isinstance(reply, TrainReply) and centre == "south":
            issue_command(ledger, "ben", "readmit", "it is back", "r", "west")
        return reply

    transport = WestIsSilent(sites(), readmit_in_round_2)
    result = start_run(phantom_config(phantom, "stage.rounds=3"), transport, tmp_path, ledger, "r")
    weighted = [set(record.weights["backbone"]) for record in result.stages[0].rounds[1:]]
    others = {"north", "east", "south"}
    assert weighted == [others, others, {*others, "west"}]
    assert [left.code for left in result.left_out] == [RefusalCode.EXCLUDED]
    events = [(event["kind"], event["centre"]) for event in ledger.read_events("r")]
    assert events == [
        ("started", None),
        ("exclude", "west"),
        ("left_out", "west"),
        ("readmit", "west"),
        ("finished", None),
    ]
    progress = tables.progress.c
    query = sa.select(tables.progress).where(progress.activity == "train", progress.round == 2)
    assert len(ledger.read(query)) == 1 + 3  # the request, and the replies


@pytest.mark.parametrize(
    ("action", "run_id", "centre", "reason"),
    [
        ("pause", "q", "", "has no run 'q'"),
        ("exclude", "r", "west", "has no centre 'west'"),
        ("readmit", "r", "north", "'north' is not excluded"),
    ],
)
def test_impossible_commands_are_refused(
    tmp_path: Path, action: str, run_id: str, centre: str, reason: str
) -> None:
    ledger = ledger_with_run(tmp_path)
    with pytest.raises(ConsiliumError, match=reason):
        issue_command(ledger, "anna", action, "", run_id, centre)


def test_last_centre_cannot_be_excluded(tmp_path: Path) -> None:
    ledger = ledger_with_run(tmp_path)
    issue_command(ledger, "anna", "exclude", "scanner", "r", "north")
    with pytest.raises(ConsiliumError, match="last centre"):
        issue_command(ledger, "anna", "exclude", "", "r", "south")
    with pytest.raises(ConsiliumError, match="'north' is already excluded"):
        issue_command(ledger, "anna", "exclude", "", "r", "north")
    assert excluded_centres(ledger.read_audit("r")) == {"north": "anna: scanner"}


def ledger_with_run(folder: Path) -> Ledger:
    """A ledger with a run of two centres."""
    ledger = open_ledger(folder)
    config = {"federation": {"centres": ["north", "south"]}}
    ledger.add_run("r", recipe="m", mode="federated", config=config, code_fingerprint="")
    return ledger


def test_changed_audit_trail_is_detected(tmp_path: Path) -> None:
    """Also when the owner of the database has removed the triggers before."""
    ledger = open_ledger(tmp_path)
    for k in range(4):
        ledger.log_audit("anna", "login", f"{k}")
    assert first_broken_link(ledger.read_audit()) is None
    with pytest.raises(ConsiliumError, match="append-only"), ledger.transaction() as database:
        database.execute(sa.text("UPDATE audit SET reason = 'x' WHERE id = 2"))
    with ledger.transaction() as database:
        database.execute(sa.text('DROP TRIGGER "audit_no_UPDATE"'))
        database.execute(sa.text("UPDATE audit SET reason = 'x' WHERE id = 2"))
    assert first_broken_link(ledger.read_audit()) == 2
    with ledger.transaction() as database:
        database.execute(sa.text("UPDATE audit SET reason = '1' WHERE id = 2"))
        database.execute(sa.text('DROP TRIGGER "audit_no_DELETE"'))
        database.execute(sa.text("DELETE FROM audit WHERE id = 3"))
    assert first_broken_link(ledger.read_audit()) == 4
