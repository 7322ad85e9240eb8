"""
Small synchronous clients for Key Vault's keys and for attestation services, over their REST.

For Azure's endpoints and for ours alike (notes on key release, 10.1 and 10.6; on Azure Attestation,
8.1). They run outside enclaves: no network client is in the trusted base.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave._https import (
    Challenge,
    Credential,
    Session,
    StaticToken,
    TokenFile,
    bad_answer,
    json_of,
)
from pyenclave.errors import EvidenceFormatError, RemoteServiceError
from pyenclave.formats import jose, jwk
from pyenclave.formats.release import ALGORITHMS, attest_request, split_kid

__all__ = [
    "AttestationClient",
    "Challenge",
    "Credential",
    "RemoteServiceError",
    "StaticToken",
    "TokenFile",
    "VaultClient",
    "VaultKey",
    "split_key_url",
]

POLICY_TYPE: Final = "application/json; charset=utf-8"
RELEASE_ALGORITHMS: Final = tuple(ALGORITHMS)

_NAME: Final = re.compile(r"[0-9A-Za-z-]{1,127}")
_VERSION: Final = re.compile(r"[0-9A-Za-z]{1,64}")
_SMALL: Final = 256 << 10  # bytes; a key with its policy has at most 100 KiB
_PUBLIC: Final = frozenset({"kid", "kty", "key_ops", "n", "e", "crv", "x", "y"})


def split_key_url(url: str) -> tuple[str, str, str]:
    """
    Take the identifier of a key apart.

    Args:
        url: ``https://VAULT/keys/NAME`` or ``https://VAULT/keys/NAME/VERSION``.

    Returns:
        The vault's address, the key's name, and its version (empty if none is named).

    Raises:
        ValueError: It is no such address.

    """
    return split_kid(url)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultKey:
    """
    A key of a vault as it is seen outside: its public half and what may be done with it.

    Attributes:
        kid: Its identifier, ``https://VAULT/keys/NAME/VERSION``.
        kty: ``RSA``, ``RSA-HSM``, ``EC``, ``EC-HSM``, ``oct`` or ``oct-HSM``.
        key_ops: Operations that it allows.
        members: Public members of its JWK.
        attributes: ``enabled``, ``exportable``, ``created``, …
        release_policy: Its release policy as JSON, if it has one.
        immutable: Whether that policy can never be changed.
        tags: What its owner noted.
    """

    kid: str
    kty: str
    key_ops: tuple[str, ...] = ()
    members: Mapping[str, str] = field(default_factory=dict, repr=False)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    release_policy: bytes | None = field(default=None, repr=False)
    immutable: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The key's name."""
        return split_key_url(self.kid)[1]

    @property
    def version(self) -> str:
        """The key's version."""
        return split_key_url(self.kid)[2]

    def public_key(self) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
        """
        Return the public half.

        Raises:
            RemoteServiceError: The key has none that is usable (``oct``, an unknown curve).

        """
        plain = {**self.members, "kty": self.kty.removesuffix("-HSM")}
        plain = {name: value for name, value in plain.items() if name not in ("kid", "key_ops")}
        # Azure writes the exponent of a hardware key with a leading zero: AAEAAQ.
        plain |= {name: _bare(plain[name]) for name in ("n", "e") if name in plain}
        try:
            key = jwk.Jwk.from_json(plain, f"key {self.kid}").key
        except EvidenceFormatError as error:
            raise bad_answer(error.message, expected=error.expected, found=error.found) from None
        if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            raise bad_answer(f"key {self.kid}: another kind of key", found=type(key).__name__)
        return key

    @classmethod
    def from_json(cls, bundle: Mapping[str, Any]) -> Self:
        """
        Read a key bundle.

        Raises:
            RemoteServiceError: Malformed, or with a private member.

        """
        key = bundle.get("key")
        if not isinstance(key, Mapping):
            raise bad_answer("the answer holds no key", expected='an object under "key"')
        kid, kty = key.get("kid"), key.get("kty")
        if not isinstance(kid, str) or not isinstance(kty, str) or len(kid) > 1024:
            raise bad_answer("the answer's key has no kid or no kty")
        try:
            split_key_url(kid)
        except ValueError as error:
            raise bad_answer(str(error)) from None
        for name in ("d", "p", "q", "dp", "dq", "qi", "k"):
            if name in key:
                raise bad_answer("the answer's key has a private member", found=name)
        operations = key.get("key_ops", ())
        if not isinstance(operations, list | tuple) or not all(
            isinstance(one, str) for one in operations
        ):
            raise bad_answer("the answer's key_ops are no list of words")
        policy = bundle.get("release_policy")
        data = None
        if isinstance(policy, Mapping):
            try:
                data = jose.b64url_decode(policy.get("data", ""), "release policy")
            except EvidenceFormatError as error:
                raise bad_answer(error.message, found=error.found) from None
        tags = bundle.get("tags") or {}
        return cls(
            kid=kid,
            kty=kty,
            key_ops=tuple(operations),
            members={n: v for n, v in key.items() if n in _PUBLIC and isinstance(v, str)},
            attributes=MappingProxyType(dict(bundle.get("attributes") or {})),
            release_policy=data,
            immutable=isinstance(policy, Mapping) and policy.get("immutable") is True,
            tags={str(n): str(v) for n, v in tags.items()} if isinstance(tags, Mapping) else {},
        )


def _bare(number: str) -> str:
    """Return a number in base64url without the zeros that it begins with."""
    try:
        raw = jose.b64url_decode(number, "number")
    except EvidenceFormatError:
        return number  # whoever reads the key says what is wrong
    return jose.b64url_encode(raw.lstrip(b"\0"))


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _moment(value: datetime | int | None, what: str) -> int | None:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{what}: a moment with its time zone")
        return int(value.timestamp())
    return value


class _Client:
    """What both clients have."""

    _what = "the service"

    def __init__(
        self,
        url: str,
        credential: Credential | str | None,
        *,
        ca: str | bytes | os.PathLike[str] | None,
        api_version: str,
        timeout: float,
        attempts: int,
        verify_challenge_resource: bool,
        proxy: str | None,
    ) -> None:
        self._session = Session(
            url,
            credential=credential,
            ca=ca,
            timeout=timeout,
            attempts=attempts,
            verify_challenge_resource=verify_challenge_resource,
            proxy=proxy,
            what=self._what,
        )
        self.api_version = api_version

    @property
    def url(self) -> str:
        """The service's address."""
        return self._session.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections that are kept, and forget the token."""
        self._session.close()

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        what: str = "",
        repeatable: bool = True,
    ) -> dict[str, Any]:
        """
        Ask for anything else that the service offers.

        Args:
            method: The HTTP method.
            path: Path from the service's root.
            body: JSON of the request.
            what: What is asked for, in errors.
            repeatable: Whether to send it again when it is not known whether it was served.

        Returns:
            The JSON object of the answer.

        Raises:
            RemoteServiceError: Refused, no answer, or an answer that is no JSON object.

        """
        answer = self._session.ask(
            method,
            path,
            query={"api-version": self.api_version},
            body=None if body is None else _json(body),
            max_size=_SMALL,
            repeatable=repeatable,
        )
        return json_of(answer, what or f"{method} {path}")


class VaultClient(_Client):
    """
    A key vault's keys. Thread-safe; connections are kept until `close`.

    Args:
        url: ``https://NAME.vault.azure.net``, or a vault of your own.
        credential: Gives bearer tokens (``get_token(*scopes)``, as azure-identity's do); a text
            is a token.
        ca: The authorities that are trusted *instead of* the system's: PEM, or a file of it.
        api_version: What is asked for.
        timeout: Seconds for one method, all attempts included.
        attempts: How often a busy or broken service is asked.
        verify_challenge_resource: Whether the vault may ask only for tokens of a domain that it
            lies in. False gives whatever token the vault asks for to that vault: for vaults of
            your own, whose address lies in no cloud's domain.
        proxy: ``http://host:port`` to go through. The environment's is never used.

    Raises:
        ValueError: An argument is not usable.

    """

    _what = "the key vault"

    def __init__(
        self,
        url: str,
        credential: Credential | str | None,
        *,
        ca: str | bytes | os.PathLike[str] | None = None,
        api_version: str = "7.4",
        timeout: float = 30.0,
        attempts: int = 4,
        verify_challenge_resource: bool = True,
        proxy: str | None = None,
    ) -> None:
        super().__init__(
            url,
            credential,
            ca=ca,
            api_version=api_version,
            timeout=timeout,
            attempts=attempts,
            verify_challenge_resource=verify_challenge_resource,
            proxy=proxy,
        )

    def _path(self, name: str, version: str = "", operation: str = "") -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name of a key: letters, digits and -, found {name!r:.140}")
        if version and not _VERSION.fullmatch(version):
            raise ValueError(f"version of a key: letters and digits, found {version!r:.80}")
        if operation:
            return f"/keys/{name}/{version}/{operation}"
        return f"/keys/{name}/{version}" if version else f"/keys/{name}"

    def get_key(self, name: str, version: str = "") -> VaultKey:
        """
        Return a key's public half, attributes and release policy.

        Args:
            name: The key's name.
            version: Its version; the newest by default.

        Raises:
            RemoteServiceError: See `request`; ``KeyNotFound`` with status 404.

        """
        # Unversioned, Azure's own clients end the path with a slash, and it is served either way.
        path = self._path(name, version) + ("" if version else "/")
        return VaultKey.from_json(self.request("GET", path, what=f"key {name}"))

    def create_key(
        self,
        name: str,
        kty: str = "RSA-HSM",
        *,
        size: int | None = None,
        curve: str | None = None,
        operations: Iterable[str] | None = None,
        release_policy: bytes | Mapping[str, Any] | None = None,
        immutable: bool = False,
        exportable: bool | None = None,
        enabled: bool = True,
        not_before: datetime | int | None = None,
        expires: datetime | int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> VaultKey:
        """
        Create a key, or a new version of one.

        Args:
            name: The key's name.
            kty: Its type.
            size: Bits of an RSA or oct key.
            curve: Curve of an EC key.
            operations: What it may be used for; the vault's default otherwise.
            release_policy: JSON of the policy under which it may be released.
            immutable: Whether that policy can never be changed.
            exportable: Whether it may be released; by default if there is a policy.
            enabled: Whether it may be used.
            not_before: When it begins to be usable.
            expires: When it ceases to be.
            tags: What to note.

        Raises:
            RemoteServiceError: See `request`.

        """
        body = self._wanted(
            release_policy, immutable, exportable, enabled, not_before, expires, tags
        )
        body["kty"] = kty
        optional = {"key_size": size, "crv": curve}
        body |= {name: value for name, value in optional.items() if value is not None}
        if operations is not None:
            body["key_ops"] = list(operations)
        path = self._path(name) + "/create"
        answer = self.request("POST", path, body, what=f"key {name}", repeatable=False)
        return VaultKey.from_json(answer)

    def import_key(
        self,
        name: str,
        key: Mapping[str, Any],
        *,
        hsm: bool = True,
        release_policy: bytes | Mapping[str, Any] | None = None,
        immutable: bool = False,
        exportable: bool | None = None,
        enabled: bool = True,
        not_before: datetime | int | None = None,
        expires: datetime | int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> VaultKey:
        """
        Import a key.

        Args:
            name: The key's name.
            key: A private JWK.
            hsm: Whether the vault keeps it as a key of its hardware; only such are released.
            release_policy: As for `create_key`, like the others.
            immutable: See there.
            exportable: See there.
            enabled: See there.
            not_before: See there.
            expires: See there.
            tags: See there.

        Raises:
            RemoteServiceError: See `request`.

        """
        body = self._wanted(
            release_policy, immutable, exportable, enabled, not_before, expires, tags
        )
        body |= {"key": dict(key), "hsm": hsm}
        answer = self.request("PUT", self._path(name), body, what=f"key {name}", repeatable=False)
        return VaultKey.from_json(answer)

    def _wanted(
        self,
        policy: bytes | Mapping[str, Any] | None,
        immutable: bool,
        exportable: bool | None,
        enabled: bool,
        not_before: datetime | int | None,
        expires: datetime | int | None,
        tags: Mapping[str, str] | None,
    ) -> dict[str, Any]:
        attributes: dict[str, Any] = {"enabled": enabled}
        moments = {"nbf": _moment(not_before, "not_before"), "exp": _moment(expires, "expires")}
        attributes |= {name: value for name, value in moments.items() if value is not None}
        if exportable is None:
            exportable = policy is not None
        if exportable:
            attributes["exportable"] = True
        body: dict[str, Any] = {"attributes": attributes}
        if policy is not None:
            data = policy if isinstance(policy, bytes) else _json(policy)
            body["release_policy"] = {
                "contentType": POLICY_TYPE,
                "data": jose.b64url_encode(data),
                **({"immutable": True} if immutable else {}),
            }
        if tags is not None:
            body["tags"] = dict(tags)
        return body

    def wrap_key(
        self, name: str, algorithm: str, key: bytes, *, version: str = ""
    ) -> tuple[str, bytes]:
        """
        Wrap a key under a key of the vault.

        Args:
            name: The wrapping key's name.
            algorithm: Such as ``RSA-OAEP-256``.
            key: What to wrap.
            version: The wrapping key's version.

        Returns:
            The identifier of the key that did it, and the wrapped key.

        Raises:
            RemoteServiceError: See `request`.

        """
        return self._operate(name, version, "wrapkey", algorithm, key)

    def unwrap_key(self, name: str, algorithm: str, wrapped: bytes, *, version: str) -> bytes:
        """
        Unwrap what `wrap_key` wrapped; the version must be named.

        Raises:
            RemoteServiceError: See `request`.

        """
        return self._operate(name, version, "unwrapkey", algorithm, wrapped)[1]

    def sign(
        self, name: str, algorithm: str, digest: bytes, *, version: str = ""
    ) -> tuple[str, bytes]:
        """
        Sign a digest; returns the key's identifier and the signature.

        Raises:
            RemoteServiceError: See `request`.

        """
        return self._operate(name, version, "sign", algorithm, digest)

    def _operate(
        self, name: str, version: str, operation: str, algorithm: str, value: bytes
    ) -> tuple[str, bytes]:
        body = {"alg": algorithm, "value": jose.b64url_encode(bytes(value))}
        what = f"{operation} with key {name}"
        path = self._path(name, version, operation)
        answer = self.request("POST", path, body, what=what)
        kid = answer.get("kid")
        if not isinstance(kid, str):
            raise bad_answer(f"{what}: the answer names no key")
        try:
            return kid, jose.b64url_decode(answer.get("value", ""), what)
        except EvidenceFormatError as error:
            raise bad_answer(error.message, found=error.found) from None

    def release(
        self,
        name: str,
        target: str,
        *,
        version: str = "",
        nonce: str | None = None,
        enc: str | None = None,
    ) -> str:
        """
        Ask for the release of a key to what an attestation token attests.

        Args:
            name: The key's name.
            target: The token.
            version: The key's version; the newest by default.
            nonce: What the answer shall repeat.
            enc: One of ``RELEASE_ALGORITHMS``; the vault's default otherwise.

        Returns:
            The signed answer (JWS); only who has the transfer key can open what is in it.

        Raises:
            RemoteServiceError: See `request`; ``Forbidden`` if the policy is not met.
            ValueError: *enc* is not known.

        """
        if enc is not None and enc not in RELEASE_ALGORITHMS:
            raise ValueError(f"enc: one of {', '.join(RELEASE_ALGORITHMS)}, found {enc!r:.60}")
        body = {"target": target, "nonce": nonce, "enc": enc}
        answer = self.request(
            "POST",
            self._path(name, version, "release"),
            {name: value for name, value in body.items() if value is not None},
            what=f"release of key {name}",
        )
        value = answer.get("value")
        if not isinstance(value, str):
            raise bad_answer(f"release of key {name}: the answer holds no token")
        return value


class AttestationClient(_Client):
    """
    An attestation service. Thread-safe; connections are kept until `close`.

    Args:
        url: ``https://NAME.REGION.attest.azure.net``, or a service of your own.
        credential: As for `VaultClient`; attesting needs none.
        ca: As for `VaultClient`, like the others.
        api_version: What is asked for.
        timeout: Seconds for one method, all attempts included.
        attempts: How often a busy or broken service is asked.
        verify_challenge_resource: As for `VaultClient`.
        proxy: As for `VaultClient`.

    """

    _what = "the attestation service"

    def __init__(
        self,
        url: str,
        credential: Credential | str | None = None,
        *,
        ca: str | bytes | os.PathLike[str] | None = None,
        api_version: str = "2022-08-01",
        timeout: float = 30.0,
        attempts: int = 4,
        verify_challenge_resource: bool = True,
        proxy: str | None = None,
    ) -> None:
        super().__init__(
            url,
            credential,
            ca=ca,
            api_version=api_version,
            timeout=timeout,
            attempts=attempts,
            verify_challenge_resource=verify_challenge_resource,
            proxy=proxy,
        )

    def attest(
        self,
        kind: str,
        evidence: bytes,
        *,
        runtime_data: bytes | None = None,
        json_data: bool = True,
        nonce: str | None = None,
    ) -> str:
        """
        Have evidence judged.

        Args:
            kind: ``PyEnclave``, ``SgxEnclave``, ``OpenEnclave``, ``SevSnpVm`` or ``TdxVm``.
            evidence: The evidence, quote or report.
            runtime_data: What its report data is the SHA-256 of.
            json_data: Whether that is JSON, whose content is then in the token.
            nonce: What the token shall repeat.

        Returns:
            The token; nothing about it is verified here.

        Raises:
            RemoteServiceError: Refused, or no answer.
            ValueError: *kind* is none of them.

        """
        body = attest_request(
            kind, evidence, runtime_data=runtime_data, json_data=json_data, nonce=nonce
        )
        token = self.request("POST", f"/attest/{kind}", body, what=f"attest/{kind}").get("token")
        if not isinstance(token, str):
            raise bad_answer(f"attest/{kind}: the answer holds no token")
        return token

    def certs(self) -> bytes:
        """
        Return the set of keys that sign tokens (JWKS), as it came.

        Raises:
            RemoteServiceError: See `request`.

        """
        return _json(self.request("GET", "/certs"))

    def openid_configuration(self) -> dict[str, Any]:
        """
        Return the discovery document.

        Raises:
            RemoteServiceError: See `request`.

        """
        return self.request("GET", "/.well-known/openid-configuration")
