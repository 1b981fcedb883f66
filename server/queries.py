"""Additive queries: the coordinator's half, in the open or, where the run hides them, as secure sums (server/secagg.py)."""

from __future__ import annotations

from collections.abc import Mapping

from common.blank import blank
from common.messages import Answer, Query, Request, Sums, add
from common.secagg import hides_all
from server.broadcast import send
from server.secagg import TooFew, summed
from server.state import Paused, Run, leave_out, reason_of


def ask(run: Run, requests: Mapping[str, Request]) -> Sums:
    """The sum of all answers. A centre that fails is left out, which the ledger says. Raises Paused where too few answer."""
    if hides_all(run.config):
        return asked_secretly(run, requests)
    answers = answered(run, requests)
    if not answers:
        raise Paused("no centre answered; see the ledger for each one's reason, then resume")
    total: Sums = {}
    for centre in sorted(answers):  # in order: the same bits whatever the order of arrival
        add(total, answers[centre].sums)
    return total


def asked_secretly(run: Run, requests: Mapping[str, Request]) -> Sums:
    """The same, of which no centre's own answer is seen; repeated like a round when too few stay."""
    query = next(iter(requests.values()))
    assert isinstance(query, Query)
    for attempt in range(run.config.federation.retries + 1):
        try:
            found = summed(run, answered(run, requests), 0, blank(query, run.config, run.layout))
        except TooFew as few:
            if attempt == run.config.federation.retries:
                raise Paused(f"query '{query.name}': {few}; mend it, then resume") from few
        else:
            for centre, reason in found.why.items():
                leave_out(run, "", 0, centre, reason)
            return found.sums
    raise AssertionError("a loop that returns or raises")


def apart(run: Run, requests: Mapping[str, Request], what: str) -> Sums:
    """The answers side by side, where keys begin with a cohort's name. Who will not say `what` is none the worse: the ledger says `withheld`."""
    sums: Sums = {}
    for received in send(run, requests):
        if isinstance(received.reply, Answer):
            sums |= received.reply.sums
        else:
            run.ledger.event(run.id, "withheld", f"{what}: {reason_of(received.reply)}", received.centre)
    return sums


def answered(run: Run, requests: Mapping[str, Request]) -> dict[str, Answer]:
    """{centre: its answer}."""
    answers: dict[str, Answer] = {}
    for received in send(run, requests):
        if isinstance(received.reply, Answer):
            answers[received.centre] = received.reply
        else:
            leave_out(run, "", 0, received.centre, reason_of(received.reply))
    return answers
