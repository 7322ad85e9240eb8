"""
What the pools for threads and for asyncio have in common: all that neither waits nor launches.

Who calls holds a :class:`~pyenclave.host._book.Ticket`, and says in the end what became of the
call; what follows from that is decided here, once for both.
"""

from __future__ import annotations

import functools
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypedDict

from pyenclave._locks import RLock
from pyenclave.calls.stats import registry
from pyenclave.errors import (
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    LaunchError,
)
from pyenclave.host import _fork, _images, _room
from pyenclave.host._base import DEFAULT_QUEUE, Handle, NoSuchAttributeError
from pyenclave.host._book import Book, Member, Ticket
from pyenclave.host._limits import Limits, PoolStats
from pyenclave.host._ocalls import Handlers
from pyenclave.host._options import NO_OPTIONS, Options
from pyenclave.host._reserve import Reserve
from pyenclave.host._run import read_image
from pyenclave.host._sigterm import Term

if TYPE_CHECKING:
    from pyenclave.calls.signature import Signature

__all__ = ["PROBE", "RETRIES", "SELF", "TROUBLE", "PoolArguments", "PoolBase", "PoolView"]

RETRIES: Final = 3  # of a call whose enclave was lost before it began, each time another one
PROBE: Final = b"pool"
#: What can go wrong where an enclave is started or asked, of whatever the system lacks.
TROUBLE: Final = (EnclaveError, OSError, RuntimeError, MemoryError)
SELF: Final = (
    "this thread itself has every enclave of the pool: it has streams open, or enclaves alone"
)
_NO_WAIT: Final = 0.99  # of a deadline that is left counts as all of it
_VIEWS: Final = 16  # sets of options that an enclave keeps functions for


class PoolArguments(TypedDict, total=False):
    """The keyword arguments of every pool."""

    size: int
    max_size: int | None
    warm: int
    queue: int
    max_calls: int | None
    max_age: float | None
    shrink_after: float
    health: float
    stuck_after: float
    give_up: int
    max_fresh: int
    debug: bool | None
    require: tuple[str, ...] | list[str]
    state: str | os.PathLike[str] | None
    quiet: bool
    ocalls: Handlers | None


class PoolBase(ABC):
    """A pool's arguments, its book, and what becomes of calls."""

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
        self._settings: dict[str, Any] = {"debug": debug, "require": require, "state": state}
        self._ocalls = ocalls
        self._make(image, quiet=quiet)  # it checks its arguments, and is never started
        self._settings["require"] = tuple(require)
        self._source = image
        self._quiet = quiet
        self._data = b""
        self._threads = 1
        self._handles = False  # whether there are ocalls, in whose handlers the pool may be called
        self._signatures: Mapping[str, Signature] = {}
        self._pid = os.getpid()
        self._book = Book(limits, random.random)  # jitter only: nothing secret depends on it
        # Taken by `with` alone: between having it and the block no Ctrl-C can come.
        self._lock = RLock()
        self._later: deque[Ticket] = deque()
        self._reserve: Reserve | None = None
        self._term: Term | None = None
        _fork.watch(self)

    # ---- what differs -------------------------------------------------------------------------

    @abstractmethod
    def _make(self, image: Any, *, quiet: bool) -> Handle:
        """Make the handle of one enclave, not started."""

    @abstractmethod
    def _poke(self) -> None:
        """Have whoever keeps the enclaves look at the book; from any thread, without a lock."""

    @abstractmethod
    def _call(
        self,
        function: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
    ) -> Any:
        """Call a function in one of the enclaves."""

    @abstractmethod
    def _with_options(self, handle: Any, options: Options) -> Any:
        """Return what calls with these options are made through."""

    # ---- life ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._check_process()
        with self._lock:
            if self._book.state != "new":
                raise EnclaveStateError("the pool was started already")
            self._book.state = "running"

    def _read(self) -> bytes:
        return read_image(self._source)

    def _prepare(self) -> int:
        """Read the image; return how many enclaves to launch."""
        self._data = self._read()
        image = _images.prepare(self._data)
        self._threads = image.info.threads
        _room.check(self._book.limits, self._threads, self._settings["state"])
        self._handles = bool(image.ocalls)
        self._signatures = {item.name: item for item in image.signatures}
        self._book.queue.name = image.info.name
        registry.add_queue(self._book.queue, self)
        if self._book.limits.warm:
            self._reserve = Reserve(self._data, queue=DEFAULT_QUEUE, **self._settings)
        with self._lock:
            return self._book.plan(time.monotonic()).launches

    def _new(self, *, quiet: bool) -> Any:
        """Make a handle whose enclave comes from the reserve."""
        handle = self._make(self._data, quiet=quiet)
        handle._reserve = self._reserve  # noqa: SLF001 - of the same package
        return handle

    def _joined(self, handle: Any, lanes: Any) -> Member | None:
        """Write down an enclave that was launched; None: it is not wanted any more."""
        now = time.monotonic()
        threads = self._threads  # the pool itself must not be referred to

        def late() -> int:
            try:
                busy: int = lanes.busy
            except EnclaveError:
                return threads  # it broke the protocol and is being ended: its pidfd tells
            return busy

        member = Member(handle=handle, lanes=threads, late=late, started=now)
        with self._lock:
            return member if self._book.joined(member, now) else None

    def _failed(self, error: BaseException) -> None:
        """Write down a launch that failed."""
        if not isinstance(error, EnclaveError):
            error = LaunchError(f"the host has not what an enclave takes: {error}")
        with self._lock:
            self._book.failed(error, time.monotonic())

    def _end_fresh(
        self, token: object, handle: Handle | None, error: BaseException | None = None
    ) -> None:
        """An enclave of ``enclave(fresh=True)`` is over, or never was; may be called twice."""
        why = error if isinstance(error, EnclaveError) else None
        run = None if handle is None else handle._run  # noqa: SLF001 - of the same package
        with self._lock:
            self._book.end_fresh(
                token,
                refused=why is not None if run is None else not run.known,
                lost=run is not None and run.launch.state in ("lost", "poisoned"),
                error=why,
            )
        self._poke()

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
        was set before runs at once as well (a server's own, that ends its work in its way, also
        one of an event loop); where the signal would have ended the process, it does so once the
        pool is closed, and every other pool that was asked this. A second signal ends it at once.

        Args:
            timeout: Seconds for calls under way.

        Raises:
            EnclaveStateError: The caller is not the main thread, which alone may set handlers, or
                the pool is not started.

        """
        self._check_process()
        with self._lock:
            self._book.check()
        self._patience = timeout
        if self._term is None:
            self._term = Term(self)

    @property
    def _over(self) -> bool:
        return self._book.state == "closed"

    def _told_to_end(self) -> None:
        self._book.ending = True  # a signal handler takes no lock
        self._poke()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "this pool belongs to the process that made it, not to a forked child",
                advice="Make the pool after forking, in each worker.",
            )

    def _after_fork(self) -> None:
        """In a forked child: one that was not started yet is the child's own from now on."""
        self._lock = RLock()  # a thread of the parent may have held it
        if self._book.state == "new":
            self._pid = os.getpid()

    # ---- use ----------------------------------------------------------------------------------

    @property
    def stats(self) -> PoolStats:
        """What the pool is doing, and what was counted; also after it was closed."""
        with self._lock:
            return self._book.stats()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._attribute(name, NO_OPTIONS)

    def _attribute(self, name: str, options: Options) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._book.state == "new":
            raise EnclaveClosedError(
                "the pool is not started", advice="Use it in a `with` block, or call start()."
            )
        signature = self._signatures.get(name)
        if signature is None:
            raise NoSuchAttributeError(
                f"the enclaves have no function {name!r}",
                advice=f"They have: {', '.join(self._signatures) or 'none'}.",
            )
        function: Any = self._function(name, signature, options)
        function.__name__ = function.__qualname__ = name
        function.__doc__ = str(signature)
        made: Callable[..., Any] = function
        return made

    def _function(self, name: str, signature: Signature, options: Options) -> Callable[..., Any]:
        @functools.wraps(self._call, assigned=())
        def function(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs, options)

        return function

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._signatures])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")

    def __repr__(self) -> str:
        stats = self.stats
        kind = type(self).__name__
        return f"<{kind}, {stats.state}, {stats.enclaves} enclaves, {stats.running} calls>"

    # ---- calls --------------------------------------------------------------------------------

    def _end_call(self, ticket: Ticket, error: BaseException | None, *, last: bool = True) -> bool:
        """
        A call is over, or was never made: give its place back.

        Args:
            ticket: Its ticket.
            error: What it raised.
            last: It is not to be made again.

        Returns:
            Whether it is: its enclave was lost before it began.

        """
        again = False
        if error is None:
            self._give(ticket, answered=True)
            return False
        member = ticket.member
        if isinstance(error, EnclaveLostError | EnclavePoisonedError) and member is not None:
            # Of the first, True or None: nobody knows that it did not begin.
            began = getattr(error, "started", True) is not False
            again = not began and not last
            self._lose(member, error, began=began)
            if again:
                with self._lock:
                    self._book.again()
        answered = isinstance(error, EcallError)
        self._give(ticket, answered=answered, gave_up=not answered)
        return again

    def _give(self, ticket: Ticket, *, answered: bool = False, gave_up: bool = False) -> None:
        """Give back a place, for which *ticket* may have waited yet; may be done twice."""
        if self._lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001
            # A finalizer, that came while this very thread is in the book.
            self._later.append(ticket)
            self._poke()
            return
        member = ticket.member
        with self._lock:
            self._book.give(ticket, time.monotonic(), answered=answered, gave_up=gave_up)
        if gave_up or (member is not None and member.leaving):
            self._poke()

    def _give_late(self) -> None:
        """Give back what finalizers left. Under the lock."""
        while self._later:
            self._book.give(self._later.popleft(), time.monotonic(), gave_up=True)

    def _lose(self, member: Member, error: EnclaveError, *, began: bool | None = False) -> None:
        with self._lock:
            self._book.lost(member, error, time.monotonic(), began=began)
        self._poke()

    def _view(self, member: Member, options: Options, deadline: float | None) -> Any:
        """Return what a call that begins now is made through."""
        left = math.inf if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise CallTimeoutError("the deadline passed before the call could begin")
        if options.timeout is not None and left < _NO_WAIT * options.timeout:
            # It waited for an enclave, and has less than the whole time.
            return self._with_options(member.handle, replace(options, timeout=left))
        view = member.views.get(options)
        if view is None:
            view = self._with_options(member.handle, options)
            # One request's id is not another's: nothing to keep.
            if options.correlation is None and len(member.views) < _VIEWS:
                member.views[options] = view
        return view


class PoolView:
    """A pool with settings for its calls; made by ``options``."""

    def __init__(self, pool: PoolBase, options: Options) -> None:
        self._pool = pool
        self._options = options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._pool._attribute(name, self._options)  # noqa: SLF001 - of this module

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool of enclaves cannot be pickled or copied")
