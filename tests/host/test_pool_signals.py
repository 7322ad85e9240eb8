"""Signals while a pool works: SIGTERM drains it, Ctrl-C at any moment leaves no place taken."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from interrupts import interrupted
from pool_places import wait_for

from pyenclave.errors import BusyError, CallTimeoutError, EnclaveStateError

SERVICE = """
import signal, sys, threading, time
from pyenclave import EnclavePool
from pyenclave.errors import EnclaveClosedError
{before}
with EnclavePool({image!r}, state={state!r}, quiet=True, size=1) as pool:
    pool.close_on_sigterm(timeout=20)
    done = []
    thread = threading.Thread(target=lambda: done.append(pool.sleep(1.5)))
    thread.start()
    while not pool.stats.running:
        time.sleep(0.01)
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.05)
            if {after}:
                break
    finally:
        thread.join(20)
        print("done", done, flush=True)
        try:
            pool.add(1, 1)
        except EnclaveClosedError as error:
            print("refused", flush=True)
"""


@pytest.mark.parametrize("handler", [False, True])
def test_sigterm_drains_and_then_does_what_was_done_before(
    pool_image, pool_state, tmp_path, handler: bool
) -> None:
    path = tmp_path / "image.pye"
    path.write_bytes(pool_image)
    before = "told = []\nsignal.signal(signal.SIGTERM, lambda *_: told.append(1))" * handler
    script = SERVICE.format(
        before=before,
        image=str(path),
        state=str(pool_state),
        after="told and done and pool.stats.state == 'closed'" if handler else "False",
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
        assert process.wait(20) == (0 if handler else -signal.SIGTERM)
    assert time.monotonic() - sent > 0.2  # the call that was under way had its time
    if handler:
        assert out == "done [1.5]\nrefused\n"


def test_handlers_are_set_in_the_main_thread_only(make_pool) -> None:
    pool = make_pool(size=1)
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            pool.close_on_sigterm()
        except EnclaveStateError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(caught) == 1
    before = signal.getsignal(signal.SIGTERM)
    pool.close_on_sigterm()
    assert signal.getsignal(signal.SIGTERM) is not before
    pool.close()
    assert signal.getsignal(signal.SIGTERM) is before


FILES = ("pool.py", "_pooled.py", "_book.py")


@pytest.mark.parametrize("what", ["call", "options", "enclave", "fresh", "wait"])
def test_ctrl_c_at_any_moment_leaves_no_place_taken(make_pool, what: str) -> None:
    pool = make_pool(size=1, warm=1)

    def alone() -> None:
        with pool.enclave(timeout=30) as one:
            one.add(1, 1)

    def fresh() -> None:
        with contextlib.suppress(BusyError), pool.enclave(fresh=True) as one:
            one.add(1, 1)

    def wait() -> None:
        with contextlib.suppress(CallTimeoutError):
            pool.options(timeout=0.01).add(1, 1)

    work = {
        "call": lambda: pool.add(1, 1),
        "options": lambda: pool.options(timeout=30).add(1, 1),
        "enclave": alone,
        "fresh": fresh,
        "wait": wait,
    }[what]
    work()
    with pool.enclave() if what == "wait" else contextlib.nullcontext():
        assert interrupted(work, FILES) > 10
    assert wait_for(lambda: pool.stats.running == pool.stats.waiting == pool.stats.fresh == 0)
    assert pool.options(timeout=30).add(2, 2) == 4


TERMS = """
import os, signal, sys, threading, time
from pyenclave import EnclavePool
options = dict(state={state!r}, quiet=True, size=1)
with EnclavePool({image!r}, **options) as one, EnclavePool({image!r}, **options) as two:
    {order}[0].close_on_sigterm(timeout=20)
    {order}[1].close_on_sigterm(timeout=20)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"up")  # before, Python forgets the signals that come
        time.sleep(60)
        os._exit(7)
    os.read(read, 2)
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
    def call(pool, seconds):
        print(pool.sleep(seconds), flush=True)
    threading.Thread(target=call, args=(one, 0.5)).start()
    threading.Thread(target=call, args=(two, 2.0)).start()
    while not (one.stats.running and two.stats.running):
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("order", ["(one, two)", "(two, one)"])
def test_sigterm_ends_the_process_when_the_last_pool_is_drained(
    pool_image, pool_state, tmp_path, order: str
) -> None:
    """And at once a forked child, which has the handler but nothing that drains."""
    path = tmp_path / "image.pye"
    path.write_bytes(pool_image)
    script = TERMS.format(image=str(path), state=str(pool_state), order=order)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "0.5\n2.0\n"
        assert process.wait(20) == -signal.SIGTERM
