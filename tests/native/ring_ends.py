"""Both ends of a ring's lanes in this process, for the tests of lanes."""

from __future__ import annotations

import ctypes
import mmap
import struct

from pyenclave._ffi import ffi, lib

SLOT = 128
HALF = SLOT // 2  # a fragment of a message that is longer than a slot
LIMIT = 2500
HEADER = struct.Struct("<IHHIIQQ")
STATE = 256
SHORT = 64  # a message of at most so many bytes lies behind the header,
BEGIN = 128  # others here or where the last one ended,
AREA = 16 * HALF  # within so many bytes
SIDE = BEGIN + AREA
STRIDE = 256 + 2 * SIDE
CALL, PING, ATTEST, NEXT, ABORT, BATCH = 1, 2, 3, 4, 5, 6
OCALL_RESULT, OCALL_ERROR, MORE, STOP = 7, 8, 9, 10
RESULT, ERROR, ACK, OCALL, ITEM = 129, 130, 131, 132, 133


class Ring:
    """A ring in the middle of a larger mapping, with both ends of each lane."""

    def __init__(self, lanes: int = 2, limit: int = LIMIT) -> None:
        self.size = lib.pye_ring_size(lanes, SLOT)
        assert self.size
        self.whole = mmap.mmap(-1, self.size + 2 * 4096)
        self.whole[:4096] = b"\xa5" * 4096
        self.whole[4096 + self.size :] = b"\xa5" * 4096
        self.pin = ctypes.c_char.from_buffer(self.whole)
        self.base = ctypes.addressof(self.pin) + 4096
        self.ops = ffi.new(
            "pye_wait_ops *",
            {
                "wait": ffi.addressof(lib, "pye_wait_futex"),
                "wake": ffi.addressof(lib, "pye_wake_futex"),
                "yield": ffi.addressof(lib, "pye_wait_yield"),
            },
        )
        self.hosts = [self.end(n, lanes, lib.PYE_SIDE_HOST, limit) for n in range(lanes)]
        self.workers = [self.end(n, lanes, lib.PYE_SIDE_WORKER, limit) for n in range(lanes)]

    def end(self, number, lanes, side, limit):
        out = ffi.new("pye_lane **")
        memory = ffi.cast("void *", self.base)
        rc = lib.pye_lane_new(out, memory, self.size, lanes, SLOT, number, side, limit, self.ops)
        assert rc == lib.PYE_OK
        return ffi.gc(out[0], lib.pye_lane_free)

    def offset(self, side: str, lane: int = 0) -> int:
        return 4096 + 4096 + lane * STRIDE + STATE + (SIDE if side == "reply" else 0)

    def put(self, side, on=0, payload=b"", place=None, **fields):
        """Write a frame as a hostile peer would: any header, any payload."""
        header = {
            "sequence": 1, "kind": CALL if side == "request" else RESULT, "index": 0,
            "length": len(payload), "lane": on, "total": len(payload), "offset": 0,
        }  # fmt: skip
        header.update(fields)
        at = self.offset(side, on)
        if place is None:
            place = 32 if header["total"] <= SHORT else BEGIN
        self.whole[at + place : at + place + len(payload)] = payload
        self.whole[at : at + 32] = HEADER.pack(*header.values())

    def get(self, side, lane=0):
        at = self.offset(side, lane)
        return HEADER.unpack(self.whole[at : at + 32]), self.whole[at + 32 : at + SIDE]

    def canaries(self) -> bool:
        end = 4096 + self.size
        return self.whole[:4096] == b"\xa5" * 4096 and self.whole[end:] == b"\xa5" * 4096


def write(lane, kind, data, index=0):
    buffer = ffi.from_buffer(data)
    segments = ffi.new(
        "pye_segment[1]", [{"data": ffi.cast("uint8_t *", buffer), "len": len(data)}]
    )
    return lib.pye_lane_write(lane, kind, index, segments, 1, 0)


def wait(lane):
    header = ffi.new("pye_lane_header *")
    return lib.pye_lane_wait(lane, header, 0), header


def read(lane, size):
    """Read into a buffer with canaries on both sides."""
    buffer = ffi.new("uint8_t[]", b"\xa5" * (size + 128))
    rc = lib.pye_lane_read(lane, buffer + 64, size, 0)
    data = bytes(ffi.buffer(buffer, size + 128))
    assert data[:64] == b"\xa5" * 64
    assert data[64 + size :] == b"\xa5" * 64
    return rc, data[64 : 64 + size]


def transfer(sender, kind, data, receiver, index=0):
    """Move a whole message, fragment by fragment."""
    rc = write(sender, kind, data, index)
    got, header = wait(receiver)
    assert got == lib.PYE_OK
    out = ffi.new("uint8_t[]", max(1, len(data)))
    for _ in range(2 + len(data) // HALF):
        taken = lib.pye_lane_read(receiver, out, header.total, 0)
        if rc == lib.PYE_E_TIMEOUT:
            rc = write(sender, kind, data, index)
        if taken == lib.PYE_OK:
            break
    assert (rc, taken) == (lib.PYE_OK, lib.PYE_OK)
    return header, bytes(ffi.buffer(out, len(data)))


def broken(lane) -> str:
    text = lib.pye_lane_broken(lane)
    return "" if text == ffi.NULL else ffi.string(text).decode()
