"""Fixtures that every test may use."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import pyenclave

# Timings never fail a test: a busy machine is no bug.
settings.register_profile("pyenclave", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyenclave")

# Tests start programs of their own. They must find the same pyenclave: the installed one by
# itself, a checkout's (python -m pytest) by its path.
_HOME = Path(pyenclave.__file__).resolve().parent.parent
if _HOME.name != "site-packages":
    os.environ["PYTHONPATH"] = str(_HOME)
# Nor may they find the checkout's sources because they run in its folder.
os.environ["PYTHONSAFEPATH"] = "1"

# Who starts the suite in the background (nohup, &) has these ignored, and what is ignored is
# inherited: a test that sends one would wait for ever.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

if os.environ.get("PYENCLAVE_COVERAGE") == "1":
    import counters

    if not counters.share_all():
        raise RuntimeError("PYENCLAVE_COVERAGE is set, and this build has no counters")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of test vectors that nobody of this project made."""
    folder = Path(os.environ.get("PYENCLAVE_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not folder.is_dir():
        pytest.skip(f"test vectors are not at {folder} (set PYENCLAVE_VECTORS)")
    return folder


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage looks at it again, here or in children."""
    gc.collect()
    gc.freeze()


_USED_ENTRY = """
import pyenclave


@pyenclave.ecall
def nothing() -> int:
    return 0
"""
_USED_SECONDS = 60.0


def _use(place: Path) -> None:
    """Have a platform of this state directory keep the compiled code of both modes."""
    from pyenclave.host import Enclave
    from pyenclave.image.build import build_script
    from pyenclave.image.keys import keygen
    from pyenclave.image.sign import sign

    script = place.with_name("used.py")
    script.write_text(_USED_ENTRY)
    image = build_script(script)
    deadline = time.monotonic() + _USED_SECONDS
    with (
        Enclave(sign(image, keygen()), state=place, quiet=True, debug=False),
        Enclave(image, state=place, quiet=True, debug=True),
    ):
        # Where none is kept (a disk that is full, say) launches are slower, and that is all.
        while len(list(place.glob("code-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)


@pytest.fixture(scope="session")
def used(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """
    ``used(folder)``: give a state directory the root and the compiled code of earlier launches.

    The start of a platform takes half the time then. For tests whose subject is not the first
    start of all; several of them share the root. ``python tests`` makes one for all its runs.
    """
    shared = os.environ.get("PYENCLAVE_TESTS_USED")
    place = Path(shared) if shared else tmp_path_factory.mktemp("used")
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            _use(place / "state")
            (place / "done").touch()

    def give(folder: Path) -> Path:
        folder.mkdir(mode=0o700, exist_ok=True)
        for file in (place / "state").iterdir():
            if file.name in ("root", "platform-root.pem") or file.name.startswith("code-"):
                shutil.copy(file, folder / file.name)
        return folder

    return give


@pytest.fixture
def used_state(tmp_path: Path, used: Callable[[Path], Path]) -> Path:
    """``state`` in the test's folder, as :func:`used` leaves it."""
    return used(tmp_path / "state")


_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_given: set[int] = set()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """
    ``free_port()``: a number for a server that is started a moment later.

    The kernel gives ports of a range of its own to connections and to who asks for none; one of
    these may be gone when the server comes. So it is a number below them, and each only once.
    """
    low = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    choose = random.SystemRandom()

    def find() -> int:
        for _ in range(1000):
            port = choose.randrange(10_000, low) if low > 12_000 else 0
            with socket.socket() as sock:
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue
                port = sock.getsockname()[1]
            if port not in _given:
                _given.add(port)
                return port
        raise AssertionError("no port is free")

    return find


@pytest.fixture(scope="session")
def stop() -> Callable[[int], None]:
    """
    ``stop(pid)``: SIGSTOP, and every thread of the process stands still.

    The signal alone is taken by one thread; until that has the processor, others go on.
    """

    def wait(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + 30
        tasks = Path(f"/proc/{pid}/task")
        while not all(
            (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
            for task in tasks.iterdir()
        ):
            assert time.monotonic() < end, f"process {pid} does not stop"
            time.sleep(0.001)

    return wait


@pytest.fixture(scope="session")
def begun() -> Callable[[memoryview, int], int]:
    """``begun(ring, lanes)``: in how many lanes the worker took what is asked there."""
    from pyenclave.calls import ring

    def count(memory: memoryview, lanes: int) -> int:
        found = 0
        for lane in range(lanes):  # docs/formats/ring.md
            at = 4096 + lane * (256 + 2 * ring.slot_stride())
            (taken,) = struct.unpack_from("<I", memory, at + 128 + 64)
            (asked,) = struct.unpack_from("<I", memory, at + 256)
            found += taken == asked != 0
        return found

    return count
