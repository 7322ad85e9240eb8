"""Synthetic Azure confidential VMs: HCL report, runtime claims and vTPM quote over any chip."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric import rsa

from pyenclave.formats.hcl import REPORT_TYPE_SNP, HclReport
from pyenclave.formats.tpm import PcrSelection, TpmQuote
from pyenclave.testing.certificates import Key

__all__ = ["AzureVm"]

_PCRS: Final = 24


def _b64(number: int) -> str:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(kw_only=True)
class AzureVm:
    """
    A confidential VM with a vTPM behind the paravisor.

    Attributes:
        hardware: Makes the hardware report over 64 bytes of report data: an SNP report, or a
            TDREPORT for TDX (whose quote then goes into the endorsements).
        report_type: Of the HCL report.
        ak: The vTPM's attestation key, RSA-2048.
        user_data: What the guest wrote, 64 bytes.
        pcrs: SHA-256 PCRs by index.
        configuration: ``vm-configuration`` of the runtime claims.
    """

    hardware: Callable[[bytes], bytes]
    report_type: int = REPORT_TYPE_SNP
    ak: Key = field(default_factory=lambda: Key.rsa(2048, index=7))
    user_data: bytes = bytes(64)
    pcrs: Mapping[int, bytes] = field(
        default_factory=lambda: {n: hashlib.sha256(b"pcr %d" % n).digest() for n in range(_PCRS)}
    )
    configuration: Mapping[str, Any] = field(
        default_factory=lambda: {
            "console-enabled": True,
            "root-cert-thumbprint": "",
            "secure-boot": True,
            "tpm-enabled": True,
            "tpm-persisted": True,
            "vmUniqueId": "00000000-0000-4000-8000-000000000000",
        }
    )

    def jwk(self, key: Key | None = None, kid: str = "HCLAkPub") -> dict[str, Any]:
        """Return the public AK (or another RSA key) as the runtime claims have it."""
        private = (key or self.ak).private
        if not isinstance(private, rsa.RSAPrivateKey):
            raise TypeError("the runtime claims hold RSA keys")
        numbers = private.public_key().public_numbers()
        return {
            "kid": kid,
            "key_ops": ["sign"],
            "kty": "RSA",
            "e": _b64(numbers.e),
            "n": _b64(numbers.n),
        }

    def runtime_data(self, **changes: Any) -> bytes:
        """Return the runtime claims; *changes* are members."""
        claims: dict[str, Any] = {
            "keys": [self.jwk()],
            "vm-configuration": dict(self.configuration),
            "user-data": self.user_data.hex().upper(),
        }
        return json.dumps(claims | changes, separators=(",", ":")).encode()

    def hcl_report(
        self, *, runtime_data: bytes | None = None, report_data: bytes | None = None, **changes: Any
    ) -> bytes:
        """
        Return the HCL report.

        Args:
            runtime_data: Other runtime claims.
            report_data: Other report data than the hash of the claims.
            changes: Fields of `HclReport`.
        """
        report = HclReport(
            hardware_report=b"",
            report_type=self.report_type,
            runtime_data=self.runtime_data() if runtime_data is None else runtime_data,
        )
        report = replace(report, **{k: v for k, v in changes.items() if k == "hash_type"})
        bound = report.expected_report_data if report_data is None else report_data
        return replace(report, hardware_report=self.hardware(bound), **changes).to_bytes()

    def tpm_quote(self, nonce: bytes = b"", **changes: Any) -> TpmQuote:
        """Return what the vTPM quotes; *changes* are fields of `TpmQuote`."""
        selection = PcrSelection("sha256", tuple(sorted(self.pcrs)))
        digest = hashlib.sha256(b"".join(self.pcrs[n] for n in sorted(self.pcrs))).digest()
        plain = TpmQuote(
            qualified_signer=b"\x00\x0b" + bytes(32),
            extra_data=nonce,
            clock=1,
            reset_count=1,
            restart_count=0,
            firmware=1,
            selections=(selection,),
            pcr_digest=digest,
        )
        return replace(plain, **changes)

    def endorsements(
        self,
        nonce: bytes = b"",
        *,
        key: Key | None = None,
        parts: Mapping[Literal["message", "signature", "pcrs"], bytes] | None = None,
        **changes: Any,
    ) -> dict[str, bytes]:
        """
        Return vTPM quote, signature and PCR values by file name.

        Args:
            nonce: The quote's extra data.
            key: Another key that signs.
            parts: Other bytes for a part.
            changes: Fields of `TpmQuote`.
        """
        given = parts or {}
        message = given.get("message", self.tpm_quote(nonce, **changes).to_bytes())
        values = {"sha256": {str(n): value.hex() for n, value in self.pcrs.items()}}
        signature = (key or self.ak).sign(message, "rsa-pkcs1-sha256")
        return {
            "tpm-quote.msg": message,
            "tpm-quote.sig": given.get("signature", signature),
            "tpm-pcrs.json": given.get("pcrs", json.dumps(values).encode()),
        }
