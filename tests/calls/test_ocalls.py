"""Calls of the host from inside, nested calls back, and who may make which."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pyenclave
from pyenclave import trusted
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveLostError,
    EnclaveStateError,
    NotInEnclaveError,
    OcallError,
)
from pyenclave.host.handle import Options

# ---- inside ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    name: str
    value: float


@trusted.ocall(allow=["secret_sum", "add", "again", "count_up"])
def fetch(key: str) -> bytes:
    return b"of the unit test " + key.encode()


@trusted.ocall
def store(key: str, rows: list[Row], *, flag: bool = True) -> Row:
    return Row("local", 0.5)


@trusted.ocall
def scale(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x


@trusted.ocall(allow=["slow", "add"])
def wait(key: str) -> str:
    raise AssertionError


@trusted.ocall(allow=["add"])
def left(x: int) -> int:
    raise AssertionError


def ask(key: str) -> str:
    return "got " + fetch(key).decode()


def ask_named(key: str) -> bytes:
    return trusted.call_host("fetch", key)


def ask_for_none(key: str) -> bytes:
    return trusted.call_host("delete", key)


def ask_twice(key: str) -> bytes:
    return fetch(key) + fetch(key)


def ask_carefully(key: str) -> str:
    try:
        return fetch(key).decode()
    except OcallError as error:
        return f"{error.type}|{error}"


def keep(name: str, value: float) -> Row:
    row = store(name, [Row(name, value)])
    assert store("k", [], flag=False).name == "stored"
    return Row(row.name, row.value + 1)


def double(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return scale(x) + scale(x)


def add(a: int, b: int) -> int:
    return a + b


def secret_sum(values: list[int]) -> int:
    return sum(values)


def again(depth: int) -> int:
    return int(fetch(str(depth))) if depth else 0


def count_up(number: int) -> list[int]:
    return list(range(number))


def forbidden(x: int) -> int:
    return x


def wrong_type(key: str) -> bytes:
    return fetch(key.encode())  # type: ignore[arg-type]


def too_much(size: int) -> bytes:
    return fetch("x" * size)


class Finalizer:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __del__(self) -> None:
        try:
            fetch("from a finalizer")
        except EnclaveStateError as error:
            LOG.append(type(error).__name__)


LOG: list[str] = []


def leave_garbage() -> None:
    one = Finalizer()
    one.itself = one  # type: ignore[attr-defined]


def collect(key: str) -> tuple[list[str], bytes]:
    """A finalizer that runs while this thread waits in an ocall, and outside of any call."""
    answer = fetch(key)
    return LOG[:], answer


def in_a_thread(key: str) -> str:
    found: list[str] = []

    def run() -> None:
        try:
            fetch(key)
        except EnclaveStateError as error:
            found.append(type(error).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def made_up(secret: str) -> None:
    raise OcallError(f"the secret is {secret}", type="Secret")


ALL = (ask, ask_named, ask_for_none, ask_twice, ask_carefully, keep, double, add, again,
       count_up, forbidden, wrong_type, too_much, in_a_thread, made_up)  # fmt: skip
STUBS = (fetch, store, scale)
secret_sum.__pyenclave_private__ = True  # type: ignore[attr-defined]


def stored(key: str, rows: list[Any], *, flag: bool) -> dict[str, Any]:
    return {"name": "stored", "value": len(rows) + (0.25 if flag else 0)}


def handlers(**more: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"fetch": lambda key: key.upper().encode(), "store": stored, "scale": lambda x: x * 3,
            **more}  # fmt: skip


@pytest.fixture
def make(pair):
    def one(*functions: Callable[..., Any], lanes: int = 1, **more: Callable[..., Any]):
        return pair(
            *(functions or (*ALL, secret_sum)), stubs=STUBS, handlers=handlers(**more), lanes=lanes
        )

    return one


# ---- values ------------------------------------------------------------------------------------


def test_an_ocall_crosses_with_its_types(make):
    one = make()
    assert one.ask("k") == "got K"
    assert one.ask_named("k") == b"K"
    assert one.ask_twice("ab") == b"ABAB"
    assert one.keep("n", 2.0) == {"name": "stored", "value": 2.25}
    assert (one.double(np.arange(3.0)) == np.arange(3.0) * 6).all()
    big = np.arange(200_000 // 8, dtype="f8")
    assert (one.double(big) == big * 6).all()


def test_outside_an_enclave_a_stub_runs_its_own_body():
    assert fetch("k") == b"of the unit test k"
    assert ask("k") == "got of the unit test k"
    with pytest.raises(NotInEnclaveError, match="inside"):
        trusted.call_host("fetch", "k")


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_handler_s_exception_crosses_as_the_name_of_its_class(make, timeout):
    def broken(key: str) -> bytes:
        raise LookupError("the host's own text")

    one = make(fetch=broken)
    functions = one.functions.with_options(Options(timeout=timeout))
    inside = functions.named("ask_carefully")("k")
    assert inside == "LookupError|the host function fetch raised LookupError"
    with pytest.raises(OcallError, match="fetch raised LookupError") as caught:
        functions.named("ask")("k")
    assert caught.value.type == "LookupError"
    assert isinstance(caught.value.__cause__, LookupError)
    assert str(caught.value.__cause__) == "the host's own text"
    assert one.add(1, 2) == 3


@pytest.mark.parametrize("answer", [None, 5, "text", [b"x"], bytes(2 << 20)])
def test_an_answer_that_does_not_fit_is_an_error_on_both_sides(make, answer):
    one = make(fetch=lambda key: answer)
    assert one.ask_carefully("k").startswith("ArgumentError|")
    with pytest.raises(OcallError) as caught:
        one.ask("k")
    assert isinstance(caught.value.__cause__, ArgumentError)


def test_an_argument_that_does_not_fit_never_crosses(make):
    seen = []
    one = make(fetch=lambda key: seen.append(key) or b"")
    for name, argument in (("wrong_type", "k"), ("too_much", 2 << 20)):
        with pytest.raises(EcallError) as caught:
            one.functions.named(name)(argument)
        assert caught.value.type == "ArgumentError"
    assert seen == []
    assert one.ask("k") == "got "


def test_an_ocall_that_is_not_declared_is_unknown(make):
    with pytest.raises(EcallError) as caught:
        make().ask_for_none("k")
    assert caught.value.type == "UnknownFunctionError"


def test_an_OcallError_of_trusted_code_itself_does_not_tell_its_text(make):
    with pytest.raises(EcallError) as caught:
        make().made_up("the text inside")
    assert caught.value.type == "OcallError"
    assert "the text inside" not in str(caught.value)


def test_KeyboardInterrupt_in_a_handler_reaches_the_caller_and_the_lane_comes_back(make):
    def interrupted(key: str) -> bytes:
        raise KeyboardInterrupt

    for timeout in (None, 20.0):
        one = make(fetch=interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.functions.with_options(Options(timeout=timeout)).named("ask")("k")
        assert one.add(1, 2) == 3


# ---- handlers ----------------------------------------------------------------------------------


def test_missing_and_undeclared_handlers_are_refused(pair):
    with pytest.raises(OcallError, match="no handler") as caught:
        pair(ask, add, again, secret_sum, count_up, stubs=(fetch,), handlers={})
    assert "fetch(key: str) -> bytes" in str(caught.value.expected)
    with pytest.raises(OcallError, match="no ocall other"):
        pair(ask, add, again, secret_sum, count_up, stubs=(fetch,),
             handlers={"fetch": len, "other": len})  # fmt: skip


def test_handlers_are_checked_before_anything_starts(tmp_path):
    for wrong in ([1], {"fetch": 3}, {5: len}):
        with pytest.raises(TypeError):
            pyenclave.Enclave(b"", ocalls=wrong)

    async def later(key: str) -> bytes:
        return b""

    with pytest.raises(TypeError, match="AsyncEnclave"):
        pyenclave.Enclave(b"", ocalls={"fetch": later})


def test_a_handler_that_never_returns_does_not_hold_the_deadline(make, until):
    stop = threading.Event()

    def stuck(key: str) -> bytes:
        stop.wait(30)
        return b"late"

    one = make(fetch=stuck)
    quick = one.functions.with_options(Options(timeout=0.3))
    with pytest.raises(CallTimeoutError):
        quick.named("ask")("k")
    assert one.lanes.busy == 1  # the lane is the handler's until it returns
    with pytest.raises(CallTimeoutError):
        quick.named("add")(1, 2)
    stop.set()
    until(lambda: one.lanes.busy == 0)
    assert one.add(1, 2) == 3


def test_a_function_that_asks_for_ever_meets_its_deadline(make):
    def ask_for_ever(key: str) -> None:
        while True:
            try:
                fetch(key)
            except OcallError as error:
                if not error.type:
                    return  # nobody waits any more

    one = make(ask_for_ever, add, again, secret_sum, count_up)
    with pytest.raises(CallTimeoutError):
        one.functions.with_options(Options(timeout=0.3)).named("ask_for_ever")("k")
    assert one.add(1, 2) == 3


def test_the_worker_s_end_while_a_handler_runs(make):
    one = make(fetch=lambda key: one.kill() or time.sleep(0.3) or b"x")
    with pytest.raises(EnclaveLostError):
        one.ask("k")


# ---- nested calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_handler_calls_back_on_the_same_lane(make, timeout):
    one = make(fetch=lambda key: str(one.add(40, 2) + one.secret_sum([1, 2])).encode())
    functions = one.functions.with_options(Options(timeout=timeout))
    assert functions.named("ask")("k") == "got 45"
    assert one.lanes.busy == 0


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_nesting_ends_at_eight_calls(make, timeout):
    deepest = []

    def deeper(key: str) -> bytes:
        deepest.append(int(key))
        return str(one.again(int(key) - 1) + 1).encode()

    one = make(fetch=deeper)
    again_ = one.functions.with_options(Options(timeout=timeout)).named("again")
    assert again_(7) == 7
    assert len(deepest) == 7
    with pytest.raises(OcallError) as caught:
        again_(8)
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert len(causes) == 9
    assert type(causes[-1]) is CallError
    assert "nested too deep" in str(causes[-1])
    assert one.add(1, 2) == 3


def test_a_private_function_is_called_only_where_it_is_allowed(make):
    one = make()
    with pytest.raises(CallError, match="private"):
        one.secret_sum([1])
    assert one.add(1, 2) == 3


def matrix_stub(name: str, allow: tuple[str, ...]) -> Callable[[], bytes]:
    def body() -> bytes:
        return b""

    body.__name__ = body.__qualname__ = name
    return trusted.ocall(allow=allow)(body)


def matrix_ecall(name: str, *, private: bool) -> Callable[[], int]:
    def body() -> int:
        return 7

    body.__name__ = body.__qualname__ = name
    if private:
        body.__pyenclave_private__ = True  # type: ignore[attr-defined]
    return body


def test_BND_09_every_ocall_may_call_exactly_what_the_image_allows_it(pair):
    """Each subset of four functions, two of them private, as what an ocall allows."""
    names = ("f0", "f1", "p2", "p3")
    ecalls = [matrix_ecall(name, private=name[0] == "p") for name in names]
    subsets = [
        tuple(itertools.compress(names, (bits >> i & 1 for i in range(4)))) for bits in range(16)
    ]
    stubs = {f"o{i}": matrix_stub(f"o{i}", allow) for i, allow in enumerate(subsets)}

    def cross(which: str) -> bytes:
        return trusted.call_host(which)

    result: dict[str, Any] = {}

    def try_all(ocall: str) -> bytes:
        for name in (*names, "cross"):
            try:
                result[ocall, name] = one.functions.named(name)(*(["o0"] * (name == "cross")))
            except CallError as error:
                result[ocall, name] = str(error)
        return b"done"

    one = pair(
        *ecalls, cross, stubs=tuple(stubs.values()),
        handlers={name: lambda name=name: try_all(name) for name in stubs},
    )  # fmt: skip
    for number, allow in enumerate(subsets):
        ocall = f"o{number}"
        assert one.cross(ocall) == b"done"
        for name in names:
            want = 7 if name in allow else "the ocall does not allow calls of this function"
            assert result[ocall, name] == want, (ocall, name)
        assert "does not allow" in result[ocall, "cross"]
    for name in names:
        if name[0] == "p":
            with pytest.raises(CallError, match="private"):
                one.functions.named(name)()
        else:
            assert one.functions.named(name)() == 7


def test_a_nested_call_that_was_given_up_is_ended_before_the_answer(pair, gate):
    def slow(depth: int) -> int:
        return gate.held(depth)

    def outer(key: str) -> str:
        return wait(key)

    def handler(key: str) -> str:
        gate.shut()
        with pytest.raises(CallTimeoutError):
            one.functions.with_options(Options(timeout=0.1)).named("slow")(1)
        gate.open()
        if key == "more":
            return str(one.add(1, 2))
        return "given up"

    one = pair(outer, slow, add, stubs=(wait,), handlers={"wait": handler})
    assert one.outer("x") == "given up"
    assert one.outer("more") == "3"
    assert one.add(2, 2) == 4


def test_another_thread_of_a_handler_takes_another_lane(make):
    found: list[object] = []

    def handler(key: str) -> bytes:
        def other() -> None:
            found.append(one.forbidden(5))  # not allowed nested; here it is a call of its own

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return b"x"

    one = make(lanes=2, fetch=handler)
    assert one.ask("k") == "got x"
    assert found == [5]


@pytest.mark.timeout(60)
def test_BND_10_a_thread_that_has_every_lane_is_told_and_does_not_wait_for_itself(make):
    """Control frames are no nested calls: from a handler they would need a lane of their own."""
    seen = []

    def handler(key: str) -> bytes:
        with pytest.raises(BusyError, match="this thread itself"):
            one.lanes.request(2, b"ping")
        seen.append(key)
        return b"x"

    one = make(fetch=handler)
    for timeout in (None, 10.0):
        assert one.functions.with_options(Options(timeout=timeout)).named("ask")("k") == "got x"
    assert seen == ["k", "k"]


@pytest.mark.timeout(60)
def test_BND_10_a_finalizer_or_a_thread_of_trusted_code_cannot_call_the_host(pair):
    def make_and_leave() -> None:
        gc.disable()
        leave_garbage()

    def sweep(key: str) -> int:
        gc.collect()  # the finalizer runs here: within a call, so this one may ask
        return len(LOG)

    asked = []
    one = pair(
        make_and_leave, sweep, in_a_thread, add, again, secret_sum, count_up, stubs=(fetch,),
        handlers={"fetch": lambda key: asked.append(key) or b""},
    )  # fmt: skip
    assert one.in_a_thread("k") == "EnclaveStateError"
    one.make_and_leave()
    assert one.sweep("k") == 0
    assert asked == ["from a finalizer"]


@pytest.mark.timeout(60)
def test_BND_10_a_signal_handler_of_the_host_may_call_while_a_call_waits(pair):
    done = []

    def pause(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    two = pair(pause, add, lanes=2)
    old = signal.signal(signal.SIGALRM, lambda *_: done.append(two.add(1, 2)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert two.pause(0.4) == 0.4
        single = pair(pause, add, lanes=1)

        def refused(*_: object) -> None:
            with pytest.raises(BusyError):
                single.add(1, 2)
            done.append("busy")

        signal.signal(signal.SIGALRM, refused)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert single.pause(0.4) == 0.4
    finally:
        signal.signal(signal.SIGALRM, old)
    assert done == [3, "busy"]


def test_two_enclaves_call_each_other(pair):
    def go(x: int) -> int:
        return left(x)

    one = pair(go, add, stubs=(left,), handlers={"left": lambda x: two.go(x) + one.add(1, 1)})
    two = pair(go, add, stubs=(left,), handlers={"left": lambda x: one.add(x, 1) * two.add(5, 5)})
    assert one.go(3) == 42
