"""The one who asks, as a validated token names him."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Caller"]


@dataclass(frozen=True, slots=True)
class Caller:
    """
    The principal of a validated token.

    Attributes:
        tenant: Tenant that he belongs to; with *object_id* his identity, and nothing else is.
        object_id: His identifier in that tenant.
        client_id: The application that asks, in its own name or in a user's.
        kind: ``app``: an application in its own name; ``user``: one in the name of a user.
        token_digest: SHA-256 of the token, hex, for logs; the token itself is kept nowhere.
        expires: When the token ends, seconds since 1970.

    """

    tenant: str
    object_id: str
    client_id: str | None
    kind: Literal["user", "app"]
    token_digest: str
    expires: float

    @property
    def name(self) -> str:
        """Tenant and object identifier as one word."""
        return f"{self.tenant}/{self.object_id}"
