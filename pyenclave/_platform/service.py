"""One running enclave as the platform knows it, and the answers to its worker's requests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import secrets
import select
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pyenclave._platform.counters import MARK_SIZE, CounterStore
from pyenclave._platform.debuglog import DebugLog
from pyenclave._platform.keys import Keys
from pyenclave._platform.probe import has_ended
from pyenclave._platform.quote import Quoter
from pyenclave._platform.report import make_report, verify_report
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.traffic import Traffic
from pyenclave._platform.wire import failure_of
from pyenclave.calls.channel import Channel, close_all
from pyenclave.errors import EnclaveError, EnclaveStateError, LaunchError, SealingError
from pyenclave.formats import messages
from pyenclave.formats.sgx import KeyRequest, Report, ReportBody, TargetInfo

__all__ = ["Attendant", "Enclave", "Facts", "Services", "kill_and_wait"]

_SEND_TIMEOUT: Final = 5.0
_REAP_TIMEOUT: Final = 5.0
_MAX_REASON: Final = 1000  # characters
_MAX_TYPE: Final = 128
_REQUESTS: Final = (
    messages.KeyRequestMessage,
    messages.ReportRequest,
    messages.VerifyReport,
    messages.QuoteRequest,
    messages.CounterRequest,
)


class Services:
    """
    What the platform does for workers. One object for all of them; thread-safe.

    Args:
        root: The platform's keys.
        counters: The store of counters.

    """

    def __init__(self, root: PlatformRoot, counters: CounterStore) -> None:
        self.root = root
        self.keys = Keys(root)
        self.quoter = Quoter(root)
        self.counters = counters
        # As a CPU has it: one random KEYID for the reports of one start.
        self.report_key_id = secrets.token_bytes(32)

    def answer(self, enclave: Enclave, message: messages.Message) -> messages.Message:
        """
        Answer one request of a worker.

        Raises:
            EnclaveError: The request is refused.

        """
        match message:
            case messages.KeyRequestMessage(request=data):
                enclave.check_may_seal()
                request = KeyRequest.from_bytes(data)
                return messages.KeyReply(key=self.keys.get_key(request, enclave.body))
            case messages.ReportRequest(target=target, data=data):
                report = make_report(
                    self.keys,
                    enclave.body,
                    target=TargetInfo.from_bytes(target),
                    data=data,
                    key_id=self.report_key_id,
                )
                return messages.ReportReply(report=report.to_bytes())
            case messages.VerifyReport(report=data):
                verify_report(self.keys, enclave.body, Report.from_bytes(data))
                return messages.Ok()
            case messages.QuoteRequest(data=data):
                quote = self.quoter.quote(enclave.body, data)
                return messages.QuoteReply(quote=quote, machine=self.root.machine)
            case messages.CounterRequest():
                enclave.check_may_seal()
                return self._count(enclave, message)
        raise AssertionError(type(message).__name__)  # all of _REQUESTS are above

    def _count(self, enclave: Enclave, message: messages.CounterRequest) -> messages.CounterValue:
        owner, counter_id, mark = (
            enclave.counter_owner(self.root.level),
            message.counter_id,
            message.mark,
        )
        if message.operation != "increment" and (mark or message.expected is not None):
            raise SealingError("only an increment has an expected value or a mark")
        if mark and (len(mark) != MARK_SIZE or message.expected is None):
            raise SealingError(
                "a blob is committed with its mark and the value that it follows",
                expected=f"a mark of {MARK_SIZE} bytes, and a value",
                found=f"{len(mark)} bytes, {message.expected}",
            )
        if message.operation == "create":
            if counter_id:
                raise SealingError("a counter is created without identity")
            counter_id, value = self.counters.create(owner, debug=enclave.weak)
        elif message.operation == "read":
            value, mark = self.counters.read(owner, counter_id)
        elif message.operation == "increment":
            value = self.counters.increment(owner, counter_id, message.expected, mark)
        elif message.operation == "destroy":
            value = self.counters.destroy(owner, counter_id)
        else:
            raise SealingError(
                "unknown operation on a counter",
                expected="create, read, increment or destroy",
                found=message.operation[:32],
            )
        return messages.CounterValue(counter_id=counter_id, value=value, mark=mark)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the platform established about an enclave at its launch."""

    enclave_id: bytes
    name: str
    pid: int
    debug: bool
    body: ReportBody
    record: bytes
    runtime_public_key: bytes
    may_seal: bool
    started: float
    starting: bool = False  # on_start functions run when it is launched
    grace: float = 0.0  # seconds that its on_stop functions may take


class Attendant:
    """
    The thread that will serve one worker; it waits until there is an enclave.

    It is made before the worker has an identity, so that a platform without another thread to give
    refuses the launch, and while the worker starts, so that nobody waits for it.

    Raises:
        LaunchError: The system gives no more threads.

    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._wait, name="enclave", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:
            raise LaunchError("the platform has no thread for another enclave") from None

    def _wait(self) -> None:
        work = self._work.get()
        if work is not None:
            work()

    def begin(self, work: Callable[[], None]) -> None:
        """Have the thread do *work* and end."""
        self._work.put(work)

    def dismiss(self) -> None:
        """End the thread without work."""
        self._work.put(None)
        self.thread.join(_REAP_TIMEOUT)


class Enclave:
    """
    A running enclave. Owns the worker's pidfd and control channel.

    Args:
        facts: What was established at launch.
        pidfd: The worker's.
        channel: The platform's end of the control channel.
        host_pid: For listings.
        attendant: The thread that serves it, from :meth:`start` on.
        log: Of a debug enclave, what keeps its output.

    """

    def __init__(
        self,
        facts: Facts,
        *,
        pidfd: int,
        channel: Channel,
        host_pid: int,
        attendant: Attendant | None = None,
        log: DebugLog | None = None,
    ) -> None:
        self.facts = facts
        self.body = facts.body
        self.pidfd = pidfd
        self.host_pid = host_pid
        self._channel = channel
        self._mutex = threading.Lock()
        self._state = "running"
        self._reason = ""
        self._type = ""
        self._attendant = attendant
        self._log = log
        self._debuggee = None if log is None else log.debuggee
        self._traffic: Traffic | None = None

    @property
    def why(self) -> messages.WhyReply:
        """State and reason."""
        with self._mutex:
            return messages.WhyReply(state=self._state, reason=self._reason, type=self._type)

    @property
    def info(self) -> messages.EnclaveInfo:
        """The row of a listing."""
        facts = self.facts
        return messages.EnclaveInfo(
            enclave_id=facts.enclave_id,
            name=facts.name,
            pid=facts.pid,
            host_pid=self.host_pid,
            debug=facts.debug,
            mrenclave=facts.body.mrenclave,
            started=facts.started,
            debugger=self._debuggee.state if self._debuggee is not None else "",
            round_trips=-1 if self._traffic is None else self._traffic.round_trips(),
        )

    def check_may_seal(self) -> None:
        """Refuse data sealing and counters under a root that is gone with this process."""
        if not self.facts.may_seal:
            raise SealingError(
                "the platform's root is ephemeral: what is sealed now never opens again",
                expected="a state directory that can be written",
                advice="Set PYENCLAVE_STATE, or PYENCLAVE_ALLOW_EPHEMERAL=1 to seal regardless.",
            )

    @property
    def weak(self) -> bool:
        """Whether anybody could have made it: debug or unsigned; its counters' quota is small."""
        return self.facts.debug or not any(self.body.mrsigner)

    def watch(self, traffic: Traffic) -> None:
        """Have listings say what *traffic* does; closed with the enclave."""
        self._traffic = traffic

    def attach(self, holder: object) -> socket.socket:
        """
        Return a debugger's end of a new connection with the worker.

        Raises:
            BusyError: Another debugger is attached.
            EnclaveStateError: It is a production enclave, or it ended.

        """
        if self._debuggee is None:
            raise EnclaveStateError(
                "a production enclave has no debugger",
                expected="an enclave that was launched as debug",
                found=self.facts.name[:64],
            )
        return self._debuggee.attach(holder)

    def detach(self, holder: object) -> None:
        """Make room for another debugger, if *holder* is attached."""
        if self._debuggee is not None:
            self._debuggee.detach(holder)

    def counter_owner(self, level: str) -> bytes:
        """Return the name under which this enclave's counters are kept."""
        body = self.body
        signed = any(body.mrsigner)
        product = body.isv_prod_id.to_bytes(2, "little") if signed else b""
        parts = (
            b"pyenclave counter owner 1",
            level.encode(),
            bytes([self.facts.debug]),
            b"signer" if signed else b"enclave",
            body.mrsigner if signed else body.mrenclave,
            product,
        )
        joined = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        return hashlib.sha256(joined).digest()

    def start(self, services: Services) -> None:
        """Serve the worker's requests in a thread of their own until it ends; cannot fail."""
        if self._attendant is None:
            raise EnclaveStateError("the enclave has no thread to serve it")
        self._attendant.thread.name = f"enclave-{self.facts.enclave_id.hex()[:8]}"
        self._attendant.begin(lambda: self._serve(services))

    def _serve(self, services: Services) -> None:
        try:
            self._answer_all(services)
        except EnclaveError as error:
            self._set("lost", f"the worker broke the control protocol: {error}")
        except TimeoutError:
            self._set("lost", "the worker does not read its control channel")
        finally:
            kill_and_wait(self.pidfd)
            self._set("lost", "the worker ended")
            if self._log is not None:
                self._log.close_debuggee()
            self._channel.close()

    def _answer_all(self, services: Services) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        debuggee = self._debuggee
        asks = -1
        if debuggee is not None and (asks := debuggee.fileno()) >= 0:
            poll.register(asks, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if asks in ready and debuggee is not None and not debuggee.answer():
                poll.unregister(asks)
                asks = -1
            if self._channel.fileno() in ready:
                if not self._answer_one(services):
                    return
            elif self.pidfd in ready:
                return

    def _answer_one(self, services: Services) -> bool:
        try:
            message, fds = self._channel.receive(_SEND_TIMEOUT)
        except TimeoutError:
            return True
        except EnclaveError as error:
            if not has_ended(self.pidfd) and type(error) is EnclaveStateError:
                raise
            return False
        close_all(fds)
        match message:
            case messages.Poisoned(reason=reason):
                self._set("poisoned", reason)
                return False
            case messages.Ending(code=code, message=text, type=kind):
                # What an on_start function raised is told to whoever launches, by its type.
                self._set("lost", text if kind else f"{code}: {text}", kind)
                return False
        if not isinstance(message, _REQUESTS):
            raise EnclaveStateError(f"a worker may not send {type(message).__name__}")
        try:
            answer = services.answer(self, message)
        except (EnclaveError, ValueError, OSError) as error:
            answer = failure_of(error)
        with contextlib.suppress(EnclaveError):  # gone meanwhile: the next poll sees it
            self._channel.send(answer, timeout=_SEND_TIMEOUT)
        return True

    def _set(self, state: str, reason: str, kind: str = "") -> None:
        # The first reason stands: what follows is only its consequence.
        with self._mutex:
            if self._state == "running":
                self._state = state
                self._reason = reason[:_MAX_REASON]
                self._type = kind[:_MAX_TYPE]

    def end(self, reason: str, *, orderly: bool = False) -> None:
        """
        End the worker, wait until its process is gone, and give everything back.

        Args:
            reason: For whoever asks why.
            orderly: Let its on_stop functions run before, for at most the time that they said.

        """
        self._set("closed", reason)
        if orderly and self.facts.grace > 0:
            # A packet of its own beside the answers that the attendant may be sending.
            with contextlib.suppress(EnclaveError, TimeoutError):
                self._channel.send(messages.Stop(), timeout=0)
                poll = select.poll()
                poll.register(self.pidfd, select.POLLIN)
                poll.poll(self.facts.grace * 1000)
        kill_and_wait(self.pidfd)
        if self._attendant is not None and self._attendant.thread is not threading.current_thread():
            self._attendant.thread.join(_REAP_TIMEOUT)
        if self._log is not None:
            self._log.join()

    def release(self) -> None:
        """Close the pidfd; only after :meth:`end`."""
        if self._traffic is not None:
            self._traffic.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def kill_and_wait(pidfd: int, timeout: float = _REAP_TIMEOUT) -> bool:
    """Kill the process of *pidfd* and wait; return whether it is gone within *timeout* seconds."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
