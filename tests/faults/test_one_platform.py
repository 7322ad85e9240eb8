"""
One platform for all programs of a user and state directory, whatever happens to it.

The programs here are real processes that start at once; the platform is killed under them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyenclave
from pyenclave._platform.client import PlatformClient
from pyenclave._platform.endpoint import Endpoint, runtime_name
from pyenclave._platform.state import State
from pyenclave.errors import EnclaveError, EnclaveLostError, PlatformUnavailableError
from pyenclave.formats.lock import Roots
from pyenclave.host import Enclave

PROGRAMS = 20
ROOT = Path(pyenclave.__file__).resolve().parent.parent

_ONE = """
import json, sys, time
sys.stdin.readline()
from pyenclave._platform.client import PlatformClient
begin = time.monotonic()
with PlatformClient.connect(sys.argv[1]) as client:
    root = client.root().certificate.hex()
    print(json.dumps([client.hello.pid, client.hello.instance.hex(), root,
                      client.hello.ephemeral, time.monotonic() - begin]), flush=True)
    sys.stdin.readline()
"""


def at_once(
    state: Path | str, count: int = PROGRAMS, python: tuple[str, ...] = (sys.executable,)
) -> list[Any]:
    """Start *count* programs, let them go together, and return what each says."""
    programs = [
        subprocess.Popen(
            [*python, "-c", _ONE, str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        for _ in range(count)
    ]
    try:
        for one in programs:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        said = []
        for one in programs:
            assert one.stdout is not None
            assert select.select([one.stdout], [], [], 40)[0], "a program says nothing"
            said.append(json.loads(one.stdout.readline()))
        return said
    finally:
        for one in programs:
            one.communicate("end\n", timeout=60)


def check_one(said: list[Any]) -> None:
    """All of them met the same platform with the same root."""
    assert len({(pid, instance, root) for pid, instance, root, *_ in said}) == 1, said


def test_twenty_programs_at_once_get_one_platform(state: Path) -> None:
    said = at_once(state)
    assert len(said) == PROGRAMS
    check_one(said)


def test_with_a_state_that_cannot_be_made_it_is_one_as_well(family: Any) -> None:
    """Nothing can be locked there: the turn to start is a name of the kernel's."""
    said = at_once("/proc/no/such/state", 8)
    check_one(said)
    assert all(ephemeral for *_, ephemeral, _ in said)


@pytest.fixture
def small_disk(family: Any) -> Iterator[Path]:
    """A file system of its own; unmounted at the end."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = Path(tempfile.mkdtemp())
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64,mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        folder.rmdir()
        pytest.skip(f"mounting is refused: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        family.check_gone()
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def test_on_a_read_only_disk_with_a_root_it_is_one_with_that_root(small_disk: Path) -> None:
    state = small_disk / "state"
    (before,) = at_once(state, 1)
    time.sleep(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = at_once(state, 8)
    check_one(said)
    assert said[0][2] == before[2]
    assert not said[0][3]


def test_on_a_full_disk_it_is_one_and_says_ephemeral(small_disk: Path) -> None:
    state = small_disk / "state"
    state.mkdir(mode=0o700)
    with contextlib.suppress(OSError):
        for number in range(64):
            (small_disk / f"{number}").touch()
    said = at_once(state, 8)
    check_one(said)
    assert said[0][3]


def test_a_disk_that_has_room_again_gets_a_lasting_platform(small_disk: Path) -> None:
    """An ephemeral one lives on with its hosts; it holds up nobody who could do better."""
    state = small_disk / "state"
    state.mkdir(mode=0o700)
    with contextlib.suppress(OSError):
        for number in range(64):
            (small_disk / f"{number}").touch()
    with PlatformClient.connect(state) as first:
        assert first.hello.ephemeral
        for number in range(64):
            (small_disk / f"{number}").unlink(missing_ok=True)
        with PlatformClient.connect(state) as second:
            assert not second.hello.ephemeral
            with PlatformClient.connect(state) as third:
                assert third.hello.instance == second.hello.instance


def test_one_that_found_no_place_for_its_socket_is_found_all_the_same(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root was made; then the disk was full, or a directory of that name is in the way."""
    with State.open(str(state)) as opened:
        endpoint = Endpoint(opened, runtime_name(sys.executable, Roots.of_this_process()))
    (state / endpoint.socket_name).mkdir()
    (state / endpoint.socket_name / "in the way").touch()
    try:
        check_one(at_once(state, 6))
    finally:
        shutil.rmtree(state / endpoint.socket_name)


# ---- what is left of others ---------------------------------------------------------------------


def test_stale_sockets_locks_and_numbers_of_processes_hold_up_nobody(state: Path) -> None:
    """Files of dead platforms, one of them with a lock's number that another process has now."""
    with PlatformClient.connect(state) as client:
        first = client.hello
        os.kill(first.pid, signal.SIGKILL)
    with State.open(str(state)) as opened:
        endpoint = Endpoint(opened, runtime_name(sys.executable, Roots.of_this_process()))
    for name in (endpoint.lock_name, endpoint.start_lock_name, "state.lock"):
        (state / name).write_text(f"{os.getpid()}\n")
    assert (state / endpoint.socket_name).is_socket()
    begin = time.monotonic()
    with PlatformClient.connect(state) as client:
        assert client.hello.instance != first.instance
    assert time.monotonic() - begin < 30


def test_a_plain_file_in_place_of_the_socket_is_replaced(state: Path) -> None:
    with State.open(str(state)) as opened:
        endpoint = Endpoint(opened, runtime_name(sys.executable, Roots.of_this_process()))
    (state / endpoint.socket_name).write_text("not a socket")
    check_one(at_once(state, 3))


def test_a_platform_with_a_full_queue_is_not_joined_by_a_second(
    platform: PlatformClient, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped one: connections queue up, then the kernel refuses them, and still it is there."""
    from pyenclave._platform import endpoint as endpoint_module

    monkeypatch.setattr(endpoint_module, "_FULL_TIMEOUT", 0.3)
    os.kill(platform.hello.pid, signal.SIGSTOP)
    waiting: list[socket.socket] = []
    try:
        with State.open(str(state)) as opened:
            endpoint = Endpoint(opened, runtime_name(sys.executable, Roots.of_this_process()))

            def fill() -> None:
                while (sock := endpoint.connect()) is not None and len(waiting) < 5000:
                    waiting.append(sock)

            with pytest.raises(PlatformUnavailableError, match="does not answer"):
                fill()
            assert waiting
            with pytest.raises(PlatformUnavailableError, match="does not answer"):
                PlatformClient.connect(state)
    finally:
        for sock in waiting:
            sock.close()
        os.kill(platform.hello.pid, signal.SIGCONT)
    assert platform.list() == ()
    with PlatformClient.connect(state) as again:
        assert again.hello.instance == platform.hello.instance


# ---- kill -9 ------------------------------------------------------------------------------------


def test_a_platform_killed_at_rest_costs_the_next_launch_less_than_a_second(
    state: Path, images: Any, helpers: Any
) -> None:
    """
    The connection of this process is a dead one; the launch finds out and starts anew.

    That takes what a first launch takes, well below a second on a machine that is not busy.
    """
    begin = time.monotonic()
    with Enclave(images.signed, quiet=True) as first:
        assert first.call("double", 1) == 2
        usual = time.monotonic() - begin
        for _ in range(3):
            with PlatformClient.connect(state, start=False) as client:
                pid = client.hello.pid
            os.kill(pid, signal.SIGKILL)
            begin = time.monotonic()
            with Enclave(images.signed, quiet=True) as second:
                assert second.call("double", 2) == 4
                seconds = time.monotonic() - begin
                with PlatformClient.connect(state, start=False) as client:
                    assert client.hello.pid != pid
                with pytest.raises(EnclaveLostError) as lost:
                    first.call("double", 3)
                assert lost.value.started is False
            print(f"first launch {usual:.2f} s, after the platform's end {seconds:.2f} s")
            assert seconds < max(10.0, 5 * usual)


@pytest.mark.parametrize("under_way", [True, False])
def test_a_lost_call_says_whether_it_had_begun(
    platform: PlatformClient,
    images: Any,
    state: Path,
    helpers: Any,
    begun: Callable[..., int],
    under_way: bool,
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        enclave.call("double", 1)
        ends: list[EnclaveLostError] = []

        def call() -> None:
            with pytest.raises(EnclaveLostError) as lost:
                enclave.call("nap", 60.0)
            ends.append(lost.value)

        thread = threading.Thread(target=call)
        if under_way:
            thread.start()
            lanes = enclave._run.lanes
            helpers.until(lambda: lanes.busy and begun(lanes.memory, 1), 20, "it begins")
        os.kill(platform.hello.pid, signal.SIGKILL)
        begin = time.monotonic()
        if not under_way:
            select.select([os.pidfd_open(enclave.info.pid)], [], [], 20)
            thread.start()
        thread.join(30)
        assert time.monotonic() - begin < 30
        (lost,) = ends
        assert lost.started is under_way
    PlatformClient.connect(state).close()  # takes the dead one's socket away


SERVICE = """
import json, select, sys, time
import pyenclave
from pyenclave.errors import EnclaveLostError

done, lost, begin, longest = 0, 0, None, 0.0
enclave = pyenclave.Enclave(sys.argv[1], quiet=True).start()
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        assert enclave.call("double", done) == 2 * done
        done += 1
        if begin is not None:
            begin, longest = None, max(longest, time.monotonic() - begin)
    except EnclaveLostError as error:
        assert error.started is not None
        lost += 1
        begin = begin or time.monotonic()
        enclave.close()
        enclave = pyenclave.Enclave(sys.argv[1], quiet=True).start()
    if done == 1:
        print("ready", flush=True)
enclave.close()
print(json.dumps([done, lost, longest]))
"""


def test_services_whose_platform_is_killed_recover_with_one_line_of_code(
    state: Path, images: Any, tmp_path: Path, helpers: Any
) -> None:
    """The loop of docs/deploying: on EnclaveLostError take a new enclave."""
    image = tmp_path / "image"
    image.write_bytes(images.signed)
    services = [
        subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for one in services:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"

    def connected() -> int:
        time.sleep(0.1)
        with contextlib.suppress(EnclaveError), PlatformClient.connect(state, start=False) as now:
            if len(now.list()) == len(services):
                return now.hello.pid
        return 0

    for _ in range(2):
        pid = helpers.until(connected, 20, "all services have an enclave")
        os.kill(pid, signal.SIGKILL)
        helpers.until(lambda pid=pid: connected() not in (0, pid), 20, "they recover")
    time.sleep(0.5)  # for some calls to the last ones
    said = [json.loads(one.communicate("end\n", timeout=30)[0]) for one in services]
    for done, lost, longest in said:
        print(f"{done} calls, {lost} times lost, back after at most {longest:.2f} s")
        assert done > 100
        assert lost == 2
        assert 0 < longest < 60


# ---- other users --------------------------------------------------------------------------------

_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def _others_python() -> tuple[str, ...] | None:
    """How another user runs Python with this package; our own may lie in a closed folder."""
    import msgspec

    paths = os.pathsep.join([str(ROOT), str(Path(msgspec.__file__).parent.parent)])
    check = (
        "import subprocess, sys, pyenclave._platform.client, pyenclave._core; "
        "subprocess.run([sys.executable, '-c', 'pass'], check=True)"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        command = (*_NOBODY, "env", f"PYTHONPATH={paths}", python)
        done = subprocess.run([*command, "-c", check], capture_output=True, check=False, cwd="/")
        if done.returncode == 0:
            return command
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("place", ["open", "unwritable"])
def test_two_users_never_share_a_platform(family: Any, place: str) -> None:
    """Not even when both name the same state directory."""
    if shutil.which("setpriv") is None or (python := _others_python()) is None:
        pytest.skip("another user cannot run this Python")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    state = folder / "state" if place == "open" else Path("/proc/no/such/state")
    try:
        with PlatformClient.connect(state) as ours:
            theirs = at_once(state, 2, python)
            check_one(theirs)
            assert theirs[0][1] != ours.hello.instance.hex()
            assert theirs[0][2] != ours.root().certificate.hex()
            assert theirs[0][3]
    finally:
        family.check_gone()
        shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_squatter_on_the_names_holds_up_nobody(family: Any) -> None:
    """The abstract names can be guessed; whoever has them first is looked at and ignored."""
    place = "/proc/no/such/state"
    with State.open(place) as opened:
        endpoint = Endpoint(opened, runtime_name(sys.executable, Roots.of_this_process()))
    ready, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        held = []
        for name in (endpoint._abstract, f"{endpoint._abstract}-start"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.bind(name)
            sock.listen(8)
            held.append(sock)
        os.write(release, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        begin = time.monotonic()
        with PlatformClient.connect(place) as client:
            assert client.root().certificate
        assert time.monotonic() - begin < 30
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(release)
