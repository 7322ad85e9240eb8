"""
The answer to a release, judged inside: who signed it, whether it is ours, and what is in it.

Notes on key release, 10.2. Everything in it came through the host. A check that fails raises
`KeyReleaseError` whose ``check`` names it; nothing is decrypted before the signature holds.
"""

from __future__ import annotations

import datetime as dt
import functools
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtensionOID

from pyenclave.errors import EvidenceFormatError, KeyReleaseError
from pyenclave.formats import jose, release
from pyenclave.trusted._released import PrivateKey, ReleasedKey

__all__ = ["Expected", "anchors_of", "open_answer"]

# What web authorities certify keys for; each must also belong to the leaf's key.
SIGNATURES: Final = frozenset(
    ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384")
)
_HASHES: Final[dict[str, Any]] = {
    "SHA-1": hashes.SHA1,
    "SHA-256": hashes.SHA256,
    "SHA-384": hashes.SHA384,
}
_WRAPPING_KEY: Final = 32  # bytes of the AES key under OAEP
_OCT_SIZES: Final = (16, 24, 32, 48, 64)
_CURVES: Final = {
    "secp256r1": ("P-256", 32),
    "secp384r1": ("P-384", 48),
    "secp521r1": ("P-521", 66),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """
    What an answer must be an answer to.

    Attributes:
        vault: The vault's address, in its one form.
        host: Its host.
        name: Name of the key.
        version: Its version; empty: the newest.
        algorithm: The algorithm of the request.
        nonce: The nonce of the request.
        require_nonce: Whether the answer must repeat it; one that repeats another never passes.
        at: When the certificates must be valid; None: whenever they all are.
        now: The time by which the key's own dates are judged; None: they are not.
    """

    vault: str
    host: str
    name: str
    version: str
    algorithm: str
    nonce: str
    require_nonce: bool = True
    at: dt.datetime | None
    now: float | None


def _refuse(check: str, message: str, **details: Any) -> KeyReleaseError:
    return KeyReleaseError(message, check=check, **details)


@functools.lru_cache(maxsize=8)
def anchors_of(pem: str) -> tuple[x509.Certificate, ...]:
    """
    Read the authorities that measured code names.

    Raises:
        ValueError: There is none, or something else.

    """
    found = tuple(x509.load_pem_x509_certificates(pem.encode("ascii", "replace")))
    if not 0 < len(found) <= 256:
        raise ValueError("ca: 1 to 256 certificates")
    return found


def open_answer(
    token: bytes | str,
    expected: Expected,
    *,
    anchors: Sequence[x509.Certificate],
    transfer: rsa.RSAPrivateKey,
) -> ReleasedKey:
    """
    Verify an answer and open what is in it.

    Args:
        token: The signed answer (JWS).
        expected: What was asked.
        anchors: The authorities that may vouch for the vault's name.
        transfer: The key that the released one is wrapped to.

    Raises:
        KeyReleaseError: By its ``check``: ``answer.form``, ``answer.chain``, ``answer.host``,
            ``answer.dates``, ``answer.signature``, ``answer.kid``, ``answer.nonce``,
            ``answer.enc``, ``answer.expired``, ``answer.unwrap``, ``answer.key``.

    """
    try:
        answer = release.ReleaseAnswer.from_bytes(token)
        _verify(answer, expected, anchors)
        _check_request(answer, expected)
        kid = _check_key(answer, expected)
        material = _unwrap(answer.ciphertext, transfer, expected.algorithm)
        kty, key = _read(material, answer)
    except EvidenceFormatError as error:
        raise _refuse(
            "answer.form", error.message, expected=error.expected, found=error.found
        ) from None
    operations = answer.members.get("key_ops")
    return ReleasedKey(
        kid=kid,
        kty=kty,
        key=key,
        key_ops=tuple(str(one) for one in operations) if isinstance(operations, list) else (),
        expires=_number(answer.attributes, "exp"),
        attributes=answer.attributes,
    )


# ---- who signed it ------------------------------------------------------------------------------


def _verify(
    answer: release.ReleaseAnswer, expected: Expected, anchors: Sequence[x509.Certificate]
) -> None:
    try:
        chain = [x509.load_der_x509_certificate(one) for one in answer.x5c]
        leaf = chain[0]
        names = _names(leaf)
        key = leaf.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _refuse(
            "answer.chain", "a certificate of the answer cannot be read", found=str(error)[:200]
        ) from None
    if not any(_covers(name, expected.host) for name in names):
        raise _refuse(
            "answer.host",
            "the answer was signed for another host",
            expected=expected.host,
            found=", ".join(names)[:200] or "no names",
        )
    # The last of the chain is the anchor itself, or is signed by it; its own copy is not needed.
    own = {bytes(one.fingerprint(hashes.SHA256())) for one in anchors}
    chain = [one for one in chain if bytes(one.fingerprint(hashes.SHA256())) not in own] or [leaf]
    at = expected.at
    if at is None:
        at = max(one.not_valid_before_utc for one in chain)
    for one in chain:
        if not one.not_valid_before_utc <= at <= one.not_valid_after_utc:
            raise _refuse(
                "answer.dates",
                "a certificate of the answer is not valid at this time",
                expected=f"{one.not_valid_before_utc} to {one.not_valid_after_utc}",
                found=str(at),
                advice="The clock of an enclave is its machine's.",
            )
    try:
        builder = verification.PolicyBuilder().store(verification.Store(list(anchors)))
        verifier = builder.time(at).build_server_verifier(_subject(expected.host))
        verifier.verify(leaf, chain[1:])
    except (verification.VerificationError, ValueError) as error:
        raise _refuse(
            "answer.chain",
            "the answer's certificates do not lead to an authority that this code names",
            found=str(error)[:300],
        ) from None
    if not answer.jws.verify(key, allowed=SIGNATURES):
        raise _refuse(
            "answer.signature",
            "the answer's signature does not hold",
            found=answer.jws.algorithm,
        )


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except x509.ExtensionNotFound:
        return []
    if not isinstance(found, x509.SubjectAlternativeName):
        return []
    addresses = [str(one) for one in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def _covers(name: str, host: str) -> bool:
    """Whether a certificate's name is that host's; ``*`` stands for its first label alone."""
    name = name.lower()
    if name.startswith("*."):
        return host.partition(".")[2] == name[2:] and "." in name[2:]
    return name == host


def _subject(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# ---- whether it is ours -------------------------------------------------------------------------


def _check_request(answer: release.ReleaseAnswer, expected: Expected) -> None:
    _check_kid(answer.asked, expected, "the answer is to a request for another key")
    if answer.nonce is None and expected.require_nonce:
        raise _refuse("answer.nonce", "the answer repeats no nonce", expected=expected.nonce)
    if answer.nonce is not None and answer.nonce != expected.nonce:
        raise _refuse(
            "answer.nonce",
            "the answer repeats another nonce: it is that of an earlier request",
            expected=expected.nonce,
            found=answer.nonce[:200],
        )
    if answer.enc != expected.algorithm:
        raise _refuse(
            "answer.enc",
            "the key is wrapped by another algorithm than was asked for",
            expected=expected.algorithm,
            found=answer.enc[:60],
        )


def _check_kid(kid: str, expected: Expected, message: str) -> str:
    """Return the version that *kid* names, if it is a key that was asked for."""
    try:
        vault, name, version = release.split_kid(kid)
    except ValueError:
        vault, name, version = "", "", ""
    same = vault == expected.vault and name == expected.name
    if not same or (expected.version and version != expected.version):
        asked = f"{expected.vault}/keys/{expected.name}"
        raise _refuse(
            "answer.kid",
            message,
            expected=f"{asked}/{expected.version}" if expected.version else asked,
            found=kid[:200],
        )
    return version


def _check_key(answer: release.ReleaseAnswer, expected: Expected) -> str:
    """Return the identifier of the released key, with its version."""
    version = _check_kid(answer.kid, expected, "the answer holds another key")
    asked = release.split_kid(answer.asked)[2]
    if not version or (asked and asked != version):
        raise _refuse(
            "answer.kid",
            "the answer holds another version of the key",
            expected=asked or "a version",
            found=version or "none",
        )
    begins, ends = _number(answer.attributes, "nbf"), _number(answer.attributes, "exp")
    now = expected.now
    if answer.attributes.get("enabled") is False:
        raise _refuse("answer.expired", "the key is disabled")
    if now is not None and ends is not None and ends <= now:
        raise _refuse("answer.expired", "the key has expired", expected=f"> {now:.0f}", found=ends)
    if now is not None and begins is not None and begins > now + 300:
        raise _refuse(
            "answer.expired", "the key is not valid yet", expected=f"<= {now:.0f}", found=begins
        )
    return f"{expected.vault}/keys/{expected.name}/{version}"


def _number(attributes: Any, name: str) -> int | None:
    value = attributes.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- what is in it ------------------------------------------------------------------------------


def _unwrap(ciphertext: bytes, transfer: rsa.RSAPrivateKey, algorithm: str) -> bytes:
    """Return the key material; whatever is wrong is one error (RFC 5649, 3; catalogue SKR-07)."""
    split = (transfer.key_size + 7) // 8
    digest = _HASHES[release.ALGORITHMS[algorithm]]()
    try:
        wrapping = transfer.decrypt(
            ciphertext[:split], padding.OAEP(padding.MGF1(digest), digest, None)
        )
        if len(wrapping) != _WRAPPING_KEY:
            raise ValueError
        return keywrap.aes_key_unwrap_with_padding(wrapping, ciphertext[split:])
    except (ValueError, keywrap.InvalidUnwrap):
        raise _refuse(
            "answer.unwrap",
            "the released key was not wrapped to this enclave's transfer key, or was changed",
        ) from None


def without_fill(material: bytes) -> bytes:
    """Return a PKCS #8 without the zeros that some tokens add to make it whole blocks of eight."""
    if len(material) < 4 or material[0] != 0x30:
        return material
    count = max(0, material[1] - 0x80)
    size = 2 + (int.from_bytes(material[2 : 2 + count], "big") + count if count else material[1])
    fill = material[size:]
    return material[:size] if len(fill) < 8 and not any(fill) else material


def _read(material: bytes, answer: release.ReleaseAnswer) -> tuple[str, PrivateKey | bytes]:
    """Return the key, if it is the one whose public half the vault signed."""
    kty = answer.kty.removesuffix("-HSM")
    if kty == "oct":
        if len(material) not in _OCT_SIZES:
            raise _refuse("answer.key", "a released key of this size is none", found=len(material))
        return kty, material
    try:
        key = load_der_private_key(without_fill(material), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refuse("answer.key", "the released key is no PKCS#8 private key") from None
    if kty == "RSA" and isinstance(key, rsa.RSAPrivateKey):
        numbers = key.public_key().public_numbers()
        fits = _same(answer, "n", numbers.n) and _same(answer, "e", numbers.e)
    elif kty == "EC" and isinstance(key, ec.EllipticCurvePrivateKey):
        point = key.public_key().public_numbers()
        curve = _CURVES.get(key.curve.name, ("", 0))[0]
        named = answer.members.get("crv") == (curve or None)
        fits = named and _same(answer, "x", point.x) and _same(answer, "y", point.y)
    else:
        raise _refuse(
            "answer.key",
            "the released key is of another type than the vault says",
            expected=answer.kty[:40],
            found=type(key).__name__,
        )
    if not fits:
        raise _refuse(
            "answer.key", "the released key is not the private half of the key that the vault names"
        )
    return kty, key


def _same(answer: release.ReleaseAnswer, member: str, number: int) -> bool:
    raw = jose.b64url_decode(answer.members.get(member, ""), f"release answer: {member}")
    size = max(len(raw), (number.bit_length() + 7) // 8)
    return hmac.compare_digest(raw.rjust(size, b"\0"), number.to_bytes(size, "big"))
