"""One checkout of a comparison: its runs in subprocesses of their own, and the tensors that they leave."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file

from tests.tools.compared_runs import RunSpec, translate_override

Tensors = dict[str, NDArray[np.generic]]

COMMAND_TIMEOUT = 1200.0  # seconds
MARKER = "COMPARE_CHECKOUTS"  # an environment variable by which the processes of a run are found again
PACKAGES = "client, server, common"
PRINT_RENAMES = """
import json
from common.config.renamed_keys import RENAMED_GROUPS, RENAMED_KEYS, RENAMED_VALUES
print(json.dumps([RENAMED_KEYS, RENAMED_VALUES, RENAMED_GROUPS]))
"""
console = Console(width=max(Console().width, 110))


class ComparisonError(Exception):
    """A run failed, or the comparison was started wrongly."""


@dataclass
class RunRecord:
    """How a finished run was made, so that its tensors are reused for the same run only."""

    overrides: list[str]
    commit: str
    torch: str
    seconds: float


def load_renames(checkout: Path) -> dict[str, str]:
    """Read {old spelling: new spelling} from a checkout; empty where nothing is renamed.

    A spelling is a dotted key, where ``*`` stands for any name (``tasks.*.kind``); a key with a value
    (``aggregation=mirror``); or the name of a group and ``=`` (``fitting=``), whose choices keep their names.
    """
    if not (checkout / "common" / "config" / "renamed_keys.py").is_file():
        return {}
    keys, values, groups = json.loads(_run_python(checkout, PRINT_RENAMES))
    return {**keys, **values, **{f"{old}=": f"{new}=" for old, new in groups.items()}}


class Side:
    """One checkout. Its runs write into `work`; the tensors of finished runs are kept in `results`."""

    def __init__(self, checkout: Path, work: Path, results: Path, renames: Mapping[str, str]) -> None:
        self.checkout = checkout.resolve()
        self.work = work.resolve()
        self.results = results
        self.renames = renames
        self.commit = _describe_commit(self.checkout)
        self._recording = threading.Lock()
        results.mkdir(parents=True, exist_ok=True)
        _check_imports(self.checkout)

    def run_all(self, specs: Sequence[RunSpec], jobs: int) -> None:
        """Execute the runs that `results` does not hold yet, `jobs` at a time. Raises ComparisonError."""
        records = self.read_records()
        missing = [spec for spec in specs if not self._is_reusable(spec, records.get(spec.name))]
        for spec in {spec.data_name: spec for spec in missing}.values():
            self._make_phantom(spec)
        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(self._run_one, spec) for spec in missing]:
                future.result()  # raises what the run raised

    def read_records(self) -> dict[str, RunRecord]:
        """Return {run: record} of the finished runs in `results`."""
        path = self.results / "records.json"
        if not path.is_file():
            return {}
        return {name: RunRecord(**record) for name, record in json.loads(path.read_text()).items()}

    def read_tensors(self, spec: RunSpec) -> Tensors:
        """Return {`file: tensor`: array} of a finished run.

        The arrays of a centre's own file (a mask, floats, integers) are named by their data types, because
        their names in the file are not the model's, and may change.
        """
        folder = self.results / spec.name
        tensors: Tensors = {}
        for path in sorted(folder.rglob("*.safetensors")):
            file = path.relative_to(folder).with_suffix("").as_posix()
            for name, array in load_file(path).items():
                tensors[f"{file}: {name if file == 'model' else array.dtype}"] = array
        return tensors

    def _is_reusable(self, spec: RunSpec, record: RunRecord | None) -> bool:
        if record is None:
            return False
        same = record.commit == self.commit and record.torch == importlib.metadata.version("torch")
        return same and record.overrides == list(spec.all_overrides)

    def _translate(self, overrides: Sequence[str]) -> list[str]:
        return [translate_override(override, self.renames) for override in overrides]

    def _make_phantom(self, spec: RunSpec) -> None:
        """Write the made-up hospitals that this run, and others like it, read."""
        overrides = self._translate(["recipe=multisource", *spec.phantom_overrides])
        self._call("consilium-centre", ["phantom", *(f"--set={override}" for override in overrides)], spec)

    def _run_one(self, spec: RunSpec) -> None:
        """Execute a run, with a kill and a resumption where the list says so, and keep its tensors."""
        began = time.monotonic()
        runs = ["--runs", str(self.work / "runs")]
        recipe, *overrides = self._translate([f"recipe={spec.recipe}", *spec.all_overrides])
        begin = ["simulate", "--recipe", recipe.partition("=")[2], "--id", spec.run_id, *runs, *overrides]
        if spec.killed:
            self._start_and_kill(begin, spec)
            self._call("consilium-server", ["resume", spec.run_id, *runs], spec)
        else:
            self._call("consilium-server", begin, spec)
        self._keep_tensors(spec)
        self._record(spec, time.monotonic() - began)

    def _call(self, command: str, arguments: Sequence[str], spec: RunSpec) -> None:
        """Run a command of the checkout to its end. Raises ComparisonError with its last lines."""
        with self._start(command, arguments, spec) as process:
            try:
                output, _ = process.communicate(timeout=COMMAND_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise ComparisonError(f"{spec.name}: {command} took over {COMMAND_TIMEOUT:.0f} s") from None
        if process.returncode:
            last_lines = "\n".join(output.strip().splitlines()[-8:])
            shown = f"{command} {' '.join(arguments)} in {self.checkout}"
            raise ComparisonError(f"{spec.name}: {shown} ended with {process.returncode}:\n{last_lines}")

    def _start_and_kill(self, arguments: Sequence[str], spec: RunSpec) -> None:
        """Start a run, and kill all its processes at once when it has checkpointed its first round."""
        folder = self.work / "runs" / spec.run_id
        until = time.monotonic() + COMMAND_TIMEOUT
        with self._start("consilium-server", arguments, spec) as process:
            while not list(folder.rglob("*-00001.json")):
                if process.poll() is not None or time.monotonic() > until:
                    raise ComparisonError(f"{spec.name}: the run wrote no checkpoint of its first round")
                time.sleep(0.02)
        if (folder / "metrics.json").exists():
            raise ComparisonError(f"{spec.name}: the run finished before it was killed; give it more rounds")

    @contextlib.contextmanager
    def _start(
        self, command: str, arguments: Sequence[str], spec: RunSpec
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a process of the checkout; it and all that it started get SIGKILL at the end of the block."""
        marker = uuid.uuid4().hex
        temporary = tempfile.mkdtemp(prefix="cmp-")  # a short path: sockets lie in it
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("CONSILIUM_", "FLWR_"))
        }
        environment = inherited | {
            "PYTHONPATH": str(self.checkout),
            "CONSILIUM_DATA": str(self.work / spec.data_name),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": temporary,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            MARKER: marker,
        }
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command), *arguments],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            _kill_marked(marker)
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)

    def _keep_tensors(self, spec: RunSpec) -> None:
        """Copy the common model, and the weights that each centre kept of this run, into `results`."""
        folder = self.results / spec.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copyfile(self.work / "runs" / spec.run_id / "model.safetensors", folder / "model.safetensors")
        data = self.work / spec.data_name
        for path in data.rglob(f"{spec.run_id}/**/*.safetensors"):
            parts = path.relative_to(data).parts  # phantom / north / .consilium / personal / RUN / main / 1
            copied = folder.joinpath(parts[1], *parts[parts.index(spec.run_id) + 1 :])
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)

    def _record(self, spec: RunSpec, seconds: float) -> None:
        torch = importlib.metadata.version("torch")
        with self._recording:
            records = self.read_records()
            records[spec.name] = RunRecord(list(spec.all_overrides), self.commit, torch, round(seconds, 1))
            text = json.dumps({name: asdict(record) for name, record in records.items()}, indent=1)
            (self.results / "records.json").write_text(text)
        console.print(f"{self.checkout}: {spec.name} in {seconds:.0f} s", highlight=False)


def _run_python(checkout: Path, program: str) -> str:
    """Return what a program prints that imports the packages of a checkout."""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
    ).stdout


def _check_imports(checkout: Path) -> None:
    """Raise ComparisonError where Python would import the packages from elsewhere."""
    program = f"import json, {PACKAGES}; print(json.dumps([p.__file__ for p in ({PACKAGES})]))"
    for file in json.loads(_run_python(checkout, program)):
        if not Path(file).resolve().is_relative_to(checkout):
            raise ComparisonError(f"{file} would be imported instead of the packages in {checkout}")


def _describe_commit(checkout: Path) -> str:
    """Return a checkout's commit; with uncommitted changes, a text that no other state has."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{described}-{time.time_ns()}" if described.endswith("-dirty") or not described else described


def _kill_marked(marker: str) -> None:
    """Send SIGKILL to every process with this marker in its environment, which only those of one run have."""
    variable = f"{MARKER}={marker}".encode()
    for _ in range(20):  # a process may be starting another at this moment
        marked = [
            entry
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _has_variable(entry, variable)
        ]
        if not marked:
            return
        for entry in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(0.05)


def _has_variable(process: Path, variable: bytes) -> bool:
    with contextlib.suppress(OSError):
        return variable in (process / "environ").read_bytes().split(b"\0")
    return False
