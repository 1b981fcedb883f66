"""The best round of a stage on validation: which it is, its weights, and which personal ones the centres lay over them."""

from __future__ import annotations

from typing import Any

from common.modeling.parameters import EMPTY_PARAMS, Weights
from server.analysis import score_tables
from server.run import checkpoint
from server.run.run_state import Run


def personal_layers_for(
    run: Run, stage_record: dict[str, Any], centre: str, round_number: int
) -> list[tuple[str, int]]:
    """Whose personal weights a centre lays over the global ones: the best round of each finished stage, then this stage's up to `round`."""
    bests = [
        (s["name"], best_round_for(s, centre))
        for s in run.result["stages"]
        if s["finished"] and s["name"] != stage_record["name"]
    ]
    before = [
        (name, best["round"]) for name, best in bests if best
    ]  # none of a centre that was excluded all the time
    return [
        (name, last)
        for name, last in [*before, (stage_record["name"], round_number)]
        if run.config.stages[name].local_layers
    ]


def rounds_to_keep(stage_record: dict[str, Any], centre: str, round_number: int) -> list[int]:
    """Rounds of a stage whose personal weights may still be asked for: the last two (a resume repeats a round) and the best."""
    return [round_number - 1, round_number - 2, best_round_for(stage_record, centre).get("round", 0)]


def best_round_for(stage_record: dict[str, Any], centre: str) -> dict[str, Any]:
    """The best round so far: each centre's own when nothing is exchanged, else one for all."""
    best: dict[str, Any] = stage_record["best"]
    return best.get(centre, {}) if stage_record["personal"] else best


def best_rounds(stage_record: dict[str, Any]) -> list[dict[str, Any]]:
    """What patience looks at: the best of all, or of every centre that has a value of its own to compare."""
    bests = list(stage_record["best"].values()) if stage_record["personal"] else [stage_record["best"]]
    return [best for best in bests if best["value"] is not None] or bests


def update_best(run: Run, stage_record: dict[str, Any], round_record: dict[str, Any]) -> None:
    """A round becomes the stage's best, or a centre's own, where validation says so; without a value to compare (one class only, another task)
    the latest is as good as can be said."""
    evaluation, val = run.config.evaluation, round_record["val"]

    def pick_better(best: dict[str, Any], value: float | None) -> dict[str, Any]:
        if (
            evaluation.checkpoint_selection == "last"
            or value is None
            or not best
            or best["value"] is None
            or value > best["value"]
        ):
            return {"stage": stage_record["name"], "round": round_record["round"], "value": value}
        return best

    if stage_record["personal"]:
        for centre in run.expected_centres:
            cohorts = run.members[centre].cohorts if centre in run.members else [centre]
            stage_record["best"][centre] = pick_better(
                stage_record["best"].get(centre, {}), score_tables.centre_score(val, evaluation, cohorts)
            )
    else:
        stage_record["best"] = pick_better(
            stage_record["best"], score_tables.selection_score(val, evaluation)
        )


def load_best_weights(run: Run) -> Weights:
    """The global weights of the last stage's best round; where nothing is exchanged they never changed."""
    place = run.result["stages"][-1]
    if place["personal"] or place["best"]["round"] == len(place["rounds"]) - 1:
        return run.weights
    run.weights = Weights(EMPTY_PARAMS, run.weights.int_buffers)  # its memory is wanted
    return run.layout.from_state_dict(
        checkpoint.load_weights(checkpoint.weights_path(run.run_dir, place["name"], place["best"]["round"]))
    )
