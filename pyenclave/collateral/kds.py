"""
AMD's key distribution service: VCEK certificates, chains and CRLs of SEV-SNP.

The project's notes on SEV-SNP, 4.5; AMD publication 57230. The service limits how often one may
ask; certificates are kept for 30 days, for they never change for one chip and TCB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pyenclave.collateral.fetcher import Fetcher
from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats.x509 import Certificate, Crl, encode_pem

__all__ = ["KDS", "AmdSource", "fetch_amd", "vcek_path"]

KDS: Final = "https://kdsintf.amd.com"
Product = Literal["Milan", "Genoa", "Turin"]
PRODUCTS: Final = ("Milan", "Genoa", "Turin")
_MAX_CERTIFICATE: Final = 16 << 10
_MAX_CRL: Final = 4 << 20
_MONTH: Final = 30 * 86_400.0
# In the order of the query; Turin has the FMC before them.
_COMPONENTS: Final = (
    ("blSPL", "bootloader"),
    ("teeSPL", "tee"),
    ("snpSPL", "snp"),
    ("ucodeSPL", "microcode"),
)


@dataclass(frozen=True, slots=True)
class AmdSource:
    """Where to ask: the service's address without the path."""

    base: str = KDS


def vcek_path(product: Product, chip_id: bytes, tcb: Mapping[str, int]) -> str:
    """
    Return the path of a VCEK.

    Args:
        product: Line of processors.
        chip_id: CHIP_ID of the report, 64 bytes; Turin's first 8 are used.
        tcb: REPORTED_TCB by component: bootloader, tee, snp, microcode, and Turin's fmc.

    Raises:
        CollateralError: The chip id is masked, so that no certificate can be asked for.

    """
    if product not in PRODUCTS or len(chip_id) != 64:
        raise ValueError("product is Milan, Genoa or Turin; chip_id has 64 bytes")
    if not any(chip_id):
        raise CollateralError(
            "the report's CHIP_ID is masked: no VCEK can be asked for",
            advice="The host has to give the certificate (its certificate table, or THIM).",
        )
    hwid = chip_id[:8] if product == "Turin" else chip_id
    names = (("fmcSPL", "fmc"), *_COMPONENTS) if product == "Turin" else _COMPONENTS
    parts = []
    for name, component in names:
        value = tcb[component]
        if not 0 <= value <= 255:
            raise ValueError(f"{component} is a byte, not {value}")
        parts.append(f"{name}={value:02d}")
    return f"/vcek/v1/{product}/{hwid.hex()}?{'&'.join(parts)}"


def _certificates(data: bytes, url: str, count: int) -> list[Certificate]:
    try:
        found = (
            list(Certificate.from_pem_chain(data))
            if data.lstrip().startswith(b"-----")
            else [Certificate.from_der(data)]
        )
    except EvidenceFormatError as error:
        raise CollateralError(f"{url}: not a certificate", found=error.message) from None
    if len(found) != count:
        raise CollateralError(f"{url}: wrong number of certificates", expected=count)
    return found


async def fetch_amd(
    fetcher: Fetcher,
    source: AmdSource,
    *,
    product: Product,
    signer: Literal["vcek", "vlek"],
    chip_id: bytes | None = None,
    tcb: Mapping[str, int] | None = None,
) -> dict[str, bytes]:
    """
    Fetch certificate (VCEK only), chain and CRL.

    A VLEK belongs to a cloud provider, which alone can ask for it: its certificate comes with the
    evidence, and only chain and CRL are fetched.

    Returns:
        Endorsements by file name.

    Raises:
        CollateralError: An answer is missing or is not what was asked for.

    """
    if product not in PRODUCTS:
        raise ValueError(f"product is Milan, Genoa or Turin, not {product!r}")
    base = source.base.rstrip("/")
    chain_url = f"{base}/{signer}/v1/{product}/cert_chain"
    crl_url = f"{base}/{signer}/v1/{product}/crl"
    wanted: list[tuple[str, int, float | None]] = [
        (chain_url, _MAX_CERTIFICATE, _MONTH),
        (crl_url, _MAX_CRL, None),
    ]
    vek_url = ""
    if signer == "vcek":
        if chip_id is None or tcb is None:
            raise ValueError("a VCEK is asked for by chip_id and tcb")
        vek_url = base + vcek_path(product, chip_id, tcb)
        wanted.append((vek_url, _MAX_CERTIFICATE, _MONTH))
    answers = await fetcher.get_all(*wanted)
    ask, ark = _certificates(answers[0].body, chain_url, 2)
    try:
        crl = Crl.from_bytes(answers[1].body)
    except EvidenceFormatError as error:
        raise CollateralError(f"{crl_url}: not a CRL", found=error.message) from None
    files = {"ask.pem": encode_pem(ask.der), "ark.pem": encode_pem(ark.der), "crl.der": crl.der}
    if signer == "vcek":
        (vek,) = _certificates(answers[2].body, vek_url, 1)
        files["vek.der"] = vek.der
    return files
