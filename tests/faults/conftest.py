"""
What the fault tests share: images, state directories, hosts to hurt, and what they leave behind.

This process becomes the reaper of all that its hosts start (PR_SET_CHILD_SUBREAPER), so whatever
outlives its owner shows up as a child of ours and cannot hide.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyenclave
from pyenclave._platform.client import PlatformClient
from pyenclave.image import build, keys, sign

# The folder of the package under test: the installed one, or the checkout's.
ROOT = Path(pyenclave.__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36

ENTRY = """
import os
import time

import numpy as np

import pyenclave
from pyenclave import trusted


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x


@pyenclave.ecall
def echo(data: bytes) -> bytes:
    return data


@pyenclave.ecall
def many(size: int) -> bytes:
    return bytes(size)


@pyenclave.ecall
def total(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values.sum())


@pyenclave.ecall
def nap(seconds: float) -> int:
    time.sleep(seconds)
    return 1


@pyenclave.ecall
def fail(text: str) -> int:
    raise ValueError(text)


@pyenclave.ecall
def vanish() -> int:
    os._exit(9)


@pyenclave.ecall
def fill(size: int) -> int:
    return len(bytearray(size))


@pyenclave.ecall
def keep(data: bytes) -> bytes:
    return trusted.seal(data)


@pyenclave.ecall
def recall(blob: bytes) -> bytes:
    return trusted.unseal(blob)


@pyenclave.ecall
def count() -> int:
    return trusted.Counter.create().increment()
"""
MANIFEST = """
[enclave]
name = "patient"
entry = "patient.py"
product_id = 7
security_version = {svn}
threads = 4
debug = true

[memory]
message = "2 MiB"
"""


@dataclass(frozen=True)
class Images:
    """One enclave in several forms, all with the same lock, so that they share zygotes."""

    unsigned: bytes
    signed: bytes  # security version 2
    older: bytes  # the same signer, security version 1
    foreign: bytes  # security version 2, another signer
    mrsigner: bytes


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The enclave of these tests."""
    from pyenclave.formats.image import Image
    from pyenclave.measurement.image import verify_image

    built = []
    for svn in (1, 2):
        folder = tmp_path_factory.mktemp("patient")
        (folder / "patient.py").write_text(ENTRY)
        (folder / "enclave.toml").write_text(MANIFEST.format(svn=svn))
        built.append(build.build(folder))
    key = keys.keygen()
    signed = sign.sign(built[1], key)
    return Images(
        unsigned=built[1],
        signed=signed,
        older=sign.sign(built[0], key),
        foreign=sign.sign(built[1], keys.keygen()),
        mrsigner=verify_image(Image.parse(signed)).mrsigner,
    )


# ---- processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A line of /proc."""

    pid: int
    parent: int
    state: str
    name: str


def processes() -> dict[int, Process]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                head, _, tail = Path(f"/proc/{entry}/stat").read_text().rpartition(")")
                fields = tail.split()
                name = head.partition("(")[2]
                found[int(entry)] = Process(int(entry), int(fields[1]), fields[0], name)
    return found


def descendants(of: int) -> list[Process]:
    """All living processes below *of*; zombies are dead."""
    table = processes()
    below: list[Process] = []
    parents = {of}
    while True:
        new = [p for p in table.values() if p.parent in parents and p not in below]
        if not new:
            return [p for p in below if p.state != "Z"]
        below += new
        parents = {p.pid for p in new}


def reap() -> None:
    """Collect dead orphans that fell to us, but no child of the subprocess module."""
    ours = {p.pid for p in subprocess._active}  # type: ignore[attr-defined]
    for process in processes().values():
        if process.parent == os.getpid() and process.state == "Z" and process.pid not in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until *condition* holds, five times *seconds* at most: a busy machine is no bug."""
    seconds *= 5
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)


class Family:
    """All processes that a test's hosts started, and what may remain of them."""

    def __init__(self) -> None:
        self.before = {p.pid for p in descendants(os.getpid())}

    def living(self) -> list[Process]:
        reap()
        return [p for p in descendants(os.getpid()) if p.pid not in self.before]

    def check_gone(self, seconds: float = 5.0) -> None:
        """Fail unless everybody is gone within five times *seconds* (see until)."""
        seconds *= 5
        deadline = time.monotonic() + seconds
        while left := self.living():
            if time.monotonic() > deadline:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                pytest.fail(f"left behind after {seconds:g} s: {left}")
            time.sleep(0.01)


@pytest.fixture
def family() -> Iterator[Family]:
    """Who was started during the test; whoever outlives it for long makes it fail."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    them = Family()
    yield them
    try:
        them.check_gone()
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# ---- places ------------------------------------------------------------------------------------

_KNOWN = ("root", "platform-root.pem", "state.lock", "counters", "counters.mark", "counters.lock")


def strange_files(state: Path, *, killed: bool = False) -> list[str]:
    """Files that nothing should have left there; *killed*: but who was while it tried to write."""
    return sorted(
        entry.name
        for entry in state.iterdir()
        if entry.name not in _KNOWN
        and not (
            entry.name.startswith(("platform-", "start-")) and entry.suffix in (".lock", ".log")
        )
        and not re.fullmatch(r"code-[0-9a-f]{16}", entry.name)  # compiled code: a cache
        and not (killed and re.fullmatch(r"\.try-[0-9]+-[0-9a-f]{8}", entry.name))
    )


@pytest.fixture
def state(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of the test's own; empty of leftovers when all is over."""
    folder = tmp_path / "state"
    monkeypatch.setenv("PYENCLAVE_STATE", str(folder))
    yield folder
    family.check_gone()
    if folder.is_dir() and os.access(folder, os.R_OK):
        assert strange_files(folder) == []


@pytest.fixture
def platform(state: Path) -> Iterator[PlatformClient]:
    """A platform that runs as long as the test."""
    with PlatformClient.connect() as client:
        yield client


# ---- hosts -------------------------------------------------------------------------------------


class Host:
    """A forked child that runs *action*; what it says comes through a pipe, a JSON line each."""

    def __init__(self, action: Callable[[Callable[[Any], None]], Any]) -> None:
        readable, writable = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(readable)
                action(lambda value: _say(writable, value))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writable)
        self.pipe = readable
        self._rest = b""
        self.status: int | None = None

    def heard(self, seconds: float) -> Any:
        """The next thing that the child says; None if it ended."""
        seconds = max(seconds, 30.0)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            ready = select.select([self.pipe], [], [], max(0.0, left))[0]
            assert ready, f"the host said nothing for {seconds:g} s"
            data = os.read(self.pipe, 65536)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(5)

    def wait(self, seconds: float) -> int:
        """Wait for the child's end and return its exit code; negative for a signal."""

        def ended() -> bool:
            if self.status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.status = status
            return self.status is not None

        until(ended, seconds, "the host's end")
        return os.waitstatus_to_exitcode(self.status or 0)

    def close(self) -> None:
        self.kill()
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1


def _say(fd: int, value: Any) -> None:
    os.write(fd, json.dumps(value).encode() + b"\n")


@pytest.fixture
def host(family: Family) -> Iterator[Callable[..., Host]]:
    """``host(action)``: run ``action(say)`` in a forked child; killed at the end."""
    made: list[Host] = []

    def start(action: Callable[[Callable[[Any], None]], Any]) -> Host:
        made.append(Host(action))
        return made[-1]

    yield start
    for one in made:
        one.close()


# Runs in a fresh process: limits and filters cannot be taken back. What it prints last is JSON.
_PRELUDE = '''
import ctypes, json, os, resource, struct, sys, time
sys.path.insert(0, {root!r})

def limit(name, value):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))

def ordinary():
    """Be an ordinary user: what root may do regardless is what its capabilities allow."""
    if os.geteuid() == 0:
        from pyenclave._native import drop_capabilities
        drop_capabilities()

def deny(numbers, error):
    """Become a kernel without these system calls, for this process and all below it."""
    from pyenclave._ffi import ffi, lib
    assert lib.pye_seccomp_deny(ffi.new("int[]", numbers), len(numbers), error) == 0

def deny_if(number, argument, mask, error, value=None):
    """The same for a call with one of the bits *mask* in an argument, or with that *value*."""
    def op(code, k, yes=0, no=0): return struct.pack("HBBI", code, yes, no, k)
    test = op(0x45, mask, 0, 1) if value is None else op(0x15, value, 0, 1)
    code = [op(0x20, 0), op(0x15, number, 0, 3), op(0x20, 16 + 8 * argument), test,
            op(0x06, 0x50000 | error), op(0x06, 0x7fff0000)]
    packed = b"".join(code)
    held = ctypes.create_string_buffer(packed)
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.create_string_buffer(program)) == 0, ctypes.get_errno()

def outcome(action):
    begin = time.monotonic()
    try:
        value = action()
        return {{"value": value, "seconds": time.monotonic() - begin}}
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {{"error": kinds, "text": str(error), "seconds": time.monotonic() - begin}}

def answer(value):
    print(json.dumps(value), flush=True)

IMAGE = open(sys.argv[1], "rb").read() if len(sys.argv) > 1 else b""
from pyenclave import errors
from pyenclave.host import Enclave
'''


@pytest.fixture
def program(state: Path, tmp_path: Path) -> Callable[..., Any]:
    """``program(source, image=b"", seconds=100)``: run Python in a fresh process; its last line."""

    def run(source: str, image: bytes = b"", *, seconds: float = 100.0, **environment: str) -> Any:
        path = tmp_path / "image"
        path.write_bytes(image)
        prelude = _PRELUDE.format(root=str(ROOT))
        done = subprocess.run(
            [sys.executable, "-c", prelude + source, str(path)],
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "PYENCLAVE_STATE": str(state), **environment},
            cwd="/",
            check=False,
        )
        lines = done.stdout.decode().splitlines()
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr.decode()[-3000:]}"
        assert lines, done.stderr.decode()[-3000:]
        return json.loads(lines[-1])

    return run


@pytest.fixture
def helpers() -> type[Helpers]:
    """The functions of this module that tests call."""
    return Helpers


class Helpers:
    """See ``helpers``."""

    until = staticmethod(until)
    descendants = staticmethod(descendants)
    strange_files = staticmethod(strange_files)

    @staticmethod
    def zygotes(platform_pid: int) -> list[int]:
        """Children of a platform."""
        return [p.pid for p in processes().values() if p.parent == platform_pid and p.state != "Z"]

    @staticmethod
    def fds(pid: int | str = "self") -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    @staticmethod
    def links(pid: int | str = "self") -> list[str]:
        """What the descriptors of a process are, as far as one may look."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.append(f"{entry}: {os.readlink(f'/proc/{pid}/fd/{entry}')}")
        return found

    @staticmethod
    def threads(pid: int | str = "self") -> int:
        return len(os.listdir(f"/proc/{pid}/task"))

    @staticmethod
    def resident(pid: int | str = "self") -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
