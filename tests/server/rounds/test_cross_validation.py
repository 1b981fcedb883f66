"""Cross-validation: each centre left out once, each fold tested once, each scan counted once; resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.learning.metrics import compute_binary_metrics
from common.protocol.messages import Reply, Request, StatisticsRequest, Sums, TrainRequest
from common.utils.errors import ConsiliumError
from server.analysis.score_tables import compute_scores
from server.ledger.ledger import Ledger
from server.rounds.cross_validation import (
    expand_folds,
    resume_run_or_folds,
    start_run_or_folds,
    summarise_folds,
)
from server.rounds.run_lifecycle import open_ledger
from server.run.operator_commands import find_root_run_id, issue_command
from server.run.records import (
    CrossValidationSummary,
    RunResult,
    StageRecord,
    TaskScores,
    parse_result,
    parse_summary,
    result_to_dict,
)
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south", "west"]
BRIXIA = ["stage.tasks=[brixia]", "evaluation.task=brixia", "evaluation.metric=accuracy"]


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


class Observed(InProcess):
    """Records which centre is asked to train and to test in which run.

    Simulates a crash of the coordinator at the first request of kind `crash_after` in the run named
    `crash_in`.
    """

    def __init__(self, crash_in: str = "", crash_after: str = "training") -> None:
        super().__init__(sites(3), self.observe)
        self.trained: list[tuple[str, str]] = []
        self.tested: list[tuple[str, str]] = []
        self.crash_in = crash_in
        self.crash_after = crash_after

    def observe(self, centre: str, request: Request, reply: Reply) -> Reply:
        kind = getattr(request, "name", "")
        if isinstance(request, TrainRequest):
            kind = "training"
            self.trained.append((request.run_id, centre))
        if isinstance(request, StatisticsRequest) and request.split == "test":
            self.tested.append((request.run_id, centre))
        if self.crash_in and request.run_id.endswith(self.crash_in) and kind == self.crash_after:
            raise KeyboardInterrupt
        return reply


def read_films(phantom: Path, centre: str) -> pd.DataFrame:
    """The radiographs of a centre's cohort table."""
    cohort = pd.read_csv(phantom / centre / "cohort.csv")
    return cohort[cohort["modality"] == "XR"]


def read_metrics(runs_dir: Path, run_id: str) -> RunResult:
    return parse_result(json.loads((runs_dir / run_id / "metrics.json").read_text()))


def num_scans(scores: dict[str, TaskScores], task: str, centre: str) -> float:
    """How many scans of a centre a task was tested on."""
    if task not in scores or centre not in scores[task].centres:
        return 0
    return scores[task].centres[centre].metrics["n"] or 0


def start_study(
    config: Config, transport: InProcess, runs_dir: Path, ledger: Ledger | None = None
) -> CrossValidationSummary:
    summary = start_run_or_folds(config, transport, runs_dir, ledger or open_ledger(runs_dir), "s")
    assert isinstance(summary, CrossValidationSummary)
    return summary


def test_every_centre_is_left_out_once_and_tested_on_all_its_scans(phantom: Path, tmp_path: Path) -> None:
    transport = Observed()
    loco = config(phantom, "federation.evaluation=loco")
    summary = start_study(loco, transport, tmp_path)
    for held_out in CENTRES:
        run_id = f"s-without-{held_out}"
        fold = read_metrics(tmp_path, run_id)
        others = sorted(set(CENTRES) - {held_out})
        assert sorted(centre for run, centre in transport.trained if run == run_id) == others
        first_round = fold.stages[0].rounds[1]
        assert set(first_round.weights["backbone"]) == set(others)
        for scores in first_round.validation.values():
            assert held_out not in scores.centres
        assert set(fold.centres[held_out].counts) == {"test"}
        assert (tmp_path / run_id / "report.html").exists()
        films = read_films(phantom, held_out)
        for task, column in (("outcome", "outcome"), ("brixia", "brixia_a")):
            num_labelled = int(films[column].notna().sum()) if column in films else 0
            assert num_scans(fold.test, task, held_out) == num_labelled
            assert summary.folds[f"without-{held_out}"].get(task, {}).get("n", 0) == num_labelled
    outcome = summary.total.test["outcome"]
    assert set(outcome.centres) == {"north", "south"}  # west has no outcome
    assert outcome.pooled["n"] == sum(
        read_films(phantom, c)["outcome"].notna().sum() for c in ("north", "south")
    )
    written = json.loads((tmp_path / "s" / "crossval.json").read_text())
    assert (
        result_to_dict(parse_summary(written)) == written == json.loads(json.dumps(result_to_dict(summary)))
    )
    with pytest.raises(ConsiliumError, match="cross-validation 's' is finished; there is nothing to resume"):
        resume_run_or_folds("s", transport, tmp_path, open_ledger(tmp_path))
    with pytest.raises(ConsiliumError, match="s exists already; give the new cross-validation another id"):
        start_study(loco, transport, tmp_path)


@pytest.mark.parametrize(
    ("crash_in", "crash_after"), [("without-south", "training"), ("without-north", "counts")]
)
def test_interrupted_cross_validation_continues_where_it_stopped(
    phantom: Path, tmp_path: Path, crash_in: str, crash_after: str
) -> None:
    """After finished folds and in the middle of one, or before the first checkpoint of all."""
    with pytest.raises(KeyboardInterrupt):
        start_study(config(phantom, "federation.evaluation=loco"), Observed(crash_in, crash_after), tmp_path)

    def metrics_file(centre: str) -> Path:
        return tmp_path / f"s-without-{centre}" / "metrics.json"

    finished = [centre for centre in CENTRES if metrics_file(centre).exists()]
    assert finished == CENTRES[: CENTRES.index(crash_in.removeprefix("without-"))]
    before = {centre: metrics_file(centre).read_bytes() for centre in finished}
    transport = Observed()
    summary = resume_run_or_folds("s", transport, tmp_path, open_ledger(tmp_path))
    assert isinstance(summary, CrossValidationSummary)
    unfinished = {f"s-without-{centre}" for centre in CENTRES if centre not in finished}
    assert {run for run, _ in transport.trained} == unfinished
    assert {centre: metrics_file(centre).read_bytes() for centre in finished} == before
    assert set(summary.folds) == {f"without-{centre}" for centre in CENTRES}


def test_fold_without_labels_is_named_and_the_others_go_on(phantom: Path, tmp_path: Path) -> None:
    """Of these two centres only north has outcomes: without it there is nothing to learn from."""
    loco = config(phantom, "federation.evaluation=loco", "stage.tasks=[outcome]")
    pair = replace(loco, federation=replace(loco.federation, centres=["north", "west"]))
    summary = start_study(pair, InProcess(sites(2)), tmp_path)
    assert "no centre has a labelled training scan for task 'outcome'" in summary.untrained["without-north"]
    assert set(summary.folds) == {"without-west"}


def test_every_fold_is_tested_once(phantom: Path, tmp_path: Path) -> None:
    kfold = config(
        phantom,
        "federation.evaluation=kfold",
        "federation.folds=3",
        "federation.mode=central",
        "stage.tasks=[outcome]",
    )
    summary = start_study(kfold, Observed(), tmp_path)
    assert set(summary.folds) == {"fold-0", "fold-1", "fold-2"}
    outcome = summary.total.test["outcome"]
    num_tested = {centre: scores.metrics["n"] for centre, scores in outcome.centres.items()}
    assert num_tested == {c: read_films(phantom, c)["outcome"].notna().sum() for c in ("north", "south")}
    assert outcome.pooled["n"] == sum(n or 0 for n in num_tested.values())


def test_command_to_one_fold_applies_to_all(phantom: Path, tmp_path: Path) -> None:
    """South is excluded and a pause ordered in the first fold: all others go on later, without south.

    A stop during a test is for the next fold.
    """
    ledger = open_ledger(tmp_path)
    kfold = config(phantom, "federation.evaluation=kfold", "federation.folds=3", *BRIXIA)

    class Commanded(Observed):
        def observe(self, centre: str, request: Request, reply: Reply) -> Reply:
            if centre == "west":
                if request.run_id == "s-fold-0" and isinstance(request, TrainRequest):
                    issue_command(ledger, "anna", "exclude", "its films are reviewed", "s-fold-0", "south")
                    issue_command(ledger, "anna", "pause", "south's films are reviewed", "s-fold-0")
                if request.run_id == "s-fold-1" and getattr(request, "split", "") == "test":
                    issue_command(ledger, "anna", "stop", "no more is needed", "s-fold-1")
            return super().observe(centre, request, reply)

    def statuses() -> dict[str, str]:
        return {row["id"].removeprefix("s-"): row["status"] for row in ledger.read_runs()}

    transport = Commanded()
    with pytest.raises(
        ConsiliumError,
        match=r"run 's-fold-1' is paused: by order of anna: .*; continue it with `consilium-server resume s`",
    ):
        start_run_or_folds(kfold, transport, tmp_path, ledger, "s")
    assert statuses() == {"fold-0": "finished", "fold-1": "paused"}
    with pytest.raises(
        ConsiliumError, match="run 's-fold-2' is stopped: by order of anna: no more is needed"
    ):
        resume_run_or_folds("s", transport, tmp_path, ledger)
    assert statuses() == {"fold-0": "finished", "fold-1": "finished", "fold-2": "stopped"}
    resume_run_or_folds("s", transport, tmp_path, ledger)
    assert statuses()["fold-2"] == "finished"
    assert {run for run, centre in transport.trained if centre == "south"} == {"s-fold-0"}
    assert {find_root_run_id(row) for row in ledger.read_runs()} == {"s"}
    assert [row["action"] for row in ledger.read_audit("s")] == ["exclude", "pause", "stop"]


def fold_result(config: Config, histogram: np.ndarray, held_out: list[str]) -> RunResult:
    """The result of a fold in which centre b has twice the scans of centre a."""
    fold_config = replace(config, federation=replace(config.federation, held_out_centres=held_out))
    sums: Sums = {}
    for centre, factor in (("a", 1.0), ("b", 2.0)):
        sums[f"{centre}/covid/hist"] = histogram * factor
        sums[f"{centre}/covid/loss"] = np.ones(2)
    return RunResult(
        run_id="fold",
        recipe="",
        mode="federated",
        seed=1,
        started="2026-01-01",
        config=config_to_dict(fold_config),
        stages=[StageRecord("main")],
        test=compute_scores(sums, fold_config, ["covid"]),
        test_sums={key: array.tolist() for key, array in sums.items()},
    )


def test_summary_is_computed_from_summed_sums_not_from_metrics() -> None:
    """Two folds by hand: the AUC over all scans is not the mean of the folds' AUCs."""
    config = compose_config(
        [
            "stage.tasks=[covid]",
            "evaluation.histogram_bins=8",
            "federation.centres=[a,b]",
            "federation.phantom=null",
        ]
    )
    first = np.array([[3, 1, 0, 0, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0, 0, 0]])
    second = np.array([[0, 0, 0, 0, 5, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]])
    kfold_results = {"fold-0": fold_result(config, first, []), "fold-1": fold_result(config, second, [])}
    kfold = summarise_folds("s", "kfold", kfold_results, {}).total.test["covid"]
    expected_auc = compute_binary_metrics(first + second)["auc"]
    assert kfold.centres["a"].metrics["auc"] == expected_auc != 1.0
    assert kfold.pooled["n"] == 3 * 12
    loco = summarise_folds(
        "s",
        "loco",
        {
            "without-a": fold_result(config, first, ["a"]),
            "without-b": fold_result(config, second, ["b"]),
        },
        {},
    )
    covid = loco.total.test["covid"]
    assert covid.pooled["n"] == 6 + 2 * 6  # of each fold, only the sums of the centre left out
    assert loco.folds["without-b"]["covid"]["n"] == 12
    assert covid.centres["a"].metrics["auc"] == 1.0


def test_a_fold_is_named_after_the_centre_left_out_and_loco_needs_two_centres() -> None:
    named = compose_config(["federation.evaluation=loco", "federation.centres=[sao-paulo,b]"])
    assert list(expand_folds(named)) == ["without-sao-paulo", "without-b"]
    held_out = [fold.federation.held_out_centres for fold in expand_folds(named).values()]
    assert held_out == [["sao-paulo"], ["b"]]
    assert expand_folds(compose_config([])) == {}
    with pytest.raises(ConsiliumError, match="needs two centres or more"):
        expand_folds(compose_config(["federation.evaluation=loco", "federation.centres=[a]"]))
    with pytest.raises(ConsiliumError, match="which a local model cannot be"):
        compose_config(["federation.evaluation=loco", "federation.mode=local"])
