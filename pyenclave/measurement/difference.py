"""
What makes two measured files differ, for every kind that can be measured.

A kind is one row of ``KINDS``: how its files begin, and the module whose ``diff(a, b)`` compares
two of them. Only the module of the kind in question is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyenclave.errors import MeasurementError
from pyenclave.measurement.vm_kinds import is_eif, is_event_log, is_firmware

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["KINDS", "Difference", "FileKind", "compare", "diff", "kind_of"]


@dataclass(frozen=True, slots=True)
class Difference:
    """
    One thing in which two files differ.

    Attributes:
        what: ``field``, ``section``, ``segment``, ``page``, ``file``, ``option``, ``event`` …
        name: Which one.
        a: Its value in the first file; None if it is absent there.
        b: Its value in the second file; None if it is absent there.
        measured: Whether it changes the measurement.

    """

    what: str
    name: str
    a: object
    b: object
    measured: bool = True

    def row(self) -> dict[str, Any]:
        """Return the members, for JSON."""
        return {
            "what": self.what,
            "name": self.name,
            "a": self.a,
            "b": self.b,
            "measured": self.measured,
        }


@dataclass(frozen=True, slots=True)
class FileKind:
    """
    A kind of file that ``diff`` knows.

    Attributes:
        name: What to call it in messages.
        module: The module with ``diff(a: Buffer, b: Buffer) -> list[Difference]``.
        recognise: Tells from the bytes, cheaply and without fail, whether a file is of this kind.

    """

    name: str
    module: str
    recognise: Callable[[memoryview], bool]


def _is_sgx(data: memoryview) -> bool:
    from pyenclave.measurement.enclave import kind_of

    return kind_of(data) is not None


# The first row that recognises a file has it.
KINDS: list[FileKind] = [
    FileKind("SGX enclave", "pyenclave.measurement.enclave_diff", _is_sgx),
    FileKind("Nitro image", "pyenclave.measurement.eif_diff", is_eif),
    FileKind("firmware", "pyenclave.measurement.firmware_diff", is_firmware),
    FileKind("event log", "pyenclave.measurement.eventlog_diff", is_event_log),
]


def kind_of(data: Buffer) -> FileKind:
    """
    Tell of which kind a file is.

    Raises:
        MeasurementError: Of none that is known.

    """
    with memoryview(data) as view, view.cast("B") as octets:
        for kind in KINDS:
            if kind.recognise(octets):
                return kind
    raise MeasurementError(
        "the file is of no kind that can be compared",
        expected=", ".join(kind.name for kind in KINDS),
        advice="Give two files of one kind.",
    )


def diff(a: Buffer, b: Buffer) -> list[Difference]:
    """
    Name what makes two files of one kind differ.

    Args:
        a: One file; untrusted input.
        b: The other; untrusted input.

    Returns:
        The differences in the order of the file; empty if nothing that is known differs.

    Raises:
        MeasurementError: A file cannot be read, or they are of different kinds.

    """
    kinds = kind_of(a), kind_of(b)
    if kinds[0] is not kinds[1]:
        raise MeasurementError(
            "the files are of different kinds", expected=kinds[0].name, found=kinds[1].name
        )
    found: list[Difference] = import_module(kinds[0].module).diff(a, b)
    return found


def compare(
    what: str, a: dict[str, Any], b: dict[str, Any], *, measured: bool = True
) -> list[Difference]:
    """Compare two mappings and return a difference for each name whose value differs."""
    return [
        Difference(what, name, a.get(name), b.get(name), measured)
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]
