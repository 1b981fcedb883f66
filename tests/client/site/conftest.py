from __future__ import annotations

from pathlib import Path

import pytest

from client.site.privacy_budget import PrivacyAccount, hash_patients, record_charge
from tests.client.site.charged_account import CHARGE, REQUEST, record_message


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
