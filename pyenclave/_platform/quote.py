"""
Quotes in the DCAP v3 layout (Intel, ``sgx_quote_3.h``), signed by the platform's own chain.

The attestation key signs header and report body. A *QE report* binds that key and is signed by the
leaf of the chain, which travels in the quote. The vendor id is ours: no verifier takes such a
quote for one of Intel's hardware.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Final

from pyenclave._platform.keys import attributes, cpu_svn
from pyenclave._platform.root import PLATFORM_SVN, PlatformRoot, raw_public_key
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.dcap import CERTIFICATION_PCK_CHAIN, Quote
from pyenclave.formats.record import QE_MRENCLAVE, QE_MRSIGNER, QE_VENDOR_ID
from pyenclave.formats.sgx import ReportBody

__all__ = ["Quoter"]

_QE_PRODUCT: Final = 1


class Quoter:
    """
    Makes quotes. All but one signature is made once, at the platform's start.

    Args:
        root: The platform's keys.

    """

    def __init__(self, root: PlatformRoot) -> None:
        self._root = root
        self._public_key = raw_public_key(root.attestation_key.public_key())
        self._auth_data = root.derive("qe-auth-data", 32)
        binding = hashlib.sha256(self._public_key + self._auth_data).digest()
        self._qe_report = ReportBody(
            cpu_svn=cpu_svn(),
            attributes=attributes(debug=False),
            mrenclave=QE_MRENCLAVE,
            mrsigner=QE_MRSIGNER,
            isv_prod_id=_QE_PRODUCT,
            isv_svn=PLATFORM_SVN,
            report_data=binding + bytes(32),
        )
        self._qe_signature = root.sign_qe_report(self._qe_report.to_bytes())
        self._user_data = root.derive("qe-id", 16) + bytes(4)

    @functools.cached_property
    def _chain(self) -> bytes:
        return self._root.chain.to_pem()

    def quote(self, body: ReportBody, data: bytes) -> bytes:
        """
        Quote an enclave.

        Args:
            body: Its identity, from the platform's own books.
            data: 64 bytes of report data, from measured code.

        Raises:
            EvidenceFormatError: *data* has another length.

        """
        if len(data) != 64:
            raise EvidenceFormatError(
                "report data has another length", expected=64, found=len(data)
            )
        quote = Quote(
            qe_svn=PLATFORM_SVN,
            pce_svn=PLATFORM_SVN,
            qe_vendor_id=QE_VENDOR_ID,
            user_data=self._user_data,
            report_body=dataclasses.replace(body, report_data=data),
            signature=bytes(64),
            attestation_key=self._public_key,
            qe_report=self._qe_report,
            qe_report_signature=self._qe_signature,
            qe_auth_data=self._auth_data,
            certification_type=CERTIFICATION_PCK_CHAIN,
            certification_data=self._chain,
        )
        return dataclasses.replace(quote, signature=self._root.sign(quote.signed_bytes)).to_bytes()
