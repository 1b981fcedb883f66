"""A budget or a log that was deleted, cut, rolled back or edited is refused until the loss is accepted."""

from __future__ import annotations

import json
import os
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
from common.privacy.accountant import Charge
from common.protocol.messages import JoinRequest, Refusal, StatisticsRequest
from common.utils.errors import ConsiliumError, PermanentlyRefused, RefusalCode, Refused
from common.utils.hash_chain import append_hash

REQUEST = StatisticsRequest("r1", {}, "counts", "main")
CHARGE = Charge(2.0, 0.1, 30)
KILLED = 9  # exit status of a process that ended as if killed


@pytest.fixture
def account(tmp_path: Path) -> PrivacyAccount:
    """An account with two charges, whose replies left; its outer anchor lies beside the state folder."""
    (tmp_path / "outside").mkdir()
    outer = tmp_path / "outside" / "anchor.json"
    account = PrivacyAccount(tmp_path / "state" / "budget", hash_patients("abc"), outer_anchor=outer)
    for _ in range(2):
        record_charge(account, CHARGE, REQUEST)
        record_message(account)
    return account


def record_message(account: PrivacyAccount) -> None:
    egress_log.record_reply(state_dir(account), REQUEST, Refusal("north", "no"), account.outer_anchor)


def state_dir(account: PrivacyAccount) -> Path:
    return account.folder.parent


def expect_refusal(account: PrivacyAccount, reason: str) -> None:
    """Neither reading nor charging is possible, and charging does not write a new budget."""
    budget = account.folder / "spent.json"
    before = budget.read_bytes() if budget.exists() else None
    for call in (read_charges, lambda account: record_charge(account, CHARGE, REQUEST)):
        with pytest.raises(PermanentlyRefused, match=reason) as caught:
            call(account)
        assert caught.value.code == RefusalCode.POLICY
        assert "consilium-centre accept-loss" in str(caught.value)
        assert "/" not in str(caught.value)
    assert (budget.read_bytes() if budget.exists() else None) == before


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


# --- interruptions and upgrades


def charge_and_die(account: PrivacyAccount, num_writes: int) -> int:
    """Charge and record a message in a process that is killed at a write; return its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    remaining = num_writes
    fsync = os.fsync

    def count_write(*_: object) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            os._exit(KILLED)

    def count_fsync(descriptor: int) -> None:
        count_write()
        fsync(descriptor)
        count_write()

    os.fsync = count_fsync  # type: ignore[assignment]
    try:
        record_charge(account, CHARGE, REQUEST)
        record_message(account)
    finally:
        os._exit(0)


def test_hospital_is_not_locked_out_by_a_kill_at_any_write(account: PrivacyAccount) -> None:
    """Before and after each flush to the disk; a charge of which nothing left may count or not."""
    num_charges = 2
    num_messages = 2
    num_kills = 0
    while (status := charge_and_die(account, num_kills)) == KILLED:
        num_kills += 1
        charges = read_charges(account)
        assert len(charges) in (num_charges, num_charges + 1)
        assert len(record_charge(account, CHARGE, REQUEST)) == len(charges) + 1
        record_message(account)
        num_charges = len(charges) + 1
        entries = list(egress_log.read_entries(state_dir(account), account.outer_anchor))
        assert len(entries) in (num_messages + 1, num_messages + 2)
        num_messages = len(entries)
        assert accept_loss(state_dir(account), account.outer_anchor) == []
    assert status == 0
    assert num_kills > 20
    assert len(read_charges(account)) == num_charges + 1


def test_full_disk_at_the_budget_leaves_the_earlier_budget_in_force(
    account: PrivacyAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.site import anchored_files

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(anchored_files, "atomic_write", fail)
        with pytest.raises(Refused, match="privacy budget cannot be written"):
            record_charge(account, CHARGE, REQUEST)
    assert len(read_charges(account)) == 2
    record_message(account)
    assert len(read_charges(account)) == 2
    assert len(record_charge(account, CHARGE, REQUEST)) == 3


def test_state_of_a_version_without_anchors_is_adopted_once(account: PrivacyAccount) -> None:
    """Its log has no line about files; from its first message on, a deleted budget is noticed."""
    assert account.outer_anchor
    budget = (account.folder / "spent.json").read_bytes()
    shutil.rmtree(state_dir(account))
    account.outer_anchor.unlink()
    account.folder.mkdir(parents=True)
    (account.folder / "spent.json").write_bytes(budget)
    assert len(read_charges(account)) == 2
    record_message(account)
    kinds = [line.kind for line in egress_log.read_lines(state_dir(account))]
    assert kinds == ["file found", "anchored", "Refusal"]
    (account.folder / "spent.json").unlink()
    expect_refusal(account, "privacy budget is missing although it was written before")


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
