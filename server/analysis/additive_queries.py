"""Additive queries: the coordinator's half, in the open or, where the run hides them, as secure sums (server/run/secure_aggregation.py)."""

from __future__ import annotations

from collections.abc import Mapping

from common.privacy.masked_layout import empty_sums
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.messages import Request, StatisticsReply, StatisticsRequest, Sums, add_sums
from server.run.broadcast import send_requests
from server.run.run_state import Run, RunPaused, record_exclusion, refusal_reason
from server.run.secure_aggregation import NotEnoughCentres, secure_sum


def query_sum(run: Run, requests: Mapping[str, Request]) -> Sums:
    """The sum of all answers. A centre that fails is left out, which the ledger says. Raises Paused where too few answer."""
    if hides_statistics(run.config):
        return query_secure_sum(run, requests)
    answers = query_answers(run, requests)
    if not answers:
        raise RunPaused("no centre answered; see the ledger for each one's reason, then resume")
    total: Sums = {}
    for centre in sorted(answers):  # in order: the same bits whatever the order of arrival
        add_sums(total, answers[centre].sums)
    return total


def query_secure_sum(run: Run, requests: Mapping[str, Request]) -> Sums:
    """The same, of which no centre's own answer is seen; repeated like a round when too few stay."""
    query = next(iter(requests.values()))
    assert isinstance(query, StatisticsRequest)
    for attempt in range(run.config.federation.round_retries + 1):
        try:
            found = secure_sum(
                run, query_answers(run, requests), 0, empty_sums(query, run.config, run.layout)
            )
        except NotEnoughCentres as few:
            if attempt == run.config.federation.round_retries:
                raise RunPaused(f"query '{query.name}': {few}; mend it, then resume") from few
        else:
            for centre, reason in found.dropouts.items():
                record_exclusion(run, "", 0, centre, reason)
            return found.sums
    raise AssertionError("a loop that returns or raises")


def query_per_centre(run: Run, requests: Mapping[str, Request], subject: str) -> Sums:
    """The answers side by side, where keys begin with a cohort's name. Who will not say `what` is none the worse: the ledger says `withheld`."""
    sums: Sums = {}
    for received in send_requests(run, requests):
        if isinstance(received.reply, StatisticsReply):
            sums |= received.reply.sums
        else:
            run.ledger.log_event(
                run.run_id, "withheld", f"{subject}: {refusal_reason(received.reply)}", received.centre
            )
    return sums


def query_answers(run: Run, requests: Mapping[str, Request]) -> dict[str, StatisticsReply]:
    """{centre: its answer}."""
    answers: dict[str, StatisticsReply] = {}
    for received in send_requests(run, requests):
        if isinstance(received.reply, StatisticsReply):
            answers[received.centre] = received.reply
        else:
            record_exclusion(run, "", 0, received.centre, refusal_reason(received.reply))
    return answers
