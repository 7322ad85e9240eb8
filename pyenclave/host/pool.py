"""
A pool of enclaves of one image, for threads.

Calls go to whichever enclave has a thread free. An enclave that is lost is replaced by a warm
worker; a call whose enclave was lost before it began is made again, one that may have begun never.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn, Self

from pyenclave.calls.signature import Signature
from pyenclave.calls.stats import registry
from pyenclave.errors import (
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    LaunchError,
)
from pyenclave.host import _images
from pyenclave.host._base import DEFAULT_QUEUE, NoSuchAttributeError, find
from pyenclave.host._book import Book, Limits, Member, PoolStats, Ticket
from pyenclave.host._ocalls import Handlers
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._reserve import Reserve
from pyenclave.host._run import read_image
from pyenclave.host.enclave import Enclave
from pyenclave.host.handle import Functions

__all__ = ["EnclavePool", "PoolStats"]

_PING_SECONDS = 5.0
_SLICE = 0.1
_QUIET = 0.02  # seconds after a hand-out in which none is replaced
_RETRIES = 3  # of a call whose enclave was lost before it began, each time another one
_NO_WAIT = 0.99  # of a deadline that is left counts as all of it
_VIEWS = 16  # sets of options that an enclave keeps functions for
_PROBE = b"pool"


class EnclavePool:
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

    def __init__(
        self,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        size: int = 2,
        max_size: int | None = None,
        warm: int = 1,
        queue: int = 1024,
        max_calls: int | None = None,
        max_age: float | None = None,
        shrink_after: float = 60.0,
        health: float = 10.0,
        stuck_after: float = 30.0,
        give_up: int = 8,
        max_fresh: int = 32,
        debug: bool | None = None,
        require: tuple[str, ...] | list[str] = (),
        state: str | os.PathLike[str] | None = None,
        quiet: bool = False,
        ocalls: Handlers | None = None,
    ) -> None:
        limits = Limits(
            size=size,
            max_size=size if max_size is None else max_size,
            warm=warm,
            queue=queue,
            max_calls=max_calls,
            max_age=max_age,
            shrink_after=shrink_after,
            health=health,
            stuck_after=stuck_after,
            give_up=give_up,
            max_fresh=max_fresh,
        )
        # The handle checks its arguments; it is never started.
        Enclave(image, debug=debug, require=require, state=state, quiet=quiet, ocalls=ocalls)
        self._source = image
        self._data = b""
        self._signatures: dict[str, Signature] = {}
        self._threads = 1
        self._settings: dict[str, Any] = {
            "debug": debug,
            "require": tuple(require),
            "state": state,
        }
        self._quiet = quiet
        self._ocalls = ocalls
        self._pid = os.getpid()
        # Jitter only: nothing secret depends on it.
        self._book = Book(limits, random.random)
        self._lock = threading.Condition()
        self._reserve: Reserve | None = None
        self._wake: _Wake | None = None
        self._quiet_until = 0.0
        self._term: _Term | None = None

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

    def start(self) -> Self:
        """
        Launch the enclaves; returns when all of them run.

        Raises:
            ImageError: The image is refused.
            LaunchError: An enclave could not be started. None is left behind.
            EnclaveStateError: The pool was started before.

        """
        self._check_process()
        with self._lock:
            if self._book.state != "new":
                raise EnclaveStateError("the pool was started already")
            self._book.state = "running"
        try:
            self._data = read_image(self._source)
            image = _images.prepare(self._data)
            self._threads = image.info.threads
            self._signatures = {item.name: item for item in image.signatures}
            self._book.queue.name = image.info.name
            registry.add_queue(self._book.queue, self)
            if self._book.limits.warm:
                self._reserve = Reserve(self._data, queue=DEFAULT_QUEUE, **self._settings)
            with self._lock:
                count = self._book.plan(time.monotonic()).launches
            for done in range(count):
                try:
                    self._join(self._launch(quiet=self._quiet or done > 0))
                except EnclaveError as error:
                    with self._lock:
                        self._book.failed(error, time.monotonic())
                    raise
            self._start_keeper()
        except BaseException:
            self.close()
            raise
        return self

    def _launch(self, *, quiet: bool = True) -> Enclave:
        handle = Enclave(self._data, quiet=quiet, ocalls=self._ocalls, **self._settings)
        handle._reserve = self._reserve  # noqa: SLF001 - of the same package
        return handle.start()

    def _join(self, handle: Enclave) -> None:
        run = handle._running()  # noqa: SLF001 - of the same package
        lanes = run.lanes
        now = time.monotonic()
        member = Member(handle=handle, lanes=self._threads, late=lambda: lanes.busy, started=now)
        with self._lock:
            wanted = self._book.joined(member, now)
        if not wanted:
            handle.close()

    def _start_keeper(self) -> None:
        try:
            wake = _Wake()
        except OSError as error:
            raise LaunchError(f"the pool cannot watch its enclaves: {error.strerror}") from None
        thread = threading.Thread(
            target=_keep, args=(weakref.ref(self), wake), name="pyenclave-pool", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            raise LaunchError(f"the pool cannot watch its enclaves: {error}") from None
        self._wake = wake
        weakref.finalize(self, wake.notify)  # so that the thread sees that this object is gone

    def drain(self, timeout: float | None = None) -> bool:
        """
        Take no new calls, and wait for those under way.

        Args:
            timeout: Seconds, or None to wait as long as they take.

        Returns:
            Whether all ended in time; those that did not go on until :meth:`close`.

        """
        self._check_process()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._book.drain()
            while self._book.busy and self._book.state == "draining":
                left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._lock.wait(left)
        return True

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
            members = self._book.close()
            self._lock.notify_all()
        self._poke()
        for member in members:
            member.handle.close()
        if self._reserve is not None:
            self._reserve.close()
        if self._term is not None:
            self._term.forget()

    def restart(self) -> None:
        """Try to start enclaves again after the pool gave up."""
        self._check_process()
        with self._lock:
            self._book.restart()
        self._poke()

    def close_on_sigterm(self, timeout: float = 10.0) -> None:
        """
        Drain and close this pool when the process gets SIGTERM, then do what was done before.

        New calls are refused at once, and those under way have *timeout* seconds. A handler that
        was set before runs at once as well (a server's own, that ends its work in its way); where
        the signal would have ended the process, it does so once the pool is closed.

        Args:
            timeout: Seconds for calls under way.

        Raises:
            EnclaveStateError: The caller is not the main thread, which alone may set handlers, or
                the pool is not started.

        """
        self._check_process()
        if threading.current_thread() is not threading.main_thread():
            raise EnclaveStateError(
                "handlers of signals are set in the main thread",
                advice="Call it where the program starts, or close() from a handler of yours.",
            )
        with self._lock:
            self._book.check()
        if self._term is None:
            self._term = _Term(self, timeout)

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

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "this pool belongs to the process that made it, not to a forked child",
                advice="Make the pool after forking, in each worker.",
            )

    def _poke(self) -> None:
        if self._wake is not None:
            self._wake.notify()

    # ---- use ----------------------------------------------------------------------------------

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        Call a trusted function in one of the enclaves.

        Args:
            function: As for ``Enclave.call``, like the rest.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            BusyError: Too many calls wait.
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
            BusyError: Too many wait, or too many fresh enclaves are in use.
            CallTimeoutError: None came free in time.
            EnclaveError: As :meth:`call`.

        """
        self._check_process()
        if fresh:
            with self._fresh() as one:
                yield one
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        member = self._acquire(deadline, alone=True)
        handle: Enclave = member.handle
        try:
            yield handle
        except BaseException:
            self._release(member, gave_up=True)
            raise
        self._release(member)

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Enclave]:
        with self._lock:
            self._book.check()
            self._book.take_fresh()
        try:
            self._quiet_until = time.monotonic() + _QUIET
            handle = self._launch()
            try:
                yield handle
            finally:
                handle.close()
        finally:
            with self._lock:
                self._book.fresh -= 1
                self._lock.notify_all()
            self._poke()

    @property
    def stats(self) -> PoolStats:
        """What the pool is doing, and what was counted; also after it was closed."""
        with self._lock:
            return self._book.stats()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _attribute(self, name, NO_OPTIONS)

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._signatures])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")

    def __repr__(self) -> str:
        stats = self._book.stats()
        return f"<EnclavePool, {stats.state}, {stats.enclaves} enclaves, {stats.running} calls>"

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
        begun = time.monotonic()
        deadline = None if options.timeout is None else begun + options.timeout
        for left in range(_RETRIES, -1, -1):
            member = self._acquire(deadline)
            gave_up = False
            try:
                functions = _functions(member, options, deadline)
                return find(functions, function)(*args, **kwargs)
            except EnclaveLostError as error:
                self._lose(member, error)
                # None or True: nobody knows that it did not begin.
                if error.started is not False or left == 0:
                    raise
                with self._lock:
                    self._book.again()
            except EnclavePoisonedError as error:
                self._lose(member, error)
                raise
            except (CallTimeoutError, KeyboardInterrupt, SystemExit):
                gave_up = True
                raise
            finally:
                self._release(member, gave_up=gave_up)
        raise AssertionError("unreachable")

    def _acquire(self, deadline: float | None, *, alone: bool = False) -> Member:
        """Return an enclave with a thread for the caller, waiting for one."""
        while True:
            with self._lock:
                now = time.monotonic()
                member = self._book.take(now, alone=alone)
                ticket = None
                if member is None:
                    gate = threading.Lock()
                    gate.acquire()
                    ticket = Ticket(wake=gate.release, since=now, alone=alone)
                    self._book.wait(ticket)
            if ticket is not None:
                self._poke()
                member = self._await(ticket, gate, deadline)
            if member is None:
                continue
            # One that was killed since is found here, before anything is sent to it.
            try:
                member.handle._running().guard()  # noqa: SLF001 - of the same package
            except EnclaveError as error:
                self._lose(member, error)
                self._release(member)
                continue
            except BaseException:
                self._release(member)
                raise
            return member

    def _await(self, ticket: Ticket, gate: threading.Lock, deadline: float | None) -> Member | None:
        try:
            while True:
                left = _SLICE if deadline is None else min(_SLICE, deadline - time.monotonic())
                if left <= 0 or gate.acquire(timeout=left):
                    break
        except BaseException:
            with self._lock:
                self._book.forget(ticket, time.monotonic())
            raise
        with self._lock:
            if ticket.error is not None:
                raise ticket.error
            if ticket.member is None:
                raise self._book.late(ticket, time.monotonic())
            return ticket.member

    def _release(self, member: Member, *, gave_up: bool = False) -> None:
        with self._lock:
            self._book.give(member, time.monotonic(), gave_up=gave_up)
            draining = self._book.state == "draining"
            if draining:
                self._lock.notify_all()
        if member.leaving or gave_up:
            self._poke()

    def _lose(self, member: Member, error: EnclaveError) -> None:
        with self._lock:
            self._book.lost(member, error, time.monotonic())
        self._poke()

    # ---- keeping ------------------------------------------------------------------------------

    def _step(self) -> tuple[float, list[int]] | None:
        """Do what is to be done; return how long nothing is, and which workers to watch."""
        with self._lock:
            if self._book.state == "closed":
                return None
            plan = self._book.plan(time.monotonic())
        for member in plan.end:
            member.handle.close()
        for _ in range(plan.launches):
            try:
                self._join(self._launch())
            except EnclaveError as error:
                with self._lock:
                    self._book.failed(error, time.monotonic())
        for member in plan.ask:
            self._ask(member)
        seconds = self._fill()
        if plan.end or plan.launches or plan.ask:
            return 0.0, []
        with self._lock:
            return min(plan.seconds, seconds), [
                member.handle._running().pidfd  # noqa: SLF001 - of the same package
                for member in self._book.members
            ]

    def _ask(self, member: Member) -> None:
        answered = False
        with contextlib.suppress(EnclaveError):
            answered = member.handle.ping(_PROBE, timeout=_PING_SECONDS) == _PROBE
        with self._lock:
            self._book.asked(member, time.monotonic(), answered=answered)

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
        with contextlib.suppress(EnclaveError, OSError):
            reserve.fill(self._book.limits.warm)
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
                self._lose(member, error)


class PoolOptions:
    """A pool with settings for its calls; made by ``EnclavePool.options``."""

    def __init__(self, pool: EnclavePool, options: Options) -> None:
        self._pool = pool
        self._options = options

    def call(self, function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`EnclavePool.call`, and CallTimeoutError when the deadline passes."""
        return self._pool._call(function, args, kwargs, self._options)  # noqa: SLF001

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _attribute(self._pool, name, self._options)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")


class _Term:
    """What SIGTERM does for one pool."""

    def __init__(self, pool: EnclavePool, timeout: float) -> None:
        self._pool = weakref.ref(pool)
        self._timeout = timeout
        self._begun = False
        self._mine = self._handle  # one object, so that it can be recognised
        self._before = signal.signal(signal.SIGTERM, self._mine)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Python runs this between two steps of the main thread, which may hold any lock: so it
        # takes none, and a thread that was started before does the work.
        pool = self._pool()
        before = self._before
        if pool is not None and not self._begun:
            self._begun = True
            pool._poke()  # noqa: SLF001 - of this module
        elif before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if callable(before):
            before(number, frame)

    def work(self, pool: EnclavePool) -> bool:
        """Do it, in the pool's thread, if the signal came; whether it did."""
        if not self._begun:
            return False
        pool.close(self._timeout)
        if self._before is signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)  # comes to the handler again, and ends us
        return True

    def forget(self) -> None:
        """Give the signal back, where that is still possible."""
        if (
            not self._begun
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is self._mine
        ):
            signal.signal(signal.SIGTERM, self._before)


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
    while True:
        this = pool()
        if this is None or (this._term is not None and this._term.work(this)):  # noqa: SLF001
            return
        if ended:
            this._watch(ended)  # noqa: SLF001 - of this module
        found = this._step()  # noqa: SLF001
        del this
        if found is None:
            return
        ended = wake.wait(*found)


def _functions(member: Member, options: Options, deadline: float | None) -> Functions:
    """Return the functions of an enclave for a call that begins now."""
    functions: Functions = member.handle._running().functions  # noqa: SLF001 - same package
    if options is NO_OPTIONS:
        return functions
    left = math.inf if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise CallTimeoutError("the deadline passed before the call could begin")
    if options.timeout is not None and left < _NO_WAIT * options.timeout:
        # It waited for an enclave, and has less than the whole time.
        return functions.with_options(Options(timeout=left, kill_after=options.kill_after))
    view: Functions | None = member.views.get(options)
    if view is None:
        view = functions.with_options(options)
        if len(member.views) < _VIEWS:
            member.views[options] = view
    return view


def _attribute(pool: EnclavePool, name: str, options: Options) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    if pool._book.state == "new":  # noqa: SLF001 - of this module
        raise EnclaveClosedError(
            "the pool is not started", advice="Use it in a `with` block, or call start()."
        )
    signature = pool._signatures.get(name)  # noqa: SLF001
    if signature is None:
        raise NoSuchAttributeError(
            f"the enclaves have no function {name!r}",
            advice=f"They have: {', '.join(pool._signatures) or 'none'}.",  # noqa: SLF001
        )

    @functools.wraps(_attribute, assigned=())
    def function(*args: Any, **kwargs: Any) -> Any:
        return pool._call(name, args, kwargs, options)  # noqa: SLF001

    function.__name__ = function.__qualname__ = name
    function.__doc__ = str(signature)
    return function
