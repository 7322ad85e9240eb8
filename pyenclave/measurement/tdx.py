"""
MRTD of an Intel TDX guest, from its firmware.

Source: Intel TDX module ABI (TDH.MEM.PAGE.ADD, TDH.MR.EXTEND) and the TDVF Design Guide, section
11. RTMRs come from the event log: ``pyenclave.measurement.replay``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyenclave.measurement import _launch
from pyenclave.measurement.ovmf import PAGE_SIZE, TDVF_AUGMENT, TDVF_EXTEND, Firmware, TdvfSection

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MrtdStep", "mrtd", "mrtd_steps"]


@dataclass(frozen=True, slots=True)
class MrtdStep:
    """
    One section's part in MRTD.

    Attributes:
        section: The section.
        added: Pages added at launch.
        measured: Pages whose content is measured.
        digest: MRTD up to and with this section.
    """

    section: TdvfSection
    added: int
    measured: int
    digest: bytes

    def to_json(self) -> dict[str, Any]:
        """Return the step as plain values."""
        section = self.section
        return {
            "name": section.name,
            "gpa": section.memory_address,
            "pages_added": self.added,
            "pages_measured": self.measured,
            "file_offset": section.data_offset,
            "digest": self.digest.hex(),
        }


def mrtd_steps(firmware: Firmware | Buffer, *, two_pass: bool = False) -> list[MrtdStep]:
    """
    Compute MRTD section by section.

    Args:
        firmware: The whole flash image, variables and code.
        two_pass: Add all pages of a section before measuring the first, as older QEMU does,
            instead of each page in turn. It gives another MRTD for the same firmware.

    Raises:
        MeasurementError: The firmware is not one for TDX, or malformed.
    """
    image = firmware if isinstance(firmware, Firmware) else Firmware(firmware)
    chain = _launch.tdx_chain()
    steps = []
    for section in image.tdvf:
        pages = section.memory_data_size // PAGE_SIZE
        added = 0 if section.attributes & TDVF_AUGMENT else pages
        measured = pages if section.attributes & TDVF_EXTEND else 0
        content = image.data[section.data_offset : section.data_offset + section.raw_data_size]
        if measured and not two_pass:
            chain.add_and_extend(content, section.memory_address)
        else:
            chain.add_pages(added, section.memory_address)
            if measured:
                chain.extend(content, section.memory_address)
        steps.append(MrtdStep(section, added, measured, chain.digest()))
    return steps


def mrtd(firmware: Firmware | Buffer, *, two_pass: bool = False) -> bytes:
    """
    Compute MRTD: 48 bytes, as in a TD report.

    Args:
        firmware: The whole flash image, variables and code.
        two_pass: As :func:`mrtd_steps`.

    Raises:
        MeasurementError: The firmware is not one for TDX, or malformed.
    """
    return mrtd_steps(firmware, two_pass=two_pass)[-1].digest
