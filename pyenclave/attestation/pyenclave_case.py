"""
Evidence of our own kind (``pyenclave``) and its parts, each read once.

The certificates of a platform come with each of its quotes: what follows from their bytes is worked
out once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Final

from pyenclave.attestation import ecdsa, pki
from pyenclave.attestation.cache import Known, known
from pyenclave.attestation.case import CaseBase
from pyenclave.attestation.checks import NotReachedError
from pyenclave.attestation.result import Check
from pyenclave.errors import EnclaveError, EvidenceFormatError
from pyenclave.formats import dcap, sgx
from pyenclave.formats.evidence import Evidence
from pyenclave.formats.machine import machine_report_data
from pyenclave.formats.record import ProtectionRecord
from pyenclave.formats.x509 import Certificate, encode_pem

__all__ = ["PROFILE", "Case", "machine_checks"]

PROFILE: Final = pki.Profile(
    keys=frozenset({"secp256r1"}), algorithms=frozenset({"ecdsa-sha256"}), shortest=3, longest=3
)


@dataclass(slots=True, kw_only=True)
class Case(CaseBase):
    """Evidence of our own kind."""

    def read_container(self) -> Evidence:
        """Read the container."""
        return self._part("container", lambda: Evidence.from_bytes(self.data))

    def read_quote(self) -> dcap.Quote:
        """Read the quote; it must be in its one canonical form."""
        raw = self.container.quote

        def read() -> dcap.Quote:
            quote = dcap.Quote.from_bytes(raw, versions=(3,))
            if quote.to_bytes() != raw:
                raise EvidenceFormatError("the quote is not in its canonical form")
            if quote.certification_type != dcap.CERTIFICATION_PCK_CHAIN:
                raise EvidenceFormatError(
                    "certification data type",
                    expected=dcap.CERTIFICATION_PCK_CHAIN,
                    found=quote.certification_type,
                )
            return quote

        return self._part("quote", read)

    def read_chain(self) -> Known[tuple[Certificate, ...]]:
        """Read the certificates; they must be in the one canonical PEM form."""
        pem = self.quote.certification_data
        return self._part("chain", lambda: known("own chain", pem, _read_chain))

    def read_record(self) -> ProtectionRecord:
        """Read the protection record."""
        raw = self.container.record
        return self._part("record", lambda: ProtectionRecord.from_bytes(raw))

    @property
    def container(self) -> Evidence:
        """The container, for other checks."""
        found = self._read.get("container")
        if isinstance(found, Evidence):
            return found
        return self.need("evidence.format", self.read_container)

    @property
    def quote(self) -> dcap.Quote:
        """The quote, for other checks."""
        found = self._read.get("quote")
        if isinstance(found, dcap.Quote):
            return found
        return self.need("quote.format", self.read_quote)

    @property
    def body(self) -> sgx.ReportBody:
        """The quoted report body."""
        return self.quote.report_body

    @property
    def chain_entry(self) -> Known[tuple[Certificate, ...]]:
        """The certificates with their facts, for other checks."""
        found = self._read.get("chain")
        if isinstance(found, Known):
            return found
        return self.need("chain.format", self.read_chain)

    @property
    def chain(self) -> tuple[Certificate, ...]:
        """The certificates, for other checks."""
        return self.chain_entry.value

    @property
    def record(self) -> ProtectionRecord:
        """The protection record, for other checks."""
        found = self._read.get("record")
        if isinstance(found, ProtectionRecord):
            return found
        return self.need("record.format", self.read_record)

    @property
    def machine(self) -> Any:
        """The case of the evidence of the machine below, which there is."""

        def make() -> Any:
            # A software platform needs none of the vendors' modules.
            from pyenclave.attestation import verify_machine

            expected = machine_report_data(
                root=self.chain[-1].der, attestation_key=self.quote.attestation_key
            )
            return self.derive(
                verify_machine.Case,
                self.container.machine or b"",
                tee=self.record.tee,
                expected=expected,
                nonce=None,
                user_data=None,
                report_data=None,
            )

        return self._part("machine case", make)

    def judge_machine(self) -> tuple[Check, ...]:
        """Run the checks of the machine's evidence, once; their names begin with ``machine``."""

        def judge() -> tuple[Check, ...]:
            from pyenclave.attestation import verify_machine

            found = verify_machine.CHECKS.run(self.machine)
            return tuple([replace(check, name=f"machine.{check.name}") for check in found])

        return self._part("machine checks", judge)

    @property
    def proved(self) -> frozenset[str]:
        """
        The signatures that the native core verified, all at once: "qe", "quote", "record".

        What is not among them may hold all the same, and is for the library to judge.
        """
        found = self._read.get("proved")
        if not isinstance(found, frozenset):
            found = self._read["proved"] = _prove(self)
        return found


def machine_checks(case: Case) -> tuple[Check, ...]:
    """
    Judge what the machine below the platform says of itself and of the platform.

    Returns:
        The checks as ``machine.…``; none if no machine's evidence is there. They are run once.

    """
    try:
        if case.container.machine is None:
            return ()
        return case.judge_machine()
    except NotReachedError as error:  # what names the platform's keys cannot be read
        advice = f"not reached: {error.name} failed"
        return (Check(name="machine.format", outcome="skipped", advice=advice),)


def _read_chain(pem: bytes) -> tuple[Certificate, ...]:
    chain = Certificate.from_pem_chain(pem)
    if len(chain) != PROFILE.longest:
        raise EvidenceFormatError(
            "certificate chain", expected="leaf, intermediate and root", found=len(chain)
        )
    if b"".join(encode_pem(item.der) for item in chain) != pem:
        raise EvidenceFormatError("certificate chain is not in the canonical PEM form")
    return chain


def _prove(case: Case) -> frozenset[str]:
    quote = case.quote
    claims: dict[str, ecdsa.Claim] = {
        "quote": (quote.attestation_key, quote.signature, quote.signed_bytes)
    }
    # What cannot be read is for the checks that read it; the quote's comes before the record's.
    with contextlib.suppress(EnclaveError, NotReachedError):
        record = case.read_record()
        claims["record"] = quote.attestation_key, record.signature, record.signed_bytes()
    with contextlib.suppress(EnclaveError, NotReachedError):
        point = case.chain[0].p256_point
        if point is not None:
            claims["qe"] = point, quote.qe_report_signature, quote.qe_report_bytes
    verdicts = ecdsa.verified(tuple(claims.values()))
    return frozenset(name for name, holds in zip(claims, verdicts, strict=True) if holds)
