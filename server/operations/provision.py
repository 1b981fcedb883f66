"""Site kits: from `federation.yaml` the authority, the coordinator's folder, a key for each centre and an archive for each hospital. Offline.

    OUT/ca.key, ca.crt            the authority; ca.key belongs on a disk that is not connected
    OUT/coordinator/              certificate, secrets, public keys of the centres, compose file, nginx.conf: goes to the coordinator's machine
    OUT/keys/north                a centre's private key; may be deleted once its kit was delivered
    OUT/kits/north.tar.gz         what the hospital gets, by a way that nobody else reads: its key is in it
    OUT/revoked/north/1a2b3c4d    public keys that are let in no more

What is there is kept: no key, certificate or secret is replaced unless `reissue` or `revoke` names it. Every function yields what it did, a
sentence each, which never holds a key.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from common.utils.checks import CheckResult
from common.utils.errors import ConsiliumError, suggest
from common.utils.node_keys import (
    extract_public_key,
    generate_key,
    key_fingerprint,
    read_public_key,
    write_secret_file,
)
from server.operations.certificate_authority import (
    check_certificate_expiry,
    list_certificate_names,
    make_authority,
    make_certificate,
    read_certificate,
    read_certificate_names,
)
from server.operations.federation_file import FederationFile, load_federation_file
from server.operations.site_kits import build_coordinator_files, write_kit


def provision_federation(federation_file: Path, folder: Path, reissue: str = "") -> Iterator[str]:
    """Make what is missing of the federation that the file `path` describes; `reissue` names a centre that gets a new key, or the `coordinator`
    for a new certificate. Raises ConsiliumError."""
    federation = load_federation_file(federation_file)
    coordinator = folder / "coordinator"
    if reissue:
        yield from _reissue(folder, federation, reissue, federation_file.parent)
    (coordinator / "centres").mkdir(parents=True, exist_ok=True)
    if not (folder / "ca.crt").exists():
        make_authority(folder, federation.name)
        yield f"ca.crt, ca.key: made; keep {folder / 'ca.key'} where no network reaches it"
    if not (coordinator / "server.crt").exists():
        make_certificate(coordinator, folder, federation.host, federation.sans, federation.days)
        yield f"server.crt: made, for {', '.join(list_certificate_names(federation.host, federation.sans))}"
    for name in ("superexec.secret", "postgres.password"):
        if not (coordinator / name).exists():
            write_secret_file(coordinator / name, secrets.token_urlsafe(48).encode())
            yield f"{name}: made"
    password = (coordinator / "postgres.password").read_text()
    if not (coordinator / "pgpass").exists():
        write_secret_file(coordinator / "pgpass", f"postgres:5432:*:consilium:{password}\n".encode())
    shutil.copyfile(folder / "ca.crt", coordinator / "ca.crt")
    for name, content in build_coordinator_files(federation).items():
        yield from _write_or_offer(coordinator / name, content)
    for centre in federation.centres:
        yield from _enrol_centre(
            federation, centre, federation_file.parent, folder, reissued=centre == reissue
        )
    for enrolled in sorted(p.stem for p in (coordinator / "centres").glob("*.pub")):
        if enrolled not in federation.centres:
            yield f"{enrolled}: no longer in {federation_file.name}, but still let in; --revoke {enrolled} ends that"


def _enrol_centre(
    federation: FederationFile, centre: str, keys_folder: Path, folder: Path, reissued: bool
) -> Iterator[str]:
    """A centre's key, its public part for the coordinator, and its kit. One that was revoked only comes in `again` when that is asked for."""
    key, public, own = (
        folder / "keys" / centre,
        folder / "coordinator" / "centres" / f"{centre}.pub",
        federation.centres[centre].public_key,
    )
    revoked = {p.name for p in (folder / "revoked" / centre).glob("*")}
    if not public.exists():
        if revoked and not reissued:
            yield f"{centre}: revoked; --reissue {centre} lets it in again, with a new key"
            return
        if not own and not key.exists():
            generate_key(key)
        line = read_public_key(keys_folder / own) if own else extract_public_key(key)
        if key_fingerprint(line) in revoked:
            raise ConsiliumError(
                f"{keys_folder / own} is a revoked key of {centre}; the centre makes a new one by `consilium-centre key`"
            )
        public.write_text(f"{line} {centre}\n")
        yield f"{centre}: {'its own' if own else 'a new'} key {key_fingerprint(line)}; `consilium-server admit` makes it known to the SuperLink"
    elif own and read_public_key(keys_folder / own) != read_public_key(public):
        raise ConsiliumError(
            f"{keys_folder / own} is not the key that {centre} is enrolled with; if it is to be replaced: --reissue {centre}"
        )
    if own or key.exists():
        yield from write_kit(
            federation,
            centre,
            None if own else key.read_bytes(),
            (folder / "ca.crt").read_bytes(),
            folder / "kits",
        )
    else:
        yield f"{centre}: its private key is no longer here, so its kit is left as it is"


def revoke_centre(folder: Path, centre: str) -> str:
    """Take a centre's key out of the coordinator's folder, and destroy our copy of its private part and its kit."""
    public = folder / "coordinator" / "centres" / f"{centre}.pub"
    if not public.exists():
        known = [p.stem for p in public.parent.glob("*.pub")]
        raise ConsiliumError(f"no centre '{centre}' is enrolled in {folder}{suggest(centre, known)}")
    (folder / "revoked" / centre).mkdir(parents=True, exist_ok=True)
    mark = key_fingerprint(public.read_text())
    public.replace(folder / "revoked" / centre / mark)
    (folder / "keys" / centre).unlink(missing_ok=True)
    (folder / "kits" / f"{centre}.tar.gz").unlink(missing_ok=True)
    return f"{centre}: key {mark} revoked; `consilium-server admit` tells the SuperLink, from then on it is refused"


def _reissue(folder: Path, federation: FederationFile, name: str, keys_folder: Path) -> Iterator[str]:
    """A new certificate for the coordinator; or a centre's key revoked, so that a new one is enrolled. What cannot be replaced is left as it was."""
    coordinator = folder / "coordinator"
    public = coordinator / "centres" / f"{name}.pub"
    if name == "coordinator":
        with tempfile.TemporaryDirectory(dir=coordinator) as new:
            make_certificate(Path(new), folder, federation.host, federation.sans, federation.days)
            for file in ("server.key", "server.crt"):
                (Path(new) / file).replace(coordinator / file)
        yield "server.crt, server.key: made anew; restart proxy and SuperLink with them. No hospital has to do anything"
    elif name not in federation.centres:
        raise ConsiliumError(
            f"no centre '{name}' in the federation{suggest(name, [*federation.centres, 'coordinator'])}"
        )
    elif public.exists():
        own = federation.centres[name].public_key
        if own and read_public_key(keys_folder / own) == read_public_key(public):
            raise ConsiliumError(
                f"{keys_folder / own} is the key that {name} has already; put the new public key there, then --reissue {name}"
            )
        yield revoke_centre(folder, name)


def check_provisioning(federation_file: Path, folder: Path) -> Iterator[CheckResult]:
    """What is there, what expires, what does not fit."""
    federation, coordinator = load_federation_file(federation_file), folder / "coordinator"
    yield check_certificate_expiry(
        folder / "ca.crt", 365, "plan a new federation: every hospital needs the new ca.crt"
    )
    yield check_certificate_expiry(
        coordinator / "server.crt", federation.warn, "consilium-server provision ... --reissue coordinator"
    )
    certificate, ca = read_certificate(coordinator / "server.crt"), read_certificate(folder / "ca.crt")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        yield CheckResult(
            "fault",
            "server.crt was not signed by ca.crt",
            "consilium-server provision ... --reissue coordinator",
        )
    if missing := set(list_certificate_names(federation.host, federation.sans)) - read_certificate_names(
        certificate
    ):
        remedy = "consilium-server provision ... --reissue coordinator"
        yield CheckResult(
            "fault",
            f"server.crt is not for {', '.join(sorted(missing))}, which {federation_file.name} names",
            remedy,
        )
    private = [
        folder / "ca.key",
        *(coordinator / f for f in ("server.key", "superexec.secret", "postgres.password", "pgpass")),
    ]
    for secret in [*private, *(folder / "keys").glob("*"), *(folder / "kits").glob("*")]:
        if secret.exists() and secret.stat().st_mode & 0o077:
            yield CheckResult("fault", f"{secret} can be read by others", f"chmod 600 {secret}")
    for centre in federation.centres:
        public = coordinator / "centres" / f"{centre}.pub"
        if public.exists():
            kit = "kit ready" if (folder / "kits" / f"{centre}.tar.gz").exists() else "no kit here"
            yield CheckResult(
                "ok", f"{centre}: enrolled with key {key_fingerprint(public.read_text())}, {kit}"
            )
        else:
            yield CheckResult(
                "warning",
                f"{centre}: not enrolled",
                f"consilium-server provision, or --reissue {centre} if it was revoked",
            )


def _write_or_offer(path: Path, content: str) -> Iterator[str]:
    """A file that the operator may have edited: written where there is none; beside it, as .new, where this version's own has changed."""
    new = path.with_name(f"{path.name}.new")
    if not path.exists():
        path.write_text(content)
        yield f"{path.name}: written"
    elif (
        path.name != ".env"
        and path.read_text() != content
        and (not new.exists() or new.read_text() != content)
    ):
        new.write_text(content)
        yield f"{path.name}: kept; what this version would write is {new}"
