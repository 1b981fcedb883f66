"""The gate: a request is checked here, in full, before the policy is asked and before anything is computed.

`check_fields` (request_fields.py) says whether the fields are what they must be in any run;
`validate_request` whether they fit this run's configuration, which run_context.py has validated by the
coordinator's own checks. Whatever does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from client.federation.query_handlers import QUERY_HANDLERS
from common.config.names import name_clustering
from common.config.normalise import stage_tasks
from common.config.schema import Config, Task
from common.learning.losses import class_names
from common.modeling.encoder import feature_dim, make_encoder
from common.modeling.model import parameter_layout
from common.protocol.messages import (
    MaskedInputRequest,
    Request,
    ShareKeysRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskRequest,
)
from common.protocol.update_codec import select_codec
from common.utils.errors import Refused, suggest

MAX_CACHED_SIZES = 4  # a process serves one run or a few folds of it
_model_sizes: dict[str, tuple[int, int]] = {}  # {backbone and tasks: sizes of the model's two buffers}


def validate_request(config: Config, request: Request) -> None:
    """Raise Refused for a request whose fields do not fit the run's validated configuration."""
    for name, task in config.tasks.items():
        _check_fitted_clusters(name, task, request.run_id)
    if isinstance(request, TrainRequest):
        _validate_training(config, request)
    elif isinstance(request, StatisticsRequest):
        _validate_query(config, request)
    elif isinstance(request, ShareKeysRequest):
        _check_centres(config, request.roster, "roster")
    elif isinstance(request, MaskedInputRequest):
        _check_centres(config, request.shares, "shares")
    elif isinstance(request, UnmaskRequest):
        _check_centres(config, request.survivors, "survivors")


def _check_fitted_clusters(name: str, task: Task, run_id: str) -> None:
    """Check what the coordinator fills into a clustered task: this run's own clusters, no more than asked."""
    if not task.num_clusters:
        if task.clustering_id:
            raise Refused(f"task '{name}' has a clustering_id, but no num_clusters")
        return
    if task.clustering_id not in ("", name_clustering(run_id, name)):
        raise Refused(f"the clustering_id of task '{name}' is not this run's")
    num_classes = len(task.classes)
    numbers = [str(number) for number in range(num_classes)]
    if task.classes != numbers or num_classes > max(task.num_clusters):
        raise Refused(f"the classes of task '{name}' are not the numbers of its clusters")


def _validate_training(config: Config, request: TrainRequest) -> None:
    stage = _require_stage(config, request.stage)
    if request.round > config.stages[stage].rounds:
        raise Refused(f"stage '{stage}' has {config.stages[stage].rounds} rounds, and not {request.round}")
    if request.weights is None:
        raise Refused("a request to train has no weights")
    _check_weights(config, request)
    _check_personal_rounds(config, request.personal_rounds)
    for name, counts in request.global_counts.items():
        task = _require_task(config, name)
        if len(counts) != len(class_names(name, task)):
            raise Refused(f"the global counts of task '{name}' are not one for each of its classes")
    for name in stage_tasks(config, config.stages[stage]):
        if config.tasks[name].prior == "global" and name not in request.global_counts:
            raise Refused(f"the request has no global counts for the prior of task '{name}'")
    for name in request.total_label_weight:
        _require_task(config, name)


def _validate_query(config: Config, request: StatisticsRequest) -> None:
    if request.name not in QUERY_HANDLERS:
        valid = ", ".join(QUERY_HANDLERS)
        raise Refused(f"unknown query '{request.name}'; this centre answers {valid}")
    if request.stage:
        _require_stage(config, request.stage)
    if request.task:
        _require_task(config, request.task)
    _check_purpose(config, request)
    _check_weights(config, request)
    _check_personal_rounds(config, request.personal_rounds)
    _check_centroids(config, request)


def _check_purpose(config: Config, request: StatisticsRequest) -> None:
    """Refuse a query that the run's configuration, which the hospital may have approved, does not ask for."""
    task = config.tasks.get(request.task)
    if request.name == "moments" and (task is None or task.head_update != "moments"):
        raise Refused("this run has no use for class moments of that task (head_update: moments)")
    if request.name == "clusters" and (task is None or not task.num_clusters):
        raise Refused("this run has no use for clusters of that task (num_clusters)")
    if request.name == "quality" and not config.evaluation.image_statistics:
        raise Refused("this run has no use for image statistics (evaluation.image_statistics)")
    if request.clustering_id not in ("", name_clustering(request.run_id, request.task)):
        raise Refused("the request's clustering_id is not this run's and task's")


def _check_centroids(config: Config, request: StatisticsRequest) -> None:
    if request.name != "clusters":
        if request.centroids is not None or request.clustering_id:
            raise Refused(f"a query '{request.name}' has no centroids and no clustering_id")
        return
    if request.centroids is None:
        raise Refused("a query 'clusters' needs centroids")
    num_centroids, num_features = request.centroids.shape
    most = max(config.tasks[request.task].num_clusters)
    with torch.device("meta"):
        expected_features = feature_dim(make_encoder(config.backbone))
    if num_centroids > most or num_features != expected_features:
        raise Refused(
            f"the centroids have shape [{num_centroids}, {num_features}]; "
            f"it must be [1 to {most}, {expected_features}]"
        )


def _check_weights(config: Config, request: TrainRequest | StatisticsRequest) -> None:
    """Check the sizes of the weights, sent in full or as a change of those that the centre holds."""
    weights = request.weights
    if weights is None:
        if request.base_digest or request.encoded_delta or request.target_digest:
            raise Refused("the request has a change of weights, but no weights")
        return
    num_floats, num_counters = _find_model_sizes(config)
    if request.base_digest:
        if select_codec(config) == "fp32" or weights.floats.size or not request.target_digest:
            raise Refused("the request's weights are neither complete nor a change of earlier ones")
        num_floats = 0
    sizes = (weights.floats.size, weights.int_buffers.size)
    if sizes != (num_floats, num_counters):
        raise Refused(
            f"received {sizes[0]} weights and {sizes[1]} counters for a model with {num_floats} and "
            f"{num_counters}; the two sides run different recipes or code"
        )


def _find_model_sizes(config: Config) -> tuple[int, int]:
    """Return how many float values and integer counters the run's model has."""
    key = repr((config.backbone, config.tasks))
    if key not in _model_sizes:
        layout = parameter_layout(config)
        if len(_model_sizes) >= MAX_CACHED_SIZES:
            _model_sizes.clear()
        _model_sizes[key] = (layout.size, layout.int_buffer_size)
    return _model_sizes[key]


def _check_personal_rounds(config: Config, personal_rounds: Sequence[tuple[str, int]]) -> None:
    for stage, round_number in personal_rounds:
        _require_stage(config, stage)
        if round_number > config.stages[stage].rounds:
            raise Refused(f"stage '{stage}' has no round {round_number} whose layers could be used")


def _check_centres(config: Config, centres: Sequence[str] | Mapping[str, object], field: str) -> None:
    """Refuse a step of a secure sum with a centre that the run's configuration does not name."""
    strangers = set(centres) - set(config.federation.centres)
    if strangers:
        raise Refused(f"the request's {field} names '{min(strangers)}', which is no centre of this run")


def _require_stage(config: Config, name: str) -> str:
    if name not in config.stages:
        raise Refused(f"this run has no stage '{name}'{suggest(name, config.stages)}")
    return name


def _require_task(config: Config, name: str) -> Task:
    if name not in config.tasks:
        raise Refused(f"this run has no task '{name}'{suggest(name, config.tasks)}")
    return config.tasks[name]
