"""
Tokens that somebody decoded: the claims as JSON, often with the header above them.

Such a text has lost its signature. It can be read and proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jsonstrict

__all__ = ["MAX_SIZE", "DecodedToken"]

MAX_SIZE: Final = jsonstrict.MAX_SIZE
# A string, or a bracket outside of one; a string that never ends matches too, so one pass is all.
_MARK: Final = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def _end_of_object(data: bytes) -> int:
    """Return where the first value in brackets ends; the size of *data* if it never does."""
    depth = 0
    for mark in _MARK.finditer(data):
        byte = mark.group()[:1]
        if byte in b"{[":
            depth += 1
        elif byte in b"}]":
            depth -= 1
            if depth <= 0:
                return mark.end()
    return len(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedToken:
    """
    A decoded token.

    Attributes:
        header: The header; None if only the claims are there.
        claims: The claims.
    """

    header: Mapping[str, Any] | None
    claims: Mapping[str, Any]

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "decoded token") -> Self:
        """
        Read one JSON object (claims) or two (header and claims).

        Raises:
            EvidenceFormatError: Malformed, something else, or too large.

        """
        if len(data) > MAX_SIZE:
            raise EvidenceFormatError(
                f"{what}: too large", expected=f"at most {MAX_SIZE} bytes", found=len(data)
            )
        end = _end_of_object(data)
        if not data[end:].strip(b" \t\r\n"):
            return cls(header=None, claims=jsonstrict.object_of(data, what))
        return cls(
            header=jsonstrict.object_of(data[:end], f"{what}: header"),
            claims=jsonstrict.object_of(data[end:], f"{what}: claims"),
        )

    @property
    def issuer(self) -> str:
        """Who issued the token, as it says; empty if it does not."""
        found = self.claims.get("iss")
        return found if isinstance(found, str) else ""

    @property
    def is_maa(self) -> bool:
        """Whether the claims look like those of Azure Attestation."""
        return ".attest.azure." in self.issuer or any(
            name.startswith(("x-ms-", "maa-")) for name in self.claims
        )
