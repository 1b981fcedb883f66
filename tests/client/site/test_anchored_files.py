"""A budget or a log that was deleted, cut, rolled back or edited is refused until the loss is accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.federation.handlers import handle_request
from client.site import egress_log
from client.site.anchored_files import accept_loss
from client.site.config import Site, outer_anchor
from client.site.privacy_budget import PrivacyAccount, hash_patients, read_charges, record_charge
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.protocol.messages import JoinRequest, Refusal
from common.utils.errors import ConsiliumError, PermanentlyRefused, Refused
from common.utils.hash_chain import append_hash
from tests.client.site.charged_account import (
    CHARGE,
    REQUEST,
    expect_refusal,
    record_message,
    state_dir,
)


def test_deleted_budget_is_refused(account: PrivacyAccount) -> None:
    shutil.rmtree(account.folder)
    expect_refusal(account, "privacy budget is missing although it had 2 entries")


def test_budget_that_is_rolled_back_or_edited_is_refused(account: PrivacyAccount) -> None:
    path = account.folder / "spent.json"
    old = path.read_bytes()
    record_charge(account, CHARGE, REQUEST)
    new = path.read_bytes()
    edited = new.replace(b'"steps": 30', b'"steps": 3', 1)
    assert edited != new
    for content in (old, edited):
        path.write_bytes(content)
        expect_refusal(account, "privacy budget is not the one that was last written")
    path.write_bytes(new)  # the remedy: restore it
    assert len(read_charges(account)) == 3


def test_deleted_state_folder_is_noticed_by_the_outer_anchor(account: PrivacyAccount) -> None:
    shutil.rmtree(state_dir(account))
    expect_refusal(account, "egress log is missing although [0-9]+ lines were written")
    with pytest.raises(PermanentlyRefused, match="egress log is missing"):
        record_message(account)


def test_state_folder_of_an_older_backup_is_noticed_by_the_outer_anchor(
    account: PrivacyAccount, tmp_path: Path
) -> None:
    shutil.copytree(state_dir(account), tmp_path / "backup")
    record_charge(account, CHARGE, REQUEST)
    record_message(account)
    shutil.rmtree(state_dir(account))
    (tmp_path / "backup").rename(state_dir(account))
    expect_refusal(account, "egress log was cut")


@pytest.mark.parametrize("has_outer", [True, False])
def test_cut_log_is_refused_at_the_next_message(account: PrivacyAccount, has_outer: bool) -> None:
    """With the inner anchor removed too, the outer one notices, or else the log's own lines."""
    log = state_dir(account) / "egress.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PermanentlyRefused, match="was cut: the last of its"):
        record_message(account)
    with pytest.raises(ConsiliumError, match=f"was cut: 1 of {len(lines)} lines are missing"):
        list(egress_log.read_entries(state_dir(account), account.outer_anchor))
    shown = CliRunner().invoke(app, ["egress", str(state_dir(account)), "--verify"])
    assert "was cut: 1 of" in str(shown.exception)
    (state_dir(account) / "anchor.json").unlink()
    reason = "was cut: the last of its"
    if not has_outer:
        assert account.outer_anchor
        account.outer_anchor.unlink()
        reason = "anchors of the centre's egress log are missing"
    with pytest.raises(PermanentlyRefused, match=reason):
        record_message(account)


def test_rewritten_last_line_is_refused(account: PrivacyAccount) -> None:
    """Its hash is right, so only the anchors tell that another line was there."""
    log = state_dir(account) / "egress.jsonl"
    *lines, last = log.read_text().splitlines()
    values = json.loads(last)
    del values["hash"], values["previous"]
    forged = append_hash({**values, "run": "xx"}, json.loads(lines[-1])["hash"])
    log.write_text("\n".join([*lines, json.dumps(forged, sort_keys=True), ""]))
    with pytest.raises(PermanentlyRefused, match="was changed near line"):
        record_message(account)
    with pytest.raises(ConsiliumError, match="is not the one that was written"):
        list(egress_log.read_entries(state_dir(account)))


def test_half_written_last_line_is_repaired(account: PrivacyAccount) -> None:
    """A power failure cut it short before its message left; the complete lines are all there."""
    with (state_dir(account) / "egress.jsonl").open("ab") as log:
        log.write(b'{"bytes": 12, "da')
    assert len(read_charges(account)) == 2
    record_message(account)
    assert len(list(egress_log.read_entries(state_dir(account), account.outer_anchor))) == 3


# --- the way back


def test_accepted_loss_is_recorded_and_the_centre_goes_on(account: PrivacyAccount) -> None:
    shutil.rmtree(account.folder)
    losses = accept_loss(state_dir(account), account.outer_anchor)
    assert losses == ["budget/spent.json is missing or not the one that was last written"]
    assert read_charges(account) == ()
    assert record_charge(account, CHARGE, REQUEST) == (CHARGE,)
    record_message(account)
    lines = list(egress_log.read_lines(state_dir(account), account.outer_anchor))
    (accepted,) = [line for line in lines if line.kind == "loss accepted"]
    assert accepted.fields["files"]["budget/spent.json"]["entries"] == 2
    assert accept_loss(state_dir(account), account.outer_anchor) == []


@pytest.mark.parametrize("harm", ["state folder", "tail", "middle", "anchors", "damaged anchor"])
def test_every_loss_can_be_accepted(account: PrivacyAccount, harm: str) -> None:
    assert account.outer_anchor
    log = state_dir(account) / "egress.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    if harm == "state folder":
        shutil.rmtree(state_dir(account))
    elif harm == "tail":
        log.write_bytes(b"".join(lines[:2]))
    elif harm == "middle":
        log.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    elif harm == "anchors":
        (state_dir(account) / "anchor.json").unlink()
        account.outer_anchor.unlink()
    else:
        (state_dir(account) / "anchor.json").write_text("{")
    with pytest.raises(Refused):
        record_message(account)
    assert accept_loss(state_dir(account), account.outer_anchor)
    record_message(account)
    record_charge(account, CHARGE, REQUEST)
    kinds = [line.kind for line in egress_log.read_lines(state_dir(account), account.outer_anchor)]
    assert "loss accepted" in kinds
    if harm == "middle":  # the broken log is kept as evidence
        assert len(list(state_dir(account).glob("egress.broken.*.jsonl"))) == 1


def test_command_names_the_loss_and_asks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "site.yaml").write_text(f"centre: north\ndata: {data}\nstate: {tmp_path / 'state'}\n")
    site = Site("north", str(data), str(tmp_path / "state"))
    account = PrivacyAccount(
        tmp_path / "state" / "budget", hash_patients("abc"), outer_anchor=outer_anchor(site, data)
    )
    record_charge(account, CHARGE, REQUEST)
    shutil.rmtree(tmp_path / "state")
    words = ["accept-loss", "--site", str(tmp_path / "site.yaml")]
    declined = CliRunner().invoke(app, words, input="n\n")
    assert declined.exit_code == 1
    assert "egress log is missing although 2 lines were written" in declined.output
    with pytest.raises(PermanentlyRefused):
        record_charge(account, CHARGE, REQUEST)
    assert CliRunner().invoke(app, words, input="y\n").exit_code == 0
    record_charge(account, CHARGE, REQUEST)
    again = CliRunner().invoke(app, words)
    assert "nothing is lost" in again.output


# --- the place of the anchor


def test_anchor_lies_where_site_yaml_says_or_beside_the_data(tmp_path: Path) -> None:
    site = Site("north", str(tmp_path))
    assert outer_anchor(site, tmp_path) == tmp_path / ".consilium-anchor-north.json"
    assert outer_anchor(Site("a", anchor="/other"), tmp_path) == Path("/other/.consilium-anchor-a.json")
    assert outer_anchor(Site(), tmp_path) is None  # in simulation
    in_state = Site("a", state=str(tmp_path))
    assert outer_anchor(in_state, tmp_path / "cohort.csv") is None  # would be lost with the state folder


def test_message_of_a_hospital_writes_the_outer_anchor(tmp_path: Path) -> None:
    site = Site("north", str(tmp_path), str(tmp_path / "state"), device="cpu")
    request = JoinRequest(
        "new", config_to_dict(compose_config(["federation=folder", "federation.centres=[north]"]))
    )
    handle_request(site, request)
    shutil.rmtree(tmp_path / "state")
    reply = handle_request(site, request)
    assert isinstance(reply, Refusal)
    assert "egress log is missing although 2 lines were written" in reply.reason
