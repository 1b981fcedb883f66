"""Work for a pool whose worker dies on one scan; a module of its own, so that the workers start quickly."""

from __future__ import annotations

import os
import signal
import time

from client.imaging.preprocess import JobOutcome, PreprocessJob, run_job


def deadly(job: PreprocessJob) -> JobOutcome:
    """Reads as it should, but one scan kills its process, as the kernel does when memory runs out."""
    if job.series_uid == "deadly":
        time.sleep(0.05)  # so that others are under way
        os.kill(os.getpid(), signal.SIGKILL)
    return run_job(job)
