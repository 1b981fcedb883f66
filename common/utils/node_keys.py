"""Generate and read a centre's key pair, by which the SuperLink recognises its SuperNode.

Flower's SuperNode authentication uses elliptic-curve signatures. Keys are stored in OpenSSH's format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError

CREATE_KEY_HINT = "create one with `consilium-centre key`"


def write_secret_file(path: Path, content: bytes) -> None:
    """Create a file that only its owner can ever read, whole or not at all.

    Raises:
        ConsiliumError: The file exists; a secret is never overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or path.is_symlink():
        raise ConsiliumError(
            f"{path} exists, and a secret is never overwritten; move it away first, or use another path"
        )
    atomic_write(path, content, mode=0o600)


def generate_key(path: Path) -> None:
    """Generate a private key on the curve P-384 and write it to a file.

    Raises:
        ConsiliumError: The file exists.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret_file(path, content)


def extract_public_key(path: Path) -> str:
    """Return the public key, in one line, of a file with a private key.

    Raises:
        ConsiliumError: The file does not contain such a key.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConsiliumError(
            f"{path} is not a private key in OpenSSH's format without a passphrase; {CREATE_KEY_HINT}"
        ) from error
    public_bytes = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return public_bytes.decode()


def read_public_key(path: Path) -> str:
    """Return the public key, in one line without its comment, of a file with a public key.

    Raises:
        ConsiliumError: The file does not contain such a key; above all, if it contains a private one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            f"{path} cannot be read ({error.strerror}); use the file with a centre's public key"
        ) from error
    if b"PRIVATE" in content:
        raise ConsiliumError(
            f"{path} is a private key, which must not leave its centre; send the file that ends in .pub"
        )
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConsiliumError(
            f"{path} does not contain a public key in OpenSSH's format; {CREATE_KEY_HINT}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConsiliumError(f"{path} is not an elliptic-curve key, which Flower requires; {CREATE_KEY_HINT}")
    public_bytes = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public_bytes.decode()


def to_pem(public_key: str) -> bytes:
    """Return a public key in the format of Flower's messages."""
    key = serialization.load_ssh_public_key(public_key.encode())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_fingerprint(public_key: str) -> str:
    """Return eight hex digits by which people can tell public keys apart."""
    encoded_key = public_key.split()[1]
    return hashlib.sha256(encoded_key.encode()).hexdigest()[:8]
