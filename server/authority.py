"""The federation's own certificate authority, and the coordinator's certificate. Made offline, with the `cryptography` library."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConsiliumError
from common.findings import Finding
from common.keys import write_private
from common.reach import expires

INSIDE = ["superlink", "localhost", "127.0.0.1"]  # what the coordinator's own parts call it
YEARS = 10


def make_authority(folder: Path, name: str) -> None:
    """ca.key (0600) and ca.crt. Raises FileExistsError."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} certificate authority")])
    builder = _builder(subject, subject, key.public_key(), key.public_key(), 365 * YEARS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    write_private(folder / "ca.key", _pem(key))
    (folder / "ca.crt").write_bytes(_usage(builder, signs_certificates=True).sign(key, hashes.SHA384()).public_bytes(form.Encoding.PEM))


def make_certificate(folder: Path, authority: Path, host: str, sans: list[str], days: int) -> None:
    """server.key (0600) and server.crt, a chain of one, for `host`, `sans` and the names used inside. Raises FileExistsError, ConsiliumError."""
    try:
        ca_key = form.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    except OSError as error:
        raise ConsiliumError(
            f"{authority / 'ca.key'} is needed to make a certificate and cannot be read; bring it back for this"
        ) from error
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = read_certificate(authority / "ca.crt")
    key = ec.generate_private_key(ec.SECP384R1())
    left = (ca.not_valid_after_utc - dt.datetime.now(dt.UTC)).days
    builder = _builder(_common_name(host), ca.subject, key.public_key(), ca_key.public_key(), min(days, left))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(n) for n in names(host, sans)]), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    write_private(folder / "server.key", _pem(key))
    certificate = _usage(builder, signs_certificates=False).sign(ca_key, hashes.SHA384())
    (folder / "server.crt").write_bytes(certificate.public_bytes(form.Encoding.PEM))


def names(host: str, sans: list[str]) -> list[str]:
    """All that the certificate is for, each once."""
    return list(dict.fromkeys([host, *sans, *INSIDE]))


def names_of(certificate: x509.Certificate) -> set[str]:
    """What a certificate is for."""
    return {str(n.value) for n in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value}


def read_certificate(path: Path) -> x509.Certificate:
    """Raises ConsiliumError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConsiliumError(
            f"{path} cannot be read as a certificate ({type(error).__name__}); run `consilium-server provision`"
        ) from error


def expiry(path: Path, warn: int, remedy: str) -> Finding:
    """How long a certificate is still good for."""
    try:
        until = read_certificate(path).not_valid_after_utc
    except ConsiliumError as error:
        return Finding("fault", str(error))
    return expires(path.name, until, warn, remedy)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey, days: int
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


def _usage(builder: x509.CertificateBuilder, signs_certificates: bool) -> x509.CertificateBuilder:
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


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
