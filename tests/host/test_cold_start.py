"""Starting anew after the platform was killed: with compiled code at hand, and a zygote ahead."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveLostError, LaunchError
from pyenclave.formats.image import Image
from pyenclave.host import Enclave
from pyenclave.image.build import build_script

ENTRY = """
import pyenclave

@pyenclave.ecall
def add(a: int, b: int) -> int:
    return a + b
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("cold") / "adding.py"
    path.write_text(ENTRY)
    return build_script(path)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def processes(state: Path) -> tuple[list[int], list[int]]:
    """The platforms of a state directory, and their zygotes."""
    platforms, children = [], []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdecimal():
                line = Path("/proc", name, "cmdline").read_bytes()
                parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1]
                if f'"state":"{state}"'.encode() in line:
                    platforms.append(int(name))
                elif b"_worker/boot.py" in line:
                    children.append((int(parent), int(name)))
    return platforms, [pid for parent, pid in children if parent in platforms]


def wait_for(condition: Callable[[], bool], seconds: float = 45) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def call_until_lost(enclave: Enclave) -> None:
    while True:
        enclave.add(1, 2)


def kept(state: Path) -> list[Path]:
    return list(state.glob("code-*"))


def test_a_killed_platform_is_replaced_and_its_code_is_used_again(image, state) -> None:
    """Once, twice; whatever happens to the file in between."""
    with Enclave(image, state=state, quiet=True) as first:
        assert first.add(1, 2) == 3
        assert wait_for(lambda: bool(kept(state)))
        (platform,), _ = processes(state)
        os.kill(platform, signal.SIGKILL)
        with pytest.raises(EnclaveLostError):
            call_until_lost(first)
        for damage in (b"", b"damaged"):
            (path,) = kept(state)
            used = path.stat().st_mtime_ns
            if damage:
                path.write_bytes(damage)
            with Enclave(image, state=state, quiet=True) as again:
                assert again.add(3, 4) == 7
                assert bool(kept(state)) == (not damage)
                assert damage or path.stat().st_mtime_ns > used
            assert wait_for(lambda: processes(state) == ([], []))


def test_a_host_that_says_what_it_will_launch_finds_it_begun(image, state) -> None:
    """A platform begins with the zygote of a lock that it has code of, and with no other."""
    digest = hashlib.sha256(Image.parse(image).lock_bytes).digest()
    with Enclave(image, state=state, quiet=True):
        assert wait_for(lambda: bool(kept(state)))
    assert wait_for(lambda: processes(state) == ([], []))
    for expect, begun in (
        ((digest, True), True),
        ((digest, False), False),
        ((bytes(32), True), False),
    ):
        with PlatformClient.connect(state, expect=expect):
            assert wait_for(lambda: len(processes(state)[1]) == 1, 10 if begun else 1) == begun
        assert wait_for(lambda: processes(state) == ([], []))


def test_a_zygote_that_was_begun_for_nothing_refuses_nothing(image, state) -> None:
    """If it cannot start, whoever launches it hears why, and nobody else does."""
    with Enclave(image, state=state, quiet=True):
        assert wait_for(lambda: bool(kept(state)))
    assert wait_for(lambda: processes(state) == ([], []))
    (path,) = kept(state)
    with PlatformClient.connect(state, expect=(hashlib.sha256(b"").digest(), True)) as client:
        assert client.list() == ()
    assert wait_for(lambda: processes(state) == ([], []))
    # The zygote that was begun is killed while the host still makes up its mind.
    digest = hashlib.sha256(Image.parse(image).lock_bytes).digest()
    with PlatformClient.connect(state, expect=(digest, True)):
        assert wait_for(lambda: len(processes(state)[1]) == 1, 10)
        os.kill(processes(state)[1][0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with Enclave(image, state=state, quiet=True) as enclave:
                    assert enclave.add(1, 1) == 2
                break
            except LaunchError:
                assert time.monotonic() < deadline
    assert path.exists()


def test_without_a_root_that_lasts_no_code_is_kept(image, tmp_path) -> None:
    """Nothing is written, and nothing is missing."""
    (tmp_path / "file").write_text("in the way")
    state = tmp_path / "file" / "state"
    with Enclave(image, state=state, quiet=True) as enclave:
        assert enclave.add(1, 2) == 3
        (_,), (zygote,) = processes(state)
        command = Path(f"/proc/{zygote}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        # Socket for compiled code, table, lock, importer, compiled code: neither of the two.
        numbers = command[command.index(b"-c") + 2 :]
        assert (numbers[2], numbers[6]) == (b"-1", b"-1")
    assert wait_for(lambda: processes(state) == ([], []))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
