"""What 0.1.0's ingest, preprocessing and runs left at a hospital is used as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from client.data.cluster_label_store import load_cluster_labels
from client.data.cohort import load_cohort
from client.federation.secure_sum_store import SumId, load_state, record_opening
from client.imaging.slice_metadata import SliceMetadata
from client.imaging.slice_store import SliceStore
from client.ingest.pseudonyms import load_site_key, make_patient_pseudonym, make_pseudonym
from client.site.config import Site
from common.modeling.model_file import load_model_file
from tests.upgrade.recorded_hospital import PREPROCESSING, STATE, call_centre_command

RUNS = Path("coordinator/runs")


def snapshot(folder: Path, pattern: str) -> dict[str, tuple[int, bytes]]:
    """{file: when it was written, its content}."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- ingest


def test_ingest_finds_its_studies_present_under_the_same_pseudonyms(north: Site) -> None:
    key = (STATE / "ingest/key").read_bytes()
    journal = (STATE / "ingest/journal.jsonl").read_bytes()
    images = snapshot(Path("hospital_north/data/dicom"), "*.dcm")
    table = load_cohort(Path("hospital_north/data"), "north")
    command = ["--site", "hospital_north/site.yaml", "--labels", "hospital_north/labels.csv", "--quiet", "0"]
    printed = call_centre_command("ingest", *command)
    assert "0 studies added, 2 already present" in printed
    assert (STATE / "ingest/key").read_bytes() == key
    assert (STATE / "ingest/journal.jsonl").read_bytes() == journal
    assert snapshot(Path("hospital_north/data/dicom"), "*.dcm") == images
    pd.testing.assert_frame_equal(load_cohort(Path("hospital_north/data"), "north"), table)


def test_pseudonyms_are_those_of_the_recorded_mapping(north: Site) -> None:
    key = load_site_key(STATE / "ingest")
    mapping = pd.read_csv(STATE / "ingest/mapping.csv", dtype=str)
    assert len(mapping) == 12
    for row in mapping.to_dict("records"):
        study = row["StudyInstanceUID"]
        assert make_pseudonym(key, "study", study) == row["scan"]
        assert make_patient_pseudonym(key, row["PatientID"], study) == row["patient"]


# --- slices


def test_no_slice_is_computed_anew(north: Site) -> None:
    before = snapshot(STATE / "slices", "*.npy") | snapshot(STATE / "slices", "*.json")
    assert len(before) == 24
    settings = [part for override in PREPROCESSING for part in ("-s", override)]
    printed = call_centre_command(
        "preprocess", "hospital_north/data", "--state", str(STATE), *settings, "-s", "preprocess.modality=CT"
    )
    assert "12 of 12 scans are ready" in printed
    assert snapshot(STATE / "slices", "*.npy") | snapshot(STATE / "slices", "*.json") == before


def test_metadata_beside_the_slices_is_read(north: Site) -> None:
    store = SliceStore(STATE / "slices")
    for path in sorted((STATE / "slices").glob("*/*.json")):
        metadata = SliceMetadata.from_json(store.read_metadata(path.stem))
        assert len(metadata.indices) == len(metadata.areas) == 2
        assert metadata.geometry is not None
        assert metadata.geometry.modality == "CT"
        assert store.get(path.stem) is not None


# --- what runs left at the hospital


def test_cluster_labels_are_found_by_slice_key(north: Site) -> None:
    keys = [path.stem for path in sorted((STATE / "slices").glob("*/*.npy"))]
    labels = load_cluster_labels(STATE, "paused-transfer-soft", keys)
    recorded_labels = json.loads((STATE / "labels/paused-transfer-soft.json").read_text())
    assert len(recorded_labels) == np.isfinite(labels).sum() == 12
    assert dict(zip(keys, labels, strict=True)) == recorded_labels


def test_opened_secure_sum_is_not_opened_again_among_others(north: Site) -> None:
    work_dir = STATE / "secagg/paused-secagg/train"
    first = record_opening(work_dir, SumId.parse("train/main/1/0123"), ["east", "north"])
    assert first.survivors == ["east", "north", "south"]


def test_interrupted_secure_sum_is_recognised(north: Site) -> None:
    state = load_state(STATE / "secagg/paused-secagg/train")
    assert state is not None
    assert state.sum_id.startswith("train/main/2/")


@pytest.mark.parametrize("run_id", ["finished", "finished-personal"])
def test_saved_model_predicts_as_it_did(north: Site, run_id: str) -> None:
    """With `--personal` by the hospital's own layers, which exist nowhere else."""
    personal = STATE / "personal" / run_id
    options = ["--personal", str(personal)] if personal.exists() else []
    model = RUNS / run_id / "model.safetensors"
    call_centre_command(
        *["predict", str(model), "hospital_north/data/dicom", "--out", "new.csv", "--device", "cpu"],
        *["--state", str(STATE), *options],
    )
    expected = pd.read_csv(f"predictions/{run_id}.csv", dtype=str).set_index("scan").sort_index()
    predicted = pd.read_csv("new.csv", dtype=str).set_index("scan").sort_index()
    pd.testing.assert_frame_equal(
        predicted[expected.columns].drop(columns="covid"), expected.drop(columns="covid")
    )
    np.testing.assert_allclose(predicted["covid"].astype(float), expected["covid"].astype(float), atol=2e-6)
    slice_keys = sorted(path.stem for path in (STATE / "slices").rglob("*.npy"))
    assert slice_keys == Path("predictions/slice_keys.txt").read_text().split()  # that 0.1.0 would find


def test_configuration_inside_a_saved_model_is_read_under_the_present_keys(recorded: Path) -> None:
    _, config = load_model_file(RUNS / "finished/model.safetensors")
    assert config.tasks["covid"].type == "binary"
    assert config.preprocess.num_slices == 2
    assert config.stages["main"].batch_size == 4
