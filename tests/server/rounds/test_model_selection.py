"""Which round's model is taken."""

from __future__ import annotations

from pathlib import Path

from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


def test_last_round_is_taken_on_request_even_if_another_validated_better(tmp_path: Path) -> None:
    config = phantom_config(tmp_path / "phantom", "recipe=multisource_personal", "stage.rounds=2")
    assert config.evaluation.checkpoint_selection == "last"
    result = start_run(config, InProcess(sites()), tmp_path, open_ledger(tmp_path), "r")
    main, own = result.stages
    assert main.best is not None
    assert main.best.round == 2
    last_rounds = {centre: best.round for centre, best in own.best_by_centre.items()}
    assert last_rounds == dict.fromkeys(config.federation.centres, 2)
    first_validation = own.rounds[0].validation["covid"]
    assert first_validation.centres == main.rounds[2].validation["covid"].centres
    assert len({centre.steps for centre in main.rounds[1].centres.values()}) == 1  # local_steps_mode: equal
