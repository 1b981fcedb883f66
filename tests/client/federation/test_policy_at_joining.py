"""What a hospital's policy decides when a run asks it to join: hours, sources, and what it says aloud."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

import client.data.loading
from client.cli import app
from client.data.loading import clear_dataset_cache
from client.federation import handlers
from client.federation.handlers import handle_request
from client.tools.doctor import run_checks
from common.config.parse import config_to_dict
from common.protocol.messages import JoinReply, JoinRequest, Refusal
from common.utils.errors import RefusalCode
from tests.client.hospital import hospital as hospital
from tests.client.hospital import hospital_copy as hospital_copy
from tests.client.hospital import make_config, make_site, refusal_reason, set_columns


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: object = None) -> Noon:
        return cls(2026, 1, 1, 12, 0)


def write_policy(folder: Path, text: str) -> str:
    (folder / "policy.yaml").write_text(text)
    return str(folder / "policy.yaml")


def join_request(*overrides: str) -> JoinRequest:
    return JoinRequest("run", config_to_dict(make_config(*overrides)))


def test_no_scan_is_read_outside_the_hours(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a scan was read")

    monkeypatch.setattr(handlers, "datetime", Noon)
    monkeypatch.setattr(client.data.loading, "preprocess_cohort", fail)
    clear_dataset_cache()
    site = make_site(
        hospital, state=str(tmp_path / "state"), policy=write_policy(tmp_path, "allowed_hours: 19:00-07:00\n")
    )
    reply = handle_request(site, join_request())
    assert "it takes part again from 19:00 on" in refusal_reason(reply)
    assert isinstance(reply, Refusal)
    assert (reply.centre, reply.code, reply.permanent) == ("north", RefusalCode.POLICY, False)


def test_names_of_sources_stay_where_the_policy_does_not_list_the_column(
    hospital_copy: Path, tmp_path: Path
) -> None:
    set_columns(hospital_copy, source="Ward 7, Dr Doe")
    clear_dataset_cache()
    listed = make_site(hospital_copy, policy=write_policy(tmp_path, "allowed_labels: [covid, source]\n"))
    request = join_request("stage.tasks=[covid]")
    reply = handle_request(listed, request)
    assert isinstance(reply, JoinReply), reply
    assert reply.sources == ["Ward 7, Dr Doe"]
    unlisted = make_site(hospital_copy, policy=write_policy(tmp_path, "allowed_labels: [covid]\n"))
    reply = handle_request(unlisted, request)
    assert isinstance(reply, JoinReply), reply
    assert reply.sources == ["north"]
    assert "Doe" not in repr(reply)


def test_source_that_is_no_plain_text_does_not_leave(hospital_copy: Path) -> None:
    set_columns(hospital_copy, source="../../etc\x1b[2J")
    clear_dataset_cache()
    reason = refusal_reason(handle_request(make_site(hospital_copy), join_request("stage.tasks=[covid]")))
    assert "a source whose name cannot be sent" in reason


def test_what_a_policy_leaves_open_is_said_in_the_log_the_command_and_the_check(
    hospital: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = write_policy(tmp_path, "min_cell_count: 5\n")
    site = make_site(hospital, state=str(tmp_path / "state"), policy=policy)
    with caplog.at_level(logging.WARNING):
        assert isinstance(handle_request(site, join_request()), JoinReply)
    assert "policy: any recipe is allowed" in caplog.text
    printed = CliRunner().invoke(app, ["policy", policy])
    assert "WARNING: any recipe is allowed" in printed.output
    site_file = tmp_path / "site.yaml"
    site_file.write_text(
        f"centre: north\ndata: '{hospital}'\nstate: {tmp_path / 'state'}\npolicy: {policy}\n"
    )
    results = list(run_checks(site_file, "", tmp_path / "ca.crt", tmp_path / "key"))
    warnings = [result.message for result in results if result.level == "warning"]
    assert any("policy: any recipe is allowed" in message for message in warnings)
    write_policy(tmp_path, "require_approval: true\n")
    results = list(run_checks(site_file, "", tmp_path / "ca.crt", tmp_path / "key"))
    assert any("approvals: none holds" in result.message for result in results)
    assert not any("any recipe" in result.message for result in results)
