"""
An issuer for development and tests: OpenID Connect discovery, keys, client credentials, and the
endpoint of managed identities. Its key lies in the state directory; whoever can read that is
everybody, so nothing outside development trusts it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import unquote_plus

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.errors import PlatformUnavailableError, ServiceError
from pyenclave.formats import jose
from pyenclave.formats.jwk import public_members
from pyenclave.services.identity.trust import Challenge, TrustedIssuer
from pyenclave.services.web.health import add_health
from pyenclave.services.web.kit import Answer, Call, Limits, Service
from pyenclave.services.web.paths import form_of
from pyenclave.services.web.tls import private_file

__all__ = ["ADMINISTRATOR", "MANAGED_IDENTITY", "TENANT", "DevIssuer"]

# Fixed, so that what was granted before a restart still is.
TENANT: Final = "de0e0000-0000-4000-8000-000000000001"
ADMINISTRATOR: Final = "de0e0000-0000-4000-8000-0000000000ad"
MANAGED_IDENTITY: Final = "de0e0000-0000-4000-8000-0000000000a1"
# Of tokens that no served issuer signed: `.invalid` is nobody's (RFC 2606).
_NOWHERE: Final = "https://identity.pyenclave.invalid"
_LIFETIME: Final = 3600
_MAX_LIFETIME: Final = 86400
_IMDS_VERSION: Final = "2018-02-01"
_RESOURCE_IDS: Final = frozenset({"mi_res_id", "msi_res_id"})  # no identity here has one


@dataclass(frozen=True, slots=True)
class _Client:
    secret: str = field(repr=False)
    object_id: str


class DevIssuer:
    """
    Signs tokens as Entra ID does (version 2.0, RS256).

    Args:
        state_dir: Where its key is kept; None: in memory.
        url: Base address that it is served at; tokens name it as their issuer.
        tenant: Tenant of its tokens.
        clock: Seconds since 1970.

    """

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        url: str | None = None,
        tenant: str = TENANT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        made = rsa.generate_private_key(65537, 2048) if state_dir is None else None
        if made is None and state_dir is not None:
            made = _kept(state_dir)
        if made is None:
            raise AssertionError("one of the two")
        self._key = made
        self.kid = _thumbprint(self._key)
        self.tenant = tenant
        self.url = url or _NOWHERE
        self._clock = clock
        self._clients: dict[str, _Client] = {}

    @property
    def issuer(self) -> str:
        """What ``iss`` of its tokens is."""
        return f"{self.url}/{self.tenant}/v2.0"

    @property
    def jwks(self) -> bytes:
        """Its public key as a JWKS document."""
        return msgspec.json.encode(self._jwks())

    def _jwks(self) -> dict[str, Any]:
        members = public_members(self._key.public_key())
        return {"keys": [{**members, "kid": self.kid, "use": "sig", "alg": "RS256"}]}

    def trusted(self) -> TrustedIssuer:
        """Return what a service of development trusts: these keys, wherever they are served."""
        return TrustedIssuer(
            issuer=self.issuer,
            jwks=self.jwks,
            tenants=frozenset({self.tenant}),
            version="2.0",
            dangerous_any_loopback=True,
        )

    def challenge(self, resource: str) -> Challenge:
        """Return the challenge of a service whose tokens are for *resource*."""
        return Challenge(f"{self.url}/{self.tenant}", resource)

    def register(self, client_id: str, secret: str, *, object_id: str | None = None) -> str:
        """
        Let an application ask for tokens with a secret.

        Returns:
            Its object id; without *object_id* one that follows from *client_id*.

        """
        if not client_id or len(secret) < 8:
            raise ValueError("a client has a name, and a secret of 8 characters or more")
        principal = object_id or str(uuid.uuid5(uuid.UUID(self.tenant), client_id))
        self._clients[client_id] = _Client(secret, principal)
        return principal

    def token(
        self,
        *,
        object_id: str = ADMINISTRATOR,
        audience: str = "https://vault.azure.net",
        roles: Sequence[str] = (),
        lifetime: float = _LIFETIME,
        client_id: str | None = None,
        kind: Literal["app", "user"] = "app",
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """
        Sign a token.

        Args:
            object_id: Whose.
            audience: For whom.
            roles: App roles.
            lifetime: Seconds, at most a day.
            client_id: The application; default: one that follows from *object_id*.
            kind: An application in its own name, or a user.
            extra: Further claims, or others than those that would be there.

        """
        if not lifetime <= _MAX_LIFETIME:
            raise ValueError(f"lifetime is at most {_MAX_LIFETIME} seconds")
        now = int(self._clock())
        claims: dict[str, Any] = {
            "aud": audience,
            "iss": self.issuer,
            "iat": now,
            "nbf": now,
            "exp": now + int(lifetime),
            "azp": client_id or str(uuid.uuid5(uuid.UUID(self.tenant), object_id)),
            "oid": object_id,
            "sub": object_id,
            "tid": self.tenant,
            "uti": os.urandom(12).hex(),
            "ver": "2.0",
        }
        claims |= {"idtyp": "app"} if kind == "app" else {"scp": "user_impersonation"}
        if roles:
            claims["roles"] = list(roles)
        claims |= dict(extra or {})
        return jose.sign(claims, key=self._key, algorithm="RS256", kid=self.kid)

    # ---- as a service --------------------------------------------------------------------------

    def service(self, *, limits: Limits | None = None) -> Service:
        """Return the issuer as an ASGI application; set `url` before it serves."""
        service = Service("identity", api_versions=(), limits=limits)
        for prefix in ("/{tenant}", "/{tenant}/v2.0"):
            service.route(
                "GET", f"{prefix}/.well-known/openid-configuration", self._discovery, anonymous=True
            )
        service.route("GET", "/{tenant}/discovery/v2.0/keys", self._keys, anonymous=True)
        service.route("GET", "/{tenant}/discovery/instance", self._instance, anonymous=True)
        for version in ("/v2.0", ""):
            service.route("POST", f"/{{tenant}}/oauth2{version}/token", self._token, anonymous=True)
        add_health(service)
        return service

    def metadata_service(self, *, limits: Limits | None = None) -> Service:
        """
        Return the endpoint of managed identities (what a cloud has at 169.254.169.254).

        It speaks HTTP without secrets, as a cloud's does: whoever reaches it is that identity.
        """
        service = Service("managed identity", api_versions=(), limits=limits)
        service.route("GET", "/metadata/identity/oauth2/token", self._managed, anonymous=True)
        return service

    def _known(self, call: Call) -> str:
        tenant = call.params["tenant"]
        if tenant not in (self.tenant, "common", "organizations"):
            raise ServiceError("there is no such tenant", status=404, error_code="NotFound")
        return self.tenant

    async def _discovery(self, call: Call) -> Answer:
        tenant = self._known(call)
        base = f"{self.url}/{tenant}"
        return Answer(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "jwks_uri": f"{base}/discovery/v2.0/keys",
                "response_types_supported": ["token"],
                "subject_types_supported": ["pairwise"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "token_endpoint_auth_methods_supported": [
                    "client_secret_post",
                    "client_secret_basic",
                ],
                "claims_supported": ["aud", "azp", "exp", "iat", "iss", "nbf", "oid", "roles"],
            }
        )

    async def _instance(self, call: Call) -> Answer:
        """Answer MSAL's question whether this authority is one."""
        host = self.url.partition("://")[2]
        return Answer(
            {
                "tenant_discovery_endpoint": (
                    f"{self.url}/{self._known(call)}/v2.0/.well-known/openid-configuration"
                ),
                "api-version": "1.1",
                "metadata": [
                    {"preferred_network": host, "preferred_cache": host, "aliases": [host]}
                ],
            }
        )

    async def _keys(self, call: Call) -> Answer:
        self._known(call)
        return Answer(self._jwks(), headers={"cache-control": "public, max-age=300"})

    async def _token(self, call: Call) -> Answer:
        self._known(call)
        kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            return _oauth_error("invalid_request", "the body is not a form")
        fields = form_of(call.body, 8192)
        if fields.get("grant_type") != "client_credentials":
            return _oauth_error("unsupported_grant_type", "client_credentials is supported")
        client_id, given = fields.get("client_id", ""), fields.get("client_secret", "")
        basic = "authorization" in call.headers
        if basic:
            found = _basic(call.headers["authorization"])
            if found is None or "client_secret" in fields or client_id not in ("", found[0]):
                return _oauth_error("invalid_request", "one proof of the client, in one form")
            client_id, given = found
        client = self._clients.get(client_id)
        # The same work and the same words for an unknown client and a wrong secret.
        wanted = client.secret if client is not None else os.urandom(16).hex()
        if not hmac.compare_digest(_digest(given), _digest(wanted)) or client is None:
            return _oauth_error(
                "invalid_client", "unknown client or wrong secret", status=401, basic=basic
            )
        audience = fields.get("resource") or fields.get("scope", "")
        if audience.endswith("/.default"):
            audience = audience.removesuffix("/.default")
        elif "resource" not in fields:
            return _oauth_error("invalid_scope", "a scope ends with /.default")
        if not audience or " " in audience:
            return _oauth_error("invalid_scope", "one audience, please")
        token = self.token(object_id=client.object_id, audience=audience, client_id=client_id)
        return Answer(
            {
                "token_type": "Bearer",
                "expires_in": _LIFETIME,
                "ext_expires_in": _LIFETIME,
                "access_token": token,
            }
        )

    async def _managed(self, call: Call) -> Answer:
        # A page in a browser, or a proxy that was talked into it, cannot set the one header, and
        # leaves the other (as the cloud's endpoint has it).
        if call.headers.get("metadata", "").lower() != "true":
            return _oauth_error("invalid_request", "Required metadata header not specified")
        if "x-forwarded-for" in call.headers:
            return _oauth_error("invalid_request", "not through a proxy")
        if call.query.get("api-version") != _IMDS_VERSION:
            return _oauth_error("invalid_request", f"api-version is {_IMDS_VERSION}")
        resource = call.query.get("resource", "")
        if not resource:
            return _oauth_error("invalid_request", "resource is missing")
        object_id, client_id = MANAGED_IDENTITY, call.query.get("client_id")
        if client_id not in (None, MANAGED_IDENTITY):
            client = self._clients.get(client_id)
            if client is None:
                return _oauth_error("invalid_request", "Identity not found")
            object_id = client.object_id
        # Who asks for one identity is never given another.
        named = (call.query.get(name, object_id) for name in ("object_id", "principal_id"))
        if any(name != object_id for name in named) or _RESOURCE_IDS & call.query.keys():
            return _oauth_error("invalid_request", "Identity not found")
        token = self.token(object_id=object_id, audience=resource, client_id=client_id)
        expires = int(self._clock()) + _LIFETIME
        return Answer(
            {
                "access_token": token,
                "client_id": client_id or MANAGED_IDENTITY,
                "expires_in": str(_LIFETIME),
                "expires_on": str(expires),
                "not_before": str(expires - _LIFETIME),
                "resource": resource,
                "token_type": "Bearer",
            }
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _basic(header: str) -> tuple[str, str] | None:
    """Return client and secret of an Authorization header (RFC 6749, 2.3.1), None if malformed."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client, colon, secret = base64.b64decode(value, validate=True).decode().partition(":")
        # Form-encoded, so that a colon in a name is none of the separator's.
        pair = unquote_plus(client, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return pair if colon else None


def _oauth_error(code: str, text: str, *, status: int = 400, basic: bool = False) -> Answer:
    """Return an error as RFC 6749, 5.2, has it."""
    headers = {"www-authenticate": "Basic"} if basic else {}
    return Answer({"error": code, "error_description": text}, status=status, headers=headers)


def _kept(state_dir: str | os.PathLike[str]) -> rsa.RSAPrivateKey:
    folder = os.path.join(os.path.abspath(state_dir), "dev")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, "issuer-key.pem")
    made = b""
    if not os.path.lexists(path):
        made = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    try:
        key = serialization.load_pem_private_key(private_file(path, made), None)
    except (ValueError, TypeError) as error:
        raise PlatformUnavailableError(f"{path} is damaged", found=str(error)) from None
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < jose.MIN_RSA_BITS:
        raise PlatformUnavailableError(f"{path} has a key of another kind")
    return key


def _thumbprint(key: rsa.RSAPrivateKey) -> str:
    """RFC 7638."""
    members = public_members(key.public_key())
    text = msgspec.json.encode({name: members[name] for name in ("e", "kty", "n")})
    return jose.b64url_encode(hashlib.sha256(text).digest())
