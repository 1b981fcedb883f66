"""Measure what the search of some slices costs in quality: lungs, selected slices, AUC on the phantom."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from client.imaging import lung_segmentation
from client.imaging.readers import Volume
from client.imaging.slice_pipeline import select_and_crop
from client.phantom.chest_ct import draw_chest
from client.phantom.profiles import CENTRE_PROFILES
from common.config.compose import compose_config
from common.config.schema import PreprocessConfig
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.benchmarks.measuring import format_header, format_row
from tests.benchmarks.preprocessing_sides import SETTINGS
from tests.in_process_federation import InProcess, sites

NUM_SLICES = 96
NUM_PIXELS = 256
REDUCTION = 4


def compute_dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def segment_some_slices(volume: Volume, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The lungs of some slices, found in reduced pictures and enlarged to full resolution."""
    reduced = volume.read_reduced(indices, REDUCTION)
    chest = lung_segmentation.segment_reduced(reduced, REDUCTION, (NUM_PIXELS, NUM_PIXELS))
    enlarged = []
    for lungs in chest.lungs:
        mask = lungs.astype(np.uint8)
        enlarged.append(cv2.resize(mask, (NUM_PIXELS, NUM_PIXELS), interpolation=cv2.INTER_NEAREST) > 0)
    return np.stack(enlarged)


def compare_selections(volume: Volume, selection: Literal["kds", "zquantile"]) -> str:
    """How many slices the quick and the full search select alike, and the largest shift."""
    quick_settings = PreprocessConfig(selection=selection, full_lung_search=False)
    full_settings = PreprocessConfig(selection=selection, full_lung_search=True)
    quick = select_and_crop(volume, quick_settings).indices
    full = select_and_crop(volume, full_settings).indices
    return f"{len(np.intersect1d(quick, full))}, {np.abs(quick - full).max()}"


def print_lung_overlap() -> None:
    """Print the Dice of found and drawn lungs, and how far selections differ, on four scanners."""
    titles = [
        "phantom, 96 slices of 256 px",
        "Dice, full",
        "Dice, look",
        "kds: same of 8, shift",
        "zquantile: same, shift",
    ]
    print("\n" + format_header(titles))
    indices = np.arange(1, NUM_SLICES, 3)
    for centre, profile in CENTRE_PROFILES.items():
        patient_rng = np.random.default_rng(3)
        visit_rng = np.random.default_rng(4)
        voxels, truth = draw_chest(patient_rng, visit_rng, profile.scanner, True, NUM_SLICES, NUM_PIXELS)
        slice_spacing = profile.scanner.slice_spacing
        positions = slice_spacing * np.arange(float(NUM_SLICES))
        volume = Volume(voxels, (slice_spacing, 1.4, 1.4), positions, "CT")
        drawn = truth.lungs > 0
        full_dice = compute_dice(lung_segmentation.make_lung_mask(voxels), drawn)
        reduced_dice = compute_dice(segment_some_slices(volume, indices), drawn[indices])
        comparisons = [compare_selections(volume, "kds"), compare_selections(volume, "zquantile")]
        print(format_row([centre, f"{full_dice:.3f}", f"{reduced_dice:.3f}", *comparisons]), flush=True)


def print_auc(work: Path, scale: float, num_seeds: int) -> None:
    """Train the phantom federation of `make simulate` with 48 slices a scan, by selection."""
    torch.set_num_threads(1)
    print("\n" + format_header(["selection", "test AUC, macro", "worst centre", "seed"]))
    for seed in range(1, num_seeds + 1):
        for name, settings in SETTINGS.items():
            overrides = [
                f"federation.data_root={work}/data",
                f"federation.phantom.scale={scale}",
                "federation.phantom.num_slices=48",
                "preprocess.image_size=64",
                "stage.tasks=[covid]",
                "stage.rounds=8",
                "evaluation.checkpoint_selection=last",
                f"preprocess.selection={settings.selection}",
                f"preprocess.full_lung_search={str(settings.full_lung_search).lower()}",
                f"seed={seed}",
            ]
            run_id = f"{name.replace(', ', '-').replace('_', '-')}-{seed}"
            runs_dir = work / "runs"
            transport = InProcess(sites())
            result = start_run(compose_config(overrides), transport, runs_dir, open_ledger(runs_dir), run_id)
            scores = result.test["covid"]
            cells = [name, f"{scores.macro['auc']:.3f}", f"{scores.worst['auc'].value:.3f}", seed]
            print(format_row(cells), flush=True)
