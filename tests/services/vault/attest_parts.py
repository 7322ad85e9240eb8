"""An attestation service of the tests, its tokens, and the program that they are of."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from typing import Any

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from pyenclave.formats import jose
from pyenclave.formats.jwk import Jwks, public_members
from pyenclave.formats.release_terms import ReleaseTerms
from pyenclave.services.vault.backends.base import ReleaseRequest
from pyenclave.services.vault.release.authorities import AuthorityKeys, KnownAuthority

AUTHORITY = "https://attest.example"
POLICY = {
    "version": "1.0.0",
    "anyOf": [
        {
            "authority": f"{AUTHORITY}/",
            "allOf": [
                {"claim": "x-ms-sgx-mrsigner", "equals": "ab" * 32},
                {"claim": "x-ms-sgx-is-debuggable", "equals": False},
            ],
        }
    ],
}
POLICY_BYTES = json.dumps(POLICY).encode()
POLICY_HASH = hashlib.sha256(POLICY_BYTES).digest()


@functools.cache
def authority_key() -> ec.EllipticCurvePrivateKey:
    """The attestation service's."""
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def transfer_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """The attested program's."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def token(
    *, transfer: rsa.RSAPrivateKey | None = None, key: Any = None, kid: str = "one", **changes: Any
) -> str:
    """A token of the attestation service."""
    chosen = transfer or transfer_key()
    members = {**public_members(chosen.public_key()), "key_ops": ["encrypt"], "kid": "transfer"}
    now = int(time.time())
    claims = {
        "iss": AUTHORITY,
        "iat": now,
        "nbf": now,
        "exp": now + 600,
        "jti": os.urandom(8).hex(),
        "x-ms-sgx-mrsigner": "ab" * 32,
        "x-ms-sgx-is-debuggable": False,
        "x-ms-runtime": {"keys": [members]},
        **changes,
    }
    return jose.sign(claims, key=key or authority_key(), kid=kid)


def jwks_of(key: ec.EllipticCurvePrivateKey, kid: str = "one") -> bytes:
    """The key set that shows *key*."""
    return json.dumps({"keys": [{**public_members(key.public_key()), "kid": kid}]}).encode()


def authorities() -> AuthorityKeys:
    """The configured attestation service, by its keys."""
    jwks = Jwks.from_bytes(jwks_of(authority_key()))
    return AuthorityKeys([KnownAuthority(url=AUTHORITY, jwks=jwks)])


def terms() -> ReleaseTerms:
    """What keys are bound to."""
    return authorities().terms()


def asked(**changes: Any) -> ReleaseRequest:
    """A request that would be granted."""
    return ReleaseRequest(
        **{
            "policy": POLICY_BYTES,
            "target": changes.pop("target", None) or token(),
            "enc": "RSA_AES_KEY_WRAP_256",
            **changes,
        }
    )


def opened(ciphertext: bytes, transfer: rsa.RSAPrivateKey | None = None) -> bytes:
    """Unwrap as the attested program does."""
    private = transfer or transfer_key()
    size = private.key_size // 8
    scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    once = private.decrypt(ciphertext[:size], scheme)
    return keywrap.aes_key_unwrap_with_padding(once, ciphertext[size:])
