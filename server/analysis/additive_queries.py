"""Ask the centres for sums over their scans: the coordinator's half of an additive query.

Each centre replies with a dict of arrays, and the coordinator adds them up. Where the run hides statistics,
the sum is a secure one (server/run/secure_aggregation.py) and no centre's own reply is seen.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.learning.metrics import Array
from common.privacy.masked_layout import empty_sums
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.messages import Request, StatisticsReply, StatisticsRequest, Sums, add_sums
from common.protocol.sum_key import SumKey
from server.run.broadcast import send_requests
from server.run.expected_sums import require_possible_values
from server.run.reply_fields import BadReply
from server.run.run_state import NoCentreReplied, Run, RunPaused, record_exclusion, to_refusal
from server.run.secure_aggregation import NotEnoughCentres, SecureSumResult, secure_sum


def query_sum(run: Run, requests: Mapping[str, StatisticsRequest]) -> Sums:
    """Return the sum of all replies. A centre that does not reply is left out, and the ledger says why.

    Args:
        run: the run.
        requests: {centre: request}, all of one kind.

    Raises:
        RunPaused: no centre replied, or too few for a secure sum.
    """
    if hides_statistics(run.config):
        return query_secure_sum(run, requests)
    replies = query_replies(run, requests)
    if not replies:
        raise NoCentreReplied("no centre replied; the ledger has each one's reason: remedy it, then resume")
    total: Sums = {}
    for centre in sorted(replies):  # in this order, the sum has the same bits whatever the order of arrival
        add_sums(total, replies[centre].sums)
    return total


def query_secure_sum(run: Run, requests: Mapping[str, StatisticsRequest]) -> Sums:
    """Return the sum of all replies without seeing any of them; repeat it when too few centres stay.

    Raises:
        RunPaused: too few centres stayed in the last attempt.
    """
    request = next(iter(requests.values()))
    template = empty_sums(request, run.config, run.model.layout)
    for attempt in range(run.config.federation.round_retries + 1):
        try:
            result = secure_sum(run, query_replies(run, requests), 0, template)
        except NotEnoughCentres as error:
            if attempt == run.config.federation.round_retries:
                raise RunPaused(f"query '{request.name}': {error}; remedy it, then resume") from error
        else:
            for centre, refusal in result.dropouts.items():
                record_exclusion(run, "", 0, centre, refusal)
            _require_possible_sum(request, result)
            return result.sums
    raise AssertionError("the loop returns or raises in its last pass")


def _require_possible_sum(request: StatisticsRequest, result: SecureSumResult) -> None:
    """Raise RunPaused for values that sums over scans cannot have; nobody can see whose part is wrong."""
    try:
        require_possible_values(request, result.sums)
    except BadReply as fault:
        centres = ", ".join(result.survivors)
        raise RunPaused(
            f"query '{request.name}': {fault} in the secure sum, so one of {centres} sent wrong numbers; "
            "find it by excluding one at a time, then resume"
        ) from None


def query_per_centre(run: Run, requests: Mapping[str, StatisticsRequest], subject: str) -> Sums:
    """Return all replies side by side; their keys begin with the cohort.

    A centre may decline without being left out of anything: the ledger has an event `withheld` that names the
    `subject`.
    """
    sums: Sums = {}
    for received in send_requests(run, requests):
        if isinstance(received.reply, StatisticsReply):
            sums |= received.reply.sums
        else:
            refusal = to_refusal(received.centre, received.reply)
            detail = f"{subject}: {refusal.reason}"
            run.ledger.log_event(run.run_id, "withheld", detail, received.centre, refusal.code)
    return sums


def query_replies(run: Run, requests: Mapping[str, Request]) -> dict[str, StatisticsReply]:
    """Return {centre: its reply}; record the exclusion of every centre that has none."""
    replies: dict[str, StatisticsReply] = {}
    for received in send_requests(run, requests):
        if isinstance(received.reply, StatisticsReply):
            replies[received.centre] = received.reply
        else:
            record_exclusion(run, "", 0, received.centre, to_refusal(received.centre, received.reply))
    return replies


def select_by_cohort(sums: Sums, task: str, statistic: str) -> dict[str, Array]:
    """Return {cohort: one statistic of a task}, in the keys' order, which fixes that of later additions."""
    arrays = {}
    for text in sorted(sums):
        key = SumKey.parse(text)
        if key.task == task and key.statistic == statistic:
            arrays[key.cohort] = sums[text]
    return arrays
