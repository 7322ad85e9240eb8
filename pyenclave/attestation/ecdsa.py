"""
ECDSA signatures on P-256, several at once, by the native core where it can.

The core's answer is taken only if it is yes. No, doubt, another CPU, a build without the core, and
``PYENCLAVE_ECDSA=library`` all leave the question to ``cryptography``; so whoever does not trust
this code loses nothing but time, and a signature that counts is never refused by it.

Only public data comes here: nothing in the core's code is protected against timing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pyenclave._locks import Lock

if TYPE_CHECKING:
    from pyenclave._core import P256Table, P256Verifier

__all__ = ["SWITCH", "Claim", "available", "forget", "raw_signature", "verified"]

SWITCH: Final = "PYENCLAVE_ECDSA"  # "library": never use the core's code

#: Key (X ‖ Y, 64 bytes), signature (R ‖ S, 64 bytes), and what is signed.
Claim = tuple[bytes, bytes, bytes]

_AT_ONCE: Final = 16
_TABLE_AFTER: Final = 6  # signatures of one key; a table costs as much as four verifications
_MAX_TABLES: Final = 16  # of 110 KiB each
_MAX_COUNTED: Final = 512

_LOCK: Final = Lock()
_VERIFIER: list[P256Verifier | None] = []
_TABLES: Final[dict[bytes, P256Table]] = {}
_COUNTS: Final[dict[bytes, int]] = {}


def _verifier() -> P256Verifier | None:
    """Return the core's verifier; it is made, and tests itself, at its first use."""
    if _VERIFIER:
        return _VERIFIER[0]
    from pyenclave.errors import EnclaveError

    made = None
    if os.environ.get(SWITCH, "") != "library":
        try:
            from pyenclave._core import P256Verifier

            made = P256Verifier()
        except (ImportError, EnclaveError, MemoryError):
            made = None
    with _LOCK:
        if not _VERIFIER:
            _VERIFIER.append(made)
    return _VERIFIER[0]


def available() -> bool:
    """Whether the core verifies on this machine."""
    return _verifier() is not None


def forget() -> None:
    """Forget tables and the choice that was made; for tests and measurements."""
    with _LOCK:
        _VERIFIER.clear()
        _TABLES.clear()
        _COUNTS.clear()


def _table(verifier: P256Verifier, key: bytes) -> P256Table | bytes:
    """Return the table of a key that is seen often, else the key."""
    found = _TABLES.get(key)
    if found is not None:
        return found
    count = _COUNTS.get(key, 0) + 1
    if count < _TABLE_AFTER:
        with _LOCK:
            if len(_COUNTS) >= _MAX_COUNTED:
                # The oldest leaves; a key in use comes back to its place.
                del _COUNTS[next(iter(_COUNTS))]
            _COUNTS.pop(key, None)
            _COUNTS[key] = count
        return key
    made = verifier.table(key)
    if made is None:
        return key
    with _LOCK:
        _COUNTS.pop(key, None)
        if len(_TABLES) >= _MAX_TABLES:
            del _TABLES[next(iter(_TABLES))]
        _TABLES[key] = made
    return made


def verified(claims: Sequence[Claim]) -> tuple[bool, ...]:
    """
    Return which of *claims* the core says to be signed; False says nothing.

    Args:
        claims: Up to 16; what has another size than it should is not judged.
    """
    verifier = _verifier()
    if verifier is None or len(claims) > _AT_ONCE:
        return (False,) * len(claims)
    asked: list[Any] = []
    for key, signature, data in claims:
        if len(key) != 64 or len(signature) != 64:
            return (False,) * len(claims)
        asked.append((_table(verifier, key), signature, data))
    return tuple([verdict == 1 for verdict in verifier.verify(asked)])


def raw_signature(der: bytes) -> bytes | None:
    """Return R ‖ S of an ECDSA-Sig-Value in DER on a curve of 256 bits; None for other forms."""
    # SEQUENCE, INTEGER r, INTEGER s: all lengths are short, integers positive and minimal.
    size = len(der)
    if not 8 <= size <= 72 or der[0] != 0x30 or der[1] != size - 2 or der[2] != 2:
        return None
    middle = 4 + der[3]
    if middle + 2 >= size or der[middle] != 2 or middle + 2 + der[middle + 1] != size:
        return None
    r, s = der[4:middle], der[middle + 2 :]
    for number in (r, s):
        if not number or number[0] & 0x80 or (len(number) > 1 and number[0] == 0 == number[1] >> 7):
            return None
    joined = r.lstrip(b"\0").rjust(32, b"\0") + s.lstrip(b"\0").rjust(32, b"\0")
    return joined if len(joined) == 64 else None
