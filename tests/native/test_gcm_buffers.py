"""BND-22: objects that lend their memory, and lie about it, or take it away."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import threading
from array import array
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from pyenclave import _core
from pyenclave.errors import EnclaveClosedError, EnclaveStateError

IV = bytes(12)


@pytest.fixture
def gcm() -> _core.Gcm:
    return _core.Gcm(bytes(range(32)))


def test_BND_22_a_read_only_output_is_refused(gcm: _core.Gcm) -> None:
    for out in (bytes(20), memoryview(bytes(20))):
        with pytest.raises(BufferError):
            gcm.seal_into(IV, b"data", out)
        assert bytes(out) == bytes(20)


def test_BND_22_a_buffer_that_is_not_contiguous_is_refused(gcm: _core.Gcm) -> None:
    apart = memoryview(bytearray(64))[::2]
    for call in (
        lambda: gcm.seal(IV, apart),
        lambda: gcm.seal(IV, b"", apart),
        lambda: gcm.open(IV, apart),
        lambda: gcm.seal_into(IV, bytes(16), apart),
    ):
        with pytest.raises(BufferError):
            call()
    with pytest.raises((BufferError, ValueError)):
        gcm.seal(IV, np.zeros((8, 8), np.uint8)[:, ::2])


@pytest.mark.parametrize("size", [0, 3, 5, 19, 21, 40])
def test_BND_22_an_output_of_another_size_is_refused(gcm: _core.Gcm, size: int) -> None:
    out = bytearray(size)
    with pytest.raises(ValueError, match="out: expected 20 bytes"):
        gcm.seal_into(IV, b"data", out)
    if size:
        with pytest.raises(ValueError, match="out: expected 0 bytes"):
            gcm.open_into(IV, gcm.seal(IV, b""), out)
    assert out == bytes(size)


def test_BND_22_objects_without_a_buffer_are_refused(gcm: _core.Gcm) -> None:
    for wrong in (None, 3, "text", [1], object()):
        with pytest.raises(TypeError):
            gcm.seal(IV, wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            gcm.seal(wrong, b"")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            gcm.seal(IV, b"", wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            gcm.seal_into(IV, b"", wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            _core.Gcm(wrong)  # type: ignore[arg-type]


def test_wrong_calls_are_type_errors(gcm: _core.Gcm) -> None:
    wrong: Any = gcm
    for call in (
        wrong.seal,
        lambda: wrong.seal(IV),
        lambda: wrong.seal(IV, b"", b"", b""),
        lambda: wrong.seal(IV, b"", data=b""),
        lambda: wrong.seal(IV, b"", other=b""),
        lambda: wrong.seal_into(IV, b""),
        lambda: _core.Gcm.seal(3, IV, b""),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError):
            call()
    name = "".join(["da", "ta"])  # not interned
    assert wrong.seal(iv=IV, **{name: b"x"}, aad=b"a") == gcm.seal(IV, b"x", b"a")


def test_BND_22_a_released_view_is_refused(gcm: _core.Gcm) -> None:
    view = memoryview(bytearray(32))
    view.release()
    with pytest.raises(ValueError, match="released"):
        gcm.seal(IV, view)


def test_BND_22_buffers_are_held_only_during_the_call(gcm: _core.Gcm) -> None:
    """A bytearray that has an export cannot be resized: it can, after each way out of a call."""
    data, out, small = bytearray(40), bytearray(56), bytearray(3)
    gcm.seal_into(IV, data, out)
    gcm.open_into(IV, out, data)
    for call in (
        lambda: gcm.seal_into(IV, data, small),
        lambda: gcm.seal_into(small, data, out),
        lambda: gcm.seal_into(IV, data, out, 5),  # type: ignore[arg-type]
        lambda: gcm.seal_into(IV, data, 5),  # type: ignore[arg-type]
        lambda: gcm.seal_into(IV, 5, out),  # type: ignore[arg-type]
        lambda: gcm.open_into(IV, small, out),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    for area in (data, out, small):
        area.append(0)


def test_BND_22_a_bytearray_cannot_be_resized_during_a_call(gcm: _core.Gcm) -> None:
    """The call drops the GIL for a large message; another thread resizes as fast as it can."""
    size = 1 << 20
    data = bytearray(size)
    right = gcm.seal(IV, data), gcm.seal(IV, bytes(size + 1))
    stop = threading.Event()

    def resize() -> None:
        while not stop.is_set():
            with suppress(BufferError):  # a call holds the bytes
                if len(data) == size:
                    data.append(0)  # may move them elsewhere
            with suppress(BufferError):
                del data[size:]

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(200):
            assert gcm.seal(IV, data) in right
    finally:
        stop.set()
        thread.join()
    del data[size:]


def test_many_kinds_of_buffer_are_taken(gcm: _core.Gcm) -> None:
    plain = bytes(range(64))
    expected = gcm.seal(IV, plain, b"a")
    mapped = mmap.mmap(-1, 4096)
    mapped.write(plain)
    for data in (
        bytearray(plain),
        memoryview(plain),
        np.frombuffer(plain, np.uint8),
        np.frombuffer(plain, np.float64),
        array("I", plain),
        memoryview(mapped)[:64],
    ):
        assert gcm.seal(IV, data, b"a") == expected
        if isinstance(data, memoryview):
            data.release()
    mapped.close()


def test_a_key_shows_nothing_and_is_not_copied(gcm: _core.Gcm) -> None:
    assert repr(gcm) == f"<Gcm {gcm.implementation}>"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(gcm)
    with pytest.raises(TypeError):
        type("Sub", (_core.Gcm,), {})
    assert isinstance(gcm.locked, bool)


def test_a_forked_child_does_not_have_the_key(gcm: _core.Gcm, in_child: Any) -> None:
    def use() -> str:
        try:
            gcm.seal(IV, b"data")
        except EnclaveStateError:
            gcm.close()
            own = _core.Gcm(bytes(range(32)))
            return f"refused {gcm!r} {len(own.seal(IV, b'data'))}"
        return "sealed"

    assert in_child(use).result() == "refused <Gcm none> 20"
    assert len(gcm.seal(IV, b"data")) == 20


def test_closing_while_others_seal_gives_a_result_or_a_refusal() -> None:
    """Never a message under a key that is half wiped."""
    data = os.urandom(1 << 18)
    expected = _core.Gcm(bytes(32)).seal(IV, data)
    for _ in range(10):
        gcm = _core.Gcm(bytes(32))
        wrong: list[str] = []
        started = threading.Barrier(3)

        def work(gcm: _core.Gcm = gcm, started: Any = started, wrong: Any = wrong) -> None:
            started.wait()
            for _ in range(50):
                try:
                    if gcm.seal(IV, data) != expected:
                        wrong.append("another ciphertext")
                except EnclaveClosedError:
                    return

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        gcm.close()
        for thread in threads:
            thread.join()
        assert not wrong
