"""What makes two Nitro image files differ: sections, the signer, the header."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pyenclave.measurement.difference import Difference, compare
from pyenclave.measurement.eif import CMDLINE, KERNEL, METADATA, RAMDISK, Eif

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["diff"]


def diff(a: Buffer, b: Buffer) -> list[Difference]:
    """
    Name what makes two images differ.

    Raises:
        MeasurementError: A file is malformed.
    """
    one, two = Eif(a), Eif(b)
    found = compare("section", _sections(one, measured=True), _sections(two, measured=True))
    # Which ramdisk is first decides on PCR1 and PCR2, the order of the rest on PCR0.
    orders = _order(one), _order(two)
    if orders[0] != orders[1]:
        found.append(Difference("section", "order", *orders))
    found += compare("signer", _signer(one), _signer(two))
    found += compare(
        "section", _sections(one, measured=False), _sections(two, measured=False), measured=False
    )
    return found + compare("field", _header(one), _header(two), measured=False)


def _order(image: Eif) -> list[int]:
    return [kind for kind in image.section_types if kind <= RAMDISK]


def _sections(image: Eif, *, measured: bool) -> dict[str, object]:
    found: dict[str, object] = {}
    ramdisks = 0
    for section in image.sections:
        if (section.type in (KERNEL, CMDLINE, RAMDISK)) != measured:
            continue
        name = section.name
        if section.type == RAMDISK:
            name = f"ramdisk {ramdisks}"
            ramdisks += 1
        shown = f"{section.data.nbytes} bytes, SHA-384 {hashlib.sha384(section.data).hexdigest()}"
        if section.type in (CMDLINE, METADATA) and section.data.nbytes <= 4096:
            shown = bytes(section.data).decode("utf-8", "backslashreplace")
        found[name] = shown
    return found


def _signer(image: Eif) -> dict[str, object]:
    signature = image.signature
    if signature is None:
        return {}
    return {"certificate": hashlib.sha256(signature.certificate).hexdigest()}


def _header(image: Eif) -> dict[str, object]:
    return {
        "version": image.version,
        "architecture": image.architecture,
        "memory": image.memory,
        "cpus": image.cpus,
    }
