"""What tests at borders share: memory between forbidden pages, all implementations, lengths."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyenclave import _core
from pyenclave._ffi import ffi, lib

PAGE = 4096
ALL_FEATURES = 0xFFFFFFFF
_UNTOUCHED = 0x5A

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fenced:
    """
    Memory between two pages that nobody may read or write: what goes beyond dies of a signal.

    What lies inside is filled, so that a write beside a smaller range shows too.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, -(-size // PAGE)) * PAGE
        self._map = mmap.mmap(-1, self.size + 2 * PAGE)
        self._view: Any = ffi.from_buffer("uint8_t[]", self._map)
        first = int(ffi.cast("uintptr_t", self._view))
        for at in (first, first + PAGE + self.size):
            if _libc.mprotect(at, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.first = self._view + PAGE
        self._content = ffi.buffer(self.first, self.size)
        self.clear()

    def clear(self) -> None:
        self._content[:] = bytes([_UNTOUCHED]) * self.size

    def place(self, at: int, data: bytes) -> Any:
        """Fill, write *data* so that it begins at *at* (-1: ends at the end); return where."""
        start = self.size - len(data) if at < 0 else at
        self.clear()
        self._content[start : start + len(data)] = data
        return self.first + start

    def untouched_but(self, where: Any, size: int) -> bool:
        """Whether nothing was written but the *size* bytes from *where* on."""
        start = int(ffi.cast("uintptr_t", where)) - int(ffi.cast("uintptr_t", self.first))
        rest = self._content[:start] + self._content[start + size :]
        return rest == bytes([_UNTOUCHED]) * (self.size - size)


def taken(where: Any, size: int) -> bytes:
    return bytes(ffi.buffer(where, size))


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def lengths(*, block: int, batches: tuple[int, ...], tail: int = 17) -> list[int]:
    """Return every length up to four blocks and a tail, and those around each of *batches*."""
    chosen = set(range(4 * block + tail))
    for batch in batches:
        chosen.update(range(batch - tail, batch + tail + 1))
    return sorted(chosen)


def gcm_implementations() -> dict[str, int]:
    """Every AES-GCM implementation of this CPU, by name, as a bit of ``allowed``; new ones too."""
    offered, found = lib.pye_gcm_implementations(), {}
    for number in range(32):
        if offered >> number & 1:
            key = aligned(lib.pye_gcm_key_size(), "pye_gcm_key *")
            if lib.pye_gcm_init(key, bytes(32), 32, 1 << number) != lib.PYE_OK:
                raise AssertionError(f"implementation {1 << number} is offered and refused")
            found[ffi.string(lib.pye_gcm_implementation(key)).decode()] = 1 << number
    return found


def feature_masks() -> dict[str, int]:
    """
    Masks that lead to every implementation chosen by CPU features, new ones too.

    All features, none, and all but one of those that this CPU has: each fallback from a better
    implementation is the absence of some feature.
    """
    bits = [1 << i for i in range(32) if lib.pye_cpu_features() >> i & 1]
    masks = {"all": ALL_FEATURES, "none": 0}
    for bit in bits:
        masks[f"without-{ffi.string(lib.pye_cpu_feature_name(bit)).decode()}"] = ALL_FEATURES & ~bit
    return masks


def gcm_masks() -> dict[str, int]:
    """For each AES-GCM implementation of this CPU a mask under which it is the fastest."""
    names, masks = list(gcm_implementations()), {}
    for name in names:
        mask, better = ALL_FEATURES, True
        while better:  # take away what leaves `name` and is not the one that is chosen now
            better = False
            for i in range(32):
                if mask >> i & 1 and lib.pye_cpu_features() >> i & 1 and _chosen(mask) != name:
                    with features(mask & ~(1 << i)):
                        left = list(gcm_implementations())
                    if name in left and len(left) < len(_offered(mask)):
                        mask, better = mask & ~(1 << i), True
        if _chosen(mask) != name:
            raise AssertionError(f"no mask leads to {name}")
        masks[name] = mask
    return masks


def _offered(mask: int) -> list[str]:
    with features(mask):
        return list(gcm_implementations())


def _chosen(mask: int) -> str:
    with features(mask):
        key = aligned(lib.pye_gcm_key_size(), "pye_gcm_key *")
        if lib.pye_gcm_init(key, bytes(32), 32, ALL_FEATURES) != lib.PYE_OK:
            raise AssertionError("no implementation of AES-GCM")
        return str(ffi.string(lib.pye_gcm_implementation(key)).decode())


def variants(name: Callable[[], str]) -> dict[str, int]:
    """A mask for each different answer of *name*, which looks at the module it belongs to."""
    found: dict[str, int] = {}
    for mask in feature_masks().values():
        _core.cpu_set_mask(mask)
        try:
            found.setdefault(name(), mask)
        finally:
            _core.cpu_set_mask(ALL_FEATURES)
    return found


@contextmanager
def features(mask: int) -> Iterator[None]:
    """What is chosen inside by CPU features, in the cffi module, sees only those of *mask*."""
    lib.pye_cpu_set_mask(mask)
    try:
        yield
    finally:
        lib.pye_cpu_set_mask(ALL_FEATURES)


_kept: list[Any] = []


def aligned(size: int, kind: str) -> Any:
    """Memory of *size* bytes at a multiple of 64, kept for the process's life."""
    raw = ffi.new("uint8_t[]", size + 64)
    _kept.append(raw)
    return ffi.cast(kind, raw + (-int(ffi.cast("uintptr_t", raw)) % 64))
