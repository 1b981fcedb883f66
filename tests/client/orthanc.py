"""Run a real archive: Debian's Orthanc (`apt-get install orthanc orthanc-dicomweb`), with a password."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PROGRAM = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
USER, PASSWORD = "centre", "secret"
ARCHIVE_AE_TITLE, LOCAL_AE_TITLE = "ARCHIVE", "CONSILIUM"
START_ATTEMPTS = 600  # 0.1 s apart


@dataclass(frozen=True)
class Orthanc:
    """The archive's ports, and ours to which it sends by C-MOVE."""

    http_port: int
    dicom_port: int
    local_port: int

    @property
    def web(self) -> str:
        """The address for DICOMweb."""
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    @property
    def get(self) -> str:
        """The address for C-GET."""
        return f"dicom://{ARCHIVE_AE_TITLE}@127.0.0.1:{self.dicom_port}?aet={LOCAL_AE_TITLE}"

    @property
    def move(self) -> str:
        """The address for C-MOVE."""
        return f"{self.get}&listen=127.0.0.1:{self.local_port}"

    def store(self, data: bytes) -> None:
        """Store a DICOM file."""
        url = f"http://127.0.0.1:{self.http_port}/instances"
        requests.post(url, data=data, auth=(USER, PASSWORD), timeout=60).raise_for_status()


def find_free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Run an archive for a block; raises RuntimeError with its log when it does not start."""
    archive = Orthanc(find_free_port(), find_free_port(), find_free_port())
    config = folder / "orthanc.json"
    config.write_text(json.dumps(_make_config(archive, folder)))
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([str(PROGRAM), str(config)], stdout=log, stderr=log)
    try:
        if not _wait_until_ready(archive, process):
            raise RuntimeError(log_path.read_text(errors="replace")[-2000:])
        yield archive
    finally:
        process.terminate()
        process.wait(30)


def _make_config(archive: Orthanc, folder: Path) -> dict[str, Any]:
    return {
        "StorageDirectory": str(folder / "db"),
        "HttpPort": archive.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomAet": ARCHIVE_AE_TITLE,
        "DicomPort": archive.dicom_port,
        "DicomCheckCalledAet": True,
        "DicomModalities": {"ours": [LOCAL_AE_TITLE, "127.0.0.1", archive.local_port]},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True},
        "SyncStorageArea": False,
        "IngestTranscodingOfCompressed": False,
    }


def _wait_until_ready(archive: Orthanc, process: subprocess.Popen[bytes]) -> bool:
    """Return whether the archive answers before its process ends and before the attempts run out."""
    url = f"{archive.web}/studies?limit=1"
    for _ in range(START_ATTEMPTS):
        try:
            requests.get(url, auth=(USER, PASSWORD), timeout=5).raise_for_status()
            return True
        except requests.RequestException:
            if process.poll() is not None:
                return False
            time.sleep(0.1)
    return False
