"""Work that kills its worker on one scan; a module of its own, so that the workers start quickly."""

from __future__ import annotations

import os
import signal
import time

from client.imaging.job_execution import run_job
from client.imaging.jobs import JobOutcome, PreprocessJob


def kill_on_marked_scan(job: PreprocessJob) -> JobOutcome:
    """Run the job; one scan kills its process, as the kernel does when memory runs out."""
    if job.series_uid == "deadly":
        time.sleep(0.05)  # so that other scans are under way
        os.kill(os.getpid(), signal.SIGKILL)
    return run_job(job)
