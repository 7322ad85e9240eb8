"""
A pool of enclaves of one image, for threads.

Calls go to whichever enclave has a thread free. An enclave that is lost is replaced by a warm
worker; a call whose enclave was lost before it began is made again, one that may have begun never.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar, overload

from pyenclave._core import HostStream
from pyenclave.errors import BusyError, EnclaveError, LaunchError
from pyenclave.host._base import find
from pyenclave.host._book import Member, Ticket
from pyenclave.host._engine import spawn
from pyenclave.host._limits import PoolStats
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._pool_streams import PoolStream
from pyenclave.host._pooled import PROBE, RETRIES, SELF, TROUBLE, PoolBase, PoolView
from pyenclave.host._reserve import Begun
from pyenclave.host.enclave import Enclave

__all__ = ["EnclavePool", "PoolStats"]

P = ParamSpec("P")
T = TypeVar("T")

_PING_SECONDS = (0.05, 5.0)  # while all else waits, and in a thread of its own
_LOOK = 1.0  # seconds: who was to wake a waiting call may have been interrupted
_SLICE = 0.01
_QUIET = 0.02  # seconds after a hand-out in which none is replaced
_log = logging.getLogger("pyenclave")
# In whose place of which pool this thread's handler of an ocall runs.
_inside: ContextVar[tuple[PoolBase, Ticket] | None] = ContextVar("pyenclave_inside", default=None)


class EnclavePool(PoolBase):
    """
    Enclaves of one image that share the calls of this process's threads.

    State inside an enclave is its own: two calls may meet different enclaves, and an enclave is
    replaced when it is lost, old or surplus. What must outlive a call is sealed, or kept by the
    caller; who needs one enclave for several calls takes it by :meth:`enclave`.

    Args:
        image: Path of an image, or its bytes.
        size: How many enclaves are kept.
        max_size: How many there may be while calls wait; None: *size*.
        warm: Workers that the platform keeps ready for replacements and fresh enclaves.
        queue: Calls that may wait for an enclave; more raise BusyError.
        max_calls: Replace an enclave after about so many calls (up to a tenth more).
        max_age: Replace it after about so many seconds.
        shrink_after: End one above *size* that was idle so many seconds.
        health: Ask an idle enclave whether it answers every so many seconds.
        stuck_after: Replace one whose threads all belong to calls that nobody waits for.
        give_up: After so many launches that failed in a row, stop trying until :meth:`restart`.
        max_fresh: Enclaves of ``enclave(fresh=True)`` at a time.
        debug: As for ``Enclave``, like the rest.
        require: Protection bits without which none is launched.
        state: The state directory.
        quiet: Do not say that an unsigned image runs as debug.
        ocalls: Handlers of the image's host functions, for calls of every enclave.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A number is impossible.

    """

    def _make(self, image: Any, *, quiet: bool) -> Enclave:
        return Enclave(image, quiet=quiet, ocalls=self._ocalls, **self._settings)

    @classmethod
    def from_file(cls, script: str | os.PathLike[str], **options: Any) -> Self:
        """
        Make a pool of a single Python file, built now, unsigned, launched as debug.

        Args:
            script: The file.
            options: As for the class.

        Raises:
            ImageError: The file cannot be used; with its line.

        """
        from pyenclave.image.build import build_script

        return cls(build_script(os.fspath(script)), **options)

    # ---- life ---------------------------------------------------------------------------------

    _wake: _Wake | None = None
    _quiet_until = 0.0

    def start(self) -> Self:
        """
        Launch the enclaves; returns when all of them run.

        Raises:
            ImageError: The image is refused.
            LaunchError: An enclave could not be started, or a limit of platform, process, user or
                machine has no room for so many. None is left behind.
            EnclaveStateError: The pool was started before.

        """
        self._begin()
        try:
            for done in range(self._prepare()):
                try:
                    self._join(self._launch(quiet=self._quiet or done > 0))
                except EnclaveError as error:
                    self._failed(error)
                    raise
            self._start_keeper()
        except BaseException:
            self.close()
            raise
        return self

    def _launch(self, *, quiet: bool = True) -> Enclave:
        handle: Enclave = self._new(quiet=quiet)
        return handle.start()

    def _launch_ahead(self) -> Enclave:
        """Ask for an enclave; its handle was made before, or is while the platform is at it."""
        begun = None if self._reserve is None else self._reserve.begin()
        if begun is None:
            return self._launch()
        try:
            handle: Enclave | None = begun.handle
            if handle is None:
                return self._handle_of(begun)
            begun.handle = None
            handle._running().asked()  # noqa: SLF001 - same package
        except BaseException:
            begun.held.end()
            raise
        return handle

    def _handle_of(self, begun: Begun) -> Enclave:
        handle: Enclave = self._make(self._data, quiet=True)
        handle._begun = begun  # noqa: SLF001 - same package
        try:
            return handle.start()
        finally:
            handle._begun = None  # noqa: SLF001

    def _join(self, handle: Enclave) -> None:
        if self._joined(handle, handle._running().lanes) is None:  # noqa: SLF001 - same package
            handle.close()

    def _start_keeper(self) -> None:
        try:
            wake = _Wake()
        except OSError as error:
            raise LaunchError(f"the pool cannot watch its enclaves: {error.strerror}") from None
        thread = threading.Thread(
            target=_keep, args=(weakref.ref(self), wake), name="pyenclave-pool", daemon=True
        )
        # Before: Ctrl-C may come when the thread runs already.
        self._wake = wake
        weakref.finalize(self, wake.notify)  # so that the thread sees that this object is gone
        try:
            thread.start()
        except RuntimeError as error:
            raise LaunchError(f"the pool cannot watch its enclaves: {error}") from None

    def drain(self, timeout: float | None = None) -> bool:
        """
        Take no new calls, and wait for those under way.

        Args:
            timeout: Seconds, or None to wait as long as they take.

        Returns:
            Whether all ended in time; those that did not go on until :meth:`close`.

        """
        self._check_process()
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._book.drain()
        while True:
            with self._lock:
                self._give_late()
                if not self._book.busy or self._book.state != "draining":
                    return True
            left = min(_SLICE, deadline - time.monotonic())
            if left <= 0:
                return False
            time.sleep(left)

    def close(self, timeout: float = 0.0) -> None:
        """
        End the pool and its enclaves. May be called twice.

        Args:
            timeout: Seconds for calls under way, as :meth:`drain`; what still runs then is ended
                with its enclave, and its caller gets EnclaveClosedError.

        """
        if os.getpid() != self._pid:
            return  # the parent's enclaves are not the child's to end
        if timeout > 0:
            self.drain(timeout)
        with self._lock:
            handles = self._book.close()
        self._poke()
        with contextlib.ExitStack() as stack:  # all of them, whatever one of them raises
            if self._term is not None:
                stack.callback(self._term.forget)
            if self._reserve is not None:
                stack.callback(self._reserve.close)
            for handle in reversed(handles):
                stack.callback(handle.close)

    def __enter__(self) -> Self:
        if self._book.state == "new":
            self.start()
        self._check_process()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _poke(self) -> None:
        if self._wake is not None:
            self._wake.notify()

    # ---- use ----------------------------------------------------------------------------------

    @overload
    def call(
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]: ...

    @overload
    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function in one of the enclaves.

        A function that streams gives a :class:`PoolStream`, which has its thread of an enclave
        until it ends. In a handler of an ocall, a call goes to the enclave that asks.

        Args:
            function: As for ``Enclave.call``, like the rest.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            BusyError: Too many calls wait; or this thread itself has every enclave.
            EnclaveClosedError: The pool is draining, closed or not started.
            EnclaveLostError: The enclave ended while the call may have run inside, or before it
                began in every enclave that was tried.
            LaunchError: The pool gave up; the error names the last reason.
            EnclaveError: As ``Enclave.call``.

        """
        return self._call(function, args, kwargs, NO_OPTIONS)

    def options(
        self,
        *,
        timeout: float | None = None,
        kill_after: float | None = None,
        correlation: str | None = None,
    ) -> PoolOptions:
        """
        Return the same pool with other settings for its calls.

        Args:
            timeout: Seconds until a call raises CallTimeoutError, waiting for an enclave included.
            kill_after: As for ``Enclave.options``; the enclave that is ended is replaced.
            correlation: Id of the calls in errors and logs, as for ``Enclave.options``.

        Raises:
            ValueError: A number is impossible.

        """
        options = Options(timeout=timeout, kill_after=kill_after, correlation=correlation)
        return PoolOptions(self, options)

    def map(
        self,
        function: str | Callable[..., Any],
        items: Iterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Any]:
        """
        Call a function for each item, as ``Enclave.map``, in one enclave that serves nobody else.

        Args:
            function: As for ``Enclave.map``, like the rest.
            items: One positional argument each.
            errors: ``raise`` an item's error in its place, or ``return`` it as its result.

        Raises:
            EnclaveError: As :meth:`enclave`, when the first result is asked for; batches are
                never sent again.

        """
        with self.enclave() as one:
            yield from one.map(function, items, errors=errors)

    @contextlib.contextmanager
    def enclave(self, *, fresh: bool = False, timeout: float | None = None) -> Iterator[Enclave]:
        """
        Have one enclave alone, for calls that belong together.

        Args:
            fresh: A new enclave, which nobody used before and nobody uses afterwards: it gets its
                own identity and is ended at the end of the block. Else one of the pool, with
                whatever earlier calls left in it, which goes back.
            timeout: Seconds to wait for one of the pool.

        Raises:
            BusyError: Too many wait, or too many fresh enclaves are in use; or this thread itself
                has every enclave.
            CallTimeoutError: None came free in time.
            EnclaveError: As :meth:`call`.

        """
        self._check_process()
        if fresh:
            with self._fresh() as one:
                yield one
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = Ticket(alone=True)
        try:
            member = self._acquire(ticket, deadline)
            with self._lock:
                self._book.keep(ticket, threading.get_ident())
            yield member.handle
            # A stream may be open yet, or a call go on inside: its threads are asked.
            self._give(ticket, gave_up=True)
        except BaseException:
            self._give(ticket, gave_up=True)  # also where the line above was interrupted
            raise

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Enclave]:
        token = object()
        handle = None
        try:
            with self._lock:
                self._book.take_fresh(token)
            self._quiet_until = time.monotonic() + _QUIET
            with self._launch_ahead() as handle:
                with self._lock:
                    self._book.fresh_started(token, handle)
                yield handle
                handle._running().confirm()  # noqa: SLF001 - same package
            self._end_fresh(token, handle)
        except BaseException as error:
            self._end_fresh(token, handle, error)  # also where the line above was interrupted
            raise

    # ---- calls --------------------------------------------------------------------------------

    def _call(
        self,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> Any:
        if os.getpid() != self._pid:
            self._check_process()
        deadline = None if options.timeout is None else time.monotonic() + options.timeout
        if self._handles and (outer := self._nested_in()) is not None:
            return find(self._view(outer, options, deadline), function)(*args, **kwargs)
        for left in range(RETRIES, -1, -1):
            ticket = Ticket()
            try:
                member = self._acquire(ticket, deadline)
                if options is NO_OPTIONS:
                    functions = member.handle._running().functions  # noqa: SLF001 - same package
                else:
                    functions = self._view(member, options, deadline)
                value = self._run(ticket, find(functions, function), *args, **kwargs)
                if isinstance(value, HostStream):
                    return PoolStream(self, ticket, value)
                self._end_call(ticket, None)
                return value
            except BaseException as error:
                if not self._end_call(ticket, error, last=left == 0):
                    raise
        raise AssertionError("unreachable")

    def _nested_in(self) -> Member | None:
        """Return the enclave whose ocall this thread's handler answers, if it is of this pool."""
        found = _inside.get()
        return found[1].member if found is not None and found[0] is self else None

    def _run(self, ticket: Ticket, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._handles:
            return function(*args, **kwargs)
        token = _inside.set((self, ticket))
        try:
            return function(*args, **kwargs)
        finally:
            _inside.reset(token)

    def _with_options(self, handle: Enclave, options: Options) -> Any:
        functions = handle._running().functions  # noqa: SLF001 - of the same package
        return functions if options is NO_OPTIONS else functions.with_options(options)

    def _acquire(self, ticket: Ticket, deadline: float | None) -> Member:
        """Wait until *ticket* has an enclave; whatever happens, the caller gives it back."""
        while True:
            gate = None
            with self._lock:
                if not self._book.take(ticket):
                    if deadline is None and self._book.waits_for_itself(threading.get_ident()):
                        raise BusyError(SELF, advice="End one first, or make the pool larger.")
                    gate = threading.Lock()
                    gate.acquire()
                    ticket.wake, ticket.since = gate.release, time.monotonic()
            if gate is not None:
                self._poke()
                self._await(ticket, gate, deadline)
            member = ticket.member
            if member is None:
                raise AssertionError("it waited for nothing")
            # One that was killed since is found here, before anything is sent to it.
            try:
                member.handle._running().guard()  # noqa: SLF001 - of the same package
            except EnclaveError as error:
                self._lose(member, error)
                with self._lock:
                    self._book.forget(ticket, time.monotonic())
                self._poke()
                continue
            return member

    def _await(self, ticket: Ticket, gate: threading.Lock, deadline: float | None) -> None:
        while ticket.waits:
            left = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
            if left > 0:
                gate.acquire(timeout=left)
                continue
            with self._lock:
                if ticket.waits:
                    raise self._book.late(ticket, time.monotonic())
        if ticket.error is not None:
            raise ticket.error

    # ---- keeping ------------------------------------------------------------------------------

    def _step(self) -> tuple[float, list[int]] | None:
        """Do what is to be done; return how long nothing is, and which workers to watch."""
        with self._lock:
            self._give_late()
            if self._book.state == "closed":
                return None
            plan = self._book.plan(time.monotonic())
        for member in plan.end:
            with contextlib.suppress(*TROUBLE):
                member.handle.close()
        for _ in range(plan.launches):
            try:
                self._join(self._launch())
            except TROUBLE as error:
                self._failed(error)
        for member in plan.ask:
            if not self._answers(member, _PING_SECONDS[0]):
                spawn(lambda member=member: self._ask(member))  # type: ignore[misc]
        seconds = self._fill()
        if plan.end or plan.launches or plan.ask:
            return 0.0, []
        with self._lock:
            return min(plan.seconds, seconds), [
                member.handle._running().pidfd  # noqa: SLF001 - of the same package
                for member in self._book.members
            ]

    def _answers(self, member: Member, seconds: float) -> bool:
        """Ask for a sign of life, and write down if there was one."""
        try:
            answered: bool = member.handle.ping(PROBE, timeout=seconds) == PROBE
        except TROUBLE:
            return False
        with self._lock:
            self._book.asked(member, time.monotonic(), answered=answered)
        return True

    def _ask(self, member: Member) -> None:
        if not self._answers(member, _PING_SECONDS[1]):
            with self._lock:
                self._book.asked(member, time.monotonic(), answered=False)
        self._poke()

    def _fill(self) -> float:
        """Have warm workers replaced; return how long to wait with that, in seconds."""
        reserve = self._reserve
        if reserve is None or self._book.state != "running":
            return math.inf
        # Right after a hand-out the processor is the new enclave's, and perhaps the next one's.
        left = self._quiet_until - time.monotonic()
        if left > 0:
            return left
        # What fails here fails again, and is told, when an enclave is launched.
        with contextlib.suppress(*TROUBLE):
            # Handlers may have to do with their launch: those are looked at when there is one.
            reserve.fill(self._book.limits.warm, None if self._ocalls else self._handle_of)
        return math.inf

    def _watch(self, ended: set[int]) -> None:
        """Note which workers ended."""
        with self._lock:
            members = [
                member
                for member in self._book.members
                if member.handle._running().pidfd in ended  # noqa: SLF001
            ]
        for member in members:
            try:
                member.handle._running().guard()  # noqa: SLF001
            except EnclaveError as error:
                self._lose(member, error, began=None if member.running else False)

    def _work(self, ended: set[int]) -> tuple[float, list[int]] | None:
        """One turn of the pool's thread."""
        term = self._term
        if term is not None and term.begun:
            try:
                self.close(self._patience)
            finally:
                term.done()
            return None
        if ended:
            self._watch(ended)
        return self._step()


class PoolOptions(PoolView):
    """A pool with settings for its calls; made by ``EnclavePool.options``."""

    @overload
    def call(
        self, function: Callable[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]: ...

    @overload
    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any: ...

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`EnclavePool.call`, and CallTimeoutError when the deadline passes."""
        return self._pool._call(function, args, kwargs, self._options)  # noqa: SLF001


class _Wake:
    """What a pool's thread waits on. It is closed when nobody can use it any more."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def notify(self) -> None:
        """Wake the thread; takes no lock."""
        if os.getpid() == self._pid:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._fd, 1)

    def wait(self, seconds: float, pidfds: list[int]) -> set[int]:
        """Wait until somebody notifies or a process ends; return the processes that did."""
        poll = select.poll()
        for fd in (self._fd, *pidfds):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, min(seconds, 60.0)) * 1000)}
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        return ready - {self._fd}

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)


def _keep(pool: weakref.ref[EnclavePool], wake: _Wake) -> None:
    """Keep a pool's enclaves up, in a thread of its own, as long as the pool is there."""
    ended: set[int] = set()
    found: tuple[float, list[int]] | None
    watched: list[int] = []
    while True:
        this = pool()
        try:
            found = None if this is None else this._work(ended)  # noqa: SLF001 - of this module
        except TROUBLE as error:
            # Whatever it was, the enclaves must go on being kept.
            _log.error("a pool of enclaves has trouble: %s", type(error).__name__)
            found = _LOOK, watched
        del this
        if found is None:
            return
        watched = found[1]
        ended = wake.wait(*found)
