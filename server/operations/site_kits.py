"""Build the archive that a hospital receives, and the coordinator's files beside its secrets.

Both are made from the plain files under deploy/ (string.Template).
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

from common.utils.errors import ConsiliumError
from server.operations.federation_file import FederationFile

DEPLOY_FOLDER = Path(__file__).resolve().parents[2] / "deploy"
TEMPLATE_FILES = ("README.md", "site.yaml", "policy.yaml", "start", "settings.env")
FILE_MODES = {"start": 0o755, "key": 0o600}  # all others 0644
KEY_IN_ARCHIVE = "is in this archive"
KEY_AT_CENTRE = "was made here and lies beside the public part you sent; copy it to `key` in this folder"


def write_kit(
    federation: FederationFile, centre: str, key: bytes | None, authority: bytes, folder: Path
) -> Iterator[str]:
    """Write `folder`/CENTRE.tar.gz (0600) where it differs. `key`: None where the centre made its own."""
    content = build_archive(centre, build_kit_files(federation, centre, key, authority))
    path = folder / f"{centre}.tar.gz"
    existed = path.exists()
    if existed and path.read_bytes() == content:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    part.replace(path)
    yield f"{path.name}: {'replaced, because it differed' if existed else 'written'}"


def build_kit_files(
    federation: FederationFile, centre: str, key: bytes | None, authority: bytes
) -> dict[str, bytes]:
    """Return the files of a hospital's kit: {name: content}."""
    entry = federation.centres[centre]
    compose_files = "compose.yaml" if entry.device == "cpu" else "compose.yaml:compose.gpu.yaml"
    values = {
        "centre": centre,
        "federation": federation.name,
        "address": federation.address,
        "host": federation.host,
        "port": str(federation.port),
        "image": federation.image,
        "device": entry.device,
        "data": entry.data,
        "state": entry.state,
        "compose": compose_files,
        "key": KEY_AT_CENTRE if key is None else KEY_IN_ARCHIVE,
    }
    files = {name: _render_template(DEPLOY_FOLDER / "kit" / name, values) for name in TEMPLATE_FILES}
    files["compose.yaml"] = (DEPLOY_FOLDER / "compose.centre.yaml").read_bytes()
    files["compose.gpu.yaml"] = (DEPLOY_FOLDER / "compose.gpu.yaml").read_bytes()
    files["ca.crt"] = authority
    if key is not None:
        files["key"] = key
    return files


def build_archive(folder: str, files: Mapping[str, bytes]) -> bytes:
    """Build a .tar.gz of `folder`/name that is the same, byte for byte, whenever it is made."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as bundle:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")  # its default time, uid and gid are 0
            entry.size = len(content)
            entry.mode = FILE_MODES.get(name, 0o644)
            bundle.addfile(entry, io.BytesIO(content))
    return gzip.compress(tar.getvalue(), compresslevel=9, mtime=0)


def build_coordinator_files(federation: FederationFile) -> dict[str, str]:
    """Return the files beside the coordinator's secrets: {name: content}."""
    values = {"port": str(federation.port), "host": federation.host, "federation": federation.name}
    return {
        "compose.yaml": (DEPLOY_FOLDER / "compose.coordinator.yaml").read_text(),
        "nginx.conf": (DEPLOY_FOLDER / "nginx.conf").read_text(),
        ".env": _render_template(DEPLOY_FOLDER / "coordinator.env", values).decode(),
    }


def _render_template(path: Path, values: Mapping[str, str]) -> bytes:
    try:
        return Template(path.read_text()).substitute(values).encode()
    except (KeyError, ValueError) as error:
        raise ConsiliumError(f"template {path}: a kit has no value {error}") from error
