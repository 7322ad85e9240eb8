"""A model of the platform at the other end of the channel, and enclaves on it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from pyenclave.calls.channel import Channel
from pyenclave.errors import EnclaveLostError
from pyenclave.formats import messages
from pyenclave.formats.sgx import Attributes, KeyRequest, ReportBody, TargetInfo
from pyenclave.trusted import _runtime

RECORD = b"a signed record"


def report_body(**changes: object) -> ReportBody:
    debug = changes.pop("debug", False)
    values: dict[str, object] = {
        "cpu_svn": struct.pack("<H14x", 1),
        "attributes": Attributes(flags=7 if debug else 5, xfrm=3),
        "mrenclave": b"\x11" * 32,
        "mrsigner": b"\x22" * 32,
        "config_id": hashlib.sha256(RECORD).digest() + bytes(32),
        "isv_prod_id": 7,
        "isv_svn": 3,
    }
    return ReportBody(**(values | changes))  # type: ignore[arg-type]


class ModelPlatform:
    """Answers one worker; keys, reports and counters as the platform has them."""

    def __init__(self, body: ReportBody) -> None:
        self.body = body
        self.worker, self.end = Channel.pair()
        self.counters: dict[bytes, tuple[int, bytes]] = {}  # value, mark of the newest blob
        self.answer_with: messages.Message | None = None
        self.requests: list[messages.Message] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.worker.close()
        self.thread.join(20)
        self.end.close()

    def _serve(self) -> None:
        with contextlib.suppress(EnclaveLostError, OSError, ValueError):
            while True:
                message, _ = self.end.receive()
                self.requests.append(message)
                self.end.send(self.answer_with or self._answer(message))

    def _answer(self, message: messages.Message) -> messages.Message:
        match message:
            case messages.KeyRequestMessage(request=raw):
                request = KeyRequest.from_bytes(raw)
                if request.isv_svn > self.body.isv_svn:
                    return messages.Failure(code="sealing", message="INVALID_ISVSVN (64)")
                identity = self.body.mrenclave if request.key_policy & 1 else b""
                identity += self.body.mrsigner if request.key_policy & 2 else b""
                info = raw + identity + bytes([self.body.attributes.debug])
                return messages.KeyReply(key=hmac.digest(b"root", info, "sha256"))
            case messages.QuoteRequest(data=data):
                return messages.QuoteReply(quote=b"quote over " + data)
            case messages.ReportRequest(target=target, data=data):
                body = self.body.to_bytes()[:320] + data
                mac = hmac.digest(b"report" + target, body, "md5")
                return messages.ReportReply(report=body + bytes(32) + mac)
            case messages.VerifyReport(report=report):
                target = TargetInfo.of(self.body).to_bytes()
                mac = hmac.digest(b"report" + target, report[:384], "md5")
                if hmac.compare_digest(mac, report[416:]):
                    return messages.Ok()
                return messages.Failure(code="attestation", message="the MAC does not hold")
            case messages.CounterRequest():
                return self._count(message)
        raise AssertionError(message)

    def _count(self, asked: messages.CounterRequest) -> messages.Message:
        name, operation = asked.counter_id, asked.operation
        if operation == "create":
            name = len(self.counters).to_bytes(16, "big")
            self.counters[name] = (0, b"")
        elif name not in self.counters:
            return messages.Failure(code="sealing.rollback", message="no such counter")
        value, mark = self.counters[name]
        if operation == "increment":
            done = asked.mark and (value - 1, mark) == (asked.expected, asked.mark)
            if not done:
                if asked.expected not in (None, value):
                    return messages.Failure(code="sealing.rollback", message="another value")
                value, mark = self.counters[name] = (value + 1, asked.mark)
        elif operation == "destroy":
            del self.counters[name]
        return messages.CounterValue(counter_id=name, value=value, mark=mark)

    def identity(self, **changes: object) -> messages.Identity:
        values: dict[str, object] = {
            "enclave_id": b"e" * 16,
            "body": self.body.to_bytes(),
            "debug": self.body.attributes.debug,
            "level": "embedded",
            "record": RECORD,
            "seed": bytes(32),
        }
        return messages.Identity(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def inside() -> Iterator[object]:
    """A function that makes this process the enclave with the given identity."""
    platforms: list[ModelPlatform] = []

    def become(**changes: object) -> ModelPlatform:
        _runtime.stop()
        platform = ModelPlatform(report_body(**changes))
        if platforms:
            platform.counters = platforms[-1].counters
        platforms.append(platform)
        _runtime.start(platform.worker, platform.identity(), None)  # type: ignore[arg-type]
        return platform

    yield become
    _runtime.stop()
    for platform in platforms:
        platform.close()


@pytest.fixture
def model() -> Iterator[Callable[..., ModelPlatform]]:
    """A function that makes a model of a platform for a worker that is not started."""
    with contextlib.ExitStack() as stack:

        def make(**changes: object) -> ModelPlatform:
            return stack.enter_context(contextlib.closing(ModelPlatform(report_body(**changes))))

        yield make
