from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.ingest.planted_studies import write_studies
from tests.client.orthanc import PASSWORD, PLUGIN, PROGRAM, USER, Orthanc, run_orthanc


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies whose files are named after patients."""
    root = tmp_path_factory.mktemp("hospital")
    write_studies(root)
    return root


@pytest.fixture(scope="module")
def archive(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A running archive that holds the hospital's studies."""
    if PROGRAM is None or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("orthanc")
    netrc = folder / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    with run_orthanc(folder) as running_archive, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NETRC", str(netrc))
        for path in sorted(hospital.rglob("*.dcm")):
            running_archive.store(path.read_bytes())
        yield running_archive
