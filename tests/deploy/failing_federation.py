"""The federation and the long run that tests/deploy/test_failures.py disturbs, and ways to disturb them."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.deploy.faults import ROUND_TIMEOUT, Federation, deploy_federation

ROUNDS = 60  # of the long run, which goes on while a centre is away: a few seconds a round on a fast machine


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server is installed")
    with deploy_federation(tmp_path_factory.mktemp("failures")) as federation:
        yield federation


@pytest.fixture(scope="module")
def undisturbed_model(federation: Federation) -> bytes:
    """The model file of an undisturbed run of two rounds."""
    run_id = federation.start_run("stage.rounds=2")
    federation.wait_until_finished(run_id)
    return read_model(federation, run_id)


def read_model(federation: Federation, run_id: str) -> bytes:
    return (federation.folder / "runs" / run_id / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def long_run(federation: Federation) -> Iterator[str]:
    """A run that needs only half of the centres in a round."""
    state = federation.hospital_folder("south") / "state"
    if os.getuid() == 0:
        mount_small_disk(federation.folder / "disk", state)
    yield federation.start_run(
        f"stage.rounds={ROUNDS}",
        "stage.local_epochs=5",
        "evaluation.checkpoint_selection=last",
        f"federation.round_timeout={ROUND_TIMEOUT}",
        "federation.quorum=0.5",
        "federation.round_retries=2",
        "federation.join_timeout=300",
    )
    if os.path.ismount(state):
        subprocess.run(["umount", "-l", str(state)], check=False)


def mount_small_disk(image: Path, folder: Path) -> None:
    """Mount a disk of 48 MB, which can be filled; it may fail."""
    folder.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(48 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=False)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False)


def fill_disk(filler: Path) -> None:
    """Write to a file until the disk is full to the last byte."""
    for block in (bytes(1 << 12), b"0"):
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(block)


def expire_certificate(certificate: bytes, made: Path) -> bytes:
    """Return the same certificate with a validity that ended yesterday."""
    valid = x509.load_pem_x509_certificate(certificate)
    key = serialization.load_pem_private_key((made / "ca.key").read_bytes(), None)
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder()
    builder = builder.subject_name(valid.subject).issuer_name(valid.issuer).public_key(valid.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(days=9))
    builder = builder.not_valid_after(now - dt.timedelta(days=1))
    for extension in valid.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
