"""Cross-validation: every centre left out once, every fold tested once; interrupted and taken up again; sums that count every scan once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from common.config.compose import compose_config, config_to_dict
from common.config.schema import Config
from common.learning.metrics import compute_binary_metrics
from common.protocol.messages import Reply, Request, StatisticsRequest, TrainRequest
from common.utils.errors import ConsiliumError
from server.analysis.score_tables import score_table
from server.rounds.cross_validation import (
    expand_folds,
    resume_run_or_folds,
    start_run_or_folds,
    summarise_folds,
)
from server.rounds.run_lifecycle import open_ledger
from server.run.operator_commands import find_root_run_id, issue_command
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south", "west"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def config(phantom: Path, *overrides: str) -> Config:
    few = [
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
        f"federation.centres=[{','.join(CENTRES)}]",
    ]
    return phantom_config(
        phantom, "recipe=prognosis", *few, "stage.rounds=1", "stage.local_epochs=1", *overrides
    )


class Watched(InProcess):
    """Notes who was asked to train and to test in which run; dies when a run's stage has trained `dies` times, with the coordinator."""

    def __init__(self, dies: str = "", after: str = "training") -> None:
        super().__init__(sites(3), self.see)
        self.trained: list[tuple[str, str]] = []
        self.tested: list[tuple[str, str]] = []
        self.dies, self.after = dies, after

    def see(self, centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            self.trained.append((request.run_id, centre))
        if isinstance(request, StatisticsRequest) and request.split == "test":
            self.tested.append((request.run_id, centre))
        at = "training" if isinstance(request, TrainRequest) else getattr(request, "name", "")
        if self.dies and request.run_id.endswith(self.dies) and at == self.after:
            raise KeyboardInterrupt
        return reply


def films(phantom: Path, centre: str) -> pd.DataFrame:
    cohort = pd.read_csv(phantom / centre / "cohort.csv")
    return cohort[cohort["modality"] == "XR"]


def test_every_centre_is_left_out_once_and_tested_there_on_all_it_has(phantom: Path, tmp_path: Path) -> None:
    transport = Watched()
    result = start_run_or_folds(
        config(phantom, "federation.evaluation=loco"), transport, tmp_path, open_ledger(tmp_path), "s"
    )
    for left in CENTRES:
        part = json.loads((tmp_path / f"s-without-{left}" / "metrics.json").read_text())
        others = sorted(set(CENTRES) - {left})
        assert sorted(c for r, c in transport.trained if r == f"s-without-{left}") == others
        assert set(part["stages"][0]["rounds"][1]["weights"]["backbone"]) == set(others)
        assert not {left} & {
            c for views in part["stages"][0]["rounds"][1]["val"].values() for c in views["centres"]
        }
        assert set(part["centres"][left]["counts"]) == {"test"}
        assert (tmp_path / f"s-without-{left}" / "report.html").exists()
        own = films(phantom, left)
        for task, column in (("outcome", "outcome"), ("brixia", "brixia_a")):
            held = int(own[column].notna().sum()) if column in own else 0
            assert part["test"].get(task, {}).get("centres", {}).get(left, {}).get("n", 0) == held
            assert result["parts"][f"without-{left}"].get(task, {}).get("n", 0) == held
    outcome = result["test"]["outcome"]
    assert set(outcome["centres"]) == {"north", "south"}  # west knows no outcome
    assert outcome["pooled"]["n"] == sum(
        films(phantom, c)["outcome"].notna().sum() for c in ("north", "south")
    )
    assert json.loads(json.dumps(result)) == json.loads((tmp_path / "s" / "crossval.json").read_text())
    with pytest.raises(ConsiliumError, match="cross-validation 's' is finished; there is nothing to resume"):
        resume_run_or_folds("s", transport, tmp_path, open_ledger(tmp_path))
    with pytest.raises(ConsiliumError, match="s exists already; give the new cross-validation another id"):
        start_run_or_folds(
            config(phantom, "federation.evaluation=loco"), transport, tmp_path, open_ledger(tmp_path), "s"
        )


@pytest.mark.parametrize(("part", "after"), [("without-south", "training"), ("without-north", "counts")])
def test_an_interrupted_study_goes_on_where_it_was(
    phantom: Path, tmp_path: Path, part: str, after: str
) -> None:
    """After finished parts and in the middle of one, or before the first checkpoint of all."""
    ledger = open_ledger(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        start_run_or_folds(
            config(phantom, "federation.evaluation=loco"), Watched(part, after), tmp_path, ledger, "s"
        )
    finished = [c for c in CENTRES if (tmp_path / f"s-without-{c}" / "metrics.json").exists()]
    assert finished == CENTRES[: CENTRES.index(part.removeprefix("without-"))]
    before = {c: (tmp_path / f"s-without-{c}" / "metrics.json").read_bytes() for c in finished}
    again = Watched()
    result = resume_run_or_folds("s", again, tmp_path, open_ledger(tmp_path))
    assert {r for r, _ in again.trained} == {f"s-without-{c}" for c in CENTRES if c not in finished}
    assert {c: (tmp_path / f"s-without-{c}" / "metrics.json").read_bytes() for c in finished} == before
    assert set(result["parts"]) == {f"without-{c}" for c in CENTRES}


def test_a_part_without_labels_is_named_and_the_others_go_on(phantom: Path, tmp_path: Path) -> None:
    """Of these two only north knows outcomes: without it there is nothing to learn from."""
    given = config(phantom, "federation.evaluation=loco", "stage.tasks=[outcome]")
    pair = replace(given, federation=replace(given.federation, centres=["north", "west"]))
    result = start_run_or_folds(pair, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "s")
    assert "no centre has a labelled training scan for task 'outcome'" in result["untrained"]["without-north"]
    assert set(result["parts"]) == {"without-west"}


def test_every_fold_is_tested_once(phantom: Path, tmp_path: Path) -> None:
    settings = [
        "federation.evaluation=kfold",
        "federation.folds=3",
        "federation.mode=central",
        "stage.tasks=[outcome]",
    ]
    result = start_run_or_folds(config(phantom, *settings), Watched(), tmp_path, open_ledger(tmp_path), "s")
    assert set(result["parts"]) == {"fold-0", "fold-1", "fold-2"}
    n = {c: metrics["n"] for c, metrics in result["test"]["outcome"]["centres"].items()}
    assert n == {c: films(phantom, c)["outcome"].notna().sum() for c in ("north", "south")}
    assert result["test"]["outcome"]["pooled"]["n"] == sum(n.values())


def test_what_is_ordered_on_a_part_is_ordered_of_all(phantom: Path, tmp_path: Path) -> None:
    """In the first fold's last round south is excluded and a pause ordered: the second one waits, and all goes on without south. A stop during a test
    is the next fold's."""
    given, ledger = (
        config(phantom, "federation.evaluation=kfold", "federation.folds=3", "stage.tasks=[brixia]"),
        open_ledger(tmp_path),
    )

    class Ordered(Watched):
        def see(self, centre: str, request: Request, reply: Reply) -> Reply:
            if request.run_id == "s-fold-0" and centre == "west" and isinstance(request, TrainRequest):
                issue_command(ledger, "anna", "exclude", "its films are looked through", "s-fold-0", "south")
                issue_command(ledger, "anna", "pause", "as south's films are", "s-fold-0")
            if request.run_id == "s-fold-1" and centre == "west" and getattr(request, "split", "") == "test":
                issue_command(ledger, "anna", "stop", "seen enough", "s-fold-1")
            return super().see(centre, request, reply)

    status = lambda: {row["id"][2:]: row["status"] for row in ledger.read_runs()}  # noqa: E731
    transport = Ordered()
    with pytest.raises(
        ConsiliumError,
        match=r"run 's-fold-1' is paused: by order of anna: .*; go on with `consilium-server resume s`",
    ):
        start_run_or_folds(given, transport, tmp_path, ledger, "s")
    assert status() == {"fold-0": "finished", "fold-1": "paused"}
    with pytest.raises(ConsiliumError, match="run 's-fold-2' is stopped: by order of anna: seen enough"):
        resume_run_or_folds("s", transport, tmp_path, ledger)
    assert status() == {"fold-0": "finished", "fold-1": "finished", "fold-2": "stopped"}
    resume_run_or_folds("s", transport, tmp_path, ledger)
    assert status()["fold-2"] == "finished"
    assert {run for run, centre in transport.trained if centre == "south"} == {"s-fold-0"}
    assert {find_root_run_id(row) for row in ledger.read_runs()} == {"s"}
    assert [order["what"] for order in ledger.read_audit("s")] == ["exclude", "pause", "stop"]


def test_the_summary_adds_sums_and_not_metrics() -> None:
    """Two folds of one centre, by hand: AUC of all scans, which is not the mean of the folds'."""
    given = compose_config(
        [
            "stage.tasks=[covid]",
            "evaluation.histogram_bins=8",
            "federation.centres=[a,b]",
            "federation.phantom=null",
        ]
    )
    hists = [
        np.array([[3, 1, 0, 0, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0, 0, 0]]),
        np.array([[0, 0, 0, 0, 5, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]),
    ]

    def part(hist: np.ndarray, unseen: list[str]) -> dict[str, Any]:
        own = replace(given, federation=replace(given.federation, held_out_centres=unseen))
        sums = {
            f"{c}/covid/{what}": a
            for c in "ab"
            for what, a in (("hist", hist * (1 + (c == "b"))), ("loss", np.ones(2)))
        }
        return {
            "config": config_to_dict(own),
            "stages": [{"name": "main"}],
            "test": score_table(sums, own, ["covid"]),
            "test_sums": {k: v.tolist() for k, v in sums.items()},
        }

    folds = summarise_folds({f"fold-{k}": part(h, []) for k, h in enumerate(hists)})["test"]["covid"]
    assert folds["centres"]["a"]["auc"] == compute_binary_metrics(hists[0] + hists[1])["auc"] != 1.0
    assert folds["pooled"]["n"] == 3 * 12
    left = summarise_folds({"without-a": part(hists[0], ["a"]), "without-b": part(hists[1], ["b"])})
    assert (
        left["test"]["covid"]["pooled"]["n"] == 6 + 2 * 6
    )  # what the others say in a part is not the whole's
    assert left["parts"]["without-b"]["covid"]["n"] == 12
    assert left["test"]["covid"]["centres"]["a"]["auc"] == 1.0


def test_parts_have_names_that_are_names_and_studies_need_centres() -> None:
    named = compose_config(["federation.evaluation=loco", "federation.centres=['São Paulo',b]"])
    assert list(expand_folds(named)) == ["without-S-o-Paulo", "without-b"]
    assert [p.federation.held_out_centres for p in expand_folds(named).values()] == [["São Paulo"], ["b"]]
    assert expand_folds(compose_config([])) == {}
    with pytest.raises(ConsiliumError, match="would have equal names"):
        expand_folds(compose_config(["federation.evaluation=loco", "federation.centres=['a b',a-b]"]))
    with pytest.raises(ConsiliumError, match="needs two centres or more"):
        expand_folds(compose_config(["federation.evaluation=loco", "federation.centres=[a]"]))
    with pytest.raises(ConsiliumError, match="which a local model cannot be"):
        compose_config(["federation.evaluation=loco", "federation.mode=local"])
