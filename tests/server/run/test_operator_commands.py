"""Orders to a run in progress, and the trail that they are written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors.numpy import load_file

from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run import operator_commands
from server.run.operator_commands import excluded_centres, first_broken_link, issue_command
from server.run.transport import ReceivedReply
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_commands, "POLL_INTERVAL", 0.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def test_paused_and_resumed_by_order_gives_the_same_weights(phantom: Path, tmp_path: Path) -> None:
    """`pause` ends with its round, `stop` at once; neither is obeyed again by the resumed run, whose weights are those of one left alone."""
    ledger = open_ledger(tmp_path)
    given: list[str] = []

    def order(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and centre == "east" and f"round {request.round}" not in given:
            given.append(f"round {request.round}")
            issue_command(ledger, "anna", {1: "pause", 2: "stop"}[request.round], "the scanner is moved", "r")
        return reply

    config = phantom_config(phantom)
    with pytest.raises(ConsiliumError, match="is paused: by order of anna: the scanner is moved"):
        start_run(config, InProcess(sites(), order), tmp_path, ledger, "r")
    assert [row["round"] for row in ledger.read_rounds("r")] == [0, 1]
    with pytest.raises(ConsiliumError, match="is paused: there is nothing to stop"):
        issue_command(ledger, "anna", "stop", "", "r")
    with pytest.raises(ConsiliumError, match="is stopped: by order of anna"):
        resume_run("r", InProcess(sites(), order), tmp_path, ledger)
    assert [row["round"] for row in ledger.read_rounds("r")] == [0, 1]
    resume_run("r", InProcess(sites(), order), tmp_path, ledger)
    assert [e["kind"] for e in ledger.read_events("r")] == [
        "started",
        "paused",
        "resumed",
        "stopped",
        "resumed",
        "finished",
    ]
    start_run(config, InProcess(sites()), tmp_path, ledger, "whole")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "r" / "model.safetensors")[name], tensor)


def test_who_is_excluded_is_not_waited_for(phantom: Path, tmp_path: Path) -> None:
    """West never answers in round 1: excluded, the round closes without it and its quorum; readmitted, it takes part in round 3."""
    ledger = open_ledger(tmp_path)

    class Silent(InProcess):
        def send_and_receive(
            self, requests: Mapping[str, Request], timeout: float
        ) -> Iterator[ReceivedReply | None]:  # type: ignore[override]
            first = next(iter(requests.values()))
            if isinstance(first, TrainRequest) and first.round == 1:
                yield from super().send_and_receive(
                    {c: r for c, r in requests.items() if c != "west"}, timeout
                )
                issue_command(ledger, "ben", "exclude", "its line is down", "r", "west")
                yield None
                raise AssertionError("waited for an excluded centre")
            if isinstance(first, TrainRequest) and first.round == 3:
                assert list(requests) == ["north", "east", "south", "west"]
            yield from super().send_and_receive(requests, timeout)

    def back(centre: str, request: Request, reply: Reply) -> Reply:
        if (
            isinstance(request, TrainRequest)
            and request.round == 2
            and isinstance(reply, TrainReply)
            and centre == "south"
        ):
            issue_command(ledger, "ben", "readmit", "it is back", "r", "west")
        return reply

    result = start_run(
        phantom_config(phantom, "stage.rounds=3"), Silent(sites(), back), tmp_path, ledger, "r"
    )
    shares = [set(r["weights"]["backbone"]) for r in result["stages"][0]["rounds"][1:]]
    assert shares == [
        {"north", "east", "south"},
        {"north", "east", "south"},
        {"north", "east", "south", "west"},
    ]
    told = [(e["kind"], e["centre"]) for e in ledger.read_events("r")]
    assert told == [
        ("started", None),
        ("exclude", "west"),
        ("left_out", "west"),
        ("readmit", "west"),
        ("finished", None),
    ]
    with ledger._transaction(read=True) as database:
        rows = database.execute(
            sa.text("SELECT doing, round, asked, centre FROM progress WHERE doing = 'train' AND round = 2")
        ).all()
    assert len(rows) == 1 + 3


def test_orders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    federation = {"centres": ["north", "south"]}
    ledger.add_run("r", recipe="m", mode="federated", config={"federation": federation}, code="")
    for what, run, centre, why in (
        ("pause", "q", "", "knows no run 'q'"),
        ("exclude", "r", "west", "has no centre 'west'"),
        ("readmit", "r", "north", "'north' is not excluded"),
    ):
        with pytest.raises(ConsiliumError, match=why):
            issue_command(ledger, "anna", what, "", run, centre)
    issue_command(ledger, "anna", "exclude", "scanner", "r", "north")
    with pytest.raises(ConsiliumError, match="last centre"):
        issue_command(ledger, "anna", "exclude", "", "r", "south")
    assert excluded_centres(ledger.read_audit("r")) == {"north": "anna: scanner"}


def test_a_changed_trail_shows(tmp_path: Path) -> None:
    """Also where somebody who owns the database took the triggers away first."""
    ledger = open_ledger(tmp_path)
    for k in range(4):
        ledger.log_audit("anna", "login", f"{k}")
    assert first_broken_link(ledger.read_audit()) is None
    with pytest.raises(ConsiliumError, match="append-only"), ledger._transaction() as database:
        database.execute(sa.text("UPDATE audit SET why = 'x' WHERE id = 2"))
    with ledger._transaction() as database:
        database.execute(sa.text('DROP TRIGGER "audit_no_UPDATE"'))
        database.execute(sa.text("UPDATE audit SET why = 'x' WHERE id = 2"))
    assert first_broken_link(ledger.read_audit()) == 2
    with ledger._transaction() as database:
        database.execute(sa.text("UPDATE audit SET why = '1' WHERE id = 2"))
        database.execute(sa.text('DROP TRIGGER "audit_no_DELETE"'))
        database.execute(sa.text("DELETE FROM audit WHERE id = 3"))
    assert first_broken_link(ledger.read_audit()) == 4
