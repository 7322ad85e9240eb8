"""
Policies and certificates as they are uploaded: JWTs, signed or not (8.3 of the project's notes).

Accepted are ``alg: none`` written exactly so, and signatures by the key of the certificate in the
header (``x5c``, or ``jwk`` with ``x5c``). The certificate shows which key signed; whether that key
may sign is the service's decision. Microsoft's client for Python writes ``RSA256`` as algorithm,
which no register has: it is read as what it does, RS256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import jose, jsonstrict
from pyenclave.formats.jwk import public_members
from pyenclave.formats.x509 import Certificate
from pyenclave.services.attestation.encoding import decode

__all__ = [
    "MAX_UPLOAD",
    "USE",
    "Upload",
    "certificate_of",
    "demand_signing_key",
    "jwk_of",
    "policy_of",
    "read_upload",
    "sign_certificate",
    "sign_policy",
]

MAX_UPLOAD: Final = 256 << 10  # characters
_SIGNED: Final = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384"))
_ALIASES: Final = {"RSA256": "RS256"}
# Whatever else a header says would change what the token means, or where its key comes from.
_HEADER: Final = frozenset(("alg", "typ", "cty", "kid", "x5c", "jwk", "x5t", "x5t#S256"))
# What Azure's protocol has no place for: the one change that a signer means.
USE: Final = "x-pyenclave-use"
_USE: Final = re.compile(r"(policies/(set|reset) [A-Za-z]{1,32}|certificates/(add|remove))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """
    An uploaded token whose signature, if it has one, holds.

    Attributes:
        text: The token as it came.
        payload: What it says; empty bytes in a reset.
        signer: Certificate whose key signed it; None for an unsecured token.
        chain: That certificate and those that came with it.
        use: The change that it was made for, ``policies/set SgxEnclave`` or the like, if its header
            says so (`USE`).
    """

    text: str = field(repr=False)
    payload: bytes
    signer: Certificate | None = None
    chain: tuple[Certificate, ...] = ()
    use: str | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the whole token: ``x-ms-policy-token-hash``."""
        return hashlib.sha256(self.text.encode("ascii")).digest()

    @property
    def signing_digest(self) -> bytes:
        """SHA-256 of what was signed: an ECDSA signature can be written in two ways."""
        signed = self.text.rpartition(".")[0]
        return hashlib.sha256(signed.encode("ascii")).digest()


def _wrong(what: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"policy token: {what}", expected=expected, found=found)


def read_upload(body: bytes) -> Upload:
    """
    Read an uploaded token, bare or as a JSON string, and verify its signature.

    Raises:
        EvidenceFormatError: Malformed, an algorithm that is not accepted, or a wrong signature.

    """
    if len(body) > MAX_UPLOAD:
        raise _wrong("too long", f"at most {MAX_UPLOAD} bytes", f"{len(body)} bytes")
    bare = body.strip()
    if bare[:1] == b'"':
        value = jsonstrict.loads(bare, "policy token", max_size=MAX_UPLOAD)
        if not isinstance(value, str):
            raise _wrong("not a token", "a JSON string", type(value).__name__)
        text = value
    else:
        try:
            text = bare.decode("ascii")
        except UnicodeDecodeError:
            raise _wrong("not a token", "ASCII", "other bytes") from None
    parts = text.split(".", 5)
    if len(parts) != 3:
        raise _wrong("not a token", "header.payload.signature", f"{len(parts)} parts")
    header = jsonstrict.object_of(
        jose.b64url_decode(parts[0], "policy token: header"), "policy token: header", max_depth=6
    )
    for name in header:
        if name not in _HEADER and name != USE:
            raise _wrong("a header parameter", ", ".join(sorted(_HEADER)), f"{name!r:.60}")
    use = header.get(USE)
    if USE in header and not (isinstance(use, str) and _USE.fullmatch(use)):
        raise _wrong(USE, "policies/set TYPE, policies/reset TYPE, certificates/…", f"{use!r:.80}")
    payload = jose.b64url_decode(parts[1], "policy token: payload")
    algorithm = header.get("alg")
    if algorithm == "none":
        if parts[2] or "x5c" in header or "jwk" in header:
            raise _wrong("unsecured", "no signature and no certificate", "one of them")
        return Upload(text=text, payload=payload, use=use)
    if not isinstance(algorithm, str) or algorithm not in _SIGNED | set(_ALIASES):
        accepted = ", ".join(("none", *sorted(_SIGNED)))
        raise _wrong("the algorithm", accepted, f"{algorithm!r:.40}")
    chain = _chain(header)
    signature = jose.b64url_decode(parts[2], "policy token: signature")
    data = f"{parts[0]}.{parts[1]}".encode("ascii")
    key = chain[0].public_key()
    name = _ALIASES.get(algorithm, algorithm)
    if not jose.verify_signature(key, name, signature, data):
        raise _wrong("signature", f"{algorithm} by the key of the certificate", "does not hold")
    return Upload(text=text, payload=payload, signer=chain[0], chain=chain, use=use)


def _chain(header: Mapping[str, Any]) -> tuple[Certificate, ...]:
    listed = [header[name] for name in ("x5c",) if name in header]
    jwk = header.get("jwk")
    if jwk is not None:
        if not isinstance(jwk, Mapping):
            raise _wrong("jwk", "an object", type(jwk).__name__)
        if "x5c" in jwk:
            listed.append(jwk["x5c"])
    if len(listed) != 1:
        found = "none" if not listed else "two lists"
        raise _wrong("the certificate", "x5c once, in the header or its jwk", found)
    raw = jose.x5c_of(listed[0], "policy token: x5c", limit=6)
    return tuple(Certificate.from_der(item) for item in raw)


def policy_of(upload: Upload) -> str | None:
    """
    Return the text of an uploaded policy; None if the payload is empty (a reset).

    Raises:
        EvidenceFormatError: The payload is no ``StoredAttestationPolicy``.

    """
    if not upload.payload:
        return None
    found = jsonstrict.object_of(upload.payload, "policy token: payload", max_depth=3)
    if not found:
        return None
    if set(found) != {"AttestationPolicy"}:
        raise _wrong("payload", "AttestationPolicy and nothing else", ", ".join(found)[:80])
    if found["AttestationPolicy"] is None:
        return None
    raw = decode(found["AttestationPolicy"], "AttestationPolicy", limit=MAX_UPLOAD)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong("AttestationPolicy", "UTF-8", f"a wrong byte at {error.start}") from None
    if "\0" in text:  # a comment may have one, and PostgreSQL keeps none
        raise _wrong("AttestationPolicy", "text", f"a NUL at {text.index(chr(0))}")
    return text


def certificate_of(upload: Upload) -> Certificate:
    """
    Return the certificate in an upload to ``/certificates:add`` or ``:remove``.

    Raises:
        EvidenceFormatError: The payload has another form, or several certificates.

    """
    found = jsonstrict.object_of(upload.payload, "policy token: payload", max_depth=5)
    if set(found) != {"policyCertificate"} or not isinstance(found["policyCertificate"], Mapping):
        raise _wrong("payload", "policyCertificate and nothing else", ", ".join(found)[:80])
    jwk = found["policyCertificate"]
    raw = jose.x5c_of(jwk.get("x5c"), "policyCertificate: x5c", limit=1)
    return Certificate.from_der(raw[0])


def demand_signing_key(certificate: Certificate) -> Certificate:
    """
    Return a certificate that becomes a policy signer's.

    Raises:
        EvidenceFormatError: Nothing that its key signs would be taken.

    """
    if not jose.algorithms_of(certificate.public_key()) & _SIGNED:
        raise _wrong("policyCertificate", "an RSA or EC key that may sign", "another key")
    return certificate


def jwk_of(certificate: Certificate) -> dict[str, Any]:
    """Return a certificate's key as a JWK with ``x5c``."""
    return {
        **public_members(certificate.public_key()),
        "x5c": [base64.b64encode(certificate.der).decode("ascii")],
    }


def sign_policy(
    text: str | None,
    *,
    kind: str,
    key: jose.PrivateKey,
    certificate: bytes,
    algorithm: str | None = None,
) -> str:
    """
    Sign a policy, or its reset, for one type of attestation.

    Azure's clients sign the policy and not the type that it is for: who has such an upload chooses
    the type. This one says it in its header (`USE`), and the service takes it for nothing else.

    Args:
        text: The policy; None: the policy of *kind* is to be reset.
        kind: Type of attestation, as ``SgxEnclave``.
        key: The signer's private key, RSA or EC.
        certificate: The signer's certificate, PEM or DER.
        algorithm: As ``PS256``; default: ES256, ES384 or RS256, as the key is.

    Returns:
        What ``PUT /policies/{kind}`` or ``POST /policies/{kind}:reset`` takes.

    Raises:
        EvidenceFormatError: The certificate is malformed.
        ValueError: The certificate is of another key, or the algorithm does not fit.

    """
    payload = b""
    if text is not None:
        payload = json.dumps({"AttestationPolicy": jose.b64url_encode(text.encode())}).encode()
    use = f"policies/{'reset' if text is None else 'set'} {kind}"
    return _signed(payload, use, key, certificate, algorithm)


def sign_certificate(
    added: bytes | None = None,
    *,
    removed: bytes | None = None,
    key: jose.PrivateKey,
    certificate: bytes,
    algorithm: str | None = None,
) -> str:
    """
    Sign a change of the policy signers of an isolated instance.

    Args:
        added: Certificate of the one that may sign from then on, PEM or DER.
        removed: Certificate of the one that may not sign any more; either this or *added*.
        key: Private key of a policy signer, RSA or EC.
        certificate: That signer's certificate, PEM or DER.
        algorithm: As ``PS256``; default: ES256, ES384 or RS256, as the key is.

    Returns:
        What ``POST /certificates:add`` or ``:remove`` takes, and nothing else does (`USE`).

    Raises:
        EvidenceFormatError: A certificate is malformed, or of a key that cannot sign policies.
        ValueError: Both or neither are given, the certificate is of another key, or the algorithm
            does not fit.

    """
    if (added is None) == (removed is None):
        raise ValueError("either a certificate that is added or one that is removed")
    changed = _certificate(added if removed is None else removed)
    payload = json.dumps({"policyCertificate": jwk_of(changed)}).encode()
    use = f"certificates/{'add' if removed is None else 'remove'}"
    token = _signed(payload, use, key, certificate, algorithm)
    if removed is None:
        demand_signing_key(changed)  # what the service would refuse
    certificate_of(read_upload(token.encode("ascii")))
    return token


def _certificate(data: bytes | None) -> Certificate:
    given = data or b""
    if given.lstrip().startswith(b"-----"):
        return Certificate.from_pem_chain(given, limit=1)[0]
    return Certificate.from_der(given)


def _signed(
    payload: bytes, use: str, key: jose.PrivateKey, certificate: bytes, algorithm: str | None
) -> str:
    found = _certificate(certificate)
    if found.public_key() != key.public_key():
        raise ValueError("the certificate is of another key")
    usable = sorted(jose.algorithms_of(key.public_key()) & _SIGNED)
    chosen = algorithm or ("RS256" if "RS256" in usable else "".join(usable))
    if chosen not in usable:
        raise ValueError(f"this key signs with {' or '.join(usable) or 'nothing'}, not {chosen!r}")
    header = {
        "alg": chosen,
        "x5c": [base64.b64encode(found.der).decode("ascii")],
        USE: use,
        # What is the same is taken once: this one is new each time.
        "kid": secrets.token_hex(8),
    }
    encoded = jose.b64url_encode(json.dumps(header).encode())
    return jose.sign_encoded(encoded, payload, key=key, algorithm=chosen)


def unsecured_policy(text: str) -> str:
    """Return *text* as the token that an unsigned upload of it would be."""
    header = jose.b64url_encode(b'{"alg":"none"}')
    body = json.dumps({"AttestationPolicy": jose.b64url_encode(text.encode())}).encode()
    return f"{header}.{jose.b64url_encode(body)}."


def draft_text(draft: str) -> str:
    """
    Return the text of a draft policy: bare, or in a token as for an upload.

    Raises:
        EvidenceFormatError: A token that is malformed, or without a policy.

    """
    if not draft.startswith("eyJ"):
        return draft
    text = policy_of(read_upload(draft.encode("utf-8", "replace")))
    if text is None:
        raise _wrong("payload", "AttestationPolicy", "none")
    return text
