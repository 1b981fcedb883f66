"""How one centre's scanner images a made-up chest."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Scanner:
    """How one centre's scanner images a chest."""

    manufacturer: str
    field_of_view: float  # mm
    slice_spacing: float  # mm between slices
    noise_sd: float  # HU, standard deviation before the kernel
    kernel_strength: float  # below 0: pixels of Gaussian blur; above 0: strength of sharpening
    hu_offset: float  # HU
    patient_shift: tuple[float, float]  # mm (y, x) of the patient off the centre
    rotation: float  # degrees
    feet_first: bool = False  # mirrored rows, slice order against z
    rle_compressed: bool = False


def image_by_scanner(rng: np.random.Generator, hu: np.ndarray, scanner: Scanner) -> np.ndarray:
    """Add the scanner's noise, then its kernel, so that the noise has the kernel's grain.

    Returns int16 HU.
    """
    noise_sd = scanner.noise_sd * rng.uniform(0.8, 1.25)
    hu += noise_sd * rng.standard_normal(hu.shape, dtype=np.float32)
    strength = scanner.kernel_strength
    for z in range(len(hu)):
        soft = cv2.GaussianBlur(hu[z], (0, 0), max(0.5, -strength))
        hu[z] = soft if strength < 0 else hu[z] + strength * (hu[z] - soft)
    return np.clip(np.rint(hu + scanner.hu_offset), -1024, 3071).astype(np.int16)
