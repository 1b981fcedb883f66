"""Plan the differential privacy of a centre's training: the noise of a run, and what a round costs."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pandas as pd

from client.data.cohort import load_cohort
from client.data.dataset import ScanDataset
from client.federation import noisy_counts
from client.federation.run_context import RunContext
from client.site.config import Site, local_cohorts
from client.site.privacy_budget import PrivacyAccount, hash_patients
from client.training.dp_sgd import DPParams, sampling_plan
from common.config.normalise import stage_tasks
from common.config.schema import Config
from common.modeling.encoder import check_no_batch_norm
from common.modeling.model import Model
from common.privacy.accountant import Charge, solve_noise_multiplier
from common.protocol.messages import TrainRequest
from common.utils.errors import ConsiliumError, PermanentlyRefused, RefusalCode, Refused

log = logging.getLogger("consilium.centre")


class PrivacyPlan(NamedTuple):
    """How a round is protected."""

    charge: Charge  # what it costs: noise, sampling rate and steps
    dp_params: DPParams


def open_privacy_account(context: RunContext) -> PrivacyAccount:
    """Return the account of all patients in the centre's tables, whichever of them the run uses."""
    patient_ids = []
    for centre, path in local_cohorts(context.site, context.config).items():
        table = load_cohort(path, centre)
        _require_patients(context.site, table)
        patient_ids += [str(patient) for patient in table["patient"]]
    policy = context.policy
    hashes = hash_patients(patient_ids)
    return PrivacyAccount(context.budget_dir, hashes, policy.epsilon, policy.delta, context.outer_anchor)


def _require_patients(site: Site, table: pd.DataFrame) -> None:
    """Refuse a hospital's table that does not tell whose scan each is: two scans may be of one patient."""
    names_no_patient = table["patient"] == table["scan"]  # as `load_cohort` fills a missing one in
    if site.scans_are_patients or not names_no_patient.any():
        return
    if not site.centre:
        log.warning("the cohort does not name every scan's patient, so privacy=patient protects scans")
        return
    raise PermanentlyRefused(
        "privacy=patient cannot protect patients that the cohort does not name; fill its column 'patient', "
        "or set scans_are_patients: true in site.yaml if every patient has one scan",
        RefusalCode.NO_DATA,
    )


def plan_privacy(config: Config, dataset: ScanDataset, request: TrainRequest, model: Model) -> PrivacyPlan:
    """Plan a round with the run's noise, by which all rounds of all stages together keep to its epsilon.

    Raises Refused for a configuration that would not protect the patients.
    """
    sampling = {}
    planned_steps = []
    for name, stage in config.stages.items():
        labelled = dataset.select_labelled(stage_tasks(config, stage))
        sampling[name] = sampling_plan(labelled, stage, request.mean_centre_scans)
        if sampling[name].num_patients:
            planned_steps.append((sampling[name].sample_rate, sampling[name].steps * stage.rounds))
    try:
        check_no_batch_norm(model)
        noise_multiplier = config.privacy.noise_multiplier or solve_noise_multiplier(
            config.privacy.epsilon,
            config.privacy.delta,
            tuple(planned_steps),
            noisy_counts.planned_charges(config),
        )
    except ConsiliumError as error:
        raise Refused(str(error)) from error
    num_patients, sample_rate, steps = sampling[request.stage]
    dp_params = DPParams(config.privacy.clip_norm, noise_multiplier, sample_rate * num_patients)
    return PrivacyPlan(Charge(noise_multiplier, sample_rate, steps), dp_params)
