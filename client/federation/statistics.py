"""Answer a StatisticsRequest: one additive query over the centre's scans."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from client.data.dataset import ScanDataset
from client.data.loading import load_datasets
from client.federation import (
    cluster_labels,
    error_feedback,
    noisy_counts,
    patient_exposure,
    personal_parameters,
    secure_aggregation,
)
from client.federation.local_model import build_model
from client.federation.privacy_plan import open_privacy_account
from client.federation.query_context import QueryContext
from client.federation.query_handlers import QUERY_HANDLERS
from client.federation.released_counts import find_cohort_columns, release_counts, weigh_centre
from client.federation.released_data import min_scans_of_patients, select_released
from client.federation.run_context import RunContext
from client.federation.score_sums import sum_scores
from client.imaging.slice_store import SliceStore
from client.site import privacy_budget
from client.site.config import cohort_state_dir, local_cohorts, safe_filename
from client.site.egress_log import hash_message
from client.site.privacy_budget import PrivacyAccount
from client.site.release_book import count_answer, locate_book, open_book
from client.training.autotune import use_threads
from common.modeling.model import Model
from common.privacy.accountant import Charge
from common.privacy.secure_aggregation import COMBINED_COHORT, uses_secagg
from common.protocol.messages import StatisticsReply, StatisticsRequest, Sums
from common.protocol.sum_key import LabelWeightKey
from common.utils.errors import Refused


def handle_query(context: RunContext, request: StatisticsRequest) -> StatisticsReply:
    """Compute the sums of a query, with noise where the run's privacy requires it.

    Raises Refused for a query that is unknown, that the run's privacy forbids or that has no data here.
    """
    if request.name not in QUERY_HANDLERS:
        valid = ", ".join(QUERY_HANDLERS)
        raise Refused(f"unknown query '{request.name}'; this centre answers {valid}")
    if request.split == "test":
        _finish_training(context)
    start = time.perf_counter()
    with use_threads(context.site.threads):
        if context.config.privacy.dp_level == "patient":
            sums = _answer_privately(context, request)
        else:
            sums = _answer_exactly(context, request)
    if request.name == "counts" and uses_secagg(context.config, request):
        sums |= _sum_label_weights(context)
    if context.config.privacy.dp_level == "patient":
        return StatisticsReply(context.centre, sums)  # the time would tell how many scans there are
    return StatisticsReply(context.centre, sums, time.perf_counter() - start)


def _answer_exactly(context: RunContext, request: StatisticsRequest) -> Sums:
    datasets = _load_split_datasets(context, request)
    query = _open_query(context, request, select_released(context, datasets))
    _count_scores(context, request)
    sums = QUERY_HANDLERS[request.name](query)
    if request.clustering_id:
        cluster_labels.save_cluster_labels(context.state_dir, request.clustering_id, query)
        shutil.rmtree(_features_dir(context), ignore_errors=True)
    return sums


def _answer_privately(context: RunContext, request: StatisticsRequest) -> Sums:
    """Return counts or scores as far as they reveal nothing of the patients that are trained on.

    What has noise is computed first and charged then. Raises Refused for any other query.
    """
    account = open_privacy_account(context)
    is_of_training_scores = request.name == "scores" and request.split == "train"
    if request.name not in ("counts", "scores") or is_of_training_scores:
        rule = "which privacy=patient does not allow"
        raise Refused(f"query '{request.name}' would reveal training scans without noise, {rule}")
    if request.name == "counts":
        return release_counts(context)
    if request.weights is None:
        raise Refused("query 'scores' needs the weights of the model to score")
    return _score_privately(context, request, account)


def _score_privately(context: RunContext, request: StatisticsRequest, account: PrivacyAccount) -> Sums:
    """Return scores with noise, which are charged, or exact ones of patients that are never trained on."""
    scans = _load_split_datasets(context, request)[request.split]
    privacy = context.config.privacy
    if not privacy.query_noise_multiplier:
        scorable = patient_exposure.select_scorable(account, scans)
        released = select_released(context, {request.split: scorable})
        _count_scores(context, request)
        return sum_scores(_open_query(context, request, released))
    capped = noisy_counts.cap_scans_per_patient(scans, privacy.max_scans_per_patient)
    query = _open_query(context, request, {request.split: capped})
    exact_scores = noisy_counts.empty_scores(query, find_cohort_columns(context)) | sum_scores(query)
    sums = noisy_counts.add_score_noise(exact_scores, context.config)
    if sums:
        privacy_budget.record_charge(account, Charge(privacy.query_noise_multiplier, 1.0, 1), request)
    return sums


def _count_scores(context: RunContext, request: StatisticsRequest) -> None:
    """Note in the release book that a model is scored.

    Raises PermanentlyRefused for more models than a run needs. It may ask for twice as many, because a round
    that is repeated after an interruption may not give the same weights to the bit.
    """
    config = context.config
    if request.name != "scores" or context.site.min_cell_count <= 1:
        return
    max_answers = 2 * (1 + sum(stage.rounds + 1 for stage in config.stages.values()))
    if config.evaluation.cross_site != "none":
        max_answers += len(config.federation.centres)
    with open_book(locate_book(context.state_dir, context.outer_anchor)) as book:
        count_answer(book, context.run_id, hash_message(request), max_answers)


def _finish_training(context: RunContext) -> None:
    """Delete what only training needs: a run that is tested sends no more updates."""
    error_feedback.delete_residuals(context.state_dir, context.run_id)
    secure_aggregation.delete_train_sum(context.state_dir, context.run_id)


def _load_split_datasets(context: RunContext, request: StatisticsRequest) -> Mapping[str, ScanDataset]:
    """Return the scans by split. Raises Refused for a split or a task that the run does not have."""
    datasets, _ = load_datasets(context.site, context.config)
    if request.split not in datasets:
        raise Refused(f"unknown split '{request.split}'; use one of {', '.join(datasets)}")
    if request.task and request.task not in context.config.tasks:
        raise Refused(f"this run has no task '{request.task}'")
    return datasets


def _open_query(
    context: RunContext, request: StatisticsRequest, datasets: Mapping[str, ScanDataset]
) -> QueryContext:
    site = context.site
    slice_stores = {}
    for cohort, path in local_cohorts(site, context.config).items():
        slice_stores[cohort] = SliceStore(cohort_state_dir(site, path) / "slices")
    return QueryContext(
        datasets=datasets,
        split=request.split,
        config=context.config,
        stage=context.find_stage(request.stage),
        model=_load_query_model(context, request),
        task_name=request.task,
        min_patients=site.min_cell_count,
        min_scans=min_scans_of_patients(datasets.values(), site.min_cell_count),
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
    for task, weight in weigh_centre(context).items():
        sums[str(LabelWeightKey(COMBINED_COHORT, task))] = np.array([weight])
    return sums
