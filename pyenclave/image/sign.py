"""
Signing images: in one step with a key, or in two with a key that never comes here (an HSM).

The signature is deterministic: the same image, key and date give the same bytes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from pyenclave.errors import SignatureError
from pyenclave.formats.image import Image, with_sigstruct
from pyenclave.image import keys
from pyenclave.measurement.image import (
    DEFAULT_DATE,
    draft_sigstruct,
    measure_image,
    verify_image,
)
from pyenclave.measurement.sgx import compute_q1_q2, sign_message

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyenclave.formats.sgx import Sigstruct

__all__ = [
    "attach_signature",
    "bcd_date",
    "sign",
    "signing_digest",
    "signing_message",
    "unsign",
]

_RSA_SIZE = keys.KEY_BITS // 8


def bcd_date(epoch: int) -> int:
    """
    Return SIGSTRUCT's form of a day.

    Args:
        epoch: Seconds since 1970, as SOURCE_DATE_EPOCH has them.

    Raises:
        ValueError: Not a time of the years 1970 to 9999.

    """
    if epoch < 0:
        raise ValueError("a date before 1970")
    try:
        day = dt.datetime.fromtimestamp(epoch, dt.UTC)
    except (OverflowError, OSError) as error:
        raise ValueError(f"not a date: {error}") from None
    return int(f"{day.year:04}{day.month:02}{day.day:02}", 16)


def _draft(data: Buffer, date: int) -> tuple[Image, Sigstruct]:
    image = Image.parse(data)
    return image, draft_sigstruct(image, measure_image(image), date=date)


def sign(
    image: Buffer,
    private_key_pem: bytes,
    *,
    passphrase: bytes | None = None,
    date: int = DEFAULT_DATE,
) -> bytes:
    """
    Sign an image; a signature that it has is replaced.

    Args:
        image: The bytes of the image.
        private_key_pem: RSA-3072 with exponent 3, as ``keygen`` makes it.
        passphrase: If the key is encrypted.
        date: SIGSTRUCT's DATE (``bcd_date``); not measured.

    Returns:
        The bytes of the signed image.

    Raises:
        ImageError: The bytes are not an image.
        SignatureError: The key cannot sign images.

    """
    key = keys.load_private(private_key_pem, passphrase)
    parsed, draft = _draft(image, date)
    signature = key.sign(sign_message(draft), padding.PKCS1v15(), hashes.SHA256())
    return _attach(parsed, draft, key.public_key().public_numbers().n, signature)


def signing_message(image: Buffer, *, date: int = DEFAULT_DATE) -> bytes:
    """
    Return the 256 bytes that a signer signs: first step, for an HSM that hashes itself.

    Args:
        image: The bytes of the image.
        date: SIGSTRUCT's DATE; the second step must be given the same.

    Raises:
        ImageError: The bytes are not an image.

    """
    return sign_message(_draft(image, date)[1])


def signing_digest(image: Buffer, *, date: int = DEFAULT_DATE) -> bytes:
    """Return SHA-256 of ``signing_message``: first step, for an HSM that is given the hash."""
    return hashlib.sha256(signing_message(image, date=date)).digest()


def attach_signature(
    image: Buffer, public_key_pem: bytes, signature: bytes, *, date: int = DEFAULT_DATE
) -> bytes:
    """
    Attach a signature that was made elsewhere: second step.

    Args:
        image: The bytes of the image of the first step.
        public_key_pem: The signer's public key.
        signature: RSASSA-PKCS1-v1_5 with SHA-256 over ``signing_message``, 384 bytes, big-endian
            as every HSM and ``openssl dgst -sign`` gives it.
        date: SIGSTRUCT's DATE, as in the first step.

    Returns:
        The bytes of the signed image: the same as from ``sign`` with that key.

    Raises:
        ImageError: The bytes are not an image.
        SignatureError: The key is of another kind, or the signature is not its signature of this
            image and date.

    """
    key = keys.load_public(public_key_pem)
    if len(signature) != _RSA_SIZE:
        raise SignatureError(
            "the signature has a wrong length", expected=_RSA_SIZE, found=len(signature)
        )
    parsed, draft = _draft(image, date)
    return _attach(parsed, draft, key.public_numbers().n, signature)


def unsign(image: Buffer) -> bytes:
    """Return the image without its signature."""
    return with_sigstruct(Image.parse(image), bytes(1808))


def _attach(image: Image, draft: Sigstruct, modulus: int, signature: bytes) -> bytes:
    stored_modulus = modulus.to_bytes(_RSA_SIZE, "little")
    stored_signature = signature[::-1]
    q1, q2 = compute_q1_q2(stored_modulus, stored_signature)
    whole = replace(draft, modulus=stored_modulus, signature=stored_signature, q1=q1, q2=q2)
    data = with_sigstruct(image, whole.to_bytes())
    # Nothing leaves here that would not launch: a wrong HSM key or date is found now.
    verify_image(Image.parse(data))
    return data
