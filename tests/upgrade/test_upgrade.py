"""Nothing of a hospital's is lost by upgrading from 0.1.0: what that version wrote is used as it is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from client.cli import app
from client.data.cluster_label_store import load_cluster_labels
from client.data.cohort import load_cohort
from client.federation.privacy_plan import open_privacy_account
from client.federation.run_context import RunContext
from client.federation.secure_sum_store import SumId, load_state, record_opening
from client.imaging.slice_metadata import SliceMetadata
from client.imaging.slice_store import SliceStore
from client.ingest.pseudonyms import load_site_key, make_patient_pseudonym, make_pseudonym
from client.site.config import Site, parse_site
from client.site.egress_log import read_entries, record_reply
from client.site.policy import load_policy
from client.site.privacy_budget import cached_reply, check_affordable, read_charges, record_charge
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.model_file import load_model_file
from common.modeling.parameters import Weights
from common.privacy.accountant import Charge, compute_epsilon
from common.protocol.messages import JoinRequest, Refusal, TrainRequest
from common.utils.errors import ConsiliumError, PermanentlyRefused
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import start_run
from tests.in_process_federation import InProcess

STATE = Path("hospital_north/state")
RUNS = Path("coordinator/runs")
# The settings of the recorded runs, under their present keys.
PREPROCESSING = [
    "preprocess.image_size=16",
    "preprocess.num_slices=2",
    "preprocess.selection=even",
    "preprocess.crop=none",
]
RECORDED_SETTINGS = [
    "recipe=multisource",
    "federation=folder",
    "federation.centres=[north,east]",
    "federation.join_timeout=1",
    "federation.round_retries=0",
    "federation.quorum=0.3",
    "backbone.name=tiny_net",
    *PREPROCESSING,
    "stage.rounds=1",
    "stage.local_epochs=1",
    "stage.batch_size=4",
    "stage.precision=fp32",
    "stage.tasks=[covid]",
    "evaluation.histogram_bins=8",
    "evaluation.image_statistics=false",
]
NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
PRIVATE_SETTINGS = [*RECORDED_SETTINGS, "privacy=patient", "privacy.epsilon=8"]


def call_centre_command(*arguments: str) -> str:
    """Run `consilium-centre` and return what it prints, as one line."""
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return " ".join(outcome.output.split())


def make_context(site: Site, config: Config) -> RunContext:
    return RunContext(site, config, load_policy(site.policy), "new")


def snapshot(folder: Path, pattern: str) -> dict[str, tuple[int, bytes]]:
    """{file: when it was written, its content}."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


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


@pytest.mark.parametrize(("limit", "is_allowed"), [(200, True), (25, False)])
def test_private_run_is_charged_or_refused_by_what_earlier_runs_spent(
    north: Site, limit: float, is_allowed: bool
) -> None:
    policy_path = Path("hospital_north/policy_patient.yaml")
    policy_path.write_text(policy_path.read_text().replace("epsilon: 200", f"epsilon: {limit}"))
    site = replace(north, policy=str(policy_path), min_cell_count=1)
    config = compose_config(PRIVATE_SETTINGS)
    account = open_privacy_account(make_context(site, config))
    earlier = read_charges(account)
    spent = compute_epsilon(earlier, config.privacy.delta)
    ledger = Ledger("sqlite:///new.db")
    transport = InProcess([site])
    if not is_allowed:
        with pytest.raises(ConsiliumError, match=f"{re.escape(f'{spent:.2f}')} is spent"):
            start_run(config, transport, Path("new_runs").resolve(), ledger, "new")
        assert read_charges(account) == earlier
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
    assert grown[-1].previous == entries[-1].hash
    printed = call_centre_command("egress", str(STATE), "--verify")
    assert "139 messages left; the chain is intact" in printed


def test_metrics_of_the_centre_count_messages_of_both_versions(north: Site) -> None:
    printed = call_centre_command("metrics", "--site", "hospital_north/site.yaml")
    assert 'consilium_centre_egress_messages_total{kind="Contribution"}' in printed
    assert "consilium_centre_egress_chain_whole 1.0" in printed
    (epsilon,) = re.findall(r"consilium_centre_privacy_epsilon ([0-9.]+)", printed)
    assert float(epsilon) > 20


# --- ingest


def test_ingest_finds_its_studies_present_under_the_same_pseudonyms(north: Site) -> None:
    key = (STATE / "ingest/key").read_bytes()
    journal = (STATE / "ingest/journal.jsonl").read_bytes()
    images = snapshot(Path("hospital_north/data/dicom"), "*.dcm")
    table = load_cohort(Path("hospital_north/data"), "north")
    command = ["--site", "hospital_north/site.yaml", "--labels", "hospital_north/labels.csv", "--quiet", "0"]
    printed = call_centre_command("ingest", *command)
    assert "0 studies added, 2 already present" in printed
    assert (STATE / "ingest/key").read_bytes() == key
    assert (STATE / "ingest/journal.jsonl").read_bytes() == journal
    assert snapshot(Path("hospital_north/data/dicom"), "*.dcm") == images
    pd.testing.assert_frame_equal(load_cohort(Path("hospital_north/data"), "north"), table)


def test_pseudonyms_are_those_of_the_recorded_mapping(north: Site) -> None:
    key = load_site_key(STATE / "ingest")
    mapping = pd.read_csv(STATE / "ingest/mapping.csv", dtype=str)
    assert len(mapping) == 12
    for row in mapping.to_dict("records"):
        study = row["StudyInstanceUID"]
        assert make_pseudonym(key, "study", study) == row["scan"]
        assert make_patient_pseudonym(key, row["PatientID"], study) == row["patient"]


# --- slices


def test_no_slice_is_computed_anew(north: Site) -> None:
    before = snapshot(STATE / "slices", "*.npy") | snapshot(STATE / "slices", "*.json")
    assert len(before) == 24
    settings = [part for override in PREPROCESSING for part in ("-s", override)]
    printed = call_centre_command(
        "preprocess", "hospital_north/data", "--state", str(STATE), *settings, "-s", "preprocess.modality=CT"
    )
    assert "12 of 12 scans are ready" in printed
    assert snapshot(STATE / "slices", "*.npy") | snapshot(STATE / "slices", "*.json") == before


def test_metadata_beside_the_slices_is_read(north: Site) -> None:
    store = SliceStore(STATE / "slices")
    for path in sorted((STATE / "slices").glob("*/*.json")):
        metadata = SliceMetadata.from_json(store.read_metadata(path.stem))
        assert len(metadata.indices) == len(metadata.areas) == 2
        assert metadata.geometry is not None
        assert metadata.geometry.modality == "CT"
        assert store.get(path.stem) is not None


# --- what runs left at the hospital


def test_cluster_labels_are_found_by_slice_key(north: Site) -> None:
    keys = [path.stem for path in sorted((STATE / "slices").glob("*/*.npy"))]
    labels = load_cluster_labels(STATE, "paused-transfer-soft", keys)
    recorded_labels = json.loads((STATE / "labels/paused-transfer-soft.json").read_text())
    assert len(recorded_labels) == np.isfinite(labels).sum() == 12
    assert dict(zip(keys, labels, strict=True)) == recorded_labels


def test_opened_secure_sum_is_not_opened_again_among_others(north: Site) -> None:
    work_dir = STATE / "secagg/paused-secagg/train"
    survivors = record_opening(work_dir, SumId.parse("train/main/1/0123"), ["east", "north"])
    assert survivors == ["east", "north", "south"]


def test_interrupted_secure_sum_is_recognised(north: Site) -> None:
    state = load_state(STATE / "secagg/paused-secagg/train")
    assert state is not None
    assert state.sum_id.startswith("train/main/2/")


@pytest.mark.parametrize("run_id", ["finished", "finished-personal"])
def test_saved_model_predicts_as_it_did(north: Site, run_id: str) -> None:
    """With `--personal` by the hospital's own layers, which exist nowhere else."""
    personal = STATE / "personal" / run_id
    options = ["--personal", str(personal)] if personal.exists() else []
    model = RUNS / run_id / "model.safetensors"
    call_centre_command(
        *["predict", str(model), "hospital_north/data/dicom", "--out", "new.csv", "--device", "cpu"],
        *["--state", str(STATE), *options],
    )
    expected = pd.read_csv(f"predictions/{run_id}.csv", dtype=str).set_index("scan").sort_index()
    predicted = pd.read_csv("new.csv", dtype=str).set_index("scan").sort_index()
    pd.testing.assert_frame_equal(
        predicted[expected.columns].drop(columns="covid"), expected.drop(columns="covid")
    )
    np.testing.assert_allclose(predicted["covid"].astype(float), expected["covid"].astype(float), atol=2e-6)
    slice_keys = sorted(path.stem for path in (STATE / "slices").rglob("*.npy"))
    assert slice_keys == Path("predictions/slice_keys.txt").read_text().split()  # that 0.1.0 would find


def test_configuration_inside_a_saved_model_is_read_under_the_present_keys(recorded: Path) -> None:
    _, config = load_model_file(RUNS / "finished/model.safetensors")
    assert config.tasks["covid"].type == "binary"
    assert config.preprocess.num_slices == 2
    assert config.stages["main"].batch_size == 4
