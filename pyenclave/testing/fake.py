"""
A stand-in for an enclave: **no enclave, no protection**, for unit tests only.

`FakeEnclave` and `AsyncFakeEnclave` are handles with everything that the real ones have; the
trusted functions run in threads of this very process. Calls cross a real ring in the real
encoding, so types, limits, errors, deadlines, ocalls, streams and batches behave as they do with an
enclave, and nothing is built, measured or launched: a fake is ready in about a millisecond. What
it attests never verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final, NoReturn, Self

from pyenclave._locks import RLock
from pyenclave._worker import dispatch
from pyenclave.calls import ring
from pyenclave.calls.ocalls import Ocall, ocalls_of
from pyenclave.calls.signature import Signature, functions_of
from pyenclave.calls.stats import Launch, registry
from pyenclave.errors import EnclaveError, EnclaveLostError, LaunchError
from pyenclave.formats.image import ImageInfo
from pyenclave.host import _fork, _ocalls, files
from pyenclave.host._base import Handle
from pyenclave.host._lanes import Owner, make_lanes
from pyenclave.host._run import Run
from pyenclave.host.aio import AsyncEnclave
from pyenclave.host.enclave import Enclave
from pyenclave.host.handle import EnclaveInfo, Functions
from pyenclave.image.manifest import parse_shared
from pyenclave.testing import _inside
from pyenclave.trusted import _life

__all__ = ["AsyncFakeEnclave", "FakeEnclave", "load"]

_MESSAGE: Final = 16 << 20  # bytes of one call's arguments or result, as an image's default
_THREADS: Final = 4


def load(source: ModuleType | str | os.PathLike[str]) -> ModuleType:
    """
    Return the module of an entry: itself, or the file's, loaded anew under its stem.

    Raises:
        TypeError: *source* is neither a module nor a path.
        LaunchError: The file cannot be imported.

    """
    if isinstance(source, ModuleType):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a module or the path of its file is wanted, not {source!r}")
    path = Path(os.fspath(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LaunchError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Annotations and dataclasses look their module up by name.
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[path.stem]
        if isinstance(error, OSError):
            raise LaunchError(f"{path} cannot be read: {error.strerror}") from None
        raise
    finally:
        if before is not None:
            sys.modules[path.stem] = before
    return module


class _FakeRun(Run):
    """A launch of nothing: lanes with threads of this process at the other end."""

    def __init__(
        self, module: ModuleType, info: ImageInfo, queue: int, ocalls: Mapping[str, Any]
    ) -> None:
        signatures = tuple(Signature.from_wire(item) for item in info.functions)
        declared = tuple(Ocall.from_wire(item) for item in info.ocalls)
        self._handlers, self._close_files = files.for_launch(ocalls)
        _ocalls.check(declared, self._handlers)
        self._image: Any = SimpleNamespace(info=info, ocalls=declared, functions=())
        self.handles = bool(declared)
        self.name = info.name
        self.names = tuple(item.name for item in signatures)
        self.unsigned = False  # there is no image that could be signed
        self._ended = None
        self._lock = RLock()
        self._owner = Owner()
        source = getattr(module, "__file__", None) or module.__name__
        self._runtime = _inside.FakeRuntime(info.name, hashlib.sha256(source.encode()).digest())
        table = dispatch.build_table(module, info)
        table.debug = True
        pidfd, end = os.pipe2(os.O_CLOEXEC)  # readable when the other end is closed
        told = SimpleNamespace(enclave_id=os.urandom(16))
        self._held: Any = SimpleNamespace(known=True, pidfd=pidfd, launched=lambda: told)
        alive = _Alive(end)
        fd = ring.create(info.threads, shared=info.shared_memory)
        try:
            self.lanes = make_lanes(fd, info, queue, self._owner)
            self._answer_ocalls(self.lanes)
            table.memory(fd)
        finally:
            os.close(fd)
        self.launch = Launch(self.name, self.names, info.threads, self.lanes)
        self.functions = Functions(signatures, self.lanes)
        self._owner.set(self)
        self.shared = self._share()
        _inside.becoming()
        stops = _life.hooks(module, _life.STOP)
        finalizer: Any = weakref.finalize(
            self, _finish, alive, pidfd, self._runtime, stops, os.getpid()
        )
        self._finalizer = finalizer
        self.alive = alive
        try:
            self._begin(module)
        except BaseException:
            self.close()
            raise
        for lane in range(info.threads):
            threading.Thread(
                target=_serve,
                args=(table, lane, alive, self._runtime),
                name=f"fake-{self.name}-{lane}",
                daemon=True,
            ).start()
        registry.add(self.launch, self)
        _fork.watch(self)

    def _begin(self, module: ModuleType) -> None:
        with _inside.entered(self._runtime):
            for function in _life.hooks(module, _life.START):
                try:
                    function()
                except Exception as error:
                    kind = type(error).__name__
                    raise LaunchError(
                        f"{function.__qualname__} (on_start) raised {kind}: {error}", type=kind
                    ) from error

    @property
    def info(self) -> EnclaveInfo:
        """What a fake is."""
        runtime, info = self._runtime, self._image.info
        return EnclaveInfo(
            name=info.name,
            enclave_id=self.enclave_id,
            pid=os.getpid(),
            debug=True,
            mrenclave=runtime.identity.mrenclave,
            mrsigner=bytes(32),
            product_id=0,
            security_version=0,
            threads=info.threads,
            functions=tuple(str(Signature.from_wire(item)) for item in info.functions),
            level="fake: no enclave, no protection",
            protections={},
            record=b"",
            runtime_public_key=runtime.key.public,
        )

    def _learn(self) -> None:
        reason = self.alive.reason
        self._end_as(*(reason or ("lost", lambda: EnclaveLostError("the fake enclave ended"))))


class _Alive:
    """Whether a fake's threads go on; the descriptor is closed with its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.ended = False
        self.reason: Any = None

    def __call__(self) -> bool:
        return not self.ended

    def end(self, reason: Any = None) -> None:
        with self._lock:
            if not self.ended:
                self.ended, self.reason = True, reason
                os.close(self._fd)


def _serve(table: dispatch.Table, lane: int, alive: _Alive, runtime: _inside.FakeRuntime) -> None:
    def poisoned(error: EnclaveError) -> None:
        text = str(error)
        alive.end(("poisoned", lambda: type(error)(f"the enclave is poisoned: {text}")))

    with _inside.entered(runtime):
        try:
            dispatch.serve(-1, table, lane=lane, idle=alive, poisoned=poisoned)
        except EnclaveError as error:
            poisoned(error)
        except SystemExit:
            alive.end()  # trusted code may end its worker


def _finish(alive: _Alive, fd: int, runtime: _inside.FakeRuntime, stops: Any, pid: int) -> None:
    if os.getpid() != pid:
        return
    if not alive.ended:
        with _inside.entered(runtime), contextlib.suppress(Exception):
            for function in reversed(stops):
                function()
    alive.end()
    os.close(fd)
    _inside.ended()


class _Fake(Handle):
    """What both forms of the fake have in common."""

    _module: ModuleType

    def _set(
        self,
        entry: ModuleType | str | os.PathLike[str],
        threads: int,
        message: int,
        shared_memory: int | str,
    ) -> None:
        if type(threads) is not int or not 1 <= threads <= 64:
            raise ValueError(f"threads must be a number from 1 to 64, not {threads!r}")
        module = self._module = load(entry)
        declared = ocalls_of(module)
        name = module.__name__.rpartition(".")[2]
        self._info = ImageInfo(
            name=name,
            product_id=0,
            security_version=0,
            debug=True,
            threads=threads,
            entry_kind="python",
            entry_module=name,
            entry_file=f"{name}.py",
            functions=tuple(functions_of(module)),
            sealed_memory=64 << 20,
            message_limit=message,
            ocalls=tuple(declared),
            blas_threads=1,
            jit=False,
            seal={},
            files=(),
            shared_memory=parse_shared(shared_memory),
        )

    def _launch(self) -> Run:
        return _FakeRun(self._module, self._info, self._queue, self._ocalls)

    def _read(self) -> NoReturn:
        raise LaunchError("a fake has no image")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._info.name}: no enclave, no protection>"


class FakeEnclave(_Fake, Enclave):
    """
    A handle like :class:`pyenclave.Enclave` whose trusted functions run in this process.

    **It is no enclave and protects nothing**; for unit tests.

    Args:
        entry: The module with the trusted functions, or the path of its file.
        threads: Calls that run at the same time.
        message: Limit of one call's encoded arguments or result, in bytes.
        shared_memory: As for ``Enclave.from_file``.
        queue: As for ``Enclave``.
        ocalls: As for ``Enclave``.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A number is out of range.
        ArgumentError: A trusted function cannot be called as it is written.

    """

    def __init__(
        self,
        entry: ModuleType | str | os.PathLike[str],
        *,
        threads: int = _THREADS,
        message: int = _MESSAGE,
        shared_memory: int | str = 0,
        queue: int = 1024,
        ocalls: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(b"", queue=queue, quiet=True, ocalls=ocalls)
        self._set(entry, threads, message, shared_memory)

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """Make a fake of a single Python file."""
        return cls(script, **options)


class AsyncFakeEnclave(_Fake, AsyncEnclave):
    """
    A handle like :class:`pyenclave.AsyncEnclave` whose trusted functions run in this process.

    **It is no enclave and protects nothing**; for unit tests. Args and errors as FakeEnclave's.
    """

    def __init__(
        self,
        entry: ModuleType | str | os.PathLike[str],
        *,
        threads: int = _THREADS,
        message: int = _MESSAGE,
        shared_memory: int | str = 0,
        queue: int = 1024,
    ) -> None:
        super().__init__(b"", queue=queue, quiet=True)
        self._set(entry, threads, message, shared_memory)

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """Make a fake of a single Python file."""
        return cls(script, **options)
