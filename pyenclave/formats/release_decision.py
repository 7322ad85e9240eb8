"""
Whether a key is released for an attestation token: a pure function, with its trace.

Notes on secure key release, 10.3, in its order: key usable → exportable, with a policy → the
token's authority is one of the policy's, and one that the vault knows → signature by a key of that
authority → times → the policy → the transfer key out of the verified token. The first condition
that does not hold ends it; its name, what was expected and what was found are for the audit log,
and for nobody else. Nothing here does I/O: the authority's key and the time are arguments.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

from pyenclave.errors import AttestationError, EvidenceFormatError
from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwk
from pyenclave.formats.release_policy import (
    AllOf,
    AnyOf,
    Authority,
    Condition,
    ReleasePolicy,
    authority_host,
    find_claim,
    normal_authority,
)

__all__ = [
    "ALGORITHMS",
    "LOOPBACK",
    "MAX_LIFETIME",
    "MAX_SKEW",
    "MAX_TARGET",
    "Decision",
    "NotReleasedError",
    "Releasable",
    "Step",
    "Target",
    "Trace",
    "Transfer",
    "check_key",
    "check_token",
    "decide",
    "find_authority",
    "transfer_key",
]

ALGORITHMS: Final = frozenset({"RS256", "PS256", "ES256"})
MAX_SKEW: Final = 300  # seconds that clocks may differ at most
MAX_LIFETIME: Final = 7 * 86_400  # seconds; Azure's tokens have 8 hours
MAX_TARGET: Final = 256 << 10  # bytes of a token; one with certificates has 10 KB
MAX_KEYS: Final = 16  # keys that a token may name
# What says of an environment that its memory can be read, and what of it is harmless; by Azure
# Attestation's names, ours, and EAT's (RFC 9711, 4.2.9).
_DEBUG: Final[Mapping[str, tuple[object, ...]]] = {
    "x-ms-sgx-is-debuggable": (False,),
    "is-debuggable": (False,),
    "x-ms-sevsnpvm-is-debuggable": (False,),
    "tdx_td_attributes_debug": (False,),
    "dbgstat": (
        "disabled",
        "disabled-since-boot",
        "disabled-permanently",
        "disabled-fully-and-permanently",
        *(1, 2, 3, 4),
    ),
}
_MAA_PROFILE: Final = "https://aka.ms/maa-eat-profile"  # Azure's tokens of TDs are EATs, too
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_TEE: Final = "x-ms-isolation-tee"
_RUNTIME: Final = "x-ms-runtime"
_SHOWN: Final = ("iss", "jti", "iat", "exp", "x-ms-attestation-type", "x-ms-policy-hash")


class Releasable(Protocol):
    """What a key's record says about releasing it."""

    @property
    def enabled(self) -> bool:
        """Whether it may be used."""
        ...

    @property
    def not_before(self) -> int | None:
        """Seconds since 1970."""
        ...

    @property
    def expires(self) -> int | None:
        """Seconds since 1970."""
        ...

    @property
    def exportable(self) -> bool:
        """Whether it was made to be released."""
        ...

    @property
    def kty(self) -> str:
        """Its kind; only ``-HSM`` kinds are released."""
        ...

    @property
    def release_policy(self) -> bytes | None:
        """The policy's JSON."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One condition: its name, whether it holds, what was expected and found."""

    name: str
    holds: bool
    expected: Any = None
    found: Any = None


class NotReleasedError(Exception):
    """A condition does not hold; for the audit log only."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.name)
        self.step = step


@dataclass(slots=True)
class Trace:
    """Every condition that was looked at, in order."""

    steps: list[Step] = field(default_factory=list)

    def need(
        self, name: str, holds: bool, *, expected: object = None, found: object = None
    ) -> None:
        """
        Note a condition.

        Raises:
            NotReleasedError: It does not hold.

        """
        if not holds:
            raise self.failed(name, expected=expected, found=found)
        self.steps.append(Step(name, True, expected))

    def failed(self, name: str, *, expected: object = None, found: object = None) -> Exception:
        """Note a condition that does not hold, and return what to raise."""
        step = Step(name, False, expected, found)
        self.steps.append(step)
        return NotReleasedError(step)


@dataclass(frozen=True, slots=True)
class Target:
    """
    A token as it came; nothing in it is verified.

    Attributes:
        jws: The token.
        claims: Its claims.
        issuer: Its issuer in the form in which authorities are compared.
        digest: SHA-256 of the token.
    """

    jws: jose.Jws
    claims: Mapping[str, Any] = field(repr=False)
    issuer: str
    digest: bytes

    @classmethod
    def read(cls, trace: Trace, text: str) -> Self:
        """Take a token apart; NotReleasedError if it is none."""
        try:
            jws = jose.Jws.from_bytes(text, "target", max_size=MAX_TARGET)
            claims = jws.claims("target")
        except EvidenceFormatError as error:
            raise trace.failed("token.format", expected=error.expected, found=str(error)) from None
        trace.need("token.format", True)
        trace.need(
            "token.algorithm",
            jws.algorithm in ALGORITHMS,
            expected=sorted(ALGORITHMS),
            found=jws.algorithm,
        )
        found = claims.get("iss")
        try:
            issuer = normal_authority(found if isinstance(found, str) else "")
        except AttestationError:
            raise trace.failed(
                "token.issuer", expected="a plain https address", found=found
            ) from None
        trace.need("token.issuer", True, expected="a plain https address")
        return cls(jws, claims, issuer, hashlib.sha256(text.encode("ascii")).digest())

    @property
    def token_id(self) -> str | None:
        """The token's ``jti``."""
        found = self.claims.get("jti")
        return found if isinstance(found, str) and 0 < len(found) <= 256 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """
    The key to wrap for, out of a verified token.

    Attributes:
        modulus: Big-endian, no leading zeros.
        exponent: At least 65,537.
        kid: Its name in the token.
        place: Where in the token it is.
    """

    modulus: bytes = field(repr=False)
    exponent: int
    kid: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """
    What came out.

    Attributes:
        steps: Every condition that was looked at.
        transfer: The key to wrap for; None if a condition does not hold.
        policy_hash: SHA-256 of the policy, hexadecimal.
        target: The token, where it could be read.
        claims: The claims that were judged: those of the policy, and who said it when.
    """

    steps: tuple[Step, ...]
    transfer: Transfer | None = None
    policy_hash: str = ""
    target: Target | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> Step | None:
        """The condition that does not hold."""
        return next((step for step in self.steps if not step.holds), None)


# ---- the key -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _policy(data: bytes, strict: bool) -> ReleasePolicy:
    return ReleasePolicy.from_json(data, strict=strict)


def check_key(trace: Trace, key: Releasable, now: float, *, strict: bool = False) -> ReleasePolicy:
    """
    Look at the key alone.

    Returns:
        Its policy.

    Raises:
        NotReleasedError: It may not be used now, or not be released at all.

    """
    trace.need("key.enabled", key.enabled, expected=True, found=False)
    start, end = key.not_before, key.expires
    trace.need("key.nbf", start is None or now >= start, expected=f"from {start}", found=int(now))
    trace.need("key.exp", end is None or now < end, expected=f"before {end}", found=int(now))
    trace.need("key.exportable", key.exportable, expected=True, found=False)
    trace.need("key.kty", key.kty.endswith("-HSM"), expected="a kind with -HSM", found=key.kty)
    data = key.release_policy
    trace.need("key.policy", data is not None, expected="a release policy", found="none")
    try:
        policy = _policy(data or b"", strict)
    except AttestationError as error:
        raise trace.failed(
            "policy.grammar", expected="release policy 1.0.0", found=str(error)
        ) from None
    trace.need("policy.grammar", True)
    return policy


def find_authority(trace: Trace, policy: ReleasePolicy, target: Target) -> str:
    """
    Return the authority whose keys must verify *target*: it is one of the policy's.

    Raises:
        NotReleasedError: The policy does not name the token's issuer.

    """
    known = {normal_authority(item.url) for item in policy.authorities}
    trace.need(
        "policy.authority",
        target.issuer in known,
        expected=sorted(known)[:32],
        found=target.issuer,
    )
    return target.issuer


# ---- the token ---------------------------------------------------------------------------------


def _time(trace: Trace, target: Target, name: str) -> int:
    value = target.claims.get(name)
    good = isinstance(value, int) and not isinstance(value, bool)
    trace.need(f"token.{name}.type", good, expected="seconds since 1970", found=repr(value)[:60])
    return int(value) if isinstance(value, int) else 0


def _named(condition: Condition) -> Iterator[str]:
    if isinstance(condition, AnyOf | AllOf):
        for inner in condition.conditions:
            yield from _named(inner)
    else:
        yield condition.claim


def _names(policy: ReleasePolicy, issuer: str) -> list[str]:
    """Return the claims that the policy names for *issuer*, each once."""
    mine: list[Authority] = [
        item for item in policy.authorities if normal_authority(item.url) == issuer
    ]
    return list(dict.fromkeys(name for item in mine for name in _named(item.condition)))


def _check_debug(trace: Trace, target: Target, named: list[str]) -> None:
    """
    Refuse an environment that can be debugged, unless the policy itself judges that claim.

    Azure leaves it to the policy alone, and a policy that forgets it releases to everybody's
    debugger.
    """
    inner = target.claims.get(_TEE)
    for holder, prefix in ((target.claims, ""), (inner, f"{_TEE}.")):
        if not isinstance(holder, Mapping):
            continue
        for name, harmless in _DEBUG.items():
            if name not in holder or prefix + name in named:
                continue
            value = holder[name]
            good = any(type(value) is type(item) and value == item for item in harmless)
            trace.need(
                "token.debug",
                good,
                expected=f"{prefix}{name}: {harmless[0]}, or a policy that names it",
                found=value,
            )


def _same_service(name: str, issuer: str) -> bool:
    if name.removesuffix("/") == issuer:
        return True
    # In development a service keeps its key and comes back on another port of this machine; no
    # authority there is believed but in development.
    try:
        hosts = {authority_host(item)[0] for item in (name, issuer)}
    except AttestationError:
        return False
    return hosts <= set(LOOPBACK)


def check_token(
    trace: Trace, target: Target, key: Jwk, policy: ReleasePolicy, now: float, *, skew: float
) -> Transfer:
    """
    Judge a token with a key of its authority.

    Args:
        trace: Where each condition is noted.
        target: The token.
        key: The key of the authority that the token's header names.
        policy: Of the key that is asked for.
        now: Seconds since 1970.
        skew: Seconds that the authority's clock may differ, at most 300.

    Raises:
        NotReleasedError: A condition does not hold.

    """
    if not 0 <= skew <= MAX_SKEW:
        raise ValueError(f"clocks differ by 0 to {MAX_SKEW} seconds, not {skew}")
    claims = target.claims
    if key.x5c:
        # A certificate that names an instance signs for that instance only.
        name = key.x5c[0].common_name or ""
        own = not name.startswith("https://") or _same_service(name, target.issuer)
        trace.need("token.certificate", own, expected=target.issuer, found=name)
    trace.need(
        "token.signature",
        key.verify(target.jws, allowed=ALGORITHMS),
        expected=f"made by key {key.kid!r:.80} with {sorted(key.algorithms & ALGORITHMS)}",
        found=f"{target.jws.algorithm}, does not hold",
    )
    issued, start, end = (_time(trace, target, name) for name in ("iat", "nbf", "exp"))
    trace.need("token.exp", now < end + skew, expected=f"after {int(now)}", found=end)
    trace.need("token.nbf", start <= now + skew, expected=f"until {int(now)}", found=start)
    trace.need("token.iat", issued <= now + skew, expected=f"until {int(now)}", found=issued)
    trace.need(
        "token.lifetime",
        0 <= end - issued <= MAX_LIFETIME,
        expected=f"0 to {MAX_LIFETIME} seconds from iat to exp",
        found=end - issued,
    )
    draft = claims.get("x-pyenclave-draft", False)
    trace.need("token.draft", draft is False, expected="an outcome of the set policy", found=draft)
    recorded = claims.get("x-pyenclave-evidence-time")
    trace.need(
        "token.evidence_time", recorded is None, expected="evidence judged now", found=recorded
    )
    # An EAR says what was found, good or bad, and is signed in both cases; release policies judge
    # tokens that are issued only if an attestation policy permits it.
    profile = claims.get("eat_profile", _MAA_PROFILE)
    plain = "submods" not in claims and str(profile).startswith(_MAA_PROFILE)
    trace.need("token.kind", plain, expected="a token of an attestation policy", found=profile)
    named = _names(policy, target.issuer)
    _check_debug(trace, target, named)
    verdict = policy.evaluate(target.issuer, claims)
    trace.need(
        "policy.claims",
        verdict.released,
        expected=list(verdict.reasons),
        found=judged(claims, named) if not verdict.released else None,
    )
    return transfer_key(trace, claims)


def judged(claims: Mapping[str, Any], named: list[str]) -> dict[str, Any]:
    """Return the claims that a policy names, as they are in a token."""
    missing = find_claim({}, "-")
    found: dict[str, Any] = {}
    for name in named:
        value = find_claim(claims, name)
        found[name] = "(absent or ambiguous)" if value is missing else value
    return found


# ---- the transfer key --------------------------------------------------------------------------


def _encrypts(key: object) -> bool:
    if not isinstance(key, Mapping) or key.get("kty") != "RSA":
        return False
    operations = key.get("key_ops")
    if isinstance(operations, str):  # public clients write it as text
        operations = [operations]
    listed = isinstance(operations, list) and "encrypt" in operations
    return listed or "enc" in (key.get("use"), key.get("key_use"))


def transfer_key(trace: Trace, claims: Mapping[str, Any]) -> Transfer:
    """
    Return the first RSA key that encrypts among the runtime keys of a verified token.

    A guest's own keys stand before those of the paravisor (``x-ms-isolation-tee``). The first one
    counts: if it is weak, the next one is not taken instead.

    Raises:
        NotReleasedError: There is none, or it is weak.

    """
    inner = claims.get(_TEE)
    places = [(f"{_RUNTIME}.keys", claims.get(_RUNTIME))]
    if isinstance(inner, Mapping):
        places.append((f"{_TEE}.{_RUNTIME}.keys", inner.get(_RUNTIME)))
    for place, runtime in places:
        keys = runtime.get("keys") if isinstance(runtime, Mapping) else None
        if not isinstance(keys, list):
            continue
        trace.need(
            "transfer.count", len(keys) <= MAX_KEYS, expected=f"<= {MAX_KEYS}", found=len(keys)
        )
        for key in keys:
            if _encrypts(key):
                return _strong(trace, key, place)
    raise trace.failed(
        "transfer.key",
        expected=f"an RSA key that encrypts in {' or '.join(place for place, _ in places)}",
        found="none",
    )


def _strong(trace: Trace, key: Mapping[str, Any], place: str) -> Transfer:
    trace.need("transfer.key", True)
    private = sorted(name for name in ("d", "p", "q", "dp", "dq", "qi", "k") if name in key)
    trace.need("transfer.public", not private, expected="a public key", found=private)
    try:
        modulus = jose.b64url_decode(key.get("n", ""), "n")
        exponent_bytes = jose.b64url_decode(key.get("e", ""), "e")
    except EvidenceFormatError as error:
        raise trace.failed(
            "transfer.form", expected="n and e as base64url", found=str(error)
        ) from None
    whole = bool(modulus and exponent_bytes and modulus[0] and exponent_bytes[0])
    trace.need("transfer.form", whole, expected="numbers without leading zeros", found="zeros")
    number, exponent = int.from_bytes(modulus, "big"), int.from_bytes(exponent_bytes, "big")
    bits = number.bit_length()
    trace.need(
        "transfer.modulus",
        2048 <= bits <= 8192 and number % 2 == 1,
        expected="odd, 2048 to 8192 bits",
        found=f"{'odd' if number % 2 else 'even'}, {bits} bits",
    )
    trace.need(
        "transfer.exponent",
        65537 <= exponent < 1 << 64 and exponent % 2 == 1,
        expected="odd, from 65537",
        found=str(exponent)[:40],
    )
    kid = key.get("kid")
    return Transfer(
        modulus=modulus,
        exponent=exponent,
        kid=kid[:256] if isinstance(kid, str) else "",
        place=place,
    )


# ---- the whole ---------------------------------------------------------------------------------


def decide(
    key: Releasable,
    target: str | Target,
    *,
    find: Callable[[str, str | None], Jwk | None],
    now: float,
    knows: Callable[[str], bool] | None = None,
    skew: float = 60,
    strict: bool = False,
) -> Decision:
    """
    Decide whether *key* is released for the token *target*.

    Args:
        key: The key.
        target: The token, compact serialisation; or what `Target.read` returned.
        find: Returns the key of an authority by ``kid``; None if it has none.
        now: Seconds since 1970.
        knows: Whether an authority is configured; without it, `find` alone says so.
        skew: Seconds that the authority's clock may differ.
        strict: Policies are compared by exact JSON type.

    Returns:
        The decision; it raises nothing, whatever *target* is.

    """
    trace = Trace()
    read: Target | None = None
    transfer: Transfer | None = None
    named: list[str] = []
    try:
        policy = check_key(trace, key, now, strict=strict)
        read = Target.read(trace, target) if isinstance(target, str) else target
        authority = find_authority(trace, policy, read)
        named = _names(policy, read.issuer)
        known = knows is None or knows(authority)
        trace.need("authority.known", known, expected="a configured authority", found=authority)
        found = find(authority, read.jws.kid)
        trace.need(
            "token.key",
            found is not None,
            expected=f"a key of {authority}",
            found=f"kid {read.jws.kid!r:.80}",
        )
        if found is not None:
            transfer = check_token(trace, read, found, policy, now, skew=skew)
    except NotReleasedError:
        transfer = None
    return Decision(
        steps=tuple(trace.steps),
        transfer=transfer,
        policy_hash=hashlib.sha256(key.release_policy or b"").hexdigest(),
        target=read,
        claims={} if read is None else _told(read.claims, named),
    )


def _told(claims: Mapping[str, Any], named: list[str]) -> dict[str, Any]:
    shown = {name: claims[name] for name in _SHOWN if name in claims}
    return shown | judged(claims, named)
