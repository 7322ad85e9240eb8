"""Enclaves that nobody calls: they sleep, wake at once for a call, and end with their platform."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveLostError
from pyenclave.host import Enclave
from pyenclave.image import build

SCRIPT = """
from __future__ import annotations

import pyenclave


@pyenclave.ecall
def double(x: int) -> int:
    return 2 * x
"""


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    path = tmp_path / "idle_entry.py"
    path.write_text(SCRIPT)
    with Enclave(build.build_script(path), state=tmp_path / "state", quiet=True) as one:
        yield one


def sleeps(pid: int) -> int:
    """How often a process went to sleep."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_an_idle_enclave_looks_around_less_and_less_and_still_answers_at_once(
    enclave: Enclave,
) -> None:
    pid = enclave.info.pid
    for _ in range(20):  # a busy machine may have no second to the second
        called = time.monotonic()
        assert enclave.double(1) == 2
        time.sleep(0.5)
        first = sleeps(pid)
        time.sleep(1)
        second = sleeps(pid)
        if time.monotonic() - called < 1.9:
            break
    time.sleep(3)  # it sleeps for more than a second at a time by now
    third, looked = sleeps(pid), time.monotonic()
    time.sleep(2)
    assert second - first >= 6
    assert sleeps(pid) - third <= 2 + time.monotonic() - looked
    fastest = 1.0
    for number in range(3):  # a busy machine may take long once
        begun = time.monotonic()
        assert enclave.double(number) == 2 * number
        fastest = min(fastest, time.monotonic() - begun)
        if number < 2:
            time.sleep(4)
    assert fastest < 0.1


def test_an_idle_enclave_ends_with_its_platform_by_itself(
    enclave: Enclave, tmp_path: Path, stop: Callable[[int], None]
) -> None:
    """The kernel ends one that stands still: none has to look around first."""
    assert enclave.double(1) == 2
    with PlatformClient.connect(tmp_path / "state") as client:
        platform = client.hello.pid
        pidfd = os.pidfd_open(enclave.info.pid)
        try:
            stop(enclave.info.pid)
            os.kill(platform, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(30_000)
        finally:
            os.close(pidfd)
    with pytest.raises(EnclaveLostError):
        enclave.double(2)
