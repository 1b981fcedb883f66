"""Preprocessing, disk to stored slices.

JPEG folders against the paper's published code, DICOM against pydicom + scipy and the fastest decoders.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.preprocessing --peer PEER [--data DATA] [--slices
    100,300] [--repeats 5] [--only jpeg|dicom|codecs|memory|lungs|auc]

PEER is a clone of github.com/Purdue-M2/multisource-covid-ct; without it the JPEG table is left out. DATA
(default: `$CONSILIUM_REAL_DATA`, else ../shared/data) gives a real chest CT, read between its slices to as
many as are asked for; without it a phantom's is taken. Our side is what `consilium-centre preprocess` runs
for a scan (client/imaging/job_execution.py, `run_job`): hash of all files, look, selection, crop, store.
Sides take turns within each repeat. "CPU" is processor time of one process, hence a ratio per core; "two
cores" is the peer's wall time in its one process over ours by two processes that are running already, on the
same machine at the same time. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import gaussian_kde

from client.imaging import lung_segmentation
from client.imaging.job_execution import run_job
from client.imaging.jobs import PreprocessJob
from client.imaging.readers import Volume
from client.imaging.slice_pipeline import MAX_SEARCHED_SLICES, select_and_crop
from client.phantom.chest_ct import draw_chest
from client.phantom.profiles import CENTRE_PROFILES
from common.config.schema import PreprocessConfig
from tests.benchmarks.scan_files import CODECS, decoders, volume_of, write_dicom, write_jpegs

Sides = dict[str, Callable[[], object]]
SETTINGS = {
    "zquantile": PreprocessConfig(selection="zquantile"),
    "kds": PreprocessConfig(),
    "kds, exact": PreprocessConfig(full_lung_search=True),
    "kds_paper": PreprocessConfig(selection="kds_paper"),
}
TWO = ("zquantile", "kds")  # also measured by two processes


def ours(folder: Path, settings: PreprocessConfig, store: Path) -> None:
    """One scan into a store that does not have it."""
    shutil.rmtree(store, ignore_errors=True)
    key, why, _ = run_job(PreprocessJob(folder, None, None, settings, store))
    assert key, why


def theirs(peer: Any, folder: Path, out: Path) -> None:
    """The multi-source paper's code on one scan, without its progress bar and output."""
    scan = {
        "scan_id": "s",
        "slices": [str(p) for p in sorted(folder.iterdir())],
        "label": 1,
        "label_name": "covid",
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        peer.preprocess_scans([scan], str(out), "benchmark")


def reference(folder: Path, out: Path) -> None:
    """What one would write with pydicom and scipy for the same rule.

    Read all, threshold, largest body, filled, air within in three dimensions, KDS over the areas, crop,
    window, resize, save.
    """
    files = [pydicom.dcmread(path) for path in folder.iterdir()]
    files.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    hu = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in files])
    air = np.zeros(hu.shape, bool)
    boxes = []
    for z, image in enumerate(hu):
        pieces, number = ndimage.label(image > -500)
        if number:
            sizes = ndimage.sum_labels(np.ones_like(pieces), pieces, np.arange(1, number + 1))
            body = pieces == 1 + int(np.argmax(sizes))
            boxes.append(ndimage.find_objects(body.astype(int))[0])
            air[z] = ndimage.binary_fill_holes(body) & ~body
    spaces, number = ndimage.label(air)
    sizes = ndimage.sum_labels(np.ones_like(spaces), spaces, np.arange(1, number + 1))
    large = np.isin(spaces, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))
    areas = large.sum(axis=(1, 2)).astype(float)
    half = len(areas) // 2
    start = int(np.argmax(np.convolve(areas, np.ones(half), "valid")))
    density = gaussian_kde(areas[start : start + half])
    level = np.array([density.integrate_box_1d(-np.inf, a) for a in areas[start : start + half]])
    chosen = sorted({start + int(np.abs(level - (b + 0.5) / 8).argmin()) for b in range(8)})
    rows = slice(min(b[0].start for b in boxes), max(b[0].stop for b in boxes))
    columns = slice(min(b[1].start for b in boxes), max(b[1].stop for b in boxes))
    kept = []
    for z in chosen:
        crop = ((hu[z, rows, columns] + 1000) / 1300 * 255).clip(0, 255)
        kept.append(ndimage.zoom(crop, 256 / np.array(crop.shape), order=1).astype(np.uint8))
    np.save(out, np.stack(kept))


def turns(sides: Sides, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of each side, one after another in every repeat.

    A first round is not counted.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            if repeat:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return taken


def ratios(taken: dict[str, list[tuple[float, float]]], base: str, name: str, which: int = 0) -> str:
    """Median, least and largest of base / name over the repeats."""
    found = [a[which] / b[which] for a, b in zip(taken[base], taken[name], strict=True)]
    return f"{statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})"


def middle(taken: list[tuple[float, float]]) -> str:
    return f"{1000 * statistics.median(t[0] for t in taken):.0f} ms"


def two_at_once(
    pool: ProcessPoolExecutor, folder: Path, settings: PreprocessConfig, stores: Path, scans: int
) -> float:
    """Wall seconds a scan with two processes."""
    began = time.perf_counter()
    for future in [pool.submit(ours, folder, settings, stores / f"two{n}") for n in range(scans)]:
        future.result()
    return (time.perf_counter() - began) / scans


def jpeg(peer: Any, data: Path | None, slices: list[int], repeats: int, work: Path) -> None:
    print(f"\n| JPEG folder of | selection | peer, CPU | ours, CPU | per core | two cores |\n{'|---' * 6}|")
    with ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn"), initializer=partial(cv2.setNumThreads, 1)
    ) as pool:
        for Z in slices:
            folder = write_jpegs(volume_of(data, Z), work / f"jpeg{Z}")
            sides: Sides = {name: partial(ours, folder, s, work / "store") for name, s in SETTINGS.items()}
            sides["peer"] = partial(theirs, peer, folder, work / "peer")
            taken = turns(sides, repeats)
            walls: dict[str, list[float]] = {name: [] for name in TWO}
            two_at_once(pool, folder, SETTINGS["kds"], work, 4)
            for _ in range(repeats):
                began = time.perf_counter()
                theirs(peer, folder, work / "peer")
                wall = time.perf_counter() - began
                for name in TWO:
                    walls[name].append(wall / two_at_once(pool, folder, SETTINGS[name], work, 6))
            for name in SETTINGS:
                two = (
                    f"{statistics.median(walls[name]):.3g} ({min(walls[name]):.3g} to {max(walls[name]):.3g})"
                    if name in TWO
                    else "–"
                )
                row = [
                    f"{Z} slices",
                    name,
                    middle(taken["peer"]),
                    middle(taken[name]),
                    ratios(taken, "peer", name),
                    two,
                ]
                print(f"| {' | '.join(row)} |", flush=True)


def dicom(data: Path | None, slices: list[int], repeats: int, work: Path) -> None:
    print(
        "\n| uncompressed DICOM of | selection | pydicom + scipy, CPU | ours, CPU | per core "
        f"|\n{'|---' * 5}|"
    )
    for Z in slices:
        folder = write_dicom(volume_of(data, Z), work / f"plain{Z}")
        sides: Sides = {
            name: partial(ours, folder, s, work / "store")
            for name, s in SETTINGS.items()
            if s.selection in MAX_SEARCHED_SLICES
        }
        names = list(sides)
        sides["reference"] = partial(reference, folder, work / "reference.npy")
        taken = turns(sides, repeats)
        for name in names:
            row = [
                f"{Z} slices",
                name,
                middle(taken["reference"]),
                middle(taken[name]),
                ratios(taken, "reference", name),
            ]
            print(f"| {' | '.join(row)} |", flush=True)


def codecs(data: Path | None, repeats: int, work: Path) -> None:
    Z = 100
    print(
        f"\n{Z} slices; decoding alone, every slice, by the fastest decoder that is installed, against "
        "ours from disk to stored slices"
    )
    print(
        "\n| codec | decoders, CPU a slice | all slices, fastest | selection | ours, CPU | ours / "
        f"fastest |\n{'|---' * 6}|"
    )
    voxels = volume_of(data, Z)
    for name, syntax in CODECS.items():
        folder = write_dicom(voxels, work / name.replace(" ", ""), syntax)
        files = sorted(folder.iterdir())
        taken = turns({d: partial(_each, decode, files[::10]) for d, decode in decoders(syntax).items()}, 2)
        cost = {d: statistics.median(t[0] for t in times) / len(files[::10]) for d, times in taken.items()}
        fastest = min(cost, key=lambda d: cost[d])
        sides: Sides = {
            n: partial(ours, folder, s, work / "store")
            for n, s in SETTINGS.items()
            if s.selection in MAX_SEARCHED_SLICES
        }
        chosen = list(sides)
        sides["all"] = partial(_each, decoders(syntax)[fastest], files)
        taken = turns(sides, repeats)
        said = ", ".join(f"{d} {1000 * c:.2f} ms" for d, c in sorted(cost.items(), key=lambda item: item[1]))
        for n in chosen:
            row = [
                name,
                said,
                f"{fastest} {middle(taken['all'])}",
                n,
                middle(taken[n]),
                ratios(taken, n, "all"),
            ]
            print(f"| {' | '.join(row)} |", flush=True)


def _each(decode: Callable[[Path], NDArray[Any]], files: list[Path]) -> None:
    for file in files:
        decode(file)


def _peak(folder: Path, few: Path, settings: PreprocessConfig, store: Path) -> tuple[float, float]:
    """(seconds, MB that a scan adds to the peak of this process.

    Linux sets it back to the present on `clear_refs` 5).
    """
    cv2.setNumThreads(1)
    ours(few, settings, store)  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    began = time.perf_counter()
    ours(folder, settings, store)
    spent = time.perf_counter() - began
    after = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return spent, (int(after["VmHWM"].split()[0]) - int(before["VmRSS"].split()[0])) / 1024


def memory(data: Path | None, work: Path) -> None:
    voxels = volume_of(data, 300)
    print(
        f"\n| 300 slices of ({voxels.nbytes / 2**20:.0f} MB of HU) | selection | wall | peak beyond the "
        f"libraries |\n{'|---' * 4}|"
    )
    for kind, wrote in {"JPEG": write_jpegs, "DICOM": write_dicom}.items():
        folder, few = wrote(voxels, work / f"{kind}m"), wrote(voxels[150:154], work / f"{kind}few")
        for name, settings in SETTINGS.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                spent, peak = pool.submit(_peak, folder, few, settings, work / "store").result()
            print(f"| {kind} | {name} | {spent:.2f} s | {peak:.0f} MB |", flush=True)


def overlap() -> None:
    """Dice of the lungs found and the lungs drawn, and how far apart the slices chosen by a look and by the
    full rule are, on four scanners.
    """
    print(
        "\n| phantom, 96 slices of 256 px | Dice, full | Dice, look | kds: same of 8, shift | "
        f"zquantile: same, shift |\n{'|---' * 5}|"
    )
    for centre, hospital in CENTRE_PROFILES.items():
        voxels, truth = draw_chest(
            np.random.default_rng(3), np.random.default_rng(4), hospital.scanner, True, 96, 256
        )
        volume = Volume(
            voxels,
            (hospital.scanner.slice_spacing, 1.4, 1.4),
            hospital.scanner.slice_spacing * np.arange(96.0),
            "CT",
        )
        drawn = truth.lungs > 0
        found = lung_segmentation.make_lung_mask(voxels)
        at = np.arange(1, 96, 3)
        seen = lung_segmentation.segment_reduced(volume.read_reduced(at, 4), 4, (256, 256)).lungs
        large = np.stack(
            [cv2.resize(s.astype(np.uint8), (256, 256), interpolation=cv2.INTER_NEAREST) > 0 for s in seen]
        )
        row = [centre, f"{dice(found, drawn):.3f}", f"{dice(large, drawn[at]):.3f}"]
        for selection in ("kds", "zquantile"):
            quick, full = (
                select_and_crop(volume, PreprocessConfig(selection=selection, full_lung_search=exact)).indices
                for exact in (False, True)
            )  # type: ignore[arg-type]
            row.append(f"{len(np.intersect1d(quick, full))}, {np.abs(quick - full).max()}")
        print(f"| {' | '.join(row)} |", flush=True)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def auc(work: Path, scale: float, seeds: int) -> None:
    """The phantom federation of `make simulate` with 48 slices a scan, by selection."""
    import torch

    from common.config.compose import compose_config
    from server.rounds.run_lifecycle import open_ledger, start_run
    from tests.in_process_federation import InProcess, sites

    torch.set_num_threads(1)
    print(f"\n| selection | test AUC, macro | worst centre | seed |\n{'|---' * 4}|")
    for seed in range(1, seeds + 1):
        for name, settings in SETTINGS.items():
            own = [
                f"preprocess.selection={settings.selection}",
                f"preprocess.full_lung_search={str(settings.full_lung_search).lower()}",
                f"seed={seed}",
            ]
            few = [
                f"federation.data_root={work}/data",
                f"federation.phantom.scale={scale}",
                "federation.phantom.num_slices=48",
                "preprocess.image_size=64",
            ]
            config = compose_config(
                [*few, "stage.tasks=[covid]", "stage.rounds=8", "evaluation.checkpoint_selection=last", *own]
            )
            run = f"{name.replace(', ', '-').replace('_', '-')}-{seed}"
            ledger = open_ledger(work / "runs")
            scores = start_run(config, InProcess(sites()), work / "runs", ledger, run).test["covid"]
            print(
                f"| {name} | {scores.macro['auc']:.3f} | {scores.worst['auc'].value:.3f} | {seed} |",
                flush=True,
            )


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(
        description="Preprocessing against the paper's code, pydicom + scipy, and the fastest decoders."
    )
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--slices", default="100,300")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["jpeg", "dicom", "codecs", "memory", "lungs", "auc"])
    parser.add_argument("--scale", type=float, default=0.1, help="of the phantom federation for auc")
    parser.add_argument("--seeds", type=int, default=2, help="for auc")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    data = given.data or Path(
        os.environ.get("CONSILIUM_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data"
    )
    slices = [int(Z) for Z in given.slices.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.peer and given.only in (None, "jpeg"):
            sys.path.insert(0, str(given.peer / "source code"))
            jpeg(importlib.import_module("preprocessing"), data, slices, given.repeats, work)
        if given.only in (None, "dicom"):
            dicom(data, slices, given.repeats, work)
        if given.only in (None, "codecs"):
            codecs(data, given.repeats, work)
        if given.only in (None, "memory"):
            memory(data, work)
        if given.only in (None, "lungs"):
            overlap()
        if given.only in (None, "auc"):
            auc(work, given.scale, given.seeds)


if __name__ == "__main__":
    main()
