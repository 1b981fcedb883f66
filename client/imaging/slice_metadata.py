"""What the store keeps beside a scan's slices: how they were chosen, and the geometry of their scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.imaging.lung_segmentation import Box
from client.imaging.readers import LazyVolume, Volume
from client.imaging.slice_pipeline import PreprocessedScan
from common.utils.errors import ConsiliumError


@dataclass(frozen=True)
class ScanGeometry:
    """What a mask of a scan must fit."""

    shape: tuple[int, int, int]  # Z, H, W
    spacing: tuple[float, float, float]  # mm (z, y, x)
    modality: str  # "CT" | "XR"

    @classmethod
    def from_scan(cls, scan: Volume | LazyVolume) -> ScanGeometry:
        """Return the geometry of a scan."""
        z, y, x = scan.spacing
        return cls(scan.shape, (float(z), float(y), float(x)), scan.modality)


@dataclass(frozen=True)
class SliceMetadata:
    """How a scan's slices were chosen; the JSON file beside the slices holds it."""

    indices: list[int]  # [S] into the scan's slices
    areas: list[int]  # [S] mm2 of lung air (kds_paper: of body)
    crop_box: Box
    notes: list[str]
    geometry: ScanGeometry | None  # None in stores of early versions

    @classmethod
    def from_preprocessed(
        cls, preprocessed: PreprocessedScan, scan: Volume | LazyVolume, more_notes: list[str]
    ) -> SliceMetadata:
        """Return the metadata of slices that were just extracted from a scan."""
        y0, y1, x0, x1 = map(int, preprocessed.crop_box)
        return cls(
            indices=np.asarray(preprocessed.indices).tolist(),
            areas=preprocessed.areas[preprocessed.indices].round().astype(int).tolist(),
            crop_box=(y0, y1, x0, x1),
            notes=[*preprocessed.notes, *more_notes],
            geometry=ScanGeometry.from_scan(scan),
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SliceMetadata:
        """Parse what `SliceStore.read_metadata` returns.

        Raises:
            ConsiliumError: The document is empty or incomplete: the slices have left the store.
        """
        geometry = None
        try:
            if "scan" in document:
                Z, H, W = document["scan"]
                z, y, x = document["spacing"]
                geometry = ScanGeometry((Z, H, W), (z, y, x), document["modality"])
            y0, y1, x0, x1 = document["box"]
            return cls(
                indices=document["indices"],
                areas=document["areas"],
                crop_box=(y0, y1, x0, x1),
                notes=document["notes"],
                geometry=geometry,
            )
        except KeyError as error:
            raise ConsiliumError(
                f"the metadata of its slices lacks {error}; preprocess the cohort again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return the document for `SliceStore.put`."""
        document: dict[str, Any] = {
            "indices": self.indices,
            "areas": self.areas,
            "box": list(self.crop_box),
            "notes": self.notes,
        }
        if self.geometry is not None:
            document["scan"] = list(self.geometry.shape)
            document["spacing"] = list(self.geometry.spacing)
            document["modality"] = self.geometry.modality
        return document
