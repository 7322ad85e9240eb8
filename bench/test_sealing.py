"""Sealing at four levels: pages under one key, and messages under a key each."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from levels import Loops, Operation, Run, aligned, cases, check, hold, measure

from pyenclave._core import Gcm, PageKey
from pyenclave._ffi import ffi, lib
from pyenclave.formats import sealed as sealed_format
from pyenclave.sealed import SealPolicy, blob

PAGE = 4096
SECRET = bytes(range(32))
CONTENT = random.Random(1).randbytes(64 * PAGE)
IDENTITY = blob.SealingIdentity(
    mrenclave=bytes(32),
    mrsigner=bytes(range(32)),
    product_id=1,
    security_version=1,
    cpu_svn=bytes(16),
    debug=False,
)


def header(version: int, address: int = 0) -> bytes:
    """The authenticated bytes of docs/formats/page.md for type 2, enclave 0."""
    place = address.to_bytes(8, "little") + version.to_bytes(8, "little")
    return b"PYEPAGE1" + bytes(16) + place + b"\0\0\0\0\2" + bytes(19)


def expected(version: int, page: bytes, address: int = 0) -> bytes:
    iv = version.to_bytes(8, "big") + bytes(4)
    return AESGCM(SECRET).encrypt(iv, page, header(version, address))


class PageMemory:
    """A page key and buffers as C has them."""

    def __init__(self, pages: int) -> None:
        self.keep: list[Any] = []
        self.key = ffi.cast("pye_page_key *", aligned(lib.pye_page_key_size(), self.keep))
        check(lib.pye_page_key_init(self.key, SECRET, 32, bytes(16), lib.PYE_GCM_ANY))
        self.page = aligned(pages * PAGE, self.keep)
        ffi.memmove(self.page, CONTENT, pages * PAGE)
        self.out = aligned(pages * PAGE, self.keep)
        self.tag = aligned(pages * 16, self.keep)
        self.version = ffi.new("uint64_t *")
        self.info = ffi.new("pye_page_info *", {"type": 2})

    def bytes_of(self, memory: Any, size: int) -> bytes:
        return bytes(ffi.buffer(memory, size))


def seal_page(loops: Loops) -> dict[str, Run]:
    """One page of 4 KiB, cache-hot, 64 bytes of additional data."""
    c = PageMemory(1)
    page, out = CONTENT[:PAGE], bytearray(PAGE + 16)
    key = PageKey(SECRET)

    def native(count: int) -> None:
        loops("page_seal", "pye_page_seal", c.key, c.out, c.tag, c.version, c.page, c.info, count)

    def by_cffi(count: int) -> None:
        seal = lib.pye_page_seal
        for _ in range(count):
            check(seal(c.key, c.out, c.tag, c.version, c.page, c.info))

    def cython(count: int) -> int:
        seal, version = key.seal_page, 0
        for _ in range(count):
            version = seal(page, out)
        return version

    for run in (native, by_cffi):
        run(2)
        found = c.bytes_of(c.out, PAGE) + c.bytes_of(c.tag, 16)
        assert found == expected(c.version[0], page)
    assert expected(cython(2), page) == bytes(out)
    return {"native": native, "cffi": by_cffi, "cython": cython}


def open_page(loops: Loops) -> dict[str, Run]:
    """The same back: authenticated, then opened."""
    c = PageMemory(1)
    page, out = CONTENT[:PAGE], bytearray(PAGE)
    closed = expected(7, page)
    ffi.memmove(c.page, closed, PAGE)
    ffi.memmove(c.tag, closed[PAGE:], 16)
    key = PageKey(SECRET)

    def native(count: int) -> None:
        loops("page_open", "pye_page_open", c.key, c.out, c.page, c.tag, 7, c.info, count)

    def by_cffi(count: int) -> None:
        open_ = lib.pye_page_open
        for _ in range(count):
            check(open_(c.key, c.out, c.page, c.tag, 7, c.info))

    def cython(count: int) -> None:
        open_ = key.open_page
        for _ in range(count):
            open_(closed, out, 7)

    for run in (native, by_cffi):
        ffi.memmove(c.out, bytes(PAGE), PAGE)
        run(1)
        assert c.bytes_of(c.out, PAGE) == page
    cython(1)
    assert bytes(out) == page
    return {"native": native, "cffi": by_cffi, "cython": cython}


def seal_pages_64(loops: Loops) -> dict[str, Run]:
    """64 pages in one call."""
    c = PageMemory(64)
    out, tags = bytearray(64 * PAGE), bytearray(64 * 16)
    key = PageKey(SECRET)

    def native(count: int) -> None:
        loops(
            "pages_seal",
            *("pye_pages_seal", c.key, c.out, c.tag, c.version, c.page, 64, c.info, count),
        )

    def by_cffi(count: int) -> None:
        seal = lib.pye_pages_seal
        for _ in range(count):
            check(seal(c.key, c.out, c.tag, c.version, c.page, 64, c.info))

    def cython(count: int) -> int:
        seal, first = key.seal_pages, 0
        for _ in range(count):
            first = seal(CONTENT, out, tags)
        return first

    last = slice(63 * PAGE, 64 * PAGE)
    for run in (native, by_cffi):
        run(1)
        found = c.bytes_of(c.out, 64 * PAGE)[last] + c.bytes_of(c.tag, 64 * 16)[-16:]
        assert found == expected(c.version[0] + 63, CONTENT[last], 63 * PAGE)
    assert expected(cython(1) + 63, CONTENT[last], 63 * PAGE) == bytes(out[last] + tags[-16:])
    return {"native": native, "cffi": by_cffi, "cython": cython}


def message(size: int) -> Any:
    """Make the operation of one message of *size* bytes under a fresh key."""

    def make(loops: Loops) -> dict[str, Run]:
        keep: list[Any] = []
        key = ffi.cast("pye_gcm_key *", aligned(lib.pye_gcm_key_size(), keep))
        data, out, tag = aligned(size, keep), aligned(size, keep), aligned(16, keep)
        plain, iv, none = CONTENT[:size], bytes(12), ffi.NULL
        ffi.memmove(data, plain, size)
        functions, any_ = ("pye_gcm_init", "pye_gcm_seal", "pye_gcm_wipe"), lib.PYE_GCM_ANY

        def native(count: int) -> None:
            loops("message", *functions, key, SECRET, any_, out, tag, iv, data, size, count)

        def by_cffi(count: int) -> None:
            for _ in range(count):
                check(lib.pye_gcm_init(key, SECRET, 32, any_))
                check(lib.pye_gcm_seal(key, out, tag, iv, data, size, none, 0))
                lib.pye_gcm_wipe(key)

        def cython(count: int) -> bytes:
            result = b""
            for _ in range(count):
                with Gcm(SECRET) as one:
                    result = one.seal(iv, plain)
            return result

        def public(count: int) -> bytes:
            result = b""
            for _ in range(count):
                result = blob.seal(
                    plain,
                    identity=IDENTITY,
                    policy=SealPolicy.signer,
                    key_provider=lambda request: SECRET,
                    secret=SECRET,
                )
            return result

        hold(keep, native, by_cffi)
        wanted = AESGCM(SECRET).encrypt(iv, plain, b"")
        for run in (native, by_cffi):
            run(1)
            assert bytes(ffi.buffer(out, size)) + bytes(ffi.buffer(tag, 16)) == wanted
        assert cython(1) == wanted
        opened = blob.open_blob(public(1), identity=IDENTITY, key_provider=lambda request: SECRET)
        assert bytes(opened.data) == plain
        assert len(public(1)) == sealed_format.HEADER_SIZE + size + 16
        return {"native": native, "cffi": by_cffi, "cython": cython, "public": public}

    return make


PAGES = ("native", "cffi", "cython")  # only the core's own users seal pages


@pytest.mark.parametrize(
    ("operation", "level"),
    cases(
        Operation("seal_page", 500, seal_page, PAGES),
        Operation("open_page", 500, open_page, PAGES),
        Operation("seal_pages_64", 10, seal_pages_64, PAGES),
        Operation("message_64", 100, message(64)),
        Operation("message_4k", 100, message(4096)),
        Operation("message_64k", 20, message(65536)),
    ),
)
def test_sealing(benchmark: Any, loops: Loops, operation: Operation, level: str) -> None:
    """Time sealing."""
    measure(benchmark, loops, operation, level)
