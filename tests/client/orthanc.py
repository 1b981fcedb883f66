"""A real archive for tests: Debian's Orthanc (`apt-get install orthanc orthanc-dicomweb`) in a temporary folder, with a password."""

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

import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PROGRAM = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
USER, PASSWORD = "centre", "secret"
AET, OURS = "ARCHIVE", "CONSILIUM"


@dataclass(frozen=True)
class Orthanc:
    """Its ports, and the one to which it sends by C-MOVE."""

    http: int
    dicom: int
    ours: int

    @property
    def web(self) -> str:
        return f"http://127.0.0.1:{self.http}/dicom-web"

    @property
    def get(self) -> str:
        return f"dicom://{AET}@127.0.0.1:{self.dicom}?aet={OURS}"

    @property
    def move(self) -> str:
        return f"{self.get}&listen=127.0.0.1:{self.ours}"

    def put(self, data: bytes) -> None:
        """Store a DICOM file."""
        requests.post(
            f"http://127.0.0.1:{self.http}/instances", data=data, auth=(USER, PASSWORD), timeout=60
        ).raise_for_status()


def _free() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """Started, and ended with the block. Raises RuntimeError with its log when it does not start."""
    here = Orthanc(_free(), _free(), _free())
    config = {
        "StorageDirectory": str(folder / "db"),
        "HttpPort": here.http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomAet": AET,
        "DicomPort": here.dicom,
        "DicomCheckCalledAet": True,
        "DicomModalities": {"ours": [OURS, "127.0.0.1", here.ours]},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True},
        "SyncStorageArea": False,
        "IngestTranscodingOfCompressed": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen([str(PROGRAM), str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                requests.get(
                    f"{here.web}/studies?limit=1", auth=(USER, PASSWORD), timeout=5
                ).raise_for_status()
                break
            except requests.RequestException:
                if running.poll() is not None:
                    break
                time.sleep(0.1)
        else:
            running.kill()
        if running.poll() is not None:
            raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
        yield here
    finally:
        running.terminate()
        running.wait(30)
