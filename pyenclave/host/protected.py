"""
Native functions of this process whose data only they can read, behind a protection key of the CPU.

Not an enclave: ``docs/protected.md`` begins with what this does not stop.
"""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, NoReturn, Self

from pyenclave import _core
from pyenclave._files import read_file
from pyenclave._memfd import sealed
from pyenclave._native import cpu_features
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveError,
    ProtectionError,
    UnknownFunctionError,
)
from pyenclave.formats.elf_protect import protectable
from pyenclave.host import _fork
from pyenclave.sealed._size import parse_size, size_text

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ProtectedLibrary"]

_MOST: Final = 1 << 30
_MOST_FILE: Final = 1 << 28
_MOST_THREADS: Final = 64


def _size(value: object, name: str, least: int) -> int:
    try:
        size = parse_size(value)
    except ValueError as error:
        kind = ValueError if isinstance(value, int | str) else TypeError
        raise kind(f"{name}: expected {error}, found {value!r}") from None
    if not least <= size <= _MOST:
        raise ValueError(f"{name}: expected {least} … {_MOST} bytes (1 GiB), found {size}")
    return size


def _closed() -> EnclaveError:
    return EnclaveClosedError("the protected library is closed")


def _need_keys() -> None:
    """Refuse a machine without protection keys: there is nothing weaker to fall back to."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        raise ProtectionError(
            "protection keys are used on Linux for x86-64 only",
            found=f"{os.uname().sysname} on {os.uname().machine}",
        )
    if "pku" not in cpu_features():
        raise ProtectionError(
            "this machine has no protection keys",
            expected="the CPU feature PKU, switched on by the kernel (ospke in /proc/cpuinfo)",
            advice="Virtual machines get it from their host; there is no weaker way here.",
        )


def _sealed_copy(data: bytes) -> int:
    """Return a descriptor of bytes that nobody can change, by a path that is new to the loader."""
    fds = [sealed("pyenclave-protected", data)]
    try:
        # The loader takes a path that it knows for the object that it has: one that stayed loaded.
        while _core.library_is_loaded(f"/proc/self/fd/{fds[-1]}"):
            fds.append(os.dup(fds[0]))
        return fds.pop()
    finally:
        for other in fds:
            os.close(other)


def _read(path: str | os.PathLike[str]) -> bytes:
    return read_file(path, limit=_MOST_FILE)


_open: weakref.WeakSet[_core.ProtectedCode] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """Close what nobody closed, before the process runs the libraries' destructors."""
    for code in list(_open):
        code.close(_closed, at_exit=True)


class ProtectedLibrary:
    """
    A C library whose variables, stacks and memory the rest of this process cannot read or write.

    It is no enclave: there is no report, no sealing and no key of a platform, and nothing stops
    native code of this process that wants to get at it (``docs/protected.md``). A stray pointer, an
    overrun buffer, ``ctypes`` and other threads get a fault instead of the library's data.

    Functions are those of ``pyenclave_trusted.h``: ``library.name(data)`` gives bytes. They run
    without Python's lock.

    Args:
        path: The shared object. It is read once, checked, and loaded from a sealed copy.
        memory: Bytes for ``pyenclave_protected.h``, such as ``"4 MiB"``.
        message: The longest input, and the longest answer.
        stack: Bytes of each stack.
        threads: How many calls can run at the same time; each has a stack and buffers of its own.
        signals: ``"block"``: none comes during a call. ``"leave"``: the caller sees to that, and
            saves two system calls a call; else a signal may end the process.

    Raises:
        ProtectionError: The machine has no protection keys, all are taken, or the library cannot be
            put behind one. There is no weaker way.
        ImageError: The file is not a shared object, or cannot be loaded.
        TypeError, ValueError: An impossible argument.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: int | str = "4 MiB",
        message: int | str = "128 KiB",
        stack: int | str = "256 KiB",
        threads: int = 4,
        signals: Literal["block", "leave"] = "block",
    ) -> None:
        sizes = (
            _size(memory, "memory", 0),
            _size(stack, "stack", 4096),
            _size(message, "message", 1),
        )
        if type(threads) is not int:
            raise TypeError(f"threads: expected a number, found {threads!r}")
        if not 1 <= threads <= _MOST_THREADS:
            raise ValueError(f"threads: expected 1 … {_MOST_THREADS}, found {threads}")
        if signals not in ("block", "leave"):
            raise ValueError(f"signals: expected 'block' or 'leave', found {signals!r}")
        self.path = Path(path)
        data = _read(self.path)
        found = protectable(data, self.path.name)
        _need_keys()
        self._code = _core.ProtectedCode(
            _sealed_copy(data),
            found.functions,
            found.ranges,
            found.variables,
            found.first,
            *sizes,
            threads,
            signals == "leave",
        )
        _open.add(self._code)
        self.functions: Final = found.functions
        self._pid = os.getpid()
        self._memory = sizes[0]
        _fork.watch(self)

    def _after_fork(self) -> None:
        """Forget in a child what calls have left in variables; memory and stacks are not there."""
        self._code.close(functools.partial(_fork.refusal, self._pid))

    def call(self, name: str, data: Buffer) -> bytes:
        """Call the function *name*: as ``library.name(data)``, for any name."""
        if name not in self.functions:
            raise UnknownFunctionError(
                f"{self.path.name} has no function {name!r}", expected=list(self.functions)
            )
        return self._code.function(name)(data)

    def __getattr__(self, name: str) -> Callable[[Buffer], bytes]:
        functions = self.__dict__.get("functions", ())
        if name not in functions:
            raise AttributeError(f"the library has no function {name!r}; it has {list(functions)}")
        made = self.__dict__[name] = self._code.function(name)
        return made

    @property
    def closed(self) -> bool:
        """Whether the library was closed, or belongs to another process."""
        return self._code.closed

    def close(self) -> None:
        """
        Wipe and unload the library, and give the key back. May be called twice.

        Raises:
            BusyError: A call is under way.
            EnclaveStateError: This is a forked child.

        """
        if os.getpid() != self._pid:
            raise _fork.refusal(self._pid)
        self._code.close(_closed)

    def __enter__(self) -> Self:
        if self.closed:
            raise _closed()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else size_text(self._memory)
        return f"<ProtectedLibrary {self.path.name!r}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a protected library cannot be pickled or copied")
