"""Run a simulation as one command that tells how the run ended and leaves nothing running."""

from __future__ import annotations

from pathlib import Path

from server.operations.local_superlink import start_superlink
from server.operations.submission import plan_submission, submit_run
from server.rounds.run_lifecycle import resolve_runs_dir
from server.run.outcome import record_failure


def run_simulation(
    recipe: str,
    overrides: list[str],
    runs: str = "",
    *,
    resume_id: str = "",
    gpus: float = 0.0,
    run_id: str = "",
) -> Path:
    """Run a recipe, or resume a run, to its end and print its table; returns the run's folder.

    `gpus`: the fraction of a GPU for each centre.

    Raises:
        ConsiliumError: the run did not finish.
    """
    submission = plan_submission(recipe, overrides, resolve_runs_dir(runs), resume_id, run_id)
    federation = submission.config.federation
    num_nodes = 1 if federation.mode == "central" else len(federation.centres)
    resources = f"client-resources-num-cpus=1 client-resources-num-gpus={gpus}"
    options = ["--federation-config", f"num-supernodes={num_nodes} {resources}"]
    with record_failure(submission.runs_dir, submission.run_id), start_superlink() as access:
        return submit_run(submission, access, options)
