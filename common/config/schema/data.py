"""Settings of the data: what preprocessing keeps of a scan, and the made-up hospitals."""

from __future__ import annotations

from typing import Literal

from common.config.schema.base import MAX_SEED, config_dataclass, require, require_range


@config_dataclass
class PreprocessConfig:
    """What preprocessing keeps of a scan.

    Every setting is part of the slice store's key: changed settings are computed anew.
    """

    # Only scans of this modality are used, in a cohort that names its scans' modality.
    modality: Literal["any", "CT", "XR"] = "any"
    # How slices are chosen (client/imaging/slice_selection.py). `even`: a grid over the lung's slices.
    selection: Literal["kds", "kds_paper", "zquantile", "even"] = "kds"
    # Segment the lungs in every slice at full size. Otherwise in some, at reduced size: many times as fast.
    full_lung_search: bool = False
    num_slices: int = 8  # S, per CT; a radiograph always has one
    num_views: int = (
        0  # further random choices of slices; training takes one of them or the evaluation's choice
    )
    view: int = 0  # which view this is; 0 is the evaluation's choice
    image_size: int = 256  # H = W of a slice, pixels
    # `lungs`: to the cohort's own lung mask (column `lungs`), or to our segmentation where it has none.
    crop: Literal["body", "lungs", "none"] = "body"
    # The HU range shown as 0 to 255. A cohort's own window columns take precedence.
    window: tuple[float, float] = (-1000.0, 300.0)

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            1 <= self.num_slices <= 128, f"preprocess.num_slices is {self.num_slices}; it must be 1 to 128"
        )
        require(0 <= self.num_views <= 32, f"preprocess.num_views is {self.num_views}; it must be 0 to 32")
        require(0 <= self.view <= 32, f"preprocess.view is {self.view}; it must be 0 to 32")
        size = self.image_size
        require(16 <= size <= 1024, f"preprocess.image_size is {size}; it must be 16 to 1024 pixels")
        low, high = self.window
        require(low < high, f"preprocess.window is {self.window}; the first value must be the lower one")
        require_range("preprocess.window's first value", low, -1e6, 1e6)
        require_range("preprocess.window's second value", high, -1e6, 1e6)


@config_dataclass
class PhantomConfig:
    """The made-up hospitals.

    Their sizes follow the four sources of the multi-source recipe's paper, scaled down.
    """

    scale: float = 0.1  # of 1222 training and 310 validation scans
    seed: int = 7
    num_slices: int = 24  # Z of a series
    image_size: int = 128  # H = W of a series, pixels

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.scale <= 1, f"federation.phantom.scale is {self.scale}; it must be in (0, 1]")
        slices = self.num_slices
        size = self.image_size
        require_range("federation.phantom.num_slices", slices, 10, 1000)
        require_range("federation.phantom.image_size", size, 64, 1024)
        require_range("federation.phantom.seed", self.seed, 0, MAX_SEED)
