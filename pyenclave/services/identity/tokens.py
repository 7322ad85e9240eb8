"""
Form and claims of bearer tokens (RFC 7519, 8725, 9068; Entra ID's claims).

Every fault has its own reason. Nothing here looks for keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose, jsonstrict
from pyenclave.services.identity.reasons import TokenRefused
from pyenclave.services.identity.trust import TrustedIssuer

__all__ = ["MAX_TOKEN", "Verdict", "judge", "match_issuer", "read"]

MAX_TOKEN: Final = 16 << 10  # bytes
_MAX_MOMENT: Final = 1 << 40  # seconds; the year 36,812
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt", "application/jwt"})
_KID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_KID_PATHS: Final = ("../", "..\\", "://", "\\", "\x00")
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the claims say about the caller."""

    tenant: str
    object_id: str
    client_id: str | None
    kind: Literal["user", "app"]
    not_before: int
    expires: int


def _json(part: str, reason: str, what: str) -> dict[str, Any]:
    try:
        data = jose.b64url_decode(part, what)
    except EvidenceFormatError as error:
        raise TokenRefused("encoding", error.found) from None
    try:
        return jsonstrict.object_of(data, what)
    except EvidenceFormatError as error:
        twice = error.expected == "each name once"
        raise TokenRefused("duplicate" if twice else reason, str(error)) from None


def read(text: str) -> tuple[jose.Jws, dict[str, Any]]:
    """
    Read a token; nothing is verified.

    Returns:
        The token and its claims.

    Raises:
        TokenRefused: Its form is wrong, or its header asks for what nobody here does.

    """
    if len(text) > MAX_TOKEN:
        raise TokenRefused("oversized", f"{len(text)} bytes")
    if text.lstrip()[:1] == "{":
        raise TokenRefused("serialisation")
    parts = text.split(".", 5)
    if len(parts) != 3:
        raise TokenRefused("encrypted" if len(parts) == 5 else "parts", f"{len(parts)} parts")
    header = _json(parts[0], "header_json", "header")
    _check_header(header)
    claims = _json(parts[1], "payload_json", "payload")
    try:
        token = jose.Jws.from_bytes(text, max_size=MAX_TOKEN)
    except EvidenceFormatError as error:
        raise TokenRefused("encoding", str(error)) from None
    return token, claims


def _check_header(header: Mapping[str, Any]) -> None:
    name = header.get("alg")
    if not isinstance(name, str) or not name:
        raise TokenRefused("alg_missing", type(name).__name__)
    if name.lower() == "none":
        raise TokenRefused("alg_none", name)
    if name.upper().startswith("HS"):
        raise TokenRefused("alg_symmetric", name)
    if name.upper().startswith("PBES2") or "p2c" in header or "p2s" in header:
        raise TokenRefused("password", name)
    # Before crit: a token that says b64 has to list it there (RFC 7797), and the reason is b64.
    if "b64" in header:
        raise TokenRefused("unencoded")
    if "crit" in header:
        raise TokenRefused("crit", header["crit"])
    if "zip" in header:
        raise TokenRefused("compressed")
    if "enc" in header or "epk" in header:
        raise TokenRefused("encryption_parameter")
    for own in ("jku", "x5u", "jwk"):
        if own in header:
            raise TokenRefused("embedded_key", own)
    if "cty" in header:
        raise TokenRefused("nested", header["cty"])
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise TokenRefused("token_type", kind)
    if name not in jose.ALGORITHMS:
        raise TokenRefused("algorithm", name)
    kid = header.get("kid")
    if kid is None:
        raise TokenRefused("kid_missing")
    if not isinstance(kid, str) or not _KID.fullmatch(kid) or any(p in kid for p in _KID_PATHS):
        raise TokenRefused("kid_malformed", kid)


def _text(claims: Mapping[str, Any], name: str, reason: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value or len(value) > 1024:
        raise TokenRefused(reason, type(value).__name__)
    return value


def _is_local(issuer: str) -> bool:
    try:
        parts = urlsplit(issuer)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme == "https" and parts.hostname in _LOOPBACK and parts.username is None


def match_issuer(claims: Mapping[str, Any], issuers: tuple[TrustedIssuer, ...]) -> TrustedIssuer:
    """
    Return the trusted issuer that the token names: character by character, its tenant filled in.

    Raises:
        TokenRefused: There is none.

    """
    issuer = _text(claims, "iss", "iss_missing")
    tenant = claims.get("tid")
    for trusted in issuers:
        if issuer == trusted.issuer and "{" not in trusted.issuer:
            return trusted
        if "{tenantid}" in trusted.issuer:
            before, _, after = trusted.issuer.partition("{tenantid}")
            named = issuer[len(before) : len(issuer) - len(after)]
            if issuer == f"{before}{named}{after}" and named in (trusted.tenants or ()):
                if tenant != named:
                    raise TokenRefused("tenant_issuer", tenant)
                return trusted
            if isinstance(tenant, str) and issuer == f"{before}{tenant}{after}":
                raise TokenRefused("tenant", tenant)
        if trusted.dangerous_any_loopback and _is_local(issuer):
            return trusted
    raise TokenRefused("issuer", issuer)


def _moment(claims: Mapping[str, Any], name: str) -> int:
    if name not in claims:
        raise TokenRefused(f"{name}_missing")
    value = claims[name]
    if type(value) is not int:
        raise TokenRefused(f"{name}_type", type(value).__name__)
    return value


def _times(
    claims: Mapping[str, Any], issuer: TrustedIssuer, now: float, leeway: float
) -> tuple[int, int]:
    expires = _moment(claims, "exp")
    if not 0 <= expires <= _MAX_MOMENT:
        raise TokenRefused("exp_huge", expires)
    if now >= expires + leeway:
        raise TokenRefused("expired", expires)
    issued = _moment(claims, "iat")
    if issued > now + leeway:
        raise TokenRefused("iat_future", issued)
    not_before = issued
    if issuer.require_nbf or "nbf" in claims:
        not_before = _moment(claims, "nbf")
        if not_before > now + leeway:
            raise TokenRefused("not_yet", not_before)
    if expires - issued > issuer.max_lifetime:
        raise TokenRefused("lifetime", expires - issued)
    return not_before, expires


def _audience(claims: Mapping[str, Any], audiences: frozenset[str]) -> None:
    value = claims.get("aud")
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed or len(listed) > 16:
        raise TokenRefused("aud_missing", type(value).__name__)
    if not all(isinstance(item, str) for item in listed):
        raise TokenRefused("aud_missing", "not text")
    # One foreign name is enough: whoever that is could use the token here.
    foreign = [item for item in listed if item not in audiences]
    if foreign:
        raise TokenRefused("audience", foreign[0])


def _kind(
    claims: Mapping[str, Any], issuer: TrustedIssuer
) -> tuple[Literal["user", "app"], str | None]:
    scopes = claims.get("scp", claims.get("scope", ""))
    if not isinstance(scopes, str):
        raise TokenRefused("scp_type", type(scopes).__name__)
    roles = claims.get("roles", [])
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise TokenRefused("roles_type", type(roles).__name__)
    client = claims.get("azp", claims.get("appid", claims.get("client_id")))
    if client is not None and (not isinstance(client, str) or not client):
        raise TokenRefused("client_type", type(client).__name__)
    # What only ID tokens have (OpenID Connect Core 1.0, 2 and 3.3.2.11).
    if any(name in claims for name in ("nonce", "at_hash", "c_hash")):
        raise TokenRefused("id_token", "nonce, at_hash or c_hash")
    stated = claims.get("idtyp")
    if stated not in (None, "app", "user") or (stated == "app" and scopes):
        raise TokenRefused("idtyp", stated)
    kind: Literal["user", "app"]
    if scopes or stated == "user":
        kind = "user"
    elif stated == "app" or roles or client is not None:
        kind = "app"
    else:
        raise TokenRefused("id_token", "no scp, roles, idtyp, azp or appid")
    if issuer.clients is not None and client not in issuer.clients:
        raise TokenRefused("client", client)
    if kind not in issuer.kinds:
        raise TokenRefused("kind", kind)
    return kind, client


def judge(
    claims: Mapping[str, Any],
    issuer: TrustedIssuer,
    audiences: frozenset[str],
    *,
    now: float,
    leeway: float,
) -> Verdict:
    """
    Judge the claims of a token whose signature holds.

    Args:
        claims: Its payload.
        issuer: The issuer that it names, and whose key signed it.
        audiences: What ``aud`` may be.
        now: Seconds since 1970.
        leeway: Seconds that clocks may differ by.

    Raises:
        TokenRefused: With the first reason there is.

    """
    _audience(claims, audiences)
    not_before, expires = _times(claims, issuer, now, leeway)
    if issuer.version is not None and claims.get("ver") != issuer.version:
        raise TokenRefused("version", claims.get("ver"))
    kind, client = _kind(claims, issuer)
    if issuer.subject == "oid":
        tenant = _text(claims, "tid", "tenant_missing")
        if tenant not in (issuer.tenants or ()):
            raise TokenRefused("tenant", tenant)
        if issuer.version is not None and tenant not in str(claims["iss"]).split("/"):
            raise TokenRefused("tenant_issuer", tenant)
    else:
        tenant = str(claims["iss"])
        if issuer.tenants is not None:
            tenant = _text(claims, "tid", "tenant_missing")
            if tenant not in issuer.tenants:
                raise TokenRefused("tenant", tenant)
    principal = _text(claims, issuer.subject, "principal")
    return Verdict(tenant, principal, client, kind, not_before, expires)
