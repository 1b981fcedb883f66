"""A process that starts or resumes a tiny phantom run and kills itself with SIGKILL at a given moment.

python -m tests.server.killed_run ROOT RUNS RUN begin|resume MOMENT COUNT [OVERRIDE ...]

MOMENT is `training`, `aggregation`, `checkpoint` or `never`; the process dies the COUNTth time that it comes
there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from common.protocol.messages import Reply, Request, TrainRequest
from server.aggregation import aggregate
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run import checkpoint
from tests.in_process_federation import InProcess, phantom_config, sites


def main() -> None:
    root, runs, run_id, action, deadly_moment, count, *overrides = sys.argv[1:]
    times_left = int(count)

    def come_to(moment: str) -> None:
        nonlocal times_left
        if moment == deadly_moment:
            times_left -= 1
            if times_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            come_to("training")  # after a centre has trained, before its update arrives
        return reply

    write_checkpoint = checkpoint.write_checkpoint
    server_step = aggregate.server_step

    def write_or_die(*args: object) -> object:
        come_to("checkpoint")  # the round is in the ledger, but not in a checkpoint
        return write_checkpoint(*args)  # type: ignore[arg-type]

    def step_or_die(*args: object) -> object:
        come_to("aggregation")
        return server_step(*args)  # type: ignore[arg-type]

    checkpoint.write_checkpoint = write_or_die  # type: ignore[assignment]
    aggregate.server_step = step_or_die  # type: ignore[assignment]
    runs_dir = Path(runs)
    transport = InProcess(sites(), hook)
    ledger = open_ledger(runs_dir)
    if action == "begin":
        start_run(phantom_config(Path(root), *overrides), transport, runs_dir, ledger, run_id)
    else:
        resume_run(run_id, transport, runs_dir, ledger)


if __name__ == "__main__":
    main()
