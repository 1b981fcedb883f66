"""Compare two checkouts bit for bit: the same small runs in both, on one machine, with the same seeds.

    python -m tests.tools.compare_checkouts OLD NEW
    python -m tests.tools.compare_checkouts OLD NEW --only triage,secagg
    python -m tests.tools.compare_checkouts OLD NEW --old-results FOLDER

Each run is started by the commands that an operator types (`consilium-centre phantom`, `consilium-server
simulate` and `resume`), in subprocesses that import the packages of one checkout and write to folders of
their own. Afterwards every tensor of `model.safetensors`, and of the weights that the centres kept to
themselves, is compared: name, data type, shape and bytes. The exit status is 1 when any of them differs or a
run fails.

The overrides of a run are written in the spelling of 0.1.0, which OLD is expected to understand. For NEW they
are translated by its own `common/config/renamed_keys.py`; where it has none, they stay as they are.

Noise of differential privacy comes from the operating system and follows no seed, so no such run is in the
list.
"""

from __future__ import annotations

import argparse
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
from rich.table import Table
from safetensors.numpy import load_file

Tensors = dict[str, NDArray[np.generic]]

COMMAND_TIMEOUT = 1200.0  # seconds
MARKER = "COMPARE_CHECKOUTS"  # an environment variable by which the processes of a run are found again
PACKAGES = "client, server, common"
PRINT_RENAMES = """
import json
from common.config.renamed_keys import RENAMED_GROUPS, RENAMED_KEYS, RENAMED_VALUES
print(json.dumps([RENAMED_KEYS, RENAMED_VALUES, RENAMED_GROUPS]))
"""
# Keep the weights of the last round: on a dozen scans validation may find no round better than the start, and
# the initial weights are equal in any case.
LAST_ROUND = "evaluation.choose=last"
SMALL_PHANTOM = (
    "federation.phantom.scale=0.03",
    "federation.phantom.slices=12",
    "federation.phantom.pixels=64",
    "preprocess.size=32",
)
console = Console(width=max(Console().width, 110))


class ComparisonError(Exception):
    """A run failed, or the comparison was started wrongly."""


@dataclass(frozen=True)
class RunSpec:
    """A run that both checkouts carry out. Its overrides are in the old spelling."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    small: bool = True  # on the small phantom; false: on the one that `make simulate` makes
    killed: bool = False  # all of its processes get SIGKILL after the first round; then it is resumed

    @property
    def run_id(self) -> str:
        """The run's id in both checkouts."""
        return f"compare-{self.name}"

    @property
    def data_name(self) -> str:
        """The folder of the made-up hospitals that it reads."""
        return "data_small" if self.small else "data_default"

    @property
    def phantom_overrides(self) -> tuple[str, ...]:
        """The overrides that the made-up hospitals are written with."""
        return SMALL_PHANTOM if self.small else ()

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """The run's overrides, and those that all small runs have."""
        return (*self.phantom_overrides, LAST_ROUND, *self.overrides) if self.small else self.overrides


RUNS = (
    # `make simulate` as it is. First, because it takes longest.
    RunSpec("multisource", "multisource", small=False),
    RunSpec(
        "triage",
        "triage",
        ("stage.rounds=2", "stage.epochs=1", "preprocess.slices=4", "tasks.covid.hidden=[32]"),
    ),
    # With soft labels: federated k-means, half of the encoder frozen, a second stage.
    RunSpec(
        "transfer",
        "transfer",
        (
            "stage.rounds=1",
            "stage.epochs=1",
            "stage.batch=8",
            "stages.transition.tasks=[soft]",
            "tasks.soft.clusters=[2,3]",
        ),
    ),
    # Severity first, then all heads, that of the regression too.
    RunSpec(
        "prognosis",
        "prognosis",
        (
            "stage.rounds=2",
            "stages.scores.rounds=1",
            "stages.main.tasks=[outcome,brixia,right,left,regions]",
            "stage.epochs=1",
            "stage.batch=8",
        ),
    ),
    # Momentum contrast, then classes and masks.
    RunSpec(
        "finegrained",
        "finegrained",
        ("stage.rounds=1", "stages.main.rounds=2", "stage.epochs=1", "stage.batch=8"),
    ),
    RunSpec("multisource_personal", "multisource_personal", ("stage.rounds=2", "stage.epochs=1")),
    RunSpec(
        "secagg",
        "multisource",
        (
            "privacy=secagg",
            "privacy.secagg.hide=all",
            "evaluation.over=pooled",
            "stage.rounds=2",
            "stage.epochs=1",
        ),
    ),
    # With an optimiser at the server, whose state must survive.
    RunSpec(
        "resumed",
        "multisource",
        ("aggregation=fedadam", "stage.rounds=8", "stage.epochs=1"),
        killed=True,
    ),
)


@dataclass
class RunRecord:
    """How a finished run was made, so that its tensors are reused for the same run only."""

    overrides: list[str]
    commit: str
    torch: str
    seconds: float


@dataclass(frozen=True)
class Difference:
    """How the tensors of one run differ between two checkouts."""

    count: int  # of tensors, on either side
    differing: list[str]
    largest: float  # absolute; infinite where a tensor is missing or has another shape


# --- overrides --------------------------------------------------------------------------------------------


def load_renames(checkout: Path) -> dict[str, str]:
    """Read {old spelling: new spelling} from a checkout; empty where nothing is renamed.

    A spelling is a dotted key, where ``*`` stands for any name (``tasks.*.kind``); a key with a value
    (``aggregation=mirror``); or the name of a group and ``=`` (``fitting=``), whose choices keep their names.
    """
    if not (checkout / "common" / "config" / "renamed_keys.py").is_file():
        return {}
    keys, values, groups = json.loads(_run_python(checkout, PRINT_RENAMES))
    return {**keys, **values, **{f"{old}=": f"{new}=" for old, new in groups.items()}}


def translate_override(override: str, renames: Mapping[str, str]) -> str:
    """Return an override (`key=value`) in the new spelling; one that no rename applies to is unchanged."""
    key, _, value = override.partition("=")
    for pattern, replacement in renames.items():
        if "=" not in pattern:
            continue
        old_key, _, old_value = pattern.partition("=")
        new_key, _, new_value = replacement.partition("=")
        names = _match_key(key, old_key)
        if names is not None and old_value in ("", value):
            return f"{_restore_stage(_fill_names(new_key, names), key)}={new_value or value}"
    return f"{_translate_key(key, renames)}={value}"


def _translate_key(key: str, renames: Mapping[str, str]) -> str:
    """Rename a key by the rename that covers most of it; the parts below that stay."""
    parts = _generalise_stage(key).split(".")
    for length in range(len(parts), 0, -1):
        beginning, rest = ".".join(parts[:length]), parts[length:]
        for pattern, replacement in renames.items():
            names = _match_key(beginning, pattern)
            if names is not None:
                return _restore_stage(".".join([_fill_names(replacement, names), *rest]), key)
    return key


def _match_key(key: str, pattern: str) -> list[str] | None:
    """Return what the stars of a pattern stand for in a key; None where the pattern does not match."""
    parts = _generalise_stage(key).split(".")
    pattern_parts = pattern.split(".")
    if len(parts) != len(pattern_parts):
        return None
    names = []
    for part, pattern_part in zip(parts, pattern_parts, strict=True):
        if pattern_part == "*":
            names.append(part)
        elif pattern_part != part:
            return None
    return names


def _fill_names(pattern: str, names: Sequence[str]) -> str:
    """Return the pattern with each star replaced by its name."""
    remaining = iter(names)
    return ".".join(next(remaining) if part == "*" else part for part in pattern.split("."))


def _generalise_stage(key: str) -> str:
    """Return `stages.main.batch` as `stage.batch`, because renames hold for all stages."""
    parts = key.split(".")
    return ".".join(["stage", *parts[2:]]) if parts[0] == "stages" and len(parts) > 2 else key


def _restore_stage(new_key: str, key: str) -> str:
    """Undo `_generalise_stage` in a translated key."""
    parts = key.split(".")
    if parts[0] != "stages" or len(parts) <= 2:
        return new_key
    return f"stages.{parts[1]}.{new_key.removeprefix('stage.')}"


# --- one side ---------------------------------------------------------------------------------------------


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


# --- comparison -------------------------------------------------------------------------------------------


def compare_tensors(old: Tensors, new: Tensors) -> Difference:
    """Compare names, data types, shapes and bytes. A tensor that only one side has differs."""
    names = sorted(old.keys() | new.keys())
    differing = [name for name in names if not _are_equal(old.get(name), new.get(name))]
    gaps = [_find_largest_gap(old.get(name), new.get(name)) for name in differing]
    return Difference(len(names), differing, max(gaps, default=0.0))


def _are_equal(old: NDArray[np.generic] | None, new: NDArray[np.generic] | None) -> bool:
    if old is None or new is None:
        return False
    return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()


def _find_largest_gap(old: NDArray[np.generic] | None, new: NDArray[np.generic] | None) -> float:
    if old is None or new is None or old.shape != new.shape:
        return float("inf")
    return float(np.max(np.abs(old.astype(np.float64) - new.astype(np.float64)), initial=0.0))


def print_table(specs: Sequence[RunSpec], old: Side, new: Side) -> bool:
    """Print a row for each run, and names of tensors that differ. Returns whether all are equal."""
    table = Table("run", "tensors", "equal", "largest difference", "seconds, old", "seconds, new")
    old_records, new_records = old.read_records(), new.read_records()
    all_equal = True
    sentences = []
    for spec in specs:
        difference = compare_tensors(old.read_tensors(spec), new.read_tensors(spec))
        seconds = [f"{records[spec.name].seconds:.0f}" for records in (old_records, new_records)]
        equal = str(difference.count - len(difference.differing))
        table.add_row(spec.name, str(difference.count), equal, f"{difference.largest:.3g}", *seconds)
        if difference.differing or not difference.count:
            all_equal = False
            shown = ", ".join(difference.differing[:5])
            sentences.append(f"{spec.name}: {len(difference.differing)} tensors differ, among them {shown}")
    console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    return all_equal


def choose_runs(names: str) -> list[RunSpec]:
    """Return the runs of these names (separated by commas), in the list's order; all for an empty text."""
    chosen = {name for name in names.split(",") if name}
    unknown = chosen - {spec.name for spec in RUNS}
    if unknown:
        valid = ", ".join(spec.name for spec in RUNS)
        raise ComparisonError(f"there is no run {', '.join(sorted(unknown))}; valid: {valid}")
    return [spec for spec in RUNS if not chosen or spec.name in chosen]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("old", type=Path, help="the checkout before the change")
    parser.add_argument("new", type=Path, help="the checkout after it")
    parser.add_argument("--old-results", type=Path, help="keep the old side's results here, and reuse them")
    parser.add_argument("--new-results", type=Path, help="the same for the new side")
    parser.add_argument("--only", default="", help="names of runs, separated by commas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the runs on both sides, compare them, and return the exit status."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        try:
            specs = choose_runs(options.only)
            renames = load_renames(options.new)
            old = Side(options.old, work / "old", options.old_results or work / "old_results", {})
            new = Side(options.new, work / "new", options.new_results or work / "new_results", renames)
            for side in (old, new):
                side.run_all(specs, options.jobs)
        except ComparisonError as error:
            console.print(f"error: {error}", markup=False, highlight=False)
            return 1
        return 0 if print_table(specs, old, new) else 1


if __name__ == "__main__":
    sys.exit(main())
