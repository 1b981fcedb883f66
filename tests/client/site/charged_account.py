"""What the tests of a charged privacy account share; `account` is in conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.site import egress_log
from client.site.privacy_budget import PrivacyAccount, read_charges, record_charge
from common.privacy.accountant import Charge
from common.protocol.messages import Refusal, StatisticsRequest
from common.utils.errors import PermanentlyRefused, RefusalCode

REQUEST = StatisticsRequest("r1", {}, "counts", "main")
CHARGE = Charge(2.0, 0.1, 30)


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
