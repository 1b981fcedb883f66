"""An interruption at any write locks no hospital out, and the state of an earlier version is adopted."""

from __future__ import annotations

import os
import shutil

import pytest

from client.site import anchored_files, egress_log
from client.site.anchored_files import accept_loss
from client.site.privacy_budget import PrivacyAccount, read_charges, record_charge
from common.utils.errors import Refused
from tests.client.site.charged_account import (
    CHARGE,
    REQUEST,
    expect_refusal,
    record_message,
    state_dir,
)

KILLED = 9  # exit status of a process that ended as if killed


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
