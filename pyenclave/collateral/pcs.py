"""Intel's provisioning certification service (PCS), and caches that speak its interface (PCCS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from urllib.parse import quote, unquote

from pyenclave.attestation import AppraisalPolicy, appraise
from pyenclave.collateral.fetcher import Fetcher
from pyenclave.collateral.http import Response
from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.formats.x509 import Crl

__all__ = ["PCS", "PCS_ROOT_CRL", "IntelSource", "fetch_intel"]

PCS: Final = "https://api.trustedservices.intel.com"
PCS_ROOT_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
Tee = Literal["sgx", "tdx"]
_MAX_JSON: Final = 1 << 20
_MAX_CRL: Final = 4 << 20
_MAX_PEM: Final = 32 << 10
_PEM: Final = "-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class IntelSource:
    """
    Where to ask.

    Attributes:
        base: Address without the path; Intel's own, or that of a caching service.
        version: Of the interface: 4, or 3 for old caching services (SGX only).
        caching: A caching service, which serves the root's CRL itself (``rootcacrl``, hex text).
        update: ``standard`` (within the grace period) or ``early`` (the newest).
    """

    base: str = PCS
    version: Literal[3, 4] = 4
    caching: bool = False
    update: Literal["standard", "early"] = "standard"

    def __post_init__(self) -> None:
        if self.version not in (3, 4) or self.update not in ("standard", "early"):
            raise ValueError("version is 3 or 4, update is 'standard' or 'early'")

    def url(self, tee: Tee, path: str, **query: str) -> str:
        """Return the address of *path*."""
        if tee == "tdx" and self.version < 4:
            raise ValueError("version 3 of the interface has no TDX collateral")
        # "standard" is the default, and old caching services do not know the parameter.
        if self.update == "early" and path in ("tcb", "qe/identity"):
            query["update"] = "early"
        text = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        address = f"{self.base.rstrip('/')}/{tee}/certification/v{self.version}/{path}"
        return f"{address}?{text}" if text else address


def _chain(answer: Response, url: str, *names: str) -> bytes:
    for name in names:
        value = answer.headers.get(name.lower())
        if value is not None:
            text = unquote(value)
            if len(text) > _MAX_PEM or not text.lstrip().startswith(_PEM) or not text.isascii():
                raise CollateralError(f"{url}: header {name} is no certificate chain")
            return text.encode()
    raise CollateralError(
        f"{url}: the answer has no issuer chain", expected=f"header {names[0]}", found="none"
    )


def _inner(answer: Response, url: str, member: str) -> Mapping[str, Any]:
    value = jsonstrict.loads(answer.body, url, error=CollateralError, max_size=_MAX_JSON)
    inner = value.get(member) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(inner, dict) or "signature" not in value:
        raise CollateralError(f"{url}: not a signed {member}", expected=f"{member} and signature")
    return inner


def _crl(data: bytes, url: str) -> bytes:
    """Return a CRL as DER, which came as DER, PEM or hexadecimal text."""
    try:
        return Crl.from_bytes(data).der
    except EvidenceFormatError as error:
        raise CollateralError(f"{url}: not a CRL", found=error.message) from None


async def fetch_intel(
    fetcher: Fetcher,
    source: IntelSource,
    *,
    tee: Tee,
    fmspc: bytes,
    ca: Literal["processor", "platform"],
) -> dict[str, bytes]:
    """
    Fetch everything that judging quotes of one platform family needs.

    Args:
        fetcher: How to ask, and the cache.
        source: Where to ask.
        tee: SGX or TDX.
        fmspc: The platform family, 6 bytes, from the PCK certificate.
        ca: Which authority issued the PCK certificate.

    Returns:
        Endorsements by file name.

    Raises:
        CollateralError: An answer is missing or is not what was asked for, or is older than what
            was seen before. Signatures are checked when evidence is verified.

    """
    if len(fmspc) != 6:
        raise ValueError(f"fmspc has 6 bytes, not {len(fmspc)}")
    tcb_url = source.url(tee, "tcb", fmspc=fmspc.hex())
    qe_url = source.url(tee, "qe/identity")
    pck_url = source.url("sgx", "pckcrl", ca=ca, encoding="der")
    root_url = source.url("sgx", "rootcacrl") if source.caching else PCS_ROOT_CRL
    tcb, qe, pck, root = await fetcher.get_all(
        (tcb_url, _MAX_JSON, None),
        (qe_url, _MAX_JSON, None),
        (pck_url, _MAX_CRL, None),
        (root_url, _MAX_CRL, None),
    )
    info = _inner(tcb, tcb_url, "tcbInfo")
    identity = _inner(qe, qe_url, "enclaveIdentity")
    served = str(info.get("fmspc")).lower()
    if served != fmspc.hex():
        raise CollateralError(
            f"{tcb_url}: TCB info of another platform", expected=fmspc.hex(), found=served[:40]
        )
    files = {
        "tcb-info.json": tcb.body,
        "tcb-info-issuer-chain.pem": _chain(
            tcb, tcb_url, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"
        ),
        "qe-identity.json": qe.body,
        "qe-identity-issuer-chain.pem": _chain(qe, qe_url, "SGX-Enclave-Identity-Issuer-Chain"),
        "pck-crl.der": _crl(pck.body, pck_url),
        "pck-crl-issuer-chain.pem": _chain(pck, pck_url, "SGX-PCK-CRL-Issuer-Chain"),
        "root-ca-crl.der": _crl(root.body, root_url),
    }
    for family, name, item in (
        (f"{tee} {served} tcb", "tcb-info.json", info),
        (f"{tee} qe", "qe-identity.json", identity),
    ):
        number = item.get("tcbEvaluationDataNumber")
        if type(number) is not int:
            raise CollateralError(f"{family}: no tcbEvaluationDataNumber", found=str(number)[:40])
        signed = _is_signed(files, name, item, fetcher.roots)
        fetcher.check_not_older(f"{family} {source.update}", number, signed=signed)
    return files


def _is_signed(
    files: Mapping[str, bytes], name: str, item: Mapping[str, Any], roots: tuple[bytes, ...]
) -> bool:
    """Whether a document holds up to a root at the time of its issue."""
    try:
        issued = datetime.fromisoformat(str(item.get("issueDate")))
        result = appraise(
            files[name],
            policy=AppraisalPolicy.permissive(),
            endorsements=files,
            freshness="not_checked",
            roots=roots,
            at=issued,
        )
    except (EvidenceFormatError, ValueError):
        return False
    return result.genuine
