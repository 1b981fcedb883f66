"""A hospital's policy, privacy budget and egress log of 0.1.0 keep their force after the upgrade."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.data.loading import load_datasets
from client.federation.patient_exposure import select_scorable
from client.federation.privacy_plan import open_privacy_account
from client.federation.run_context import RunContext
from client.site.config import Site, parse_site
from client.site.egress_log import read_entries, read_lines, record_reply
from client.site.policy import load_policy
from client.site.privacy_budget import cached_reply, check_affordable, read_charges, record_charge
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import Weights
from common.privacy.accountant import Charge, compute_epsilon
from common.protocol.messages import JoinRequest, Refusal, TrainRequest
from common.utils.errors import ConsiliumError, PermanentlyRefused
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import start_run
from tests.in_process_federation import InProcess
from tests.upgrade.recorded_hospital import RECORDED_SETTINGS, STATE, call_centre_command

NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
PRIVATE_SETTINGS = [*RECORDED_SETTINGS, "privacy=patient", "privacy.epsilon=8"]


def make_context(site: Site, config: Config) -> RunContext:
    return RunContext(site, config, load_policy(site.policy), "new")


# --- site.yaml and policy.yaml


def test_old_keys_of_site_file_are_refused_with_their_new_names(recorded: Path) -> None:
    with pytest.raises(ConsiliumError) as error:
        parse_site({"site": "hospital_north/site.yaml"})
    assert "'workers' is now 'num_workers'" in str(error.value)
    assert "'smallest_cell' is now 'min_cell_count'" in str(error.value)


def test_old_keys_of_policy_are_refused_with_their_new_names(recorded: Path) -> None:
    with pytest.raises(ConsiliumError) as error:
        load_policy("hospital_north/policy_every_key.yaml")
    for renaming in (
        "'labels' is now 'allowed_labels'",
        "'smallest_cell' is now 'min_cell_count'",
        "'max_bytes' is now 'max_message_bytes'",
        "'hours' is now 'allowed_hours'",
        "'secure_aggregation' is now 'require_secure_aggregation'",
        "'smallest_federation' is now 'min_centres'",
        "'noise' is now 'min_query_noise'",
    ):
        assert renaming in str(error.value)


def test_nothing_leaves_under_a_policy_with_old_keys(recorded: Path) -> None:
    config = compose_config(RECORDED_SETTINGS)
    site = Site("north", "hospital_north/data", str(STATE), device="cpu", policy="hospital_north/policy.yaml")
    transport = InProcess([site])
    (received,) = transport.discover(JoinRequest("new", config_to_dict(config)), ["north"], 1.0)
    assert isinstance(received.reply, Refusal)


def test_renamed_site_file_and_policies_are_accepted(north: Site) -> None:
    assert (north.centre, north.num_workers, north.min_cell_count) == ("north", 2, 2)
    assert load_policy(north.policy).max_message_bytes == 300_000_000
    every_key = load_policy("hospital_north/policy_every_key.yaml")
    assert (every_key.min_query_noise, every_key.min_centres, every_key.epsilon) == (5.0, 3, 8.0)


# --- privacy budget


def test_privacy_budget_is_read_with_its_charges_and_patients(north: Site) -> None:
    spent = json.loads((STATE / "budget/spent.json").read_text())
    account = open_privacy_account(make_context(north, compose_config(PRIVATE_SETTINGS)))
    assert account.cohort_id in spent["cohorts"]
    assert sorted(account.patient_hashes) == spent["cohorts"][account.cohort_id]
    expected = tuple(Charge(line["noise"], line["odds"], line["steps"]) for line in spent["charges"])
    assert len(expected) >= 5
    assert read_charges(account) == expected


def test_new_charge_is_made_on_top_of_what_was_spent(north: Site) -> None:
    before = json.loads((STATE / "budget/spent.json").read_text())
    config = compose_config(PRIVATE_SETTINGS)
    account = open_privacy_account(make_context(north, config))
    spent = compute_epsilon(read_charges(account), account.delta)
    assert spent > 20
    limited = replace(account, max_epsilon=spent + 0.01)
    with pytest.raises(PermanentlyRefused, match=f"{spent:.2f} is spent"):
        check_affordable(limited, Charge(1.0, 0.8, 2))
    request = TrainRequest("new", config_to_dict(config), "main", 1, weights=NO_WEIGHTS)
    charges = record_charge(account, Charge(1.0, 0.8, 2), request)
    after = json.loads((STATE / "budget/spent.json").read_text())
    assert after["charges"][:-1] == before["charges"]
    assert after["cohorts"] == before["cohorts"]
    assert len(charges) == len(after["charges"])


def test_reply_of_an_interrupted_round_is_not_sent_again_without_a_charge(north: Site) -> None:
    """0.1.0 kept its last reply for the very same request, which this version words differently."""
    config = compose_config(PRIVATE_SETTINGS)
    account = open_privacy_account(make_context(north, config))
    request = TrainRequest("paused-patient", config_to_dict(config), "main", 1, weights=NO_WEIGHTS)
    assert (STATE / "budget/last.safetensors").exists()
    assert cached_reply(account, request) is None


def test_exact_scores_of_patients_of_earlier_private_runs_do_not_leave(north: Site) -> None:
    site = replace(north, policy="", min_cell_count=1)
    config = compose_config(PRIVATE_SETTINGS)
    with pytest.raises(ConsiliumError, match="paused: no centre replied"):
        start_run(config, InProcess([site]), Path("new_runs").resolve(), Ledger("sqlite:///new.db"), "new")
    datasets, _ = load_datasets(site, config)
    with pytest.raises(PermanentlyRefused, match="a private run trained on all patients of this split"):
        select_scorable(open_privacy_account(make_context(site, config)), datasets["test"])


@pytest.mark.parametrize(("limit", "is_allowed"), [(200, True), (25, False)])
def test_private_run_is_charged_or_refused_by_what_earlier_runs_spent(
    north: Site, limit: float, is_allowed: bool
) -> None:
    policy_path = Path("hospital_north/policy_patient.yaml")
    policy_path.write_text(policy_path.read_text().replace("epsilon: 200", f"epsilon: {limit}"))
    site = replace(north, policy=str(policy_path), min_cell_count=1)
    # 0.1.0 did not note whom it trained on, so that exact scores of these patients do not leave any more.
    config = compose_config([*PRIVATE_SETTINGS, "privacy.query_noise_multiplier=1000"])
    account = open_privacy_account(make_context(site, config))
    earlier = read_charges(account)
    spent = compute_epsilon(earlier, config.privacy.delta)
    ledger = Ledger("sqlite:///new.db")
    transport = InProcess([site])
    if not is_allowed:
        with pytest.raises(ConsiliumError, match=f"{re.escape(f'{spent:.2f}')} is spent"):
            start_run(config, transport, Path("new_runs").resolve(), ledger, "new")
        only_queries = {charge.noise_multiplier for charge in read_charges(account)[len(earlier) :]}
        assert only_queries == {1000.0}
        return
    result = start_run(config, transport, Path("new_runs").resolve(), ledger, "new")
    epsilon = result.stages[0].rounds[-1].centres["north"].epsilon
    assert epsilon is not None
    assert epsilon > spent
    assert read_charges(account)[: len(earlier)] == earlier


# --- egress log


def test_egress_log_verifies_and_grows(north: Site) -> None:
    log = STATE / "egress.jsonl"
    before = log.read_bytes()
    entries = list(read_entries(STATE))
    assert len(entries) == 138
    record_reply(STATE, JoinRequest("new", {}), Refusal("north", "not now"))
    assert log.read_bytes().startswith(before)
    grown = list(read_entries(STATE))
    assert len(grown) == 139
    _, adopted_budget, adopted_log, new = list(read_lines(STATE))[-4:]
    assert (adopted_budget.kind, adopted_budget.previous) == ("file found", entries[-1].hash)
    assert (adopted_log.kind, new.previous) == ("anchored", adopted_log.hash)
    printed = call_centre_command("egress", str(STATE), "--verify")
    assert "139 messages left; the chain is intact" in printed


def test_metrics_of_the_centre_count_messages_of_both_versions(north: Site) -> None:
    printed = call_centre_command("metrics", "--site", "hospital_north/site.yaml")
    assert 'consilium_centre_egress_messages_total{kind="Contribution"}' in printed
    assert "consilium_centre_egress_chain_whole 1.0" in printed
    (epsilon,) = re.findall(r"consilium_centre_privacy_epsilon ([0-9.]+)", printed)
    assert float(epsilon) > 20
