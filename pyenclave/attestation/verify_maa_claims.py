"""
Decoded tokens of Azure Attestation (``maa-claims``): readable, never genuine.

Portals and debuggers show tokens decoded. The claims are told; whether Azure ever said so only the
token itself, with its signature, can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import (
    BREAKS,
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
)
from pyenclave.attestation.unsigned import register_unsigned
from pyenclave.errors import EnclaveError
from pyenclave.formats.decoded_token import DecodedToken

__all__ = ["CHECKS", "Case", "claims"]


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A decoded token, and what it is judged by."""

    def read_token(self) -> DecodedToken:
        """Read the text."""
        return self._part("token", lambda: DecodedToken.from_bytes(self.data))

    @property
    def token(self) -> DecodedToken:
        """What was read, for other checks."""
        return self.need("claims.format", self.read_token)


CHECKS: Final[Registry[Case]] = Registry()


@CHECKS.evidence("claims.format")
def _format(case: Case) -> Verdict:
    """The text is one JSON object (claims) or two (header and claims)."""
    case.read_token()
    return PASSED


register_unsigned(
    CHECKS,
    "claims.signature",
    what="a decoded token",
    advice="Give the token itself: three parts in base64url with dots between.",
)


def claims(case: Case) -> Mapping[str, Any]:
    """Return header and claims, as far as they can be read."""
    try:
        token = case.token
    except (EnclaveError, NotReachedError, *BREAKS):  # the checks say what is wrong
        return {}
    header = dict(token.header) if token.header is not None else None
    return {
        "header": header,
        "claims": dict(token.claims),
        "alg": header.get("alg") if header else None,
        "issuer": token.issuer or None,
        "signature_ok": None,
    }
