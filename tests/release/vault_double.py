"""A key vault and an attestation service in one small server: real wire, real wraps, test roots."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from https_double import Asked, Authority, Key, Reply, Server

from pyenclave.formats import jose, jwk

CHALLENGE = 'Bearer authorization="https://login.example/t", resource="https://vault.azure.net"'
HASHES = {
    "CKM_RSA_AES_KEY_WRAP": hashes.SHA1(),
    "RSA_AES_KEY_WRAP_256": hashes.SHA256(),
    "RSA_AES_KEY_WRAP_384": hashes.SHA384(),
}
Secret = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | bytes


def coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def material(secret: Secret) -> bytes:
    if isinstance(secret, bytes):
        return secret
    return secret.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def wrap(secret: bytes, public: rsa.RSAPublicKey, enc: str, *, kek: bytes | None = None) -> bytes:
    kek = os.urandom(32) if kek is None else kek
    digest = HASHES[enc]
    scheme = padding.OAEP(padding.MGF1(digest), digest, None)
    return public.encrypt(kek, scheme) + keywrap.aes_key_wrap_with_padding(kek, secret)


def public_half(secret: Secret) -> dict[str, str]:
    if isinstance(secret, bytes):
        return {"kty": "oct-HSM"}
    members = jwk.public_members(secret.public_key())
    return {**members, "kty": members["kty"] + "-HSM"}


@dataclass
class Signer:
    """Who signs answers: a leaf for the vault's name under an intermediate authority."""

    key: Key
    chain: list[bytes]  # DER, leaf first

    @classmethod
    def under(cls, authority: Authority, host: str, **options: Any) -> Signer:
        below = authority.intermediate()
        key, leaf = below.leaf(host, **options)
        chain = [
            one.public_bytes(serialization.Encoding.DER)
            for one in (leaf, below.certificate, authority.certificate)
        ]
        return cls(key, chain)

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        x5c = [base64.b64encode(one).decode() for one in self.chain]
        own = {"x5c": x5c, "x5t#S256": coded(hashlib.sha256(self.chain[0]).digest())}
        name = "RS256" if isinstance(self.key, rsa.RSAPrivateKey) else None
        return jose.sign(claims, key=self.key, algorithm=name, kid="signer", header=own | header)


@dataclass
class Vault:
    """What a test may turn: each hook changes one thing of what is answered."""

    authority: Authority
    signer: Signer
    keys: dict[str, list[tuple[str, Secret]]] = field(
        default_factory=dict
    )  # versions, oldest first
    attributes: dict[str, Any] = field(default_factory=lambda: {"enabled": True})
    token_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    token_lifetime: float = 3600
    judge: Callable[[bytes, bytes], None] = lambda evidence, runtime: None
    change_token: Callable[[dict[str, Any]], None] = lambda claims: None
    change_claims: Callable[[dict[str, Any]], None] = lambda claims: None
    change_cipher: Callable[[bytes], bytes] = lambda data: data
    change_jws: Callable[[str], str] = lambda token: token
    override: Callable[[Asked], Reply | None] = lambda asked: None
    url: str = ""
    attested: int = 0
    nonces: int = 0
    released: int = 0

    def start(self) -> Server:
        server = Server(self.authority, self.answer)
        self.url = server.url
        return server

    def put(self, name: str, secret: Secret) -> str:
        version = os.urandom(16).hex()
        self.keys.setdefault(name, []).append((version, secret))
        return version

    def answer(self, asked: Asked) -> Reply:
        reply = self.override(asked)
        if reply is not None:
            return reply
        if asked.path.startswith("/attest/"):
            return self._attest(asked)
        if asked.path == "/nonces":
            self.nonces += 1
            return Reply({"nonce": f"nonce-of-the-service-{self.nonces}", "expires": 0})
        if "authorization" not in asked.headers:
            return Reply(status=401, headers={"WWW-Authenticate": CHALLENGE})
        return self._release(asked)

    def _attest(self, asked: Asked) -> Reply:
        self.attested += 1
        body = asked.json()
        runtime = decoded(body["runtimeData"]["data"])
        evidence = next(decoded(body[n]) for n in ("evidence", "quote", "report") if n in body)
        self.judge(evidence, runtime)
        now = time.time()
        claims = {
            "iss": self.url,
            "iat": int(now),
            "exp": int(now + self.token_lifetime),
            "x-ms-runtime": json.loads(runtime),
            **({"nonce": body["nonce"]} if "nonce" in body else {}),
        }
        self.change_token(claims)
        return Reply({"token": jose.sign(claims, key=self.token_key, kid="t")})

    def _release(self, asked: Asked) -> Reply:
        _, _, name, version, _ = asked.path.split("/")
        versions = dict(self.keys.get(name, ()))
        if not versions:
            return Reply({"error": {"code": "KeyNotFound", "message": "none"}}, status=404)
        version = version or list(versions)[-1]
        if version not in versions:
            return Reply({"error": {"code": "KeyNotFound", "message": "none"}}, status=404)
        body = asked.json()
        token = jose.Jws.from_bytes(body["target"])
        claims = token.claims()
        good = token.verify(self.token_key.public_key(), allowed={"ES256"})
        if not good or (claims.get("exp") or 9e99) < time.time():
            inner = {"code": "ForbiddenByPolicy", "reference": "audit-7"}
            error = {"code": "Forbidden", "message": "not met", "innererror": inner}
            return Reply({"error": error}, status=403)
        self.released += 1
        key = claims["x-ms-runtime"]["keys"][0]
        n, e = (int.from_bytes(decoded(key[x]), "big") for x in ("n", "e"))
        secret = versions[version]
        data = wrap(material(secret), rsa.RSAPublicNumbers(e, n).public_key(), body["enc"])
        inner = {
            "schema_version": "1.0",
            "header": {},
            "ciphertext": coded(self.change_cipher(data)),
        }
        kid = f"{self.url}/keys/{name}/{version}"
        answer = {
            "request": {
                "api-version": asked.query.partition("=")[2],
                "enc": body["enc"],
                "kid": kid,
                "nonce": body["nonce"],
            },
            "response": {
                "key": {
                    "key": {
                        **public_half(secret),
                        "kid": kid,
                        "key_ops": ["unwrapKey"],
                        "key_hsm": coded(json.dumps(inner).encode()),
                    },
                    "attributes": self.attributes,
                    "release_policy": {"contentType": "application/json", "data": "e30"},
                }
            },
        }
        self.change_claims(answer)
        return Reply({"value": self.change_jws(self.signer.sign(answer))})
