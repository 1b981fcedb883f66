"""Predictions of the triage recipe: how much of each lung is affected, and masks that match their CT."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from client.imaging import masks
from client.imaging.readers import read_scan
from client.imaging.severity import compute_severity
from client.imaging.slice_pipeline import select_and_crop
from client.tools.mask_filenames import make_mask_filename
from client.tools.predict import LoadedModel, PredictOptions, load_model, predict_folder
from tests.client.tools.test_predict import centre as centre
from tests.client.tools.test_predict import save_random_model

IMAGE_SIZE = 32
TRIAGE = ["recipe=triage", "backbone=small", f"preprocess.image_size={IMAGE_SIZE}", "preprocess.num_slices=8"]
LESION_THRESHOLD = 0.2


class Worklist(NamedTuple):
    """What `predict` made of two CTs."""

    model_path: Path
    masks_dir: Path
    table: pd.DataFrame


@pytest.fixture(scope="module")
def worklist(centre: Path, tmp_path_factory: pytest.TempPathFactory) -> Worklist:
    """Predict a manifest of two CTs and a radiograph; the radiograph is skipped by its modality."""
    root = tmp_path_factory.mktemp("triage")
    ct_rows = [
        {"scan": "a/1", "path": centre / "dicom" / "north-0000"},
        {"scan": "a%2F1", "path": centre / "dicom" / "north-0003"},
    ]
    radiograph_row = {"scan": "film", "path": centre / "xr" / "north-0000.dcm", "modality": "xr"}
    pd.DataFrame([*ct_rows, radiograph_row]).to_csv(root / "manifest.csv", index=False)
    model_path = _save_model_that_marks_half(root, centre / "dicom" / "north-0000")
    options = PredictOptions(masks_dir=root / "masks", sort_column="lesion_severity")
    table, skipped = predict_folder(model_path, root / "manifest.csv", root / "store", options)
    assert [(Path(item.path).name, item.reason) for item in skipped] == [
        ("north-0000.dcm", "it is no CT, for which the model was made")
    ]
    return Worklist(model_path, root / "masks", table)


def _save_model_that_marks_half(folder: Path, ct: Path) -> Path:
    """Save a model with random weights, whose lesion bias makes half of a CT's pixels lesion."""
    untilted = load_model(save_random_model(folder / "plain.safetensors", *TRIAGE))
    slices = select_and_crop(read_scan(ct), untilted.config.preprocess).slices
    median_logit = _predict(untilted, slices)["lesion"].median().item()
    threshold_logit = math.log(LESION_THRESHOLD / (1 - LESION_THRESHOLD))
    return save_random_model(folder / "model.safetensors", *TRIAGE, tilt=threshold_logit - median_logit)


def _predict(loaded: LoadedModel, slices: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs: dict[str, torch.Tensor] = loaded.model.eval()(torch.from_numpy(slices)[None] / 255)
    return outputs


def _lesion_mask(outputs: dict[str, torch.Tensor]) -> NDArray[np.bool_]:
    is_lesion: NDArray[np.bool_] = outputs["lesion"][0].sigmoid().numpy() >= LESION_THRESHOLD
    return is_lesion


def test_worklist_gives_the_affected_share_of_each_lung(worklist: Worklist) -> None:
    """Compare with the steps by hand: the model's map, the sides of the lung mask, the share of each."""
    table = worklist.table
    assert list(table.columns[2:7]) == [
        "covid",
        "lesion_right",
        "lesion_left",
        "lesion_severity",
        "lesion_mask",
    ]
    assert sorted(table["scan"]) == ["a%2F1", "a/1"]
    assert table["lesion_severity"].is_monotonic_decreasing
    loaded = load_model(worklist.model_path)
    for row in table.itertuples():
        volume = read_scan(Path(str(row.path)))
        selection = select_and_crop(volume, loaded.config.preprocess)
        lung_mask = masks.find_lung_mask(volume, True)
        lungs = masks.crop_to_slices(lung_mask, selection.indices, selection.crop_box, IMAGE_SIZE)
        outputs = _predict(loaded, selection.slices)
        lesion = _lesion_mask(outputs)
        sides = [100 * (lesion & (lungs == side)).sum() / (lungs == side).sum() for side in (1, 2)]
        assert min(sides) > 0
        assert (row.lesion_right, row.lesion_left) == pytest.approx(sides, abs=0.02)
        assert row.lesion_severity == pytest.approx(100 * compute_severity(lesion, lungs), abs=0.02)
        assert row.lesion_severity == max(row.lesion_right, row.lesion_left) < 100
        assert row.covid == pytest.approx(outputs["covid"].sigmoid().item(), abs=2e-6)


def _read_slices(folder: Path) -> list[Dataset]:
    """Read a CT's images from the feet up."""
    datasets = map(pydicom.dcmread, folder.iterdir())
    return sorted(datasets, key=lambda dataset: float(dataset.ImagePositionPatient[2]))


def test_mask_has_the_geometry_of_its_ct(worklist: Worklist) -> None:
    """Compare with the coordinates in the DICOM files."""
    assert sorted(path.name for path in worklist.masks_dir.iterdir()) == [
        "a%252F1_lesion.nii.gz",
        "a%2F1_lesion.nii.gz",
    ]
    for row in worklist.table.itertuples():
        assert Path(str(row.lesion_mask)).name == make_mask_filename(str(row.scan), "lesion")
        image: Any = nibabel.load(str(row.lesion_mask))
        slices = _read_slices(Path(str(row.path)))
        first = slices[0]
        assert image.shape == (first.Columns, first.Rows, len(slices))
        # The directions of the phantom's columns, rows and slices.
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")  # type: ignore[no-untyped-call]
        assert list(map(float, first.ImageOrientationPatient)) == [1, 0, 0, 0, 1, 0]
        row_spacing, column_spacing = map(float, first.PixelSpacing)
        for column, line, index in ((0, 0, 0), (first.Columns - 1, first.Rows - 1, len(slices) - 1)):
            x, y, z = map(float, slices[index].ImagePositionPatient)
            # From DICOM's LPS to NIfTI's RAS.
            expected = (-(x + column * column_spacing), -(y + line * row_spacing), z)
            np.testing.assert_allclose((image.affine @ [column, line, index, 1])[:3], expected, atol=1e-3)


def test_mask_has_the_content_of_the_models_map(worklist: Worklist) -> None:
    loaded = load_model(worklist.model_path)
    for row in worklist.table.itertuples():
        selection = select_and_crop(read_scan(Path(str(row.path))), loaded.config.preprocess)
        lesion = _lesion_mask(_predict(loaded, selection.slices))
        mask = masks.read_mask(Path(str(row.lesion_mask)))
        cropped = masks.crop_to_slices(mask, selection.indices, selection.crop_box, IMAGE_SIZE)
        inside = (
            masks.crop_to_slices(np.ones_like(mask), selection.indices, selection.crop_box, IMAGE_SIZE) > 0
        )
        assert (cropped == lesion)[inside].mean() > 0.95
        y0, y1, x0, x1 = selection.crop_box
        selected_slices = slice(selection.indices.min(), selection.indices.max() + 1)
        assert mask.sum() == mask[selected_slices, y0:y1, x0:x1].sum() > 0


def test_radiograph_has_a_severity_but_no_sides(centre: Path, tmp_path: Path) -> None:
    """The lungs of a radiograph are one mask; a model made for CT adds a note."""
    folder = tmp_path / "new"
    folder.mkdir()
    shutil.copy(centre / "xr" / "north-0000.dcm", folder)
    any_modality_model = save_random_model(tmp_path / "a", *TRIAGE, "preprocess.modality=any", tilt=9.0)
    table, _ = predict_folder(any_modality_model, folder, tmp_path / "store")
    assert table[["lesion_right", "lesion_left"]].isna().all(axis=None)
    assert table["lesion_severity"].tolist() == [100]
    assert "the model was made for" not in table["notes"][0]
    ct_model = save_random_model(tmp_path / "b", *TRIAGE)
    table, _ = predict_folder(ct_model, folder, tmp_path / "store")
    assert "It was read as XR, the model was made for CT." in table["notes"][0]


def test_scan_without_lungs_has_no_lesion_values(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    uniform = nibabel.Nifti1Image(np.full((64, 64, 12), 40, np.int16), np.diag([-1.0, -1, 5, 1]))  # type: ignore[no-untyped-call]
    nibabel.save(uniform, folder / "brick.nii.gz")
    model_path = save_random_model(tmp_path / "m.safetensors", *TRIAGE)
    options = PredictOptions(sort_column="lesion_severity")
    table, _ = predict_folder(model_path, folder, tmp_path / "store", options)
    assert table.filter(like="lesion").isna().all(axis=None)
    assert "Its lungs were not found" in table["notes"][0]
