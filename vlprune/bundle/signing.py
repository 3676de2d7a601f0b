"""Ed25519 signatures (RFC 8032) of a bundle's manifest, by the package cryptography, which only this needs.

A key pair in files: openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MachineError, RequestError


SIZE = 64  # bytes of a signature
_LARGEST = 1 << 16  # bytes of a key file


def sign(text: bytes, key: Path) -> bytes:
    """Sign a text; the same key and text give the same signature.

    Args:
        text: the manifest.
        key: private key file, PEM, without a password.

    Returns:
        bytes: the signature, 64 of them.

    Raises:
        RequestError: the file holds no such key.
        MachineError: the package cryptography is missing.
    """
    private, _ = _kinds()
    found = _load(key, "load_pem_private_key", password=None)
    if not isinstance(found, private):
        raise RequestError(f"{key} is no Ed25519 private key: openssl genpkey -algorithm ed25519 -out key.pem")
    return bytes(found.sign(text))


def check(text: bytes, signature: bytes, key: Path) -> None:
    """Check a signature.

    Args:
        text: the manifest.
        signature: that came with it.
        key: public key file, PEM.

    Raises:
        RequestError: the signature is not of this text by this key, or the file holds no such key.
        MachineError: the package cryptography is missing.
    """
    _, public = _kinds()
    found = _load(key, "load_pem_public_key")
    if not isinstance(found, public):
        raise RequestError(f"{key} is no Ed25519 public key: openssl pkey -in key.pem -pubout -out public.pem")
    from cryptography.exceptions import InvalidSignature

    try:
        found.verify(signature, text)
    except InvalidSignature as error:
        raise RequestError(f"the signature of the bundle is not by {key}: do not use the bundle") from error


def _kinds() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        package = __name__.partition(".")[0].replace("_", "-")
        raise MachineError(f"signatures need the package cryptography: pip install '{package}[sign]'") from error
    return ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey


def _load(path: Path, loader: str, **options: Any) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise RequestError(f"cannot read the key {path} ({error.strerror})") from error
    try:
        return getattr(serialization, loader)(data, **options)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "private" if "private" in loader else "public"
        raise RequestError(f"{path} holds no {what} key in PEM without a password: give an Ed25519 key") from error
