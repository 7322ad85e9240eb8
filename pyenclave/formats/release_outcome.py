"""
What came out of a decision about a release ↔ bytes: for the audit log, and out of an enclave.

`pyenclave.formats.release_decision` has the decision itself. Of a token this holds what names it
and what was judged of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.release_decision import Decision, Step

__all__ = ["MAX_OUTCOME", "JudgedToken", "JudgedTransfer", "Outcome"]

MAX_OUTCOME: Final = 256 << 10  # bytes
_TOO_LARGE: Final = "(too large to be kept)"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedToken:
    """
    What names a token.

    Attributes:
        issuer: Who made it, as authorities are compared.
        digest: SHA-256 of the token, hexadecimal, as the following.
        payload_digest: Of its claims' bytes.
        signed_digest: Of what is signed: the signature itself may have a twin.
        token_id: Its ``jti``, if it has one.
        expires: Its ``exp``; 0 if that is no number.
    """

    issuer: str
    digest: str
    payload_digest: str
    signed_digest: str
    token_id: str | None
    expires: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedTransfer:
    """
    The key that was wrapped for.

    Attributes:
        digest: SHA-256 of its modulus, hexadecimal.
        kid: Its name in the token.
        place: Where in the token it is.
    """

    digest: str
    kid: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """
    What came out.

    Attributes:
        held: Names of the conditions that hold, in order.
        failed: The one that does not.
        policy_hash: SHA-256 of the policy, hexadecimal.
        claims: The claims that were judged.
        token: The token, where it could be read.
        transfer: The key that was wrapped for; None if a condition does not hold.
    """

    held: tuple[str, ...] = ()
    failed: Step | None = None
    policy_hash: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)
    token: JudgedToken | None = None
    transfer: JudgedTransfer | None = None

    @classmethod
    def of(cls, decision: Decision) -> Self:
        """Return what is kept of *decision*."""
        token, transfer = None, None
        if (target := decision.target) is not None:
            end = target.claims.get("exp")
            token = JudgedToken(
                issuer=target.issuer,
                digest=target.digest.hex(),
                payload_digest=hashlib.sha256(target.jws.payload).hexdigest(),
                signed_digest=hashlib.sha256(target.jws.signed_bytes).hexdigest(),
                token_id=target.token_id,
                expires=end if isinstance(end, int) else 0,
            )
        if (chosen := decision.transfer) is not None:
            digest = hashlib.sha256(chosen.modulus).hexdigest()
            transfer = JudgedTransfer(digest=digest, kid=chosen.kid, place=chosen.place)
        return cls(
            held=tuple(step.name for step in decision.steps if step.holds),
            failed=decision.failed,
            policy_hash=decision.policy_hash,
            claims=decision.claims,
            token=token,
            transfer=transfer,
        )

    def to_bytes(self) -> bytes:
        """Return it as JSON; what is too large of the token's own words is left out."""
        failed = self.failed
        document: dict[str, Any] = {
            "held": list(self.held),
            "failed": failed and [failed.name, failed.expected, failed.found],
            "policy_hash": self.policy_hash,
            "claims": dict(self.claims),
            "token": self.token and asdict(self.token),
            "transfer": self.transfer and asdict(self.transfer),
        }
        data = json.dumps(document, separators=(",", ":")).encode("ascii")
        if len(data) > MAX_OUTCOME:
            document["claims"] = dict.fromkeys(list(self.claims)[:16], _TOO_LARGE)
            if failed is not None:
                document["failed"] = [failed.name, _TOO_LARGE, _TOO_LARGE]
            data = json.dumps(document, separators=(",", ":")).encode("ascii")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """
        Read what `to_bytes` wrote, in an enclave that the reader trusts as its own.

        Raises:
            EvidenceFormatError: It did not write that.

        """
        try:
            document = json.loads(data)
            failed, token, transfer = (document[name] for name in ("failed", "token", "transfer"))
            return cls(
                held=tuple(document["held"]),
                failed=failed and Step(failed[0], False, failed[1], failed[2]),
                policy_hash=document["policy_hash"],
                claims=document["claims"],
                token=token and JudgedToken(**token),
                transfer=transfer and JudgedTransfer(**transfer),
            )
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise EvidenceFormatError("outcome of a release", found=type(error).__name__) from None
