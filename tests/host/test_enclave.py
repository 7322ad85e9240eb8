"""The handle on an enclave, with a real platform, zygote and worker."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import pyenclave
from pyenclave.calls.signature import RESERVED_NAMES
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    ImageError,
    LaunchError,
    UnknownFunctionError,
)
from pyenclave.host import _run as run_module
from pyenclave.host.enclave import Enclave, EnclaveOptions

ENTRY = Path(__file__).with_name("trusted_entry.py")


@pytest.fixture(scope="module")
def image():
    from pyenclave.image.build import build_script

    return build_script(ENTRY)


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def shared(image, state):
    with Enclave(image, state=state, quiet=True) as enclave:
        yield enclave


@pytest.fixture
def enclave(image, state, shared):
    """An enclave of the test's own; the shared one keeps the platform and the zygote warm."""
    with Enclave(image, state=state, quiet=True) as one:
        yield one


def gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False


def wait_for_lanes(enclave: Enclave, busy: int, queued: int = 0) -> None:
    """Until so many calls run, and so many wait."""
    lanes, end = enclave._run.lanes, time.monotonic() + 20
    while (lanes.busy, lanes.queued) != (busy, queued):
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- before and after ------------------------------------------------------------------------


def test_nothing_starts_before_with_and_nothing_works_after(image, state, shared):
    handle = Enclave(image, state=state, quiet=True)
    acts = [
        lambda: handle.double(1),
        lambda: handle.call("double", 1),
        lambda: handle.options(timeout=1).double(1),
        lambda: handle.attest(nonce=b"x"),
        lambda: handle.info,
        handle.ping,
    ]
    for act in acts:
        with pytest.raises(EnclaveClosedError, match="not started"):
            act()
    assert repr(handle) == "<Enclave, not started>"
    with handle:
        assert handle.double(1) == 2
        pid = handle.info.pid
        double = handle.double
        with pytest.raises(EnclaveStateError, match="already"):
            handle.start()
    handle.close()
    assert gone(pid)
    for act in [*acts[:1], *acts[1:2], lambda: double(1), acts[3]]:
        with pytest.raises(EnclaveClosedError, match="closed"):
            act()
    with pytest.raises(EnclaveClosedError):
        handle.start()
    assert repr(handle) == "<Enclave, closed>"


@pytest.mark.parametrize("bad", [5, None, ["x"], object()])
def test_an_image_is_a_path_or_bytes(bad):
    with pytest.raises(TypeError):
        Enclave(bad)


def test_impossible_options_are_refused(shared, image):
    for timeout in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            shared.options(timeout=timeout)
    for bad in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="kill_after"):
            shared.options(kill_after=bad)
    for bad in ("1", True):
        with pytest.raises(TypeError, match="timeout"):
            shared.options(timeout=bad)
    with pytest.raises(ValueError, match="queue"):
        Enclave(image, queue=-1)
    with pytest.raises(TypeError, match="require"):
        Enclave(image, require="seccomp")
    with pytest.raises(TypeError):
        shared.attest(nonce="text")


def test_a_file_that_is_no_image_is_refused_at_start(tmp_path, state):
    (tmp_path / "x.enclave").write_bytes(b"junk" * 5000)
    for bad in (tmp_path / "x.enclave", tmp_path / "missing", tmp_path, b"", b"junk"):
        handle = Enclave(bad, state=state)
        with pytest.raises(ImageError):
            handle.start()


def test_a_flipped_byte_is_refused_and_leaves_nothing_open(image, state, shared):
    before = len(os.listdir("/proc/self/fd"))
    for at in (0, 100, len(image) // 2, len(image) - 1):
        data = bytearray(image)
        data[at] ^= 1
        with pytest.raises(ImageError):
            Enclave(data, state=state).start()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_host_that_cannot_map_its_ring_gets_a_typed_error_and_no_enclave(
    image, state, shared, monkeypatch
):
    """Its own end is made while the platform works; the enclave that came of it is ended."""
    client = shared._run.client
    before = client.list()

    def refuse(*rest):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(run_module._core, "HostLanes", refuse)
        with pytest.raises(LaunchError, match="Cannot allocate memory"):
            Enclave(image, state=state, quiet=True).start()
    assert client.list() == before
    assert shared.call("double", 2) == 4
    with Enclave(image, state=state, quiet=True) as again:
        assert again.call("double", 2) == 4


def test_an_interrupted_launch_ends_the_connection_and_not_the_next_question(
    image, tmp_path, monkeypatch
):
    """The platform's answer must not be taken for that of another request."""

    def interrupt(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module._core, "HostLanes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Enclave(image, state=tmp_path / "state", quiet=True).start()
    with Enclave(image, state=tmp_path / "state", quiet=True) as again:
        assert again.call("double", 2) == 4
        client, mine = again._run.client, again.info.enclave_id
        # The other one, whose launch goes on without its host, is ended when that is noticed.
        deadline = time.monotonic() + 30
        while [item.enclave_id for item in client.list()] != [mine]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_many_starts_and_ends_leave_no_descriptor_open(image, state, shared):
    def cycle() -> None:
        with Enclave(image, state=state, quiet=True) as one:
            assert one.double(1) == 2

    cycle()
    gc.collect()  # what other tests left open is not closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        cycle()
    assert len(os.listdir("/proc/self/fd")) < before + 5


def test_a_handle_that_is_forgotten_ends_its_enclave(image, state, shared):
    handle = Enclave(image, state=state, quiet=True).start()
    pid = handle.info.pid
    assert handle.double(2) == 4
    del handle
    assert gone(pid)


# ---- calls -----------------------------------------------------------------------------------


def test_the_three_forms_of_a_call(shared):
    spec = spec_from_file_location("trusted_entry", ENTRY)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["trusted_entry"] = module
    try:
        spec.loader.exec_module(module)
        assert shared.double(21) == 42
        assert shared.call("double", 21) == 42
        assert shared.call(module.double, 21) == 42
        assert module.double(21) == 42  # stays an ordinary function
        rows = [module.Row("a", 1.0), module.Row("b", 2.0)]
        assert shared.call(module.total, rows) == module.Row("sum", 3.0)
        assert shared.total(rows) == {"name": "sum", "value": 3.0}
    finally:
        del sys.modules["trusted_entry"]


def test_a_function_of_another_signature_is_refused(shared):
    def double(x: str) -> str:
        return x

    double.__qualname__ = "double"
    with pytest.raises(ArgumentError, match="Rebuild"):
        shared.call(double, "x")
    with pytest.raises(TypeError):
        shared.call(5)


def test_an_unknown_function_is_typed_and_hasattr_works(shared):
    with pytest.raises(UnknownFunctionError, match="double"):
        shared.call("nope")
    with pytest.raises(UnknownFunctionError):
        shared.nope(1)
    assert not hasattr(shared, "nope")
    assert hasattr(shared, "double")
    assert "double" in dir(shared)
    assert shared.parameter_types("twice") == ["ndarray:"]
    assert shared.parameter_types("double") == ["int"]


def test_arrays_and_out(shared):
    values, out = np.arange(100_000.0), np.empty(100_000)
    assert shared.twice(values, out=out) is out
    assert (out == values * 2).all()
    assert shared.call("twice", np.arange(6).reshape(2, 3)).tolist() == [[0, 2, 4], [6, 8, 10]]


def test_errors_inside(shared):
    with pytest.raises(EcallError) as caught:
        shared.fail("text")
    assert caught.value.type == "LookupError"
    assert "text" in str(caught.value)  # unsigned: a debug enclave
    with pytest.raises(EcallError, match="not today"):
        shared.refuse("not today")
    with pytest.raises(ArgumentError):
        shared.double("x")
    assert shared.ping(b"x" * 1000) == b"x" * 1000


def test_deadlines(enclave):
    quick = enclave.options(timeout=0.1)
    with pytest.raises(CallTimeoutError):
        quick.sleep(1.5)
    with pytest.raises(TimeoutError):
        quick.call("double", 1)
    assert enclave.double(1) == 2  # waits for the lane
    assert enclave.options(timeout=20).double(1) == 2


def test_kill_after_spares_a_call_that_returns_in_time(enclave):
    with pytest.raises(CallTimeoutError):
        enclave.options(timeout=0.05, kill_after=5).sleep(0.15)
    assert enclave.double(4) == 8
    pid = enclave.info.pid
    enclave.sleep(0.1)
    assert enclave.info.pid == pid
    assert enclave.double(5) == 10


def test_kill_after_ends_the_worker_of_a_call_that_goes_on(enclave):
    pid = enclave.info.pid
    start = time.monotonic()
    with pytest.raises(CallTimeoutError):
        enclave.options(timeout=0.05, kill_after=0.1).sleep(30.0)
    with pytest.raises(EnclaveLostError, match="kill_after") as caught:
        enclave.sleep(30.0)  # waits for the lane: never begun
    assert time.monotonic() - start < 20  # it would take 30 s
    assert not caught.value.started
    assert gone(pid)
    with pytest.raises(EnclaveLostError, match="kill_after"):
        enclave.double(1)


def test_the_queue_has_a_bound(image, state, shared):
    with Enclave(image, state=state, quiet=True, queue=0) as one:
        thread = threading.Thread(target=one.sleep, args=(1.0,))
        thread.start()
        wait_for_lanes(one, busy=1)
        with pytest.raises(BusyError):
            one.double(1)
        thread.join()
        assert one.double(1) == 2


def test_many_enclaves_at_once(image, state, shared):
    handles = [Enclave(image, state=state, quiet=True).start() for _ in range(5)]
    try:
        assert [one.double(i) for i, one in enumerate(handles)] == [0, 2, 4, 6, 8]
        assert len({one.info.pid for one in handles}) == 5
        assert len({one.info.enclave_id for one in handles}) == 5
    finally:
        for one in handles:
            one.close()


def test_evidence_is_bytes(shared):
    evidence = shared.attest(nonce=b"n" * 32)
    assert evidence.to_bytes() == bytes(evidence)
    assert type(evidence.to_bytes()) is bytes
    assert shared.info.mrenclave in evidence
    with pytest.raises(ArgumentError, match="nonce"):
        shared.attest(nonce=bytes(1025))


def test_info_shows_no_key(shared):
    info = shared.info
    assert info.name == "trusted_entry"
    assert info.debug is True
    assert info.mrsigner == bytes(32)
    assert len(info.mrenclave) == 32
    assert info.protections["seccomp"] is True
    assert "runtime_public_key" not in repr(info)


# ---- ends ------------------------------------------------------------------------------------


def test_a_worker_that_ends_is_lost(enclave):
    with pytest.raises(EnclaveLostError) as caught:
        enclave.end()
    assert caught.value.started is True
    with pytest.raises(EnclaveLostError):
        enclave.double(1)


def test_a_killed_worker_is_lost(enclave):
    threading.Timer(0.2, os.kill, (enclave.info.pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(EnclaveLostError):
        enclave.sleep(30.0)
    assert time.monotonic() - start < 20  # it would take 30 s


def test_a_poisoned_enclave_refuses_for_ever_with_the_reason(enclave):
    for _ in range(2):
        with pytest.raises(EnclavePoisonedError, match="MAC does not hold"):
            enclave.poison()
    with pytest.raises(EnclavePoisonedError):
        enclave.double(1)


def test_a_broken_sequence_poisons_with_the_check_s_name(enclave):
    run = enclave._run
    # The ring as another program of this user would write to it: through the lane's descriptor.
    ring = next(
        fd
        for fd in os.listdir(f"/proc/{run.info.pid}/fd")
        if "pyenclave-ring" in os.readlink(f"/proc/{run.info.pid}/fd/{fd}")
    )
    with open(f"/proc/{run.info.pid}/fd/{ring}", "r+b") as file:
        file.seek(4096 + 256)
        file.write(b"\x77\x77\x77\x77")
    assert gone(run.info.pid)  # it looks every 100 ms
    with pytest.raises(EnclavePoisonedError, match="sequence"):
        enclave.double(1)


def test_closing_ends_running_calls(image, state, shared):
    handle = Enclave(image, state=state, quiet=True).start()
    pid = handle.info.pid
    caught: list[BaseException] = []

    def call() -> None:
        try:
            handle.sleep(30.0)
        except EnclaveClosedError as error:
            caught.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for_lanes(handle, busy=1, queued=2)
    start = time.monotonic()
    handle.close()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 20  # they would take 30 s
    assert len(caught) == 3
    assert gone(pid)


def test_a_forked_child_refuses_and_cannot_end_the_parent_s_enclave(enclave):
    assert enclave.double(1) == 2
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = []
        for act in (
            lambda: enclave.double(1),
            lambda: enclave.call("double", 1),
            lambda: enclave.attest(nonce=b"x"),
            enclave.start,
        ):
            try:
                act()
                seen.append("?")
            except EnclaveStateError as error:
                seen.append(type(error).__name__)
        enclave.close()
        os.write(writer, " ".join(seen).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 1000).split() == [b"EnclaveStateError"] * 4
    assert enclave.double(2) == 4
    os.close(reader)
    os.close(writer)


def test_a_handle_cannot_be_pickled_or_copied(enclave):
    for thing in (enclave, enclave.options(timeout=1), enclave.double):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                way(thing)


# ---- names, and the whole ----------------------------------------------------------------------


def test_every_name_of_a_handle_is_reserved():
    """So that a trusted function can never hide one, nor be hidden."""
    for cls in (Enclave, EnclaveOptions):
        names = {name for name in dir(cls) if not name.startswith("_")}
        assert names <= RESERVED_NAMES


def test_hello_world_from_one_file(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text(
        "import pyenclave\n"
        "@pyenclave.ecall\n"
        "def double(x: int) -> int: return 2 * x\n"
        'if __name__ == "__main__":\n'
        "    with pyenclave.Enclave.from_file(__file__) as enclave: print(enclave.double(21))\n"
    )
    environment = dict(os.environ, PYENCLAVE_STATE=str(tmp_path / "state"))
    environment["PYTHONPATH"] = str(Path(pyenclave.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42\n"
    assert done.stderr.count("\n") == 1
    assert "unsigned" in done.stderr
