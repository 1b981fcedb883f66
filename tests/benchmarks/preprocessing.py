"""Compare preprocessing, from disk to stored slices, with other code.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.preprocessing --peer PEER [--data DATA] [--slices
    100,300] [--repeats 5] [--only jpeg|dicom|codecs|memory|lungs|auc]

JPEG folders are compared with the multi-source paper's published code, DICOM with pydicom + scipy and with
the fastest decoders. PEER is a clone of github.com/Purdue-M2/multisource-covid-ct; without it the JPEG
table is left out. DATA (default: `$CONSILIUM_REAL_DATA`, else ../shared/data) has a real chest CT,
interpolated to the number of slices asked for; without it a phantom is drawn. Our side is what
`consilium-centre preprocess` runs for a scan (`run_job` in client/imaging/job_execution.py): hash of all
files, search, selection, crop, store. Sides take turns. "CPU" is processor time of one process, hence a
ratio per core; "two cores" is the peer's wall time in its one process over ours by two processes that are
running already, on the same machine in turns. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from common.config.schema import PreprocessConfig
from tests.benchmarks.measuring import Timing, format_header, format_row, measure_peak_growth, time_call
from tests.benchmarks.preprocessing_quality import print_auc, print_lung_overlap
from tests.benchmarks.preprocessing_sides import (
    SEARCHED_SETTINGS,
    SETTINGS,
    Sides,
    preprocess_ours,
    preprocess_peer,
    preprocess_reference,
    time_in_turns,
)
from tests.benchmarks.scan_files import CODECS, Decoder, list_decoders, make_volume, write_dicom, write_jpegs

TWO_CORE_SETTINGS = ("zquantile", "kds")
TABLES = ("jpeg", "dicom", "codecs", "memory", "lungs", "auc")


@dataclass(frozen=True)
class Options:
    """What to measure on, and how often."""

    data: Path | None
    slice_counts: list[int]
    repeats: int
    work: Path  # folder for scans and stores


def make_our_sides(folder: Path, all_settings: dict[str, PreprocessConfig], work: Path) -> Sides:
    store = work / "store"
    return {
        name: partial(preprocess_ours, folder, settings, store) for name, settings in all_settings.items()
    }


def format_ratios(ratios: list[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def compare_cpu(numerators: list[Timing], denominators: list[Timing]) -> str:
    """The ratios of CPU time over the repeats."""
    pairs = zip(numerators, denominators, strict=True)
    return format_ratios([numerator.cpu / denominator.cpu for numerator, denominator in pairs])


def format_median_cpu(timings: list[Timing]) -> str:
    return f"{1000 * statistics.median(timing.cpu for timing in timings):.0f} ms"


# --- JPEG folders


def make_pool(num_processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    initializer = partial(cv2.setNumThreads, 1)
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=initializer)


def time_two_processes(
    pool: ProcessPoolExecutor, folder: Path, settings: PreprocessConfig, work: Path, num_scans: int
) -> float:
    """Wall seconds a scan with two processes."""

    def preprocess_all() -> None:
        stores = [work / f"two{number}" for number in range(num_scans)]
        for future in [pool.submit(preprocess_ours, folder, settings, store) for store in stores]:
            future.result()

    return time_call(preprocess_all).wall / num_scans


def compare_on_two_cores(
    peer: Any, pool: ProcessPoolExecutor, folder: Path, options: Options
) -> dict[str, str]:
    """The ratios of the peer's wall time to ours by two processes, by selection."""
    work = options.work
    ratios: dict[str, list[float]] = {name: [] for name in TWO_CORE_SETTINGS}
    time_two_processes(pool, folder, SETTINGS["kds"], work, 4)  # libraries are loaded
    for _ in range(options.repeats):
        peer_seconds = time_call(partial(preprocess_peer, peer, folder, work / "peer")).wall
        for name in TWO_CORE_SETTINGS:
            our_seconds = time_two_processes(pool, folder, SETTINGS[name], work, 6)
            ratios[name].append(peer_seconds / our_seconds)
    return {name: format_ratios(values) for name, values in ratios.items()}


def print_jpeg_table(peer: Any, options: Options) -> None:
    titles = ["JPEG folder of", "selection", "peer, CPU", "ours, CPU", "per core", "two cores"]
    print("\n" + format_header(titles))
    with make_pool(2) as pool:
        for num_slices in options.slice_counts:
            folder = write_jpegs(make_volume(options.data, num_slices), options.work / f"jpeg{num_slices}")
            sides = make_our_sides(folder, SETTINGS, options.work)
            sides["peer"] = partial(preprocess_peer, peer, folder, options.work / "peer")
            timings = time_in_turns(sides, options.repeats)
            on_two_cores = compare_on_two_cores(peer, pool, folder, options)
            for name in SETTINGS:
                cells = [
                    f"{num_slices} slices",
                    name,
                    format_median_cpu(timings["peer"]),
                    format_median_cpu(timings[name]),
                    compare_cpu(timings["peer"], timings[name]),
                    on_two_cores.get(name, "–"),
                ]
                print(format_row(cells), flush=True)


# --- DICOM


def print_dicom_table(options: Options) -> None:
    titles = ["uncompressed DICOM of", "selection", "pydicom + scipy, CPU", "ours, CPU", "per core"]
    print("\n" + format_header(titles))
    for num_slices in options.slice_counts:
        folder = write_dicom(make_volume(options.data, num_slices), options.work / f"plain{num_slices}")
        sides = make_our_sides(folder, SEARCHED_SETTINGS, options.work)
        sides["reference"] = partial(preprocess_reference, folder, options.work / "reference.npy")
        timings = time_in_turns(sides, options.repeats)
        for name in SEARCHED_SETTINGS:
            cells = [
                f"{num_slices} slices",
                name,
                format_median_cpu(timings["reference"]),
                format_median_cpu(timings[name]),
                compare_cpu(timings["reference"], timings[name]),
            ]
            print(format_row(cells), flush=True)


def decode_all(decode: Decoder, files: list[Path]) -> None:
    for file in files:
        decode(file)


def measure_decoders(decoders: dict[str, Decoder], files: list[Path]) -> dict[str, float]:
    """CPU seconds a slice of each decoder, the fastest first."""
    sides: Sides = {name: partial(decode_all, decode, files) for name, decode in decoders.items()}
    seconds = {}
    for name, timings in time_in_turns(sides, 2).items():
        seconds[name] = statistics.median(timing.cpu for timing in timings) / len(files)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def print_codec_table(options: Options, num_slices: int = 100) -> None:
    print(
        f"\n{num_slices} slices; decoding alone, every slice, by the fastest decoder that is installed, "
        "against ours from disk to stored slices\n"
    )
    titles = ["codec", "decoders, CPU a slice", "all slices, fastest", "selection", "ours, CPU"]
    print(format_header([*titles, "ours / fastest"]))
    voxels = make_volume(options.data, num_slices)
    for codec, syntax in CODECS.items():
        folder = write_dicom(voxels, options.work / codec.replace(" ", ""), syntax)
        files = sorted(folder.iterdir())
        decoders = list_decoders(syntax)
        seconds_by_decoder = measure_decoders(decoders, files[::10])
        fastest = next(iter(seconds_by_decoder))
        sides = make_our_sides(folder, SEARCHED_SETTINGS, options.work)
        sides["decoding"] = partial(decode_all, decoders[fastest], files)
        timings = time_in_turns(sides, options.repeats)
        costs = [f"{name} {1000 * seconds:.2f} ms" for name, seconds in seconds_by_decoder.items()]
        for name in SEARCHED_SETTINGS:
            cells = [
                codec,
                ", ".join(costs),
                f"{fastest} {format_median_cpu(timings['decoding'])}",
                name,
                format_median_cpu(timings[name]),
                compare_cpu(timings[name], timings["decoding"]),
            ]
            print(format_row(cells), flush=True)


# --- memory


@dataclass(frozen=True)
class ScanCost:
    """What one scan costs a process."""

    seconds: float
    megabytes: float  # peak beyond the loaded libraries


def measure_scan(folder: Path, small_folder: Path, settings: PreprocessConfig, store: Path) -> ScanCost:
    """Preprocess one scan in this process, after a small one that loads the libraries."""
    cv2.setNumThreads(1)
    preprocess_ours(small_folder, settings, store)
    timings: list[Timing] = []

    def preprocess() -> None:
        timings.append(time_call(partial(preprocess_ours, folder, settings, store)))

    peak_bytes = measure_peak_growth(preprocess)
    return ScanCost(timings[0].wall, peak_bytes / 2**20)


def print_memory_table(options: Options) -> None:
    voxels = make_volume(options.data, 300)
    size = f"{voxels.nbytes / 2**20:.0f} MB of HU"
    titles = [f"300 slices of ({size})", "selection", "wall", "peak beyond the libraries"]
    print("\n" + format_header(titles))
    for kind, write in {"JPEG": write_jpegs, "DICOM": write_dicom}.items():
        folder = write(voxels, options.work / f"{kind}m")
        small_folder = write(voxels[150:154], options.work / f"{kind}few")
        for name, settings in SETTINGS.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                store = options.work / "store"
                cost = pool.submit(measure_scan, folder, small_folder, settings, store).result()
            cells = [kind, name, f"{cost.seconds:.2f} s", f"{cost.megabytes:.0f} MB"]
            print(format_row(cells), flush=True)


def find_data_folder(folder: Path | None) -> Path:
    default = Path(__file__).parents[3] / "shared" / "data"
    return folder or Path(os.environ.get("CONSILIUM_REAL_DATA") or default)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Preprocessing against the paper's code, pydicom + scipy, and the fastest decoders."
    )
    parser.add_argument("--peer", type=Path, help="clone of github.com/Purdue-M2/multisource-covid-ct")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--slices", default="100,300", help="numbers of slices, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=TABLES, help="one table; default: all")
    parser.add_argument("--scale", type=float, default=0.1, help="size of the phantom federation for auc")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds for auc")
    return parser


def main() -> None:
    """Run the command that the module's docstring describes."""
    arguments = make_parser().parse_args()
    cv2.setNumThreads(1)
    selected_tables = [arguments.only] if arguments.only else list(TABLES)
    if not arguments.peer and "jpeg" in selected_tables:
        selected_tables.remove("jpeg")
    slice_counts = [int(count) for count in arguments.slices.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        data = find_data_folder(arguments.data)
        options = Options(data, slice_counts, arguments.repeats, Path(temporary))
        tables: dict[str, Callable[[], None]] = {
            "dicom": partial(print_dicom_table, options),
            "codecs": partial(print_codec_table, options),
            "memory": partial(print_memory_table, options),
            "lungs": print_lung_overlap,
            "auc": partial(print_auc, options.work, arguments.scale, arguments.seeds),
        }
        if "jpeg" in selected_tables:
            sys.path.insert(0, str(arguments.peer / "source code"))
            tables["jpeg"] = partial(print_jpeg_table, importlib.import_module("preprocessing"), options)
        for name in selected_tables:
            tables[name]()


if __name__ == "__main__":
    main()
