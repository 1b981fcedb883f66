"""The montage: a PNG with every chosen slice, the lungs' outline and the curve, for any scan."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from client.imaging.montage import PAGE_WIDTH, draw_montage, write_montage
from client.imaging.readers import read_scan
from client.imaging.slice_pipeline import select_and_crop
from client.phantom.federation import write_centre
from common.config.schema import PhantomConfig, PreprocessConfig
from common.utils.errors import ConsiliumError

REAL = Path(os.environ.get("CONSILIUM_REAL_DATA", Path(__file__).parents[3].parent / "shared" / "data"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_centre(
        tmp_path_factory.mktemp("phantom"), "north", PhantomConfig(scale=0.001, num_slices=16, image_size=96)
    )
    return folder / "dicom" / "north-0000"


def count_teal(page: np.ndarray) -> int:
    """Pixels of the outlines' and the curve's colour, their smoothed edges too."""
    return int((page[..., 2].astype(int) - page[..., 0] > 60).sum())


def count_amber(page: np.ndarray) -> int:
    return int((page[..., 0].astype(int) - page[..., 2] > 100).sum())


@pytest.mark.parametrize(
    "settings",
    [
        PreprocessConfig(),
        PreprocessConfig(selection="kds_paper"),
        PreprocessConfig(num_slices=20, crop="lungs"),
    ],
)
def test_ct_montage_shows_outlines_and_curve(scan: Path, tmp_path: Path, settings: PreprocessConfig) -> None:
    out = write_montage(scan, settings, tmp_path / "new" / "m.png")
    page = np.array(Image.open(out))
    assert page.shape[1:] == (PAGE_WIDTH, 3)
    assert page.shape[0] > 500
    assert count_teal(page[:-230]) > 2000  # outlines
    assert count_teal(page[-230:]) > 500  # curve
    assert count_amber(page) > 200


def test_radiograph_montage_shows_neither_outlines_nor_curve(tmp_path: Path) -> None:
    cv2.imwrite(
        str(tmp_path / "chest.png"), np.random.default_rng(0).integers(0, 255, (200, 150), dtype=np.uint8)
    )
    page = np.array(Image.open(write_montage(tmp_path / "chest.png", PreprocessConfig(), tmp_path / "m.png")))
    assert count_teal(page) == 0
    assert page.shape[0] > 600  # one large picture


def test_montage_shows_notes_and_holds_no_metadata(scan: Path) -> None:
    volume = read_scan(scan)
    plain = draw_montage(volume, select_and_crop(volume, PreprocessConfig()), PreprocessConfig())
    volume.notes.append("About 2 slices missing.")
    assert (
        draw_montage(volume, select_and_crop(volume, PreprocessConfig()), PreprocessConfig()).height
        == plain.height + 22
    )
    assert not plain.info  # no text in the PNG either


def test_missing_scan_and_unwritable_output_are_refused(scan: Path, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="does not exist"):
        write_montage(tmp_path / "none", PreprocessConfig(), tmp_path / "m.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConsiliumError, match="choose another folder"):
        write_montage(scan, PreprocessConfig(), tmp_path / "file" / "m.png")


def test_montage_of_real_series_shows_lungs(tmp_path: Path) -> None:
    folders = sorted((REAL / "ct_dicom").glob("*")) if (REAL / "ct_dicom").is_dir() else []
    if not folders:
        pytest.skip("the real series are not here")
    for folder in folders[:2]:
        page = np.array(Image.open(write_montage(folder, PreprocessConfig(), tmp_path / "m.png")))
        assert count_teal(page) > 2000
