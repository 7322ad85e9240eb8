"""
Arrays in memory that host and enclave both map: ``enclave.shared``.

The memory is the last part of the ring (docs/formats/ring.md). Who has which bytes of it is
decided here, on the host, alone: the enclave is only told places, call by call.
"""

from __future__ import annotations

import mmap
import os
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from pyenclave._locks import Lock
from pyenclave.errors import ArgumentError, BusyError
from pyenclave.host import _fork

__all__ = ["Blocks", "SharedMemory"]

_LINE = 64  # bytes: arrays begin at lines, and no two have one in common

Shape = SupportsIndex | tuple[SupportsIndex, ...]


class Blocks:
    """
    Which parts of a memory are free: first fit over a sorted list, neighbours joined.

    Args:
        size: Bytes of the memory.

    """

    def __init__(self, size: int) -> None:
        self._lock = Lock()
        self._holes = [(0, size)] if size else []
        # What was freed and is not in the list yet. Finalizers run anywhere, also while this
        # thread has the lock: they only append, which needs none.
        self._freed: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> int | None:
        """Return where *size* bytes are now the caller's; None if there is no such hole."""
        size = -(-size // _LINE) * _LINE
        with self._lock:
            self._gather()
            for index, (at, length) in enumerate(self._holes):
                if length >= size:
                    if length == size:
                        del self._holes[index]
                    else:
                        self._holes[index] = (at + size, length - size)
                    return at
        return None

    def give_back(self, at: int, size: int) -> None:
        """Free what :meth:`take` gave; from any thread, at any time."""
        self._freed.append((at, -(-size // _LINE) * _LINE))

    def state(self) -> tuple[int, int]:
        """Return how many bytes are free, and how many in one piece."""
        with self._lock:
            self._gather()
            sizes = [length for _, length in self._holes]
        return sum(sizes), max(sizes, default=0)

    def _gather(self) -> None:
        if not self._freed:
            return
        while self._freed:
            insort(self._holes, self._freed.popleft())
        joined: list[tuple[int, int]] = []
        for at, length in self._holes:
            if joined and sum(joined[-1]) == at:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((at, length))
        self._holes = joined


class _Block:
    """What an array's memory belongs to: when no array and no view refers to it, it is free."""

    __slots__ = ("__array_interface__", "_at", "_blocks", "_memory", "_size", "_watchers")

    def __init__(
        self, memory: memoryview, address: int, blocks: Blocks, at: int, size: int
    ) -> None:
        self._memory = memory  # mapped for as long as this lives, whatever becomes of the enclave
        self._blocks, self._at, self._size = blocks, at, size
        self.__array_interface__ = {
            "version": 3,
            "data": (address + at, False),
            "typestr": "|u1",
            "shape": (size,),
        }

    def __del__(self) -> None:
        self._blocks.give_back(self._at, self._size)


class SharedMemory:
    """
    The memory that an enclave and its host share, for arrays; ``enclave.shared``.

    An array made here crosses by its place alone: a call that has it as an argument copies its
    elements once, into the enclave's private memory, and as ``out=`` it is written by the enclave
    directly. Everything else about it is as of any array; given to another enclave it crosses in
    the ordinary way.

    **What is in it is in the clear**, like all that crosses: whoever controls the host reads and
    changes it at any time. The enclave can change it at any time, too: copy an array before its
    elements are used as indices, as a mask or as text. After a call that was given up, its late
    result may still come: drop its arrays and take new ones.

    An array's memory is free again when the array and all views of it are gone. It stays readable
    after the enclave was closed or lost.
    """

    def __init__(self, memory: mmap.mmap, size: int, guard: Callable[[], None]) -> None:
        self._memory = memoryview(memory)  # which nobody can unmap now
        whole = np.frombuffer(self._memory, np.uint8, size, len(memory) - size)
        self._address: int = whole.__array_interface__["data"][0]
        self._size = size
        self._guard = guard
        self._blocks = Blocks(size)
        self._pid = os.getpid()

    @property
    def size(self) -> int:
        """Bytes of it in all: ``[memory] shared`` of the manifest."""
        return self._size

    @property
    def free(self) -> int:
        """Bytes that no array has; not necessarily in one piece."""
        self._check_process()
        return self._blocks.state()[0]

    def empty(self, shape: Shape, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """
        Return a new array in the shared memory, as ``numpy.empty``: its content is anything.

        Args:
            shape: A number, or a tuple of them.
            dtype: Type of the elements; without objects.

        Returns:
            The array, contiguous in C order. One without elements is an ordinary array.

        Raises:
            BusyError: It does not fit beside the arrays that there are.
            ArgumentError: It is larger than the memory, or has objects.
            EnclaveStateError: The enclave was closed or lost, or belongs to another process.
            ValueError: A size is negative.

        """
        self._check_process()
        self._guard()
        kind = np.dtype(dtype)
        if kind.hasobject or kind.itemsize == 0:
            raise ArgumentError(
                f"elements of {kind} cannot be in shared memory",
                expected="bools, numbers, dates, strings of a fixed width, records of them",
            )
        sizes = shape if isinstance(shape, tuple | list) else (shape,)
        counts = [item.__index__() for item in sizes]
        if any(count < 0 for count in counts):
            raise ValueError("negative dimensions are not allowed")
        length = kind.itemsize
        for count in counts:
            length *= count
        if length == 0:
            return np.empty(counts, kind)
        at = self._take(length)
        block = _Block(self._memory, self._address, self._blocks, at, length)
        array: np.ndarray = np.asarray(block).view(kind).reshape(counts)
        return array

    def zeros(self, shape: Shape, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
        """As :meth:`empty`, and filled with zeros."""
        array = self.empty(shape, dtype)
        array[...] = np.zeros((), array.dtype)
        return array

    def array(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        """
        Return a copy of *values* in the shared memory, as ``numpy.array``.

        Raises:
            As :meth:`empty`.

        """
        found = np.asarray(values, dtype)
        made = self.empty(found.shape, found.dtype)
        made[...] = found
        return made

    def _take(self, length: int) -> int:
        if length > self._size:
            raise ArgumentError(
                "the array is larger than the shared memory",
                expected=f"at most {self._size} bytes",
                found=f"{length} bytes",
                advice="Raise [memory] shared of the manifest.",
            )
        at = self._blocks.take(length)
        if at is None:
            free, most = self._blocks.state()
            raise BusyError(
                "the shared memory has no room for the array",
                expected=f"at most {most} bytes in one piece, {free} are free of {self._size}",
                found=f"{length} bytes asked for",
                advice="Drop arrays that are not needed any more, views of them too, or raise "
                "[memory] shared of the manifest.",
            )
        return at

    def _check_process(self) -> None:
        if os.getpid() != self._pid:  # before any lock, which a thread of the parent may have
            raise _fork.refusal(self._pid)

    def __repr__(self) -> str:
        return f"<SharedMemory of {self._size} bytes>"
