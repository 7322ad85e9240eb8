"""Small parts for tests of the vault: a backend in memory, rights in a table, a server."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
from azure.core.credentials import AccessToken
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.errors import ServiceError
from pyenclave.formats import jwa
from pyenclave.services.identity.caller import Caller
from pyenclave.services.storage import Database
from pyenclave.services.storage.transaction import Transaction
from pyenclave.services.vault.backends.base import (
    KeyMaterial,
    KeySpec,
    Operation,
    bad_parameter,
)
from pyenclave.services.vault.release.tables import PART as RELEASE_PART
from pyenclave.services.vault.service import Vault
from pyenclave.services.vault.tables import PART
from pyenclave.services.web.run import Server

POLICY = {
    "version": "1.0.0",
    "anyOf": [
        {"authority": "https://attest.example.com", "allOf": [{"claim": "a", "equals": "b"}]}
    ],
}


def b64(data: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """Read base64url without padding."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def release_policy(**changes: Any) -> dict[str, Any]:
    """Return the member release_policy of a request."""
    return {"data": b64(json.dumps(POLICY | changes).encode())}


class MemoryBackend:
    """A key-encryption backend whose key is in this process: for tests only."""

    name = "memory"

    def __init__(self, kek: bytes | None = None) -> None:
        self.kek = AESGCM(kek or os.urandom(32))
        self.closed = False
        self.made = 0
        # RSA keys take long to make; a test that needs many takes turns with a few.
        self.rsa: list[rsa.RSAPrivateKey] = []

    def _wrap(self, key: jwa.Key, context: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self.kek.encrypt(nonce, _bytes_of(key), context)

    def _open(self, wrapped: bytes, context: bytes) -> jwa.Key:
        try:
            data = self.kek.decrypt(wrapped[:12], wrapped[12:], context)
        except InvalidTag:
            raise ServiceError(
                "the key is damaged", status=500, error_code="InternalError"
            ) from None
        if data[:1] == b"s":
            return data[1:]
        key = serialization.load_der_private_key(data[1:], None)
        assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
        return key

    async def generate(self, spec: KeySpec, context: bytes) -> KeyMaterial:
        self.made += 1
        kind = spec.kty.removesuffix("-HSM")
        key: jwa.Key
        if kind == "RSA":
            key = self.rsa[self.made % len(self.rsa)] if self.rsa else _rsa(spec.size or 2048)
        elif kind == "EC":
            key = ec.generate_private_key(jwa.CURVES[spec.crv or "P-256"])
        else:
            key = os.urandom((spec.size or 256) // 8)
        return KeyMaterial(public=_public(key), wrapped=self._wrap(key, context))

    async def import_key(self, jwk: Mapping[str, Any], context: bytes) -> KeyMaterial:
        try:
            key = _private(jwk)
        except ValueError:
            raise bad_parameter("the key is no key") from None
        return KeyMaterial(public=_public(key), wrapped=self._wrap(key, context))

    async def perform(
        self,
        wrapped: bytes,
        context: bytes,
        operation: Operation,
        algorithm: str,
        fields: Mapping[str, bytes],
    ) -> dict[str, bytes]:
        key = self._open(wrapped, context)
        try:
            return jwa.perform(key, operation, algorithm, fields)
        except jwa.AlgorithmError as error:
            raise bad_parameter(error.message) from None

    async def rebind(self, wrapped: bytes, context: bytes, new_context: bytes) -> bytes:
        return self._wrap(self._open(wrapped, context), new_context)

    async def release(
        self, wrapped: bytes, context: bytes, *, modulus: bytes, exponent: int, enc: str
    ) -> bytes:
        data = _bytes_of(self._open(wrapped, context))[1:]
        return jwa.wrap_for_release(data, modulus=modulus, exponent=exponent, enc=enc)

    async def random(self, count: int) -> bytes:
        return os.urandom(count)

    async def close(self) -> None:
        self.closed = True


def _rsa(size: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=size)


def _bytes_of(key: jwa.Key) -> bytes:
    if isinstance(key, bytes):
        return b"s" + key
    return b"p" + key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _public(key: jwa.Key) -> dict[str, str]:
    if isinstance(key, bytes):
        return {}
    if isinstance(key, rsa.RSAPrivateKey):
        numbers = key.public_key().public_numbers()
        return {"n": _number(numbers.n), "e": _number(numbers.e)}
    point = key.public_key().public_numbers()
    size = (key.curve.key_size + 7) // 8
    name = next(name for name, curve in jwa.CURVES.items() if curve.name == key.curve.name)
    return {
        "crv": name,
        "x": b64(point.x.to_bytes(size, "big")),
        "y": b64(point.y.to_bytes(size, "big")),
    }


def _private(jwk: Mapping[str, Any]) -> jwa.Key:
    value = {
        name: int.from_bytes(unb64(text), "big")
        for name, text in jwk.items()
        if name not in ("kty", "crv", "key_ops", "k")
    }
    if "k" in jwk:
        return unb64(jwk["k"])
    if "crv" in jwk:
        public = ec.EllipticCurvePublicNumbers(value["x"], value["y"], jwa.CURVES[jwk["crv"]])
        return ec.EllipticCurvePrivateNumbers(value["d"], public).private_key()
    numbers = rsa.RSAPublicNumbers(value["e"], value["n"])
    return rsa.RSAPrivateNumbers(
        value["p"], value["q"], value["d"], value["dp"], value["dq"], value["qi"], numbers
    ).private_key()


def rsa_jwk(key: rsa.RSAPrivateKey) -> dict[str, str]:
    """Return the private JWK of *key*."""
    numbers = key.private_numbers()
    parts = {"d": numbers.d, "p": numbers.p, "q": numbers.q}
    parts |= {"dp": numbers.dmp1, "dq": numbers.dmq1, "qi": numbers.iqmp}
    return {"kty": "RSA", **_public(key)} | {name: _number(part) for name, part in parts.items()}


class Tokens:
    """Authenticates by a table: the token is the caller's name."""

    def __init__(self) -> None:
        self.names = {"admin", "reader", "stranger"}

    def remembered(self, headers: Mapping[str, str]) -> Caller | None:
        word = headers.get("authorization", "").removeprefix("Bearer ")
        if word not in self.names:
            return None
        digest = hashlib.sha256(word.encode()).hexdigest()
        return Caller("tenant", word, None, "app", digest, time.time() + 3600)

    async def authenticated(self, headers: Mapping[str, str]) -> Caller:
        raise ServiceError(
            "AKV10000: Request is missing a Bearer or PoP token.",
            status=401,
            error_code="Unauthorized",
            challenge='Bearer authorization="https://login.example.com/tenant", '
            'resource="https://vault.azure.net"',
        )


class Table:
    """Rights by a table; ``admin`` has all."""

    def __init__(self) -> None:
        self.granted: set[tuple[str, str, str]] = set()

    def check(self, tx: Transaction, caller: Caller, action: str, scope: str) -> None:
        name = caller.object_id
        if name == "admin":
            return
        if (name, action, scope) in self.granted or (name, action, "/") in self.granted:
            return
        raise ServiceError(
            "Caller is not authorized to perform action on resource.",
            status=403,
            error_code="Forbidden",
            inner="ForbiddenByRbac",
        )


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.ahead = dt.timedelta()

    def __call__(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.ahead


class Credential:
    """Enough of a credential for Azure's clients."""

    def __init__(self, name: str = "admin") -> None:
        self.name = name

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return AccessToken(self.name, int(time.time()) + 3600)


class AsyncCredential(Credential):
    """The same for their asynchronous form."""

    async def get_token(self, *scopes: str, **options: Any) -> AccessToken:  # type: ignore[override]
        return super().get_token(*scopes, **options)

    async def close(self) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class Running:
    """A vault that is served, and what tests reach of it."""

    def __init__(self, vault: Vault, server: Server, ca: Path, **parts: Any) -> None:
        self.vault = vault
        self.server = server
        self.url = server.url
        self.ca = str(ca)
        self.backend: MemoryBackend = parts["backend"]
        self.rights: Table = parts["rights"]
        self.db: Database = parts["db"]
        self.clock: Clock = parts["clock"]
        self.http = self.client()

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, verify=ssl.create_default_context(cafile=self.ca), timeout=30
        )

    def request(
        self, method: str, path: str, body: Any = None, *, who: str = "admin", **options: Any
    ) -> httpx.Response:
        """Send a request; an api-version is added if there is none."""
        if "api-version" not in path:
            path += ("&" if "?" in path else "?") + "api-version=7.4"
        headers = {"authorization": f"Bearer {who}"} | options.pop("headers", {})
        if body is not None and not isinstance(body, bytes):
            options["json"] = body
        elif body is not None:
            options["content"] = body
            headers.setdefault("content-type", "application/json")
        return self.http.request(method, path, headers=headers, **options)

    def rows(self) -> list[dict[str, Any]]:
        """Return the audit log."""
        from sqlalchemy import select

        from pyenclave.services.storage.tables import audit

        def read(tx: Transaction) -> list[dict[str, Any]]:
            return [
                json.loads(row.body)
                for row in tx.connection.execute(select(audit.c.body).order_by(audit.c.seq))
            ]

        return self.db.submit(read).result()


@contextlib.contextmanager
def running_vault(folder: Path, **options: Any) -> Iterator[Running]:
    """Serve a vault over a database in *folder*."""
    clock = options.pop("clock", None) or Clock()
    backend = options.pop("backend", None) or MemoryBackend(b"k" * 32)
    rights = options.pop("rights", None) or Table()
    url = options.pop("url", None) or f"sqlite:///{folder / 'vault.db'}"
    secrets = options.pop("secrets", None)
    parts = [PART, RELEASE_PART]
    db = Database.open(url, parts=parts, durability="normal", clock=clock, secrets=secrets)
    try:
        if releasing := options.pop("releasing", None):
            options["releases"] = releasing(db, backend)
        vault = Vault(db, backend=backend, rights=rights, authenticator=Tokens(), **options)
        server = Server(vault.service)
        vault.place.base = server.listen()
        ca = folder / "ca.pem"
        ca.write_bytes(server.ca_pem or b"")
        with server:
            running = Running(vault, server, ca, backend=backend, rights=rights, db=db, clock=clock)
            with running.http:
                yield running
    finally:
        db.close()
