"""Preprocess a scan, from disk to stored slices, by our code, the peer's, and pydicom + scipy."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import gaussian_kde

from client.imaging.job_execution import run_job
from client.imaging.jobs import PreprocessJob
from client.imaging.slice_pipeline import MAX_SEARCHED_SLICES
from common.config.schema import PreprocessConfig
from tests.benchmarks.measuring import Timing, time_call

Sides = dict[str, Callable[[], object]]
Timings = dict[str, list[Timing]]

SETTINGS = {
    "zquantile": PreprocessConfig(selection="zquantile"),
    "kds": PreprocessConfig(),
    "kds, exact": PreprocessConfig(full_lung_search=True),
    "kds_paper": PreprocessConfig(selection="kds_paper"),
}
SEARCHED_SETTINGS = {
    name: settings for name, settings in SETTINGS.items() if settings.selection in MAX_SEARCHED_SLICES
}
BODY_THRESHOLD_HU = -500
NUM_SLICES = 8
IMAGE_SIZE = 256


def preprocess_ours(folder: Path, settings: PreprocessConfig, store: Path) -> None:
    """Bring one scan into a store that does not have it."""
    shutil.rmtree(store, ignore_errors=True)
    outcome = run_job(PreprocessJob(folder, None, None, settings, store))
    assert outcome.slices_key, outcome.reason


def preprocess_peer(peer: Any, folder: Path, out: Path) -> None:
    """Run the multi-source paper's code on one scan, without its progress bar and output."""
    scan = {
        "scan_id": "s",
        "slices": [str(path) for path in sorted(folder.iterdir())],
        "label": 1,
        "label_name": "covid",
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        peer.preprocess_scans([scan], str(out), "benchmark")


# --- pydicom + scipy


def preprocess_reference(folder: Path, out: Path) -> None:
    """Do what one would write with pydicom and scipy for the same rule.

    Read everything, threshold, take the largest body and fill it, find the air within in three dimensions,
    select by KDS over the areas, crop, window, resize, save.
    """
    hu = read_hounsfield(folder)
    body_boxes, air = find_bodies(hu)
    areas = find_lungs(air).sum(axis=(1, 2)).astype(float)
    rows = slice(min(box[0].start for box in body_boxes), max(box[0].stop for box in body_boxes))
    columns = slice(min(box[1].start for box in body_boxes), max(box[1].stop for box in body_boxes))
    resized = []
    for z in select_by_density(areas):
        grey = ((hu[z, rows, columns] + 1000) / 1300 * 255).clip(0, 255)
        zoom = IMAGE_SIZE / np.array(grey.shape)
        resized.append(ndimage.zoom(grey, zoom, order=1).astype(np.uint8))
    np.save(out, np.stack(resized))


def read_hounsfield(folder: Path) -> NDArray[np.float64]:
    """A series [Z, H, W] in HU, slices ordered by position."""
    datasets = [pydicom.dcmread(path) for path in folder.iterdir()]
    datasets.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    slices = []
    for dataset in datasets:
        slope = float(dataset.RescaleSlope)
        slices.append(dataset.pixel_array * slope + float(dataset.RescaleIntercept))
    return np.stack(slices)


def find_bodies(hu: NDArray[np.float64]) -> tuple[list[tuple[slice, slice]], NDArray[np.bool_]]:
    """The bounding box of the body in each slice that has one, and the air [Z, H, W] inside the bodies."""
    air = np.zeros(hu.shape, bool)
    boxes = []
    for z, image in enumerate(hu):
        regions, num_regions = ndimage.label(image > BODY_THRESHOLD_HU)
        if num_regions:
            sizes = ndimage.sum_labels(np.ones_like(regions), regions, np.arange(1, num_regions + 1))
            body = regions == 1 + int(np.argmax(sizes))
            boxes.append(ndimage.find_objects(body.astype(int))[0])
            air[z] = ndimage.binary_fill_holes(body) & ~body
    return boxes, air


def find_lungs(air: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The air spaces of at least a tenth of the largest one's volume."""
    spaces, num_spaces = ndimage.label(air)
    sizes = ndimage.sum_labels(np.ones_like(spaces), spaces, np.arange(1, num_spaces + 1))
    return np.isin(spaces, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))


def select_by_density(areas: NDArray[np.float64]) -> list[int]:
    """The slices whose lung areas lie in the middle of eight equally probable bins."""
    half = len(areas) // 2
    start = int(np.argmax(np.convolve(areas, np.ones(half), "valid")))
    window = areas[start : start + half]
    density = gaussian_kde(window)
    quantiles = np.array([density.integrate_box_1d(-np.inf, area) for area in window])
    selected = set()
    for bin_number in range(NUM_SLICES):
        target = (bin_number + 0.5) / NUM_SLICES
        selected.add(start + int(np.abs(quantiles - target).argmin()))
    return sorted(selected)


# --- timing


def time_in_turns(sides: Sides, repeats: int) -> Timings:
    """Time each side, one after another in every repeat. A first round is not counted."""
    timings: Timings = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            timings[name].append(time_call(side))
    return timings
