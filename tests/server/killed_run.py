"""A process that begins or resumes a tiny phantom run and kills itself with SIGKILL at a given moment.

python -m tests.server.killed_run ROOT RUNS RUN begin|resume MOMENT COUNT [OVERRIDE ...]
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
    root, runs, run, how, moment, count, *overrides = sys.argv[1:]
    left = [int(count)]

    def strike(at: str) -> None:
        if at == moment:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            strike("training")  # after a centre trained, before its contribution arrives
        return reply

    before_save, before_step = checkpoint.write_checkpoint, aggregate.server_step

    def saving(*args: object) -> object:
        strike("checkpoint")  # the ledger has the round, the checkpoint has not
        return before_save(*args)  # type: ignore[arg-type]

    def stepping(*args: object) -> object:
        strike("aggregation")
        return before_step(*args)  # type: ignore[arg-type]

    checkpoint.write_checkpoint, aggregate.server_step = saving, stepping  # type: ignore[assignment]
    folder = Path(runs)
    transport = InProcess(sites(), hook)
    if how == "begin":
        start_run(phantom_config(Path(root), *overrides), transport, folder, open_ledger(folder), run)
    else:
        resume_run(run, transport, folder, open_ledger(folder))


if __name__ == "__main__":
    main()
