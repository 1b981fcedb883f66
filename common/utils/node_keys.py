"""A centre's key pair: by its EC signature a SuperNode is known to the SuperLink (Flower's SuperNode authentication). OpenSSH's own file format."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from common.utils.errors import ConsiliumError


def write_secret_file(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, from the first moment on. Raises ConsiliumError where there is one: no secret is ever replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except FileExistsError as error:
        raise ConsiliumError(
            f"{path} is there already and a secret is never replaced; move it away first, or give another place"
        ) from error


def generate_key(path: Path) -> None:
    """A new private key on P-384."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret_file(
        path, key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    )


def extract_public_key(path: Path) -> str:
    """The public line of a private key's file. Raises ConsiliumError."""
    try:
        key = form.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConsiliumError(
            f"{path} is no private key in OpenSSH's format without a passphrase; make one by `consilium-centre key`"
        ) from error
    return key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()


def read_public_key(path: Path) -> str:
    """The public line of a file, without its comment. Raises ConsiliumError for all else, a private key above all."""
    try:
        content = path.read_bytes()
        if b"PRIVATE" in content:
            raise ConsiliumError(
                f"{path} is a private key, which must not leave its centre; send the file that ends in .pub"
            )
        key = form.load_ssh_public_key(content)
    except OSError as error:
        raise ConsiliumError(
            f"{path} cannot be read ({error.strerror}); it is to be a centre's public key"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConsiliumError(
            f"{path} holds no public key in OpenSSH's format; make one by `consilium-centre key`"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConsiliumError(
            f"{path} is no elliptic-curve key, which Flower needs; make one by `consilium-centre key`"
        )
    return key.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()


def to_pem(public_key: str) -> bytes:
    """The public line as it travels in Flower's messages."""
    return form.load_ssh_public_key(public_key.encode()).public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )


def key_fingerprint(public_key: str) -> str:
    """Eight hex digits to tell keys apart by."""
    return hashlib.sha256(public_key.split()[1].encode()).hexdigest()[:8]
