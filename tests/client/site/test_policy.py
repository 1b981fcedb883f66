"""What a hospital's policy allows, and what it tells the operator when it does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from client.data.loading import clear_dataset_cache
from client.federation.handlers import handle_request
from client.phantom.federation import write_centre
from client.site import egress_log
from client.site.config import Site
from client.site.policy import (
    Policy,
    authorise,
    describe_policy,
    list_open_rules,
    load_policy,
)
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import PhantomConfig, Task
from common.learning.losses import list_read_columns
from common.modeling.parameters import Weights
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    StatisticsReply,
    StatisticsRequest,
    TrainRequest,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError, RefusalCode, Refused

CONFIG = compose_config(["recipe=triage"])
NOON = datetime(2026, 1, 1, 12, 0)
NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
TRAIN = TrainRequest("run", {}, "main", 1, NO_WEIGHTS)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(fingerprints=["abc"]), f"does not allow the code '{fingerprint_code()}' (allowed: abc)"),
        (
            Policy(allowed_labels=["covid", "lesion"]),
            "does not allow the label 'severity' (allowed: covid, lesion)",
        ),
        (Policy(queries=["scores"]), "does not allow the query 'counts' (allowed: scores)"),
        (
            Policy(allowed_hours="19:00-07:00"),
            "allows computation in the hours 19:00-07:00 only; the time there is 12:00",
        ),
        (Policy(require_secure_aggregation=True), "requires secure aggregation"),
        (Policy(min_centres=9), "requires 9 centres or more, and this run has 4"),
        (Policy(epsilon=3), "requires differential privacy (epsilon at most 3)"),
    ],
)
def test_forbidden_request_is_refused_with_the_rule(policy: Policy, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        authorise(policy, StatisticsRequest("run", {}, "counts", ""), CONFIG, NOON)
    assert sentence in str(caught.value)
    assert caught.value.code == RefusalCode.POLICY


def test_limit_on_epsilon_requires_a_private_run() -> None:
    private = compose_config(["privacy=patient"])
    authorise(Policy(epsilon=3), TRAIN, private, NOON)  # client/site/privacy_budget.py keeps to the limit
    assert "delta" not in describe_policy(Policy())
    assert describe_policy(Policy(epsilon=3)) == {"epsilon": 3, "delta": 1e-5, "min_cell_count": 1}
    with pytest.raises(ValueError, match="delta is 1"):
        Policy(delta=1)


def test_allowed_request_passes() -> None:
    policy = Policy(
        fingerprints=[fingerprint_code()],
        allowed_labels=["covid", "lesion", "severity"],
        queries=["counts"],
        allowed_hours="08:00-18:00",
    )
    authorise(policy, StatisticsRequest("run", {}, "counts", ""), CONFIG, NOON)
    authorise(policy, TRAIN, CONFIG, NOON)
    at_night = replace(policy, allowed_hours="19:00-07:00")
    for request in (JoinRequest("run", {}), TRAIN, StatisticsRequest("run", {}, "counts", "")):
        with pytest.raises(
            Refused, match="takes part again from 19:00 on"
        ):  # joining preprocesses every scan
            authorise(at_night, request, CONFIG, NOON)
    authorise(at_night, UnmaskRequest("run", {}, "sum", []), CONFIG, NOON)  # a sum that was begun is finished
    for hour, minute in ((19, 0), (23, 59), (6, 59)):
        authorise(at_night, TRAIN, CONFIG, NOON.replace(hour=hour, minute=minute))


@pytest.mark.parametrize(
    ("overrides", "column"),
    [
        (["recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.label_column=hiv"], "hiv"),
        (["recipe=triage", "tasks.lesion.severity_column=hiv"], "hiv"),
        (["recipe=prognosis"], "brixia_f"),
        (["recipe=multisource"], "source"),
    ],
)
def test_every_column_that_a_run_reads_must_be_allowed(overrides: list[str], column: str) -> None:
    """Also the column that says who is clustered, severity, and a mask's beside the label columns."""
    config = compose_config(overrides)
    others = ["covid", "severity", "lesion", "outcome", *(f"brixia_{letter}" for letter in "abcde")]
    others += ["target", "transition"]
    with pytest.raises(Refused, match=f"does not allow the label '{column}'"):
        authorise(Policy(allowed_labels=others), TRAIN, config, NOON)
    authorise(Policy(allowed_labels=[*others, column]), TRAIN, config, NOON)


def test_column_of_a_mask_is_read_whatever_other_columns_the_task_names() -> None:
    mask = Task(type="segmentation", label_column="hiv", label_columns=["covid"], severity_column="severity")
    assert list_read_columns("lesion", mask) == ["covid", "hiv", "severity"]
    assert list_read_columns("lesion", Task(type="segmentation", label_columns=["covid"])) == [
        "covid",
        "lesion",
    ]


def test_policy_says_what_it_leaves_open() -> None:
    sentences = list_open_rules(Policy())
    keys = ("require_approval", "allowed_labels", "min_cell_count", "epsilon")
    for key, sentence in zip(keys, sentences, strict=True):
        assert key in sentence
    closed = Policy(require_approval=True, allowed_labels=["covid"], min_cell_count=5, epsilon=3)
    assert not list_open_rules(closed)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("query: [a]", "unknown key 'query'; did you mean 'queries'"),
        ("queries: counts", "queries is 'counts'; it should be a valid list"),
        ("queries: [1]", "queries.0 is 1; it should be a valid string"),
        ("queries:", "queries is None; it should be a valid list"),
        (
            "recipes: [multisource]",
            "'recipes' protects nothing, because the coordinator writes a recipe's name",
        ),
        ("recipes: []", "remove it, set require_approval: true, and approve each recipe"),
        ("min_cell_count: 0", "min_cell_count must be 1 or more"),
        ("min_cell_count: yes", "min_cell_count is True; it should be a valid integer"),
        ("epsilon: yes", "epsilon is True; it should be a valid number"),
        ("epsilon: -1", "epsilon must be 0 or more, not -1"),
        ("allowed_hours: at night", "allowed_hours is 'at night'; write it like 19:00-07:00"),
        ("- a", "cannot be read"),
    ],
)
def test_wrong_policy_is_refused_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConsiliumError) as caught:
        load_policy(str(tmp_path / "policy.yaml"))
    assert sentence in str(caught.value)
    with pytest.raises(ConsiliumError, match="nothing leaves until it can"):
        load_policy(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("old_line", "new_key"),
    [
        ("smallest_cell: 5", "min_cell_count"),
        ("labels: [covid]", "allowed_labels"),
        ("max_bytes: 9", "max_message_bytes"),
        ("hours: 19:00-07:00", "allowed_hours"),
        ("secure_aggregation: true", "require_secure_aggregation"),
        ("smallest_federation: 4", "min_centres"),
        ("noise: 2", "min_query_noise"),
    ],
)
def test_key_of_the_previous_version_is_refused_with_its_new_name(
    tmp_path: Path, old_line: str, new_key: str
) -> None:
    (tmp_path / "policy.yaml").write_text(f"{old_line}\n")
    old_key = old_line.partition(":")[0]
    with pytest.raises(ConsiliumError, match=f"policy.yaml: '{old_key}' is now '{new_key}'; rename it$"):
        load_policy(str(tmp_path / "policy.yaml"))


def test_whole_number_is_accepted_for_a_decimal(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("epsilon: 4\ngpu_memory: 8\nmin_query_noise: 20\n")
    assert load_policy(str(tmp_path / "policy.yaml")) == Policy(epsilon=4, gpu_memory=8, min_query_noise=20)


def test_hospital_enforces_its_policy_and_records_what_leaves(tmp_path: Path) -> None:
    folder = write_centre(tmp_path, "north", PhantomConfig(scale=0.02, num_slices=12, image_size=64))
    (tmp_path / "policy.yaml").write_text("queries: [counts]\nmin_cell_count: 5\n")
    assert describe_policy(load_policy(str(tmp_path / "policy.yaml"))) == {
        "queries": ["counts"],
        "min_cell_count": 5,
    }
    site = Site(centre="north", data=str(folder), device="cpu", policy=str(tmp_path / "policy.yaml"))
    config = config_to_dict(
        compose_config(["federation=folder", "federation.centres=[north]", "preprocess.image_size=32"])
    )
    clear_dataset_cache()
    assert isinstance(handle_request(site, JoinRequest("run", config)), JoinReply)
    counts = handle_request(site, StatisticsRequest("run", config, "counts", ""))
    assert isinstance(counts, StatisticsReply)
    assert all(((n == 0) | (n >= 5)).all() for n in counts.sums.values())
    refused = handle_request(site, StatisticsRequest("run", config, "quality", ""))
    assert isinstance(refused, Refusal)
    assert "does not allow the query 'quality'" in refused.reason
    assert refused.code == RefusalCode.POLICY
    kinds = [entry.kind for entry in egress_log.read_entries(folder / ".consilium")]
    assert kinds == ["JoinReply", "StatisticsReply", "Refusal"]
