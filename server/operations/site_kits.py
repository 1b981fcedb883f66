"""The archive that a hospital receives and the coordinator's files beside its secrets, from the plain files under deploy/ (string.Template)."""

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

DEPLOY_FOLDER = Path(__file__).resolve().parent.parent / "deploy"
EXECUTABLE_FILES, PRIVATE_FILES = ("start",), ("key",)


def write_kit(
    federation: FederationFile, centre: str, key: bytes | None, authority: bytes, folder: Path
) -> Iterator[str]:
    """`folder`/CENTRE.tar.gz (0600), written where it differs. `key`: None where the centre has its own."""
    content = build_archive(centre, build_kit_files(federation, centre, key, authority))
    path = folder / f"{centre}.tar.gz"
    before = path.read_bytes() if path.exists() else None
    if before == content:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    part.replace(path)
    yield f"{path.name}: {'written' if before is None else 'differed, written anew'}"


def build_kit_files(
    federation: FederationFile, centre: str, key: bytes | None, authority: bytes
) -> dict[str, bytes]:
    """{name: content} of a hospital's kit."""
    site = federation.centres[centre]
    values = {
        "centre": centre,
        "federation": federation.name,
        "address": federation.address,
        "host": federation.host,
        "port": str(federation.port),
        "image": federation.image,
        "device": site.device,
        "data": site.data,
        "state": site.state,
        "compose": "compose.yaml" if site.device == "cpu" else "compose.yaml:compose.gpu.yaml",
        "key": "was made here and lies beside the public part you sent; copy it to `key` in this folder"
        if key is None
        else "is in this archive",
    }
    files = {
        name: _render_template(DEPLOY_FOLDER / "kit" / name, values)
        for name in ("README.md", "site.yaml", "policy.yaml", "start", "settings.env")
    }
    files |= {
        "compose.yaml": (DEPLOY_FOLDER / "compose.centre.yaml").read_bytes(),
        "compose.gpu.yaml": (DEPLOY_FOLDER / "compose.gpu.yaml").read_bytes(),
    }
    files |= {"ca.crt": authority}
    return files if key is None else files | {"key": key}


def build_archive(folder: str, files: Mapping[str, bytes]) -> bytes:
    """A .tar.gz of `folder`/name that is the same, byte for byte, whenever and by whomever it is made."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as bundle:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = (
                len(content),
                0o755 if name in EXECUTABLE_FILES else 0o600 if name in PRIVATE_FILES else 0o644,
            )
            bundle.addfile(entry, io.BytesIO(content))  # TarInfo's own mtime, uid and gid are 0
    return gzip.compress(tar.getvalue(), compresslevel=9, mtime=0)


def build_coordinator_files(federation: FederationFile) -> dict[str, str]:
    """{name: content} of what stands beside the coordinator's secrets."""
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
        raise ConsiliumError(f"template {path}: {error} is no value that a kit has") from error
