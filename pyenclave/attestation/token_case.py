"""
A token as evidence: where its key comes from, and the checks that every kind of token has.

A token is believed for one of two reasons. Its key is among those that the relying party gave
(``jwks.json`` among the endorsements: the issuer's key set, fetched from an issuer that the relying
party chose), found there by ``kid``. Or its ``x5c`` certificates lead to a pinned root or one that
the caller gives. What the token says of keys itself (``jwk``, ``jku``, ``x5u``, certificates
without such a root) is shown and never believed, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, Literal

from pyenclave.attestation import pki
from pyenclave.attestation.cache import known
from pyenclave.attestation.case import CaseBase, gathered
from pyenclave.attestation.checks import PASSED, Registry, Verdict, absent, failed, not_asked
from pyenclave.attestation.detect import unpadded
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose
from pyenclave.formats.jose import Jws
from pyenclave.formats.jwk import Jwk, Jwks
from pyenclave.formats.x509 import OID_BASIC_CONSTRAINTS, OID_KEY_USAGE, Certificate

__all__ = ["LEEWAY", "Case", "Signer", "base_checks", "moment_of", "token_claims"]

LEEWAY: Final = timedelta(seconds=60)
_OID_EXTENDED_KEY_USAGE: Final = "2.5.29.37"
_MAX_TIME: Final = 253_402_300_800  # seconds; the end of the year 9999
PROFILE: Final = pki.Profile(
    keys=frozenset(("rsa", "secp256r1", "secp384r1", "secp521r1")),
    algorithms=frozenset(
        f"{scheme}-{digest}"
        for scheme in ("ecdsa", "rsa-pkcs1", "rsa-pss")
        for digest in ("sha256", "sha384", "sha512")
    ),
    shortest=1,
    longest=6,
    critical=frozenset((OID_BASIC_CONSTRAINTS, OID_KEY_USAGE, _OID_EXTENDED_KEY_USAGE)),
    leaf_bare=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """
    The key that a token is judged by.

    Attributes:
        source: ``given`` (the relying party's key set) or ``chain`` (certificates in the token).
        key: The public key.
        algorithms: What it may be used with.
        jwk: The given key.
    """

    source: Literal["given", "chain"]
    key: Any
    algorithms: frozenset[str]
    jwk: Jwk | None = None


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """A token, and what it is judged by."""

    #: Vendors whose pinned roots count for certificates in a token of a kind.
    VENDORS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "google-confidential-space-jwt": ("google-cs",)
    }

    def read_token(self) -> Jws:
        """Read the token; white space around it, and a NUL at its end, are no matter."""
        return self._part("token", lambda: Jws.from_bytes(unpadded(self.data)))

    def read_payload(self) -> dict[str, Any]:
        """Read what it says."""
        token = self.token
        return self._part("payload", token.claims)

    def read_keys(self) -> Jwks | None:
        """Read the relying party's keys; None if it gave none."""
        data = self.endorsements.get("jwks.json")
        if data is None:
            return None
        return self._part("keys", lambda: known("jwks", data, Jwks.from_bytes).value)

    def read_chain(self) -> tuple[Certificate, ...]:
        """Read the certificates in the token, the root completed; empty if there are none."""
        token = self.token

        def read() -> tuple[Certificate, ...]:
            raw = _x5c(token.header)
            found = [known("certificate", item, Certificate.from_der).value for item in raw]
            return tuple(pki.completed(found, self.all_anchors()))

        return self._part("chain", read)

    @property
    def token(self) -> Jws:
        """The token, for other checks."""
        return self.need("token.format", self.read_token)

    @property
    def payload(self) -> dict[str, Any]:
        """What it says, for other checks."""
        return self.need("token.claims", self.read_payload)

    @property
    def keys(self) -> Jwks | None:
        """The relying party's keys, for other checks."""
        return self.need("keys.format", self.read_keys)

    @property
    def chain(self) -> tuple[Certificate, ...]:
        """The certificates, for other checks."""
        return self.need("chain.format", self.read_chain)

    def all_anchors(self) -> tuple[Certificate, ...]:
        """Return the roots that count for this kind."""
        return self.anchors(*self.VENDORS.get(self.kind, ()))

    @property
    def signer(self) -> Signer | None:
        """The key that counts; the chain still has to hold. None: there is none."""
        keys = self.keys
        given = keys.find(self.token.kid) if keys is not None else None
        if given is not None:
            return Signer(source="given", key=given.key, algorithms=given.algorithms, jwk=given)
        if self.chain and self.all_anchors():
            key = self.chain[0].public_key()
            return Signer(source="chain", key=key, algorithms=jose.algorithms_of(key))
        return None

    @property
    def judged_chain(self) -> tuple[Certificate, ...] | None:
        """The certificates, if they are why the token is believed."""
        signer = self.signer
        return self.chain if signer is not None and signer.source == "chain" else None

    @property
    def embedded(self) -> Signer | None:
        """The key that the token itself brings. For claims only, never for a verdict."""
        for holder in (self.token.header, self.payload):
            value = holder.get("jwk")
            if isinstance(value, Mapping):
                bare = {name: item for name, item in value.items() if name != "x5c"}
                key = Jwk.from_json(bare, "embedded key")
                return Signer(source="given", key=key.key, algorithms=key.algorithms)
        if self.chain:
            key = self.chain[0].public_key()
            return Signer(source="chain", key=key, algorithms=jose.algorithms_of(key))
        return None


def _x5c(header: Mapping[str, Any]) -> tuple[bytes, ...]:
    if "x5c" in header:
        return jose.x5c_of(header["x5c"])
    key = header.get("jwk")
    if not isinstance(key, Mapping) or "x5c" not in key:
        return ()
    listed = key["x5c"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= 10:
        raise EvidenceFormatError("x5c: not a list of 1 to 10 certificates")
    # Trustee writes the certificates of its own key in base64url.
    return tuple(
        jose.b64_decode(item, "x5c")
        if isinstance(item, str) and set(item) & set("+/=")
        else jose.b64url_decode(item, "x5c")
        for item in listed
    )


def moment_of(payload: Mapping[str, Any], name: str) -> datetime | None:
    """Return a NumericDate; RFC 7519 allows fractions, and no issuer here writes any."""
    if name not in payload:
        return None
    value = payload[name]
    if type(value) is not int or not 0 <= value < _MAX_TIME:
        raise EvidenceFormatError(
            f"token: {name}", expected="seconds since 1970", found=f"{value!r:.40}"
        )
    return datetime.fromtimestamp(value, UTC)


def base_checks(
    *, algorithms: frozenset[str], times: tuple[str, ...], advice: str
) -> Registry[Case]:
    """
    Return a registry with the checks that every kind of token has.

    Args:
        algorithms: What tokens of this kind may be signed with.
        times: Which of ``exp``, ``nbf`` and ``iat`` must be there.
        advice: Where the keys of the issuer are.
    """
    checks: Registry[Case] = Registry()

    @checks.evidence("token.format")
    def _format(case: Case) -> Verdict:
        """The token is one in the compact form, with a header of known parameters."""
        case.read_token()
        return PASSED

    @checks.evidence("token.claims")
    def _payload(case: Case) -> Verdict:
        """What it says is one JSON object, each name once."""
        case.read_payload()
        return PASSED

    @checks.evidence("token.algorithm")
    def _algorithm(case: Case) -> Verdict:
        """It is signed with an algorithm that this kind of token may use."""
        if case.token.algorithm not in algorithms:
            return failed(expected=sorted(algorithms), found=case.token.algorithm)
        return PASSED

    @checks.evidence("keys.format")
    def _keys(case: Case) -> Verdict:
        """The relying party's key set can be read."""
        if case.read_keys() is None:
            return not_asked("no jwks.json was given")
        return PASSED

    @checks.evidence("key.trust")
    def _trust(case: Case) -> Verdict:
        """There is a key that the relying party chose, or certificates to judge."""
        if case.signer is not None:
            return PASSED
        brought = [name for name in ("jwk", "x5c", "jku", "x5u") if name in case.token.header]
        if "jwk" in case.payload:
            brought.append("jwk among the claims")
        if not brought:
            return absent("a key of the issuer", advice=advice)
        return failed(
            expected="a key that the relying party gave, or a pinned root",
            found=f"only what the token brings itself: {', '.join(brought)}",
            advice=advice,
        )

    _chain_checks(checks)

    @checks.evidence("token.signature")
    def _signature(case: Case) -> Verdict:
        """The key that counts signed the token."""
        signer = case.signer
        if signer is None:
            return absent("a key of the issuer", advice=advice)
        if case.token.verify(signer.key, allowed=algorithms & signer.algorithms):
            return PASSED
        return failed(
            expected=f"a signature of the {signer.source} key",
            found=f"{case.token.algorithm}, invalid",
            advice="Something was changed, or the key is another one.",
        )

    @checks.evidence("token.times")
    def _times(case: Case) -> Verdict:
        """It has begun, has not expired, and was not issued after now."""
        return _judge_times(case, times)

    return checks


def _chain_checks(checks: Registry[Case]) -> None:
    @checks.evidence("chain.format")
    def _format(case: Case) -> Verdict:
        """The certificates in the token can be read."""
        if not case.read_chain():
            return not_asked("the token has no certificates")
        return pki.check_length(case.chain, PROFILE)

    judges: dict[str, Callable[[Case, tuple[Certificate, ...]], Verdict]] = {
        "chain.root": lambda case, chain: pki.check_root(chain, case.all_anchors()),
        "chain.names": lambda _, chain: pki.check_names(chain),
        "chain.algorithms": lambda _, chain: pki.check_algorithms(chain, PROFILE),
        "chain.constraints": lambda _, chain: pki.check_constraints(chain, PROFILE),
        "chain.key_usage": lambda _, chain: pki.check_key_usage(chain, PROFILE),
        "chain.validity": lambda case, chain: pki.check_validity(chain, case.at),
        "chain.signatures": lambda _, chain: pki.check_signatures(chain),
    }

    def register(name: str) -> None:
        @checks.evidence(name)
        def _judge(case: Case) -> Verdict:
            """Certificates in the token, if they are why it is believed, lead to a pinned root."""
            chain = case.judged_chain
            if chain is None:
                return not_asked("certificates are not why this token would be believed")
            return judges[name](case, chain)

    for name in judges:
        register(name)


def _judge_times(case: Case, demanded: tuple[str, ...]) -> Verdict:
    payload = case.payload
    found = {name: moment_of(payload, name) for name in ("iat", "nbf", "exp")}
    for name in demanded:
        if found[name] is None:
            return failed(expected=name, found="absent")
    start, end = found["nbf"], found["exp"]
    issued = found["iat"]
    now = case.at.isoformat()
    # Differences, for the end of the year 9999, which some write for "never", has nothing after it.
    if end is not None and case.at - end >= LEEWAY:
        return failed(
            expected=f"valid at {now}",
            found=f"expired {end.isoformat()}",
            advice="Ask for a new token, or check the time that was given.",
        )
    for name, moment in (("nbf", start), ("iat", issued)):
        if moment is not None and moment - case.at > LEEWAY:
            return failed(
                expected=f"valid at {now}",
                found=f"{name} {moment.isoformat()}",
                advice="Check the time that was given, or the clock.",
            )
    if end is not None and start is not None and end < start:
        return failed(expected="exp after nbf", found=f"{end.isoformat()}, {start.isoformat()}")
    return PASSED


def token_claims(case: Case) -> dict[str, Any]:
    """Return header and payload, and how the signature comes out by the key that is there."""
    return gathered(case, _read_claims, _signature_claims, _chain_claims)


def _read_claims(case: Case) -> dict[str, Any]:
    header = {name: case.token.header[name] for name in case.token.header if name != "x5c"}
    return {
        "header": header,
        "claims": case.payload,
        "alg": case.token.algorithm,
        "key_is_embedded": "jwk" in case.token.header or "jwk" in case.payload,
    }


def _signature_claims(case: Case) -> dict[str, Any]:
    """Say whether the signature holds by the best key there is; only `genuine` says what for."""
    trusted = case.signer
    signer = trusted or case.embedded
    if signer is None:
        return {"signature_ok": None, "key_source": None}
    holds = case.token.verify(signer.key, allowed=signer.algorithms)
    return {"signature_ok": holds, "key_source": trusted.source if trusted else "embedded"}


def _chain_claims(case: Case) -> dict[str, Any]:
    chain = case.chain
    if not chain:
        return {}
    names, signatures = pki.check_names(chain), pki.check_signatures(chain)
    return {
        "x5c_chain_ok": names.outcome == signatures.outcome == "passed",
        "root_ok": pki.check_root(chain, case.all_anchors()).outcome == "passed",
        "chain": [certificate.common_name for certificate in chain],
    }
