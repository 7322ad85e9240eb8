"""
How an enclave uses files that its host lends it: four host functions, declared like any other.

An image that names sealed files has them among its ocalls, so that they are measured and shown.
What crosses is ciphertext; what the host answers is its word, which the sealed file authenticates.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CLOSE", "LOCK_SHARED", "LOCK_WRITER", "NAMES", "SIZE", "SYNC", "TRUNCATE", "declared"]

# What ``pyenclave_file_control`` is asked for.
SIZE: Final = 0
TRUNCATE: Final = 1
SYNC: Final = 2
LOCK_SHARED: Final = 3
LOCK_WRITER: Final = 4
CLOSE: Final = 5


def pyenclave_file_open(name: str, write: bool, create: bool, exclusive: bool) -> int:
    """Open a lent file and return its handle."""
    raise NotImplementedError


def pyenclave_file_read(handle: int, offset: int, size: int) -> bytes:
    """Return up to *size* bytes from *offset*; none at the end."""
    raise NotImplementedError


def pyenclave_file_write(handle: int, offset: int, data: bytes) -> int:
    """Write at *offset* and return how many bytes were."""
    raise NotImplementedError


def pyenclave_file_control(handle: int, what: int, value: int) -> int:
    """Do one of the constants above; the answer means something for SIZE only."""
    raise NotImplementedError


_FUNCTIONS: Final = (
    pyenclave_file_control,
    pyenclave_file_open,
    pyenclave_file_read,
    pyenclave_file_write,
)
NAMES: Final = tuple(function.__name__ for function in _FUNCTIONS)


def declared() -> tuple[dict[str, Any], ...]:
    """Return the functions in the form that goes into an image, sorted by name."""
    from pyenclave.calls.ocalls import MARK, Ocall  # with it comes all that may cross

    for function in _FUNCTIONS:
        function.__dict__[MARK] = ()
    return tuple(Ocall.of(function).to_wire() for function in _FUNCTIONS)
