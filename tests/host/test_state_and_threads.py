"""The rules of docs/trusted-code.md for state, threads, processes, time and randomness."""

from __future__ import annotations

import threading
import time

import pytest

from pyenclave.errors import EcallError, EnclaveLostError
from pyenclave.host.enclave import Enclave
from pyenclave.image.build import build_manifest, build_script
from pyenclave.image.manifest import Manifest

ENTRY = """
from __future__ import annotations
import asyncio, os, random, secrets, signal, socket, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pyenclave
from pyenclave import trusted

made = random.random(), secrets.token_hex(16), float(np.random.random())
imports = 0
imports += 1
counted = 0
two = threading.Barrier(2)
local = threading.local()
lock = threading.Lock()
ticks = [0]

@trusted.on_start
def begin() -> None:
    def tick() -> None:
        while True:
            ticks[0] += 1
            time.sleep(0.005)
    threading.Thread(target=tick, daemon=True).start()

@pyenclave.ecall
def count(times: int) -> tuple[int, int, int]:
    global counted
    for _ in range(times):
        with lock:
            counted += 1
    local.calls = getattr(local, "calls", 0) + 1
    return counted, threading.get_ident(), local.calls

@pyenclave.ecall
def stay_a_little() -> int:
    time.sleep(0.05)
    return threading.get_ident()

@pyenclave.ecall
def meet() -> int:
    two.wait(20)
    return threading.get_ident()

@pyenclave.ecall
def facts() -> dict[str, int]:
    return {"imports": imports, "ticks": ticks[0], "pid": os.getpid(), "path": len(sys.path)}

@pyenclave.ecall
def chance() -> list[str]:
    again = random.random(), secrets.token_hex(16), float(np.random.random())
    return [repr(value) for value in made + again]

@pyenclave.ecall
def clock() -> tuple[float, float]:
    return time.time(), time.monotonic()

@pyenclave.ecall
def stay(what: str) -> str:
    def fail() -> None:
        raise ValueError("of a thread")
    if what == "thread":
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return "alive"
    if what == "pool":
        with ThreadPoolExecutor(4) as pool:
            return str(sum(pool.map(lambda x: x * x, range(10))))
    acts = {
        "fork": os.fork,
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "run": lambda: subprocess.run(["/bin/true"]),
        "socket": socket.socket,
        "file": lambda: open("/etc/hostname"),
        "temporary": tempfile.mkdtemp,
        "loop": lambda: asyncio.run(asyncio.sleep(0)),
        "kill": lambda: os.kill(1, signal.SIGTERM),
    }
    try:
        acts[what]()
    except OSError as error:
        return type(error).__name__
    return "done"

@pyenclave.ecall
def leave(how: str) -> None:
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    os._exit(3)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry")
    path = folder / "rules.py"
    path.write_text(ENTRY, encoding="utf-8")
    manifest = Manifest(name="rules", entry=path, product_id=0, security_version=0, threads=2)
    return build_manifest(manifest)


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def enclave(image, state):
    with Enclave(image, state=state, quiet=True) as one:
        yield one


def together(*calls) -> list:
    """Make calls at the same time; return what they returned, in order."""
    results: list = [None] * len(calls)

    def run(place: int) -> None:
        results[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_the_entry_is_imported_once_and_its_globals_are_shared_by_all_threads(image, state):
    with Enclave(image, state=state, quiet=True) as enclave:
        together(*[lambda: enclave.count(500)] * 4)
        total, _, _ = enclave.count(0)
        assert total == 2000
        assert enclave.facts()["imports"] == 1


def test_each_call_runs_in_a_thread_of_the_enclave_and_two_run_at_a_time(enclave):
    used = together(*[enclave.meet] * 2)
    assert len(set(used)) == 2
    again = together(*[enclave.meet] * 4)
    assert set(again) == set(used)  # a third call waits: threads are not made for calls


def test_thread_locals_live_as_long_as_the_enclave(enclave):
    seen: dict[int, int] = {}
    for _ in range(6):
        _, thread, calls = enclave.count(0)
        assert calls > seen.get(thread, 0)
        seen[thread] = calls
    assert len(seen) <= 2


def test_another_enclave_of_the_same_image_shares_nothing(image, state, enclave):
    before, _, _ = enclave.count(1)
    with Enclave(image, state=state, quiet=True) as other:
        assert other.count(1)[0] == 1
    assert enclave.count(0)[0] == before


def test_threads_of_the_entry_go_on_between_calls(enclave):
    first, end = enclave.facts()["ticks"], time.monotonic() + 20
    while enclave.facts()["ticks"] == first:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_exception_in_a_thread_ends_only_that_thread(enclave):
    assert enclave.stay("thread") == "alive"
    assert enclave.stay("pool") == "285"


@pytest.mark.parametrize(
    "what", ["fork", "exec", "spawn", "run", "socket", "file", "temporary", "loop", "kill"]
)
def test_processes_files_sockets_and_event_loops_are_refused(enclave, what):
    assert enclave.stay(what) in ("PermissionError", "FileNotFoundError")
    assert enclave.stay("pool") == "285"


def test_randomness_is_fresh_in_each_launch_also_what_the_import_draws(image, state, enclave):
    seen = set(enclave.chance())
    for _ in range(2):
        with Enclave(image, state=state, quiet=True) as other:
            seen |= set(other.chance())
    assert len(seen) == 3 * 6


def test_the_clock_is_that_of_the_host(enclave):
    wall, steady = enclave.clock()
    assert abs(wall - time.time()) < 5
    assert abs(steady - time.monotonic()) < 5


def test_leaving_the_interpreter_is_an_exception_and_leaving_the_process_the_end(image, state):
    with Enclave(image, state=state, quiet=True) as enclave:
        for how, kind in (("exit", "SystemExit"), ("interrupt", "KeyboardInterrupt")):
            with pytest.raises(EcallError) as caught:
                enclave.leave(how)
            assert caught.value.type == kind
        assert enclave.stay("pool") == "285"
        with pytest.raises(EnclaveLostError):
            enclave.leave("process")


def test_a_script_has_one_thread_and_no_path_to_import_from(tmp_path, state):
    path = tmp_path / "script.py"
    path.write_text(ENTRY)
    with Enclave(build_script(path), state=state, quiet=True) as enclave:
        assert len(set(together(*[enclave.stay_a_little] * 3))) == 1
        assert enclave.facts()["path"] == 0
