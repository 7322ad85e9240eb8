"""
What is said when a key is released: requests, and the answer taken apart. No cryptography.

Notes on key release, 10.1 to 10.3, and on Azure Attestation, 8.1. Both an enclave and clients
outside use this; what is read here is not verified yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose, jsonstrict

__all__ = [
    "ALGORITHMS",
    "TRANSFER_KID",
    "ReleaseAnswer",
    "attest_request",
    "canonical",
    "release_request",
    "runtime_data",
    "service_url",
    "split_kid",
]

# What wraps the AES key, and the name of its hash function.
ALGORITHMS: Final[Mapping[str, str]] = {
    "CKM_RSA_AES_KEY_WRAP": "SHA-1",
    "RSA_AES_KEY_WRAP_256": "SHA-256",
    "RSA_AES_KEY_WRAP_384": "SHA-384",
}
TRANSFER_KID: Final = "pyenclave-transfer"
MAX_ANSWER: Final = 512 << 10  # bytes of a JWS; a key with a large policy has 150 KB
MAX_CIPHERTEXT: Final = 16 << 10

# How each kind's evidence is called in its request.
_MEMBER: Final = {
    "SgxEnclave": "quote",
    "TdxVm": "quote",
    "OpenEnclave": "report",
    "SevSnpVm": "report",
    "PyEnclave": "evidence",
}


_URL: Final = re.compile(
    r"https://(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z](?:[0-9A-Za-z.-]{0,251}[0-9A-Za-z])?)"
    r"(?::([0-9]{1,5}))?((?:/[0-9A-Za-z._~-]{1,128}){0,8})/?"
)
_KID: Final = re.compile(r"/keys/([0-9A-Za-z-]{1,127})(?:/([0-9A-Za-z]{1,64}))?/?")


def service_url(url: str, what: str = "service") -> tuple[str, str]:
    """
    Return the address of a service in its one form, and its host.

    Args:
        url: ``https://host[:port][/path]``.
        what: What it is called in errors.

    Returns:
        Host in lower case, no port 443, no slash at the end; and the host by itself.

    Raises:
        ValueError: Another scheme, a user, a query or fragment, or no address.

    """
    match = _URL.fullmatch(url)
    port = int(match[2]) if match and match[2] else 443
    dots = match is not None and any(part in (".", "..") for part in match[3].split("/"))
    if match is None or not 0 < port < 65536 or dots:
        raise ValueError(f"{what}: expected https://host[:port], found {url!r:.200}")
    host = match[1].lower()
    shown = host if port == 443 else f"{host}:{port}"
    return f"https://{shown}{match[3]}", host.strip("[]")


def split_kid(kid: str) -> tuple[str, str, str]:
    """
    Take the identifier of a key apart.

    Args:
        kid: ``https://VAULT/keys/NAME[/VERSION]``.

    Returns:
        The vault's address in its one form, the key's name, and its version (may be empty).

    Raises:
        ValueError: It is no such identifier.

    """
    at = kid.find("/keys/")
    match = _KID.fullmatch(kid[at:]) if at > 0 else None
    if match is None:
        raise ValueError(f"expected https://VAULT/keys/NAME[/VERSION], found {kid!r:.200}")
    return service_url(kid[:at], "vault")[0], match[1], match[2] or ""


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted names, no spaces and ASCII only: one encoding of one value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def runtime_data(n: int, e: int, nonce: str | None = None) -> bytes:
    """
    Return the runtime data that names a transfer key, which evidence binds by its SHA-256.

    Args:
        n: Modulus of the transfer key.
        e: Its exponent.
        nonce: What makes the evidence, and so the token, of this moment.

    """
    key = {
        "kty": "RSA",
        "kid": TRANSFER_KID,
        "key_ops": ["encrypt"],
        "n": jose.b64url_encode(n.to_bytes((n.bit_length() + 7) // 8, "big")),
        "e": jose.b64url_encode(e.to_bytes((e.bit_length() + 7) // 8, "big")),
    }
    return canonical({"keys": [key], **({} if nonce is None else {"nonce": nonce})})


def attest_request(
    kind: str,
    evidence: bytes,
    *,
    runtime_data: bytes | None = None,
    json_data: bool = True,
    nonce: str | None = None,
) -> dict[str, Any]:
    """
    Return the body of ``POST /attest/KIND``.

    Args:
        kind: ``SgxEnclave``, ``OpenEnclave``, ``SevSnpVm``, ``TdxVm`` or ``PyEnclave``.
        evidence: Quote, report or evidence.
        runtime_data: What the report data is the SHA-256 of.
        json_data: Whether that is JSON, whose content is then in the token.
        nonce: What the token shall repeat.

    Raises:
        ValueError: Another kind.

    """
    member = _MEMBER.get(kind)
    if member is None:
        raise ValueError(f"kind of evidence: one of {', '.join(_MEMBER)}, found {kind!r:.60}")
    body: dict[str, Any] = {member: jose.b64url_encode(evidence)}
    if runtime_data is not None:
        body["runtimeData"] = {
            "data": jose.b64url_encode(runtime_data),
            "dataType": "JSON" if json_data else "Binary",
        }
    if nonce is not None:
        body["nonce"] = nonce
    return body


def release_request(target: str, *, nonce: str, enc: str) -> dict[str, str]:
    """Return the body of ``POST /keys/NAME/VERSION/release``."""
    return {"target": target, "nonce": nonce, "enc": enc}


def _member(value: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    found = value.get(name)
    if not isinstance(found, kind):
        raise EvidenceFormatError(
            f"{what}: {name}", expected=kind.__name__, found=type(found).__name__
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAnswer:
    """
    What the signed answer to a release says.

    Attributes:
        jws: The token; its signature is the caller's to verify.
        x5c: Certificates that came with it, DER, leaf first.
        enc: The algorithm that it says was asked for.
        asked: Identifier of the key that it says was asked for.
        nonce: The nonce that it repeats.
        kid: Identifier of the key that is released.
        kty: Its type.
        members: Public members of its JWK.
        attributes: Its attributes.
        ciphertext: The wrapped key.
    """

    jws: jose.Jws
    x5c: tuple[bytes, ...] = field(repr=False)
    enc: str
    asked: str
    nonce: str | None
    kid: str
    kty: str
    members: Mapping[str, Any] = field(repr=False)
    attributes: Mapping[str, Any] = field(repr=False)
    ciphertext: bytes = field(repr=False)

    @classmethod
    def from_bytes(cls, token: bytes | str) -> Self:
        """
        Take an answer apart (notes on key release, 10.2).

        Raises:
            EvidenceFormatError: Not a token of that form.

        """
        what = "release answer"
        jws = jose.Jws.from_bytes(token, what, max_size=MAX_ANSWER)
        claims = jws.claims(what)
        asked = _member(claims, "request", dict, what)
        response = _member(claims, "response", dict, what)
        bundle = _member(response, "key", dict, f"{what}: response")
        key = _member(bundle, "key", dict, f"{what}: response.key")
        nonce = asked.get("nonce")
        if nonce is not None and not isinstance(nonce, str):
            raise EvidenceFormatError(f"{what}: request.nonce", expected="text")
        wrapped = _member(key, "key_hsm", str, f"{what}: response.key.key")
        inner = jsonstrict.object_of(
            jose.b64url_decode(wrapped, f"{what}: key_hsm"), f"{what}: key_hsm"
        )
        text = _member(inner, "ciphertext", str, f"{what}: key_hsm")
        ciphertext = jose.b64url_decode(text, f"{what}: ciphertext")
        if not 0 < len(ciphertext) <= MAX_CIPHERTEXT:
            raise EvidenceFormatError(
                f"{what}: ciphertext",
                expected=f"1 to {MAX_CIPHERTEXT} bytes",
                found=len(ciphertext),
            )
        attributes = bundle.get("attributes")
        return cls(
            jws=jws,
            x5c=jose.x5c_of(jws.header.get("x5c"), f"{what}: x5c"),
            enc=_member(asked, "enc", str, f"{what}: request"),
            asked=_member(asked, "kid", str, f"{what}: request"),
            nonce=nonce,
            kid=_member(key, "kid", str, f"{what}: response.key.key"),
            kty=_member(key, "kty", str, f"{what}: response.key.key"),
            members=key,
            attributes=attributes if isinstance(attributes, dict) else {},
            ciphertext=ciphertext,
        )
