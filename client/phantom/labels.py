"""The labels of a made-up visit, which follow from what was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from client.phantom.chest_ct import GroundTruth
from client.phantom.chest_xray import compute_zone_fractions, project_mask

CT_LABELS = ["severity", "lesion", "transition", "target"]
BRIXIA_LABELS = [f"brixia_{zone}" for zone in "abcdef"]
RADIOGRAPH_LABELS = [*BRIXIA_LABELS, "outcome", "finding", "infection", "lungs"]
MIN_LUNG_DEPTH = 60.0  # mm of air without which a radiograph does not show a lung: not behind the diaphragm
BRIXIA_THRESHOLDS = (0.05, 0.3, 0.6)  # affected fraction of a zone from which its score is 1, 2, 3


@dataclass
class VisitLabels:
    """What is known of a visit, by the cohort's column."""

    ct: dict[str, Any]
    radiograph: dict[str, Any]
    radiograph_masks: dict[str, np.ndarray]  # {column: [h, w] bool}


def derive_labels(
    truth: GroundTruth, rng: np.random.Generator, pixel_mm: float, slice_mm: float
) -> VisitLabels:
    """Derive a visit's labels from what was drawn; `pixel_mm` and `slice_mm` are the CT's.

    Severity is the affected percentage of the worse lung (arXiv 2006.01441). The zones are Brixia's (Borghesi
    and Maroldi, Radiol. Med. 2020): A, B, C are the thirds of the patient's right lung from above, D, E, F
    those of the left one.
    """
    noise = rng.standard_normal()
    readers = rng.random(len(BRIXIA_LABELS))
    sides = [truth.lungs == 1, truth.lungs == 2]
    affected = [_affected_percentage(truth.lesion, side) for side in sides]
    severity = round(max(affected), 2)
    lesion = project_mask(truth.lesion, pixel_mm, slice_mm)
    lungs = [project_mask(side, pixel_mm, slice_mm, MIN_LUNG_DEPTH) for side in sides]
    zone_fractions = compute_zone_fractions(lungs[0], lesion) + compute_zone_fractions(lungs[1], lesion)
    radiograph: dict[str, Any] = {}
    for column, fraction, reader in zip(BRIXIA_LABELS, zone_fractions, readers, strict=True):
        radiograph[column] = _score_zone(fraction, reader)
    # The outcome depends on the severity, and on what no image shows.
    radiograph["outcome"] = float(severity + 8 * noise > 10)
    radiograph["finding"] = _classify_finding(affected, truth.lesion)
    masks = {"infection": lesion, "lungs": lungs[0] | lungs[1]}
    return VisitLabels({"severity": severity}, radiograph, masks)


def _affected_percentage(lesion: np.ndarray, lung: np.ndarray) -> float:
    return 100 * int((lesion & lung).sum()) / max(int(lung.sum()), 1)


def _score_zone(fraction: float, reader: float) -> float:
    """Return a zone's score, 0 to 3.

    One reader in ten (`reader` is uniform in 0..1) is a point too high or too low.
    """
    score = int(np.searchsorted(BRIXIA_THRESHOLDS, fraction, side="right"))
    return float(np.clip(score + (reader > 0.95) - (reader < 0.05), 0, 3))


def _classify_finding(affected: list[float], lesion: np.ndarray) -> str:
    """Return the class of a radiograph by where the lesions lie, as in SIIM-FISABIO-RSNA.

    Typical is both lungs, much of them, and towards the base.
    """
    if not lesion.any():
        return "negative"
    area = lesion.sum(axis=(1, 2))
    height = float(area @ (np.arange(len(area)) + 0.5)) / (area.sum() * len(area))
    if min(affected) < 4 or height > 0.52:
        return "atypical"
    if max(affected) >= 16:
        return "typical"
    return "indeterminate"
