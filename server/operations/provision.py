"""Provision a federation from `federation.yaml`, offline.

An authority, keys, the coordinator's folder, an archive for each hospital.

    OUT/ca.key, ca.crt            the authority; keep ca.key on a disk that is not connected
    OUT/coordinator/              certificate, secrets, the centres' public keys, compose file, nginx.conf:
    for the coordinator OUT/keys/north                a centre's private key; may be deleted once its kit is
    delivered OUT/kits/north.tar.gz         what the hospital gets, in a way that nobody else can read,
    because its key is inside OUT/revoked/north/1a2b3c4d    public keys that are no longer admitted

Existing files stay: no key, certificate or secret is replaced unless `reissue` or `revoke` names it. Every
function yields what it did, a sentence each, which never holds a key.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError, suggest
from common.utils.node_keys import (
    extract_public_key,
    generate_key,
    key_fingerprint,
    read_public_key,
    write_secret_file,
)
from server.operations.certificate_authority import list_certificate_names, make_authority, make_certificate
from server.operations.federation_file import FederationFile, load_federation_file
from server.operations.site_kits import build_coordinator_files, write_kit

REISSUE_COMMAND = "consilium-server provision ... --reissue coordinator"
REVOKED_SUFFIX = ".revoked"  # of a public key in coordinator/centres that is no longer admitted
SECRET_FILES = ("superexec.secret", "postgres.password")


@dataclass(frozen=True)
class Provisioning:
    """A federation's file and the folder that is made from it."""

    federation: FederationFile
    federation_path: Path
    folder: Path

    @property
    def coordinator(self) -> Path:
        """Return the folder that goes to the coordinator's machine."""
        return self.folder / "coordinator"

    def public_key_path(self, centre: str) -> Path:
        """Return where an enrolled centre's public key lies."""
        return self.coordinator / "centres" / f"{centre}.pub"

    def private_key_path(self, centre: str) -> Path:
        """Return where the private key of a centre lies that did not make its own."""
        return self.folder / "keys" / centre

    def own_key_path(self, centre: str) -> Path | None:
        """Return the public key that the centre made and sent, or None."""
        file = self.federation.centres[centre].public_key
        return self.federation_path.parent / file if file else None


def provision_federation(federation_file: Path, folder: Path, reissue: str = "") -> Iterator[str]:
    """Make what is missing of the federation that a file describes.

    `reissue` names a centre that gets a new key, or `coordinator` for a new certificate.

    Raises:
        ConsiliumError: the file is invalid, or a key does not fit.
    """
    site = Provisioning(load_federation_file(federation_file), federation_file, folder)
    if reissue:
        yield from _reissue(site, reissue)
    (site.coordinator / "centres").mkdir(parents=True, exist_ok=True)
    yield from _make_missing_certificates(site)
    yield from _make_missing_secrets(site)
    shutil.copyfile(folder / "ca.crt", site.coordinator / "ca.crt")
    for name, content in build_coordinator_files(site.federation).items():
        yield from _write_or_offer(site.coordinator / name, content)
    for centre in site.federation.centres:
        yield from _enrol_centre(site, centre, reissued=centre == reissue)
        yield from _update_kit(site, centre)
    for path in sorted((site.coordinator / "centres").glob("*.pub")):
        if path.stem not in site.federation.centres:
            yield (
                f"{path.stem}: no longer in {federation_file.name}, but still admitted; "
                f"--revoke {path.stem} ends that"
            )


def revoke_centre(folder: Path, centre: str) -> str:
    """Remove a centre's key from the coordinator's folder, and delete its private part and its kit.

    Raises:
        ConsiliumError: no such centre is enrolled.
    """
    public = folder / "coordinator" / "centres" / f"{centre}.pub"
    if not public.exists():
        enrolled = [path.stem for path in public.parent.glob("*.pub")]
        raise ConsiliumError(f"no centre '{centre}' is enrolled in {folder}{suggest(centre, enrolled)}")
    (folder / "revoked" / centre).mkdir(parents=True, exist_ok=True)
    fingerprint = key_fingerprint(public.read_text())
    # Tells `admit` that a folder without any key is meant so, when the last centre is revoked.
    shutil.copyfile(public, public.with_name(f"{fingerprint}{REVOKED_SUFFIX}"))
    public.replace(folder / "revoked" / centre / fingerprint)
    (folder / "keys" / centre).unlink(missing_ok=True)
    (folder / "kits" / f"{centre}.tar.gz").unlink(missing_ok=True)
    return f"{centre}: key {fingerprint} revoked; run `consilium-server admit`, and the SuperLink refuses it"


def _make_missing_certificates(site: Provisioning) -> Iterator[str]:
    federation = site.federation
    if not (site.folder / "ca.crt").exists():
        make_authority(site.folder, federation.name)
        yield f"ca.crt, ca.key: created; keep {site.folder / 'ca.key'} where no network reaches it"
    if not (site.coordinator / "server.crt").exists():
        make_certificate(site.coordinator, site.folder, federation.host, federation.sans, federation.days)
        names = ", ".join(list_certificate_names(federation.host, federation.sans))
        yield f"server.crt: created for {names}"


def _make_missing_secrets(site: Provisioning) -> Iterator[str]:
    for name in SECRET_FILES:
        if not (site.coordinator / name).exists():
            write_secret_file(site.coordinator / name, secrets.token_urlsafe(48).encode())
            yield f"{name}: created"
    if not (site.coordinator / "pgpass").exists():
        password = (site.coordinator / "postgres.password").read_text()
        write_secret_file(site.coordinator / "pgpass", f"postgres:5432:*:consilium:{password}\n".encode())


def _enrol_centre(site: Provisioning, centre: str, reissued: bool) -> Iterator[str]:
    """Enrol a centre's key. A revoked centre is enrolled again only where that is asked for (`reissued`)."""
    public = site.public_key_path(centre)
    own_key = site.own_key_path(centre)
    if public.exists():
        if own_key and read_public_key(own_key) != read_public_key(public):
            raise ConsiliumError(
                f"{own_key} is not the key that {centre} is enrolled with; use --reissue {centre} to "
                "replace it"
            )
        return
    revoked = {path.name for path in (site.folder / "revoked" / centre).glob("*")}
    if revoked and not reissued:
        yield f"{centre}: revoked; --reissue {centre} admits it again, with a new key"
        return
    line = read_public_key(own_key) if own_key else _make_public_key(site.private_key_path(centre))
    fingerprint = key_fingerprint(line)
    if fingerprint in revoked:
        raise ConsiliumError(
            f"{own_key} is a revoked key of {centre}; make a new one there with `consilium-centre key`"
        )
    other_centre = find_key_owner(site.coordinator / "centres", line)
    if other_centre:
        raise ConsiliumError(
            f"{own_key} is the key of {other_centre}, and the SuperLink could not tell the two apart; make "
            f"another at {centre} with `consilium-centre key`"
        )
    atomic_write(public, f"{line} {centre}\n".encode())
    origin = "its own" if own_key else "a new"
    yield (
        f"{centre}: {origin} key {fingerprint}; run `consilium-server admit` to register it with the "
        "SuperLink"
    )


def find_key_owner(centres: Path, public_key: str) -> str:
    """Return the centre that is enrolled with a public key; nothing if there is none."""
    for path in sorted(centres.glob("*.pub")):
        if read_public_key(path) == public_key:
            return path.stem
    return ""


def _make_public_key(private_key: Path) -> str:
    """Return the public part of a private key, which is made where it is missing."""
    if not private_key.exists():
        generate_key(private_key)
    return extract_public_key(private_key)


def _update_kit(site: Provisioning, centre: str) -> Iterator[str]:
    """Write an enrolled centre's kit where it differs."""
    if not site.public_key_path(centre).exists():
        return
    private_key = site.private_key_path(centre)
    has_own_key = site.own_key_path(centre) is not None
    if not has_own_key and not private_key.exists():
        yield f"{centre}: its private key is no longer here, so its kit is not updated"
        return
    key = None if has_own_key else private_key.read_bytes()
    authority = (site.folder / "ca.crt").read_bytes()
    yield from write_kit(site.federation, centre, key, authority, site.folder / "kits")


def _reissue(site: Provisioning, name: str) -> Iterator[str]:
    """Make a new certificate for the coordinator, or revoke a centre's key so that a new one is enrolled."""
    if name == "coordinator":
        _replace_server_certificate(site)
        yield (
            "server.crt, server.key: replaced; restart proxy and SuperLink. The hospitals need not do "
            "anything"
        )
        return
    if name not in site.federation.centres:
        choices = [*site.federation.centres, "coordinator"]
        raise ConsiliumError(f"no centre '{name}' in the federation{suggest(name, choices)}")
    public = site.public_key_path(name)
    if not public.exists():
        return
    own_key = site.own_key_path(name)
    if own_key and read_public_key(own_key) == read_public_key(public):
        raise ConsiliumError(
            f"{own_key} is the key that {name} has already; put the new public key there, then --reissue "
            f"{name}"
        )
    yield revoke_centre(site.folder, name)


def _replace_server_certificate(site: Provisioning) -> None:
    federation = site.federation
    with tempfile.TemporaryDirectory(dir=site.coordinator) as temporary:
        make_certificate(Path(temporary), site.folder, federation.host, federation.sans, federation.days)
        for file in ("server.key", "server.crt"):
            (Path(temporary) / file).replace(site.coordinator / file)


def _write_or_offer(path: Path, content: str) -> Iterator[str]:
    """Write a file that the operator may edit.

    Where a different one exists, write the new text beside it, as .new.
    """
    if not path.exists():
        path.write_text(content)
        yield f"{path.name}: written"
        return
    if path.name == ".env" or path.read_text() == content:
        return
    offered = path.with_name(f"{path.name}.new")
    if offered.exists() and offered.read_text() == content:
        return
    offered.write_text(content)
    yield f"{path.name}: kept; what this version would write is in {offered}"
