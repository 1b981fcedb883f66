"""Check what `consilium-server provision` made: what expires, what does not fit, what others can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from common.utils.checks import CheckResult
from common.utils.errors import ConsiliumError
from common.utils.node_keys import key_fingerprint, read_public_key
from server.operations.certificate_authority import (
    check_certificate_expiry,
    has_private_key,
    is_authority,
    list_certificate_names,
    read_certificate,
    read_certificate_names,
)
from server.operations.federation_file import load_federation_file
from server.operations.provision import REISSUE_COMMAND, SECRET_FILES, Provisioning

NEW_FEDERATION = "plan a new federation: every hospital needs the new ca.crt"


def check_provisioning(federation_file: Path, folder: Path) -> Iterator[CheckResult]:
    """Check what is there, what expires, and what does not fit."""
    site = Provisioning(load_federation_file(federation_file), federation_file, folder)
    yield check_certificate_expiry(folder / "ca.crt", 365, NEW_FEDERATION)
    yield check_certificate_expiry(site.coordinator / "server.crt", site.federation.warn, REISSUE_COMMAND)
    yield from _check_authority(site)
    yield from _check_certificate(site)
    yield from _check_file_modes(site)
    for centre in site.federation.centres:
        yield _check_enrolment(site, centre)
    yield from _check_shared_keys(site)


def _check_authority(site: Provisioning) -> Iterator[CheckResult]:
    """Check that ca.crt may sign, and is of ca.key where that lies here."""
    authority = read_certificate(site.folder / "ca.crt")
    if not is_authority(authority):
        yield CheckResult("fault", "ca.crt is not an authority's certificate", NEW_FEDERATION)
    key_path = site.folder / "ca.key"
    if key_path.exists() and not has_private_key(authority, key_path):
        remedy = "put the key back that ca.crt was made with"
        yield CheckResult("fault", "ca.key is not the key of ca.crt", remedy)


def _check_certificate(site: Provisioning) -> Iterator[CheckResult]:
    """Check the coordinator's certificate: who signed it, for what and which names, and its key."""
    certificate = read_certificate(site.coordinator / "server.crt")
    for message in _find_certificate_faults(site, certificate):
        yield CheckResult("fault", message, REISSUE_COMMAND)


def _find_certificate_faults(site: Provisioning, certificate: x509.Certificate) -> Iterator[str]:
    authority = read_certificate(site.folder / "ca.crt")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        yield "server.crt was not signed by ca.crt"
    if is_authority(certificate):
        yield "server.crt is an authority's certificate, which could sign others that the hospitals trust"
    if not has_private_key(certificate, site.coordinator / "server.key"):
        yield "server.key is missing, or is not the key of server.crt"
    needed = set(list_certificate_names(site.federation.host, site.federation.sans))
    missing = needed - read_certificate_names(certificate)
    if missing:
        names = ", ".join(sorted(missing))
        yield f"server.crt is not for {names}, which {site.federation_path.name} names"


def _check_file_modes(site: Provisioning) -> Iterator[CheckResult]:
    private_files = [site.folder / "ca.key"]
    private_files += [site.coordinator / name for name in ("server.key", *SECRET_FILES, "pgpass")]
    private_files += [*(site.folder / "keys").glob("*"), *(site.folder / "kits").glob("*")]
    for path in private_files:
        if path.exists() and path.stat().st_mode & 0o077:
            yield CheckResult("fault", f"{path} can be read by others", f"chmod 600 {path}")


def _check_enrolment(site: Provisioning, centre: str) -> CheckResult:
    public = site.public_key_path(centre)
    if not public.exists():
        remedy = f"consilium-server provision, or --reissue {centre} if it was revoked"
        return CheckResult("warning", f"{centre}: not enrolled", remedy)
    has_kit = (site.folder / "kits" / f"{centre}.tar.gz").exists()
    kit = "kit ready" if has_kit else "no kit here"
    return CheckResult("ok", f"{centre}: enrolled with key {key_fingerprint(public.read_text())}, {kit}")


def _check_shared_keys(site: Provisioning) -> Iterator[CheckResult]:
    """Check that no two centres have one key: to the SuperLink they would be one."""
    owners: dict[str, str] = {}
    for path in sorted((site.coordinator / "centres").glob("*.pub")):
        try:
            key = read_public_key(path)
        except ConsiliumError as error:
            yield CheckResult("fault", str(error), f"--reissue {path.stem}")
            continue
        if key in owners:
            message = f"{owners[key]} and {path.stem} have one key"
            yield CheckResult(
                "fault", message, f"revoke both, and make a new key for each: --reissue {path.stem}"
            )
        owners.setdefault(key, path.stem)
