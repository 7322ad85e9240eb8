"""
Every way in which Python programs make processes, with an enclave in the middle of it.

A running enclave belongs to the process that started it; children refuse and say why, open their
own, and neither disturb the parent's nor keep anything of it alive.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyenclave._platform.client import PlatformClient
from pyenclave.errors import EnclaveClosedError, EnclaveStateError
from pyenclave.host import Enclave
from pyenclave.host.enclave import Options

# What a child may do with a handle of its parent: it touches neither ring nor platform.
HARMLESS = {"close", "closed", "from_file", "options"}


@pytest.fixture
def state(state: Path, used: Callable[[Path], Path]) -> Path:
    """One that was used before: the first start of all is not what is tried here."""
    return used(state)


def refused(action: Callable[[], Any]) -> str:
    """What the child is told; empty if nothing stopped it."""
    try:
        action()
    except EnclaveStateError as error:
        return str(error)
    return ""


def attempts(thing: Any, names: set[str]) -> dict[str, Callable[[], Any]]:
    """For each public name: take it, and call it with what fits or nearly fits."""

    def use(name: str) -> Any:
        value = getattr(thing, name)
        if not callable(value):
            return value
        given = {"call": ("double", 1), "map": ("double", [1]), "parameter_types": ("double",)}
        result = value(*given.get(name, ()))
        return list(result) if hasattr(result, "__next__") else result

    return {name: lambda name=name: use(name) for name in names}


def test_every_name_of_a_handle_refuses_in_a_forked_child_and_says_why(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    with Enclave(images.signed, quiet=True) as enclave:
        fast, limited = enclave.double, enclave.options(timeout=5)
        taken = {"function": fast, "limited function": limited.double}
        assert fast(1) == limited.double(1) == 2

        def child(say: Callable[[Any], None]) -> None:
            told = {}
            for thing, kind in ((enclave, Enclave), (limited, Options)):
                names = {n for n in dir(kind) if not n.startswith("_")} - HARMLESS
                for name, action in attempts(thing, names).items():
                    told[f"{kind.__name__}.{name}"] = refused(action)
            for name, function in taken.items():
                told[name] = refused(lambda function=function: function(1))
            told["with"] = refused(enclave.__enter__)
            told["new function"] = refused(lambda: enclave.echo)
            repr(enclave)
            enclave.close()
            say(told)

        one = host(child)
        told = one.heard(10)
        assert one.wait(5) == 0
        assert len(told) >= 10
        for name, text in told.items():
            assert "forked child" in text, f"{name}: {text!r}"
            assert "docs/deploying.md" in text
        assert str(os.getpid()) in told["Enclave.call"]
        assert fast(21) == 42
        assert len(platform.list()) == 1


def test_a_handle_that_was_not_started_is_the_childs_own(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    """What a server's master imports is started in each worker: the pattern of docs/deploying."""
    later = Enclave(images.signed, quiet=True)

    def child(say: Callable[[Any], None]) -> None:
        with pytest.raises(EnclaveClosedError, match="not started"):
            later.call("double", 1)
        with later:
            say([later.call("double", 4), later.info.pid])

    ones = [host(child) for _ in range(3)]
    heard = [one.heard(10) for one in ones]
    assert [one.wait(5) for one in ones] == [0, 0, 0]
    assert [value for value, _ in heard] == [8, 8, 8]
    assert len({pid for _, pid in heard}) == 3
    with later:  # and the parent's own still
        assert later.call("double", 5) == 10


def test_a_lock_that_a_thread_held_at_the_fork_does_not_hang_the_child(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    later = Enclave(images.signed, quiet=True)
    with later._lock:
        one = host(lambda say: say(later.start().call("double", 2)))
        assert one.heard(10) == 4
        assert one.wait(5) == 0


def test_children_that_come_during_calls_disturb_none(
    platform: PlatformClient, images: Any, host: Callable[..., Any]
) -> None:
    """A child's copy of the ring is the same memory; nobody writes to it, not even at its end."""
    with Enclave(images.signed, quiet=True) as enclave:
        stop = threading.Event()
        wrong: list[BaseException] = []
        payload = bytes(range(256)) * 1500

        def work() -> None:
            try:
                while not stop.is_set():
                    assert enclave.call("echo", payload) == payload
                    assert enclave.call("double", 3) == 6
            except BaseException as error:
                wrong.append(error)

        def child(say: Callable[[Any], None]) -> None:
            text = refused(lambda: enclave.call("double", 1))
            gc.collect()
            say(text)
            sys.exit(0)  # as far as Host lets it: what runs at exit must harm nobody

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                one = host(child)
                assert "forked child" in one.heard(10)
                one.wait(5)
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)
        assert wrong == []
        assert enclave.call("double", 21) == 42


def test_children_of_a_launch_keep_neither_platform_nor_locks(
    state: Path, images: Any, host: Callable[..., Any], family: Any, helpers: Any
) -> None:
    """Another thread forks again and again while this one connects, launches and closes."""
    gc.collect()
    mine = {link.partition(": ")[2] for link in helpers.links(os.getpid())}  # of earlier tests
    stop = threading.Event()
    sleepers: list[Any] = []

    def fork_often() -> None:
        while not stop.is_set() and len(sleepers) < 60:
            sleepers.append(host(lambda say: time.sleep(60)))
            time.sleep(0.01)

    thread = threading.Thread(target=fork_often)
    thread.start()
    try:
        for _ in range(3):  # each time a new platform
            with PlatformClient.connect() as platform, Enclave(images.signed, quiet=True) as one:
                assert one.call("double", 2) == 4
                pid = platform.hello.pid
            helpers.until(
                lambda pid=pid: pid not in {p.pid for p in family.living()}, 2, "platform ends"
            )
    finally:
        stop.set()
        thread.join(10)
    assert len(sleepers) >= 10
    known = {one.pid for one in sleepers}
    helpers.until(lambda: not {p.pid for p in family.living()} - known, 3, "all else ends")
    for one in sleepers:
        links = (link for link in helpers.links(one.pid) if "socket" in link)
        left = [link for link in links if link.partition(": ")[2] not in mine]
        assert left == [], "a child has a connection of its parent"


def test_a_lock_is_given_back_although_a_child_has_a_copy(
    tmp_path: Path, host: Callable[..., Any]
) -> None:
    """flock(2) locks belong to all copies of a descriptor, those of forked children included."""
    from pyenclave._platform.state import State, _held

    with State.open(str(tmp_path / "state")) as one:
        with one.lock("start.lock"):
            first = host(lambda say: (say(len(_held)), time.sleep(60)))
            assert first.heard(5) == 0
        with one.lock("start.lock", timeout=20):
            pass

        def die_with_it(say: Callable[[Any], None]) -> None:
            with one.lock("start.lock"):
                child = os.fork()
                if child == 0:
                    time.sleep(60)
                    os._exit(0)
                say(child)
                os.kill(os.getpid(), signal.SIGKILL)

        second = host(die_with_it)
        grandchild = second.heard(5)
        second.wait(5)
        try:
            with one.lock("start.lock", timeout=20):
                pass
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_started_programs_inherit_nothing(platform: PlatformClient, images: Any) -> None:
    """Even with close_fds=False: every descriptor of ours closes on exec."""
    code = (
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    path = '/proc/self/fd/' + fd\n"
        "    print(os.readlink(path) if os.path.exists(path) else '')\n"
    )
    plain = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, capture_output=True, text=True, check=True
    ).stdout
    with Enclave(images.signed, quiet=True) as enclave:
        enclave.call("double", 1)
        done = subprocess.run(
            [sys.executable, "-c", code],
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
        assert enclave.call("double", 2) == 4
    for mark in ("pyenclave", "pidfd"):
        assert mark not in done.stdout
    assert done.stdout.count("socket") <= plain.count("socket")


# ---- multiprocessing and concurrent.futures ----------------------------------------------------

POOLS = '''
import json, multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
import pyenclave
from pyenclave import errors

IMAGE = sys.argv[1]
enclave = pyenclave.Enclave(IMAGE, quiet=True)  # starts nothing

def begin():
    """Initializer of a pool: this process starts an enclave of its own."""
    enclave.start()

def score(number):
    return os.getpid(), enclave.call("double", number)

def use_parents(queue):
    try:
        queue.put(str(parents.call("double", 1)))
    except errors.EnclaveStateError as error:
        queue.put(str(error))

def own(queue):
    with pyenclave.Enclave(IMAGE, quiet=True) as mine:
        queue.put(mine.call("double", 4))

def main():
    global parents
    method = sys.argv[2]
    context = multiprocessing.get_context(method)
    said = {}
    with pyenclave.Enclave(IMAGE, quiet=True) as parents:
        queue = context.SimpleQueue()
        if method == "fork":
            child = context.Process(target=use_parents, args=(queue,))
            child.start()
            said["parents"] = queue.get()
            child.join()
            said["code"] = child.exitcode
        try:
            context.Process(target=print, args=(parents,)).start()
            said["pickled"] = "started"
        except TypeError as error:
            said["pickled"] = str(error)
        child = context.Process(target=own, args=(queue,))
        child.start()
        said["own"] = queue.get()
        child.join()
        said["still"] = parents.call("double", 21)
    with context.Pool(2, initializer=begin) as pool:
        rows = pool.map(score, range(20), chunksize=1)
        said["pool"] = [value for _, value in rows]
        said["pool processes"] = len({pid for pid, _ in rows})
        pool.close()
        pool.join()
    with ProcessPoolExecutor(2, mp_context=context, initializer=begin) as pool:
        said["executor"] = [value for _, value in pool.map(score, range(20))]
    with ProcessPoolExecutor(1, mp_context=context, initializer=begin) as pool:
        worker = pool.submit(score, 1).result()[0]
        os.kill(worker, 9)
        try:
            pool.submit(score, 1).result()
        except Exception as error:
            said["killed"] = type(error).__name__
    print(json.dumps(said))

if __name__ == "__main__":
    main()
'''


@pytest.fixture
def script(state: Path, tmp_path: Path) -> Callable[..., Any]:
    """``script(source, *arguments)``: run a file as __main__; its last line, as JSON."""

    def run(source: str, *arguments: str, seconds: float = 60) -> Any:
        path = tmp_path / "program.py"
        path.write_text(source)
        done = subprocess.run(
            [sys.executable, str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def image_path(images: Any, tmp_path: Path) -> str:
    path = tmp_path / "patient.enclave"
    path.write_bytes(images.signed)
    return str(path)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_and_process_pools(
    method: str, script: Callable[..., Any], image_path: str
) -> None:
    said = script(POOLS, image_path, method)
    if method == "fork":
        assert "forked child" in said["parents"]
        assert said["code"] == 0
        assert said["pickled"] == "started"  # nothing is pickled there
    else:
        assert "open one in each process" in said["pickled"]
    assert said["own"] == 8
    assert said["still"] == 42
    assert said["pool"] == said["executor"] == [2 * number for number in range(20)]
    assert 1 <= said["pool processes"] <= 2
    assert said["killed"] == "BrokenProcessPool"


FORK_AND_EXIT = """
import json, os, sys
import pyenclave

enclave = pyenclave.Enclave(sys.argv[1], quiet=True).start()
child = os.fork()
if child == 0:
    {how}
os.waitpid(child, 0)
print(json.dumps(enclave.call("double", 21)))
"""


@pytest.mark.parametrize(
    "how",
    [
        "sys.exit(0)",
        "del enclave; import gc; gc.collect(); sys.exit(0)",
        "enclave.close(); os._exit(0)",
        "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
        "os.kill(os.getpid(), 9)",
        "raise SystemExit(enclave.__exit__(None, None, None))",
    ],
)
def test_however_a_child_ends_the_parents_enclave_lives(
    how: str, script: Callable[..., Any], image_path: str
) -> None:
    assert script(FORK_AND_EXIT.format(how=how), image_path) == 42


def test_a_child_that_lives_on_keeps_no_worker_of_a_parent_that_died(
    platform: PlatformClient, images: Any, host: Callable[..., Any], helpers: Any
) -> None:
    def parent(say: Callable[[Any], None]) -> None:
        enclave = Enclave(images.signed, quiet=True).start()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        say([child, enclave.info.pid])
        time.sleep(60)

    one = host(parent)
    child, worker = one.heard(10)
    one.kill()
    try:
        helpers.until(lambda: not Path(f"/proc/{worker}").exists(), 2, "the worker ends")
        assert platform.list() == ()
        assert Path(f"/proc/{child}").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
