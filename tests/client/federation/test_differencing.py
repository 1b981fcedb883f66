"""A coordinator that asks the same patients again and again, each time a little differently."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.data.loading import clear_dataset_cache
from client.federation.handlers import handle_request
from client.federation.join import round_skipped
from client.phantom.federation import write_centre
from client.site.config import Site, outer_anchor
from client.site.release_book import forget_releases, locate_book
from common.config.compose import prepare_config
from common.config.parse import config_to_dict
from common.config.schema import Config, Task
from common.modeling.encoder import feature_dim, make_encoder
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
)
from common.utils.errors import RefusalCode
from tests.client.hospital import TINY_PHANTOM, initial_weights, make_config, train_request

FEW = 5  # patients that a number must stand for


@pytest.fixture(scope="module")
def large_hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital of 120 patients with one scan each, of whom two have a rare label."""
    folder = write_centre(tmp_path_factory.mktemp("data"), "north", TINY_PHANTOM)
    table = pd.read_csv(folder / "cohort.csv")
    table = pd.concat([table] * 6, ignore_index=True)  # the same pictures, as other patients
    table["scan"] = [f"scan {number}" for number in range(len(table))]
    rng = np.random.default_rng(0)
    table["patient"] = table["scan"]
    table["age"] = rng.permutation(len(table)) % 40 + 40  # two patients of each age
    table["grade"] = rng.choice(["a", "b", "c"], len(table))
    table["rare"] = np.nan
    train_rows = table.index[table["split"] == "train"]
    table.loc[train_rows[:2], "rare"] = 1
    table.to_csv(folder / "cohort.csv", index=False)
    assert handle_request(make_centre(folder, 1), JoinRequest("run", config_to_dict(make_config())))
    return folder


@pytest.fixture
def folder(large_hospital: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(large_hospital, tmp_path / "hospital")
    clear_dataset_cache()


def make_centre(folder: Path, min_cell_count: int = FEW) -> Site:
    return Site("north", str(folder), device="cpu", threads=1, min_cell_count=min_cell_count)


def ask_counts(folder: Path, config: Config, run_id: str = "run") -> dict[str, list[float]] | RefusalCode:
    reply = handle_request(
        make_centre(folder), StatisticsRequest(run_id, config_to_dict(config), "counts", "")
    )
    if isinstance(reply, Refusal):
        if reply.code != RefusalCode.POLICY:  # which quotes the question
            assert not any(character.isdigit() for character in reply.reason)
        return reply.code
    assert isinstance(reply, StatisticsReply)
    return {key: counts.tolist() for key, counts in reply.sums.items()}


def forget(folder: Path) -> None:
    site = make_centre(folder)
    forget_releases(locate_book(folder / ".consilium", outer_anchor(site, folder)))


def age_task(*edges: float) -> Task:
    classes = [f"older than {edge}" for edge in (0, *edges)]
    return Task(type="multiclass", label_columns=["age"], bin_edges=list(edges), classes=classes)


def with_tasks(config: Config, **tasks: Task) -> Config:
    stages = {name: replace(stage, tasks=[]) for name, stage in config.stages.items()}
    evaluation = replace(config.evaluation, task=next(iter(tasks)), metric="accuracy")
    return replace(config, tasks=tasks, stages=stages, evaluation=evaluation)


def vary(random_source: random.Random) -> Config:
    """Return a configuration as a hostile coordinator may vary it."""
    config = make_config()
    choose = random_source.choice
    edges = choose([[57], [57.5], [60], [50, 57, 60]])
    classes = choose([["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]])
    tasks = {
        choose(["age", "years", "x"]): age_task(*edges),
        choose(["grade", "y"]): Task(type="multiclass", label_column="grade", classes=classes),
        choose(["rare", "z"]): Task(label_column=choose(["rare", "covid"])),
    }
    fold = choose([None, None, 0, 1, 2])
    federation = replace(
        config.federation,
        folds=5 if fold is None else choose([3, 5, 20]),
        fold=fold,
        held_out_centres=choose([[], [], ["north"]]),
    )
    config = replace(config, federation=federation, seed=random_source.randrange(100))
    config = replace(config, recipe=choose(["a", "b"]))
    return with_tasks(config, **tasks)


def change_cohort(folder: Path, random_source: random.Random) -> None:
    """Take a patient out of the cohort, bring one back, or correct a label."""
    full = folder / "full.csv"
    if not full.exists():
        shutil.copy(folder / "cohort.csv", full)
    table = pd.read_csv(full)
    absent = random_source.sample(range(len(table)), random_source.randrange(3))
    table = table.drop(index=absent)
    if random_source.random() < 0.3:
        row = random_source.choice(list(table.index))
        table.loc[row, "grade"] = "c"
    table.to_csv(folder / "cohort.csv", index=False)
    clear_dataset_cache()


@pytest.mark.parametrize("seed", range(2))
def test_no_sum_or_difference_of_any_answers_is_about_few_patients(folder: Path, seed: int) -> None:
    random_source = random.Random(seed)
    released = []
    for number in range(20):
        if number % 4 == 3:
            change_cohort(folder, random_source)
        answer = ask_counts(folder, vary(random_source), f"run{random_source.randrange(5)}")
        if isinstance(answer, dict):
            released += [count for counts in answer.values() for count in counts]
        else:
            assert answer in (RefusalCode.POLICY, RefusalCode.NO_DATA)
    assert any(released)
    # Every patient has one scan: all sums and differences of multiples of 5 are multiples of 5.
    assert all(count % FEW == 0 for count in released)


def test_edges_that_enclose_one_patient_are_refused_whatever_the_task_is_called(folder: Path) -> None:
    first = with_tasks(make_config(), age=age_task(57))
    second = with_tasks(make_config(), other=age_task(60))
    assert isinstance(ask_counts(folder, first), dict)
    assert ask_counts(folder, second, "another") == RefusalCode.POLICY
    assert isinstance(ask_counts(folder, first, "third"), dict)
    forget(folder)
    assert isinstance(ask_counts(folder, second), dict)


def test_counts_are_replayed_until_a_group_of_new_patients_has_come(folder: Path) -> None:
    config = with_tasks(make_config(), grade=Task(type="multiclass", classes=["a", "b", "c"]))
    full = pd.read_csv(folder / "cohort.csv")
    is_of_one_class = (full["split"] == "train") & (full["modality"] == "CT") & (full["grade"] == "b")
    of_one_class = full.index[is_of_one_class]
    counts = []
    for num_absent in (8, 7, 6, 4, 0):
        full.drop(index=of_one_class[:num_absent]).to_csv(folder / "cohort.csv", index=False)
        clear_dataset_cache()
        answer = ask_counts(folder, config)
        assert isinstance(answer, dict)
        counts.append(answer["north/train/grade"])
    assert counts[0] == counts[1] == counts[2]
    assert counts[-1][1] - counts[0][1] in (5, 10)


def test_held_out_hospital_and_folds_of_one_number_add_up(folder: Path) -> None:
    config = with_tasks(make_config(), covid=Task())
    held_out = replace(config, federation=replace(config.federation, held_out_centres=["north"]))
    own = ask_counts(folder, config)
    together = ask_counts(folder, held_out)
    assert isinstance(own, dict)
    assert isinstance(together, dict)
    by_class = np.sum([counts for counts in own.values()], axis=0)
    assert together["north/test/covid"] == by_class.tolist()
    forget(folder)
    totals = []
    for fold in range(3):
        folds = replace(config, federation=replace(config.federation, folds=3, fold=fold))
        answer = ask_counts(folder, folds)
        assert isinstance(answer, dict)
        assert all(count % FEW == 0 for counts in answer.values() for count in counts)
        totals.append(np.sum([counts for counts in answer.values()], axis=0).tolist())
    assert totals[0] == totals[1] == totals[2]


def test_a_billion_folds_show_nobody_and_leave_nothing_behind(folder: Path) -> None:
    config = with_tasks(make_config(), covid=Task())
    billion = config_to_dict(config)
    billion["federation"] |= {"folds": 1_000_000_000, "fold": 7}
    reply = handle_request(make_centre(folder), StatisticsRequest("run", billion, "counts", ""))
    assert isinstance(reply, Refusal)
    assert reply.code == RefusalCode.BAD_REQUEST
    assert isinstance(ask_counts(folder, config), dict)


def test_label_of_two_patients_is_neither_counted_nor_trained(folder: Path) -> None:
    config = with_tasks(make_config(), rare=Task())
    counts = ask_counts(folder, config)
    assert isinstance(counts, dict)
    assert counts["north/train/rare"][:2] == [0, 0]
    request = train_request(config, weights=initial_weights(config))
    refused = handle_request(make_centre(folder), request)
    assert isinstance(refused, Refusal)
    assert refused.code == RefusalCode.NO_DATA
    assert not any(character.isdigit() for character in refused.reason)
    both = with_tasks(make_config(), covid=Task(), rare=Task())
    reply = handle_request(make_centre(folder), train_request(both, weights=initial_weights(both)))
    assert isinstance(reply, TrainReply), reply
    assert reply.losses["rare"] == [0, 0]
    assert reply.losses["covid"][1] == reply.scans
    assert reply.scans % FEW == 0


def test_round_that_draws_few_patients_does_not_leave(folder: Path) -> None:
    config = with_tasks(make_config("stage.batch_size=1", "stage.local_steps=2"), covid=Task())
    reply = handle_request(make_centre(folder), train_request(config, weights=initial_weights(config)))
    assert isinstance(reply, Refusal), reply
    assert "on fewer patients than this hospital's policy allows" in reply.reason
    assert reply.code == RefusalCode.POLICY


def test_one_patient_with_many_scans_is_no_group(folder: Path) -> None:
    table = pd.read_csv(folder / "cohort.csv")
    is_positive = (table["split"] == "train") & (table["covid"] == 1)
    table.loc[is_positive, "patient"] = "the same"
    table.to_csv(folder / "cohort.csv", index=False)
    clear_dataset_cache()
    counts = ask_counts(folder, with_tasks(make_config(), covid=Task()))
    assert isinstance(counts, dict)
    assert counts["north/train/covid"][1] == 0
    assert counts["north/train/covid"][0] > 0


def test_join_reply_rounds_scans_and_names_no_rare_source(folder: Path) -> None:
    table = pd.read_csv(folder / "cohort.csv")
    table["source"] = "north"
    table.loc[:3, "source"] = "private practice of one person"
    table.loc[:1, "path"] = "not there"
    table.to_csv(folder / "cohort.csv", index=False)
    clear_dataset_cache()
    reply = handle_request(make_centre(folder), JoinRequest("run", config_to_dict(make_config())))
    assert isinstance(reply, JoinReply)
    assert reply.sources == ["north"]
    assert reply.skipped == {}
    assert all(count % FEW == 0 for count in reply.scans.values())


def test_more_scores_than_the_recipe_needs_are_refused(folder: Path) -> None:
    config = make_config("stage.rounds=1")
    weights = initial_weights(config)
    codes = []
    for number in range(8):
        weights.floats[0] = number
        request = StatisticsRequest("run", config_to_dict(config), "scores", "main", "val", "", weights)
        reply = handle_request(make_centre(folder), request)
        codes.append(reply.code if isinstance(reply, Refusal) else None)
        again = handle_request(make_centre(folder), request)
        if isinstance(reply, StatisticsReply):
            assert isinstance(again, StatisticsReply)
            assert str(again.sums) == str(reply.sums)
    assert codes == [None] * 6 + [RefusalCode.POLICY] * 2


def test_steps_of_a_clustering_give_features_of_groups_only(folder: Path) -> None:
    soft = Task(type="multiclass", label_column="covid", num_clusters=[2])
    config = prepare_config(with_tasks(make_config(), covid=Task(), soft=soft))
    ask = partial(StatisticsRequest, "run", config_to_dict(config), "clusters", "main", "train", "soft")
    apart = np.zeros((1, feature_dim(make_encoder(config.backbone))))
    first = handle_request(make_centre(folder), ask(weights=initial_weights(config), centroids=apart))
    assert isinstance(first, StatisticsReply), first
    mean = first.sums["sum"][0] / first.sums["n"][0]
    for offset in np.geomspace(1e-6, 1, 13):
        reply = handle_request(make_centre(folder), ask(centroids=np.stack([mean, mean + offset])))
        assert isinstance(reply, StatisticsReply), reply
        assert all(count == 0 or count >= FEW for count in reply.sums["n"])
        assert all(count % FEW == 0 for count in reply.sums["n"])


def test_skipped_scans_are_rounded_down_to_what_surely_are_enough_patients() -> None:
    table = pd.DataFrame({"patient": [f"p{number}" for number in range(9)] + ["p0", "p0"]})  # one has three
    assert round_skipped({"it is empty": 15, "it is broken": 6}, [table], FEW) == {"it is empty": 14}
    assert round_skipped({"it is empty": 15, "it is broken": 6}, [table], 1) == {
        "it is empty": 15,
        "it is broken": 6,
    }
