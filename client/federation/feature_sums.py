"""Sum pooled features: class moments for a head that the server fits, and the steps of federated k-means."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset, iterate_slices
from client.federation.feature_groups import average_in_groups
from client.federation.query_context import QueryContext
from client.site.config import safe_filename
from client.training.trainer import run_inference
from common.learning.losses import output_dim
from common.modeling.model import Model
from common.protocol.messages import Sums
from common.utils.errors import RefusalCode, Refused

Floats = NDArray[np.float64]


class PooledFeatures(NamedTuple):
    """Features of the scans that take part in a clustering."""

    rows: NDArray[np.int64]  # [N] their rows in the dataset
    features: Floats  # [N, D]


def sum_class_moments(context: QueryContext) -> Sums:
    """Sum the features f [D] of each class: n [K], sum f [K, D], and over all classes sum f f' [D, D].

    The server fits a linear discriminant of them (server/analysis/linear_discriminant.py).
    """
    dataset = context.dataset
    if context.model is None or not len(dataset):
        return {}
    features = _compute_features(context, context.model, dataset)
    targets = dataset.targets[context.task_name]
    is_labelled = np.isfinite(targets)
    features = features[is_labelled]
    num_classes = output_dim(context.config.tasks[context.task_name])
    one_hot = np.eye(num_classes)[targets[is_labelled].astype(int)]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": features.T @ features}


def sum_clusters(context: QueryContext) -> Sums:
    """Take one step of federated Lloyd k-means (server/analysis/kmeans.py).

    Returns over the scans nearest to each centroid: n [K], sum f [K, D], sum |f|^2 [K].
    """
    rows, features = load_pooled_features(context)
    if not len(rows) or context.centroids is None:
        return {}
    one_hot = np.eye(len(context.centroids))[nearest_centroid(features, context.centroids)]
    squared_norms = (features**2).sum(1)
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": one_hot.T @ squared_norms}


def nearest_centroid(features: Floats, centroids: Floats) -> NDArray[np.int64]:
    """Return [N]: the nearest of the centroids [K, D] to each row of `features` [N, D]."""
    feature_norms = (features**2).sum(1)[:, None]
    centroid_norms = (centroids**2).sum(1)[None]
    squared_distances = feature_norms - 2 * features @ centroids.T + centroid_norms
    return np.asarray(squared_distances.argmin(1))


def load_pooled_features(context: QueryContext) -> PooledFeatures:
    """Return the features of the split's scans that take part in a clustered task.

    They are computed when weights come with the query, and kept on disk for the next steps, which bring none.
    Where the policy limits small numbers, they are those of groups of patients (feature_groups.py).
    Raises Refused when they are gone.
    """
    dataset = context.dataset
    takes_part = np.isfinite(dataset.extra_targets.get(context.task_name, np.empty(0)))
    rows = np.flatnonzero(takes_part)
    if not len(rows):
        return PooledFeatures(rows, np.empty((0, 0)))
    path = _features_path(context)
    if context.model is None:
        if path is None or not path.is_file():
            reason = "the features of this run are missing from the centre's state folder; start the run anew"
            raise Refused(reason, RefusalCode.NO_DATA)
        return PooledFeatures(rows, np.load(path))
    scans = dataset.subset(rows)
    features = _compute_features(context, context.model, scans)
    if context.min_patients > 1:
        features = average_in_groups(features, scans.patient_ids, context.min_patients)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, features)
    return PooledFeatures(rows, features)


def _features_path(context: QueryContext) -> Path | None:
    if context.features_dir is None:
        return None
    return context.features_dir / f"{safe_filename(context.task_name)}-{context.split}.npy"


def _compute_features(context: QueryContext, model: Model, dataset: ScanDataset) -> Floats:
    """Return the pooled features [N, D] of all scans."""
    outputs = run_inference(
        model,
        iterate_slices(dataset, context.stage.batch_size),
        lambda model, images: {"features": model.extract_features(images)},
        precision=context.stage.precision,
        device=context.device,
    )
    return np.asarray(outputs["features"].double().numpy())
