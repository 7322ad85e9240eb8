"""
Certificate chains, revocation lists and raw signatures, by the profile of each vendor.

A chain goes from the leaf to the root. Each function judges one thing and returns a verdict, so
that a verifier registers them as checks of their own; `check_chain` does all of them. A root is
one because its public key is pinned, never because of its name or because it came along. X.509:
RFC 5280. What depends on time alone takes the time as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pyenclave.attestation.cache import known
from pyenclave.attestation.checks import PASSED, Verdict, failed
from pyenclave.errors import EnclaveError
from pyenclave.formats import der
from pyenclave.formats.der import Der
from pyenclave.formats.x509 import (
    OID_AUTHORITY_KEY_ID,
    OID_BASIC_CONSTRAINTS,
    OID_CRL_NUMBER,
    OID_KEY_USAGE,
    AlgorithmId,
    Certificate,
    Crl,
)

__all__ = [
    "Profile",
    "algorithm_name",
    "check_algorithms",
    "check_chain",
    "check_constraints",
    "check_crl",
    "check_crl_signature",
    "check_crl_time",
    "check_key_usage",
    "check_length",
    "check_names",
    "check_not_revoked",
    "check_root",
    "check_signatures",
    "check_validity",
    "completed",
    "key_name",
    "ordered",
    "p256_key",
    "verify_ecdsa",
    "verify_p256_raw",
    "verify_p384_le",
    "verify_signature",
]

Chain = Sequence[Certificate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """
    What the chains of a vendor look like.

    Attributes:
        keys: Accepted keys, as `key_name` tells them.
        algorithms: Accepted signatures, as `algorithm_name` tells them.
        shortest: Fewest certificates, the root included.
        longest: Most certificates.
        critical: Extensions that may be critical, because the verifier judges them.
        leaf_usage: What the leaf's key usage must allow.
        leaf_bare: The leaf may be without basic constraints and key usage.
        crl_named: Revocation lists have a number and name their issuer's key.
    """

    keys: frozenset[str]
    algorithms: frozenset[str]
    shortest: int = 2
    longest: int = 3
    critical: frozenset[str] = frozenset((OID_BASIC_CONSTRAINTS, OID_KEY_USAGE))
    leaf_usage: str = "digitalSignature"
    leaf_bare: bool = False
    crl_named: bool = True


# ---- keys and signatures ----------------------------------------------------------------------

_HASHES: Final = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
_ECDSA: Final = {name: ec.ECDSA(digest) for name, digest in _HASHES.items()}
_PLAIN: Final = {
    "1.2.840.10045.4.3.2": "ecdsa-sha256",
    "1.2.840.10045.4.3.3": "ecdsa-sha384",
    "1.2.840.10045.4.3.4": "ecdsa-sha512",
    "1.2.840.113549.1.1.11": "rsa-pkcs1-sha256",
    "1.2.840.113549.1.1.12": "rsa-pkcs1-sha384",
    "1.2.840.113549.1.1.13": "rsa-pkcs1-sha512",
}
_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_PSS_HASHES: Final = {
    "2.16.840.1.101.3.4.2.1": ("sha256", 32),
    "2.16.840.1.101.3.4.2.2": ("sha384", 48),
    "2.16.840.1.101.3.4.2.3": ("sha512", 64),
}
_NO_PARAMETERS: Final = {"ecdsa": (None,), "rsa": (None, b"\x05\x00")}
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
_P384_SIZE: Final = 48


def _hash_oid(cursor: Der) -> str:
    inner = cursor.sequence()
    oid = inner.oid()
    if inner.more and inner.element() != b"\x05\x00":
        raise inner.fail("a hash has parameters")
    inner.end()
    return oid


def _pss_name(parameters: bytes | None) -> str | None:
    """Return the name of RSASSA-PSS with one hash throughout and a salt of its size (RFC 4055)."""
    if parameters is None:
        return None
    try:
        outer = Der(parameters, "RSASSA-PSS parameters")
        body = outer.sequence()
        outer.end()
        wrapped = body.read(der.context(0))
        digest = _hash_oid(wrapped)
        wrapped.end()
        wrapped = body.read(der.context(1))
        mask = wrapped.sequence()
        wrapped.end()
        generator, mask_digest = mask.oid(), _hash_oid(mask)
        mask.end()
        wrapped = body.read(der.context(2))
        salt = wrapped.integer(nonneg=True)
        wrapped.end()
        trailer = body.optional(der.context(3))
        if trailer is not None and trailer.integer() != 1:
            return None
        body.end()
    except EnclaveError:
        return None
    name, size = _PSS_HASHES.get(digest, ("", 0))
    if generator != _MGF1 or mask_digest != digest or salt != size or not name:
        return None
    return f"rsa-pss-{name}"


def algorithm_name(algorithm: AlgorithmId) -> str | None:
    """Return the name of a signature algorithm, such as ``ecdsa-sha256`` or ``rsa-pss-sha384``."""
    if algorithm.oid == _PSS:
        return _pss_name(algorithm.parameters)
    name = _PLAIN.get(algorithm.oid)
    if name is None or algorithm.parameters not in _NO_PARAMETERS[name.partition("-")[0]]:
        return None
    return name


def key_name(key: Any) -> str:
    """Return the kind of a public key: the curve's name, ``rsa``, or the class of another one."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.curve.name
    if isinstance(key, rsa.RSAPublicKey) and _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
        return "rsa"
    return type(key).__name__


def verify_signature(key: Any, name: str, signature: bytes, data: bytes) -> bool:
    """
    Whether *signature* is one of *key* over *data*.

    Args:
        key: A public key of ``cryptography``.
        name: As `algorithm_name` tells it. A key of another kind verifies nothing.
        signature: ECDSA in DER, RSA as the number.
        data: What is signed.
    """
    scheme, _, digest = name.rpartition("-")
    try:
        if scheme == "ecdsa" and isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, data, _ECDSA[digest])
        elif scheme == "rsa-pss" and isinstance(key, rsa.RSAPublicKey):
            algorithm = _HASHES[digest]
            pss = padding.PSS(mgf=padding.MGF1(algorithm), salt_length=algorithm.digest_size)
            key.verify(signature, data, pss, algorithm)
        elif scheme == "rsa-pkcs1" and isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, data, padding.PKCS1v15(), _HASHES[digest])
        else:
            return False
    except InvalidSignature:
        return False
    return True


def verify_ecdsa(key: Any, digest: str, r: int, s: int, data: bytes) -> bool:
    """Whether (*r*, *s*) is an ECDSA signature of *key* over *data* with hash *digest*."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or r <= 0 or s <= 0:
        return False
    try:
        key.verify(encode_dss_signature(r, s), data, _ECDSA[digest])
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=256)
def p256_key(raw: bytes) -> ec.EllipticCurvePublicKey | None:
    """Return the P-256 key X ‖ Y (64 bytes, big-endian); ``None`` if that is no point."""
    if len(raw) != 64:
        return None
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + raw)
    except ValueError:
        return None


def verify_p256_raw(key: Any, signature: bytes, data: bytes) -> bool:
    """Whether R ‖ S (64 bytes, big-endian) is a P-256 signature over *data* with SHA-256."""
    if key_name(key) != "secp256r1" or len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    return verify_ecdsa(key, "sha256", r, s, data)


def verify_p384_le(key: Any, r: bytes, s: bytes, data: bytes) -> bool:
    """
    Whether (*r*, *s*) is a P-384 signature over *data* with SHA-384, as AMD writes it.

    Args:
        key: The public key.
        r: Little-endian; what is beyond 48 bytes must be zero.
        s: Likewise.
        data: What is signed.
    """
    if key_name(key) != "secp384r1" or any(r[_P384_SIZE:]) or any(s[_P384_SIZE:]):
        return False
    numbers = int.from_bytes(r, "little"), int.from_bytes(s, "little")
    return verify_ecdsa(key, "sha384", *numbers, data)


# ---- chains -----------------------------------------------------------------------------------


def _place(chain: Chain, index: int) -> str:
    if index == 0:
        return "leaf"
    if index == len(chain) - 1:
        return "root"
    return "intermediate" if len(chain) == 3 else f"intermediate {index}"


def completed(chain: Iterable[Certificate], anchors: Iterable[Certificate]) -> Chain:
    """Return *chain* with the anchor that issued its last certificate, if that one is missing."""
    found = list(chain)
    if found and found[-1].issuer != found[-1].subject:
        found += [anchor for anchor in anchors if anchor.subject == found[-1].issuer][:1]
    return tuple(found)


def ordered(chain: Iterable[Certificate]) -> tuple[Certificate, ...]:
    """
    Return *chain* with each certificate followed by its issuer, as far as names tell.

    The leaf stays first. Some platforms hand out root and intermediate the other way round; whether
    what comes out is a chain is for the checks.
    """
    rest = list(chain)
    found = rest[:1]
    rest = rest[1:]
    while rest and found[-1].issuer != found[-1].subject:
        issuer = next((item for item in rest if item.subject == found[-1].issuer), None)
        if issuer is None:
            break
        rest.remove(issuer)
        found.append(issuer)
    return (*found, *rest)


def check_length(chain: Chain, profile: Profile) -> Verdict:
    """As many certificates as the profile has."""
    if profile.shortest <= len(chain) <= profile.longest:
        return PASSED
    return failed(
        expected=f"{profile.shortest} to {profile.longest} certificates",
        found=f"{len(chain)} certificates",
    )


def check_root(chain: Chain, anchors: Iterable[Certificate]) -> Verdict:
    """
    The root has name and public key of a pinned one (RFC 5280, 6.1.1 d); identifiers do not count.

    The key alone is not enough: a root that a caller pins for one vendor could otherwise call
    itself another's.
    """
    pinned = {(anchor.subject, anchor.spki) for anchor in anchors}
    if chain and (chain[-1].subject, chain[-1].spki) in pinned:
        return PASSED
    return failed(
        expected=f"name and public key of one of {len(pinned)} pinned roots",
        found=f"{chain[-1].subject_text}, key SHA-256 {chain[-1].spki_sha256.hex()}"
        if chain
        else "no certificate",
        advice="If you trust that root, confirm it out of band and give it as roots= (--root).",
    )


def check_names(chain: Chain) -> Verdict:
    """Each certificate names its issuer, and key identifiers fit; the root names itself."""
    for index, child in enumerate(chain):
        issuer = chain[min(index + 1, len(chain) - 1)]
        where = _place(chain, index)
        if child.issuer != issuer.subject or not child.issuer_name.attributes:
            return failed(
                expected=f"{where} issued by {issuer.subject_text}", found=child.issuer_text
            )
        wanted, found = child.authority_key_id, issuer.subject_key_id
        if wanted is not None and found is not None and wanted != found:
            return failed(expected=f"{where} issued by key {wanted.hex()}", found=found)
    return PASSED


def check_algorithms(chain: Chain, profile: Profile) -> Verdict:
    """X.509 version 3, and keys and signatures of the profile."""
    for index, certificate in enumerate(chain):
        where = _place(chain, index)
        if certificate.version != 3:
            return failed(expected=f"{where}: X.509 version 3", found=certificate.version)
        key = key_name(certificate.public_key())
        if key not in profile.keys:
            return failed(expected=f"{where}: a key of {sorted(profile.keys)}", found=key)
        name = algorithm_name(certificate.signature_algorithm)
        if name not in profile.algorithms:
            return failed(
                expected=f"{where}: signed by {sorted(profile.algorithms)}",
                found=name or certificate.signature_algorithm.oid,
            )
    return PASSED


def check_constraints(chain: Chain, profile: Profile) -> Verdict:
    """CA bit and path length fit each place; no unknown critical extension."""
    for index, certificate in enumerate(chain):
        where = _place(chain, index)
        for oid, extension in certificate.extensions.items():
            if extension.critical and oid not in profile.critical:
                return failed(expected=f"{where}: no unknown critical extension", found=oid)
        found = certificate.basic_constraints
        if index == 0:
            if found is None and profile.leaf_bare:
                continue
            if found is None or found.ca:
                return failed(expected=f"{where}: basic constraints, not a CA", found=found)
            continue
        if found is None or not found.ca:
            return failed(expected=f"{where}: basic constraints, a CA", found=found)
        if not certificate.extensions[OID_BASIC_CONSTRAINTS].critical:
            return failed(expected=f"{where}: critical basic constraints", found="not critical")
        # Below the first CA there is no other one, below the next one there is one, and so on.
        if found.path_length is not None and found.path_length < index - 1:
            return failed(
                expected=f"{where}: path length {index - 1} or more", found=found.path_length
            )
    return PASSED


def check_key_usage(chain: Chain, profile: Profile) -> Verdict:
    """CAs may sign certificates; the leaf may sign what it signs, and no certificates."""
    for index, certificate in enumerate(chain):
        where = _place(chain, index)
        usage = certificate.key_usage
        if index:
            if usage is None or "keyCertSign" not in usage:
                return failed(expected=f"{where}: keyCertSign", found=_listed(usage))
        elif usage is None:
            if not profile.leaf_bare:
                return failed(expected=f"{where}: {profile.leaf_usage}", found="no key usage")
        elif profile.leaf_usage not in usage or "keyCertSign" in usage:
            return failed(
                expected=f"{where}: {profile.leaf_usage} without keyCertSign", found=_listed(usage)
            )
    return PASSED


def _listed(usage: Collection[str] | None) -> str:
    return "no key usage" if usage is None else ", ".join(sorted(usage)) or "none"


def check_validity(chain: Chain, at: datetime) -> Verdict:
    """Every certificate is valid at the time *at*."""
    for index, certificate in enumerate(chain):
        if not certificate.not_before <= at <= certificate.not_after:
            return failed(
                expected=f"{_place(chain, index)} ({certificate.subject_text}) valid at "
                f"{at.isoformat()}",
                found=f"{certificate.not_before.isoformat()} to "
                f"{certificate.not_after.isoformat()}",
                advice="Check the time that was given, or the clock.",
            )
    return PASSED


def _is_signed(child: Certificate, issuer: Certificate) -> bool:
    """Whether *issuer* signed *child*; remembered with *child*, as issuers are always the same."""

    def verify() -> bool:
        name = algorithm_name(child.signature_algorithm) or ""
        return verify_signature(issuer.public_key(), name, child.signature, child.tbs)

    entry = known("certificate", child.der, lambda _: child)
    return entry.fact(("signed by", issuer.spki), verify)


def check_signatures(chain: Chain) -> Verdict:
    """Each certificate is signed by the next one, the root by itself."""
    for index, child in enumerate(chain):
        issuer = chain[min(index + 1, len(chain) - 1)]
        if not _is_signed(child, issuer):
            return failed(
                expected=f"{_place(chain, index)}: signed by {issuer.subject_text}",
                found="an invalid signature",
                advice="The certificate was changed, or another issuer has the same name.",
            )
    return PASSED


def check_chain(
    chain: Chain, anchors: Iterable[Certificate], at: datetime, profile: Profile
) -> Verdict:
    """Do every check of a chain; return the first failure."""
    judges: tuple[Callable[[], Verdict], ...] = (
        lambda: check_length(chain, profile),
        lambda: check_root(chain, anchors),
        lambda: check_names(chain),
        lambda: check_algorithms(chain, profile),
        lambda: check_constraints(chain, profile),
        lambda: check_key_usage(chain, profile),
        lambda: check_validity(chain, at),
        lambda: check_signatures(chain),
    )
    return _first_failure(judges)


def _first_failure(judges: Iterable[Callable[[], Verdict]]) -> Verdict:
    for judge in judges:
        verdict = judge()
        if verdict.outcome != "passed":
            return verdict
    return PASSED


# ---- revocation -------------------------------------------------------------------------------

_KNOWN_IN_CRL: Final = frozenset((OID_CRL_NUMBER, OID_AUTHORITY_KEY_ID))


def check_crl_signature(crl: Crl, issuer: Certificate, profile: Profile) -> Verdict:
    """
    The list is version 2, complete, and signed by *issuer*, which may do so.

    It has a number and names the issuer's key, if the vendor's lists are known to.
    """
    if crl.issuer != issuer.subject:
        return failed(expected=f"a list of {issuer.subject_text}", found=crl.issuer_text)
    number, key = crl.crl_number, crl.authority_key_id
    if crl.version != 2 or (profile.crl_named and (number is None or key is None)):
        wanted = "version 2"
        return failed(
            expected=f"{wanted} with CRL number and authority key identifier"
            if profile.crl_named
            else wanted,
            found=f"version {crl.version}, {', '.join(crl.extensions) or 'no extensions'}",
        )
    own = issuer.subject_key_id
    if own is not None and key is not None and own != key:
        return failed(expected=f"signed by key {own.hex()}", found=key)
    for oid, extension in crl.extensions.items():
        # A list that is partial or speaks for other issuers says so in a critical extension.
        if extension.critical and oid not in _KNOWN_IN_CRL:
            return failed(expected="a complete list of one issuer", found=f"extension {oid}")
    usage = issuer.key_usage
    if usage is not None and "cRLSign" not in usage:
        return failed(expected=f"{issuer.subject_text}: cRLSign", found=_listed(usage))
    name = algorithm_name(crl.signature_algorithm)
    if name not in profile.algorithms:
        return failed(
            expected=f"signed by {sorted(profile.algorithms)}",
            found=name or crl.signature_algorithm.oid,
        )
    if not verify_signature(issuer.public_key(), name, crl.signature, crl.tbs):
        return failed(
            expected=f"signed by {issuer.subject_text}",
            found="an invalid signature",
            advice="Fetch the revocation list again.",
        )
    return PASSED


def check_crl_time(crl: Crl, at: datetime) -> Verdict:
    """The list is in force at the time *at*."""
    end = crl.next_update
    if end is not None and crl.this_update <= at <= end:
        return PASSED
    return failed(
        expected=f"a list of {crl.issuer_text} in force at {at.isoformat()}",
        found=f"{crl.this_update.isoformat()} to {end.isoformat() if end else 'no end'}",
        advice="Fetch the revocation list again, or give the time at which it was in force.",
    )


def check_not_revoked(crl: Crl, *certificates: Certificate) -> Verdict:
    """None of *certificates* of this list's issuer is on the list."""
    for certificate in certificates:
        if certificate.issuer == crl.issuer and certificate.serial in crl.revoked:
            return failed(
                expected=f"{certificate.subject_text} not revoked",
                found=f"serial number {certificate.serial:x} is on the list",
                advice="The vendor has withdrawn it: do not trust this platform.",
            )
    return PASSED


def check_crl(
    crl: Crl, issuer: Certificate, at: datetime, profile: Profile, *certificates: Certificate
) -> Verdict:
    """Do every check of a list and of *certificates* against it; return the first failure."""
    judges: tuple[Callable[[], Verdict], ...] = (
        lambda: check_crl_signature(crl, issuer, profile),
        lambda: check_crl_time(crl, at),
        lambda: check_not_revoked(crl, *certificates),
    )
    return _first_failure(judges)
