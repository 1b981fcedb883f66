"""The best round of a stage on validation: which it is, its weights, and which personal ones the centres lay over them."""

from __future__ import annotations

from typing import Any

from common.weights import NONE, Weights
from server import checkpoint, scores
from server.state import Run


def chain(run: Run, place: dict[str, Any], centre: str, round: int) -> list[tuple[str, int]]:
    """Whose personal weights a centre lays over the global ones: the best round of each finished stage, then this stage's up to `round`."""
    bests = [(s["name"], best_of(s, centre)) for s in run.result["stages"] if s["finished"] and s["name"] != place["name"]]
    before = [(name, best["round"]) for name, best in bests if best]  # none of a centre that was excluded all the time
    return [(name, last) for name, last in [*before, (place["name"], round)] if run.config.stages[name].personal]


def keep(place: dict[str, Any], centre: str, round: int) -> list[int]:
    """Rounds of a stage whose personal weights may still be asked for: the last two (a resume repeats a round) and the best."""
    return [round - 1, round - 2, best_of(place, centre).get("round", 0)]


def best_of(place: dict[str, Any], centre: str) -> dict[str, Any]:
    """The best round so far: each centre's own when nothing is exchanged, else one for all."""
    best: dict[str, Any] = place["best"]
    return best.get(centre, {}) if place["personal"] else best


def bests(place: dict[str, Any]) -> list[dict[str, Any]]:
    """What patience looks at: the best of all, or of every centre that has a value of its own to compare."""
    bests = list(place["best"].values()) if place["personal"] else [place["best"]]
    return [best for best in bests if best["value"] is not None] or bests


def judge(run: Run, place: dict[str, Any], entry: dict[str, Any]) -> None:
    """A round becomes the stage's best, or a centre's own, where validation says so; without a value to compare (one class only, another task)
    the latest is as good as can be said."""
    evaluation, val = run.config.evaluation, entry["val"]

    def better(best: dict[str, Any], value: float | None) -> dict[str, Any]:
        if evaluation.choose == "last" or value is None or not best or best["value"] is None or value > best["value"]:
            return {"stage": place["name"], "round": entry["round"], "value": value}
        return best

    if place["personal"]:
        for centre in run.expected:
            cohorts = run.presence[centre].cohorts if centre in run.presence else [centre]
            place["best"][centre] = better(place["best"].get(centre, {}), scores.own(val, evaluation, cohorts))
    else:
        place["best"] = better(place["best"], scores.chosen(val, evaluation))


def best_weights(run: Run) -> Weights:
    """The global weights of the last stage's best round; where nothing is exchanged they never changed."""
    place = run.result["stages"][-1]
    if place["personal"] or place["best"]["round"] == len(place["rounds"]) - 1:
        return run.weights
    run.weights = Weights(NONE, run.weights.integers)  # its memory is wanted
    return run.layout.flat(checkpoint.load_weights(checkpoint.weights_path(run.folder, place["name"], place["best"]["round"])))
