"""Whose tokens are believed, and how the one that has none is told where to get one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from pyenclave.formats import jose

__all__ = ["Challenge", "TrustedIssuer", "check_tenants", "entra"]

_TENANT: Final = "{tenantid}"
_QUOTABLE: Final = re.compile(r"[\x21\x23-\x2b\x2d-\x5b\x5d-\x7e]+")


def _https(url: str, what: str, *, dangerous_http: bool = False) -> str:
    """Return the host of an https address without user, query and fragment."""
    parts = urlsplit(url)
    plain = ("https", "http") if dangerous_http else ("https",)
    if (
        parts.scheme not in plain
        or not parts.hostname
        or parts.username is not None
        or parts.query
        or parts.fragment
        or not url.isascii()
        or not url.isprintable()
    ):
        raise ValueError(f"{what} is a plain https address, not {url!r}")
    return parts.hostname


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """
    An issuer whose tokens are believed.

    Attributes:
        issuer: What ``iss`` must be, character by character. ``{tenantid}`` in it stands for the
            token's ``tid``, which must then be in *tenants*.
        discovery: Where its metadata is; default: the issuer and the well-known path.
        discovery_issuer: What ``issuer`` in that document must be; default: *issuer*.
        jwks: Its keys, as a JWKS document: then nothing is fetched.
        hosts: Further hosts that its ``jwks_uri`` may be on; the host of *discovery* always may.
        ca_file: PEM file of the authority of its TLS certificate; default: the system's.
        algorithms: What its tokens are signed with.
        tenants: Tenants (``tid``) that its tokens may name. Needed where *subject* is ``oid``:
            roles are given to ``TENANT/OBJECT_ID``, and whoever signs tokens could name any. None,
            with ``sub`` only: its ``tid`` counts for nothing, the tenant is ``iss`` itself.
        clients: Applications (``azp``, ``appid``) that are let in; None: all.
        version: ``1.0`` or ``2.0``: Entra ID's tokens of that version. None: of any other provider.
        subject: The claim that names the principal: ``oid``, or ``sub`` for other providers.
        kinds: Whether applications in their own name (``app``), users (``user``) or both.
        require_nbf: Refuse tokens without ``nbf``.
        max_lifetime: Seconds from ``iat`` to ``exp`` at most.
        dangerous_any_loopback: Also believe issuers ``https://127.0.0.1:PORT/…`` (any port of this
            machine) that sign with these keys: for the issuer of development, which has no address
            of its own.

    """

    issuer: str
    discovery: str | None = None
    discovery_issuer: str | None = None
    jwks: bytes | None = None
    hosts: frozenset[str] = frozenset()
    ca_file: str | None = None
    algorithms: frozenset[str] = frozenset({"RS256"})
    tenants: frozenset[str] | None = None
    clients: frozenset[str] | None = None
    version: Literal["1.0", "2.0"] | None = None
    subject: Literal["oid", "sub"] = "oid"
    kinds: frozenset[str] = frozenset({"app", "user"})
    require_nbf: bool = True
    max_lifetime: int = 2 * 86400
    dangerous_any_loopback: bool = False

    def __post_init__(self) -> None:
        host = _https(self.issuer.replace(_TENANT, "tenant"), "an issuer")
        if self.discovery is not None:
            host = _https(self.discovery, "a discovery address")
        if _TENANT in self.issuer and not self.tenants:
            raise ValueError("an issuer of many tenants needs the list of those that are let in")
        if not self.algorithms or not self.algorithms <= jose.ALGORITHMS:
            raise ValueError(f"algorithms are some of {sorted(jose.ALGORITHMS)}")
        if not self.kinds or not self.kinds <= {"app", "user"}:
            raise ValueError("kinds are app, user or both")
        if self.subject not in ("oid", "sub"):
            raise ValueError(f"subject is oid or sub, not {self.subject!r}")
        if self.subject == "oid" and not self.tenants:
            raise ValueError(
                f"tenants of {self.issuer} are missing: an issuer whose principals are tid and oid"
                ' needs the list of tenants that it may name; without tenants, subject is "sub"'
            )
        object.__setattr__(self, "hosts", frozenset({*self.hosts, host}))

    @property
    def named(self) -> frozenset[str]:
        """The tenants that its callers can be of, in lower case."""
        return frozenset(name.lower() for name in self.tenants or (self.issuer,))

    @property
    def discovery_url(self) -> str:
        """Where the metadata is (OpenID Connect Discovery 1.0, section 4)."""
        return self.discovery or f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"


@dataclass(frozen=True, slots=True)
class Challenge:
    """
    What the one without a token is told (spec 10.6): where tokens are, and for what.

    Attributes:
        authorization: Address of the authority with the tenant.
        resource: The audience to ask a token for.

    """

    authorization: str
    resource: str

    def __post_init__(self) -> None:
        for text in (self.authorization, self.resource):
            if not _QUOTABLE.fullmatch(text):
                raise ValueError(f"not for a header: {text!r}")

    @property
    def header(self) -> str:
        """Value of ``WWW-Authenticate``."""
        return f'Bearer authorization="{self.authorization}", resource="{self.resource}"'


def entra(
    tenant: str,
    *,
    authority: str = "https://login.microsoftonline.com",
    clients: frozenset[str] | None = None,
) -> tuple[TrustedIssuer, TrustedIssuer]:
    """
    Return Entra ID's issuers of a tenant: of tokens of version 2.0 and 1.0 (spec 11).

    Args:
        tenant: The tenant's GUID.
        authority: Another cloud's authority.
        clients: Applications that are let in; None: all.

    """
    metadata = f"{authority}/{tenant}/.well-known/openid-configuration"
    second = TrustedIssuer(
        issuer=f"{authority}/{tenant}/v2.0",
        tenants=frozenset({tenant}),
        clients=clients,
        version="2.0",
    )
    first = TrustedIssuer(
        issuer=f"https://sts.windows.net/{tenant}/",
        discovery=metadata,
        tenants=frozenset({tenant}),
        clients=clients,
        version="1.0",
    )
    return second, first


def check_tenants(issuers: Iterable[TrustedIssuer]) -> None:
    """
    Refuse issuers of which one could name its callers into the tenant of another.

    The two of `entra` are one authority with one set of keys, and share theirs.

    Raises:
        ValueError: Two others share a tenant.

    """
    held: dict[str, list[TrustedIssuer]] = {}
    for issuer in issuers:
        for tenant in sorted(issuer.named):
            others = held.setdefault(tenant, [])
            for other in others:
                if not _one_authority(issuer, other):
                    raise ValueError(
                        f"issuers {other.issuer} and {issuer.issuer} share the tenant {tenant}:"
                        " each could sign for the other's principals; name a tenant at one issuer"
                    )
            others.append(issuer)


def _one_authority(one: TrustedIssuer, other: TrustedIssuer) -> bool:
    versions = {one.version: one, other.version: other}
    second, first = versions.get("2.0"), versions.get("1.0")
    if second is None or first is None or second.tenants != first.tenants:
        return False
    if second.jwks is not None or first.jwks is not None:
        return second.jwks == first.jwks
    base, found, _ = second.issuer.rpartition("/v2.0")
    return (
        bool(found)
        and second.discovery is None
        and first.discovery == f"{base}/.well-known/openid-configuration"
    )
