"""
Rows ``file_seq_read``, ``file_seq_write`` and ``parquet``: sealed files beside plain ones.

All files are in memory (``/dev/shm``) where it has room, else in the folder for temporary files,
just written and so in the page cache; no disk is measured where that can be helped. Every way ends
a file alike: written, synchronised, closed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave import open_sealed
from pyenclave.benchmarks.rows import AbsentError, Row, figures

__all__ = ["file_seq_read", "file_seq_write", "parquet"]

_SIZE: Final = 256 << 20
_CHUNK: Final = 1 << 20  # of a read or write
_PAGE: Final = 4096
_TAG: Final = 16
_ROUNDS: Final = 7
_TABLE: Final = 400_000  # rows
_KEY: Final = bytes(range(32))
_PLAIN: Final = "a plain file"
_PAGES: Final = "cryptography AESGCM and a plain file, page by page"


@contextlib.contextmanager
def _folder(size: int) -> Iterator[Path]:
    """
    Give a folder with room for *size* bytes, in memory if there is one.

    Raises:
        AbsentError: There is no such room.
    """
    for place in ("/dev/shm", tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            if os.access(place, os.W_OK) and shutil.disk_usage(place).free > size + size // 4:
                break
    else:
        raise AbsentError(f"{size >> 20} MiB for temporary files")
    with tempfile.TemporaryDirectory(prefix="pyenclave-bench-", dir=place) as folder:
        yield Path(folder)


def _content() -> memoryview:
    return memoryview(np.random.default_rng(6).bytes(_SIZE))


def _nonce(page: int) -> bytes:
    return page.to_bytes(12, "big")


# ---- ways of writing and reading a file ----------------------------------------------------------


def _write_plain(path: Path, content: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(content), _CHUNK):
            file.write(content[at : at + _CHUNK])
        os.fsync(file.fileno())


def _read_plain(path: Path, out: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        for at in range(0, len(out), _CHUNK):
            file.readinto(out[at : at + _CHUNK])


def _write_sealed(path: Path, content: memoryview) -> None:
    with open_sealed(path, "wb", key=_KEY) as file:
        for at in range(0, len(content), _CHUNK):
            file.write(content[at : at + _CHUNK])


def _read_sealed(path: Path, out: memoryview) -> None:
    with open_sealed(path, "rb", key=_KEY) as file:
        for at in range(0, len(out), _CHUNK):
            file.readinto(out[at : at + _CHUNK])


def _write_pages(path: Path, content: memoryview) -> None:
    """Seal each page with its number as nonce: a key of its own for each file, written once."""
    aead, sealed = AESGCM(_KEY), bytearray(_PAGE + _TAG)
    with path.open("wb", buffering=_CHUNK) as file:
        for page, at in enumerate(range(0, len(content), _PAGE)):
            aead.encrypt_into(_nonce(page), content[at : at + _PAGE], None, sealed)
            file.write(sealed)
        file.flush()
        os.fsync(file.fileno())


def _read_pages(path: Path, out: memoryview) -> None:
    aead, sealed = AESGCM(_KEY), bytearray(_PAGE + _TAG)
    with io.BufferedReader(io.FileIO(path), _CHUNK) as file:
        for page, at in enumerate(range(0, len(out), _PAGE)):
            file.readinto(sealed)
            aead.decrypt_into(_nonce(page), sealed, None, out[at : at + _PAGE])


_WRITE: Final = (_write_sealed, _write_plain, _write_pages)
_READ: Final = (_read_sealed, _read_plain, _read_pages)


# ---- rows ----------------------------------------------------------------------------------------


def _turns(*works: Callable[[], object]) -> list[list[float]]:
    """Return the ns of each, in turns; the first round warms up."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(_ROUNDS + 1):
        for work, found in zip(works, times, strict=True):
            start = perf_counter_ns()
            work()
            if number:
                found.append(perf_counter_ns() - start)
    return times


def _files(name: str, times: list[list[float]]) -> list[Row]:
    ours, plain, pages = ([_SIZE / taken for taken in way] for way in times)
    rate: Any = {"unit": "GB/s", "more": True}
    limit = statistics.median(plain) / statistics.median(pages)
    note = f"a plain file, without any cipher, is {limit:.1f} times as fast as that peer"
    return [
        figures(name, ours, plain, peer=_PLAIN, **rate),
        figures(f"{name}/cryptography", ours, pages, peer=_PAGES, note=note, **rate),
    ]


def file_seq_write() -> list[Row]:
    """Write 256 MiB in calls of 1 MiB, from opening to closing, synchronised."""
    content = _content()
    with _folder(4 * _SIZE) as folder:
        paths = [folder / str(number) for number in range(len(_WRITE))]
        works = [lambda w=w, p=p: w(p, content) for w, p in zip(_WRITE, paths, strict=True)]
        times = _turns(*works)
        out = memoryview(bytearray(_SIZE))
        for read, path in zip(_READ, paths, strict=True):
            _same(read, path, out, content)
    return _files("file_seq_write", times)


def file_seq_read() -> list[Row]:
    """Read 256 MiB in calls of 1 MiB into the caller's buffer, from opening to closing."""
    content = _content()
    out = memoryview(bytearray(_SIZE))
    with _folder(4 * _SIZE) as folder:
        works = []
        for number, (write, read) in enumerate(zip(_WRITE, _READ, strict=True)):
            path = folder / str(number)
            write(path, content)
            _same(read, path, out, content)
            works.append(lambda read=read, path=path: read(path, out))
        times = _turns(*works)
    return _files("file_seq_read", times)


def _same(
    read: Callable[[Path, memoryview], None], path: Path, out: memoryview, content: memoryview
) -> None:
    out[:_PAGE] = bytes(_PAGE)
    read(path, out)
    if out != content:
        raise AssertionError("what was read is not what was written")


def parquet() -> Row:
    """Read a table of 400,000 rows with pandas, through a sealed file and from a plain one."""
    import pandas as pd
    import pyarrow as pa  # noqa: F401 - what pandas reads with; without it the row is absent

    source = np.random.default_rng(6)
    tests = np.array(["hdl", "chol", "sbp", "dbp", "smoke", "fib4"])
    table = pd.DataFrame(
        {
            "id": np.sort(source.integers(1, 20_000, _TABLE)),
            "days": source.integers(-3000, 7000, _TABLE).astype(np.int32),
            "test": tests[source.integers(0, len(tests), _TABLE)],
            "value": np.round(source.normal(100, 25, _TABLE), 1),
        }
    )
    with _folder(64 << 20) as folder:
        sealed, plain = folder / "sealed", folder / "plain"
        table.to_parquet(plain)
        with open_sealed(sealed, "wb", key=_KEY) as file:
            file.write(plain.read_bytes())

        def through() -> Any:
            with open_sealed(sealed, "rb", key=_KEY) as file:
                return pd.read_parquet(file)

        if not (through().equals(table) and pd.read_parquet(plain).equals(table)):
            raise AssertionError("the table that was read is not the one that was written")
        times = _turns(through, lambda: pd.read_parquet(plain))
    ours, theirs = ([taken / 1e6 for taken in way] for way in times)
    return figures("parquet", ours, theirs, peer="pandas.read_parquet of a plain file", unit="ms")
