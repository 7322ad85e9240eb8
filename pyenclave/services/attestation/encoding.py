"""
Binary values in requests: base64url, and what Azure's clients send beside it.

The SDKs send base64url without padding, the public SEV-SNP client pads it, and the published
examples have the standard alphabet. The service takes these and nothing else: one alphabet at a
time, padding whole or absent, no white space, no bits after the last byte.
"""

from __future__ import annotations

from typing import Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose

__all__ = ["decode"]

_URL: Final = str.maketrans("+/", "-_")


def decode(value: object, what: str, *, limit: int) -> bytes:
    """
    Return the bytes of *value*.

    Args:
        value: Text in base64url or base64, padded or not.
        what: Name of the member, for errors.
        limit: Most bytes that it may have.

    Raises:
        EvidenceFormatError: Not text, too long, or not base64 in one of the accepted ways.

    """
    if not isinstance(value, str):
        raise EvidenceFormatError(
            f"{what}: not text", expected="base64url", found=type(value).__name__
        )
    if len(value) > limit * 4 // 3 + 4:
        raise EvidenceFormatError(
            f"{what}: too long", expected=f"at most {limit} bytes", found=f"{len(value)} characters"
        )
    bare = value
    if value.endswith("="):
        bare = value[:-2] if value.endswith("==") else value[:-1]
        if len(value) % 4:
            raise EvidenceFormatError(f"{what}: not base64url", found="padding in part")
    if "+" in bare or "/" in bare:
        if "-" in bare or "_" in bare:
            raise EvidenceFormatError(f"{what}: not base64url", found="two alphabets at once")
        bare = bare.translate(_URL)
    return jose.b64url_decode(bare, what)
