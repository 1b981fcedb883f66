"""Configuration: one schema, one override syntax, and a sentence for what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from common.compose import CONFIGS, compose, config_from, to_dict
from common.errors import ConsiliumError


@pytest.mark.parametrize("group", [p.name for p in CONFIGS.iterdir() if p.is_dir()])
def test_every_file_composes(group: str) -> None:
    for file in (CONFIGS / group).glob("*.yaml"):
        extra = ["federation.centres=[a,b]"] if (group, file.stem) == ("federation", "folder") else []
        assert compose([f"{group}={file.stem}", *extra]).tasks


def test_travels_as_json() -> None:
    config = compose(["stage.rounds=3"])
    assert config_from(json.loads(json.dumps(to_dict(config)))) == config
    assert asdict(config)["stages"]["main"]["rounds"] == 3


def test_stage_sets_every_stage_and_stages_one() -> None:
    assert compose(["stage.rounds=3", "stage.optimiser.lr=0.5"]).stages["main"].optimiser.lr == 0.5
    assert compose(["stage.rounds=3", "stages.main.rounds=4"]).stages["main"].rounds == 4


def test_local_mode_exchanges_nothing() -> None:
    config = compose(["federation.mode=local"])
    assert all(s.personal == ["all"] for s in config.stages.values())
    assert all(t.head == "local" for t in config.tasks.values())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("recipe=multisorce", "recipe 'multisorce' is unknown; did you mean 'multisource'?"),
        ("backbone=smal", "did you mean 'small'"),
        ("aggregation.tua=1", "unknown key 'aggregation.tua'; did you mean 'tau'?"),
        ("stage.rouds=2", "did you mean 'rounds'"),
        ("tasks.covd.tau=1", "the recipe has no task 'covd'; did you mean 'covid'?"),
        ("aggregation.tau=5", r"aggregation.tau is 5.0; it must be in \[0, 2\]"),
        ("stage.rounds=-1", "stage.rounds is -1"),
        ("stage.rounds=many", "stages.main.rounds='many' is refused"),
        ("aggregation.method=fedsgd", "aggregation.method='fedsgd' is refused"),
        ("aggregation.tau", "has no '='"),
        ("federation=folder", "federation.centres is empty"),
        ("federation.centres=[a,a]", "names a centre twice"),
        ("evaluation.task=covd", "did you mean 'covid'"),
        ("preprocess.window=[300,-1000]", "the first value must be the lower one"),
        ("stage.tasks=[covd]", "did you mean 'covid'"),
        ("stage.personal=[all]", "exchanges nothing"),
        ("stage.personal=[heads]", "keeps the heads at the centres, but task 'source' has one that the server moves; set its head: local"),
    ],
)
def test_what_is_wrong_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConsiliumError, match=sentence) as caught:
        compose([override])
    assert "\n" not in str(caught.value)
