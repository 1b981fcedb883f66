"""Predictions with a centre's own weights: the same as those that its run was tested with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from client.tools.predict import PredictOptions, load_model, predict_folder
from common.learning.metrics import compute_score_histogram
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunResult
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunResult]:
    """Run multisource_personal at two centres; return model.safetensors, the data folder, metrics.json.

    The first stage keeps norms and heads local, the second all weights.
    """
    root = tmp_path_factory.mktemp("personal")
    few = [
        "federation.centres=[north,south]",
        "federation.phantom.scale=0.001",
        "stage.precision=fp32",
        "stage.optimiser.lr=0.01",
    ]
    config = phantom_config(root / "data", "recipe=multisource_personal", *few)
    (root / "runs").mkdir()
    result = start_run(config, InProcess(sites(2)), root / "runs", open_ledger(root / "runs"), "run")
    return root / "runs" / "run" / "model.safetensors", root / "data", result


def histogram_at(
    model: Path, data: Path, centre: str, personal_dir: Path | None
) -> tuple[np.ndarray, set[str]]:
    """Predict a centre's test scans; return their score histogram [2, bins] and the models' identities."""
    cohort = pd.read_csv(data / centre / "cohort.csv")
    test = cohort[(cohort["split"] == "test") & (cohort["modality"] == "CT")]
    test[["scan", "path"]].to_csv(data / centre / "test.csv", index=False)
    store = data / centre / ".consilium" / "slices"
    options = PredictOptions(personal_dir=personal_dir)
    table, skipped = predict_folder(model, data / centre / "test.csv", store, options)
    assert skipped == []
    assert table["scan"].tolist() == test["scan"].tolist()
    p = table["covid"].to_numpy()
    return compute_score_histogram(np.log(p / (1 - p)), test["covid"].to_numpy(float)), set(table["model"])


def test_own_weights_give_the_predictions_of_the_runs_test(
    personal: tuple[Path, Path, RunResult],
) -> None:
    model, data, result = personal
    for centre in ("north", "south"):
        personal_dir = data / centre / ".consilium" / "personal" / "run"
        histogram, identities = histogram_at(model, data, centre, personal_dir)
        np.testing.assert_array_equal(histogram, result.test["covid"].sums[centre])
        common_histogram, common_identities = histogram_at(model, data, centre, None)
        assert not np.array_equal(histogram, common_histogram)
        assert [identity.split("+")[0] for identity in identities] == list(common_identities)
        assert len(identities | common_identities) == 2


def test_own_weights_of_another_run_or_damaged_ones_are_refused(
    personal: tuple[Path, Path, RunResult], tmp_path: Path
) -> None:
    model, data, _ = personal
    own = shutil.copytree(data / "north" / ".consilium" / "personal" / "run", tmp_path / "run")
    load_model(model, own)
    with safe_open(model, "pt") as file:
        save_file(
            {name: file.get_tensor(name) * 2 for name in file.keys()},  # noqa: SIM118  (the file is no dict)
            tmp_path / "other.safetensors",
            file.metadata(),
        )
    with pytest.raises(
        ConsiliumError, match=r"belong to another model; give the model.safetensors of run 'run'$"
    ):
        load_model(tmp_path / "other.safetensors", own)
    with pytest.raises(
        ConsiliumError,
        match=r"has no layers that a run was tested with \(used.json: FileNotFoundError\)",
    ):
        load_model(model, tmp_path)
    last = max((own / "own").iterdir())
    content = last.read_bytes()
    for damaged in (content[:-4] + b"\1\2\3\4", content[:100], None):
        if damaged is None:
            last.unlink()
        else:
            last.write_bytes(damaged)
        with pytest.raises(
            ConsiliumError, match=r"missing or damaged; restore the folder, or predict without --personal$"
        ):
            load_model(model, own)
