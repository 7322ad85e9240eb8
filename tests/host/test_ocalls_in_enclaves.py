"""Ocalls, nested calls and streams of real enclaves."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyenclave.errors import (
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    OcallError,
)
from pyenclave.host import Enclave
from pyenclave.image.build import build

ENTRY = """\
import hashlib
import hmac
import threading
from collections.abc import Iterator

import pyenclave
from pyenclave import trusted

KEY = bytes(range(32))
EARLY = []


@pyenclave.ocall(allow=["secret", "numbers"])
def fetch(key: str) -> bytes:
    raise AssertionError("the body of a stub runs outside only")


def early(where: str) -> None:
    try:
        fetch(where)
    except Exception as error:
        EARLY.append(f"{where}: {type(error).__name__}")


early("import")


@trusted.on_start
def begin() -> None:
    early("on_start")


@pyenclave.ecall
def what_was_early() -> list[str]:
    thread = threading.Thread(target=early, args=("thread",))
    try:
        thread.start()
        thread.join()
    except RuntimeError:
        EARLY.append("thread: none can be made")
    return EARLY


@pyenclave.ecall(private=True)
def secret(x: int) -> int:
    return x + 1


@pyenclave.ecall
def believe(name: str) -> int:
    return int(fetch(name))


@pyenclave.ecall
def check(name: str) -> int:
    answer = fetch(name)
    value, mac = answer[:-32], answer[-32:]
    if not hmac.compare_digest(hmac.digest(KEY, name.encode() + b"=" + value, "sha256"), mac):
        raise pyenclave.PublicError("the host lies")
    return int(value)


@pyenclave.ecall
def log_it(text: str) -> None:
    trusted.call_host("log", text)


@pyenclave.ecall
def numbers(count: int) -> Iterator[int]:
    yield from range(count)
"""
MANIFEST = """\
[enclave]
name = "ocalls"
entry = "asks.py"
product_id = 1
security_version = 1
threads = 2

[ocalls]
log = "(text: str) -> None"
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("asks")
    (folder / "asks.py").write_text(ENTRY)
    (folder / "enclave.toml").write_text(MANIFEST)
    return build(folder)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, used: Callable[[Path], Path]) -> Path:
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture
def make(image: bytes, state: Path):
    made: list[Enclave] = []

    def one(fetch=lambda key: b"1", log=lambda text: None) -> Enclave:
        handlers = {"fetch": fetch, "log": log}
        made.append(Enclave(image, state=state, quiet=True, ocalls=handlers).start())
        return made[-1]

    yield one
    for enclave in made:
        enclave.close()


def test_handlers_that_do_not_fit_the_image_are_refused_before_a_launch(image, state, monkeypatch):
    from pyenclave.host import _shared

    def launched(*_: object) -> None:
        raise AssertionError("a platform was asked for")

    monkeypatch.setattr(_shared, "acquire", launched)
    with pytest.raises(OcallError, match="no handler") as caught:
        Enclave(image, state=state).start()
    assert "fetch(key: str) -> bytes" in str(caught.value.expected)
    assert "log(text: str) -> None" in str(caught.value.expected)
    with pytest.raises(OcallError, match="no handler"):
        Enclave(image, state=state, ocalls={"fetch": len}).start()
    with pytest.raises(OcallError, match="declares no ocall other"):
        Enclave(image, state=state, ocalls={"fetch": len, "log": len, "other": len}).start()


def test_trusted_code_calls_the_host_and_is_called_back(make):
    said = []
    one = make(fetch=lambda key: str(one.secret(41)).encode(), log=said.append)
    assert one.believe("x") == 42
    one.log_it("hello")
    assert said == ["hello"]
    with pytest.raises(CallError, match="private"):
        one.secret(1)
    assert list(one.numbers(4)) == [0, 1, 2, 3]
    assert one.attest(nonce=b"n")


def test_an_ocall_before_or_beside_a_call_is_refused_and_no_stub_s_body_runs_inside(make):
    asked = []
    one = make(fetch=lambda key: asked.append(key) or b"1")
    early = one.what_was_early()
    assert early[:2] == ["import: EnclaveStateError", "on_start: EnclaveStateError"]
    assert early[2] in ("thread: EnclaveStateError", "thread: none can be made")
    assert asked == []


def test_BND_13_a_host_that_lies_is_believed_unless_trusted_code_checks(make):
    key = bytes(range(32))

    def sign(name: str, value: bytes) -> bytes:
        return value + hmac.new(key, name.encode() + b"=" + value, hashlib.sha256).digest()

    answers = {"price": b"10"}
    one = make(fetch=lambda name: answers[name])
    answers["price"] = b"-1000000"
    assert one.believe("price") == -1000000  # a lie of the right form is taken
    answers["price"] = sign("price", b"10")
    assert one.check("price") == 10
    for lie in (sign("other", b"10"), b"99" + sign("price", b"10")[2:], b"99" + bytes(32), b""):
        answers["price"] = lie
        with pytest.raises(EcallError, match="the host lies"):
            one.check("price")


def test_a_worker_that_dies_while_the_host_answers_is_lost(make):
    one = make(fetch=lambda key: os.kill(one.info.pid, signal.SIGKILL) or b"1")
    with pytest.raises(EnclaveLostError):
        one.believe("x")


def test_closing_while_a_handler_waits_and_while_a_stream_is_open(make):
    go = threading.Event()
    one = make(fetch=lambda key: go.wait(10) or b"1")
    stream = one.numbers(5)
    assert next(stream) == 0
    found: list[BaseException] = []

    def call() -> None:
        try:
            one.options(timeout=20).believe("x")
        except EnclaveClosedError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    one.close()
    thread.join(5)
    go.set()
    assert not thread.is_alive()
    assert len(found) == 1
    with pytest.raises(EnclaveClosedError):
        next(stream)
    stream.close()


def test_a_handler_that_hangs_meets_kill_after(make):
    go = threading.Event()
    one = make(fetch=lambda key: go.wait(20) or b"1")
    with pytest.raises(CallTimeoutError):
        one.options(timeout=0.2, kill_after=0.2).believe("x")
    try:
        lost = False
        for _ in range(200):
            try:
                one.log_it("still there")
            except EnclaveLostError:
                lost = True
                break
            time.sleep(0.05)
        assert lost
    finally:
        go.set()
