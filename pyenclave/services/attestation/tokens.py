"""
Tokens of the service: JWTs with Azure's header, or EAT attestation results.

A draft policy's outcome is a token that nobody can validate: ``alg`` is ``none``, as Azure does it,
and a claim says so too.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Final, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pyenclave.attestation.ear import to_ear
from pyenclave.formats import jose
from pyenclave.formats.ear import Form
from pyenclave.formats.jwk import public_members
from pyenclave.services.attestation.decisions import Decision, StoredPolicy
from pyenclave.services.attestation.verification import Verified

__all__ = ["ALGORITHMS", "Algorithm", "Issued", "Issuer", "SigningKey", "unsecured"]

Algorithm = Literal["ES256", "RS256", "PS256"]
ALGORITHMS: Final[tuple[Algorithm, ...]] = ("ES256", "RS256", "PS256")
_ENCODE: Final = msgspec.json.Encoder().encode
_UNSECURED: Final = jose.b64url_encode(b'{"alg":"none","typ":"JWT"}')


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """
    A key that signs tokens.

    Attributes:
        kid: Its name in the key set.
        algorithm: What it signs with.
        private: The key.
        chain: Certificates, DER, leaf first.
        ends: No token that it signed holds longer.
    """

    kid: str
    algorithm: Algorithm
    private: jose.PrivateKey = field(repr=False)
    chain: tuple[bytes, ...] = field(repr=False)
    ends: datetime

    @cached_property
    def x5c(self) -> list[str]:
        """The certificates as tokens and key sets have them: base64 with padding."""
        return [base64.b64encode(item).decode("ascii") for item in self.chain]

    @cached_property
    def x5t(self) -> str:
        """SHA-1 of the certificate (RFC 7515, 4.1.7): a name, not a check."""
        digest = x509.load_der_x509_certificate(self.chain[0]).fingerprint(hashes.SHA1())  # noqa: S303
        return jose.b64url_encode(digest)

    @cached_property
    def jwk(self) -> dict[str, Any]:
        """The public key as ``/certs`` shows it."""
        return {
            "kid": self.kid,
            "use": "sig",
            "alg": self.algorithm,
            **public_members(self.private.public_key()),
            "x5c": self.x5c,
        }


_IDENTIFIERS: Final[list[str]] = []
os.register_at_fork(after_in_child=_IDENTIFIERS.clear)  # or two processes would use the same


def _identifier() -> str:
    """Return a fresh ``jti`` of 256 random bits; the system is asked for some at once."""
    try:
        return _IDENTIFIERS.pop()
    except IndexError:  # asked for, not looked at before: threads share the list
        drawn = os.urandom(32 * 32).hex()
        _IDENTIFIERS.extend([drawn[at : at + 64] for at in range(64, len(drawn), 64)])
        return drawn[:64]


def _json(value: Mapping[str, Any]) -> bytes:
    return _ENCODE(value)


def unsecured(claims: Mapping[str, Any]) -> str:
    """Return *claims* as a token without signature (RFC 7519, 6)."""
    return f"{_UNSECURED}.{jose.b64url_encode(_json(claims))}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """
    A token that was made.

    Attributes:
        token: The token.
        id: Its ``jti``.
        expires: Seconds since 1970.
    """

    token: str = field(repr=False)
    id: str
    expires: int


class Issuer:
    """
    Makes tokens.

    Args:
        url: The service's public address, without a slash at the end: ``iss``.
        ear_form: How EARs are written.
        marks: Claims of every token, whatever it is about.
    """

    def __init__(
        self, url: str, *, ear_form: Form = "dotted", marks: Mapping[str, str] | None = None
    ) -> None:
        self._ear_form = ear_form
        self.url = url.rstrip("/")
        self._said: dict[str, Any] = {"iss": self.url, **(marks or {})}
        self._headers: dict[tuple[str, bool | None], str] = {}

    def _sign(
        self, claims: Mapping[str, Any], key: SigningKey, omit_x5c: bool | None = None
    ) -> str:
        header = self._headers.get((key.kid, omit_x5c))
        if header is None:
            said: dict[str, Any] = {"alg": key.algorithm, "typ": "JWT", "kid": key.kid}
            said["jku"] = f"{self.url}/certs"
            if omit_x5c is not None:
                said |= {"x5t": key.x5t} if omit_x5c else {"x5c": key.x5c}
            header = self._headers[key.kid, omit_x5c] = jose.b64url_encode(_json(said))
        return jose.sign_encoded(header, _json(claims), key=key.private, algorithm=key.algorithm)

    def _times(self, at: datetime, minutes: int, key: SigningKey | None) -> dict[str, int]:
        now = int(at.timestamp())
        ends = now + 60 * minutes
        if key is not None:
            ends = min(ends, int(key.ends.timestamp()))
        return {"iat": now, "nbf": now, "exp": ends}

    def attested(
        self,
        verified: Verified,
        decision: Decision,
        stored: StoredPolicy,
        *,
        key: SigningKey,
        at: datetime,
        nonce_verified: bool = False,
    ) -> Issued:
        """
        Return the token of evidence that a policy permits.

        Args:
            verified: The evidence.
            decision: What the policy made of it.
            stored: The policy.
            key: What signs; not used for drafts.
            at: When it is issued.
            nonce_verified: The nonce is the service's own, unused until now and bound.
        """
        request = verified.request
        draft = request.draft is not None
        identifier = _identifier()
        times = self._times(at, decision.minutes, None if draft else key)
        claims: dict[str, Any] = {
            **self._said,
            **times,
            "jti": identifier,
            "x-ms-ver": "1.0",
            "x-ms-policy-hash": stored.hash,
            **decision.claims,
        }
        if request.nonce is not None:
            claims["nonce"] = request.nonce
        if nonce_verified:
            claims["x-pyenclave-nonce-verified"] = True
        if "ver" in decision.claims:
            claims |= {"policy_hash": stored.hash, "maa-policyHash": stored.hash}
        if stored.signer is not None:
            claims["x-ms-policy-signer"] = dict(stored.signer)
            if "ver" in decision.claims:
                claims["policy_signer"] = dict(stored.signer)
        if draft:
            claims["x-pyenclave-draft"] = True
            claims["x-pyenclave-trace"] = [str(fired) for fired in decision.trace[:256]]
            return Issued(token=unsecured(claims), id=identifier, expires=times["exp"])
        token = self._sign(claims, key, decision.omit_x5c)
        return Issued(token=token, id=identifier, expires=times["exp"])

    def ear(
        self,
        verified: Verified,
        decision: Decision,
        stored: StoredPolicy,
        *,
        key: SigningKey,
        at: datetime,
        nonce_verified: bool = False,
    ) -> Issued:
        """Return the same as an EAR; the arguments are those of `attested`."""
        request = verified.request
        identifier = _identifier()
        times = self._times(at, decision.minutes, key)
        claims = to_ear(
            verified.result,
            form=self._ear_form,
            policy_id=stored.hash,
            lifetime=max(times["exp"] - times["iat"], 1),
        )
        (name,) = claims["submods"]
        status = "ear.status" if self._ear_form == "dotted" else "ear_status"
        if len(self._said) > 1 and claims["submods"][name][status] == "affirming":
            claims["submods"][name][status] = "warning"  # for who reads nothing else
        evidence = {
            key: value
            for key, value in decision.claims.items()
            if key not in ("x-ms-runtime", "x-ms-inittime")
        }
        claims["submods"][name]["ear.veraison.annotated-evidence"] = evidence
        for member in ("x-ms-runtime", "x-ms-inittime"):
            if member in decision.claims:
                claims["submods"][name][member] = decision.claims[member]
        claims |= {**self._said, **times, "jti": identifier}
        if request.nonce is not None and 8 <= len(request.nonce) <= 88:
            claims["eat_nonce"] = request.nonce
        if nonce_verified:
            claims["x-pyenclave-nonce-verified"] = True
        token = self._sign(claims, key, decision.omit_x5c)
        return Issued(token=token, id=identifier, expires=times["exp"])

    def result(
        self, members: Mapping[str, Any], *, key: SigningKey, at: datetime, minutes: int = 480
    ) -> str:
        """Return a token about a policy or a certificate (``PolicyResult`` and its like)."""
        claims = {
            **self._said,
            **self._times(at, minutes, key),
            "jti": _identifier(),
            "x-ms-ver": "1.0",
            **members,
        }
        return self._sign(claims, key)
