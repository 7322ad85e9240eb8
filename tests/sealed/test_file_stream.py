"""Sealed streams: SEA-08, what is released before the end is authentic and in its place."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
import time
from typing import Any

import pytest

from pyenclave.errors import SealingError, UnsealError
from pyenclave.formats.sealed_stream import HEADER_SIZE
from pyenclave.sealed import file_portable, stream
from pyenclave.sealed.stream import StreamReader, StreamWriter, open_stream

KEY = bytes(range(32))
CHUNK = 100
FRAME = 4 + CHUNK + 16


def sealed(data: bytes, *, chunk_size: int = CHUNK, name: bytes = b"", key: bytes = KEY) -> bytes:
    out = io.BytesIO()
    with open_stream(out, "wb", key=key, name=name, chunk_size=chunk_size) as stream:
        stream.write(data)
    return out.getvalue()


def opened(data: bytes, *, name: bytes = b"", key: bytes = KEY) -> bytes:
    with open_stream(io.BytesIO(data), key=key, name=name) as stream:
        return stream.read()


def released(data: bytes) -> bytes:
    """What comes out before the error."""
    reader = StreamReader(io.BytesIO(data), key=KEY)
    found = b""
    try:
        while part := reader.read(37):
            found += part
    except UnsealError:
        pass
    else:
        pytest.fail("nothing was refused")
    with pytest.raises(UnsealError):
        reader.read(1)
    return found


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 7])
def test_every_size_comes_back(size: int) -> None:
    data = os.urandom(size)
    assert opened(sealed(data)) == data
    pieces = io.BytesIO()
    with open_stream(pieces, "wb", key=KEY, chunk_size=CHUNK) as stream:
        for i in range(0, size, 33):
            stream.write(data[i : i + 33])
    assert opened(pieces.getvalue()) == data


def test_every_bit_counts() -> None:
    data = os.urandom(CHUNK + 10)
    whole = sealed(data)
    for at in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            with pytest.raises(UnsealError):
                opened(bytes(changed))


def test_every_truncation_is_refused() -> None:
    whole = sealed(os.urandom(3 * CHUNK + 10))
    for size in range(len(whole)):
        with pytest.raises(UnsealError):
            opened(whole[:size])


def test_reordered_repeated_left_out_and_added_chunks_are_refused() -> None:
    data = os.urandom(4 * CHUNK)
    whole = sealed(data)
    head, *chunks = (
        whole[:HEADER_SIZE],
        *(whole[HEADER_SIZE + i * FRAME : HEADER_SIZE + (i + 1) * FRAME] for i in range(4)),
    )
    assert b"".join([head, *chunks]) == whole
    a, b, c, d = chunks
    for some, good in (
        ([b, a, c, d], 0),
        ([a, c, b, d], 1),
        ([a, a, b, c, d], 1),
        ([a, b, d], 2),
        ([a, b, c], 3),
        ([a, b, c, d, d], 3),
        ([a, b, c, d, b"x"], 3),
        ([d], 0),
        ([], 0),
    ):
        assert released(b"".join([head, *some])) == data[: good * CHUNK]


def test_chunks_of_another_stream_are_refused() -> None:
    first, second = sealed(bytes(3 * CHUNK)), sealed(bytes(3 * CHUNK))
    assert first[HEADER_SIZE:] != second[HEADER_SIZE:]
    with pytest.raises(UnsealError):
        opened(first[: HEADER_SIZE + FRAME] + second[HEADER_SIZE + FRAME :])


def test_another_key_or_name_is_named() -> None:
    whole = sealed(b"data", name=b"one")
    assert opened(whole, name=b"one") == b"data"
    with pytest.raises(UnsealError, match="name"):
        opened(whole, name=b"two")
    with pytest.raises(UnsealError, match="key"):
        opened(whole, name=b"one", key=bytes(32))


def test_an_exception_leaves_no_end() -> None:
    out = io.BytesIO()

    def fail() -> None:
        with open_stream(out, "wb", key=KEY) as stream:
            stream.write(b"half")
            stream.flush()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert released(out.getvalue()) == b"half"


def test_a_pipe_gets_what_was_flushed_at_once() -> None:
    read, write = os.pipe()
    said: list[bytes] = []
    with os.fdopen(read, "rb", buffering=0) as source, os.fdopen(write, "wb") as target:
        writer = StreamWriter(target, key=KEY)
        writer.write(b"first")
        writer.flush()

        def listen() -> None:
            reader = StreamReader(source, key=KEY)
            said.extend([reader.read(100) or b"", reader.read(100) or b"", reader.read(1) or b""])

        thread = threading.Thread(target=listen)
        thread.start()
        writer.write(b"second")
        writer.close()
        target.close()
        thread.join(10)
    assert said == [b"first", b"second", b""]


def test_a_stream_that_failed_has_no_end() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            if self.tell() > 200:
                raise OSError("full")
            return super().write(data)  # type: ignore[arg-type]

    out = Full()
    writer = StreamWriter(out, key=KEY, chunk_size=CHUNK)
    with pytest.raises(OSError, match="full"):
        writer.write(bytes(1000))
    with pytest.raises(SealingError, match="earlier write"):
        writer.write(bytes(1000))
    writer.close()
    released(out.getvalue())


def test_a_repeating_generator_gives_other_keys() -> None:
    out = [io.BytesIO() for _ in range(2)]
    for file in out:
        StreamWriter(file, key=KEY, random=bytes).close()
    assert out[0].getvalue()[16:48] != out[1].getvalue()[16:48]


def test_no_pickle() -> None:
    writer = StreamWriter(io.BytesIO(), key=KEY)
    with pytest.raises(TypeError):
        pickle.dumps(writer)
    writer.close()


class _Slow:
    """A cipher that notes its nonces, and takes its time."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.nonces = inner, []

    def seal_into(self, nonce: bytes, *rest: Any) -> None:
        self.nonces.append(nonce)
        time.sleep(0.05)
        self.inner.seal_into(nonce, *rest)

    def close(self) -> None:
        self.inner.close()


def test_no_nonce_twice_when_two_threads_write_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are held where a chunk was found to be next, if both get there at all."""
    out = io.BytesIO()
    writer = StreamWriter(out, key=KEY, chunk_size=CHUNK)
    cipher = _Slow(writer._gcm)
    writer._gcm = cipher  # type: ignore[assignment]
    real, both = stream.write_frame, threading.Barrier(2)

    def write_frame(*arguments: Any, **options: Any) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return real(*arguments, **options)

    def write(data: bytes) -> None:
        with contextlib.suppress(SealingError):
            writer.write(data)

    monkeypatch.setattr(stream, "write_frame", write_frame)
    threads = [threading.Thread(target=write, args=(data * (CHUNK + 1),)) for data in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert len(cipher.nonces) == len(set(cipher.nonces)) == 3
    assert sorted(opened(out.getvalue())) == sorted(b"ab" * (CHUNK + 1))


def test_threads_may_write_to_one_stream() -> None:
    out = io.BytesIO()
    writer = StreamWriter(out, key=KEY, chunk_size=CHUNK)
    threads = [
        threading.Thread(target=lambda: [writer.write(bytes(CHUNK + 1)) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert opened(out.getvalue()) == bytes(800 * (CHUNK + 1))


@pytest.mark.parametrize("native", [True, False])
def test_a_forked_child_writes_nothing_under_its_parents_key(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would seal their next chunk under the same nonce."""
    if not native:
        monkeypatch.setattr(stream, "Gcm", file_portable.Gcm)
    out = io.BytesIO()
    writer = StreamWriter(out, key=KEY, chunk_size=CHUNK)
    before = len(out.getvalue())
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            writer.write(bytes(CHUNK + 1))
        os._exit(len(out.getvalue()) != before)
    assert os.waitpid(child, 0)[1] == 0
    writer.write(b"parent")
    writer.close()
    assert opened(out.getvalue()) == b"parent"
