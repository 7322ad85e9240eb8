"""Sealed files as file objects: whatever is done to a plain one, done to both."""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyenclave
from pyenclave.errors import EnclaveStateError, FileBusyError, NotInEnclaveError, UnsealError
from pyenclave.sealed.file import FileStore, SealedRawFile, open_sealed

KEY = bytes(range(32))


def put(path: Path, data: bytes, **options: Any) -> None:
    with open_sealed(path, "wb", key=KEY, **options) as file:
        file.write(data)


def get(path: Path, **options: Any) -> bytes:
    with open_sealed(path, key=KEY, **options) as file:
        return bytes(file.read())


@pytest.mark.parametrize(("page_size", "steps"), [(4096, 300), (8192, 100), (65536, 60)])
def test_random_operations_give_what_a_plain_file_gives(
    tmp_path: Path, page_size: int, steps: int
) -> None:
    """Writes, reads, truncations, holes, commits, reopenings and discards against a bytearray."""
    path = tmp_path / "file"
    choose = random.Random(page_size)
    model, saved = bytearray(), b""
    options: dict[str, Any] = {"key": KEY, "cache_size": 9 * page_size}
    file = open_sealed(path, "w+b", page_size=page_size, **options)
    sizes = (1, 10, 5000, page_size, 3 * page_size, 90 * 4096 + 5)
    for _ in range(steps):
        action = choose.randrange(12)
        if action < 5:
            at, data = (
                choose.randrange(len(model) + 3 * page_size),
                choose.randbytes(choose.choice(sizes)),
            )
            file.seek(at)
            assert file.write(data) == len(data)
            model.extend(bytes(max(0, at - len(model))))
            model[at : at + len(data)] = data
        elif action < 8:
            at, count = choose.randrange(len(model) + 100), choose.choice(sizes)
            file.seek(at)
            assert file.read(count) == model[at : at + count]
        elif action == 8:
            size = choose.choice((0, choose.randrange(len(model) + 2 * page_size)))
            assert file.truncate(size) == size
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif action == 9:
            file.commit()
            saved = bytes(model)
        elif action == 10:
            file.discard()
            model = bytearray(saved)
        else:
            file.close()
            saved = bytes(model)
            file = open_sealed(path, "r+b", **options)
    file.close()
    assert get(path) == model


def test_every_size_around_a_page_comes_back(tmp_path: Path) -> None:
    for size in (0, 1, 4095, 4096, 4097, 85 * 4096, 85 * 4096 + 1, 86 * 4096 - 1):
        data = os.urandom(size)
        put(tmp_path / "file", data)
        assert get(tmp_path / "file") == data


def test_appending_adds_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for i in range(20):
        with open_sealed(path, "ab", key=KEY) as file:
            file.write(b"%04d" % i * 400)
    assert get(path) == b"".join(b"%04d" % i * 400 for i in range(20))


def test_x_refuses_a_file_that_is_there_and_r_one_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        open_sealed(path, "rb", key=KEY)
    with pytest.raises(FileNotFoundError):
        open_sealed(path, "r+b", key=KEY)
    with open_sealed(path, "xb", key=KEY) as file:
        file.write(b"one")
    with pytest.raises(FileExistsError):
        open_sealed(path, "xb", key=KEY)
    assert get(path) == b"one"


def test_a_hole_takes_no_room_and_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(b"begin")
        file.seek(1 << 45)
        file.write(b"end")
    assert path.stat().st_size < 1 << 17
    with open_sealed(path, "rb", key=KEY) as reader:
        assert reader.seek(0, os.SEEK_END) == (1 << 45) + 3
        reader.seek((1 << 45) - 5000)
        assert reader.read() == bytes(5000) + b"end"
        reader.seek(1 << 44)
        assert reader.read(3000) == bytes(3000)
    with open_sealed(path, "r+b", key=KEY) as both:
        both.truncate(5)
    assert get(path) == b"begin"


def test_what_grows_again_after_truncating_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_sealed(path, "w+b", key=KEY) as file:
        file.write(b"x" * 10000)
        file.truncate(5000)
        file.truncate(9000)
        file.seek(0)
        assert file.read() == b"x" * 5000 + bytes(4000)
    assert get(path) == b"x" * 5000 + bytes(4000)


def test_an_exception_in_the_with_block_commits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(path, b"old")

    def fail(mode: str, data: Any) -> None:
        with open_sealed(path, mode, key=KEY) as file:
            file.write(data)
            raise KeyError

    for mode in ("wb", "r+b", "ab", "w+b"):
        with pytest.raises(KeyError):
            fail(mode, b"new" * 100000)
        assert get(path) == b"old"
    with pytest.raises(KeyError):
        fail("w", "new")
    assert get(path) == b"old"


def test_flush_commits_nothing_and_commit_does(tmp_path: Path) -> None:
    path, copy = tmp_path / "file", tmp_path / "copy"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(b"one")
        assert file.commit() == 1
        file.write(b"two")
        file.flush()
        copy.write_bytes(path.read_bytes())
        assert get(copy) == b"one"
        assert file.commit() == 2
        copy.write_bytes(path.read_bytes())
        assert get(copy) == b"onetwo"


def test_a_file_that_nobody_closed_is_closed_when_it_is_dropped(tmp_path: Path) -> None:
    """As plain files are: at once, with a warning, and what was written is there."""
    path = tmp_path / "file"
    for i in range(3):
        file = open_sealed(path, "wb", key=KEY)
        file.write(b"dropped %d" % i)
        gc.disable()
        try:
            with pytest.warns(ResourceWarning, match="unclosed sealed file"):
                del file
        finally:
            gc.enable()
        assert get(path) == b"dropped %d" % i


def test_text_goes_through_the_ordinary_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "text"
    lines = [f"Zeile {i} äöü\n" for i in range(5000)]
    with open_sealed(path, "w", key=KEY, encoding="utf-8") as file:
        file.writelines(lines)
    with open_sealed(path, "r", key=KEY, encoding="utf-8") as file:
        assert list(file) == lines
    with io.TextIOWrapper(open_sealed(path, key=KEY), encoding="utf-8") as file:
        assert file.readline() == lines[0]


def test_numpy_and_zipfile_take_it_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "array"
    values = np.arange(300_001, dtype=np.float64)
    with open_sealed(path, "wb", key=KEY) as file:
        np.save(file, values)
    with open_sealed(path, key=KEY) as reader:
        assert (np.load(reader) == values).all()
    with open_sealed(path, "wb", key=KEY) as file:
        np.savez_compressed(file, a=values, b=values[:10])
    with open_sealed(path, key=KEY) as reader, np.load(reader) as found:
        assert (found["a"] == values).all()
        assert (found["b"] == values[:10]).all()


def test_a_large_read_goes_into_the_callers_buffer_at_any_offset(tmp_path: Path) -> None:
    data = os.urandom(2_000_003)
    put(tmp_path / "file", data)
    with open_sealed(tmp_path / "file", key=KEY) as file:
        for at in (0, 4096, 1, 4095, 777_777):
            out = bytearray(1 << 20)
            file.seek(at)
            assert file.readinto(out) == 1 << 20
            assert out == data[at : at + (1 << 20)]
        assert file.pread(5000, 1_999_000) == data[1_999_000:]
        assert file.pread(10, 3_000_000) == b""


def test_no_descriptor_no_pickle_no_wrong_mode(tmp_path: Path) -> None:
    put(tmp_path / "file", b"data")
    with open_sealed(tmp_path / "file", key=KEY) as file:
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        for thing in (file, file.raw, file.raw.engine):
            with pytest.raises(TypeError, match="pickled"):
                pickle.dumps(thing)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"")
        assert not file.isatty()
    for mode in ("", "b", "rwb", "rbt", "rr", "z", "r+w"):
        with pytest.raises(ValueError, match="mode"):
            open_sealed(tmp_path / "file", mode, key=KEY)
    with pytest.raises(ValueError, match="page_size"):
        open_sealed(tmp_path / "file", key=KEY, page_size=5000)


def test_a_key_is_32_bytes_or_derives_them(tmp_path: Path) -> None:
    path = tmp_path / "file"

    class Derived:
        def derive(self, context: bytes) -> bytes:
            assert context == b"pyenclave/file/1"
            return KEY

    with open_sealed(path, "wb", key=Derived()) as file:
        file.write(b"data")
    assert get(path) == b"data"
    with pytest.raises(NotInEnclaveError):
        open_sealed(path, key=pyenclave.SealPolicy.signer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 bytes"):
        open_sealed(path, key=b"short")
    with pytest.raises(TypeError):
        open_sealed(path, key="text")  # type: ignore[arg-type]
    with pytest.raises(UnsealError, match="key"):
        open_sealed(path, key=bytes(32))


def test_many_readers_or_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(path, b"data")
    with open_sealed(path, key=KEY), open_sealed(path, key=KEY) as second:
        assert second.read() == b"data"
        with pytest.raises(FileBusyError, match="this process"):
            open_sealed(path, "r+b", key=KEY)
    with open_sealed(path, "r+b", key=KEY):
        with pytest.raises(FileBusyError):
            open_sealed(path, key=KEY)
        with pytest.raises(FileBusyError):
            open_sealed(path, "wb", key=KEY)
    assert get(path) == b"data"


def test_another_process_that_holds_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(path, b"data")
    program = (
        "import sys, pyenclave\n"
        "with pyenclave.open_sealed(sys.argv[1], 'r+b', key=bytes(range(32))):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pyenclave.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(FileBusyError, match=f"process {other.pid} "):
            open_sealed(path, key=KEY)
        other.communicate()
    assert get(path) == b"data"


def test_threads_read_and_write_one_file(tmp_path: Path) -> None:
    """Each thread owns pages; what it reads is what it wrote last."""
    path = tmp_path / "file"
    failures: list[str] = []
    with open_sealed(path, "w+b", key=KEY, cache_size=8 * 4096) as file:
        file.truncate(400 * 4096)
        raw = file.raw.engine

        def work(own: int) -> None:
            choose = random.Random(own)
            pages: dict[int, bytes] = {}
            for step in range(150):
                page = choose.randrange(100) * 4 + own
                data = bytes([own, step]) * 2048
                raw.write(page * 4096, memoryview(data))
                pages[page] = data
                seen = choose.choice(list(pages))
                if file.pread(4096, seen * 4096) != pages[seen]:
                    failures.append(f"{own} {step}")
                if step % 50 == 49:
                    raw.commit()

        threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_file_object_and_a_store_are_places_too(tmp_path: Path) -> None:
    place = io.BytesIO()
    with open_sealed(place, "wb", key=KEY) as file:
        file.write(b"data" * 5000)
    with open_sealed(place, key=KEY) as reader:
        assert reader.read() == b"data" * 5000
    (tmp_path / "file").write_bytes(place.getvalue())
    with open_sealed(FileStore(tmp_path / "file"), key=KEY) as reader:
        assert reader.read() == b"data" * 5000


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(b"of the parent")
        file.flush()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = b"nothing"
            try:
                file.raw.write(b"of the child")
            except EnclaveStateError:
                said = b"refused"
                file.raw.close()
            os.write(write, said)
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 100) == b"refused"
        os.close(read)
        os.close(write)
    assert get(path) == b"of the parent"


def test_space_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_sealed(path, "wb", key=KEY) as file:
        file.write(bytes(1 << 20))
    for i in range(30):
        with open_sealed(path, "r+b", key=KEY) as both:
            both.seek(i * 4096)
            both.write(os.urandom(300_000))
    assert path.stat().st_size < 3 << 20
    for _ in range(5):
        put(path, os.urandom(1 << 20))
    assert path.stat().st_size < 3 << 20


def test_a_close_that_is_interrupted_commits_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5100 bytes 100 are still buffered when close is interrupted: none is committed."""
    path = tmp_path / "file"
    with open_sealed(path, "wb", key=bytes(32)) as file:
        file.write(b"old")
    file = open_sealed(path, "wb", key=bytes(32), buffering=4096)
    file.write(b"a" * 5000)
    file.write(b"b" * 100)

    def interrupted(self: object, data: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SealedRawFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.close()
    assert file.closed
    with open_sealed(path, key=bytes(32)) as reader:
        assert reader.read() == b"old"
