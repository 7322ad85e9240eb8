"""
Azure's metadata service: the certificates of the machine one runs on.

The metadata address answers only inside an Azure VM, over plain HTTP; what it says is signed by AMD
and checked like anything else. The project's notes on evidence providers, 1.6.
"""

from __future__ import annotations

from typing import Final

from pyenclave.collateral.fetcher import Fetcher
from pyenclave.collateral.http import METADATA_HOST
from pyenclave.errors import CollateralError, EvidenceFormatError
from pyenclave.formats import jsonstrict
from pyenclave.formats.x509 import Certificate, encode_pem

__all__ = ["THIM", "fetch_thim"]

THIM: Final = f"http://{METADATA_HOST}"
_PATH: Final = "/metadata/THIM/amd/certification"
_MAX_SIZE: Final = 64 << 10


async def fetch_thim(fetcher: Fetcher, *, base: str = THIM) -> dict[str, bytes]:
    """
    Fetch VCEK, ASK and ARK of this Azure VM.

    Returns:
        Endorsements by file name.

    Raises:
        CollateralError: No answer, or not one of the documented form.

    """
    url = base.rstrip("/") + _PATH
    # The machine may be moved to another chip at any time, so the answer is never kept.
    answer = await fetcher.get(url, max_size=_MAX_SIZE, headers={"Metadata": "true"}, keep=0.0)
    value = jsonstrict.loads(answer.body, url, error=CollateralError, max_size=_MAX_SIZE)
    members = ("vcekCert", "certificateChain")
    if not isinstance(value, dict) or not all(isinstance(value.get(m), str) for m in members):
        raise CollateralError(f"{url}: wrong members", expected=" and ".join(members))
    try:
        (vek,) = Certificate.from_pem_chain(value["vcekCert"].encode())
        ask, ark = Certificate.from_pem_chain(value["certificateChain"].encode())
    except (EvidenceFormatError, ValueError) as error:
        raise CollateralError(f"{url}: not the certificates", found=str(error)[:200]) from None
    return {"vek.der": vek.der, "ask.pem": encode_pem(ask.der), "ark.pem": encode_pem(ark.der)}
