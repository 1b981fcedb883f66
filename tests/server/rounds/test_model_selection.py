"""Which round's model is taken."""

from __future__ import annotations

from pathlib import Path

from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


def test_the_last_round_is_taken_when_asked_for_also_where_validation_liked_another_better(
    tmp_path: Path,
) -> None:
    config = phantom_config(tmp_path / "phantom", "recipe=multisource_personal", "stage.rounds=2")
    assert config.evaluation.checkpoint_selection == "last"
    result = start_run(config, InProcess(sites()), tmp_path, open_ledger(tmp_path), "r")
    main, own = result["stages"]
    assert main["best"]["round"] == 2
    assert {c: chosen["round"] for c, chosen in own["best"].items()} == dict.fromkeys(
        config.federation.centres, 2
    )
    assert own["rounds"][0]["val"]["covid"]["centres"] == main["rounds"][2]["val"]["covid"]["centres"]
    assert len({c["steps"] for c in main["rounds"][1]["centres"].values()}) == 1  # equal pace
