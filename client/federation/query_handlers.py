"""The additive queries: everything that the coordinator may learn of the data is a sum over scans.

A query turns a centre's scans, and a model where it needs one, into {key: array}; the coordinator adds the
arrays of all centres key by key.
"""

from __future__ import annotations

from collections.abc import Callable

from client.federation.feature_sums import sum_class_moments, sum_clusters
from client.federation.image_statistics import sum_image_statistics
from client.federation.label_counts import sum_label_counts
from client.federation.query_context import QueryContext
from client.federation.score_sums import sum_scores
from common.protocol.messages import Sums

QUERY_HANDLERS: dict[str, Callable[[QueryContext], Sums]] = {
    "counts": sum_label_counts,
    "scores": sum_scores,
    "moments": sum_class_moments,
    "clusters": sum_clusters,
    "quality": sum_image_statistics,
}
