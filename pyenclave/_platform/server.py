"""
The platform at work: hosts, and what they ask for.

One thread accepts; each host and each worker has a thread of its own, so that a slow or hostile
one holds up nobody else. Everything that grows has a limit. The process ends soon after its last
host, and whatever it started ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

from pyenclave._platform.candidate import Candidate, WorkerGoneError
from pyenclave._platform.diagnostics import log
from pyenclave._platform.endpoint import peer_pid, peer_uid
from pyenclave._platform.held import HeldImages
from pyenclave._platform.launch import Launcher, Wish
from pyenclave._platform.policy import LaunchPolicy, load_policy
from pyenclave._platform.reserves import Reserves
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.service import Enclave, Services
from pyenclave._platform.state import State
from pyenclave._platform.traffic import Traffic
from pyenclave._platform.wire import failure_of
from pyenclave.calls.channel import Channel, close_all
from pyenclave.calls.errors import cut
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    PlatformUnavailableError,
)
from pyenclave.formats import messages

__all__ = ["Server"]

MAX_HOSTS: Final = 512  # a server of many cores has several workers for each
MAX_ENDED: Final = 256  # per host: enclaves whose end is remembered
_MAX_NAME: Final = 64  # bytes of an enclave's name in a listing
_IDLE_GRACE: Final = 0.4  # seconds without a host until the platform ends
_HELLO_TIMEOUT: Final = 5.0
_SEND_TIMEOUT: Final = 5.0
_SLICE: Final = 0.25
_ROWS: Final = 128  # of a listing, in one message
_REQUESTS: Final = (
    messages.Launch,
    messages.Reserve,
    messages.Offer,
    messages.Withdraw,
    messages.AskReserve,
    messages.Take,
    messages.Close,
    messages.Why,
    messages.List,
    messages.Kill,
    messages.Attach,
    messages.Root,
)


# An answer: the message, its descriptors, and what is done once it was sent.
_Answer = tuple[messages.Message, tuple[int, ...], Callable[[], None] | None]


class _Host:
    """One connected host: its channel, and the enclaves and warm workers that it owns."""

    def __init__(self, channel: Channel, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        self.refused = False  # it came when there were enough
        self.enclaves: dict[bytes, Enclave] = {}
        self.ended: OrderedDict[bytes, messages.WhyReply] = OrderedDict()
        self.held = HeldImages()
        self.debugged: list[Enclave] = []  # those that it attached a debugger to
        self.reserves: Reserves | None = None  # once it asked for one

    def is_there(self) -> bool:
        """Whether the other end of the channel is still open; what it sent stays unread."""
        fd = self.channel.fileno()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, 0)
        return not poll.poll(0)

    def announce(self) -> None:
        """Have the host wake up: its enclave is there in a moment, most likely."""
        with contextlib.suppress(EnclaveError, TimeoutError):
            self.channel.send(messages.Soon(), timeout=0)


class Server:
    """
    A platform at work.

    Args:
        root: Its keys.
        services: What it does for workers.
        launcher: What starts them.
        state: The state directory, for the limits of the policy; None: the limits as they are.

    """

    def __init__(
        self,
        root: PlatformRoot,
        services: Services,
        launcher: Launcher,
        state: State | None = None,
    ) -> None:
        self._root = root
        self._services = services
        self._launcher = launcher
        self._state = state
        self._instance = os.urandom(16)
        self._mutex = threading.Lock()
        self._hosts: set[_Host] = set()
        self._enclaves: dict[bytes, Enclave] = {}
        self._launching = 0
        self._warm = 0  # places of warm workers
        self._idle_since = time.monotonic()
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    # ---- hosts ------------------------------------------------------------------------------

    def run(self, listener: socket.socket | None, first: Channel | None) -> None:
        """
        Serve until the last host is gone, or :meth:`stop`.

        Args:
            listener: Where hosts connect; None to serve only *first*.
            first: The host that started this process.

        """
        if first is not None:
            with socket.socket(fileno=os.dup(first.fileno())) as sock:
                pid = peer_pid(sock)  # who made the pair: this process's parent has ended
            self._admit(_Host(first, pid))
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if listener is not None:
            poll.register(listener, select.POLLIN)
        while not self._stopping:
            wait = self._time_left()
            if wait is not None and wait <= 0:
                break
            ready = {fd for fd, _ in poll.poll(None if wait is None else wait * 1000 + 1)}
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            if listener is not None and listener.fileno() in ready:
                self._accept(listener)

    def _time_left(self) -> float | None:
        with self._mutex:
            if not self._hosts:
                return self._idle_since + _IDLE_GRACE - time.monotonic()
            if not self._launching:
                return None
            # A thread that waits for a zygote to start does not see its host go.
            if any(host.is_there() for host in self._hosts):
                return _SLICE
            return 0

    def stop(self) -> None:
        """Make :meth:`run` return; callable from a signal handler."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(0.05)  # out of descriptors: the next round may have some
            return
        try:
            allowed = peer_uid(sock) == os.geteuid()
            pid = peer_pid(sock)
        except OSError:
            allowed, pid = False, 0
        if not allowed:
            sock.close()
            return
        self._admit(_Host(Channel(sock), pid))

    def _admit(self, host: _Host) -> None:
        with self._mutex:
            # A few more than there may be get a thread, which tells them so.
            room = len(self._hosts) < 2 * MAX_HOSTS
            if room:
                host.refused = len(self._hosts) >= MAX_HOSTS
                self._hosts.add(host)
        if not room:
            host.channel.close()
            return
        thread = threading.Thread(
            target=self._serve, args=(host,), name=f"host-{host.pid}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._forget(host)

    def _serve(self, host: _Host) -> None:
        try:
            message, fds = host.channel.receive(_HELLO_TIMEOUT)
            close_all(fds)
            if not isinstance(message, messages.Hello):
                raise EnclaveStateError("the first message of a host is Hello")
            greeting = self._hello(host, message)
            self._send(host, greeting)
            while not isinstance(greeting, messages.Failure):
                message, fds = host.channel.receive()
                try:
                    answer, answer_fds, begin = self._answer(host, message, fds)
                finally:
                    close_all(fds)
                try:
                    self._send(host, answer, answer_fds)
                    if begin is not None:
                        os.sched_yield()  # to the host, if it waits for this very processor
                finally:
                    # After the answer: what wakes another thread now would delay the host.
                    if begin is not None:
                        begin()
        except EnclaveLostError:
            pass
        except EnclaveStateError as error:
            with contextlib.suppress(EnclaveError, TimeoutError):
                host.channel.send(failure_of(error), timeout=0)
        except TimeoutError:
            pass  # it does not speak, or does not read
        except Exception as error:
            # A flaw of ours must not look like the host's end to the others.
            log(f"host {host.pid}: {type(error).__name__}: {error}")
        finally:
            self._forget(host)

    def _forget(self, host: _Host) -> None:
        for enclave in host.debugged:
            enclave.detach(host)
        if host.reserves is not None:
            host.reserves.close()
        for enclave_id in list(host.enclaves):
            self._end(host, enclave_id, "its host is gone")
        # Off the list first: the main thread looks at the channels of those that are on it.
        with self._mutex:
            self._hosts.discard(host)
            self._idle_since = time.monotonic()
        host.channel.close()
        host.held.close()
        self._wake()

    # ---- requests ---------------------------------------------------------------------------

    def _hello(self, host: _Host, message: messages.Hello) -> messages.Message:
        if host.refused:
            return failure_of(
                BusyError("the platform has too many hosts", expected=f"at most {MAX_HOSTS}")
            )
        if message.version != messages.FORMAT_VERSION:
            return failure_of(
                PlatformUnavailableError(
                    "the platform speaks another version",
                    expected=messages.FORMAT_VERSION,
                    found=message.version,
                )
            )
        return messages.HelloReply(
            version=messages.FORMAT_VERSION,
            instance=self._instance,
            level=self._root.level,
            ephemeral=self._root.ephemeral,
            pid=os.getpid(),
        )

    def _answer(self, host: _Host, message: messages.Message, fds: list[int]) -> _Answer:
        if not isinstance(message, _REQUESTS):
            raise EnclaveStateError(f"a host may not send {type(message).__name__}")
        try:
            if isinstance(message, messages.Launch):
                if len(fds) == 2:  # else it is refused, and no spare need look for it
                    self._launcher.rouse()
                return self._launch(host, message, fds)
            if isinstance(message, messages.Reserve):
                return self._reserve(host, message, fds), (), None
            if isinstance(message, messages.Offer):
                return self._offer(host, message, fds)
            if fds:
                raise ArgumentError(f"{type(message).__name__} takes no descriptors")
            if isinstance(message, messages.Take):
                return self._take(host, message)
            if isinstance(message, messages.Attach):
                return self._attach(host, message.enclave_id)
            return self._answer_simple(host, message), (), None
        except Exception as error:
            if not isinstance(error, EnclaveError):
                log(f"{type(message).__name__}: {type(error).__name__}: {error}")
            return failure_of(error), (), None

    def _answer_simple(self, host: _Host, message: messages.Message) -> messages.Message:
        match message:
            case messages.Close(enclave_id=enclave_id):
                if enclave_id in host.enclaves:
                    self._end(host, enclave_id, "its host closed it", orderly=True)
                elif enclave_id not in host.ended:
                    raise ArgumentError("this host has no such enclave")
                return messages.Ok()
            case messages.Why(enclave_id=enclave_id):
                if enclave_id in host.enclaves:
                    return host.enclaves[enclave_id].why
                if enclave_id in host.ended:
                    return host.ended[enclave_id]
                raise ArgumentError("this host has no such enclave")
            case messages.List(after=after):
                with self._mutex:
                    running = list(self._enclaves.values())
                rows = [enclave.info for enclave in running if enclave.why.state == "running"]
                rows.sort(key=lambda row: row.enclave_id)
                rows = [row for row in rows if row.enclave_id > after]
                # _ROWS rows must fit one message whatever images call themselves.
                page = [
                    msgspec.structs.replace(row, name=cut(row.name, _MAX_NAME))
                    for row in rows[:_ROWS]
                ]
                return messages.Listing(enclaves=tuple(page), more=len(rows) > _ROWS)
            case messages.Kill(enclave_id=enclave_id):
                self._find(enclave_id).end("it was killed on request")
                return messages.Ok()
            case messages.Root():
                from cryptography.hazmat.primitives.serialization import Encoding

                return messages.RootReply(
                    certificate=self._root.chain.root.public_bytes(Encoding.DER),
                    ephemeral=self._root.ephemeral,
                )
            case messages.AskReserve(reserve_id=reserve_id):
                return _reserves_of(host).ask(reserve_id)
            case messages.Withdraw(reserve_id=reserve_id, slot=slot):
                return _reserves_of(host).withdraw(reserve_id, slot)
        raise AssertionError(type(message).__name__)  # all of _REQUESTS are above

    def _find(self, enclave_id: bytes) -> Enclave:
        with self._mutex:
            enclave = self._enclaves.get(enclave_id)
        if enclave is None:
            raise ArgumentError("no such enclave runs here")
        return enclave

    def _attach(self, host: _Host, enclave_id: bytes) -> _Answer:
        enclave = self._find(enclave_id)
        sock = enclave.attach(host)
        host.debugged.append(enclave)  # one connection attaches to each enclave at most once
        return messages.Attached(), (sock.fileno(),), sock.close

    def _policy(self) -> LaunchPolicy:
        return load_policy(self._state)

    def _book(self, *, launching: bool, most: int) -> bool:
        with self._mutex:
            if len(self._enclaves) + self._launching + self._warm >= most:
                return False
            self._launching += launching
            self._warm += not launching
            return True

    def _book_warm(self) -> None:
        most = self._policy().max_enclaves
        if not self._book(launching=False, most=most):
            raise BusyError("the platform has too many enclaves", expected=most)

    def _unbook_warm(self) -> None:
        with self._mutex:
            self._warm -= 1

    def _book_launch(self) -> None:
        most = self._policy().max_enclaves
        # A warm worker only saves time: whoever wants an enclave now gets its place.
        while not self._book(launching=True, most=most):
            with self._mutex:
                keepers = [host.reserves for host in self._hosts if host.reserves is not None]
            if not any(reserves.shed() for reserves in keepers):
                raise BusyError("the platform has too many enclaves", expected=most)

    def _launch(self, host: _Host, request: messages.Launch, fds: list[int]) -> _Answer:
        if len(fds) != 2:
            raise ArgumentError("Launch takes two descriptors", expected=2, found=len(fds))
        wish = self._launcher.judge(request, fds[0], held=host.held)
        enclave = self._launch_cold(host, wish, fds[0], fds[1])
        host.held.add(fds[0], wish.digest, wish.size)
        return self._launched(host, enclave, wish, fds[1])

    def _launch_cold(self, host: _Host, wish: Wish, image_fd: int, ring_fd: int) -> Enclave:
        self._book_launch()
        try:
            enclave = self._launcher.launch(
                wish,
                image_fd,
                ring_fd,
                host_pid=host.pid,
                wanted=host.is_there,
                slow=self._wake,
                soon=host.announce,
            )
            with self._mutex:
                self._enclaves[enclave.facts.enclave_id] = enclave
        finally:
            with self._mutex:
                self._launching -= 1
        return enclave

    def _launched(
        self,
        host: _Host,
        enclave: Enclave,
        wish: Wish,
        ring_fd: int,
        *,
        slot: int = -1,
        warm: bool = False,
    ) -> _Answer:
        facts = enclave.facts
        with contextlib.suppress(OSError):  # out of descriptors: nobody sees its traffic
            enclave.watch(Traffic(os.dup(ring_fd), wish.judged.info.threads))
        host.enclaves[facts.enclave_id] = enclave
        launched = messages.Launched(
            enclave_id=facts.enclave_id,
            pid=facts.pid,
            debug=facts.debug,
            mrenclave=facts.body.mrenclave,
            mrsigner=facts.body.mrsigner,
            record=facts.record,
            runtime_public_key=facts.runtime_public_key,
            starting=facts.starting,
            slot=slot,
            warm=warm,
        )

        def begin() -> None:
            enclave.start(self._services)
            if not warm:  # else it was when the worker was warmed that something was taken
                self._launcher.refill()

        return launched, (enclave.pidfd,), begin

    def _reserve(self, host: _Host, request: messages.Reserve, fds: list[int]) -> messages.Reserved:
        if len(fds) != 1:
            raise ArgumentError("Reserve takes one descriptor", expected=1, found=len(fds))
        wish = self._launcher.judge(request, fds[0], held=host.held)
        if host.reserves is None:
            host.reserves = Reserves(
                self._launcher,
                book=self._book_warm,
                unbook=self._unbook_warm,
                wanted=host.is_there,
                slow=self._wake,
                most=self._policy().max_warm,
                name=f"warm-{host.pid}",
            )
        told = host.reserves.reserve(wish, fds[0])
        host.held.add(fds[0], wish.digest, wish.size)
        return told

    def _offer(self, host: _Host, request: messages.Offer, fds: list[int]) -> _Answer:
        if len(fds) != 1:
            raise ArgumentError("Offer takes one descriptor", expected=1, found=len(fds))
        told, bell = _reserves_of(host).offer(request.reserve_id, fds[0])
        return told, (bell,), None

    def _take(self, host: _Host, request: messages.Take) -> _Answer:
        reserves = _reserves_of(host)
        taken = reserves.take(request.reserve_id, request.slot)
        try:
            enclave = None
            if taken.candidate is not None:
                # Who names an offer rings its bell.
                enclave = self._hand_out(host, taken.candidate, wake=request.slot == -1)
            warm = enclave is not None
            if enclave is None:
                enclave = self._launch_cold(host, taken.wish, taken.image_fd, taken.ring_fd)
        except Exception as error:
            reserves.used(request.reserve_id, taken.slot, error=f"{type(error).__name__}: {error}")
            raise
        answer = self._launched(
            host, enclave, taken.wish, taken.ring_fd, slot=taken.slot, warm=warm
        )
        reserves.used(request.reserve_id, taken.slot)
        return answer

    def _hand_out(self, host: _Host, candidate: Candidate, *, wake: bool) -> Enclave | None:
        enclave = None
        try:
            enclave = self._launcher.hand_out(candidate, host_pid=host.pid, wake=wake)
        except WorkerGoneError:
            pass  # nobody was told of it: another worker gets its ring
        finally:
            with self._mutex:
                self._warm -= 1
                if enclave is not None:
                    self._enclaves[enclave.facts.enclave_id] = enclave
        return enclave

    def _end(self, host: _Host, enclave_id: bytes, reason: str, *, orderly: bool = False) -> None:
        enclave = host.enclaves.pop(enclave_id)
        enclave.end(reason, orderly=orderly)
        host.ended[enclave_id] = enclave.why
        while len(host.ended) > MAX_ENDED:
            host.ended.popitem(last=False)
        with self._mutex:
            self._enclaves.pop(enclave_id, None)
        enclave.release()

    def _send(self, host: _Host, message: messages.Message, fds: tuple[int, ...] = ()) -> None:
        host.channel.send(message, fds, _SEND_TIMEOUT)

    def close(self) -> None:
        """End every enclave."""
        with self._mutex:
            running = list(self._enclaves.values())
        for enclave in running:
            enclave.end("the platform ended")


def _reserves_of(host: _Host) -> Reserves:
    if host.reserves is None:
        raise ArgumentError("this host has no such reserve")
    return host.reserves
