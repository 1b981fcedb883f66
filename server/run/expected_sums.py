"""What sums a query may be answered with: their keys, shapes, and the values that a centre can have computed.

The keys are those of the sender's own cohorts, so that no centre can speak for another.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from common.config.schema import Config
from common.learning.metrics.regression import RegressionSums
from common.learning.segmentation_metrics import OverlapSums
from common.modeling.parameters import Layout
from common.privacy.masked_layout import empty_sums
from common.privacy.secure_aggregation import COMBINED_COHORT
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import StatisticsRequest, Sums
from common.protocol.sum_key import LabelCountKey, LabelWeightKey, SumKey, replace_cohort
from server.run.reply_fields import (
    BadReply,
    require_array,
    require_finite,
    require_not_negative,
    require_whole,
)

Floats = NDArray[np.float64]
IMAGE_QUERY = "quality"
GROUP_QUERIES = ("moments", "clusters")  # their keys belong to no cohort
TABLES = ("hist", "confusion", "joint", "n")  # statistics all of whose cells are numbers of scans
TOLERANCE = 1e-6  # of sums of rounded numbers
MAX_MEAN_SQUARE = 1e12  # of a feature; those of a trained encoder are below 1e4
LABEL_WEIGHT_PART = "mass"  # in the place of a split in the keys of a secure sum's weights
SIGNED_REGRESSION_SUMS = ("labels", "predictions", "products")


def expected_sums(query: StatisticsRequest, config: Config, layout: Layout, cohorts: Collection[str]) -> Sums:
    """Return {key: zeros} of every sum that a centre with these cohorts may answer a query with."""
    if query.name == IMAGE_QUERY:
        template = {}
        for name, statistic in IMAGE_STATISTICS.items():
            key = str(SumKey(COMBINED_COHORT, IMAGE_QUERY, name))
            template[key] = np.zeros(len(statistic.bin_edges) - 1)
    else:
        template = empty_sums(query, config, layout)
        for task in config.tasks:  # the weights of a secure sum; else they follow from the counts
            template.pop(str(LabelWeightKey(COMBINED_COHORT, task)), None)
    expected: Sums = {}
    for cohort in cohorts:
        for key, zeros in template.items():
            expected[replace_cohort(key, cohort)] = zeros
    return expected


def require_expected_sums(query: StatisticsRequest, sums: Sums, expected: Sums) -> None:
    """Require sums that a centre can have computed in answer to a query. Raises BadReply."""
    for key, array in sums.items():
        if key not in expected:
            raise BadReply("sums has an entry that was not asked for, or that is of another centre")
        require_array(f"sum '{key}'", array, "float64", expected[key].shape)
    if query.name in GROUP_QUERIES:
        if sums and sums.keys() != expected.keys():
            raise BadReply("sums has only some of the moments")
    elif query.name == "scores":
        _require_losses(sums)
    require_possible_values(query, sums)


def require_possible_values(query: StatisticsRequest, sums: Sums) -> None:
    """Require values that sums over scans can have. Raises BadReply."""
    for key, array in sums.items():
        field = f"sum '{key}'"
        require_finite(field, array)
        if query.name == "counts":
            is_label_weight = LabelCountKey.parse(key).split == LABEL_WEIGHT_PART
            (require_not_negative if is_label_weight else require_whole)(field, array)
        elif query.name == IMAGE_QUERY:
            require_not_negative(field, array)
        else:
            _require_statistic(field, key.rpartition("/")[2], array)
    if query.name in GROUP_QUERIES and sums:
        _require_possible_moments(sums)


def _require_losses(sums: Sums) -> None:
    """Require the losses of every task of which there is another statistic: they are shown together."""
    for text in sums:
        key = SumKey.parse(text)
        if str(key._replace(statistic="loss")) not in sums:
            raise BadReply(f"sums has no losses of task '{key.task}'")


def _require_statistic(field: str, statistic: str, array: Floats) -> None:
    if statistic in TABLES:
        require_whole(field, array)
    elif statistic == "loss":
        require_not_negative(field, array)
        require_whole(field, array[1:])
    elif statistic == "overlap":
        _require_overlap(field, array)
    elif statistic == "regression":
        totals = RegressionSums(*map(float, array))
        require_whole(field, np.array([totals.scans, totals.values]))
        for name, value in totals._asdict().items():
            if name not in SIGNED_REGRESSION_SUMS:
                require_not_negative(field, np.array([value]))


def _require_overlap(field: str, array: Floats) -> None:
    totals = OverlapSums(*map(float, array))
    require_not_negative(field, array)
    require_whole(field, np.array([totals.scans, totals.tp, totals.fp, totals.fn, totals.affected_scans]))
    limits = [
        (totals.affected_scans, totals.scans),
        (totals.dice, totals.scans),
        (totals.dice_affected, totals.affected_scans),
    ]
    for value, limit in limits:
        if value > limit + TOLERANCE * (1 + limit):
            raise BadReply(f"{field} has a larger sum of Dice, or more affected scans, than scans")


def _require_possible_moments(sums: Sums) -> None:
    """Require that n, sum and square are moments of real vectors (inequality of Cauchy and Schwarz)."""
    counts, totals, squares = sums["n"], sums["sum"], sums["square"]
    if (totals[counts == 0] != 0).any():
        raise BadReply("sum 'sum' has features of a group without scans")
    weighted = totals / np.sqrt(np.maximum(counts, 1))[:, None]
    if squares.ndim == 1:  # one number for each cluster
        within = squares - (weighted**2).sum(1)
        size = float(squares.max(initial=0))
        is_possible = bool((within >= -TOLERANCE * squares).all() and (squares[counts == 0] == 0).all())
    else:
        scatter = squares - weighted.T @ weighted
        size = float(np.trace(squares))
        asymmetry = float(np.abs(squares - squares.T).max(initial=0))
        is_possible = asymmetry <= TOLERANCE * size and _is_positive(scatter, TOLERANCE * size)
    if not is_possible or size > MAX_MEAN_SQUARE * max(float(counts.sum()), 1) * totals.shape[1]:
        raise BadReply("sum 'square' cannot be the squares of the features in sum 'sum'")


def _is_positive(matrix: Floats, tolerance: float) -> bool:
    """Tell whether a symmetric matrix has no eigenvalue below minus the tolerance."""
    margin = (tolerance + np.finfo(np.float64).tiny) * np.eye(len(matrix))
    try:
        np.linalg.cholesky((matrix + matrix.T) / 2 + margin)
    except np.linalg.LinAlgError:
        return False
    return True
