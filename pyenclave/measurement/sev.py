"""
Launch digests of AMD SEV, SEV-ES and SEV-SNP guests.

Sources: AMD SEV-SNP firmware ABI 1.55, section 8.17 (SNP_LAUNCH_UPDATE); QEMU target/i386/sev.c
for the kernel hashes and the order; AMD SEV API 0.24, section 6.4 (the digest of SEV and SEV-ES,
which is a plain SHA-256 here: the HMAC that the processor reports is not computed).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyenclave.errors import MeasurementError
from pyenclave.measurement import _launch
from pyenclave.measurement.ovmf import PAGE_SIZE, Firmware, SevLayout, SevSection
from pyenclave.measurement.vmsa import (
    BOOT_EIP,
    Vmm,
    svsm_vmsa_page,
    vcpu_signature,
    vmsa_page,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = [
    "KernelHashes",
    "LaunchStep",
    "ovmf_hash",
    "sev_es_launch_digest",
    "sev_launch_digest",
    "snp_launch_digest",
    "snp_steps",
    "svsm_launch_digest",
    "svsm_steps",
]

MAX_VCPUS: Final = 4096
VMSA_GPA: Final = 0xFFFFFFFFF000

_KERNEL_HASHES = 0x10
_TABLE_GUID = "9438d606-4f22-4cc9-b479-a793d411fd21"
_TABLE_ENTRIES = (
    ("cmdline", "97d02dd8-bd20-4c94-aa78-e7714d36ab2a"),
    ("initrd", "44baf731-3a2f-4bd7-9af1-41e29169781d"),
    ("kernel", "4de79437-abd2-427f-b835-d5b172d2045b"),
)
_TABLE_SIZE = 168
_PADDED_SIZE = 176


@dataclass(frozen=True, slots=True)
class KernelHashes:
    """
    The SHA-256 digests by which a hypervisor binds a directly booted kernel to the launch.

    Attributes:
        kernel: Of the kernel file.
        initrd: Of the initial RAM disk; of nothing when there is none.
        cmdline: Of the command line as UTF-8 with one NUL at its end.
    """

    kernel: bytes
    initrd: bytes
    cmdline: bytes

    def __post_init__(self) -> None:
        for name in ("kernel", "initrd", "cmdline"):
            size = len(getattr(self, name))
            if size != 32:
                raise ValueError(f"{name}: a SHA-256 has 32 bytes, not {size}")

    @classmethod
    def of(
        cls, kernel: Buffer, initrd: Buffer | None = None, append: str | None = None
    ) -> KernelHashes:
        """
        Hash a kernel with what goes with it.

        Args:
            kernel: The file's bytes, which may be none at all.
            initrd: The file's bytes; None: not given.
            append: The command line; None is the same as "".
        """
        return cls(
            kernel=hashlib.sha256(kernel).digest(),
            initrd=hashlib.sha256(b"" if initrd is None else initrd).digest(),
            cmdline=cls.hash_cmdline(append),
        )

    @staticmethod
    def hash_cmdline(append: str | None) -> bytes:
        """Return the SHA-256 of a command line as the hypervisor hands it over."""
        text = append or ""
        if "\0" in text:
            raise ValueError("a command line has no NUL character")
        try:
            return hashlib.sha256(text.encode() + b"\0").digest()
        except UnicodeEncodeError:
            raise ValueError("the command line is not valid Unicode") from None

    def table(self) -> bytes:
        """Return the 176 bytes that firmware finds at the table's address."""
        import uuid

        parts = [uuid.UUID(_TABLE_GUID).bytes_le, _TABLE_SIZE.to_bytes(2, "little")]
        for name, guid in _TABLE_ENTRIES:
            parts += [uuid.UUID(guid).bytes_le, (50).to_bytes(2, "little"), getattr(self, name)]
        return b"".join(parts).ljust(_PADDED_SIZE, b"\0")

    def page(self, gpa: int) -> bytes:
        """Return the page that holds the table, for a table at address *gpa*."""
        at = gpa % PAGE_SIZE
        if at + _PADDED_SIZE > PAGE_SIZE:
            raise MeasurementError(
                "the kernel hashes table crosses a page",
                expected=f"an offset ≤ {PAGE_SIZE - _PADDED_SIZE}",
                found=at,
            )
        return (bytes(at) + self.table()).ljust(PAGE_SIZE, b"\0")


@dataclass(frozen=True, slots=True)
class LaunchStep:
    """
    One part of an SNP launch.

    Attributes:
        name: What is measured.
        page_type: Of PAGE_INFO: 1 normal, 2 VMSA, 3 zero, 4 unmeasured, 5 secrets, 6 CPUID.
        gpa: Guest-physical address of the first page.
        pages: How many.
        digest: The launch digest up to and with this part.
    """

    name: str
    page_type: int
    gpa: int
    pages: int
    digest: bytes

    def to_json(self) -> dict[str, Any]:
        """Return the step as plain values."""
        return {
            "name": self.name,
            "page_type": self.page_type,
            "gpa": self.gpa,
            "pages": self.pages,
            "digest": self.digest.hex(),
        }


class _Launch:
    """Collects the steps of a launch."""

    def __init__(self, start: bytes | None = None) -> None:
        self.chain = _launch.snp_chain(start)
        self.steps: list[LaunchStep] = []

    def note(self, name: str, page_type: int, gpa: int, pages: int) -> None:
        self.steps.append(LaunchStep(name, page_type, gpa, pages, self.chain.digest()))

    def content(self, name: str, data: Buffer, gpa: int) -> None:
        with memoryview(data) as view:
            if view.nbytes % PAGE_SIZE:
                raise MeasurementError(
                    f"{name}: not whole pages", expected="a multiple of 4096", found=view.nbytes
                )
            self.chain.add_pages(view, gpa)
            self.note(name, _launch.PAGE_NORMAL, gpa, view.nbytes // PAGE_SIZE)

    def empty(self, section: SevSection, page_type: int) -> None:
        pages = section.size // PAGE_SIZE
        self.chain.add_empty(pages, section.gpa, page_type)
        self.note(section.name, page_type, section.gpa, pages)

    def sections(self, layout: SevLayout, hashes: KernelHashes | None, vmm: Vmm) -> None:
        """Measure the sections of the metadata in their order."""
        memory = _launch.PAGE_UNMEASURED if vmm == "gce" else _launch.PAGE_ZERO
        types = {1: memory, 2: _launch.PAGE_SECRETS, 3: _launch.PAGE_CPUID, 4: _launch.PAGE_ZERO}
        cpuid_last = [s for s in layout.sections if s.type == 3 and vmm == "ec2"]
        for section in layout.sections:
            if section in cpuid_last:
                continue
            if section.type != _KERNEL_HASHES:
                self.empty(section, types[section.type])
            elif hashes is None:
                self.empty(section, _launch.PAGE_ZERO)
            else:
                self.kernel_hashes(section, layout, hashes)
        for section in cpuid_last:
            self.empty(section, _launch.PAGE_CPUID)

    def kernel_hashes(self, section: SevSection, layout: SevLayout, hashes: KernelHashes) -> None:
        if section.size != PAGE_SIZE:
            raise MeasurementError(
                "the kernel hashes section has a wrong size",
                expected="one page",
                found=section.size,
            )
        self.content(section.name, hashes.page(layout.hashes_table_gpa), section.gpa)

    def processors(self, name: str, page: bytes, count: int) -> None:
        if count:
            self.chain.add_same(page, count, VMSA_GPA, _launch.PAGE_VMSA)
            self.note(name, _launch.PAGE_VMSA, VMSA_GPA, count)


def _check_vcpus(vcpus: int) -> None:
    if not 1 <= vcpus <= MAX_VCPUS:
        raise ValueError(f"a guest has 1 to {MAX_VCPUS} vCPUs, not {vcpus}")


def _signature(vmm: Vmm, vcpu_type: str | None, vcpu_sig: int | None) -> int:
    """Return the CPUID signature; EC2 and GCE do not show it to the guest."""
    if vmm not in ("qemu", "ec2", "gce"):
        raise ValueError(f"vmm is qemu, ec2 or gce, not {vmm!r}")
    if vcpu_type is not None and vcpu_sig is not None:
        raise ValueError("give vcpu_type or vcpu_sig, not both")
    if vcpu_type is not None:
        return vcpu_signature(vcpu_type)
    if vcpu_sig is None:
        if vmm == "qemu":
            raise ValueError("under QEMU, vcpu_type (such as EPYC-Milan) or vcpu_sig is needed")
        return 0
    if not 0 <= vcpu_sig < 1 << 32:
        raise ValueError(f"a CPUID signature has 32 bits: {vcpu_sig:#x}")
    return vcpu_sig


def _hashes(
    kernel: Buffer | KernelHashes | None, initrd: Buffer | None, append: str | None
) -> KernelHashes | None:
    if kernel is None or isinstance(kernel, KernelHashes):
        if initrd is not None or append:
            raise ValueError("initrd and append belong to a kernel")
        return kernel
    return KernelHashes.of(kernel, initrd, append)


def _ap_eip(layout: SevLayout, vcpus: int) -> int:
    if layout.ap_reset_eip is None and vcpus > 1:
        raise MeasurementError(
            "firmware: it does not state where further processors start",
            expected="an SEV-ES reset block in the GUID table",
            found="none",
        )
    return layout.ap_reset_eip or 0


def _need_hashes_table(layout: SevLayout) -> None:
    if layout.hashes_table_gpa == 0:
        raise MeasurementError(
            "a kernel is given, but the firmware does not check one",
            expected="an address of the kernel hashes table",
            found="none",
            advice="Take a firmware built from OvmfPkg/AmdSev.",
        )


def snp_steps(
    firmware: Firmware | Buffer | None,
    *,
    vcpus: int,
    vcpu_type: str | None = None,
    vcpu_sig: int | None = None,
    vmm: Vmm = "qemu",
    guest_features: int = 1,
    kernel: Buffer | KernelHashes | None = None,
    initrd: Buffer | None = None,
    append: str | None = None,
    ovmf_hash: bytes | None = None,
    layout: SevLayout | None = None,
) -> list[LaunchStep]:
    """
    Compute an SNP launch digest part by part; the last step's digest is the result.

    Args:
        firmware: The firmware file. None where *layout* and *ovmf_hash* stand for it.
        vcpus: How many virtual processors are launched.
        vcpu_type: QEMU's name of the model ("EPYC-Milan"); or
        vcpu_sig: the CPUID signature. EC2 and GCE need neither.
        vmm: The hypervisor: qemu, ec2 or gce.
        guest_features: SEV_FEATURES. Hosts before Linux 6.6 and from 6.8 on set 1, some between
            them 0x21.
        kernel: Kernel for direct boot, or the digests of one; None: not given.
        initrd: Initial RAM disk, with a kernel.
        append: Command line, with a kernel.
        ovmf_hash: Digest after the firmware's pages, which are then not hashed.
        layout: What the firmware states, in place of reading it there.

    Raises:
        MeasurementError: The firmware is malformed, or not one for what is asked.
    """
    _check_vcpus(vcpus)
    signature = _signature(vmm, vcpu_type, vcpu_sig)
    if not 0 <= guest_features < 1 << 64:
        raise ValueError(f"SEV_FEATURES has 64 bits: {guest_features:#x}")
    if ovmf_hash is not None and len(ovmf_hash) != 48:
        raise ValueError(f"ovmf_hash has 48 bytes, not {len(ovmf_hash)}")
    hashes = _hashes(kernel, initrd, append)
    image = (
        Firmware(firmware)
        if firmware is not None and not isinstance(firmware, Firmware)
        else firmware
    )
    if layout is None:
        if image is None:
            raise ValueError("without a firmware, layout and ovmf_hash are needed")
        if not image.has_sev_metadata:
            raise MeasurementError(
                "firmware: not one for SEV-SNP",
                expected="SEV metadata in the GUID table",
                found="none",
            )
        layout = image.sev
    if hashes is not None:
        if all(section.type != _KERNEL_HASHES for section in layout.sections):
            raise MeasurementError(
                "a kernel is given, but the firmware's metadata has no kernel-hashes section",
                expected="a section of type 16",
                found="none",
                advice="Take a firmware built from OvmfPkg/AmdSev.",
            )
        _need_hashes_table(layout)
    launch = _Launch(ovmf_hash)
    if ovmf_hash is None:
        if image is None:
            raise ValueError("without a firmware, ovmf_hash is needed")
        launch.content("firmware", image.data, image.gpa)
    launch.sections(layout, hashes, vmm)

    def page(eip: int) -> bytes:
        return vmsa_page(eip, vmm=vmm, signature=signature, guest_features=guest_features)

    launch.processors("boot processor", page(BOOT_EIP), 1)
    launch.processors("other processors", page(_ap_eip(layout, vcpus)), vcpus - 1)
    return launch.steps


def snp_launch_digest(
    firmware: Firmware | Buffer | None,
    *,
    vcpus: int,
    vcpu_type: str | None = None,
    vcpu_sig: int | None = None,
    vmm: Vmm = "qemu",
    guest_features: int = 1,
    kernel: Buffer | KernelHashes | None = None,
    initrd: Buffer | None = None,
    append: str | None = None,
    ovmf_hash: bytes | None = None,
    layout: SevLayout | None = None,
) -> bytes:
    """
    Compute the launch digest that an SNP report gives as MEASUREMENT: 48 bytes.

    Arguments and errors are those of :func:`snp_steps`.
    """
    steps = snp_steps(
        firmware,
        vcpus=vcpus,
        vcpu_type=vcpu_type,
        vcpu_sig=vcpu_sig,
        vmm=vmm,
        guest_features=guest_features,
        kernel=kernel,
        initrd=initrd,
        append=append,
        ovmf_hash=ovmf_hash,
        layout=layout,
    )
    return steps[-1].digest


def ovmf_hash(firmware: Firmware | Buffer) -> bytes:
    """
    Return the digest after the firmware's pages, which may stand for the file.

    Raises:
        MeasurementError: The file is not whole pages.
    """
    image = firmware if isinstance(firmware, Firmware) else Firmware(firmware)
    launch = _Launch()
    launch.content("firmware", image.data, image.gpa)
    return launch.steps[-1].digest


def svsm_steps(
    firmware: Firmware | Buffer,
    svsm: Buffer,
    *,
    vcpus: int,
    vcpu_type: str | None = None,
    vcpu_sig: int | None = None,
    vars_size: int = 0,
) -> list[LaunchStep]:
    """
    Compute the launch digest of Coconut SVSM under QEMU, part by part.

    Args:
        firmware: The guest firmware, which SVSM starts later.
        svsm: The SVSM image; its metadata counts, not the firmware's.
        vcpus: How many virtual processors are launched.
        vcpu_type: QEMU's name of the model; or
        vcpu_sig: the CPUID signature.
        vars_size: Bytes of the variable store below the firmware.

    Raises:
        MeasurementError: A file is malformed, or there is no room for the image.
    """
    _check_vcpus(vcpus)
    signature = _signature("qemu", vcpu_type, vcpu_sig)
    image = firmware if isinstance(firmware, Firmware) else Firmware(firmware)
    if not 0 <= vars_size < image.gpa or vars_size % PAGE_SIZE:
        raise ValueError(f"vars_size is whole pages below the firmware, not {vars_size}")
    service = Firmware(svsm, end=image.gpa - vars_size)
    launch = _Launch()
    launch.content("firmware", image.data, image.gpa)
    launch.content("SVSM", service.data, service.gpa)
    launch.sections(service.sev, None, "qemu")
    entry = service.gpa + service.svsm_entry_offset
    launch.processors("processors", svsm_vmsa_page(entry, signature=signature), vcpus)
    return launch.steps


def svsm_launch_digest(
    firmware: Firmware | Buffer,
    svsm: Buffer,
    *,
    vcpus: int,
    vcpu_type: str | None = None,
    vcpu_sig: int | None = None,
    vars_size: int = 0,
) -> bytes:
    """
    Compute the launch digest of a guest under Coconut SVSM: 48 bytes.

    Arguments and errors are those of :func:`svsm_steps`.
    """
    return svsm_steps(
        firmware,
        svsm,
        vcpus=vcpus,
        vcpu_type=vcpu_type,
        vcpu_sig=vcpu_sig,
        vars_size=vars_size,
    )[-1].digest


def _plain(image: Firmware, hashes: KernelHashes | None) -> hashlib._Hash:
    value = hashlib.sha256(image.data)
    if hashes is not None:
        _need_hashes_table(image.sev)
        value.update(hashes.table())
    return value


def sev_launch_digest(
    firmware: Firmware | Buffer,
    *,
    kernel: Buffer | KernelHashes | None = None,
    initrd: Buffer | None = None,
    append: str | None = None,
) -> bytes:
    """
    Compute the launch digest of a guest under plain SEV: 32 bytes.

    Args:
        firmware: The firmware file.
        kernel: Kernel for direct boot, or the digests of one; None: not given.
        initrd: Initial RAM disk, with a kernel.
        append: Command line, with a kernel.

    Raises:
        MeasurementError: A kernel is given and the firmware has no place for its hashes.
    """
    image = firmware if isinstance(firmware, Firmware) else Firmware(firmware)
    return _plain(image, _hashes(kernel, initrd, append)).digest()


def sev_es_launch_digest(
    firmware: Firmware | Buffer,
    *,
    vcpus: int,
    vcpu_type: str | None = None,
    vcpu_sig: int | None = None,
    vmm: Vmm = "qemu",
    kernel: Buffer | KernelHashes | None = None,
    initrd: Buffer | None = None,
    append: str | None = None,
) -> bytes:
    """
    Compute the launch digest of a guest under SEV-ES: 32 bytes.

    Args:
        firmware: The firmware file.
        vcpus: How many virtual processors are launched.
        vcpu_type: QEMU's name of the model; or
        vcpu_sig: the CPUID signature. EC2 and GCE need neither.
        vmm: The hypervisor.
        kernel: Kernel for direct boot, or the digests of one; None: not given.
        initrd: Initial RAM disk, with a kernel.
        append: Command line, with a kernel.

    Raises:
        MeasurementError: The firmware does not fit what is asked.
    """
    _check_vcpus(vcpus)
    signature = _signature(vmm, vcpu_type, vcpu_sig)
    image = firmware if isinstance(firmware, Firmware) else Firmware(firmware)
    value = _plain(image, _hashes(kernel, initrd, append))
    page: Callable[[int], bytes] = lambda eip: vmsa_page(  # noqa: E731 - two calls alike
        eip, vmm=vmm, signature=signature, guest_features=0
    )
    value.update(page(BOOT_EIP))
    other = page(_ap_eip(image.sev, vcpus))
    for _ in range(vcpus - 1):
        value.update(other)
    return value.digest()
