"""
What trusted code finds "inside" a fake enclave: keys, counters and reports of this process alone.

Nothing here protects anything. Keys come from a root that lives in memory, sealed data opens in
fakes of the same root only, and what `attest` gives can never be verified.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

from pyenclave.errors import NotInEnclaveError
from pyenclave.formats import messages
from pyenclave.formats.sgx import Attributes, KeyRequest, ReportBody, TargetInfo
from pyenclave.trusted import _runtime, _state

__all__ = ["FakeRuntime", "becoming", "ended", "entered"]

QUOTE: Final = b"pyenclave.testing.FakeEnclave made this: it proves nothing, about nothing."
_RECORD: Final = b"pyenclave.testing.FakeEnclave: no protection"
_POLICY_MRENCLAVE: Final = 1
_POLICY_MRSIGNER: Final = 2
_MAX_COUNTERS: Final = 4096
_SEALED_MEMORY: Final = 64 << 20

Reply = TypeVar("Reply", bound=messages.Message)


class Root:
    """Stands for a platform: a root secret and the counters, in memory."""

    def __init__(self) -> None:
        self.secret = os.urandom(32)
        self.counters: dict[bytes, tuple[int, bytes]] = {}
        self.lock = threading.Lock()


ROOT: Final = Root()  # of this process, so that one fake opens what another sealed


class FakeRuntime(_runtime.Runtime):
    """
    The runtime of a fake enclave: it answers itself what a platform would be asked.

    Args:
        name: The enclave's name.
        mrenclave: Stands for the measurement.
        root: Stands for the platform.

    """

    def __init__(self, name: str, mrenclave: bytes, root: Root = ROOT) -> None:
        self._name = name
        self._root = root
        self._report = ReportBody(
            cpu_svn=struct.pack("<H14x", 1),
            attributes=Attributes(flags=7, xfrm=3),
            mrenclave=mrenclave,
            mrsigner=bytes(32),
            config_id=hashlib.sha256(_RECORD).digest() + bytes(32),
        )
        identity = messages.Identity(
            enclave_id=os.urandom(16),
            body=self._report.to_bytes(),
            debug=True,
            level="fake",
            record=_RECORD,
            seed=os.urandom(32),
        )
        super().__init__(cast("Any", None), identity, None)

    @property
    def sealed_memory(self) -> int:
        """As much as images have that ask for it."""
        return _SEALED_MEMORY

    def request(self, message: messages.Message, kind: type[Reply]) -> Reply:
        """Answer *message*; as :meth:`Runtime.request`."""
        reply = self._reply(message)
        if isinstance(reply, messages.Failure):
            raise _runtime._error(reply)  # noqa: SLF001 - the very same errors
        if not isinstance(reply, kind):
            raise AssertionError(type(reply).__name__)
        return reply

    def _reply(self, message: messages.Message) -> messages.Message:
        body = self._report
        match message:
            case messages.KeyRequestMessage(request=raw):
                asked = KeyRequest.from_bytes(raw)
                if asked.isv_svn > body.isv_svn:
                    return messages.Failure(code="sealing", message="a newer security version")
                bound = body.mrenclave if asked.key_policy & _POLICY_MRENCLAVE else b""
                bound += body.mrsigner if asked.key_policy & _POLICY_MRSIGNER else b""
                return messages.KeyReply(
                    key=hmac.digest(self._root.secret, b"seal" + raw + bound, "sha256")
                )
            case messages.QuoteRequest():
                return messages.QuoteReply(quote=QUOTE)
            case messages.ReportRequest(target=target, data=data):
                made = body.to_bytes()[:320] + data
                return messages.ReportReply(report=made + bytes(32) + self._mac(target, made))
            case messages.VerifyReport(report=report):
                mac = self._mac(TargetInfo.of(body).to_bytes(), report[:384])
                if hmac.compare_digest(mac, report[416:]):
                    return messages.Ok()
                return messages.Failure(code="attestation", message="the MAC does not hold")
            case messages.CounterRequest():
                return self._count(message)
        raise AssertionError(type(message).__name__)

    def _mac(self, target: bytes, body: bytes) -> bytes:
        return hmac.digest(self._root.secret, b"report" + target + body, "sha256")[:16]

    def _count(self, asked: messages.CounterRequest) -> messages.Message:
        with self._root.lock:
            counters, name = self._root.counters, asked.counter_id
            if asked.operation == "create":
                if len(counters) >= _MAX_COUNTERS:
                    return messages.Failure(code="sealing.limit", message="too many counters")
                name = os.urandom(16)
                counters[name] = (0, b"")
            elif name not in counters:
                return messages.Failure(code="sealing.rollback", message="no such counter")
            value, mark = counters[name]
            if asked.operation == "increment":
                done = asked.mark and (value - 1, mark) == (asked.expected, asked.mark)
                if not done:
                    if asked.expected not in (None, value):
                        return messages.Failure(code="sealing.rollback", message="another value")
                    value, mark = counters[name] = (value + 1, asked.mark)
            elif asked.operation == "destroy":
                del counters[name]
            return messages.CounterValue(counter_id=name, value=value, mark=mark)


_here = threading.local()
_open = 0
_lock = threading.Lock()


class _OfThread:
    """The runtime of the fake whose thread asks; of no fake: as in any other process."""

    def __getattr__(self, name: str) -> Any:
        runtime = getattr(_here, "runtime", None)
        if runtime is None:
            raise NotInEnclaveError(
                "this works only inside an enclave",
                advice="Call it from a function that runs inside (marked with @pyenclave.ecall).",
            )
        return getattr(runtime, name)


def becoming() -> None:
    """A fake begins: its threads find their own runtime from now on."""
    global _open  # noqa: PLW0603 - as many as there are
    with _lock:
        _open += 1
        if _state.runtime is None:
            _state.runtime = cast("Any", _OfThread())


def ended() -> None:
    """A fake ended; with the last one this process is no enclave any more."""
    global _open  # noqa: PLW0603
    with _lock:
        _open -= 1
        if _open == 0 and isinstance(cast("Any", _state.runtime), _OfThread):
            _state.runtime = None
            _state._entered = False  # noqa: SLF001 - set when a lane was served


@contextmanager
def entered(runtime: FakeRuntime) -> Iterator[None]:
    """Be inside, in this thread."""
    before = getattr(_here, "runtime", None)
    _here.runtime = runtime
    try:
        yield
    finally:
        _here.runtime = before
