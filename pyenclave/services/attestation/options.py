"""Settings of an attestation service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from pyenclave.formats.ear import Form
from pyenclave.services.attestation.keys import Schedule
from pyenclave.services.attestation.tokens import ALGORITHMS, Algorithm

__all__ = ["Options"]

_LEGACY: Final = frozenset({"2020-10-01", "2023-04-01-preview"})


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """
    Settings.

    Attributes:
        url: Public address without a slash at the end; the issuer of the tokens.
        algorithm: What tokens are signed with.
        legacy_algorithm: The same for api-version 2020-10-01 and 2023-04-01-preview, whose clients
            verify RS256 and nothing else.
        roots: Roots of platforms besides the vendors' own, PEM or DER.
        signers: Certificates (PEM) whose keys may sign policies: the instance is isolated, and a
            policy without such a signature is refused. Empty: whoever has the role sets policies.
            They are written at the first start; afterwards the database has them.
        require_signed_use: Whether an isolated instance takes only uploads whose signed header says
            what they are for (`uploads.USE`). Azure's clients do not write it; without it, who has
            an upload that was never used chooses what it is used for.
        ear_form: How EARs are written (`pyenclave.formats.ear.PROFILES`).
        attest_identity: Whether attesting needs an authenticated caller.
        open_drafts: Whether anybody may try policies (``draftPolicyForAttestation``): for
            development. Else a caller needs a role that reads policies.
        dangerous_allow_software: Whether the default policy of ``PyEnclave`` permits platforms
            without hardware below (``x-pyenclave-tee`` = ``none``): for development.
        dangerous_evidence_time: Evidence and collateral are judged as of this time, for recorded
            evidence, in development. Each token has it as ``x-pyenclave-evidence-time``; its own
            times are those of `clock`.
        schedule: Of the signing keys.
        explain: Whether a caller is told which rules of the policy fired: for development. A policy
            may be secret, so else only the record has it.
        nonce_seconds: How long a nonce of the service may be used.
        clock: Gives the time, with its zone.
    """

    url: str
    algorithm: Algorithm = "RS256"
    legacy_algorithm: Algorithm = "RS256"
    roots: tuple[bytes, ...] = ()
    signers: tuple[bytes, ...] = ()
    require_signed_use: bool = False
    ear_form: Form = "dotted"
    attest_identity: bool = False
    open_drafts: bool = False
    dangerous_allow_software: bool = False
    dangerous_evidence_time: datetime | None = None
    schedule: Schedule = field(default_factory=Schedule)
    nonce_seconds: int = 300
    explain: bool = False
    clock: Callable[[], datetime] = _now

    def __post_init__(self) -> None:
        for name in (self.algorithm, self.legacy_algorithm):
            if name not in ALGORITHMS:
                raise ValueError(f"an algorithm is one of {', '.join(ALGORITHMS)}, not {name!r}")
        if not self.url.startswith(("https://", "http://")) or self.url.endswith("/"):
            raise ValueError(f"url is https://HOST without a slash at the end, not {self.url!r}")
        told = self.dangerous_evidence_time
        if told is not None and told.tzinfo is None:
            raise ValueError("a time of evidence has a zone")
        if not 1 <= self.nonce_seconds <= 86_400:
            raise ValueError("a nonce holds a second to a day")

    @property
    def marks(self) -> dict[str, str]:
        """What every token says of these settings, so that nobody takes it for another."""
        told = self.dangerous_evidence_time
        return {} if told is None else {"x-pyenclave-evidence-time": told.isoformat()}

    def signs(self, api_version: str) -> Algorithm:
        """Return what signs the answers to requests of *api_version*."""
        return self.legacy_algorithm if api_version in _LEGACY else self.algorithm

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """What there are keys for."""
        return tuple(dict.fromkeys((self.algorithm, self.legacy_algorithm)))
