"""OpenSSF model signatures by a local elliptic-curve key: who may say what the service loads.

Source: the model_signing library, signatures over a manifest of every file's SHA-256.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from model_signing import signing, verifying

from robustkit.errors import RobustkitError

PRIVATE, PUBLIC = "signing.key", "signing.pub"


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A P-256 pair, signing.key (its owner's alone) and signing.pub; what is there already is kept.

    Randomness: the operating system's.
    """
    private, public = folder / PRIVATE, folder / PUBLIC
    if not public.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def sign(model: Path, signature: Path, key: Path) -> None:
    """Sign every file in the folder `model`."""
    signing.Config().use_elliptic_key_signer(private_key=key).sign(model, signature)  # type: ignore[no-untyped-call]


def verify(model: Path, signature: Path, key: Path) -> None:
    """Raises: RobustkitError unless the folder holds exactly what was signed with that key's other half."""
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=key).verify(model, signature)  # type: ignore[no-untyped-call]
    # The library raises what its parts raise: of JSON, of base64, of the manifest, of cryptography.
    except Exception as error:
        raise RobustkitError(
            f"{model.name} does not carry a valid signature ({type(error).__name__}); sign it with the key "
            f"whose public half is {key.name}."
        ) from error
