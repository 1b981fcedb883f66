"""Make the federation's own certificate authority and the coordinator's certificate, offline."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.utils.atomic_files import atomic_write
from common.utils.checks import CheckResult
from common.utils.errors import ConsiliumError
from common.utils.node_keys import write_secret_file
from common.utils.tls_checks import check_expiry

INTERNAL_NAMES = ["superlink", "localhost", "127.0.0.1"]  # what the coordinator's own parts call it
AUTHORITY_VALIDITY_YEARS = 10


def make_authority(folder: Path, name: str) -> None:
    """Write ca.key (0600), or take the one that is there without a certificate, and ca.crt.

    Raises:
        ConsiliumError: ca.key cannot be read.
    """
    key = _load_or_make_key(folder / "ca.key")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} certificate authority")])
    validity_days = 365 * AUTHORITY_VALIDITY_YEARS
    builder = _certificate_builder(subject, subject, key.public_key(), key.public_key(), validity_days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = _add_key_usage(builder, signs_certificates=True).sign(key, hashes.SHA384())
    atomic_write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_certificate(folder: Path, authority: Path, host: str, sans: list[str], days: int) -> None:
    """Write server.key (0600) and server.crt, for `host`, `sans` and the names used inside the coordinator.

    A key that is there is taken: an earlier attempt was interrupted before the certificate.

    Raises:
        ConsiliumError: one of the keys cannot be read.
    """
    try:
        ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    except OSError as error:
        raise ConsiliumError(
            f"{authority / 'ca.key'} cannot be read, and a certificate cannot be signed without it; "
            "bring it back for this"
        ) from error
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = read_certificate(authority / "ca.crt")
    key = _load_or_make_key(folder / "server.key")
    days_left = (ca.not_valid_after_utc - dt.datetime.now(dt.UTC)).days
    builder = _certificate_builder(
        _common_name(host), ca.subject, key.public_key(), ca_key.public_key(), min(days, days_left)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    alternative_names = [_to_general_name(name) for name in list_certificate_names(host, sans)]
    builder = builder.add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    certificate = _add_key_usage(builder, signs_certificates=False).sign(ca_key, hashes.SHA384())
    atomic_write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in a file, which is made (0600) where it is missing."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_secret_file(path, _encode_private_key(key))
        return key
    loaded_key = _load_private_key(path)
    if loaded_key is None:
        raise ConsiliumError(
            f"{path} is not a private key on an elliptic curve; move it away, and repeat this"
        )
    return loaded_key


def _load_private_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """Return the private key in a file; None where there is none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def has_private_key(certificate: x509.Certificate, path: Path) -> bool:
    """Return whether a file holds the private key of a certificate."""
    key = _load_private_key(path)
    return key is not None and key.public_key() == certificate.public_key()


def is_authority(certificate: x509.Certificate) -> bool:
    """Return whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def list_certificate_names(host: str, sans: list[str]) -> list[str]:
    """Return all names that the certificate is for, each once."""
    return list(dict.fromkeys([host, *sans, *INTERNAL_NAMES]))


def read_certificate_names(certificate: x509.Certificate) -> set[str]:
    """Return the names that a certificate is for."""
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(name.value) for name in extension.value}


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate.

    Raises:
        ConsiliumError: it is missing or damaged.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConsiliumError(
            f"{path} cannot be read as a certificate ({type(error).__name__}); run `consilium-server "
            "provision`"
        ) from error


def check_certificate_expiry(path: Path, warn_days: int, remedy: str) -> CheckResult:
    """Check how long a certificate is still valid."""
    try:
        until = read_certificate(path).not_valid_after_utc
    except ConsiliumError as error:
        return CheckResult("fault", str(error))
    return check_expiry(path.name, until, warn_days, remedy)


def _certificate_builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))  # a hospital's clock may be a little behind
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _add_key_usage(builder: x509.CertificateBuilder, signs_certificates: bool) -> x509.CertificateBuilder:
    return builder.add_extension(
        x509.KeyUsage(
            digital_signature=not signs_certificates,
            key_cert_sign=signs_certificates,
            crl_sign=signs_certificates,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        ),
        critical=True,
    )


def _common_name(host: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])


def _to_general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _encode_private_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
