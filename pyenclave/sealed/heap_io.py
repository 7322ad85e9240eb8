"""System calls on sealed arrays: a slice of them is pinned at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np

from pyenclave import _core

__all__ = ["pages_of", "read_into", "write_to"]

_PAGE = 4096


def _bounds(array: Any) -> tuple[int, int]:
    """Return the first address of an array or buffer, and the one after its last."""
    if not isinstance(array, np.ndarray):
        array = np.frombuffer(array, np.uint8)
    begin = end = int(array.ctypes.data)
    if array.size == 0:
        return begin, begin
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            begin += (length - 1) * stride
        else:
            end += (length - 1) * stride
    return begin, end + array.itemsize


def pages_of(pages: _core.Pages, array: Any) -> tuple[int, int]:
    """
    Return the offset and length of the whole pages that *array* lies in.

    Raises:
        ValueError: It does not lie in this heap.

    """
    begin, end = _bounds(array)
    base = pages.address
    if begin < base or end > base + pages.capacity:
        raise ValueError("array: it does not lie in this heap")
    first = (begin - base) // _PAGE * _PAGE
    return first, -(-(end - base) // _PAGE) * _PAGE - first


def _flat(array: Any, *, writable: bool) -> memoryview:
    view = memoryview(array)
    if not view.c_contiguous:
        raise ValueError("array: it is not contiguous; heap.array(…) makes a copy that is")
    if writable and view.readonly:
        raise ValueError("array: it is read-only")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _writer(file: Any) -> Callable[[memoryview], int | None]:
    if isinstance(file, int):
        return lambda part: os.write(file, part)
    if isinstance(file, socket.socket):
        return file.send
    if hasattr(file, "write"):
        return file.write  # type: ignore[no-any-return]
    raise TypeError(f"file: expected a descriptor, a socket or a file, found {type(file).__name__}")


def _reader(file: Any) -> Callable[[memoryview], int | None]:
    if isinstance(file, int):
        return lambda part: os.readv(file, [part])
    if isinstance(file, socket.socket):
        return file.recv_into
    if hasattr(file, "readinto"):
        return file.readinto  # type: ignore[no-any-return]
    raise TypeError(f"file: expected a descriptor, a socket or a file, found {type(file).__name__}")


def _move(
    pages: _core.Pages,
    view: memoryview,
    step: int,
    call: Callable[[memoryview], int | None],
    *,
    writes: bool,
) -> int:
    """Call *call* with a pinned part of *view* after the other, until one moves nothing."""
    done = 0
    while done < view.nbytes:
        part = view[done : done + step]
        where = pages_of(pages, part)
        pages.pin(*where)
        try:
            if writes:
                # The kernel may not write to a page that was found clean: it is made dirty first.
                touched = np.frombuffer(part, np.uint8)
                for bytes_ in (touched[::_PAGE], touched[-1:]):
                    np.bitwise_or(bytes_, 0, out=bytes_)
            moved = call(part)
        finally:
            if pages.poisoned is None:
                pages.unpin(*where)
        if moved is None:
            raise BlockingIOError("the file is not ready, and does not wait")
        if moved == 0:
            break
        done += moved
    return done


def write_to(pages: _core.Pages, file: Any, array: Any, step: int) -> int:
    """As ``SealedHeap.write_to``; *step* bytes are pinned at a time."""
    pages_of(pages, array)
    call = _writer(file)
    return _move(pages, _flat(array, writable=False), step, call, writes=False)


def read_into(pages: _core.Pages, file: Any, array: Any, step: int) -> int:
    """As ``SealedHeap.read_into``; *step* bytes are pinned at a time."""
    pages_of(pages, array)
    call = _reader(file)
    return _move(pages, _flat(array, writable=True), step, call, writes=True)
