"""Predictions with a centre's own weights are those that its run was tested with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from client.tools.predict import load_model, predict_folder
from common.learning.metrics import compute_score_histogram
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(model.safetensors, the federation's folder, metrics.json) of multisource_personal at two centres: own norms and heads, then own all."""
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


def histogram_at(model: Path, data: Path, centre: str, own: Path | None) -> tuple[np.ndarray, set[str]]:
    """The predictions for a centre's test scans as the run counts them, [2, bins]; and the models' identities."""
    cohort = pd.read_csv(data / centre / "cohort.csv")
    test = cohort[(cohort["split"] == "test") & (cohort["modality"] == "CT")]
    test[["scan", "path"]].to_csv(data / centre / "test.csv", index=False)
    table, skipped = predict_folder(
        model, data / centre / "test.csv", data / centre / ".consilium" / "slices", personal_dir=own
    )
    assert skipped == []
    assert table["scan"].tolist() == test["scan"].tolist()
    p = table["covid"].to_numpy()
    return compute_score_histogram(np.log(p / (1 - p)), test["covid"].to_numpy(float)), set(table["model"])


def test_own_weights_give_what_the_run_was_tested_with(personal: tuple[Path, Path, dict[str, Any]]) -> None:
    model, data, result = personal
    for centre in ("north", "south"):
        own, identity = histogram_at(model, data, centre, data / centre / ".consilium" / "personal" / "run")
        np.testing.assert_array_equal(own, result["test"]["covid"]["hist"][centre])
        common, plain = histogram_at(model, data, centre, None)
        assert not np.array_equal(own, common)
        assert [i.split("+")[0] for i in identity] == list(plain)
        assert len(identity | plain) == 2


def test_own_weights_of_another_run_or_gone_are_one_sentence(
    personal: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, data, _ = personal
    own = shutil.copytree(data / "north" / ".consilium" / "personal" / "run", tmp_path / "run")
    load_model(model, own)
    with safe_open(model, "pt") as file:
        save_file(
            {name: file.get_tensor(name) * 2 for name in file.keys()},
            tmp_path / "other.safetensors",
            file.metadata(),
        )
    with pytest.raises(
        ConsiliumError, match=r"belong to another model; give the model.safetensors of run 'run'$"
    ):
        load_model(tmp_path / "other.safetensors", own)
    with pytest.raises(
        ConsiliumError,
        match=r"holds no own weights that a run was tested with \(used.json: FileNotFoundError\)",
    ):
        load_model(model, tmp_path)
    last = max((own / "own").iterdir())
    whole = last.read_bytes()
    for broken in (whole[:-4] + b"\1\2\3\4", whole[:100], None):
        last.unlink() if broken is None else last.write_bytes(broken)
        with pytest.raises(
            ConsiliumError, match=r"gone or damaged; restore the folder, or predict without --personal$"
        ):
            load_model(model, own)
