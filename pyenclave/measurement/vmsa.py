"""
The first state of a SEV-ES or SEV-SNP processor, as KVM and the hypervisors set it.

Sources: AMD64 APM vol. 2, table B-4 (the save area); QEMU's reset state; what EC2 and GCE differ
in, as their published measurements show. QEMU's is the one of host kernels from about 6.10 on.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

from pyenclave.errors import MeasurementError

__all__ = [
    "BOOT_EIP",
    "VCPU_SIGNATURES",
    "Vmm",
    "cpu_signature",
    "svsm_vmsa_page",
    "vcpu_signature",
    "vmsa_page",
]

Vmm = Literal["qemu", "ec2", "gce"]

BOOT_EIP: Final = 0xFFFFFFF0  # where x86 starts

_PAGE = 4096
_PAT = 0x0007040600070406
_GCE_PAT = 0x00070106


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """
    Return CPUID Fn0000_0001_EAX of a processor (AMD CPUID Specification, 25481).

    Args:
        family: 0 to 270, as AMD names it: 25 for Milan and Genoa.
        model: 0 to 255.
        stepping: 0 to 15.
    """
    if not (0 <= family <= 0xF + 0xFF and 0 <= model <= 0xFF and 0 <= stepping <= 0xF):
        raise ValueError(f"no processor has family {family}, model {model}, stepping {stepping}")
    low, extended = (0xF, family - 0xF) if family > 0xF else (family, 0)
    return extended << 20 | (model >> 4) << 16 | low << 8 | (model & 0xF) << 4 | stepping


def _signatures() -> dict[str, int]:
    """List QEMU's models of EPYC with their versions; versions do not change the signature."""
    models = {
        "EPYC": (cpu_signature(23, 1, 2), 5),
        "EPYC-Rome": (cpu_signature(23, 49, 0), 5),
        "EPYC-Milan": (cpu_signature(25, 1, 1), 3),
        "EPYC-Genoa": (cpu_signature(25, 17, 0), 2),
        "EPYC-Turin": (cpu_signature(26, 0, 0), 1),
    }
    found = {"EPYC-IBPB": models["EPYC"][0]}
    for name, (signature, versions) in models.items():
        found[name] = signature
        found |= {f"{name}-v{version}": signature for version in range(1, versions + 1)}
    return found


VCPU_SIGNATURES: Final = _signatures()


def vcpu_signature(vcpu_type: str) -> int:
    """
    Return the signature of one of QEMU's models.

    Raises:
        MeasurementError: The model is not known here.
    """
    try:
        return VCPU_SIGNATURES[vcpu_type]
    except KeyError:
        raise MeasurementError(
            "unknown vCPU type",
            expected=", ".join(sorted(VCPU_SIGNATURES)),
            found=vcpu_type,
            advice="Give the processor's CPUID signature instead.",
        ) from None


def _segment(selector: int, attributes: int, limit: int, base: int) -> bytes:
    return struct.pack("<HHIQ", selector, attributes, limit, base)


class _Page:
    """A save area to be filled in."""

    def __init__(self) -> None:
        self.data = bytearray(_PAGE)

    def segments(self, **named: bytes) -> None:
        order = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
        for name, segment in named.items():
            at = 16 * order.index(name)
            self.data[at : at + 16] = segment

    def u64(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self.data, offset, value)

    def common(self, *, cr0: int, rip: int, pat: int, rdx: int, features: int) -> None:
        """Set what every form has."""
        self.u64(0x0D0, 0x1000)  # EFER: SVME, which KVM sets
        self.u64(0x148, 0x40)  # CR4: MCE
        self.u64(0x158, cr0)
        self.u64(0x160, 0x400)  # DR7
        self.u64(0x168, 0xFFFF0FF0)  # DR6
        self.u64(0x170, 2)  # RFLAGS
        self.u64(0x178, rip)
        self.u64(0x268, pat)
        self.u64(0x310, rdx)
        self.u64(0x3B0, features)
        self.u64(0x3E8, 1)  # XCR0

    def floating_point(self, *, mxcsr: int, fcw: int) -> None:
        struct.pack_into("<I", self.data, 0x408, mxcsr)
        struct.pack_into("<H", self.data, 0x410, fcw)


def vmsa_page(eip: int, *, vmm: Vmm, signature: int, guest_features: int) -> bytes:
    """
    Return the save area that a processor is launched with.

    Args:
        eip: Where it starts: ``BOOT_EIP`` for the boot processor.
        vmm: The hypervisor.
        signature: CPUID signature, which QEMU alone shows in RDX.
        guest_features: SEV_FEATURES; 0 under SEV-ES.
    """
    data = _segment(0, 0x93, 0xFFFF, 0)
    ec2 = vmm == "ec2"
    code = 0x9A if ec2 and eip == BOOT_EIP else 0x9B
    table = _segment(0, 0, 0xFFFF, 0)
    page = _Page()
    page.segments(
        es=data,
        cs=_segment(0xF000, code, 0xFFFF, eip & 0xFFFF0000),
        ss=_segment(0, 0x92, 0xFFFF, 0) if ec2 else data,
        ds=data,
        fs=data,
        gs=data,
        gdtr=table,
        ldtr=_segment(0, 0x82, 0xFFFF, 0),
        idtr=table,
        tr=_segment(0, 0x83 if ec2 else 0x8B, 0xFFFF, 0),
    )
    page.common(
        cr0=0x10,
        rip=eip & 0xFFFF,
        pat=_GCE_PAT if vmm == "gce" else _PAT,
        rdx=signature if vmm == "qemu" else 0x600,
        features=guest_features,
    )
    if vmm == "qemu":
        page.floating_point(mxcsr=0x1F80, fcw=0x37F)
    return bytes(page.data)


def svsm_vmsa_page(entry: int, *, signature: int) -> bytes:
    """
    Return the save area that Coconut SVSM is launched with under QEMU, on every processor.

    Args:
        entry: Guest-physical address of the image's entry point.
        signature: CPUID signature.
    """
    flat = _segment(16, 0xC93, 0xFFFFFFFF, 0)
    table = _segment(0, 0, 0xFFFF, 0)
    page = _Page()
    page.segments(
        es=flat,
        cs=_segment(8, 0xC9B, 0xFFFFFFFF, 0),
        ss=flat,
        ds=flat,
        fs=flat,
        gs=_segment(0, 0x93, 0xFFFF, 0),
        gdtr=table,
        ldtr=_segment(0, 0x82, 0xFFFF, 0),
        idtr=table,
        tr=_segment(0, 0x8B, 0xFFFF, 0),
    )
    page.common(cr0=0x11, rip=entry, pat=_PAT, rdx=signature, features=1)
    page.floating_point(mxcsr=0x1F80, fcw=0)
    return bytes(page.data)
