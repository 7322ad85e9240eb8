"""Synthetic AMD processors: ARK, ASK, VCEK or VLEK, and SEV-SNP reports that they sign."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal

from pyenclave.formats import der
from pyenclave.formats.snp import KEY_VCEK, KEY_VLEK, SnpReport, encode_tcb
from pyenclave.testing.certificates import (
    DISTANT,
    LONG_AGO,
    Authority,
    Extension,
    Key,
    certificate,
    crl,
    name,
    pem,
)

__all__ = ["AmdChip"]

Product = Literal["milan", "genoa", "turin"]
_ARC: Final = "1.3.6.1.4.1.3704.1"
_SPL: Final = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 8, "fmc": 9}
_CPUID: Final = {
    "milan": (0x19, 0x01, 0x01),
    "genoa": (0x19, 0x11, 0x01),
    "turin": (0x1A, 0x02, 0x01),
}
_TCB: Final[dict[str, dict[str, int]]] = {
    "milan": {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219},
    "genoa": {"bootloader": 9, "tee": 0, "snp": 23, "microcode": 72},
    "turin": {"fmc": 1, "bootloader": 1, "tee": 1, "snp": 2, "microcode": 81},
}


def _name(common: str) -> bytes:
    return name(
        OU="Engineering",
        C="US",
        L="Santa Clara",
        ST="CA",
        O="Advanced Micro Devices",
        CN=common,
    )


@lru_cache
def _authorities(product: str, signer: str) -> tuple[Authority, Authority]:
    """Return ARK and ASK (or ASVK); their keys are shared, for RSA keys take seconds."""
    line = product.capitalize()
    ark = Authority.root(_name(f"ARK-{line}"), Key.rsa(index=0), algorithm="rsa-pss-sha384")
    below = f"SEV-{line}" if signer == "vcek" else f"SEV-VLEK-{line}"
    ask = ark.issue(_name(below), Key.rsa(index=1), algorithm="rsa-pss-sha384")
    return ark, ask


class AmdChip:
    """
    A processor with its keys and certificates.

    Args:
        product: Line of processors.
        signer: Which key signs reports.
        chip_id: 64 bytes; default one that fits the product.
        tcb: Components of the TCB; default those of a current machine.
        not_before: Begin of the VEK certificate's validity.
        not_after: Its end.
        changes: Extensions of the VEK certificate by the last arcs of their identifier (``"3.1"``):
            another DER value, or None to leave it out.
        more: Further extensions.
    """

    def __init__(
        self,
        product: Product = "milan",
        *,
        signer: Literal["vcek", "vlek"] = "vcek",
        chip_id: bytes | None = None,
        tcb: Mapping[str, int] | None = None,
        not_before: datetime = LONG_AGO,
        not_after: datetime = DISTANT,
        changes: Mapping[str, bytes | None] | None = None,
        more: Iterable[Extension] = (),
    ) -> None:
        self.product = product
        self.signer = signer
        default = bytes(range(1, 9)) + (bytes(56) if product == "turin" else bytes(range(9, 65)))
        self.chip_id = default if chip_id is None else chip_id
        self.tcb = dict(_TCB[product] if tcb is None else tcb)
        self.ark, self.ask = _authorities(product, signer)
        self.key = Key.ec("P-384")
        self.vek = certificate(
            subject=_name("SEV-VCEK" if signer == "vcek" else "SEV-VLEK"),
            issuer=self.ask.subject,
            key=self.key,
            signer=self.ask.key,
            algorithm="rsa-pss-sha384",
            serial=0,
            not_before=not_before,
            not_after=not_after,
            key_ids=False,
            extensions=[*self._extensions(changes or {}), *more],
        )

    def _extensions(self, changes: Mapping[str, bytes | None]) -> list[Extension]:
        line = self.product.capitalize()
        values: dict[str, bytes | None] = {
            "1": der.encode_integer(0 if self.product != "turin" else 1),
            "2": der.encode_text(line + ("-B0" if self.signer == "vcek" else ""), tag=0x16),
        }
        for component, arc in _SPL.items():
            if component in self.tcb:
                values[f"3.{arc}"] = der.encode_integer(self.tcb[component])
        for arc in (4, 5, 6, 7):
            values[f"3.{arc}"] = der.encode_integer(0)
        if self.signer == "vcek":
            # The bytes themselves, without a tag, as AMD writes them.
            values["4"] = self.chip_id[:8] if self.product == "turin" else self.chip_id
        else:
            values["5"] = der.encode_text("CN=provider.example", tag=0x16)
        values |= changes
        return [(f"{_ARC}.{arc}", False, v) for arc, v in values.items() if v is not None]

    @property
    def root(self) -> bytes:
        """The ARK, PEM: what a test pins."""
        return pem(self.ark.der)

    def endorsements(
        self, *, revoked: Iterable[int] = (), with_crl: bool = True, **crl_fields: Any
    ) -> dict[str, bytes]:
        """
        Return the endorsements by file name.

        Args:
            revoked: Serial numbers in the CRL.
            with_crl: Whether there is one.
            crl_fields: Further arguments of `certificates.crl`.
        """
        files = {"vek.der": self.vek, "ask.pem": pem(self.ask.der), "ark.pem": pem(self.ark.der)}
        if with_crl:
            fields = {
                "issuer": self.ark.subject,
                "signer": self.ark.key,
                "algorithm": "rsa-pss-sha384",
                "revoked": revoked,
            }
            files["crl.der"] = crl(**(fields | crl_fields))  # type: ignore[arg-type]
        return files

    def fields(self, **changes: Any) -> SnpReport:
        """Return an unsigned report of this chip; *changes* are fields of `SnpReport`."""
        tcb = encode_tcb(self.tcb, self.product)
        family, model, step = _CPUID[self.product]
        version = changes.get("version", 5 if self.product == "turin" else 3)
        values: dict[str, Any] = {
            "version": version,
            "measurement": bytes(range(48)),
            "current_tcb": tcb,
            "reported_tcb": tcb,
            "committed_tcb": tcb,
            "launch_tcb": tcb,
            "chip_id": self.chip_id if self.signer == "vcek" else bytes(64),
            "key_info": (KEY_VCEK if self.signer == "vcek" else KEY_VLEK) << 2,
            "report_id": bytes(range(32)),
            "current_firmware": (31, 55, 1),
            "committed_firmware": (31, 55, 1),
        }
        if version >= 3:
            values |= {"cpuid_fam": family, "cpuid_mod": model, "cpuid_step": step}
        return SnpReport(**(values | changes))

    def report(self, *, key: Key | None = None, **changes: Any) -> bytes:
        """
        Return a signed report.

        Args:
            key: Another key that signs it.
            changes: Fields of `SnpReport`.
        """
        unsigned = self.fields(**changes)
        signature = (key or self.key).sign_raw(unsigned.to_bytes()[:0x2A0], order="little")
        return replace(unsigned, signature_r=signature[:48], signature_s=signature[48:]).to_bytes()

    def sign(self, report: bytes) -> bytes:
        """Sign 1,184 bytes of any content: only the signature in them is replaced."""
        signature = self.key.sign_raw(report[:0x2A0], order="little")
        r, s = signature[:48].ljust(72, b"\0"), signature[48:].ljust(72, b"\0")
        return report[:0x2A0] + r + s + report[0x2A0 + 144 :]
