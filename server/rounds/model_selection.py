"""The best round of a stage on validation: which it is, its weights, and which local layers belong to it."""

from __future__ import annotations

from common.modeling.parameters import EMPTY_PARAMS, Weights
from server.analysis.score_tables import get_centre_score, get_selection_score
from server.run import checkpoint
from server.run.records import BestRound, RoundRecord, StageRecord
from server.run.run_state import Run

PersonalRounds = list[
    tuple[str, int]
]  # (stage, round) of a centre's own local layers; later ones replace earlier ones


def personal_layers_for(run: Run, record: StageRecord, centre: str, round_number: int) -> PersonalRounds:
    """Return which of its own local layers a centre uses in place of the global ones.

    They are those of the best round of each finished stage, then those of this stage up to `round_number`.
    """
    rounds: PersonalRounds = []
    for stage in run.result.stages:
        if stage.finished and stage.name != record.name:
            best = best_round_for(stage, centre)
            if best:  # a centre that was excluded all the time has none
                rounds.append((stage.name, best.round))
    rounds.append((record.name, round_number))
    return [(stage, number) for stage, number in rounds if run.config.stages[stage].local_layers]


def rounds_to_keep(record: StageRecord, centre: str, round_number: int) -> list[int]:
    """Return the rounds whose local layers may be needed: the last two, as a resume repeats one; the best."""
    best = best_round_for(record, centre)
    return [round_number - 1, max(0, round_number - 2), best.round if best else 0]


def best_round_for(record: StageRecord, centre: str) -> BestRound | None:
    """Return the best round so far: of the shared model, or the centre's own where nothing is exchanged."""
    return record.best_by_centre.get(centre) if record.local_only else record.best


def has_stalled(run: Run, record: StageRecord) -> bool:
    """Return whether no round has been better for as long as `evaluation.patience` allows."""
    evaluation = run.config.evaluation
    if not evaluation.patience:
        return False
    last_round = len(record.rounds) - 1
    rounds_since_best = [last_round - max(best.round, evaluation.warmup) for best in _best_rounds(record)]
    return all(rounds >= evaluation.patience for rounds in rounds_since_best)


def _best_rounds(record: StageRecord) -> list[BestRound]:
    """Return what patience looks at: the best of all, or of every centre that has a value to compare."""
    if not record.local_only:
        return [record.best] if record.best else []
    bests = list(record.best_by_centre.values())
    with_value = [best for best in bests if best.value is not None]
    return with_value or bests


def update_best(run: Run, record: StageRecord, round_record: RoundRecord) -> None:
    """Make a round the stage's best, or a centre's own, if its validation is better.

    Where there is no value to compare (a single class, another task), the latest round counts as the best.
    """
    evaluation = run.config.evaluation
    if not record.local_only:
        score = get_selection_score(round_record.validation, evaluation)
        record.best = _choose_best(run, record.best, BestRound(record.name, round_record.round, score))
        return
    for centre in run.expected_centres:
        member = run.membership.members.get(centre)
        cohorts = member.cohorts if member else [centre]
        score = get_centre_score(round_record.validation, evaluation, cohorts)
        candidate = BestRound(record.name, round_record.round, score)
        record.best_by_centre[centre] = _choose_best(run, record.best_by_centre.get(centre), candidate)


def _choose_best(run: Run, best: BestRound | None, candidate: BestRound) -> BestRound:
    takes_last = run.config.evaluation.checkpoint_selection == "last"
    if takes_last or best is None or best.value is None or candidate.value is None:
        return candidate
    return candidate if candidate.value > best.value else best


def load_best_weights(run: Run) -> Weights:
    """Load the global weights of the last stage's best round; without exchange they never changed."""
    record = run.result.stages[-1]
    if record.best is None or record.best.round == len(record.rounds) - 1:
        return run.model.weights
    run.model.weights = Weights(EMPTY_PARAMS, run.model.weights.int_buffers)  # its memory is needed
    path = checkpoint.weights_path(run.run_dir, record.name, record.best.round)
    return run.model.layout.from_state_dict(checkpoint.load_weights(path))
