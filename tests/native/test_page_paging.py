"""Page sealing: what the threat catalogue (PAG) demands of it."""

from __future__ import annotations

import os

import pytest

from pyenclave import _core
from pyenclave.errors import EnclaveStateError, SealLimitError, UnsealError

KEY = bytes(range(32))
PAGE = bytes(i * 7 % 251 for i in range(4096))


def sealed_page(key: _core.PageKey, page: bytes = PAGE, **info: int) -> tuple[bytearray, int]:
    out = bytearray(4112)
    return out, key.seal_page(page, out, **info)


def refused(key: _core.PageKey, sealed: bytes | bytearray, **info: int) -> None:
    out = bytearray(b"x" * 4096)
    with pytest.raises(UnsealError):
        key.open_page(sealed, out, **info)
    assert out == bytes(4096)


def test_PAG_01_an_older_version_of_a_page_is_refused() -> None:
    """Every evicted version is kept and offered again: only the newest opens."""
    key = _core.PageKey(KEY)
    kept = [sealed_page(key, bytes([i]) * 4096, address=4096) for i in range(8)]
    newest = kept[-1][1]
    for sealed, version in kept[:-1]:
        assert version < newest
        refused(key, sealed, version=newest, address=4096)
    out = bytearray(4096)
    key.open_page(kept[-1][0], out, version=newest, address=4096)
    assert out == bytes([7]) * 4096


def test_PAG_07_a_forked_child_cannot_seal_under_its_parents_key() -> None:
    """The child gets EnclaveStateError, and may make keys of its own."""
    key = _core.PageKey(KEY)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"sealed"
        try:
            key.seal_page(PAGE, bytearray(4112))
        except EnclaveStateError:
            own = _core.PageKey()
            own.seal_page(PAGE, bytearray(4112))
            answer = b"refused"
        finally:
            os.write(write, answer)
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"refused"
    os.close(read)
    os.close(write)
    assert key.seal_page(PAGE, bytearray(4112)) == 1


def test_PAG_06_the_limit_destroys_the_key() -> None:
    """The last version is usable; the next one is refused, and then everything is."""
    key = _core.PageKey(KEY)
    key._skip(2**36)
    sealed, version = sealed_page(key)
    assert version == 2**36
    key.open_page(sealed, bytearray(4096), version=version)
    with pytest.raises(SealLimitError):
        sealed_page(key)
    assert key.implementation == "none"
    with pytest.raises(EnclaveStateError):
        key.open_page(sealed, bytearray(4096), version=version)
