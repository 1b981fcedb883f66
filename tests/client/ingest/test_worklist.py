"""Triage's predictions: how much of each lung is affected, and masks that lie over their CT."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

from client.imaging import masks
from client.imaging.readers import read_scan
from client.imaging.severity import compute_severity
from client.imaging.slice_pipeline import select_and_crop
from client.tools.mask_filenames import make_mask_filename
from client.tools.predict import PredictOptions, load_model, predict_folder
from tests.client.tools.test_predict import centre as centre
from tests.client.tools.test_predict import save_random_model

TRIAGE = ["recipe=triage", "backbone=small", "preprocess.image_size=32", "preprocess.num_slices=8"]


@pytest.fixture(scope="module")
def worklist(centre: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, pd.DataFrame]:
    """(model, folder of masks, table) of the triage recipe on two CTs and a radiograph that a manifest names; the radiograph says so."""
    root = tmp_path_factory.mktemp("triage")
    rows = [
        {"scan": "a/1", "path": centre / "dicom" / "north-0000"},
        {"scan": "a%2F1", "path": centre / "dicom" / "north-0003"},
    ]
    film = {"scan": "film", "path": centre / "xr" / "north-0000.dcm", "modality": "xr"}
    pd.DataFrame([*rows, film]).to_csv(root / "manifest.csv", index=False)
    model = save_random_model(root / "plain.safetensors", *TRIAGE)
    plain, config, _ = load_model(
        model
    )  # random weights call a pixel nothing in particular: the head's bias makes it half of them
    slices = select_and_crop(read_scan(rows[0]["path"]), config.preprocess).slices
    with torch.no_grad():
        middle = plain.eval()(torch.from_numpy(slices)[None] / 255)["lesion"].median().item()
    tilted = save_random_model(root / "model.safetensors", *TRIAGE, tilt=math.log(0.2 / 0.8) - middle)
    options = PredictOptions(masks_dir=root / "masks", sort_column="lesion_severity")
    table, skipped = predict_folder(tilted, root / "manifest.csv", root / "store", options)
    assert [(Path(s.path).name, s.reason) for s in skipped] == [
        ("north-0000.dcm", "it is no CT, for which the model was made")
    ]
    return tilted, root / "masks", table


def test_a_worklist_of_affected_lungs(worklist: tuple[Path, Path, pd.DataFrame]) -> None:
    """Against the steps by hand: the model's map, our lung finder's sides, the share of each."""
    path, _, table = worklist
    assert list(table.columns[2:7]) == [
        "covid",
        "lesion_right",
        "lesion_left",
        "lesion_severity",
        "lesion_mask",
    ]
    assert sorted(table["scan"]) == ["a%2F1", "a/1"]
    assert table["lesion_severity"].is_monotonic_decreasing
    model, config, _ = load_model(path)
    for row in table.itertuples():
        volume = read_scan(Path(str(row.path)))
        kept = select_and_crop(volume, config.preprocess)
        lungs = masks.crop_to_slices(masks.find_lung_mask(volume, True), kept.indices, kept.crop_box, 32)
        with torch.no_grad():
            found = model.eval()(torch.from_numpy(kept.slices)[None] / 255)
        lesion = found["lesion"][0].sigmoid().numpy() >= 0.2
        sides = [100 * (lesion & (lungs == side)).sum() / (lungs == side).sum() for side in (1, 2)]
        assert min(sides) > 0
        assert (row.lesion_right, row.lesion_left) == pytest.approx(sides, abs=0.02)
        assert row.lesion_severity == pytest.approx(100 * compute_severity(lesion, lungs), abs=0.02)
        assert row.lesion_severity == max(row.lesion_right, row.lesion_left) < 100
        assert row.covid == pytest.approx(found["covid"].sigmoid().item(), abs=2e-6)


def test_masks_lie_over_their_ct(worklist: tuple[Path, Path, pd.DataFrame]) -> None:
    """Geometry against the DICOM files' own words; content against the model's map."""
    path, folder, table = worklist
    assert sorted(p.name for p in folder.iterdir()) == ["a%252F1_lesion.nii.gz", "a%2F1_lesion.nii.gz"]
    model, config, _ = load_model(path)
    for row in table.itertuples():
        assert Path(str(row.lesion_mask)).name == make_mask_filename(str(row.scan), "lesion")
        image: Any = nibabel.load(str(row.lesion_mask))
        files = sorted(
            (pydicom.dcmread(f) for f in Path(str(row.path)).iterdir()),
            key=lambda d: float(d.ImagePositionPatient[2]),
        )
        first, (high, wide) = files[0], map(float, files[0].PixelSpacing)
        assert image.shape == (first.Columns, first.Rows, len(files))
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")  # type: ignore[no-untyped-call]  # as the phantom's columns, rows, slices run
        assert list(map(float, first.ImageOrientationPatient)) == [1, 0, 0, 0, 1, 0]
        for column, line, z in ((0, 0, 0), (first.Columns - 1, first.Rows - 1, len(files) - 1)):
            x, y, high_up = map(float, files[z].ImagePositionPatient)
            at = (-(x + column * wide), -(y + line * high), high_up)  # LPS, turned to NIfTI's RAS
            np.testing.assert_allclose((image.affine @ [column, line, z, 1])[:3], at, atol=1e-3)

        volume = read_scan(Path(str(row.path)))
        kept = select_and_crop(volume, config.preprocess)
        with torch.no_grad():
            lesion = (
                model.eval()(torch.from_numpy(kept.slices)[None] / 255)["lesion"][0].sigmoid().numpy() >= 0.2
            )
        drawn = masks.read_mask(Path(str(row.lesion_mask)))
        back = masks.crop_to_slices(drawn, kept.indices, kept.crop_box, 32)
        y0, y1, x0, x1 = kept.crop_box
        shown = masks.crop_to_slices(np.ones_like(drawn), kept.indices, kept.crop_box, 32) > 0
        assert (back == lesion)[shown].mean() > 0.95
        assert drawn.sum() == drawn[kept.indices.min() : kept.indices.max() + 1, y0:y1, x0:x1].sum() > 0


def test_a_radiograph_has_a_severity_but_no_sides(centre: Path, tmp_path: Path) -> None:
    """Its lungs are one mask; and a model of CT says what it was shown."""
    (tmp_path / "new").mkdir()
    shutil.copy(centre / "xr" / "north-0000.dcm", tmp_path / "new")
    film, _ = predict_folder(
        save_random_model(tmp_path / "a", *TRIAGE, "preprocess.modality=any", tilt=9.0),
        tmp_path / "new",
        tmp_path / "store",
    )
    assert film[["lesion_right", "lesion_left"]].isna().all(axis=None)
    assert film["lesion_severity"].tolist() == [100]
    assert "the model was made for" not in film["notes"][0]
    taken, _ = predict_folder(
        save_random_model(tmp_path / "b", *TRIAGE), tmp_path / "new", tmp_path / "store"
    )
    assert "It was read as XR, the model was made for CT." in taken["notes"][0]


def test_without_lungs_nothing_is_said_of_them(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    grey = np.full((64, 64, 12), 40, np.int16)
    nibabel.save(nibabel.Nifti1Image(grey, np.diag([-1.0, -1, 5, 1])), tmp_path / "new" / "brick.nii.gz")  # type: ignore[no-untyped-call]
    table, _ = predict_folder(
        save_random_model(tmp_path / "m.safetensors", *TRIAGE),
        tmp_path / "new",
        tmp_path / "store",
        PredictOptions(sort_column="lesion_severity"),
    )
    assert table.filter(like="lesion").isna().all(axis=None)
    assert "Its lungs were not found" in table["notes"][0]
