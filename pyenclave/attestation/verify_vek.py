"""
The checks of AMD's endorsement keys (``sev-snp-vek-cert``): VCEK or VLEK up to a pinned ARK.

The project's notes on SEV-SNP structures, 4.5. The checks of SEV-SNP reports begin with the same
ones, so they are registered by a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyenclave.attestation import amd, roots
from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import (
    PASSED,
    NotReachedError,
    Registry,
    Verdict,
    failed,
    not_asked,
)
from pyenclave.attestation.endorsements import EMPTY, Endorsements
from pyenclave.attestation.memo import Block, Moment
from pyenclave.errors import EnclaveError
from pyenclave.formats.snp import KEY_VCEK
from pyenclave.formats.x509 import Certificate

__all__ = ["CHAIN_BLOCK", "CHECKS", "Case", "VekCase", "chain_claims", "register_chain"]


@dataclass(slots=True, kw_only=True)
class VekCase(CaseBase):
    """A case with a VCEK or VLEK in it, and what its kinds have in common."""

    def vek_bytes(self) -> bytes:
        """
        Return the endorsement key's certificate.

        Raises:
            EnclaveError: It was not given.
        """
        raise NotImplementedError

    def issuer_bytes(self) -> tuple[bytes | None, bytes | None]:
        """Return ASK and ARK as they were given."""
        return self.endorsements.get("ask.pem"), self.endorsements.get("ark.pem")

    def read_chain(self) -> amd.ChainFacts:
        """Read the chain."""
        return self._part("chain", self._load_chain)

    def _load_chain(self) -> amd.ChainFacts:
        ask, ark = self.issuer_bytes()
        anchors = self.anchors("amd") if ark is None else ()
        return amd.read_chain(self.vek_bytes(), ask, ark, anchors)

    def read_vek(self) -> amd.Vek:
        """Read the leaf's extensions."""
        found = self.chain.vek
        if isinstance(found, EnclaveError):
            raise found
        return found

    @property
    def chain(self) -> amd.ChainFacts:
        """The chain, for other checks."""
        found = self._read.get("chain")
        if isinstance(found, amd.ChainFacts):
            return found
        return self.need("chain.format", self.read_chain)

    @property
    def vek(self) -> amd.Vek:
        """The leaf's extensions, for other checks."""
        found = self.chain.vek
        if isinstance(found, amd.Vek):
            return found
        raise NotReachedError("vek.format")

    def line_anchors(self) -> tuple[Certificate, ...]:
        """Return the anchors of the leaf's product line; of an unknown line the caller's only."""
        line = self.vek.line
        pinned: tuple[Certificate, ...] = roots.for_kind(f"amd-{line}") if line in amd.LINES else ()
        return pinned + self.anchors() if self.roots else pinned


def register_chain(registry: Registry[Any]) -> None:
    """Register the checks of the chain and its leaf: the first ones of a `VekCase`'s kind."""
    for name, function in _CHAIN_CHECKS.items():
        registry.evidence(name)(function)


def _format(case: VekCase) -> Verdict:
    """The certificate of the signing key and its issuers are there and can be read."""
    case.read_chain()
    return PASSED


def _vek(case: VekCase) -> Verdict:
    """The certificate has AMD's extensions, as its kind has them."""
    case.read_vek()
    return PASSED


def _root(case: VekCase) -> Verdict:
    """The chain ends in the pinned root of its product line, or one that was given."""
    return amd.check_root(case.chain, case.line_anchors())


def _names(case: VekCase) -> Verdict:
    """Each certificate names the next one as its issuer."""
    return case.chain.names


def _algorithms(case: VekCase) -> Verdict:
    """Keys and signatures are those that AMD uses: RSA-PSS with SHA-384, P-384."""
    return case.chain.algorithms


def _constraints(case: VekCase) -> Verdict:
    """Only authorities may issue, and no deeper than they are allowed to."""
    return case.chain.constraints


def _key_usage(case: VekCase) -> Verdict:
    """Each key is meant for what it did."""
    return case.chain.key_usage


def _validity(case: VekCase) -> Verdict:
    """Every certificate is valid at the time of judging."""
    return amd.check_validity(case.chain, case.at)


def _signatures(case: VekCase) -> Verdict:
    """Each certificate is signed by the next one."""
    return case.chain.signatures


def _kind(case: VekCase) -> Verdict:
    """The name of the certificate and its extensions say the same kind of key."""
    wanted = "SEV-VCEK" if case.vek.kind == KEY_VCEK else "SEV-VLEK"
    found = case.chain.leaf_name
    if found != wanted:
        return failed(expected=f"{wanted}, by its HWID or CSP id", found=found)
    return PASSED


def _product(case: VekCase) -> Verdict:
    """The leaf's product belongs to the line of the root."""
    if case.vek.line != case.chain.line:
        return failed(
            expected=f"a product of {case.chain.root.common_name}", found=case.vek.product
        )
    return PASSED


_NO_CRL: Final = not_asked(
    f"no revocation list was given: fetch {amd.KDS}/vcek/v1/Milan/crl (or Genoa, Turin; vlek for a "
    "VLEK) and give it as crl.der"
)


def _crl(case: VekCase) -> Verdict:
    """The revocation list is the root's and in force, and revokes nothing of the chain."""
    data = case.endorsements.get("crl.der")
    if data is None:
        return _NO_CRL
    return amd.check_crl(data, case.chain, case.at)


_CHAIN_CHECKS: Final = {
    "chain.format": _format,
    "vek.format": _vek,
    "chain.root": _root,
    "chain.names": _names,
    "chain.algorithms": _algorithms,
    "chain.constraints": _constraints,
    "chain.key_usage": _key_usage,
    "chain.validity": _validity,
    "chain.signatures": _signatures,
    "vek.kind": _kind,
    "vek.product": _product,
    "crl": _crl,
}


def _key(case: VekCase) -> Hashable:
    """All that the checks of the chain depend on besides the time."""
    return case.chain, case.roots, case.endorsements.get("crl.der")


def _reduced(case: VekCase, at: Moment) -> VekCase:
    """Return a case with nothing but what is in the key."""
    crl = case.endorsements.get("crl.der")
    files = EMPTY if crl is None else Endorsements({"crl.der": crl})
    return case.bare(at, files, chain=case.chain)


#: The checks of a chain that was read: remembered together.
CHAIN_BLOCK: Final[Block[Any]] = Block(
    names=frozenset(_CHAIN_CHECKS), key=_key, reduce=_reduced, given=frozenset(("chain",))
)


def chain_claims(case: VekCase) -> dict[str, Any]:
    """Return what the endorsement key's certificate says, as far as it can be read."""
    try:
        chain, vek = case.read_chain(), case.read_vek()
    except (EnclaveError, NotReachedError):
        return {}
    verdicts = (
        chain.names,
        chain.algorithms,
        chain.constraints,
        chain.key_usage,
        chain.signatures,
        _root(case),
        _validity(case),
    )
    return {
        "vek": vek.claims(),
        "vek_serial": str(chain.leaf.serial),
        "vek_chain_ok": all(verdict is PASSED for verdict in verdicts),
    }


# ---- a certificate alone -----------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Case(VekCase):
    """The certificate of an endorsement key, without a report."""

    def vek_bytes(self) -> bytes:
        """Return the evidence: the certificate itself."""
        return self.data


CHECKS: Final[Registry[Case]] = Registry()
register_chain(CHECKS)
CHECKS.remember(CHAIN_BLOCK)


def _no_report(name: str, value: bytes | None) -> Verdict:
    if value is None:
        return not_asked(f"a certificate alone has no {name}")
    return failed(
        expected=value, found=None, advice="A certificate proves no launch: ask for a report."
    )


@CHECKS.policy("nonce")
def _nonce(case: Case) -> Verdict:
    """No nonce is expected of a certificate."""
    return _no_report("nonce", case.nonce)


@CHECKS.policy("report_data")
def _report_data(case: Case) -> Verdict:
    """No report data is expected of a certificate."""
    return _no_report("report data", case.report_data)


@CHECKS.policy("user_data")
def _user_data(case: Case) -> Verdict:
    """No user data is expected of a certificate."""
    return _no_report("user data", case.user_data)


@CHECKS.policy("code.identity")
def _code(case: Case) -> Verdict:
    """A policy that names code is not met by a certificate."""
    if case.policy.accept_any_code:
        return not_asked("a certificate alone says nothing of code")
    return failed(expected="evidence of the code that the policy names", found="a certificate")


def claims(case: Case) -> Mapping[str, Any]:
    """Return what the certificate says, as far as it can be read."""
    found: dict[str, Any] = {"verify_at": case.at.isoformat()}
    found |= chain_claims(case)
    with contextlib.suppress(EnclaveError, NotReachedError):
        found["product"] = case.read_vek().line
    return found
