"""
MRENCLAVE of an image, and the identity that its SIGSTRUCT proves.

The algorithm is SGX's (Intel SDM vol. 3D: ECREATE, EADD, EEXTEND, EINIT); the pages are those of
``docs/formats/image.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyenclave.errors import SignatureError
from pyenclave.formats.image import Image
from pyenclave.formats.sgx import (
    FLAG_DEBUG,
    FLAG_INITTED,
    FLAG_MODE64BIT,
    XFRM_LEGACY,
    Attributes,
    Sigstruct,
)
from pyenclave.measurement._records import begin
from pyenclave.measurement.sgx import mrsigner, verify_sigstruct

__all__ = ["DEFAULT_DATE", "SignedIdentity", "draft_sigstruct", "measure_image", "verify_image"]

# BCD yyyymmdd, as SIGSTRUCT has it. Fixed, so that signing again gives the same bytes.
DEFAULT_DATE = 0x19700101

_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIdentity:
    """
    Who an enclave is.

    Attributes:
        mrenclave: The measurement.
        mrsigner: SHA-256 of the signer's modulus; 32 zero bytes for an unsigned image.
        product_id: ISVPRODID.
        security_version: ISVSVN.
        attributes: What the signature demands of the launch's attributes.
        attribute_mask: Which bits of them are demanded.
        signed: Whether there is a signature; what is unsigned launches only as debug.
        debug_allowed: Whether it may be launched as debug.

    """

    mrenclave: bytes
    mrsigner: bytes
    product_id: int
    security_version: int
    attributes: Attributes
    attribute_mask: Attributes
    signed: bool
    debug_allowed: bool


def measure_image(image: Image) -> bytes:
    """
    Compute MRENCLAVE of an image.

    Args:
        image: A parsed image.

    Returns:
        The 32 bytes.

    """
    measurement = begin(image.size, image.ssa_frame_size)
    for offset, flags, pages in image.runs():
        measurement.add_pages(pages, offset, flags, True)
    return measurement.digest()


def draft_sigstruct(image: Image, mrenclave: bytes, *, date: int = DEFAULT_DATE) -> Sigstruct:
    """
    Return the SIGSTRUCT that an image must have, but for key and signature.

    Args:
        image: A parsed image.
        mrenclave: Its measurement.
        date: BCD yyyymmdd.

    """
    # INITTED is set by EINIT itself; DEBUG is free only where the manifest allows it.
    free = FLAG_INITTED | (FLAG_DEBUG if image.info.debug else 0)
    return Sigstruct(
        date=date,
        attributes=Attributes(flags=FLAG_MODE64BIT, xfrm=XFRM_LEGACY),
        attribute_mask=Attributes(flags=_ALL & ~free, xfrm=_ALL),
        mrenclave=mrenclave,
        isv_prod_id=image.info.product_id,
        isv_svn=image.info.security_version,
    )


def verify_image(image: Image) -> SignedIdentity:
    """
    Measure an image and verify its signature, if it has one.

    Args:
        image: A parsed image; untrusted input.

    Returns:
        Its identity. Whether its signer is to be trusted is the caller's question.

    Raises:
        SignatureError: The signature does not hold, or is that of something else.

    """
    mrenclave = measure_image(image)
    if not image.signed:
        draft = draft_sigstruct(image, mrenclave)
        # What is unsigned launches as debug, whatever the manifest says.
        mask = replace(draft.attribute_mask, flags=draft.attribute_mask.flags & ~FLAG_DEBUG)
        draft = replace(draft, attribute_mask=mask)
        signer = bytes(32)
    else:
        found = Sigstruct.from_bytes(image.sigstruct_bytes)
        verify_sigstruct(found)
        draft = draft_sigstruct(image, mrenclave, date=found.date)
        _compare(draft, found)
        signer = mrsigner(found.modulus)
    return SignedIdentity(
        mrenclave=mrenclave,
        mrsigner=signer,
        product_id=image.info.product_id,
        security_version=image.info.security_version,
        attributes=draft.attributes,
        attribute_mask=draft.attribute_mask,
        signed=image.signed,
        debug_allowed=image.info.debug or not image.signed,
    )


_KEY_FIELDS = ("modulus", "signature", "q1", "q2")


def _compare(expected: Sigstruct, found: Sigstruct) -> None:
    """Refuse a SIGSTRUCT that says anything else than the image."""
    for name in Sigstruct.__dataclass_fields__:
        want, have = getattr(expected, name), getattr(found, name)
        if name not in _KEY_FIELDS and want != have:
            raise SignatureError(
                f"SIGSTRUCT was made for another image: {name} differs",
                expected=want.hex() if isinstance(want, bytes) else want,
                found=have.hex() if isinstance(have, bytes) else have,
            )
