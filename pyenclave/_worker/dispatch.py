"""
Dispatch inside the worker: the function table, and serving the lanes of the ring.

The loop is in C (``_core.WorkerLane``): native functions and echoes never touch Python; a Python
function costs a decode, the call and an encode.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pyenclave import _core
from pyenclave._core import NativeLibrary
from pyenclave.calls import errors as _errors
from pyenclave.calls import ring
from pyenclave.calls.ocalls import Ocall, declared_in
from pyenclave.calls.signature import Signature, trusted_functions
from pyenclave.errors import EnclavePoisonedError, ImageError, UnknownFunctionError
from pyenclave.formats.image import ImageInfo
from pyenclave.trusted import _state

__all__ = ["Measured", "NativeLibrary", "Table", "build_table", "serve"]


class Table:
    """
    The functions of this enclave, by index, and the limits of its ring.

    Attributes:
        debug: Whether texts of errors cross and tracebacks are printed; None: ask the runtime.
        ocalls: The functions of the host, by index.
        places: Index and signature of each, by name.
        shared: Bytes of the ring behind the lanes, for arrays.

    """

    def __init__(
        self,
        functions: _core.FunctionTable,
        *,
        lanes: int,
        limit: int,
        debug: bool | None = None,
        ocalls: tuple[Ocall, ...] = (),
        names: tuple[str, ...] = (),
        shared: int = 0,
    ) -> None:
        self.functions = functions
        indices = {name: index for index, name in enumerate(names)}
        self.places = {item.name: (index, item.signature) for index, item in enumerate(ocalls)}
        self.ocalls = tuple(
            (
                item.name,
                item.signature.request_plan,
                item.signature.reply_plan,
                frozenset(indices[name] for name in item.allow),
            )
            for item in ocalls
        )
        self.lanes = lanes
        self.limit = limit
        self.shared = shared
        self.debug = debug
        self.lock = threading.Lock()
        self._memory: Any = None

    def memory(self, ring_fd: int) -> Any:
        """Return the mapped ring; its seals and size are checked when it is first asked for."""
        with self.lock:
            if self._memory is None:
                self._memory = ring.map_ring(ring_fd, self.lanes, shared=self.shared)
            return self._memory

    def attest(self, nonce: bytes) -> bytes:
        """Return evidence over the host's nonce."""
        from pyenclave.trusted import _runtime

        return _runtime.current().attest(nonce)

    def describe(self, error: BaseException, stage: str) -> bytes:
        """Return the error frame of *error*; in debug also print it, under the same id."""
        show = self.debug if self.debug is not None else _runs_as_debug()
        correlation = (current_note() if show else "") or os.urandom(8).hex()
        if show and stage == "function":
            print(f"[{correlation}] a trusted function raised:", file=sys.stderr)  # noqa: T201
            traceback.print_exception(error)
        return _errors.to_frame(
            error, called=stage == "function", show=show, correlation=correlation
        )


def current_note() -> str:
    """Return what the host says that this thread's call is for; debug only, to be printed."""
    note: Callable[[], str] | None = getattr(_lane, "note", None)
    return "" if note is None else note()


_lane = threading.local()


def leave() -> None:
    """Forget what :func:`serve` noted of this thread, after a rehearsal."""
    vars(_lane).clear()
    _state.forget_link()


def _runs_as_debug() -> bool:
    from pyenclave.errors import EnclaveStateError
    from pyenclave.trusted import _runtime

    try:
        return _runtime.current().identity.debug
    except EnclaveStateError:
        return False


def _native_entry(library: NativeLibrary, signature: Signature) -> tuple[Any, ...]:
    address = library.address(signature.name)
    if address == 0:
        raise ImageError(
            "the native library lacks a function of the image's table",
            expected=f"pye_ecall_{signature.name}",
        )
    return (address, None, None, None, None, None)


def _python_entry(function: Callable[..., Any], signature: Signature) -> tuple[Any, ...]:
    missing = {}
    if signature.optional:
        parameters = list(inspect.signature(function).parameters.values())
        missing = {
            place: item.default
            for place, item in enumerate(parameters)
            if item.default is not item.empty
        }
    keywords = tuple(item.name for item in signature.parameters if item.keyword)
    return (0, function, signature.request_plan, signature.reply_plan, missing, keywords)


def _flags(signature: Signature) -> int:
    private = _core.FUNCTION_PRIVATE if signature.private else 0
    return private | (_core.FUNCTION_STREAMS if signature.streams else 0)


def _declared(entry: ModuleType | NativeLibrary, info: ImageInfo) -> tuple[Ocall, ...]:
    """The measured ocalls, with the classes of the entry's own stubs."""
    measured = {item["name"]: Ocall.from_wire(item) for item in info.ocalls}
    for ocall in declared_in(entry) if isinstance(entry, ModuleType) else ():
        known = measured.get(ocall.name)
        if known is None or _plain(known.to_wire()) != _plain(ocall.to_wire()):
            raise ImageError(
                "an ocall of the entry differs from the image's table",
                expected=str(known) if known else "none of that name",
                found=str(ocall),
            )
        measured[ocall.name] = ocall
    return tuple(measured.values())


class Measured:
    """
    The functions that an image says it has, read and checked.

    Args:
        info: The image's measured description.

    Attributes:
        wire: Their signatures, tuples as lists.
        signatures: The same, read.
        by_name: The same, by name.

    Raises:
        ArgumentError: A signature is malformed.

    """

    def __init__(self, info: ImageInfo) -> None:
        self.wire: list[dict[str, Any]] = _plain(list(info.functions))
        self.signatures = tuple(Signature.from_wire(item) for item in self.wire)
        self.by_name = {item.name: item for item in self.signatures}


def build_table(
    entry: ModuleType | NativeLibrary, info: ImageInfo, measured: Measured | None = None
) -> Table:
    """
    Make the table of the live functions, which must be exactly those that were measured.

    Args:
        entry: The imported module, or the native library.
        info: The image's measured description.
        measured: Its functions, if they were read before.

    Raises:
        ImageError: A function is missing, added, or has another signature.

    """
    measured = measured or Measured(info)
    signatures = measured.signatures
    if isinstance(entry, NativeLibrary):
        if any(item.kind != "native" for item in signatures):
            raise ImageError("the image's table has Python functions, its entry is native")
        entries = tuple(_native_entry(entry, item) for item in signatures)
    else:
        functions = trusted_functions(entry, measured.by_name)
        live = [signature.to_wire() for _, signature in functions]
        # Most are the same lists; the longer comparison has tuples equal lists.
        if live != measured.wire and _plain(live) != measured.wire:
            raise ImageError(
                "the entry's functions differ from the image's table",
                expected=", ".join(item.name for item in signatures),
                found=", ".join(item["name"] for item in live),
            )
        entries = tuple(_python_entry(*function) for function in functions)
    return Table(
        _core.FunctionTable(entries, bytes(map(_flags, signatures))),
        lanes=info.threads,
        limit=info.message_limit,
        ocalls=_declared(entry, info),
        names=tuple(item.name for item in signatures),
        shared=info.shared_memory,
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what went through JSON compares equal."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _Link:
    """How trusted code of one lane's thread calls the host."""

    def __init__(
        self,
        lane: _core.WorkerLane,
        table: Table,
        poisoned: Callable[[EnclavePoisonedError], object] | None,
    ) -> None:
        self._lane = lane
        self._table = table
        self._poisoned = poisoned

    def _place(self, name: str) -> tuple[int, Signature]:
        try:
            return self._table.places[name]
        except (KeyError, TypeError):
            raise UnknownFunctionError(
                f"the image declares no host function {name!r}",
                expected=", ".join(self._table.places) or "none",
            ) from None

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, signature = self._place(name)
        return self._cross(index, signature.bind(args, kwargs))

    def call_ordered(self, name: str, values: tuple[Any, ...]) -> Any:
        return self._cross(self._place(name)[0], values)

    def _cross(self, index: int, values: tuple[Any, ...]) -> Any:
        try:
            return self._lane.ocall(index, values)
        except EnclavePoisonedError as error:
            # At once: trusted code could catch it and go on.
            if self._poisoned is not None:
                self._poisoned(error)
            raise


def open_lane(ring_fd: int, table: Table, lane: int) -> _core.WorkerLane:
    """
    Map a ring, checked, and return one of its lanes; nothing that the host wrote is looked at.

    Raises:
        EnclaveStateError: The ring is not sealed or has another size.

    """
    return _core.WorkerLane(
        table.memory(ring_fd), table.lanes, ring.DEFAULT_SLOT, lane, table.limit, table.shared
    )


def serve(
    ring_fd: int,
    table: Table,
    *,
    lane: int,
    idle: Callable[[], bool],
    poisoned: Callable[[EnclavePoisonedError], object] | None = None,
    opened: _core.WorkerLane | None = None,
    patience: float = 0.1,
) -> None:
    """
    Serve one lane until ``idle()`` returns False.

    Args:
        ring_fd: The size-sealed memory of the ring.
        table: What can be called.
        lane: Number of the lane; each has one thread.
        idle: Called every 100 ms of waiting, and less often after two seconds without a call.
        poisoned: Ends the process at once when the host breaks the protocol within a call.
        opened: The lane, if it was opened before.
        patience: Seconds between two calls of *idle* in a lane that nobody uses; a call is served
            at once however long that is.

    Raises:
        EnclavePoisonedError: The host broke the protocol, or trusted code found a broken MAC.
        EnclaveStateError: The ring is not sealed or has another size.

    """
    worker = opened or open_lane(ring_fd, table, lane)

    _lane.note = worker.note

    def alone() -> bool:
        # Lanes share what idle() looks at, such as a poll object, which two threads must not.
        with table.lock:
            return idle()

    _state.set_link(_Link(worker, table, poisoned))
    worker.serve(
        table.functions,
        table.attest,
        table.describe,
        alone,
        table.ocalls,
        patience=max(1, int(patience * 1000)),
    )
