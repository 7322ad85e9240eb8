"""A platform process with fake zygotes, and the descriptors that a launch takes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyenclave._memfd import seal
from pyenclave._platform import client as client_module
from pyenclave._platform.client import PlatformClient
from pyenclave.calls import ring

HERE = Path(__file__).parent
SEALS_ALL = 0x1 | 0x2 | 0x4 | 0x8


def memfd(data: bytes, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, data)
    seal(fd, seals)
    return fd


def running_platforms(state: Path) -> list[int]:
    """Processes that have the state directory's path in their arguments."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if f'"state":"{state}"'.encode() in line and int(entry) != os.getpid():
                found.append(int(entry))
    return found


def gone(pid: int, seconds: float) -> bool:
    """Whether *pid* ends (or is a zombie that init has yet to reap) within *seconds*."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if status == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def state_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    yield path
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(not gone(p, 0.01) for p in running_platforms(path)):
        time.sleep(0.02)
    left = [p for p in running_platforms(path) if not gone(p, 0.01)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == [], "a platform outlived its hosts"


@pytest.fixture
def fake_bootstrap(monkeypatch: pytest.MonkeyPatch) -> str:
    text = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"
        f"sys.path[:] = [*sys.argv[2:], {str(HERE)!r}]\n"
        "import fake_zygotes; fake_zygotes.install()\n"
        "from pyenclave._platform.main import main\n"
        "main(sys.argv[1])\n"
    )
    monkeypatch.setattr(client_module, "_BOOTSTRAP", text)
    return text


@pytest.fixture
def client(state_path: Path, fake_bootstrap: str) -> Iterator[PlatformClient]:
    with PlatformClient.connect(state_path) as connected:
        yield connected


Launch = Callable[..., tuple[bytes, int]]


@pytest.fixture
def launch() -> Iterator[Callable[..., tuple[object, int]]]:
    """Launch a fake image over a client; closes what it made."""
    fds: list[int] = []

    def do(client: PlatformClient, *, options: dict[str, object] | None = None, **image: object):
        image_fd = memfd(json.dumps(image).encode(), SEALS_ALL)
        ring_fd = ring.create(1)
        try:
            launched, pidfd = client.launch(image_fd, ring_fd, **(options or {}))
        finally:
            os.close(image_fd)
            os.close(ring_fd)
        fds.append(pidfd)
        return launched, pidfd

    yield do
    for fd in fds:
        os.close(fd)
