"""Find the numbers of scans in a reply."""

from __future__ import annotations

from collections.abc import Iterable

from common.protocol.messages import JoinReply, Reply, StatisticsReply, TrainReply


def list_numbers_of_scans(reply: Reply, tasks: Iterable[str]) -> list[float]:
    """Return every number of scans that a reply of a run with these tasks tells."""
    if isinstance(reply, JoinReply):
        return [*reply.scans.values(), *reply.skipped.values()]
    if isinstance(reply, TrainReply):
        return [reply.scans, *(num_scans for _, num_scans in reply.losses.values())]
    if not isinstance(reply, StatisticsReply):
        return []
    numbers: list[float] = []
    for key, values in reply.sums.items():
        statistic = key.rpartition("/")[2]
        if statistic == "loss":
            numbers.append(values[1])
        elif statistic in ("regression", "overlap"):
            numbers.append(values[0])
        elif statistic in ("hist", "confusion", "joint", "n") or statistic in tasks:
            numbers.extend(values.ravel().tolist())
    return numbers
