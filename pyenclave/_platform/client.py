"""
The host's side of the platform: find it, start it, ask it.

The platform is a process of its own. It is shared by all hosts of one user, state directory and
runtime; the first host starts it and it ends soon after the last host is gone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

import msgspec

from pyenclave._locks import Ends
from pyenclave._native import sanitizer_environment
from pyenclave._platform.endpoint import Endpoint, no_fork, not_inherited, runtime_name
from pyenclave._platform.state import State
from pyenclave._platform.taking import Taking
from pyenclave._platform.wire import raise_failure
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    PlatformUnavailableError,
)
from pyenclave.formats import messages
from pyenclave.formats.lock import Roots

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

__all__ = ["PlatformClient", "local_platform_root"]

_ROOT_FILE: Final = "platform-root.pem"
_START_TIMEOUT: Final = 10.0  # seconds until a new platform answers
_ANSWER_TIMEOUT: Final = 10.0
# A first launch hashes and imports the runtime's whole lock list in a new zygote.
_LAUNCH_TIMEOUT: Final = 60.0
_ATTEMPTS: Final = 3
# A warm worker is handed out in less time than it takes to wake a process that sleeps.
# Seconds to look for the answer to a hand-out before sleeping: only with a processor to spare, for
# the platform and the worker need one each.
_SPIN: Final = 0.0005 if len(os.sched_getaffinity(0)) > 2 else 0.0
# An answer that is announced follows in a fraction of this; meanwhile the platform only waits.
_SOON: Final = 0.001 if len(os.sched_getaffinity(0)) > 1 else 0.0
_ANNOUNCED: Final = (messages.Launch, messages.Take)
_MAX_LOG: Final = 256 * 1024
# The platform must not be the host's child for ever (nobody may wait for it), so a first process
# makes it and ends. Nothing but built-in modules is imported before the fork.
_BOOTSTRAP: Final = (
    "import gc, os, sys\n"
    "if os.fork(): os._exit(0)\n"
    "gc.disable()\n"  # until all is imported
    "sys.path[:] = sys.argv[2:]\n"
    "from pyenclave._platform.main import main\n"
    "main(sys.argv[1])\n"
)
# Isolated like a zygote, but nobody measures the platform: cached bytecode is as good as the
# sources beside it, and compiling those would be most of its start.
# Nobody has it run a script by writing into it either (PEP 768).
_FLAGS: Final = ("-I", "-S", "-X", "utf8", "-X", "disable-remote-debug")
_ENVIRONMENT: Final = (
    "HOME",
    "LANG",
    "LC_ALL",
    "PATH",
    "PYENCLAVE_BREAKPOINT_WAIT",
    "TMPDIR",
    "TZ",
)

_Fds = list[int]  # inside the class, ``list`` is a method
_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a new platform is told, as JSON in its arguments; nothing in it is secret."""

    state: str
    channel: int
    executable: str
    runtime: str
    roots: Roots
    # What the first launch will need, if that is known: a lock's digest, and whether as debug.
    expect: bytes = b""
    debug: bool = False
    # The folder below which devices of a TEE are looked for.
    devices: str = "/"
    # Azure's metadata service, if it is not at its usual address.
    imds: str = ""


class PlatformClient:
    """
    A connection to the platform. Thread-safe; one request is under way at a time.

    Not for use after a fork: the child's copies are closed and raise EnclaveStateError.

    Attributes:
        hello: Who the platform is.

    """

    def __init__(self, channel: Channel, hello: messages.HelloReply) -> None:
        self.hello = hello
        self._channel = channel
        self._ends = Ends()
        self._lock = self._ends.lock
        self._pid = os.getpid()
        self._closed = False
        self._taking: Taking | None = None  # whose answer is the next that comes
        _clients.add(self)

    @classmethod
    def connect(
        cls,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        start: bool = True,
        expect: tuple[bytes, bool] | None = None,
    ) -> Self:
        """
        Connect to the platform of this user, starting it if it does not run.

        Args:
            state_dir: The state directory; None for ``PYENCLAVE_STATE`` or the default.
            start: Start a platform if none runs.
            expect: The digest of the lock that will be launched, and whether as debug, so that a
                platform that is started can begin with it at once.

        Raises:
            PlatformUnavailableError: There is none and it was not to be or could not be started,
                it does not answer, or the state directory is in disorder.

        """
        path = None if state_dir is None else os.fsdecode(state_dir)
        roots = Roots.of_this_process()
        runtime = runtime_name(sys.executable, roots)
        with State.open(path, create=start) as state:
            endpoint = Endpoint(state, runtime)
            client = cls._try_connecting(endpoint)
            if client is not None:
                return client
            if not start:
                raise PlatformUnavailableError("no platform runs", advice="Start an enclave.")
            with endpoint.turn(2 * _START_TIMEOUT):
                # Only one host starts the platform; the others then find it.
                client = cls._try_connecting(endpoint)
                if client is not None:
                    return client
                config = Start(
                    state=state.path,
                    channel=-1,
                    executable=sys.executable,
                    runtime=runtime,
                    roots=roots,
                    expect=expect[0] if expect else b"",
                    debug=bool(expect and expect[1]),
                    # What is found there proves itself or is not believed by anybody.
                    devices=os.path.abspath(os.environ.get("PYENCLAVE_DEVICES") or "/"),
                    imds=os.environ.get("PYENCLAVE_IMDS", ""),
                )
                return cls._start(state, endpoint, config)

    @classmethod
    def _try_connecting(cls, endpoint: Endpoint) -> Self | None:
        for attempt in range(_ATTEMPTS):
            sock = endpoint.connect()
            aside = sock is None
            if sock is None:
                sock = endpoint.connect_abstract()
            if sock is None:
                return None
            channel = Channel(sock)
            try:
                hello = _greet(channel, _ANSWER_TIMEOUT / 2)
                if aside and hello.ephemeral and endpoint.durable:
                    # It began when nothing could be written; what is to last needs another.
                    channel.close()
                    return None
                return cls(channel, hello)
            except EnclaveLostError:
                # It was about to end; its successor may be there in a moment.
                channel.close()
                time.sleep(0.02 * (attempt + 1))
            except TimeoutError:
                channel.close()
                raise PlatformUnavailableError(
                    "the platform does not answer",
                    expected=f"a greeting within {_ANSWER_TIMEOUT / 2:g} s",
                    advice="Is it stopped? 'pyenclave ps' and the platform's log say more.",
                ) from None
            except BaseException:
                channel.close()
                raise
        return None

    @classmethod
    def _start(cls, state: State, endpoint: Endpoint, config: Start) -> Self:
        ours, theirs = not_inherited(
            lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        channel = Channel(ours)
        try:
            with theirs:
                _spawn(state, endpoint, config, theirs.fileno())
            return cls(channel, _greet(channel, _START_TIMEOUT))
        except (EnclaveLostError, TimeoutError) as error:
            channel.close()
            raise PlatformUnavailableError(
                "the platform did not start",
                expected=f"a greeting within {_START_TIMEOUT:g} s",
                found="no answer" if isinstance(error, TimeoutError) else "it ended",
                advice=f"See {state.path}/{endpoint.log_name}.",
            ) from None
        except BaseException:
            channel.close()
            raise

    def launch(
        self,
        image_fd: int,
        ring_fd: int,
        *,
        debug: bool | None = None,
        require: tuple[str, ...] = (),
        allow_ephemeral: bool | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[messages.Launched, int]:
        """
        Start an enclave.

        Args:
            image_fd: Write-sealed memfd of the image; stays the caller's.
            ring_fd: Size-sealed memfd of the ring; stays the caller's.
            debug: None: production if the image is signed, else debug.
            require: Protection bits without which the launch is refused.
            allow_ephemeral: Give data sealing keys and counters although the platform's root
                lives in memory only; None: if ``PYENCLAVE_ALLOW_EPHEMERAL`` is 1.
            meanwhile: Called once while the platform works. What it raises ends this connection:
                the platform's answer is then not read.

        Returns:
            The platform's answer and the worker's pidfd, which is the caller's.

        Raises:
            ImageError: The image is refused (SignatureError, RuntimeLockError among them).
            LaunchError: It could not be started (LaunchRefusedError, PlatformUnavailableError).
            EnclaveLostError: The platform ended.

        """
        if allow_ephemeral is None:
            allow_ephemeral = _ephemeral_allowed()
        request = messages.Launch(
            debug=debug, require=tuple(require), allow_ephemeral=allow_ephemeral
        )
        launched, fds = self._ask(
            request,
            messages.Launched,
            fds=(image_fd, ring_fd),
            timeout=_LAUNCH_TIMEOUT,
            answer_fds=1,
            meanwhile=meanwhile,
        )
        return launched, fds[0]

    def reserve(
        self,
        image_fd: int,
        *,
        debug: bool | None = None,
        require: tuple[str, ...] = (),
        allow_ephemeral: bool | None = None,
    ) -> messages.Reserved:
        """
        Name a kind of enclave, of which the platform is to keep warm workers.

        Args:
            image_fd: Write-sealed memfd of the image; stays the caller's.
            debug: As for :meth:`launch`, like the others.
            require: Protection bits without which none is handed out.
            allow_ephemeral: Sealing although the platform's root lives in memory only.

        Returns:
            The reserve, without any worker: :meth:`offer` asks for one, :meth:`take` gets one.

        Raises:
            ImageError: The image is refused.
            LaunchError: It is refused (LaunchRefusedError).
            BusyError: This host has too many reserves.

        """
        if allow_ephemeral is None:
            allow_ephemeral = _ephemeral_allowed()
        request = messages.Reserve(
            debug=debug, require=tuple(require), allow_ephemeral=allow_ephemeral
        )
        timeout = _LAUNCH_TIMEOUT
        return self._ask(request, messages.Reserved, fds=(image_fd,), timeout=timeout)[0]

    def offer(self, reserve_id: bytes, ring_fd: int) -> tuple[int, int]:
        """
        Have one more worker kept warm.

        Args:
            reserve_id: From :meth:`reserve`.
            ring_fd: Size-sealed memfd of a fresh ring, which it will serve; stays the caller's.

        Returns:
            The number of the offer, which :meth:`begin_take` names, and its worker's bell, an
            eventfd that is the caller's.

        Raises:
            BusyError: That are more than this host may have.

        """
        request = messages.Offer(reserve_id=reserve_id)
        told, fds = self._ask(request, messages.Reserved, fds=(ring_fd,), answer_fds=1)
        return told.slots[-1], fds[0]

    def withdraw(self, reserve_id: bytes, slot: int = -1) -> None:
        """End a warm worker, or (-1) all and the reserve."""
        self._ask(messages.Withdraw(reserve_id=reserve_id, slot=slot), messages.Reserved)

    def ask_reserve(self, reserve_id: bytes) -> messages.Reserved:
        """Return the state of a reserve."""
        return self._ask(messages.AskReserve(reserve_id=reserve_id), messages.Reserved)[0]

    def take(self, reserve_id: bytes) -> tuple[messages.Launched, int]:
        """
        Start an enclave of a reserve, on a ring that was offered: a warm worker if there is one.

        Args:
            reserve_id: From :meth:`reserve`.

        Returns:
            As :meth:`launch`, with the offer's number, and raises the same.

        """
        launched, fds = self._ask(
            messages.Take(reserve_id=reserve_id),
            messages.Launched,
            timeout=_LAUNCH_TIMEOUT,
            answer_fds=1,
            spin=_SPIN,
        )
        return launched, fds[0]

    def begin_take(self, reserve_id: bytes, slot: int) -> Taking:
        """
        As :meth:`take` of the offer *slot*, without waiting for the answer.

        The ring of *slot* may have a call in it from now on: nobody serves it but the enclave that
        this is about. Whatever comes of it, the offer is over.

        Raises:
            EnclaveLostError: The platform ended.
            PlatformUnavailableError: It reads nothing.

        """
        self._check_usable()
        self._check_idle()
        with self._ends, self._lock:
            self._settle()
            self._check_usable()
            request = messages.Take(reserve_id=reserve_id, slot=slot)
            try:
                self._channel.send(request, timeout=_LAUNCH_TIMEOUT)
                self._taking = Taking(self)
                return self._taking
            except BaseException as error:
                raise self._broken(error, _LAUNCH_TIMEOUT) from None

    def close_enclave(self, enclave_id: bytes) -> None:
        """End an enclave of this connection; returns when its process is gone."""
        self._ask(messages.Close(enclave_id=enclave_id), messages.Ok)

    def why(self, enclave_id: bytes) -> messages.WhyReply:
        """Return the state of an enclave of this connection, and why it ended."""
        return self._ask(messages.Why(enclave_id=enclave_id), messages.WhyReply)[0]

    def list(self) -> tuple[messages.EnclaveInfo, ...]:
        """Return the running enclaves of this platform, other hosts' included."""
        rows: tuple[messages.EnclaveInfo, ...] = ()
        while True:
            after = rows[-1].enclave_id if rows else b""
            listing = self._ask(messages.List(after=after), messages.Listing)[0]
            rows += listing.enclaves
            if not listing.more or not listing.enclaves:
                return rows

    def kill(self, enclave_id: bytes) -> None:
        """End any enclave of this platform."""
        self._ask(messages.Kill(enclave_id=enclave_id), messages.Ok)

    def attach(self, enclave_id: bytes) -> int:
        """
        Attach a debugger to a debug enclave of this platform, until this connection ends.

        Returns:
            A packet socket (``formats.debugging``), the caller's.

        Raises:
            ArgumentError: No such enclave runs.
            BusyError: Another debugger is attached.
            EnclaveStateError: It is a production enclave.

        """
        request = messages.Attach(enclave_id=enclave_id)
        return self._ask(request, messages.Attached, answer_fds=1)[1][0]

    def root(self) -> messages.RootReply:
        """Return the platform's root certificate (DER)."""
        return self._ask(messages.Root(), messages.RootReply)[0]

    def _ask(
        self,
        request: messages.Message,
        kind: type[_Answer],
        *,
        fds: tuple[int, ...] = (),
        timeout: float = _ANSWER_TIMEOUT,
        answer_fds: int = 0,
        meanwhile: Callable[[], None] | None = None,
        spin: float = 0.0,
    ) -> tuple[_Answer, _Fds]:
        self._check_usable()
        self._check_idle()
        with self._ends, self._lock:
            self._settle()
            self._check_usable()
            end = time.monotonic() + timeout
            try:
                self._channel.send(request, fds, timeout)
                if meanwhile is not None:
                    meanwhile()
                answer, received = self._channel.receive(timeout, spin=spin)
                if isinstance(answer, messages.Soon) and isinstance(request, _ANNOUNCED):
                    close_all(received)
                    left = max(0.0, end - time.monotonic())
                    answer, received = self._channel.receive(left, spin=_SOON)
            except BaseException as error:
                raise self._broken(error, timeout) from None
            return self._judge(answer, received, kind, answer_fds)

    def _settle(self, *, wait: bool = True) -> None:
        """Read the answer to what was begun before; under the lock."""
        taking = self._taking
        if taking is None:
            return
        self._taking = None
        try:
            answer, received = self._channel.receive(_LAUNCH_TIMEOUT)
            while isinstance(answer, messages.Soon):
                close_all(received)
                if not wait:
                    self._taking = taking
                    return
                answer, received = self._channel.receive(_LAUNCH_TIMEOUT, spin=_SOON)
        except BaseException as error:
            found = self._broken(error, _LAUNCH_TIMEOUT)
            taking.fail(found)
            raise found from None
        try:
            launched, fds = self._judge(answer, received, messages.Launched, 1)
        except EnclaveError as error:
            taking.fail(error)  # whoever has the next question has nothing to do with it
        else:
            taking.set(launched, fds[0])

    def _broken(self, error: BaseException, timeout: float) -> BaseException:
        """Drop the connection, in the middle of an exchange; return what to raise."""
        # The answer may still come and would be taken for that of the next request.
        self._drop()
        if isinstance(error, TimeoutError):
            return PlatformUnavailableError(
                "the platform does not answer", expected=f"an answer within {timeout:g} s"
            )
        return error

    def look_for(self, taking: Taking) -> None:
        """Read the answer to *taking* if it is there; waits for nothing."""
        got = False
        with self._ends:
            try:
                (got,) = map(self._lock.acquire, (False,))  # no Ctrl-C comes before it is told
                # If not, whoever has the lock reads it.
                if got and self._taking is taking and self._channel.readable():
                    with contextlib.suppress(EnclaveError):  # it is told of it
                        self._settle(wait=False)
            finally:
                if got:
                    self._lock.release()

    def wait_for(self, taking: Taking) -> None:
        """Read the answer to *taking*, or note in it why there is none."""
        with self._ends, self._lock:
            if self._taking is taking:
                with contextlib.suppress(EnclaveError):  # it is told of it
                    self._settle()

    def _judge(
        self, answer: messages.Message, received: _Fds, kind: type[_Answer], answer_fds: int
    ) -> tuple[_Answer, _Fds]:
        if isinstance(answer, messages.Failure):
            close_all(received)
            raise_failure(answer)
        if not isinstance(answer, kind) or len(received) != answer_fds:
            close_all(received)
            self._drop()
            raise PlatformUnavailableError(
                "the platform gave an answer to another question",
                expected=kind.__name__,
                found=type(answer).__name__,
            )
        return answer, received

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise EnclaveStateError(
                "this connection belongs to the parent process",
                expected=f"pid {self._pid}",
                found=os.getpid(),
                advice="Connect anew in the child.",
            )
        if self._closed:
            raise EnclaveClosedError("the connection to the platform is closed")

    def _check_idle(self) -> None:
        if self._ends.taken_here():
            raise EnclaveStateError(
                "this thread is in the middle of another request to the platform",
                advice="A handler of a signal or a finalizer can end an enclave then, not ask.",
            )

    @property
    def closed(self) -> bool:
        """Whether the connection was closed, by us or by a failure."""
        return self._closed

    @property
    def lost(self) -> bool:
        """Whether the connection is of no more use: closed here, or the platform ended."""
        try:
            poll = select.poll()
            poll.register(self._channel, 0)
            return self._closed or bool(poll.poll(0))
        except (OSError, ValueError):
            return True  # closed by another thread just now

    def _drop(self) -> None:
        self._closed = True
        self._channel.close()
        taking, self._taking = self._taking, None
        if taking is not None:
            taking.fail(EnclaveLostError("the connection to the platform was closed"))

    def close(self) -> None:
        """
        Close the connection; its enclaves end. May be called twice.

        In the middle of an exchange of this thread it closes after that.
        """
        if self._pid == os.getpid():
            self.leave(self._close)

    def _close(self) -> None:
        with self._ends, self._lock:
            self._drop()

    def leave(self, work: Callable[[], object]) -> None:
        """
        Do *work*, which ends something: after this thread's exchange if it is in one.

        Whatever the platform: of two threads in two exchanges each would wait for the other's.
        """
        for client in _exchanging():
            if client is not self:
                client._ends.end(functools.partial(self.leave, work))  # noqa: SLF001 - the same class
                return
        self._ends.end(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        # Without this the child's copy would keep the enclaves alive after the host is gone.
        self._closed = True
        self._channel.close()
        self._ends.forget()


_clients: weakref.WeakSet[PlatformClient] = weakref.WeakSet()


def _exchanging() -> list[PlatformClient]:
    """Return the connections in whose exchange this thread is."""
    while True:
        try:
            return [client for client in list(_clients) if client._ends.taken_here()]  # noqa: SLF001
        except RuntimeError:  # another thread made one just now
            continue


def _close_inherited() -> None:
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_close_inherited)


def local_platform_root() -> Certificate:
    """
    Return the root certificate of this user's platform: what a relying party enrols.

    The certificate is read from the state directory; only where it is not there yet a platform is
    started, which writes it. Enrolling it trusts this user's account on this machine, no hardware.

    Raises:
        PlatformUnavailableError: The state directory is in disorder, or no platform starts.

    """
    from cryptography import x509

    with State.open() as state:
        if state.exists and state.read_file("root", limit=4096) is not None:
            pem = state.read_file(_ROOT_FILE, limit=16 * 1024)
            if pem is not None:
                try:
                    return x509.load_pem_x509_certificate(pem)
                except ValueError:
                    pass  # the platform writes it anew
    with PlatformClient.connect() as client:
        return x509.load_der_x509_certificate(client.root().certificate)


def _ephemeral_allowed() -> bool:
    return os.environ.get("PYENCLAVE_ALLOW_EPHEMERAL") == "1"


def _greet(channel: Channel, timeout: float) -> messages.HelloReply:
    channel.send(messages.Hello())
    answer, fds = channel.receive(timeout)
    close_all(fds)
    if isinstance(answer, messages.Failure):
        raise_failure(answer)
    if not isinstance(answer, messages.HelloReply) or answer.version != messages.FORMAT_VERSION:
        raise PlatformUnavailableError(
            "the platform speaks another version",
            expected=messages.FORMAT_VERSION,
            found=getattr(answer, "version", type(answer).__name__),
        )
    return answer


def _spawn(state: State, endpoint: Endpoint, config: Start, channel_fd: int) -> None:
    told = msgspec.json.encode(msgspec.structs.replace(config, channel=channel_fd)).decode()
    flags = (*_FLAGS, *(["-B"] if sys.dont_write_bytecode else []))
    command = [sys.executable, *flags, "-c", _BOOTSTRAP, told, *config.roots.path]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= sanitizer_environment()
    log = _open_log(state, endpoint)
    try:
        # Popen waits for the end of a pipe of which a child forked meanwhile would have a copy.
        with no_fork:
            first = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if log is None else log,
                env=environment,
                cwd="/",
                pass_fds=(channel_fd,),
                start_new_session=True,
            )
    except OSError as error:
        raise PlatformUnavailableError(
            f"{sys.executable} cannot be started: {error.strerror}"
        ) from None
    finally:
        if log is not None:
            os.close(log)
    try:
        first.wait(_START_TIMEOUT)
    except subprocess.TimeoutExpired:
        first.kill()
        first.wait()
        raise PlatformUnavailableError(
            "the platform did not start", expected=f"a process within {_START_TIMEOUT:g} s"
        ) from None


def _open_log(state: State, endpoint: Endpoint) -> int | None:
    if not state.writable:
        return None
    try:
        fd = state.open_file(endpoint.log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError:
        return None
    if os.fstat(fd).st_size > _MAX_LOG:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
    return fd
