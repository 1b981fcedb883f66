"""The centre's answers: what it says, that it never raises, and that no path, name or error text crosses the wall."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import client.scans
from client.answer import answer
from client.phantom import write_centre
from client.site import Site
from common.compose import compose, to_dict
from common.errors import ConsiliumError
from common.fingerprint import fingerprint
from common.messages import Answer, Contribution, Hello, Presence, Query, Refusal, Reply, Train
from common.model import make_model
from common.schema import Config, Phantom
from common.weights import Weights, flatten, layout_of

WHO = "DOE^JANE-1957"  # stands in every path of these hospitals, and must stay there
TINY = Phantom(scale=0.001, slices=10, pixels=64)  # 8 scans to train on, 6 and 6 others


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(tmp_path_factory.mktemp("data") / WHO, "north", TINY)


@pytest.fixture
def copy(hospital: Path, tmp_path: Path) -> Path:
    """The same hospital, to be spoilt; what is preprocessed already comes along."""
    return shutil.copytree(hospital, tmp_path / WHO)


def config_of(*overrides: str) -> Config:
    few = ["federation=folder", "federation.centres=[north,south]", "preprocess.size=32", "preprocess.crop=none", "stage.batch=4"]
    config = compose([*few, "stage.precision=fp32", "aggregation.codec=fp32", *overrides])
    tasks = {n: replace(t, classes=["north", "south"]) if n == "source" else t for n, t in config.tasks.items()}
    return replace(config, tasks=tasks)


def site_of(data: Path, **more: object) -> Site:
    return Site(centre="north", data=str(data), device="cpu", threads=1, **more)  # type: ignore[arg-type]


def start(config: Config) -> Weights:
    model = make_model(config.backbone, config.tasks, 1)
    return flatten(model, layout_of(model))


def train(config: Config, round: int = 1, weights: Weights | None = None, **more: object) -> Train:
    counts = {"covid": [8.0, 8.0], "source": [8.0, 8.0]}
    return Train("run", to_dict(config), "main", round, weights or start(config), counts, **more)  # type: ignore[arg-type]


def contribution(reply: Reply) -> Contribution:
    assert isinstance(reply, Contribution), reply
    return reply


def reason(reply: Reply) -> str:
    """A refusal's text, which is one sentence without a path or a name."""
    assert isinstance(reply, Refusal), reply
    assert WHO not in f"{reply.centre} {reply.reason}"
    assert "\n" not in reply.reason
    assert "/" not in reply.reason
    return reply.reason


def relabel(folder: Path, **columns: object) -> None:
    table = pd.read_csv(folder / "cohort.csv")
    table.assign(**columns).to_csv(folder / "cohort.csv", index=False)


# --- what a healthy centre says -------------------------------------------------------------------------------------------------------


def test_presence_tells_what_there_is_and_no_more(hospital: Path) -> None:
    said = answer(site_of(hospital), Hello("run", to_dict(config_of())))
    assert isinstance(said, Presence), said
    assert (said.centre, said.cohorts, said.sources, said.device) == ("north", ["north"], ["north"], "cpu")
    assert said.scans == {"train": 8, "val": 6, "test": 6}
    assert said.columns == ["covid", "source"]
    assert (said.skipped, said.fingerprint) == ({}, fingerprint())
    assert WHO not in repr(said)
    patients = pd.read_csv(hospital / "cohort.csv")["patient"]
    assert not [p for p in patients if p in repr(said)]


def test_counts_are_the_tables(hospital: Path) -> None:
    reply = answer(site_of(hospital), Query("run", to_dict(config_of()), "counts", ""))
    assert isinstance(reply, Answer), reply
    assert {k: n.tolist() for k, n in reply.sums.items()} == {
        **{f"north/{split}/covid": [n, n, 0] for split, n in (("train", 4), ("val", 3), ("test", 3))},
        **{f"north/{split}/source": [n, 0, 0] for split, n in (("train", 8), ("val", 6), ("test", 6))},
    }
    hidden = answer(site_of(hospital, smallest_cell=5), Query("run", to_dict(config_of()), "counts", ""))
    assert isinstance(hidden, Answer)
    assert hidden.sums["north/val/covid"].tolist() == [5, 5, 0]


def test_a_round_is_the_same_bits_each_time_and_differs_by_round(hospital: Path) -> None:
    config = config_of()
    one, two, other = (contribution(answer(site_of(hospital), train(config, round))) for round in (1, 1, 2))
    assert (one.centre, one.scans, one.steps) == ("north", 8, 2)
    assert one.delta.shape == start(config).floats.shape
    assert one.delta.dtype == np.float32
    assert np.isfinite(one.delta).all()
    assert float(np.abs(one.delta).max()) > 0
    assert one.losses["covid"][1] == 8
    np.testing.assert_array_equal(one.delta, two.delta)
    assert not np.array_equal(one.delta, other.delta)


def test_scores_move_with_the_weights(hospital: Path) -> None:
    config = config_of("stage.epochs=10")
    weights = start(config)
    after = Weights(weights.floats + contribution(answer(site_of(hospital), train(config))).delta, weights.integers)
    replies = [answer(site_of(hospital), Query("run", to_dict(config), "scores", "main", "train", "", w)) for w in (weights, after)]
    losses = [r.sums["north/covid/loss"] for r in replies if isinstance(r, Answer)]
    assert [n for _, n in losses] == [8, 8]
    assert not np.array_equal(*losses)
    assert all(r.sums["north/covid/hist"].sum() == 8 for r in replies if isinstance(r, Answer))


def test_what_is_personal_stays_and_comes_back(hospital: Path, tmp_path: Path) -> None:
    """With batch norms kept local, what others' batch norms are makes no difference from the second round on."""
    config, site = config_of("stage.personal=[batch_norm]"), site_of(hospital, state=str(tmp_path))
    weights = start(config)
    layout = layout_of(make_model(config.backbone, config.tasks, 1))
    norms = np.zeros(layout.size, bool)
    for e in layout.floats:
        norms[e.where] = e.batch_norm
    contribution(answer(site, train(config, 1, weights, personal=[("main", 0)])))
    others = Weights(np.where(norms, 3.0, weights.floats).astype(np.float32), weights.integers + 100)
    after = []
    for received in (weights, others):
        reply = contribution(answer(site, train(config, 2, received, personal=[("main", 1)], keep=[1])))
        after.append(received.floats + reply.delta)
    np.testing.assert_allclose(after[0], after[1], atol=1e-5)
    first = contribution(answer(site, train(config, 1, others, personal=[("main", 0)])))  # nothing was kept before round 1
    assert not np.allclose(others.floats + first.delta, after[0], atol=1e-3)


def test_with_all_weights_personal_none_leave(hospital: Path, tmp_path: Path) -> None:
    reply = answer(site_of(hospital, state=str(tmp_path)), train(config_of("federation.mode=local")))
    assert contribution(reply).delta.size == 0
    assert len(list((tmp_path / "personal" / "run" / "main").iterdir())) == 1


def test_a_node_without_a_part_is_present_and_refuses(tmp_path: Path) -> None:
    config = config_of(f"federation.root={tmp_path}")
    said = answer(Site(index=7, device="cpu"), Hello("run", to_dict(config)))
    assert isinstance(said, Presence)
    assert (said.centre, said.cohorts, said.scans) == ("", [], {})
    assert reason(answer(Site(index=7), train(config))) == "node 7 has no part in this run"


def test_a_made_up_centre_of_any_name_is_the_one_that_the_command_wrote(tmp_path: Path) -> None:
    """A name that is none of the four takes a profile by its place: the same for the command and for the node."""
    settings = ["federation.centres=[first,second]", "federation.phantom.scale=0.001", "federation.phantom.slices=10"]
    config = compose(
        [*settings, "federation.phantom.pixels=64", "preprocess.size=32", "preprocess.crop=none", f"federation.root={tmp_path}"]
    )
    assert config.federation.phantom is not None
    folder = write_centre(tmp_path, "second", config.federation.phantom, 1)
    written = (folder / "cohort.csv").stat().st_mtime_ns
    assert isinstance(answer(Site(index=1, device="cpu"), Hello("run", to_dict(config))), Presence)
    assert (folder / "cohort.csv").stat().st_mtime_ns == written


# --- a centre in trouble --------------------------------------------------------------------------------------------------------------


def test_corrupt_scans_are_counted_and_the_centre_trains_on(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pd.read_csv(copy / "cohort.csv")
    train_scans = table[table["split"] == "train"]["path"].tolist()
    for file in (copy / train_scans[0]).iterdir():
        file.write_bytes(file.read_bytes()[:3000])  # cut short in the pixels
    for file in (copy / train_scans[1]).iterdir():
        file.write_bytes(b"no DICOM at all")
    shutil.rmtree(copy / train_scans[2])
    caplog.set_level(logging.DEBUG)
    said = answer(site_of(copy), Hello("run", to_dict(config_of())))
    assert isinstance(said, Presence), said
    assert said.scans == {"train": 5, "val": 6, "test": 6}
    assert sum(said.skipped.values()) == 3
    assert "it is not there" in said.skipped
    assert contribution(answer(site_of(copy), train(config_of()))).scans == 5
    for text in (repr(said), caplog.text):
        assert WHO not in text
        assert not [name for name in train_scans if name in text]


def test_a_cohort_of_which_nothing_can_be_read(copy: Path) -> None:
    shutil.rmtree(copy / "dicom")
    said = reason(answer(site_of(copy), Hello("run", to_dict(config_of()))))
    assert said == "no scan could be read (20 were skipped); run `consilium-centre preprocess` there and read its list"


def test_a_data_path_that_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = tmp_path / WHO / "gone"
    said = reason(answer(site_of(gone), Hello("run", to_dict(config_of()))))
    assert said == (
        "centre 'north' has no data: the `data` of site.yaml does not exist; write a cohort there with `consilium-centre cohort`"
    )
    assert WHO not in caplog.text
    assert "set `data` in site.yaml" in reason(answer(Site(centre="north"), Hello("run", to_dict(config_of()))))


def test_in_simulation_a_missing_folder_is_named_by_its_key(tmp_path: Path) -> None:
    reply = answer(Site(index=1), Hello("run", to_dict(config_of(f"federation.root={tmp_path}"))))
    assert isinstance(reply, Refusal)
    assert (reply.centre, "federation.root/south does not exist" in reply.reason) == ("south", True)


@pytest.mark.parametrize("text", ["", "scan,path,split,covid\n"])
def test_an_empty_cohort(copy: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "cohort.csv").write_text(text)
    said = reason(answer(site_of(copy), Hello("run", to_dict(config_of()))))
    assert "the sentence is in the centre's log" in said
    assert "centre 'north': its cohort table is empty; it must hold at least one scan" in caplog.text
    assert WHO not in caplog.text


def test_without_labels_for_the_stages_tasks_the_centre_says_so(copy: Path) -> None:
    relabel(copy, covid=np.nan)
    assert reason(answer(site_of(copy), train(config_of("stage.tasks=[covid]")))) == (
        "8 training scans, none labelled for covid; check the cohort's split and label columns"
    )


def test_without_labels_for_one_task_it_trains_the_others(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pd.read_csv(copy / "cohort.csv").drop(columns="covid")
    table.to_csv(copy / "cohort.csv", index=False)
    config = config_of()
    said = answer(site_of(copy), Hello("run", to_dict(config)))
    assert isinstance(said, Presence)
    assert said.columns == ["source"]
    assert "no column 'covid' for task 'covid': this centre adds nothing to it" in caplog.text
    reply = contribution(answer(site_of(copy), train(config)))
    assert (reply.losses["covid"], reply.losses["source"][1]) == ([0.0, 0], 8)
    layout = layout_of(make_model(config.backbone, config.tasks, 1))
    assert {e.group for e in layout.floats if np.any(reply.delta[e.where])} == {"backbone", "source"}


def test_a_centre_with_one_class_trains_and_is_scored(copy: Path) -> None:
    relabel(copy, covid=0)
    config = config_of()
    assert contribution(answer(site_of(copy), train(config))).losses["covid"][1] == 8
    reply = answer(site_of(copy), Query("run", to_dict(config), "scores", "main", "val", "", start(config)))
    assert isinstance(reply, Answer), reply
    assert reply.sums["north/covid/hist"].sum(1).tolist() == [6, 0]


def test_a_label_that_is_no_class(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    relabel(copy, covid=7)
    assert "the sentence is in the centre's log" in reason(answer(site_of(copy), Hello("run", to_dict(config_of()))))
    assert "column 'covid' has 20 values that are neither 0 nor 1; write 0, 1 or nothing" in caplog.text


def test_a_loss_that_is_not_finite(hospital: Path) -> None:
    weights = start(config_of())
    weights.floats[:] = np.nan
    reason(answer(site_of(hospital), train(config_of(), weights=weights)))


# --- a coordinator that asks for the wrong thing --------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_and_never_raise(hospital: Path) -> None:
    site, config = site_of(hospital), config_of()
    good = to_dict(config)
    wrong = start(config)
    wrong = Weights(wrong.floats[:-1], wrong.integers)
    requests = [
        Query("run", good, "pixels", "main"),
        Query("run", good, "scores", "finetune", "val", "", start(config)),
        Query("run", good, "scores", "main", "everything", "", start(config)),
        Query("run", good, "moments", "main", "train", "age", start(config)),
        Query("run", good, "scores", "main", "val", "", wrong),
        Hello("run", {**good, "secrets": 1}),
        Hello("run", {**good, "seed": "one"}),
        Train("run", good, "finetune", 1, start(config)),
        train(config, weights=wrong),
        train(config, personal=[("..", 1)]),
        train(config_of("backbone.name=resnett18"), weights=start(config)),
        train(config_of("federation.mode=central")),
        replace(train(config, personal=[("main", 1)]), run=".."),
    ]
    for request in requests:
        assert reason(answer(site, request))
    assert reason(answer(site, requests[0])) == "query 'pixels' is not one this centre answers: counts, scores, moments, clusters, quality"
    assert "is for simulation only" in reason(answer(site, requests[-2]))
    assert "is not a name for a run or a stage" in reason(answer(site, requests[-1]))
    assert "shows no GPU" in reason(answer(replace(site, device="cuda"), train(config))) or torch.cuda.is_available()


@pytest.mark.parametrize(
    "error", [OSError(2, "No such file", f"/data/{WHO}/scan"), KeyError(f"/data/{WHO}"), RuntimeError(f"{WHO}\nand more")]
)
def test_an_unexpected_errors_text_stays_out_of_the_refusal_and_the_log(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(client.scans, "preprocess", fails)
    said = reason(answer(site_of(hospital), Hello("run", to_dict(config_of()))))
    assert said.startswith(f"{type(error).__name__} in test_answer.fails, line ")
    assert WHO not in caplog.text
    assert "fails" in caplog.text  # where it was, for whoever mends it


def test_a_sentence_of_ours_may_name_a_file_so_it_stays_in_a_hospital(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConsiliumError("the store is full; make room")

    monkeypatch.setattr(client.scans, "preprocess", fails)
    request = Hello("run", to_dict(config_of(f"federation.root={tmp_path}")))
    said = reason(answer(site_of(hospital), request))
    assert "full" not in said
    assert said.endswith("the sentence is in the centre's log")
    assert "the store is full; make room" in caplog.text
    write_centre(tmp_path, "north", TINY)
    assert reason(answer(Site(index=0, device="cpu"), request)) == "the store is full; make room"


# --- the other papers' recipes ----------------------------------------------------------------------------------------------------------


def recipe(*overrides: str) -> Config:
    few = ["federation=folder", "federation.centres=[north,south]", "preprocess.size=32", "preprocess.crop=none", "preprocess.slices=1"]
    return compose(
        [*few, "stage.precision=fp32", "aggregation.codec=fp32", "stage.batch=4", "backbone.decoder.widths=[8,8,8,8,4]", *overrides]
    )


def test_only_asked_columns_are_named_and_films_are_no_ct(hospital: Path) -> None:
    """The table also holds severity, lesions and outcomes: what a recipe does not ask for is nobody's business."""
    for overrides, columns in (
        (["recipe=finegrained"], ["finding", "infection"]),
        (["recipe=triage"], ["covid", "lesion"]),
        (["recipe=prognosis"], ["outcome"]),
    ):
        said = answer(site_of(hospital), Hello("run", to_dict(recipe(*overrides))))
        assert isinstance(said, Presence), said
        assert (said.columns, said.scans, said.skipped) == (columns, {"train": 8, "val": 6, "test": 6}, {})
        assert "masks" not in repr(said)


@pytest.mark.parametrize(
    ("overrides", "stage", "scans", "moved"),
    [
        (["recipe=finegrained"], "pretrain", {"moco": 8}, {"backbone", "moco"}),
        (
            ["recipe=finegrained", "stages.pretrain.tasks=[inpainting]"],
            "pretrain",
            {"inpainting": 8},
            {"backbone", "decoder", "inpainting"},
        ),
        (["recipe=finegrained"], "main", {"finding": 8, "infection": 8}, {"backbone", "decoder", "finding", "infection"}),
        (["recipe=prognosis"], "main", {"outcome": 8, "brixia": 0}, {"backbone", "outcome"}),
    ],
)
def test_a_stage_moves_what_its_tasks_stand_on(
    hospital: Path, overrides: list[str], stage: str, scans: dict[str, int], moved: set[str]
) -> None:
    """And the same bits each time, self-supervised too."""
    config = recipe(*overrides, "stage.epochs=1")
    weights = start(config)
    request = Train("run", to_dict(config), stage, 1, weights)
    one, two = (contribution(answer(site_of(hospital), request)) for _ in range(2))
    np.testing.assert_array_equal(one.delta, two.delta)
    assert {t: n for t, (_, n) in one.losses.items()} == scans
    layout = layout_of(make_model(config.backbone, config.tasks, 1))
    assert {e.group for e in layout.floats if np.any(one.delta[e.where])} == moved
    assert np.isfinite(one.delta).all()


def test_the_rate_of_a_plateau_is_obeyed(hospital: Path) -> None:
    config = recipe("recipe=prognosis", "stage.tasks=[outcome]", "stage.optimiser.name=sgd", "stage.epochs=1", "stage.batch=8")
    tasks = {t: replace(task, dropout=0.0) for t, task in config.tasks.items()}
    config = replace(config, tasks=tasks)
    weights = start(config)
    layout = layout_of(make_model(config.backbone, config.tasks, 1))
    one, half = (
        contribution(answer(site_of(hospital), Train("run", to_dict(config), "main", 1, weights, rate=rate))).delta for rate in (1.0, 0.5)
    )
    head = [e for e in layout.floats if e.group == "outcome"]
    for e in head:  # one step: half the rate is half the step
        np.testing.assert_allclose(half[e.where], 0.5 * one[e.where], rtol=1e-3, atol=1e-7)
    assert any(np.any(one[e.where]) for e in head)


def clusters(config: Config, run: str = "run", **more: object) -> Query:
    return Query(run, to_dict(config), "clusters", "", "train", "soft", **more)  # type: ignore[arg-type]


def test_clusters_are_kept_here_and_only_sums_leave(hospital: Path, tmp_path: Path) -> None:
    config = recipe("recipe=transfer", "stages.transition.tasks=[soft]", "tasks.soft.clusters=[2]")
    site, weights = site_of(hospital, state=str(tmp_path)), start(config)
    centroids = np.random.default_rng(0).normal(size=(2, 96))
    reply = answer(site, clusters(config, weights=weights, centroids=centroids))
    assert isinstance(reply, Answer), reply
    assert {k: v.shape for k, v in reply.sums.items()} == {"n": (2,), "sum": (2, 96), "square": (2,)}
    assert reply.sums["n"].sum() == 8
    middle = reply.sums["sum"].sum(0) / 8
    apart = np.stack([middle + 1e-3 * centroids[0], middle - 1e-3 * centroids[0]])
    again = answer(site, clusters(config, centroids=apart))  # no weights: the features are here
    assert isinstance(again, Answer), again
    kept = answer(site, clusters(config, weights=weights, centroids=apart, clustering="run-soft"))
    assert isinstance(kept, Answer)
    np.testing.assert_array_equal(kept.sums["n"], again.sums["n"])
    named = replace(config, tasks=config.tasks | {"soft": replace(config.tasks["soft"], clustering="run-soft")})
    counts = answer(site, Query("run", to_dict(named), "counts", ""))
    assert isinstance(counts, Answer)
    assert counts.sums["north/train/soft"].tolist() == [*again.sums["n"].tolist(), 0]
    assert counts.sums["north/test/soft"].sum() == 6
    assert "features of this run are gone" in reason(answer(site, clusters(config, centroids=apart)))
    for wrong in (
        clusters(config, weights=weights, centroids=centroids[:, :7]),
        clusters(config, weights=weights, clustering="run-soft"),
        clusters(config, weights=weights, centroids=apart, clustering=".."),
        clusters(config, "..", weights=weights, centroids=apart),
    ):
        assert reason(answer(site, wrong))
    assert "cluster labels of this run are gone" in reason(
        answer(site_of(hospital, state=str(tmp_path / "other")), Query("run", to_dict(named), "counts", ""))
    )
