"""The work on one scan: its slices, and its masks, into the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.imaging import masks
from client.imaging.failure_reasons import FILES_CHANGED_REASON, explain_failure
from client.imaging.jobs import (
    LUNGS_COLUMN,
    JobOutcome,
    MaskRequest,
    PreprocessJob,
    compute_mask_key,
    compute_slices_key,
)
from client.imaging.readers import LazyVolume, Volume, read_scan
from client.imaging.readers.nifti import NIFTI_SUFFIXES
from client.imaging.skipped import SkippedItem
from client.imaging.slice_metadata import ScanGeometry, SliceMetadata
from client.imaging.slice_pipeline import extract_slices
from client.imaging.slice_store import SliceStore


class _FilesChanged(Exception):
    """Raised when a scan's files change while it is read."""


@dataclass
class _MaskWriter:
    """Writes the masks of one scan into the store."""

    store: SliceStore
    slices_key: str
    job: PreprocessJob
    volume: Volume | None  # read only when a mask needs it

    def write_missing(self) -> list[SkippedItem]:
        """Store the requested masks that the store lacks; return those that cannot be used, and why."""
        skipped = []
        for request in self.job.mask_requests:
            try:
                self._write_mask(request)
            except Exception as error:  # the scan stays, its label is missing
                path = request.path or self.job.path
                reason = explain_failure(error, path, self.job.series_uid)
                skipped.append(SkippedItem(str(path), f"the mask in column '{request.column}': {reason}"))
        return skipped

    def _write_mask(self, request: MaskRequest) -> None:
        key = self._compute_key(request)
        if self.store.get(key) is not None:
            return
        metadata = SliceMetadata.from_json(self.store.read_metadata(self.slices_key))
        mask = self._make_mask(request, metadata.geometry)
        size = self.job.settings.image_size
        cropped = masks.crop_to_slices(mask, metadata.indices, metadata.crop_box, size)
        lungs_not_found = request.path is None and not mask.any()
        if self._compute_key(request) == key:
            self.store.put(key, cropped, {"missing": lungs_not_found})

    def _compute_key(self, request: MaskRequest) -> str:
        return compute_mask_key(self.store, self.slices_key, request, self.job, self.store.hash_content)

    def _make_mask(self, request: MaskRequest, geometry: ScanGeometry | None) -> NDArray[np.uint8]:
        """Return a mask [Z, H, W] of the whole scan; `geometry` is None where the store lacks it."""
        if self.volume is None and (request.path is None or geometry is None):
            self.volume = read_scan(self.job.path, self.job.series_uid)
        if self.volume is not None:
            geometry = ScanGeometry.from_scan(self.volume)
        assert geometry is not None
        is_ct = (self.job.modality or geometry.modality) == "CT"
        if request.path is None:
            assert self.volume is not None
            return masks.find_lung_mask(self.volume, is_ct)
        if request.column == LUNGS_COLUMN:
            mask = masks.read_lung_mask(request.path, is_ct)
        else:
            mask = masks.read_mask(request.path)
        return masks.resize_to_scan(mask, geometry.shape, not _is_nifti_file(request.path))


def run_job(job: PreprocessJob) -> JobOutcome:
    """Bring a scan's slices and masks into the store, where they are missing; never raises."""
    try:
        store = SliceStore(job.store_dir)
        key = compute_slices_key(store, job)
        volume = None
        if store.get(key) is None:
            scan = _store_slices(store, key, job)
            volume = scan if isinstance(scan, Volume) else None
        return JobOutcome(key, "", _MaskWriter(store, key, job, volume).write_missing())
    except _FilesChanged:
        return JobOutcome("", FILES_CHANGED_REASON, [])
    except Exception as error:  # whatever a reader raises costs one scan, not the cohort
        return JobOutcome("", explain_failure(error, job.path, job.series_uid), [])


def _store_slices(store: SliceStore, key: str, job: PreprocessJob) -> Volume | LazyVolume:
    """Extract and store a scan's slices; return the scan. Raises _FilesChanged where its key is another."""
    mask_notes: list[str] = []
    preprocessed, scan = extract_slices(
        job.path,
        job.series_uid,
        job.settings,
        job.window,
        lambda opened_scan: _load_crop_mask(job, opened_scan, mask_notes),
    )
    # The mask is loaded twice, and noted twice, where the scan turns out to need another reading.
    metadata = SliceMetadata.from_preprocessed(preprocessed, scan, list(dict.fromkeys(mask_notes)))
    if compute_slices_key(store, job) != key:
        raise _FilesChanged
    store.put(key, preprocessed.slices, metadata.to_json())
    return scan


def _load_crop_mask(
    job: PreprocessJob, scan: Volume | LazyVolume, notes: list[str]
) -> NDArray[np.uint8] | None:
    """Return the lung mask for a crop to the lungs; None where the crop is to find them itself."""
    if job.settings.crop != "lungs":
        return None
    if job.lung_mask_path:
        try:
            mask = masks.read_lung_mask(job.lung_mask_path, split_sides=False)
            return masks.resize_to_scan(mask, scan.shape, not _is_nifti_file(job.lung_mask_path))
        except Exception:  # readers fail in ways of their own, and a mask must not cost its scan
            notes.append("The lung mask that the cohort names cannot be used: the lungs were looked for.")
    # A single picture of a CT reads as a radiograph.
    if isinstance(scan, Volume) and job.modality == "CT" and scan.modality == "XR":
        return masks.find_lung_mask(scan, is_ct=True)
    return None


def _is_nifti_file(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES)
