"""Decide from a run's configuration what is summed securely and how many centres a sum needs."""

from __future__ import annotations

import math

from common.config.schema import Config, SecureAggregationConfig
from common.protocol.messages import Request, StatisticsRequest, TrainRequest
from common.utils.errors import Refused

MIN_CENTRES = 3  # with two, each could subtract its own values from the sum
COMBINED_COHORT = "all"  # the cohort that stands for every centre's cohorts in a secure sum


def require_secagg_config(config: Config) -> SecureAggregationConfig:
    """Return the settings of secure aggregation.

    Raises:
        Refused: The run does not use it.
    """
    if config.privacy.secagg is None:
        raise Refused("this run does not use secure aggregation; use privacy=secagg")
    return config.privacy.secagg


def hides_statistics(config: Config) -> bool:
    """Return whether the centres' counts and metrics are summed securely, too."""
    return config.privacy.secagg is not None and config.privacy.secagg.scope == "all"


def uses_secagg(config: Config, request: Request) -> bool:
    """Return whether the reply to a request is part of a secure sum."""
    if isinstance(request, TrainRequest):
        exchanges_weights = "all" not in config.stages[request.stage].local_layers
        return config.privacy.secagg is not None and exchanges_weights
    return isinstance(request, StatisticsRequest) and hides_statistics(config)


def compute_min_survivors(config: Config, num_started: int) -> int:
    """Return how many of the centres that started a sum must stay to its end.

    It is always more than half of them, so that no two such groups can reveal different secrets of one
    centre.
    """
    majority = num_started // 2 + 1
    by_threshold = math.ceil(require_secagg_config(config).threshold * num_started)
    return max(MIN_CENTRES, majority, by_threshold)
