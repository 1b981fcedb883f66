"""Answer a StatisticsRequest: one additive query over the centre's scans."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from client.data.loading import load_datasets
from client.federation import (
    cluster_labels,
    error_feedback,
    noisy_counts,
    personal_parameters,
    secure_aggregation,
)
from client.federation.label_counts import unnormalised_weights
from client.federation.local_model import build_model
from client.federation.privacy_plan import open_privacy_account
from client.federation.query_context import QueryContext
from client.federation.query_handlers import QUERY_HANDLERS
from client.federation.run_context import RunContext
from client.imaging.slice_store import SliceStore
from client.site import privacy_budget
from client.site.config import cohort_state_dir, local_cohorts, safe_filename
from client.training.autotune import use_threads
from common.modeling.model import Model
from common.privacy.accountant import Charge
from common.privacy.secure_aggregation import COMBINED_COHORT, uses_secagg
from common.protocol.messages import StatisticsReply, StatisticsRequest, Sums
from common.protocol.sum_key import LabelWeightKey
from common.utils.errors import Refused


def handle_query(context: RunContext, request: StatisticsRequest) -> StatisticsReply:
    """Compute the sums of a query; where the run has query noise, charge and add it before they leave.

    Raises Refused for a query that is unknown, that the run's privacy forbids or that has no data here.
    """
    _check_query(context, request)
    if request.split == "test":
        _finish_training(context)
    start = time.perf_counter()
    query = _open_query(context, request)
    with use_threads(context.site.threads):
        sums = QUERY_HANDLERS[request.name](query)
        if request.name == "counts" and uses_secagg(context.config, request):
            sums |= _sum_label_weights(context)
        if request.clustering_id:
            cluster_labels.save_cluster_labels(context.state_dir, request.clustering_id, query)
            shutil.rmtree(_features_dir(context), ignore_errors=True)
    noise_multiplier = context.config.privacy.query_noise_multiplier
    if noise_multiplier:
        account = open_privacy_account(context)
        privacy_budget.record_charge(account, Charge(noise_multiplier, 1.0, 1), request)
        sums = noisy_counts.add_noise(sums, context.config, request.name, context.site.min_cell_count)
    return StatisticsReply(context.centre, sums, time.perf_counter() - start)


def _check_query(context: RunContext, request: StatisticsRequest) -> None:
    """Refuse a query that is unknown, or that would reveal training scans without noise in a private run."""
    if request.name not in QUERY_HANDLERS:
        valid = ", ".join(QUERY_HANDLERS)
        raise Refused(f"unknown query '{request.name}'; this centre answers {valid}")
    if context.config.privacy.dp_level != "patient":
        return
    is_of_training_scores = request.name == "scores" and request.split == "train"
    if request.name not in ("counts", "scores") or is_of_training_scores:
        rule = "which privacy=patient does not allow"
        raise Refused(f"query '{request.name}' would reveal training scans without noise, {rule}")


def _finish_training(context: RunContext) -> None:
    """Delete what only training needs: a run that is tested sends no more updates."""
    error_feedback.delete_residuals(context.state_dir, context.run_id)
    secure_aggregation.delete_train_sum(context.state_dir, context.run_id)


def _open_query(context: RunContext, request: StatisticsRequest) -> QueryContext:
    site = context.site
    config = context.config
    datasets, _ = load_datasets(site, config)
    if request.split not in datasets:
        raise Refused(f"unknown split '{request.split}'; use one of {', '.join(datasets)}")
    if request.task and request.task not in config.tasks:
        raise Refused(f"this run has no task '{request.task}'")
    model = _load_query_model(context, request)
    min_cell_count = site.min_cell_count
    if config.privacy.query_noise_multiplier:
        # Noise comes before suppression: a scan more must not change a cell by more than 1.
        min_cell_count = 1
        max_scans = config.privacy.max_scans_per_patient
        datasets = {
            split: noisy_counts.cap_scans_per_patient(dataset, max_scans)
            for split, dataset in datasets.items()
        }
    slice_stores = {}
    for cohort, path in local_cohorts(site, config).items():
        slice_stores[cohort] = SliceStore(cohort_state_dir(site, path) / "slices")
    return QueryContext(
        datasets=datasets,
        split=request.split,
        config=config,
        stage=context.find_stage(request.stage),
        model=model,
        task_name=request.task,
        min_cell_count=min_cell_count,
        device=site.resolve_device(),
        centroids=request.centroids,
        features_dir=_features_dir(context),
        slice_stores=slice_stores,
    )


def _load_query_model(context: RunContext, request: StatisticsRequest) -> Model | None:
    """Return the model of the requested weights. A test's local layers are noted for later predictions."""
    if request.weights is None:
        return None
    stage = context.find_stage(request.stage)
    model = build_model(context, stage, request.weights, request.personal_rounds)
    if request.split == "test" and request.personal_rounds:
        personal_parameters.record_test_state(
            context.local_layers_dir, context.run_id, request.personal_rounds, request.weights
        )
    return model


def _features_dir(context: RunContext) -> Path:
    return context.state_dir / "features" / safe_filename(context.run_id)


def _sum_label_weights(context: RunContext) -> Sums:
    """Return this centre's weight for each task, of which the coordinator learns only the total."""
    sums: Sums = {}
    for task, weight in unnormalised_weights(context.site, context.config).items():
        sums[str(LabelWeightKey(COMBINED_COHORT, task))] = np.array([weight])
    return sums
