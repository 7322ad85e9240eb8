"""
AMD's endorsement chain of SEV-SNP: VCEK or VLEK, ASK or ASVK, ARK.

The project's notes on SEV-SNP structures, 4.5 (AMD documents 57230 and 56860). Certificates are
signed with RSASSA-PSS, SHA-384, MGF1 with SHA-384 and 48 bytes of salt; reports with ECDSA P-384.
What depends on the bytes alone is worked out once and kept by these bytes; pinned roots, the time
and revocation are judged each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from pyenclave.attestation import pki, roots
from pyenclave.attestation.cache import known
from pyenclave.attestation.checks import PASSED, Verdict, failed
from pyenclave.errors import EnclaveError, EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats.der import Der
from pyenclave.formats.snp import KEY_VCEK, KEY_VLEK, SnpReport, decode_tcb
from pyenclave.formats.x509 import Certificate, Crl

__all__ = [
    "KDS",
    "LINES",
    "ChainFacts",
    "Vek",
    "check_crl",
    "check_root",
    "check_validity",
    "kds_url",
    "read_chain",
    "read_vek",
]

KDS: Final = "https://kdsintf.amd.com"
#: Product lines with a pinned root.
LINES: Final = ("milan", "genoa", "turin")
# Names that parts of a line carry in their certificates.
_LINE_OF: Final = {"siena": "genoa", "bergamo": "genoa"} | {line: line for line in LINES}

_ARC: Final = "1.3.6.1.4.1.3704.1"
_STRUCT_VERSION: Final = f"{_ARC}.1"
_PRODUCT: Final = f"{_ARC}.2"
_SPL: Final = f"{_ARC}.3"
_HWID: Final = f"{_ARC}.4"
_CSP_ID: Final = f"{_ARC}.5"
# Extension → name among the claims, and byte of the TCB version that it stands for: before Turin,
# and from Turin on. SPL 4 to 7 have no meaning yet and may be absent; they still have to agree.
_SPLS: Final[Mapping[str, tuple[str, int | None, int | None]]] = {
    f"{_SPL}.1": ("bl_spl", 0, 1),
    f"{_SPL}.2": ("tee_spl", 1, 2),
    f"{_SPL}.3": ("snp_spl", 6, 3),
    f"{_SPL}.4": (f"{_SPL}.4", 2, None),
    f"{_SPL}.5": (f"{_SPL}.5", 3, 4),
    f"{_SPL}.6": (f"{_SPL}.6", 4, 5),
    f"{_SPL}.7": (f"{_SPL}.7", 5, 6),
    f"{_SPL}.8": ("ucode_spl", 7, 7),
    f"{_SPL}.9": ("fmc_spl", None, 0),
}
_KDS_LEVELS: Final = {
    "fmc": "fmcSPL",
    "bootloader": "blSPL",
    "tee": "teeSPL",
    "snp": "snpSPL",
    "microcode": "ucodeSPL",
}
_IA5_STRING: Final = 0x16


# ---- the leaf's extensions ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Vek:
    """
    What the certificate of a versioned chip or loaded endorsement key says.

    Attributes:
        kind: KEY_VCEK or KEY_VLEK.
        product: As it is written, such as ``Milan-B0``.
        line: ``milan``, ``genoa``, ``turin``, or the name in lower case.
        spls: Security patch levels by the names of the claims.
        tcb: The eight bytes of the TCB version that they make.
        hwid: Of the chip; VCEK only.
        csp_id: Of the cloud provider; VLEK only.
    """

    kind: int
    struct_version: int
    product: str
    line: str
    spls: Mapping[str, int]
    tcb: bytes
    hwid: bytes | None
    csp_id: str | None

    def claims(self) -> dict[str, object]:
        """Return the fields by the names of the claims."""
        found: dict[str, object] = {"struct_version": self.struct_version, "product": self.product}
        found |= self.spls
        if self.hwid is not None:
            found["hwid"] = self.hwid.hex()
        if self.csp_id is not None:
            found["csp_id"] = self.csp_id
        return found


def _refused(name: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(
        f"certificate of the endorsement key: {name} is wrong", expected=expected, found=found
    )


def _value(certificate: Certificate, oid: str, name: str) -> bytes:
    extension = certificate.extensions.get(oid)
    if extension is None:
        raise _refused(name, f"extension {oid}", "absent")
    return extension.value


def _small(certificate: Certificate, oid: str, name: str) -> int:
    cursor = Der(_value(certificate, oid, name), name)
    value = cursor.integer(nonneg=True)
    cursor.end()
    if value > 255:
        raise _refused(name, "0 to 255", value)
    return value


def _text(certificate: Certificate, oid: str, name: str) -> str:
    cursor = Der(_value(certificate, oid, name), name)
    tag = cursor.tag
    if tag not in (_IA5_STRING, der.PRINTABLE_STRING, der.UTF8_STRING):
        raise _refused(name, "text", f"tag {tag}")
    content = cursor.content(tag)
    cursor.end()
    if not content or len(content) > 256 or not content.isascii():
        raise _refused(name, "1 to 256 characters", content[:32])
    return content.decode("ascii")


def _hwid(certificate: Certificate, line: str) -> bytes:
    """Read the chip's identity: bare bytes, or an OCTET STRING (4.5); shorter on Turin."""
    value = _value(certificate, _HWID, "HWID")
    size = len(value)
    sizes = (64,) if line in ("milan", "genoa") else (8, 64)
    if size - 2 in sizes and value[:2] == bytes((4, size - 2)):
        return value[2:]
    if size not in sizes:
        raise _refused("HWID", f"{' or '.join(map(str, sizes))} bytes", f"{size} bytes")
    return value


def read_vek(certificate: Certificate) -> Vek:
    """
    Read the extensions of a VCEK's or VLEK's certificate (4.5).

    Raises:
        EvidenceFormatError: One is missing, malformed, out of range, or both HWID and CSP id are
            there.
    """
    extensions = certificate.extensions
    product = _text(certificate, _PRODUCT, "product")
    name = product.partition("-")[0].lower()
    line = _LINE_OF.get(name, name)
    turin = line not in ("milan", "genoa")
    spls: dict[str, int] = {}
    tcb = bytearray(8)
    for oid, (label, old, new) in _SPLS.items():
        place = new if turin else old
        if oid not in extensions and (place is None or label == oid):
            continue
        level = spls[label] = _small(certificate, oid, label)
        if place is not None:
            tcb[place] = level
        elif level:
            raise _refused(label, f"zero or absent on {line}", level)
    if (_HWID in extensions) is (_CSP_ID in extensions):
        raise _refused("identity", "either a HWID or a CSP id", "both or none")
    is_chip = _HWID in extensions
    return Vek(
        kind=KEY_VCEK if is_chip else KEY_VLEK,
        struct_version=_small(certificate, _STRUCT_VERSION, "structure version"),
        product=product,
        line=line,
        spls=MappingProxyType(spls),
        tcb=bytes(tcb),
        hwid=_hwid(certificate, line) if is_chip else None,
        csp_id=None if is_chip else _text(certificate, _CSP_ID, "CSP id"),
    )


# ---- the chain ---------------------------------------------------------------------------------

_PROFILE: Final = pki.Profile(
    keys=frozenset(("rsa", "secp384r1")),
    algorithms=frozenset(("rsa-pss-sha384",)),
    shortest=3,
    longest=3,
    leaf_bare=True,
    # What AMD's lists have besides the signature is not written down (57230).
    crl_named=False,
)
_RSA_BITS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChainFacts:
    """
    A chain, and what follows from its bytes alone. Equal to itself only.

    Attributes:
        certificates: Leaf, intermediate, root as it was given or is pinned.
        vek: What the leaf's extensions say, or what is wrong with them.
        leaf_name: Common name of the leaf.
        line: Product line that the root's name says, in lower case.
        names: Verdict on the names; the others likewise.
    """

    certificates: tuple[Certificate, Certificate, Certificate]
    vek: Vek | EnclaveError
    leaf_name: str
    line: str
    names: Verdict
    algorithms: Verdict
    constraints: Verdict
    key_usage: Verdict
    signatures: Verdict

    @property
    def leaf(self) -> Certificate:
        """The certificate of the VCEK or VLEK."""
        return self.certificates[0]

    @property
    def root(self) -> Certificate:
        """The root, which is pinned or not."""
        return self.certificates[2]


_Three = tuple[Certificate, Certificate, Certificate]


def _names(chain: _Three) -> Verdict:
    """Each certificate names the next, and all belong to one product and one kind of key."""
    verdict = pki.check_names(chain)
    if verdict is not PASSED:
        return failed(
            expected=verdict.expected,
            found=verdict.found,
            advice="A VCEK needs the ASK (SEV-…), a VLEK the ASVK (SEV-VLEK-…) of its line.",
        )
    names = tuple(certificate.common_name for certificate in chain)
    product = (names[2] or "").removeprefix("ARK-")
    wanted = (
        ("SEV-VCEK", f"SEV-{product}", f"ARK-{product}"),
        ("SEV-VLEK", f"SEV-VLEK-{product}", f"ARK-{product}"),
    )
    if names not in wanted or not product:
        return failed(expected="SEV-VCEK or SEV-VLEK, its issuer, and ARK-…", found=names)
    return PASSED


def _algorithms(chain: _Three) -> Verdict:
    """RSASSA-PSS with SHA-384 everywhere, by RSA keys of 4,096 bits; the leaf has a P-384 key."""
    verdict = pki.check_algorithms(chain, _PROFILE)
    if verdict is not PASSED:
        return verdict
    leaf, *issuers = (certificate.public_key() for certificate in chain)
    if pki.key_name(leaf) != "secp384r1":
        return failed(expected="leaf: a P-384 key", found=pki.key_name(leaf))
    for key in issuers:
        if pki.key_name(key) != "rsa" or key.key_size != _RSA_BITS:
            return failed(expected="issuers: RSA keys of 4,096 bits", found=pki.key_name(key))
    return PASSED


def _intermediate(leaf: Certificate) -> Certificate:
    """Return the ASK or ASVK that comes with this package and that the leaf names."""
    for name in roots.INTERMEDIATES:
        for found in roots.intermediates(name):
            if found.subject == leaf.issuer:
                return found
    raise EvidenceFormatError(
        "no intermediate certificate of this name is known",
        expected="SEV-… or SEV-VLEK-… of a known product",
        found=leaf.issuer_text,
        advice="Give the issuer of the endorsement key as ask.pem.",
    )


def _root_of(middle: Certificate, anchors: Iterable[Certificate]) -> Certificate:
    """Return the anchor that made *middle*; of several with the right name, the one that did."""
    named = [anchor for anchor in anchors if anchor.subject == middle.issuer]
    if not named:
        raise EvidenceFormatError(
            "no pinned root has the name of this chain's issuer",
            expected="ARK-Milan, ARK-Genoa or ARK-Turin",
            found=middle.issuer_text,
            advice="A root of your own is given with --root.",
        )
    for anchor in named:
        if pki.check_signatures((middle, anchor)) is PASSED:
            return anchor
    return named[0]


def _vek_or_error(leaf: Certificate) -> Vek | EnclaveError:
    try:
        return read_vek(leaf)
    except EnclaveError as error:
        return error


def _certificates(data: bytes, limit: int) -> tuple[Certificate, ...]:
    """Read one certificate in DER, or up to *limit* in PEM."""
    is_pem = data[:16].lstrip().startswith(b"-----")
    return (
        Certificate.from_pem_chain(data, limit=limit) if is_pem else (Certificate.from_der(data),)
    )


# Known chains are found by the certificates as they came: hashing them cryptographically would
# take longer than everything else about a known chain.
@lru_cache(maxsize=64)
def _load(
    vek: bytes, ask: bytes | None, ark: bytes | None, anchors: tuple[Certificate, ...]
) -> ChainFacts:
    # Azure hands out the whole chain in PEM, the KDS ASK and ARK in one file.
    leaf, *behind = _certificates(vek, 3)
    given = tuple(behind) if ask is None else _certificates(ask, 2)
    middle = given[0] if given else _intermediate(leaf)
    if ark is not None:
        root = Certificate.from_bytes(ark)
        if len(given) == 2 and given[1] != root:
            raise EvidenceFormatError(
                "two roots were given",
                expected=f"ark.pem: {given[1].subject_text}, as in ask.pem",
                found=root.subject_text,
            )
    else:
        root = given[1] if len(given) == 2 else _root_of(middle, anchors)
    chain = (leaf, middle, root)
    return ChainFacts(
        certificates=chain,
        vek=_vek_or_error(leaf),
        leaf_name=leaf.common_name or "",
        line=(root.common_name or "").removeprefix("ARK-").lower(),
        names=_names(chain),
        algorithms=_algorithms(chain),
        constraints=pki.check_constraints(chain, _PROFILE),
        key_usage=pki.check_key_usage(chain, _PROFILE),
        signatures=pki.check_signatures(chain),
    )


def read_chain(
    vek: bytes, ask: bytes | None, ark: bytes | None, anchors: Sequence[Certificate]
) -> ChainFacts:
    """
    Read a chain, from what was given and what is pinned, and judge what does not change.

    Args:
        vek: Certificate of the VCEK or VLEK, DER or PEM.
        ask: Its issuer, with or without the root; ``None`` for the one that AMD is known to use.
        ark: The root; ``None`` for the anchor of its name. It becomes no anchor by being given.
        anchors: The pinned roots and the caller's.

    Raises:
        EvidenceFormatError: A certificate is malformed, or one that was not given is not known.
    """
    return _load(vek, ask, ark, () if ark is not None else tuple(anchors))


def check_root(facts: ChainFacts, anchors: Iterable[Certificate]) -> Verdict:
    """The chain ends in an anchor: its name and its key."""
    root = facts.root
    for anchor in anchors:
        if anchor.spki == root.spki and anchor.subject == root.subject:
            return PASSED
    return pki.check_root(facts.certificates, anchors)


def check_validity(facts: ChainFacts, at: datetime) -> Verdict:
    """Every certificate is valid at the given time."""
    return pki.check_validity(facts.certificates, at)


def check_crl(data: bytes, facts: ChainFacts, at: datetime) -> Verdict:
    """
    The list is the root's, in force, and names none of the certificates that the root made.

    Args:
        data: The list as AMD serves it.
        facts: The chain.
        at: When it must be in force.

    Raises:
        EvidenceFormatError: It is no revocation list.
    """
    entry = known("crl", data, Crl.from_bytes)
    crl, root = entry.value, facts.root
    verdict = entry.fact(("snp", root.der), lambda: pki.check_crl_signature(crl, root, _PROFILE))
    if verdict is not PASSED:
        return verdict
    verdict = pki.check_crl_time(crl, at)
    if verdict is not PASSED:
        return verdict
    return pki.check_not_revoked(crl, *facts.certificates)


def kds_url(report: SnpReport, line: str) -> str:
    """Return where AMD hands out the VCEK certificate of the chip and TCB of a *report* (4.5)."""
    hwid = report.chip_id[:8] if line == "turin" else report.chip_id
    levels = decode_tcb(report.reported_tcb, line)
    text = "&".join(f"{_KDS_LEVELS[name]}={level:02d}" for name, level in levels.items())
    return f"{KDS}/vcek/v1/{line.capitalize()}/{hwid.hex()}?{text}"
