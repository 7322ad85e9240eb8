"""
The answer to a release: a JWS that names the vault by its certificate (notes, 10.2).

``alg`` is RS256 with an RSA certificate, which is what public clients expect, else the algorithm of
the curve. The leaf's name is the vault's host: clients check that, and the chain.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pyenclave.errors import ConfigurationError
from pyenclave.formats import jose

__all__ = ["SCHEMA", "AnswerSigner", "key_hsm", "payload"]

SCHEMA: Final = "1.0"
_KEYS = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class AnswerSigner:
    """
    Signs answers.

    Args:
        key: RSA (2,048 bits and more) or EC on a NIST curve.
        chain: Its certificates in DER, leaf first; a root at the end may stay away.

    Raises:
        ValueError: The leaf does not have that key, or no algorithm belongs to it.

    """

    def __init__(self, key: _KEYS, chain: Sequence[bytes]) -> None:
        leaf = x509.load_der_x509_certificate(chain[0])
        if leaf.public_key() != key.public_key():
            raise ValueError("the first certificate of the chain has another key")
        fitting = jose.algorithms_of(key.public_key())
        if not fitting:
            raise ValueError("no algorithm belongs to this kind or size of key")
        self.algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else min(fitting)
        self._key = key
        self._leaf = leaf
        thumbprint = jose.b64url_encode(hashlib.sha256(chain[0]).digest())
        self.kid = thumbprint
        self._header = {
            "x5t#S256": thumbprint,
            "x5c": [base64.b64encode(item).decode("ascii") for item in chain],
        }

    @classmethod
    def from_pem(cls, chain: bytes, key: bytes) -> Self:
        """
        Read certificate chain and private key, as a server's TLS has them.

        Raises:
            ConfigurationError: They are not PEM, do not belong together, or are of no use here.

        """
        try:
            private = serialization.load_pem_private_key(key, None)
            listed = x509.load_pem_x509_certificates(chain)
            if not isinstance(private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
                raise ValueError(f"a key of kind {type(private).__name__}")
            form = serialization.Encoding.DER
            return cls(private, [item.public_bytes(form) for item in listed])
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                "certificate and key that sign released keys", found=str(error)
            ) from None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """DNS names and addresses of the leaf."""
        try:
            found = self._leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return ()
        dns = found.value.get_values_for_type(x509.DNSName)
        addresses = found.value.get_values_for_type(x509.IPAddress)
        return (*dns, *(str(item) for item in addresses))

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Return *claims* as a JWS."""
        return jose.sign(
            claims, key=self._key, algorithm=self.algorithm, kid=self.kid, header=self._header
        )


def key_hsm(ciphertext: bytes, *, kid: str, enc: str) -> str:
    """Return what was wrapped for the transfer key *kid* as Key Vault writes it."""
    document = {
        "schema_version": SCHEMA,
        "header": {**({"kid": kid} if kid else {}), "alg": "dir", "enc": enc},
        "ciphertext": jose.b64url_encode(ciphertext),
    }
    return jose.b64url_encode(json.dumps(document, separators=(",", ":")).encode("ascii"))


def payload(
    bundle: Mapping[str, Any],
    *,
    kid: str,
    transfer: str,
    enc: str,
    nonce: str | None,
    api_version: str,
    ciphertext: bytes,
) -> dict[str, Any]:
    """
    Return what is signed.

    Args:
        bundle: The key as the vault shows it (``key``, ``attributes``, ``release_policy``).
        kid: Identifier of the key as the caller asked for it: with its version if he named one.
        transfer: Name of the transfer key in the token.
        enc: The construction that the key is wrapped by.
        nonce: What the caller sent.
        api_version: What the caller asked with.
        ciphertext: The wrapped key.

    """
    request: dict[str, Any] = {"api-version": api_version, "enc": enc, "kid": kid}
    if nonce is not None:
        request["nonce"] = nonce
    shown = {
        **bundle,
        "key": {**bundle["key"], "key_hsm": key_hsm(ciphertext, kid=transfer, enc=enc)},
    }
    return {"request": request, "response": {"key": shown}}
