"""Encrypted files: AES-256-GCM with a key derived by scrypt (RFC 7914) from the user's passphrase.

Layout: 8 bytes magic with the version, 16 bytes salt, 12 bytes nonce, then the ciphertext with its 16-byte tag. The
header is authenticated too. The cost of scrypt belongs to the version, so that a stranger's file cannot set it.
"""

from __future__ import annotations

import os

from kinegraph.errors import CheckpointError, Problem

MAGIC = b"KGENC\x00\x00\x01"
SALT_BYTES = 16
NONCE_BYTES = 12
HEADER_BYTES = len(MAGIC) + SALT_BYTES + NONCE_BYTES
SCRYPT_COST = 2**15


def is_encrypted(content: bytes) -> bool:
    """Whether bytes (the first 8 suffice) begin an encrypted file of any version."""
    return content[:6] == MAGIC[:6]


def encrypt(plain: bytes, passphrase: str) -> bytes:
    """Encrypt and authenticate bytes with a passphrase."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = MAGIC + os.urandom(SALT_BYTES) + os.urandom(NONCE_BYTES)
    cipher = AESGCM(_derive_key(passphrase, header))
    return header + cipher.encrypt(header[-NONCE_BYTES:], plain, header)


def decrypt(content: bytes, passphrase: str, where: str) -> bytes:
    """The bytes given to `encrypt`. Raises CheckpointError for a missing or wrong key, or a changed file."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if not passphrase:
        hint = "Set encryption_key in the spec or the environment variable KINEGRAPH_ENCRYPTION_KEY."
        raise CheckpointError(Problem(where, "an encrypted checkpoint and no key", "the key it was made with", hint))
    if content[: len(MAGIC)] != MAGIC or len(content) < HEADER_BYTES + 16:
        got = f"encryption version {content[7] if len(content) > 7 else '?'} or a cut file"
        raise CheckpointError(Problem(where, got, "version 1", "Use the Kinegraph that wrote it, or copy it again."))
    header = content[:HEADER_BYTES]
    try:
        return AESGCM(_derive_key(passphrase, header)).decrypt(header[-NONCE_BYTES:], content[HEADER_BYTES:], header)
    except InvalidTag:
        expected = "the key it was made with and an unchanged file"
        raise CheckpointError(Problem(where, "a wrong key, or a changed file", expected)) from None


def _derive_key(passphrase: str, header: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    salt = header[len(MAGIC) : len(MAGIC) + SALT_BYTES]
    return Scrypt(salt=salt, length=32, n=SCRYPT_COST, r=8, p=1).derive(passphrase.encode())
