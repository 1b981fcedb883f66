"""A process in which every command of a side fails unexpectedly while it holds a patient's identifiers.

`python -m tests.client.failing_commands client FOLDER` prints a line `exit NAME STATUS` for each command.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Put together here, so that they are in no line of source that a traceback could show.
SECRETS = ["-".join(parts) for parts in (("PATIENT", "4711"), ("DOE", "JANE"), ("ACC", "0815"))]
# {command line: the function that fails in it}
CLIENT_COMMANDS = {
    "cohort scans": "client.data.cohort.build_cohort",
    "preprocess scans": "client.data.cohort.load_cohort",
    "montage scans": "client.imaging.montage.write_montage",
    "predict model scans": "client.tools.predict.predict_folder",
    "phantom scans": "client.phantom.federation.write_federation",
    "ingest scans --data scans": "client.ingest.pipeline.ingest_studies",
    "egress scans": "client.site.egress_log.read_lines",
    "policy scans": "client.site.policy.load_policy",
    "key scans": "common.utils.node_keys.generate_key",
    "doctor": "client.tools.doctor.run_checks",
    "metrics --site site.yaml": "client.tools.prometheus.render_metrics",
    "accept-loss --state scans": "client.site.anchored_files.list_losses",
}
SERVER_COMMANDS = {
    "simulate": "server.cli.run_simulation",
    "report run": "server.cli.find_run_dir",
    "backup file": "server.operations.backup.write_backup",
}


class Leaky:
    """An object whose destructor fails."""

    def __del__(self) -> None:
        fail_with_secrets()


def fail_with_secrets(*_: Any, **__: Any) -> Any:
    """Fail as a library does: with values in the text, the locals, a warning, a log line and the cause."""
    patient, name, accession = SECRETS
    warnings.warn(f"odd value '{patient}'", stacklevel=1)
    logging.getLogger("pydicom").warning("odd value %s", name)
    try:
        int(accession)
    except ValueError as error:
        raise KeyError(f"{patient} {name}") from error


def run_command(main: Callable[[], None], words: str, target: str) -> None:
    module_name, _, function = target.rpartition(".")
    setattr(importlib.import_module(module_name), function, fail_with_secrets)
    sys.argv = ["consilium", *words.split()]
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    print(f"exit {words} {status}", flush=True)


def fail_outside_commands() -> None:
    """Fail in a thread, in a destructor and in a process that reads scans."""
    from client.imaging.worker_pool import run_in_pool

    thread = threading.Thread(target=fail_with_secrets)
    thread.start()
    thread.join()
    leaky = Leaky()
    del leaky
    for _ in run_in_pool([SECRETS], [0], 2, fail_with_secrets):  # type: ignore[list-item]
        pass


if __name__ == "__main__":
    side, folder = sys.argv[1], Path(sys.argv[2])
    commands = CLIENT_COMMANDS if side == "client" else SERVER_COMMANDS
    main = importlib.import_module(f"{side}.cli").main
    for words, target in commands.items():
        run_command(main, words, target)
    if side == "client":
        fail_outside_commands()  # the last: its error is one that nothing catches
