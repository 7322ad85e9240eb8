"""
What quotes of SGX and TDX have in common: the case, Intel's chains, and who signed the quote.

The order is that of the project's notes on collateral, 5.4. The chain of the PCK certificate comes
with the quote; the collateral's checks are in `intel_collateral`, the policy's in `intel_policy`.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar, Final, TypeVar

from pyenclave.attestation import ecdsa, pki, roots
from pyenclave.attestation.cache import Known, known
from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
)
from pyenclave.attestation.memo import Block, Moment
from pyenclave.errors import CollateralError, EnclaveError
from pyenclave.formats import dcap
from pyenclave.formats.pck import OID_SGX_EXTENSION, PckExtension
from pyenclave.formats.sgx import FLAG_DEBUG
from pyenclave.formats.x509 import MAX_CHAIN, AlgorithmId, Certificate, pem_blocks
from pyenclave.formats.x509_form import CertificateForm

__all__ = [
    "CHAIN_BLOCK",
    "EVIDENCE",
    "PROFILE",
    "Chain",
    "IntelCase",
    "adopt",
    "check_roles",
    "proved",
    "static_facts",
]

PROFILE: Final = pki.Profile(
    keys=frozenset(("secp256r1",)), algorithms=frozenset(("ecdsa-sha256",)), shortest=2
)
PCK_ROLES: Final = (("SGX PCK Certificate",), ("SGX PCK", "CA"), ("SGX Root CA",))
SIGNER_ROLES: Final = (("SGX TCB Signing",), ("SGX Root CA",))

# Who signs Intel's quoting enclaves, and their product numbers. Where the QE identity is given, it
# says so itself; without it nothing else would keep a platform's owner from quoting with an
# enclave of his own, which the PCE certifies too.
_QE_SIGNERS: Final = {
    "SGX": (bytes.fromhex("8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff"), 1),
    "TDX": (bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5"), 2),
}

Chain = Known[tuple[Certificate, ...]]
C = TypeVar("C", bound="IntelCase")


_QUOTES: Final = (dcap.Quote, dcap.TdQuote)
_BEGIN: Final = b"-----BEGIN CERTIFICATE-----\n"
_END: Final = b"-----END CERTIFICATE-----\n"
_MAX_SHAPES: Final = 4


class Shape:
    """
    What the chains of one authority's PCK certificates have in common.

    Attributes:
        form: Of the first certificate.
        issuers: The certificates behind it.
        blank: The chain with a first certificate of which only the form is there.
    """

    __slots__ = ("blank", "form", "issuers")

    def __init__(self, form: CertificateForm, issuers: tuple[Certificate, ...]) -> None:
        self.form = form
        self.issuers: Chain = Known(issuers)
        self.blank: Chain = Known((form.blank, *issuers))


def read_chain(what: str, data: bytes) -> Chain:
    """Return the certificates in *data* (PEM), the leaf first, read once for the same bytes."""
    return known(what, data, _read_chain)


def _read_chain(text: bytes) -> tuple[Certificate, ...]:
    # The same few issuers come with every platform's certificate.
    first, end, rest = text.partition(_END)
    if not rest.startswith(_BEGIN):
        return pki.ordered(_certificates(pem_blocks(text, "CERTIFICATE", limit=MAX_CHAIN)))
    behind = known("issuers", rest, _issuer_blocks)
    leaf = _plain_block(first)
    if leaf is None:
        (leaf,) = pem_blocks(first + end, "CERTIFICATE", limit=1)
    shapes: list[Shape] = behind.fact("shapes", list)
    for shape in shapes:
        certificate = shape.form.read(leaf, shape)
        if certificate is not None:
            return (certificate, *shape.issuers.value)
    chain = pki.ordered(_certificates((leaf, *behind.value)))
    form = None
    if len(shapes) < _MAX_SHAPES and len(chain) > 1 and chain[0].der == leaf:
        form = CertificateForm.of(chain[0], (OID_SGX_EXTENSION,))
    if form is not None:
        shape = Shape(form, chain[1:])
        shapes.append(shape)
        certificate = form.read(leaf, shape)
        if certificate is not None:
            return (certificate, *chain[1:])
    return chain


def _plain_block(text: bytes) -> bytes | None:
    """Return what is in a PEM block in its usual form, without its last line; else None."""
    if not text.startswith(_BEGIN):
        return None
    try:
        return binascii.a2b_base64(text[len(_BEGIN) :].replace(b"\n", b""), strict_mode=True)
    except binascii.Error:
        return None


def _certificates(blocks: tuple[bytes, ...]) -> tuple[Certificate, ...]:
    issuers = [known("certificate", block, Certificate.from_der).value for block in blocks[1:]]
    return (Certificate.from_der(blocks[0]), *issuers)


def _issuer_blocks(text: bytes) -> tuple[bytes, ...]:
    return pem_blocks(text, "CERTIFICATE", limit=MAX_CHAIN - 1)


@dataclass(slots=True, kw_only=True)
class IntelCase(CaseBase):
    """A quote, and what it is judged by."""

    tee: ClassVar[str] = ""

    def read_quote(self) -> dcap.Quote | dcap.TdQuote:
        """Read the quote."""
        raise NotImplementedError

    @property
    def any_quote(self) -> dcap.Quote | dcap.TdQuote:
        """The quote, for other checks."""
        # Read nearly a hundred times for one quote: the plain way is the fast one.
        found = self._read.get("quote")
        if isinstance(found, _QUOTES):
            return found
        return self.need("quote.format", self.read_quote)

    @property
    def quoted_data(self) -> bytes:
        """The report data of what is quoted."""
        return self.any_quote.report_body.report_data

    def read_chain(self) -> Chain:
        """Read the chain of the PCK certificate: from the quote or, if it has none, beside it."""
        quote = self.any_quote

        def read() -> Chain:
            if quote.certification_type == dcap.CERTIFICATION_PCK_CHAIN:
                return read_chain("pem", quote.certification_data)
            beside = self.endorsements.get("pck-chain.pem")
            if quote.certification_type == dcap.CERTIFICATION_PCK_LEAF:
                issuers = self.endorsements.get("pck-crl-issuer-chain.pem")
                leaf = quote.certification_data.rstrip(b"\0")
                if issuers is not None:
                    return read_chain("pem", leaf + b"\n" + issuers)
                if beside is not None:
                    found = read_chain("pem", beside)
                    if Certificate.from_pem_chain(leaf) != found.value[:1]:
                        raise CollateralError("pck-chain.pem is not of this quote's PCK")
                    return found
            if beside is not None:
                return read_chain("pem", beside)
            raise CollateralError(
                "the quote has no PCK certificate chain",
                expected="a chain in the quote, or pck-chain.pem beside it",
                found=f"certification data of type {quote.certification_type}",
                advice="Ask the provisioning service for the PCK certificate of this platform "
                "(pckcert) and give it with its issuers as pck-chain.pem.",
            )

        return self._part("chain", read)

    @property
    def chain_entry(self) -> Chain:
        """The chain with its facts, for other checks."""
        found = self._read.get("chain")
        if isinstance(found, Known):
            return found
        return self.need("chain.format", self.read_chain)

    @property
    def chain(self) -> tuple[Certificate, ...]:
        """The chain, for other checks."""
        return self.chain_entry.value

    def read_pck(self) -> PckExtension:
        """Read the SGX extension of the PCK certificate."""
        entry = self.chain_entry
        return self._part(
            "pck",
            lambda: entry.fact("pck", lambda: PckExtension.from_certificate(entry.value[0])),
        )

    @property
    def pck(self) -> PckExtension:
        """The SGX extension, for other checks."""
        return self.need("pck.format", self.read_pck)

    @property
    def intel_anchors(self) -> tuple[Certificate, ...]:
        """The pinned roots."""
        return self._part("anchors", lambda: self.anchors("intel"))

    @property
    def pinned(self) -> frozenset[tuple[bytes, bytes]]:
        """The names and public keys of the pinned roots."""
        found = self._read.get("pinned")
        if isinstance(found, frozenset):
            return found
        return self._part("pinned", lambda: _keys_of(roots.for_kind("intel"), self.roots))

    def judge_root(self, chain: tuple[Certificate, ...]) -> Verdict:
        """Judge whether *chain* ends in a pinned root."""
        if chain and (chain[-1].subject, chain[-1].spki) in self.pinned:
            return PASSED
        return pki.check_root(chain, self.intel_anchors)

    def read_endorsement(self, check: str, name: str, reader: Any) -> Known[Any] | None:
        """Return a file of the collateral as *reader* reads it; ``None`` if it was not given."""
        data = self.endorsements.get(name)
        if data is None:
            return None
        return self._part(check, lambda: known(reader.__qualname__, data, reader))

    def endorsement(self, check: str, name: str, reader: Any) -> Known[Any] | None:
        """Return the same, for other checks: check *check* has said what is wrong with it."""
        found = self._read.get(check)
        if isinstance(found, Known):
            return found
        try:
            return self.read_endorsement(check, name, reader)
        except EnclaveError:
            raise NotReachedError(check) from None


@lru_cache(maxsize=64)
def _keys_of(
    pinned: tuple[Certificate, ...], given: tuple[bytes, ...]
) -> frozenset[tuple[bytes, bytes]]:
    found = (*pinned, *map(roots.certificate, given))
    return frozenset((root.subject, root.spki) for root in found)


def adopt(target: Registry[C], source: Registry[IntelCase]) -> None:
    """Register the checks of *source* in *target*, in their order."""
    for name, function in source.functions.items():
        place = target.evidence if source.parts[name] == "evidence" else target.policy
        place(name)(function)


class _NotSignedError(Exception):
    """The signature is not one of that key."""


def check_roles(chain: tuple[Certificate, ...], roles: tuple[tuple[str, ...], ...]) -> Verdict:
    """As many certificates as there are roles, each named for its own."""
    if len(chain) != len(roles):
        return failed(expected=f"{len(roles)} certificates", found=f"{len(chain)} certificates")
    for certificate, phrases in zip(chain, roles, strict=True):
        common = certificate.common_name or ""
        if not all(phrase in common for phrase in phrases):
            return failed(expected=f"a name with {' and '.join(phrases)}", found=common)
    return PASSED


def static_facts(entry: Chain, roles: tuple[tuple[str, ...], ...]) -> Verdict:
    """Judge everything of a chain that depends neither on the time nor on the pinned roots."""

    def judge() -> Verdict:
        chain = entry.value
        for verdict in (
            check_roles(chain, roles),
            pki.check_names(chain),
            pki.check_algorithms(chain, PROFILE),
            pki.check_constraints(chain, PROFILE),
            pki.check_key_usage(chain, PROFILE),
            pki.check_signatures(chain),
        ):
            if verdict.outcome != "passed":
                return verdict
        return PASSED

    return entry.fact(("static", roles), judge)


EVIDENCE: Final[Registry[IntelCase]] = Registry()


def _equal(expected: bytes, found: bytes, advice: str | None = None) -> Verdict:
    if hmac.compare_digest(expected, found):
        return PASSED
    return failed(expected=expected, found=found, advice=advice)


# ---- the quote and the chain of its platform ----------------------------------------------------


@EVIDENCE.evidence("quote.format")
def _quote(case: IntelCase) -> Verdict:
    """The bytes are a quote, of their stated length and a known version."""
    case.read_quote()
    return PASSED


@EVIDENCE.evidence("quote.vendor")
def _vendor(case: IntelCase) -> Verdict:
    """The quoting enclave is of Intel."""
    found = case.any_quote.qe_vendor_id
    return _equal(dcap.QE_VENDOR_INTEL, found, "Another vendor's quoting enclave made it.")


@EVIDENCE.evidence("chain.format")
def _chain(case: IntelCase) -> Verdict:
    """The PCK certificate and its issuers are there, in the quote or beside it."""
    if len(case.read_chain().value) < 2:
        return failed(expected="PCK certificate and its issuers", found="one certificate")
    return PASSED


@EVIDENCE.evidence("chain.root")
def _root(case: IntelCase) -> Verdict:
    """The chain of the PCK certificate ends in a pinned root."""
    return case.judge_root(case.chain)


@EVIDENCE.evidence("chain.roles")
def _roles(case: IntelCase) -> Verdict:
    """The chain is PCK certificate, PCK authority, root, by their names."""
    entry = case.chain_entry
    return entry.fact("roles", lambda: check_roles(entry.value, PCK_ROLES))


@EVIDENCE.evidence("chain.names")
def _names(case: IntelCase) -> Verdict:
    """Each certificate names the next one as its issuer."""
    entry = case.chain_entry
    return entry.fact("names", lambda: pki.check_names(entry.value))


@EVIDENCE.evidence("chain.algorithms")
def _algorithms(case: IntelCase) -> Verdict:
    """Keys and signatures are ECDSA on P-256 with SHA-256."""
    entry = case.chain_entry
    return entry.fact("algorithms", lambda: pki.check_algorithms(entry.value, PROFILE))


@EVIDENCE.evidence("chain.constraints")
def _constraints(case: IntelCase) -> Verdict:
    """Only authorities may issue, and no deeper than they are allowed to."""
    entry = case.chain_entry
    return entry.fact("constraints", lambda: pki.check_constraints(entry.value, PROFILE))


@EVIDENCE.evidence("chain.key_usage")
def _key_usage(case: IntelCase) -> Verdict:
    """Each key is meant for what it did."""
    entry = case.chain_entry
    return entry.fact("key usage", lambda: pki.check_key_usage(entry.value, PROFILE))


@EVIDENCE.evidence("chain.validity")
def _validity(case: IntelCase) -> Verdict:
    """Every certificate is valid at the time of judging."""
    return pki.check_validity(case.chain, case.at)


@EVIDENCE.evidence("chain.signatures")
def _chain_signatures(case: IntelCase) -> Verdict:
    """Each certificate is signed by the next one."""
    entry = case.chain_entry

    def judge() -> Verdict:
        shape = entry.value[0].mark
        if isinstance(shape, Shape) and "leaf" in proved(case):
            issuers = shape.issuers
            if issuers.fact("signatures", lambda: pki.check_signatures(issuers.value)) is PASSED:
                return PASSED
        return pki.check_signatures(entry.value)

    return entry.fact("signatures", judge)


@EVIDENCE.evidence("pck.format")
def _pck(case: IntelCase) -> Verdict:
    """The PCK certificate has Intel's SGX extension, whole and without doubled fields."""
    case.read_pck()
    return PASSED


@EVIDENCE.evidence("pck.platform")
def _platform(case: IntelCase) -> Verdict:
    """The PCK certificate is the one that the quote names, if it names one."""
    quote = case.any_quote
    ids = quote.platform_ids
    if ids is None:
        return PASSED
    pck = case.pck
    own = int.from_bytes(pck.pce_id, "little")
    if ids.pce_id != own:
        return failed(expected=f"PCE {ids.pce_id}", found=f"PCE {own}")
    if quote.certification_type == dcap.CERTIFICATION_PPID_CLEAR and ids.ppid != pck.ppid:
        return failed(expected=ids.ppid, found=pck.ppid, advice="It is another platform's.")
    return PASSED


# ---- what is remembered of a chain ---------------------------------------------------------------


def _chain_key(case: IntelCase) -> Hashable | None:
    """All that these checks depend on, for a first certificate of a known form."""
    leaf = case.chain_entry.value[0]
    shape = leaf.mark
    if not isinstance(shape, Shape):
        return None
    # Of the key, these checks ask whether it is one. Whoever made a signature has one.
    if "qe" not in proved(case):
        leaf.public_key()
    return shape, case.pinned


def _chain_only(case: IntelCase, at: Moment) -> IntelCase:
    """Return a case with nothing but what the chains of this shape have in common."""
    shape = case.chain_entry.value[0].mark
    return case.bare(at, quote=SimpleNamespace(), chain=shape.blank)


#: The checks of the chain that come out the same for every platform of an authority.
CHAIN_BLOCK: Final[Block[Any]] = Block(
    names=frozenset(
        f"chain.{name}"
        for name in ("root", "roles", "names", "algorithms", "constraints", "key_usage")
    ),
    key=_chain_key,
    reduce=_chain_only,
    given=frozenset(("quote", "chain")),
)


# ---- who signed ---------------------------------------------------------------------------------

_ECDSA: Final = "ecdsa-sha256"


def proved(case: IntelCase) -> frozenset[str]:
    """
    Return what the native core has verified: "leaf", "qe", "quote".

    All signatures that only this quote has are verified at once. What is not in there may hold all
    the same, and is for the library to judge.

    """
    found = case._read.get("proved")  # noqa: SLF001
    if not isinstance(found, frozenset):
        found = case._read["proved"] = _prove(case)  # noqa: SLF001
    return found


def _prove(case: IntelCase) -> frozenset[str]:
    quote = case.any_quote
    names, held = ["quote"], []
    claims = [(quote.attestation_key, quote.signature, quote.signed_bytes)]
    entry = case._read.get("chain")  # noqa: SLF001
    if isinstance(entry, Known) and len(entry.value) > 1:
        leaf, issuer = entry.value[:2]
        point, above = leaf.p256_point, issuer.p256_point
        if point is not None and above is not None and not entry.has("signatures"):
            signature = ecdsa.raw_signature(leaf.signature)
            if signature is not None and _by_ecdsa(leaf.signature_algorithm):
                names.append("leaf")
                claims.append((above, signature, leaf.tbs))
        if entry.has(_certified(quote)):
            held.append("qe")  # a quoting enclave is certified once and quotes often
        elif point is not None:
            names.append("qe")
            claims.append((point, quote.qe_report_signature, quote.qe_report_bytes))
    verdicts = ecdsa.verified(claims)
    held += [name for name, holds in zip(names, verdicts, strict=True) if holds]
    return frozenset(held)


@lru_cache(maxsize=16)
def _by_ecdsa(algorithm: AlgorithmId) -> bool:
    return pki.algorithm_name(algorithm) == _ECDSA


def _certified(quote: dcap.Quote | dcap.TdQuote) -> Hashable:
    """Return the fact that this key made this signature over this report."""
    return "certified", quote.qe_report_signature, quote.qe_report_bytes


def qe_signature_holds(case: IntelCase) -> bool:
    """Whether the PCK key signed the report of the quoting enclave; if so, it is remembered."""
    quote, entry = case.any_quote, case.chain_entry

    def verify() -> bool:
        if "qe" not in proved(case):
            key = entry.value[0].public_key()
            if not pki.verify_p256_raw(key, quote.qe_report_signature, quote.qe_report_bytes):
                raise _NotSignedError
        return True

    try:
        return entry.fact(_certified(quote), verify)
    except _NotSignedError:
        return False


def quote_signature_holds(case: IntelCase) -> bool:
    """Whether the attestation key signed the quote."""
    if "quote" in proved(case):
        return True
    quote = case.any_quote

    def verify() -> bool:
        key = pki.p256_key(quote.attestation_key)
        return key is not None and pki.verify_p256_raw(key, quote.signature, quote.signed_bytes)

    return case._part("quote.signature", verify)  # noqa: SLF001


@EVIDENCE.evidence("qe.signature")
def _qe_signature(case: IntelCase) -> Verdict:
    """The PCK key signed the report of the quoting enclave."""
    if qe_signature_holds(case):
        return PASSED
    return failed(
        expected="the quoting enclave's report signed by the PCK key",
        found="an invalid signature",
        advice="The quote was changed, or the certificate is another platform's.",
    )


@EVIDENCE.evidence("qe.binding")
def _qe_binding(case: IntelCase) -> Verdict:
    """The report of the quoting enclave names the attestation key; its other half is zero."""
    quote = case.any_quote
    digest = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    return _equal(
        digest + bytes(32),
        quote.qe_report.report_data,
        "The attestation key is not the quoting enclave's.",
    )


@EVIDENCE.evidence("qe.origin")
def _qe_origin(case: IntelCase) -> Verdict:
    """The quoting enclave is one of Intel's, as far as that is known without its identity."""
    report = case.any_quote.qe_report
    if report.attributes.flags & FLAG_DEBUG:
        return failed(expected="a production quoting enclave", found="debug")
    if "qe-identity.json" in case.endorsements:
        return PASSED
    signer, product = _QE_SIGNERS[case.tee]
    if report.mrsigner == signer and report.isv_prod_id == product:
        return PASSED
    return failed(
        expected=f"Intel's quoting enclave of {case.tee}",
        found=f"signer {report.mrsigner.hex()}, product {report.isv_prod_id}",
        advice="If Intel signs with another key now, give qe-identity.json.",
    )


@EVIDENCE.evidence("quote.signature")
def _quote_signature(case: IntelCase) -> Verdict:
    """The attestation key signed the quote."""
    if quote_signature_holds(case):
        return PASSED
    return failed(
        expected="a quote signed by its attestation key",
        found="an invalid signature",
        advice="Something in the quote was changed.",
    )
