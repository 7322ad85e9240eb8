"""What an entry runs when its enclave starts and when it is closed, in real enclaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from msgspec.structs import replace

from pyenclave import trusted
from pyenclave.calls.signature import functions_of
from pyenclave.errors import (
    EnclaveClosedError,
    EnclavePoisonedError,
    EnclaveStateError,
    LaunchError,
)
from pyenclave.formats.image import FileEntry, Image, assemble
from pyenclave.host import _run
from pyenclave.host.enclave import Enclave
from pyenclave.image import build, keys, sign

ENTRY = """
import time
from pyenclave import trusted
from pyenclave.errors import EnclavePoisonedError

seen: list[str] = []

@trusted.on_start
def first() -> None:
    seen.append(f"first {len(trusted.identity().enclave_id)}")
    assert trusted.unseal(trusted.seal(b"x")) == b"x"

@trusted.on_start
def second(more: str = "default") -> str:
    seen.append("second")
    time.sleep(0.1)
    seen.append(more)
    return "ignored"

@trusted.ecall
def log() -> list[str]:
    return seen
"""

RAISES = """
from pyenclave import trusted
from pyenclave.errors import EnclavePoisonedError, UnsealError

class NoModelError(Exception):
    pass

class NotYetError(trusted.PublicError):
    pass

@trusted.on_start
def load() -> None:
    raise {}

@trusted.on_stop
def never() -> None:
    raise SystemExit

@trusted.ecall
def nothing() -> None:
    pass
"""

STOPS = """
import time
from pyenclave import trusted

counters: list[trusted.Counter] = []
before = 0
hanging = False

@trusted.ecall
def use(counter_id: bytes) -> tuple[bytes, int]:
    global before
    counters[:] = [trusted.Counter(counter_id) if counter_id else trusted.Counter.create()]
    before = counters[0].read()
    return counters[0].counter_id, before

@trusted.ecall
def hang() -> None:
    global hanging
    hanging = True

@trusted.ecall
def sleep(seconds: float) -> None:
    time.sleep(seconds)

@trusted.on_stop
def runs_last() -> None:
    counters[0].increment(expected=before + 1)

@trusted.on_stop(seconds=0.5)
def hangs_if_told() -> None:
    if hanging:
        time.sleep(30)

@trusted.on_stop
def raises() -> None:
    raise ValueError("text")

@trusted.on_stop
def runs_first() -> None:
    counters[0].increment(expected=before)
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, state):
    """Makes images of entries; one enclave keeps the platform and the zygote warm."""
    path = tmp_path_factory.mktemp("entries") / "probe.py"
    path.write_text("from __future__ import annotations\nimport math\n" + ENTRY, encoding="utf-8")
    base = build.build_script(path)
    first = Image.parse(base)

    def make(source: str, **changes: object) -> bytes:
        # As build_script does, without the seconds that taking the closure takes.
        data = ("from __future__ import annotations\n" + source).encode()
        module = ModuleType("probe")
        exec(compile(data, "probe", "exec"), module.__dict__)
        name = first.info.entry_file
        info = replace(
            first.info,
            functions=tuple(functions_of(module)),
            files=(FileEntry(name=name, size=len(data), executable=True),),
            **changes,
        )
        return assemble(info, first.lock, {name: data})

    with Enclave(base, state=state, quiet=True):
        yield make


def gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.01)
    return False


# ---- start -----------------------------------------------------------------------------------


def test_start_functions_run_in_order_before_the_first_call_with_all_of_trusted(made, state):
    with Enclave(made(ENTRY), state=state, quiet=True) as enclave:
        assert enclave.log() == ["first 16", "second", "default"]


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        ("NoModelError('SECRET')", "NoModelError"),
        ("UnsealError('SECRET')", "UnsealError"),
        ("NotYetError('public')", "NotYetError"),
    ],
)
def test_what_a_start_function_raises_refuses_the_launch_by_its_type(made, state, raised, kind):
    handle = Enclave(made(RAISES.format(raised)), state=state, quiet=True)
    with pytest.raises(LaunchError, match=rf"load \(on_start\) raised {kind}: ") as caught:
        handle.start()
    assert caught.value.type == kind
    with pytest.raises(EnclaveStateError):
        handle.nothing()


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("NoModelError('SECRET')", "NoModelError", None),
        ("UnsealError('SECRET')", "UnsealError", None),
        ("NotYetError('the model is not there')", "NotYetError", "the model is not there"),
    ],
)
def test_its_text_leaves_a_production_enclave_only_if_it_is_public(made, state, raised, kind, text):
    image = sign.sign(made(RAISES.format(raised), debug=False), keys.keygen())
    with pytest.raises(LaunchError) as caught:
        Enclave(image, state=state).start()
    assert caught.value.type == kind
    assert "SECRET" not in str(caught.value)
    assert text is None or str(caught.value).endswith(text)


def test_a_start_function_may_poison(made, state):
    image = made(RAISES.format("EnclavePoisonedError('a MAC does not hold')"))
    with pytest.raises((EnclavePoisonedError, LaunchError)):
        Enclave(image, state=state, quiet=True).start()


def test_a_start_function_that_ends_the_process_refuses_the_launch(made, state):
    image = made(RAISES.format("__import__('os')._exit(7)"))
    with pytest.raises(LaunchError, match="did not start"):
        Enclave(image, state=state, quiet=True).start()


def test_a_start_that_takes_too_long_is_ended(made, state, monkeypatch):
    image = made(ENTRY.replace("sleep(0.1)", "sleep(20)"))
    monkeypatch.setattr(_run, "_START_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(LaunchError, match="too long"):
        Enclave(image, state=state, quiet=True).start()
    assert time.monotonic() - began < 18  # on_start would take 20 s


# ---- stop ------------------------------------------------------------------------------------


@pytest.fixture
def read(made, state):
    """Reads a counter, in an enclave that is killed, so that it does not count itself."""
    with Enclave(made(STOPS, threads=2), state=state, quiet=True) as enclave:
        yield lambda counter: enclave.use(counter)[1]
        os.kill(enclave.info.pid, signal.SIGKILL)
        assert gone(enclave.info.pid)


def test_stop_functions_run_at_close_in_reverse_order_with_all_of_trusted(made, state, read):
    with Enclave(made(STOPS, threads=2), state=state, quiet=True) as enclave:
        counter, before = enclave.use(b"")
        pid = enclave.info.pid
    assert gone(pid)
    assert read(counter) == before + 2


def test_stop_functions_have_only_their_time(made, state, read):
    with Enclave(made(STOPS, threads=2), state=state, quiet=True) as enclave:
        counter, before = enclave.use(b"")
        enclave.hang()
        pid = enclave.info.pid
        began = time.monotonic()
        enclave.close()
        assert 3 <= time.monotonic() - began < 20  # 1 + 0.5 + 1 + 1 seconds, not 30
    assert gone(pid)
    assert read(counter) == before + 1


def test_no_stop_function_runs_in_a_killed_enclave(made, state, read):
    with Enclave(made(STOPS, threads=2), state=state, quiet=True) as enclave:
        counter, before = enclave.use(b"")
        os.kill(enclave.info.pid, signal.SIGKILL)
        assert gone(enclave.info.pid)
    assert read(counter) == before


def test_close_ends_a_running_call_and_still_runs_the_stop_functions(made, state, read):
    enclave = Enclave(made(STOPS, threads=2), state=state, quiet=True).start()
    counter, before = enclave.use(b"")
    ended: list[BaseException] = []

    def call() -> None:
        try:
            enclave.sleep(30.0)
        except EnclaveStateError as error:
            ended.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while not enclave._run.lanes.busy:
        time.sleep(0.01)
    began = time.monotonic()
    enclave.close()
    caller.join(25)
    assert not caller.is_alive()
    assert time.monotonic() - began < 20  # the call would take 30 s
    assert [type(error) for error in ended] == [EnclaveClosedError]
    assert read(counter) == before + 2


def test_an_entry_without_stop_functions_is_ended_at_once(made, state):
    enclave = Enclave(made(ENTRY), state=state, quiet=True).start()
    pid = enclave.info.pid
    enclave.close()
    assert gone(pid)


# ---- marks -----------------------------------------------------------------------------------


def test_marks_refuse_what_cannot_be_run_so():
    async def coroutine() -> None:
        pass

    def generator():
        yield 1

    def wants(argument: int) -> None:
        pass

    def trusted_function() -> None:
        pass

    trusted.ecall(trusted_function)
    for mark in (trusted.on_start, trusted.on_stop, trusted.on_stop(seconds=2)):
        for bad in (coroutine, generator, wants, trusted_function, print, 5, None):
            if bad is None and mark is trusted.on_stop:
                continue  # on_stop() is on_stop with the usual time
            with pytest.raises(TypeError):
                mark(bad)
    for bad in (0, -1, 5.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            trusted.on_stop(seconds=bad)


def test_a_function_is_an_ordinary_one_outside_and_cannot_be_marked_for_both():
    @trusted.on_start
    def load() -> int:
        return 5

    assert load() == 5
    with pytest.raises(TypeError, match="start or stop"):
        trusted.ecall(load)
