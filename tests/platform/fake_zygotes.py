"""
A stand-in for zygotes and images, loaded into a platform process under test.

An "image" is a JSON object with the members of _FakeImage; its ``behaviour`` says what the
worker does. Workers speak the real protocol over the real channel.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import msgspec

_WORKER = (
    "import sys; sys.path[:] = sys.argv[3:]\n"
    "from fake_zygotes import work\n"
    "work(sys.argv[1], int(sys.argv[2]))\n"
)


class _FakeImage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    behaviour: str = "good"
    name: str = "fake"
    signed: bool = False
    debug: bool = True
    product_id: int = 1
    security_version: int = 1
    signer: int = 1
    code: int = 1


def parse_and_verify(data: Any) -> Any:
    from pyenclave.errors import ImageError

    try:
        image = msgspec.json.decode(bytes(data[:]), type=_FakeImage)
    except msgspec.DecodeError as error:
        raise ImageError(f"no fake image: {error}") from None
    return SimpleNamespace(
        info=SimpleNamespace(
            name=image.name, debug=image.debug, jit=False, threads=1, shared_memory=0
        ),
        lock_bytes=image.behaviour.encode(),
        identity=SimpleNamespace(
            mrenclave=bytes([image.code]) * 32,
            mrsigner=bytes([image.signer if image.signed else 0]) * 32,
            product_id=image.product_id,
            security_version=image.security_version,
            signed=image.signed,
            debug_allowed=image.debug,
        ),
    )


class FakeZygotes:
    def get(self, lock_bytes: bytes, *, debug: bool) -> FakeZygote:
        from pyenclave.errors import RuntimeLockError

        if lock_bytes == b"other runtime":
            raise RuntimeLockError("the runtime differs", files=("site:numpy/__init__.py changed",))
        if lock_bytes == b"slow zygote":
            time.sleep(30)
        return FakeZygote(lock_bytes.decode())

    def ready(self, lock_bytes: bytes, *, debug: bool) -> bool:
        return lock_bytes != b"slow zygote"

    def rouse(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeZygote:
    alive = True

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    def spawn(
        self, *, image_fd: int, ring_fd: int, channel_fd: int, debug: bool, image: bytes = b""
    ) -> Any:
        from pyenclave.errors import LaunchError

        if self.behaviour == "no worker":
            raise LaunchError("clone: no memory")
        if self.behaviour == "no thread":
            _refuse_one_thread()
        child = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-B",
                "-c",
                _WORKER,
                self.behaviour,
                str(channel_fd),
                *sys.path,
            ],
            pass_fds=(channel_fd,),
            stdin=subprocess.DEVNULL,
        )
        pidfd = os.pidfd_open(child.pid)
        child.returncode = 0  # reaped by the kernel: SIGCHLD is ignored in install()
        began, forget = (lambda: True), (lambda: None)
        return SimpleNamespace(
            pid=child.pid, pidfd=pidfd, namespaces=(), began=began, forget=forget
        )


def _refuse_one_thread() -> None:
    """Let the next start of a thread in this process fail as it does at a limit."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        threading.Thread.start = start  # type: ignore[method-assign]
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]


def install() -> None:
    """Put the fakes into this (platform) process."""
    from pyenclave._platform import launch, main, server

    launch._parse_and_verify = parse_and_verify  # type: ignore[assignment]
    main.make_zygotes = lambda roots, executable, codes: FakeZygotes()  # type: ignore[assignment]
    server._IDLE_GRACE = 0.1  # type: ignore[misc]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def work(behaviour: str, channel_fd: int) -> None:
    from pyenclave.calls.channel import Channel, close_all
    from pyenclave.errors import EnclaveError, EnclaveLostError
    from pyenclave.formats import messages
    from pyenclave.formats.sgx import KeyRequest, ReportBody, TargetInfo

    channel = Channel.from_fd(channel_fd)
    if behaviour == "dies":
        os._exit(3)
    if behaviour == "silent":
        time.sleep(600)
    if behaviour == "garbage":
        channel._sock.send(b"\xff\x00garbage")
        time.sleep(600)
    if behaviour == "ending":
        # As a real one: what is not read when it ends would take its last words with it.
        close_all(channel.receive(10)[1])
        channel.send(messages.Ending(code="image", message="the entry raised ImportError"))
        return
    if behaviour == "early running":
        channel.send(messages.Ready(runtime_public_key=b"k" * 32))
        time.sleep(600)
    inside: dict[str, bool | int] = {"landlock": 7, "netns": True, "mdwe": False}
    if behaviour == "liar":
        inside["dumpable_off"] = True
    if behaviour == "many bits":
        inside = {f"bit_{n}": True for n in range(500)}
    if behaviour != "never shut":
        channel.send(messages.Shut())
    if behaviour == "dies when shut":
        os._exit(3)
    if behaviour == "shut twice":
        channel.send(messages.Shut())
    channel.send(messages.Closed(inside=inside, secret_memory="locked"))
    if behaviour == "dies before it is ready":
        os._exit(3)
    if behaviour == "dies warm":
        close_all(channel.receive(10)[1])  # as above
    channel.send(messages.Ready(runtime_public_key=os.urandom(32)))
    if behaviour == "dies warm":
        os._exit(3)
    if behaviour == "speaks warm":
        channel.send(messages.QuoteRequest(data=bytes(64)))
    identity, fds = channel.receive(600)
    while isinstance(identity, messages.Output | messages.Soon):
        close_all(fds)
        identity, fds = channel.receive(600)
    assert isinstance(identity, messages.Identity), identity
    body = ReportBody.from_bytes(identity.body)
    if behaviour == "dies after identity":
        os._exit(3)
    if behaviour.startswith("tells "):
        with open(behaviour.removeprefix("tells "), "ab") as told:
            told.write(identity.body + identity.enclave_id)
    if behaviour == "poisons":
        channel.send(messages.Poisoned(reason="sequence number went back"))
        os._exit(4)
    if behaviour == "hello":
        channel.send(messages.Hello())
        time.sleep(600)
    if behaviour == "floods":
        while True:
            channel.send(messages.QuoteRequest(data=bytes(64)))
    if behaviour.startswith("asks "):
        # One request after the other; the answers go to a file, MessagePack behind lengths.
        out = open(behaviour.removeprefix("asks "), "wb", buffering=0)  # noqa: SIM115
        target = TargetInfo.of(body)
        requests: list[messages.Message] = [
            messages.KeyRequestMessage(request=KeyRequest(key_name=4, key_policy=1).to_bytes()),
            messages.KeyRequestMessage(request=KeyRequest(key_name=4, key_policy=2).to_bytes()),
            messages.KeyRequestMessage(request=KeyRequest(key_name=3).to_bytes()),
            messages.KeyRequestMessage(request=b"short"),
            messages.ReportRequest(target=target.to_bytes(), data=b"r" * 64),
            messages.ReportRequest(target=target.to_bytes(), data=b"r"),
            messages.QuoteRequest(data=b"q" * 64),
            messages.CounterRequest(operation="create"),
            messages.CounterRequest(operation="eat"),
            messages.CounterRequest(operation="read", counter_id=bytes(16), mark=bytes(32)),
            messages.CounterRequest(operation="increment", counter_id=bytes(16), mark=b"short"),
        ]
        for request in requests:
            channel.send(request)
            answer, _ = channel.receive(10)
            data = messages.encode(answer)
            out.write(len(data).to_bytes(4, "little") + data)
            if isinstance(answer, messages.ReportReply):
                channel.send(messages.VerifyReport(report=answer.report))
                verified, _ = channel.receive(10)
                data = messages.encode(verified)
                out.write(len(data).to_bytes(4, "little") + data)
        out.close()
    try:
        channel.receive(600)
    except (EnclaveLostError, EnclaveError):
        os._exit(0)
