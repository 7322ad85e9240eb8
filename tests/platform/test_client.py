"""Finding, starting and losing the platform process."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyenclave._platform import client as client_module
from pyenclave._platform.client import PlatformClient, local_platform_root
from pyenclave._platform.server import MAX_HOSTS
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    PlatformUnavailableError,
)
from pyenclave.formats import messages

ROOT = Path(__file__).resolve().parents[2]


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def open_fds(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_without_start_a_missing_platform_is_a_typed_error(state_path: Path) -> None:
    with pytest.raises(PlatformUnavailableError, match="no platform runs"):
        PlatformClient.connect(state_path, start=False)


def test_two_connections_share_one_platform(client: PlatformClient, state_path: Path) -> None:
    with PlatformClient.connect(state_path, start=False) as second:
        assert second.hello == client.hello
        assert second.root() == client.root()
    assert client.hello.level == "embedded"
    assert not client.hello.ephemeral
    assert client.hello.pid != os.getpid()


def test_the_platform_runs_no_scripts_of_others() -> None:
    """PEP 768: a process of the same user writes the name of a script into this one's memory."""
    if not getattr(sys, "is_remote_debug_enabled", bool)():
        pytest.skip("this Python runs no scripts of other processes")

    def runs_them(*flags: str) -> bool:
        code = "import sys; sys.exit(sys.is_remote_debug_enabled())"
        done = subprocess.run([sys.executable, *flags, "-c", code], check=False)
        return done.returncode == 1

    assert runs_them()
    assert not runs_them(*client_module._FLAGS)


def test_the_platform_ends_soon_after_its_last_host(state_path: Path, fake_bootstrap: str) -> None:
    first = PlatformClient.connect(state_path)
    second = PlatformClient.connect(state_path)
    pid = first.hello.pid
    first.close()
    time.sleep(0.5)
    assert second.list() == ()
    second.close()
    assert gone(pid, 20)
    assert not list(state_path.glob("*.sock"))


def test_the_platform_leaves_no_child_with_its_host(state_path: Path, fake_bootstrap: str) -> None:
    def children() -> set[str]:  # zombies too
        tasks = Path("/proc/self/task").iterdir()
        return {pid for task in tasks for pid in (task / "children").read_text().split()}

    # Other tests' fixtures may have children of their own here, a session's zygotes among them.
    before = children()
    with PlatformClient.connect(state_path) as client:
        assert gone(client.hello.pid, 0) is False
        assert children() <= before


def test_connecting_often_keeps_descriptors_and_threads_constant(
    client: PlatformClient, state_path: Path
) -> None:
    def one() -> None:
        PlatformClient.connect(state_path).close()

    for _ in range(5):
        one()
    before = open_fds()
    for _ in range(50):
        one()
    assert open_fds() <= before
    deadline = time.monotonic() + 20
    while len(os.listdir(f"/proc/{client.hello.pid}/task")) > 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir(f"/proc/{client.hello.pid}/task")) <= 4


_RACER = """
import sys
sys.path[:] = sys.argv[3:]
from pyenclave._platform import client
client._BOOTSTRAP = sys.argv[2]
client = client.PlatformClient.connect(sys.argv[1])
print(client.hello.pid, client.hello.instance.hex(), client.root().certificate.hex(), flush=True)
sys.stdin.read()
"""


def test_hosts_that_race_to_start_get_one_platform_and_one_root(
    state_path: Path, fake_bootstrap: str
) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(state_path), fake_bootstrap, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    lines = set()
    for racer in racers:
        assert racer.stdout is not None
        lines.add(racer.stdout.readline())
    for racer in racers:
        racer.communicate(timeout=60)
    assert len(lines) == 1
    assert lines != {b""}


def test_a_stale_socket_is_replaced(state_path: Path, fake_bootstrap: str) -> None:
    with PlatformClient.connect(state_path) as client:
        pid = client.hello.pid
        os.kill(pid, signal.SIGKILL)
        assert gone(pid, 20)
        assert list(state_path.glob("*.sock"))
        with pytest.raises(EnclaveLostError):
            client.list()
        assert client.closed
    with PlatformClient.connect(state_path) as client:
        assert client.hello.pid != pid


def test_killed_at_random_moments_the_next_connect_starts_anew(
    state_path: Path, fake_bootstrap: str
) -> None:
    chance = random.Random(7)
    for _ in range(8):
        with PlatformClient.connect(state_path) as client:
            assert client.root().certificate
            pid = client.hello.pid
            timer = threading.Timer(chance.uniform(0, 0.02), os.kill, (pid, signal.SIGKILL))
            timer.start()
            try:
                while True:
                    client.list()
            except EnclaveLostError:
                pass
            timer.join()
    roots = set()
    with PlatformClient.connect(state_path) as client:
        roots.add(client.root().certificate)
    assert len(roots) == 1


def test_a_stopped_platform_gives_a_typed_error_and_no_hang(
    client: PlatformClient, state_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_ANSWER_TIMEOUT", 0.4)
    os.kill(client.hello.pid, signal.SIGSTOP)
    try:
        with pytest.raises(PlatformUnavailableError, match="does not answer"):
            PlatformClient.connect(state_path)
    finally:
        os.kill(client.hello.pid, signal.SIGCONT)
    assert client.list() == ()


def test_a_platform_that_cannot_start_is_a_typed_error(
    state_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BOOTSTRAP", "import sys; sys.exit(5)")
    with pytest.raises(PlatformUnavailableError, match="did not start"):
        PlatformClient.connect(state_path)


def test_a_corrupt_root_is_named_by_the_platform_that_will_not_start(
    state_path: Path, fake_bootstrap: str
) -> None:
    (state_path / "root").write_bytes(b"x" * 72)
    (state_path / "root").chmod(0o600)
    with pytest.raises(PlatformUnavailableError, match=r"root secret .*/state/root is damaged"):
        PlatformClient.connect(state_path)


def test_a_forked_child_may_not_use_the_connection(client: PlatformClient) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.list()
        except EnclaveStateError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    assert b"belongs to the parent process" in os.read(read, 4096)
    os.close(read)
    assert client.list() == ()


def test_a_forked_child_does_not_keep_the_platform_alive(
    state_path: Path, fake_bootstrap: str
) -> None:
    client = PlatformClient.connect(state_path)
    platform = client.hello.pid
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    client.close()
    try:
        assert gone(platform, 20)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_closed_client_refuses(client: PlatformClient) -> None:
    client.close()
    client.close()
    with pytest.raises(EnclaveClosedError):
        client.list()


def _connect_as_nobody(path: str, write: int) -> None:
    os.setgid(65534)
    os.setuid(65534)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
        sock.send(messages.encode(messages.Hello()))
        sock.settimeout(20)
        answer = sock.recv(4096)
        os.write(write, b"closed" if not answer else b"answered")
    except (BrokenPipeError, ConnectionResetError):
        os.write(write, b"closed")
    except PermissionError:
        os.write(write, b"refused")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("opened", [False, True])
def test_another_user_is_refused_even_through_an_open_directory(
    client: PlatformClient, state_path: Path, opened: bool
) -> None:
    (path,) = state_path.glob("*.sock")
    if opened:  # modes widened by mistake: the credentials still keep others out
        for folder in [state_path, *state_path.parents]:
            if str(folder).startswith("/tmp/") and folder.stat().st_uid == os.geteuid():
                folder.chmod(0o777)
        path.chmod(0o777)
    read, write = os.pipe()
    child = multiprocessing.get_context("fork").Process(
        target=_connect_as_nobody, args=(str(path), write)
    )
    child.start()
    child.join(10)
    os.close(write)
    assert os.read(read, 100) == (b"closed" if opened else b"refused")
    os.close(read)
    state_path.chmod(0o700)
    assert client.list() == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_socket_of_another_user_is_not_trusted(
    state_path: Path, fake_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlatformClient.connect(state_path) as client:
        (name,) = (p.name for p in state_path.glob("*.sock"))
        pid = client.hello.pid
    assert gone(pid, 20)
    for folder in [state_path, *state_path.parents]:
        if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
            folder.chmod(0o777)
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(state_path / name))
        os.chmod(state_path / name, 0o777)
        listener.listen()
        os.write(ready_write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready_read, 1)
    os.close(ready_read)
    os.close(ready_write)
    state_path.chmod(0o700)
    try:
        with pytest.raises(PlatformUnavailableError, match="another user listens"):
            PlatformClient.connect(state_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for folder in state_path.parents:
            if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
                folder.chmod(0o700)


def raw(state_path: Path) -> socket.socket:
    (path,) = state_path.glob("*.sock")
    folder = os.open(state_path, os.O_PATH | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)
    sock.settimeout(20)
    return sock


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff" * 100,
        b"\x81\xa1t\xa5helloo",
        b"\x82\xa1t\xa5hello\xa7unknown\x01",
        b"\x81\xa1t\xa6nobody",
        b"\x91" * 60000,
        b"\x81\xa1t\xa9identity_",
        bytes(70000),
        messages.encode(messages.List()),
        messages.encode(messages.Ok()),
        messages.encode(messages.Hello(version=99)),
    ],
    ids=lambda packet: packet[:12].hex() + f"-{len(packet)}",
)
def test_a_hostile_first_packet_ends_that_connection_only(
    client: PlatformClient, state_path: Path, packet: bytes
) -> None:
    with raw(state_path) as sock:
        sock.send(packet)
        answer = b""
        try:
            answer = sock.recv(65536)
            ended = not answer or sock.recv(65536) == b""
        except ConnectionResetError:
            ended = True
        assert ended
    assert client.list() == ()


def test_a_slow_or_silent_host_does_not_hold_up_another(
    client: PlatformClient, state_path: Path
) -> None:
    silent = [raw(state_path) for _ in range(20)]  # and for ever
    with PlatformClient.connect(state_path) as other:
        assert other.list() == ()
    for sock in silent:
        sock.close()


def test_a_host_that_does_not_read_does_not_hold_up_another(
    client: PlatformClient, state_path: Path
) -> None:
    with raw(state_path) as deaf:
        deaf.setblocking(False)
        deaf.send(messages.encode(messages.Hello()))
        question = messages.encode(messages.Root())
        try:
            for _ in range(100000):
                deaf.send(question)
        except BlockingIOError:
            pass
        for _ in range(20):
            assert client.list() == ()


def test_too_many_hosts_are_refused_with_busy(client: PlatformClient, state_path: Path) -> None:
    socks = []
    for _ in range(MAX_HOSTS + 16):
        sock = raw(state_path)
        sock.send(messages.encode(messages.Hello()))
        socks.append(sock)
    answers = [messages.decode(sock.recv(65536)) for sock in socks]
    refused = [answer for answer in answers if isinstance(answer, messages.Failure)]
    assert len(refused) == 16 + 1
    assert {answer.code for answer in refused} == {"call.busy"}
    for sock in socks:
        sock.close()
    assert client.list() == ()


@pytest.mark.parametrize("count", [1, 8, 9, 253])
def test_bnd_19_descriptors_where_none_belong_are_closed(
    client: PlatformClient, state_path: Path, count: int
) -> None:
    with raw(state_path) as sock:
        sock.send(messages.encode(messages.Hello()))
        sock.recv(65536)
        before = open_fds(client.hello.pid)
        null = os.open("/dev/null", os.O_RDONLY)
        fds = struct.pack(f"{count}i", *[null] * count)
        sock.sendmsg(
            [messages.encode(messages.List())], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        )
        os.close(null)
        answer = messages.decode(sock.recv(65536))
        assert isinstance(answer, messages.Failure)
        if count > 8:  # cut short by the receiver: this connection is over
            assert answer.code == "state"
            assert sock.recv(65536) == b""
            before -= 1
        else:
            assert answer.code == "call.argument"
        assert open_fds(client.hello.pid) <= before


def test_the_platform_cannot_be_read_by_its_own_user(client: PlatformClient) -> None:
    if os.geteuid() == 0:
        # Root's CAP_SYS_PTRACE would read anything: try as what root is without it.
        status = Path(f"/proc/{client.hello.pid}/status").read_text()
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert f"{name}:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
    else:
        with pytest.raises(PermissionError):
            os.open(f"/proc/{client.hello.pid}/mem", os.O_RDONLY)
    limits = Path(f"/proc/{client.hello.pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits


@pytest.mark.no_asan(reason="a sanitizer build lets its own variables through")
def test_the_platform_inherits_neither_descriptors_nor_environment(
    state_path: Path, fake_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS"):  # a sanitizer build's only
        monkeypatch.setenv(name, "/nowhere/libasan.so.8")
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
    for fd in extra:
        os.set_inheritable(fd, True)
    try:
        with PlatformClient.connect(state_path) as client:
            # null ×2, log, two pipe ends, listener, state, lock, host, and a spare or two
            assert open_fds(client.hello.pid) < 16
            environment = Path(f"/proc/{client.hello.pid}/environ")
            if os.geteuid() == 0:
                assert b"SECRET_TOKEN" not in environment.read_bytes()
                assert b"PYTHONPATH" not in environment.read_bytes()
                assert b"libasan" not in environment.read_bytes()
            assert os.getsid(client.hello.pid) != os.getsid(0)
    finally:
        for fd in extra:
            os.close(fd)


def test_the_root_certificate_is_read_without_starting_anything(
    state_path: Path, fake_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    monkeypatch.setenv("PYENCLAVE_STATE", str(state_path))
    started = local_platform_root()
    with PlatformClient.connect() as client:
        assert client.root().certificate == started.public_bytes(Encoding.DER)
        pid = client.hello.pid
    assert gone(pid, 20)
    monkeypatch.setattr(client_module, "_BOOTSTRAP", "raise SystemExit(5)")
    assert local_platform_root() == started
    assert client_module.PlatformClient  # nothing ran: the bootstrap above would have failed


def test_an_unusable_place_gives_an_ephemeral_platform(tmp_path: Path, fake_bootstrap: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with PlatformClient.connect(blocked / "state") as client:
        assert client.hello.ephemeral
        assert client.root().ephemeral
        pid = client.hello.pid
        with PlatformClient.connect(blocked / "state") as second:
            # Shared by an abstract name, so that two hosts still have one root.
            assert second.hello.instance == client.hello.instance
    assert gone(pid, 20)


def test_a_long_path_of_the_state_directory_works(tmp_path: Path, fake_bootstrap: str) -> None:
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    with PlatformClient.connect(deep) as client:
        assert not client.hello.ephemeral
        pid = client.hello.pid
    assert gone(pid, 20)


def test_waiting_for_an_answer_costs_no_processor_time(client: PlatformClient) -> None:
    assert client.list() == ()
    before = Path(f"/proc/{client.hello.pid}/stat").read_text().rsplit(")", 1)[1].split()
    select.select([], [], [], 0.5)
    after = Path(f"/proc/{client.hello.pid}/stat").read_text().rsplit(")", 1)[1].split()
    assert int(after[11]) + int(after[12]) - int(before[11]) - int(before[12]) <= 5
