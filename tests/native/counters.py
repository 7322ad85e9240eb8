"""Coverage builds: let what forked children run count, however they end."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

SECTION = b".pye_counters"


def share(path: str) -> int:
    """Make the coverage counters of the loaded module at *path* shared memory; return the bytes.

    Children that are forked later add to the same counters. A process that was started anew (the
    platform, a zygote and its workers) has its own, and does not count.
    """
    section = _section(path)
    if section is None:
        return 0
    address, size = section
    with open("/proc/self/maps") as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(path))
    at, libc = base + address, ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    content = ctypes.string_at(at, size)
    fixed = 0x10
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | fixed
    if libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != at:
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.memmove(at, content, size)
    return size


def _section(path: str) -> tuple[int, int] | None:
    """Return address and size of the counters in the ELF file at *path*."""
    with open(path, "rb") as file:
        data = file.read()
    table, entry, count, names = struct.unpack_from("<Q10xHHH", data, 0x28)
    rows = [struct.unpack_from("<IIQQQQ", data, table + i * entry) for i in range(count)]
    strings = rows[names][4]
    for name, _, _, address, _, size in rows:
        start = strings + name
        if data[start : start + len(SECTION) + 1] == SECTION + b"\0":
            return address, size
    return None


def share_all() -> int:
    """Share the counters of both native modules."""
    from pyenclave import _core, _ffi

    return sum(share(os.path.realpath(str(module.__file__))) for module in (_core, _ffi))
