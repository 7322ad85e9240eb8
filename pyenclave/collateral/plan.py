"""What a piece of evidence needs, and where that comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, cast

from pyenclave.attestation.detect import kind_of
from pyenclave.collateral.fetcher import Fetcher
from pyenclave.collateral.kds import AmdSource, Product, fetch_amd
from pyenclave.collateral.pcs import IntelSource, fetch_intel
from pyenclave.collateral.thim import fetch_thim
from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats.bundle import Bundle
from pyenclave.formats.dcap import CERTIFICATION_PCK_CHAIN, TdQuote, read_quote
from pyenclave.formats.hcl import HclReport
from pyenclave.formats.pck import PckExtension
from pyenclave.formats.snp import KEY_VCEK, KEY_VLEK, SnpReport, decode_tcb
from pyenclave.formats.x509 import Certificate

__all__ = ["Sources", "fetch", "fetch_sync"]

_PRODUCTS: Final[Mapping[str, Product]] = {"milan": "Milan", "genoa": "Genoa", "turin": "Turin"}


@dataclass(frozen=True, slots=True)
class Sources:
    """
    Where to ask.

    Attributes:
        intel: For quotes of SGX and TDX.
        amd: For reports of SEV-SNP.
        thim: Ask Azure's metadata service of the machine this runs on instead of AMD.
        product: AMD's line of processors, for reports of version 2, which do not name it.
    """

    intel: IntelSource = field(default_factory=IntelSource)
    amd: AmdSource = field(default_factory=AmdSource)
    thim: bool = False
    product: Literal["milan", "genoa", "turin"] | None = None


async def fetch(
    evidence: bytes,
    *,
    beside: Mapping[str, bytes] | None = None,
    sources: Sources | None = None,
    fetcher: Fetcher | None = None,
) -> Bundle:
    """
    Fetch what judging *evidence* needs beyond itself.

    Args:
        evidence: A quote, an SEV-SNP report or an HCL report.
        beside: Files that came with it (``td-quote.bin``, ``pck-chain.pem``, ``vek.der``); they
            are in the bundle too.
        sources: Where to ask; default the vendors' own services.
        fetcher: How to ask; default without a cache.

    Returns:
        The bundle: give it to `verify` as ``endorsements``.

    Raises:
        CollateralError: Something is not to be had, or this kind of evidence needs nothing.
        EvidenceFormatError: The evidence cannot be read.

    """
    given = dict(beside or {})
    found, source = await _fetch(evidence, given, sources or Sources(), fetcher or Fetcher())
    # Signed moments later or earlier make no difference: the time is for people.
    return Bundle(given | found, datetime.now(UTC).replace(microsecond=0), source)


def fetch_sync(
    evidence: bytes,
    *,
    beside: Mapping[str, bytes] | None = None,
    sources: Sources | None = None,
    fetcher: Fetcher | None = None,
) -> Bundle:
    """Do as `fetch`, where no event loop runs."""
    return asyncio.run(fetch(evidence, beside=beside, sources=sources, fetcher=fetcher))


async def _fetch(
    evidence: bytes, given: Mapping[str, bytes], sources: Sources, fetcher: Fetcher
) -> tuple[dict[str, bytes], str]:
    kind = kind_of(evidence)
    if kind in ("sgx-quote", "tdx-quote"):
        return await _intel(evidence, given, sources, fetcher)
    if kind == "sev-snp-report":
        return await _amd(evidence, given, sources, fetcher)
    if kind == "azure-hcl-snp":
        report = HclReport.from_bytes(evidence).hardware_report
        return await _amd(report, given, sources, fetcher)
    if kind == "azure-hcl-tdx":
        quote = given.get("td-quote.bin")
        if quote is None:
            raise CollateralError(
                "the TD quote of this VM is missing",
                expected="td-quote.bin beside the HCL report",
                advice="Azure's metadata service makes it from the TDREPORT (acc/tdquote).",
            )
        return await _intel(quote, given, sources, fetcher)
    raise CollateralError(f"evidence of kind {kind} needs no collateral", found=kind)


async def _intel(
    data: bytes, given: Mapping[str, bytes], sources: Sources, fetcher: Fetcher
) -> tuple[dict[str, bytes], str]:
    quote = read_quote(data)
    pem = given.get("pck-chain.pem")
    if quote.certification_type == CERTIFICATION_PCK_CHAIN:
        pem = quote.certification_data
    if pem is None:
        raise CollateralError(
            "the quote does not carry its PCK certificate",
            expected="certification data of type 5, or pck-chain.pem beside the quote",
            found=f"type {quote.certification_type}",
        )
    pck = Certificate.from_pem_chain(pem)[0]
    issuer = pck.issuer_name.common_name or ""
    if issuer not in ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA"):
        raise CollateralError(
            "the PCK certificate has an unknown issuer",
            expected="Intel SGX PCK Platform CA or Processor CA",
            found=issuer[:80],
        )
    files = await fetch_intel(
        fetcher,
        sources.intel,
        tee="tdx" if isinstance(quote, TdQuote) else "sgx",
        fmspc=PckExtension.from_certificate(pck).fmspc,
        ca="platform" if "Platform" in issuer else "processor",
    )
    return files, sources.intel.base


async def _amd(
    data: bytes, given: Mapping[str, bytes], sources: Sources, fetcher: Fetcher
) -> tuple[dict[str, bytes], str]:
    report = SnpReport.from_bytes(data)
    if sources.thim:
        return await fetch_thim(fetcher), "Azure THIM"
    name = report.product or sources.product
    if name not in _PRODUCTS:
        raise CollateralError(
            "the report does not say which line of processors it is of",
            expected=f"one of {', '.join(_PRODUCTS)}",
            found=name,
            advice="Name it: product=… (--product).",
        )
    product = _PRODUCTS[cast("str", name)]
    if report.signing_key == KEY_VLEK:
        if "vek.der" not in given:
            raise CollateralError(
                "a VLEK certificate is the cloud provider's: AMD's service does not give it",
                expected="vek.der beside the report (the host's certificate table has it)",
            )
        return await fetch_amd(fetcher, sources.amd, product=product, signer="vlek"), (
            sources.amd.base
        )
    if report.signing_key != KEY_VCEK:
        raise EvidenceFormatError("the report is not signed", found=report.signing_key_name)
    files = await fetch_amd(
        fetcher,
        sources.amd,
        product=product,
        signer="vcek",
        chip_id=report.chip_id,
        tcb=decode_tcb(report.reported_tcb, cast("str", name)),
    )
    return files, sources.amd.base
