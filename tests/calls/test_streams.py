"""Functions that give their result item by item."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyenclave import trusted
from pyenclave.calls.signature import Signature
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
    OcallError,
)
from pyenclave.host.handle import Options

# ---- inside ------------------------------------------------------------------------------------

CLOSED: list[str] = []


@dataclasses.dataclass
class Row:
    number: int
    text: str


@trusted.ocall(allow=["numbers", "add", "forever", "history"])
def log(text: str) -> str:
    return text


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


def listed(count: int) -> Iterable[Row]:
    return [Row(i, "x" * i) for i in range(count)]


def arrays(count: int, size: int) -> Generator[npt.NDArray[np.float64], None, None]:
    for i in range(count):
        yield np.full(size, float(i))


def forever() -> Iterator[int]:
    number = 0
    try:
        while True:
            yield number
            number += 1
    finally:
        CLOSED.append(f"after {number}")


def history() -> list[str]:
    return CLOSED


def fails(good: int) -> Iterator[int]:
    yield from range(good)
    raise LookupError("secret")


def fails_at_once(good: int) -> Iterator[int]:
    raise LookupError("secret")


def fails_when_closed() -> Iterator[int]:
    try:
        yield 1
    finally:
        raise LookupError("secret")


def wrong_item() -> Iterator[int]:
    try:
        yield 1
        yield "two"  # type: ignore[misc]
    finally:
        CLOSED.append("wrong_item")


def too_long() -> Iterator[bytes]:
    yield b"x" * 1000
    yield b"x" * (1 << 20)


def not_iterable() -> Iterator[int]:
    return 5  # type: ignore[return-value]


def slow(seconds: float) -> Iterator[int]:
    for number in range(100):
        yield number
        time.sleep(seconds)


def asks(count: int) -> Iterator[str]:
    try:
        for number in range(count):
            yield log(f"item {number}")
    finally:
        CLOSED.append(log("end"))


def begins_ocall(text: str) -> str:
    return log(text)


def add(a: int, b: int) -> int:
    return a + b


def dies() -> Iterator[int]:
    yield 1
    os._exit(9)


ALL = (numbers, listed, arrays, forever, history, fails, fails_at_once, fails_when_closed,
       wrong_item, too_long, not_iterable, slow, asks, begins_ocall, add, dies)  # fmt: skip


@pytest.fixture
def make(pair):
    def one(lanes: int = 1, log: Callable[[str], str] = str.upper):
        return pair(*ALL, stubs=(globals()["log"],), handlers={"log": log}, lanes=lanes)

    return one


# ---- items -------------------------------------------------------------------------------------


def test_items_come_one_by_one_and_the_lane_is_free_afterwards(make):
    one = make()
    assert list(one.numbers(5)) == [0, 1, 2, 3, 4]
    assert list(one.numbers(0)) == []
    assert list(one.listed(3)) == [{"number": i, "text": "x" * i} for i in range(3)]
    typed = list(one.functions.typed(listed)(2))
    assert typed == [Row(0, ""), Row(1, "x")]
    for size in (0, 10, 100_000):
        for number, item in enumerate(one.arrays(3, size)):
            assert (item == np.full(size, float(number))).all()
            item[:] = 1  # its own memory
    assert one.lanes.busy == 0
    assert one.add(1, 2) == 3


def test_the_function_runs_only_as_far_as_it_is_asked(make):
    one = make()
    stream = one.forever()
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    assert one.lanes.busy == 1
    stream.close()
    assert stream.closed
    stream.close()
    assert one.lanes.busy == 0
    assert one.history() == ["after 2"]
    with pytest.raises(StopIteration):
        next(stream)


def test_leaving_a_with_block_closes_the_generator_inside(make):
    one = make()
    with one.forever() as stream:
        assert next(stream) == 0
    assert one.history() == ["after 0"]
    with pytest.raises(KeyError), one.forever() as stream:
        raise KeyError(next(stream))
    assert one.history() == ["after 0", "after 0"]


def test_a_stream_that_was_never_asked_is_closed_all_the_same(make):
    one = make()
    one.forever().close()
    assert one.add(1, 2) == 3
    assert one.history() == ["after 0"]


def test_a_dropped_stream_gives_its_lane_back(make, until):
    one = make()
    next(one.forever())
    gc.collect()
    until(lambda: one.lanes.busy == 0)
    assert one.history() == ["after 0"]
    one.forever()  # dropped before the first item
    assert one.add(1, 2) == 3
    stream = one.forever()
    ring = [next(stream), stream]
    ring.append(ring)
    del stream, ring
    gc.collect()
    assert one.add(2, 2) == 4


def test_breaking_off_a_loop_frees_the_lane(make):
    one = make()
    for item in one.forever():
        if item == 3:
            break
    assert one.add(1, 2) == 3


def test_a_stream_cannot_be_copied_and_shows_what_it_is(make):
    one = make()
    stream = one.numbers(1)
    assert repr(stream) == "<stream of numbers(count: int) -> Iterator[int]>"
    with pytest.raises(TypeError):
        pickle.dumps(stream)
    assert list(stream) == [0]
    assert "ended" in repr(stream)


# ---- errors ------------------------------------------------------------------------------------


def test_an_exception_comes_after_the_items_before_it(make):
    one = make()
    for name, good in (("fails", 3), ("fails", 0), ("fails_at_once", 0)):
        seen: list[int] = []
        with pytest.raises(EcallError) as caught:
            seen.extend(one.functions.named(name)(good))
        assert seen == list(range(good))
        assert caught.value.type == "LookupError"
        assert "secret" not in str(caught.value)
        assert one.lanes.busy == 0


def test_what_the_generator_raises_when_it_is_closed_is_told(make):
    one = make()
    stream = one.fails_when_closed()
    next(stream)
    with pytest.raises(EcallError) as caught:
        stream.close()
    assert caught.value.type == "LookupError"
    with pytest.raises(KeyError), one.fails_when_closed() as stream:
        raise KeyError(next(stream))  # what the caller raised matters more
    assert one.lanes.busy == 0


def test_an_item_that_does_not_fit_ends_the_stream_and_the_generator(make):
    one = make()
    stream = one.wrong_item()
    assert next(stream) == 1
    with pytest.raises(EcallError) as caught:
        next(stream)
    assert caught.value.type == "TypeError"
    assert one.history() == ["wrong_item"]
    stream = one.too_long()
    assert len(next(stream)) == 1000
    with pytest.raises(EcallError, match="ArgumentError"):
        next(stream)
    with pytest.raises(EcallError, match="TypeError"):
        next(one.not_iterable())
    assert one.add(1, 2) == 3


def test_arguments_are_refused_before_a_lane_is_taken(make):
    one = make()
    with pytest.raises(ArgumentError):
        one.numbers("five")
    assert one.lanes.busy == 0


def test_a_deadline_holds_for_each_item(pair, gate, until):
    def stops() -> Iterator[int]:
        yield 0
        yield gate.held()

    one = pair(slow, stops, add)
    quick = one.functions.with_options(Options(timeout=1.0))
    begun = time.monotonic()
    for number, item in enumerate(quick.named("slow")(0.25)):
        assert item == number
        if time.monotonic() - begun > 1.0:
            break
    stream = quick.named("stops")()
    assert next(stream) == 0
    with pytest.raises(CallTimeoutError):
        next(stream)
    assert list(stream) == []  # it ended
    assert one.lanes.busy == 1
    gate.open()
    until(lambda: one.lanes.busy == 0)
    assert one.add(1, 2) == 3


def test_the_worker_s_end_ends_the_stream(make):
    one = make()
    stream = one.dies()
    assert next(stream) == 1
    with pytest.raises(EnclaveLostError):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_leaving_the_enclave_ends_the_stream(make):
    one = make()
    stream = one.forever()
    next(stream)
    one.lanes.close()
    with pytest.raises(EnclaveClosedError):
        next(stream)
    stream.close()


def test_a_forked_child_leaves_the_parent_s_stream_alone(make):
    one = make()
    stream = one.numbers(3)
    assert next(stream) == 0
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                next(stream)
            except EnclaveStateError:
                code = 0
            del stream
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(stream) == [1, 2]


# ---- one lane a stream -------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_the_only_lane_streams_and_its_thread_is_told(make):
    one = make()
    stream = one.forever()
    next(stream)
    with pytest.raises(BusyError, match="stream open"):
        one.add(1, 2)
    assert next(stream) == 1
    stream.close()
    assert one.add(1, 2) == 3


@pytest.mark.timeout(60)
def test_another_thread_waits_until_the_stream_ends(make, until):
    one = make()
    stream = one.forever()
    next(stream)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(one.add(1, 2)))
    thread.start()
    until(lambda: one.lanes.queued == 1)
    assert found == []
    stream.close()
    thread.join()
    assert found == [3]


def test_streams_of_several_lanes_go_on_side_by_side(make):
    one = make(lanes=3)
    first, second = one.numbers(4), one.numbers(4)
    pairs = [(a, b, one.add(a, b)) for a, b in zip(first, second, strict=True)]
    assert pairs == [(i, i, 2 * i) for i in range(4)]


@pytest.mark.timeout(60)
def test_two_threads_cannot_ask_one_stream_at_once(pair, gate, until):
    def stops() -> Iterator[int]:
        yield 0
        yield gate.held()
        yield 2

    one = pair(stops)
    stream = one.stops()
    next(stream)
    thread = threading.Thread(target=lambda: next(stream))
    thread.start()
    until(gate.reached)
    with pytest.raises(EnclaveStateError, match="in use"):
        next(stream)
    with pytest.raises(EnclaveStateError, match="in use"):
        stream.close()
    gate.open()
    thread.join()
    assert next(stream) == 2


# ---- with ocalls -------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_stream_calls_the_host_between_items_and_at_its_end(make, timeout):
    one = make()
    asks_ = one.functions.with_options(Options(timeout=timeout)).named("asks")
    assert list(asks_(3)) == ["ITEM 0", "ITEM 1", "ITEM 2"]
    stream = asks_(3)
    assert next(stream) == "ITEM 0"
    stream.close()
    assert one.history() == ["END", "END"]


def test_a_failed_handler_ends_the_stream_with_its_cause(make):
    def refuse(text: str) -> str:
        raise KeyError(text)

    one = make(log=refuse)
    with pytest.raises(OcallError) as caught:
        next(one.asks(1))
    assert isinstance(caught.value.__cause__, KeyError)
    assert one.add(1, 2) == 3


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_handler_reads_a_nested_stream(make, timeout):
    one = make(log=lambda text: str(sum(one.numbers(10)) + one.add(1, 2)))
    begin = one.functions.with_options(Options(timeout=timeout)).named("begins_ocall")
    assert begin("x") == "48"


def test_a_nested_stream_takes_the_handler_s_lane_until_it_is_closed(make):
    seen: list[Any] = []

    def handler(text: str) -> str:
        stream = one.forever()
        next(stream)
        with pytest.raises(BusyError, match="stream open"):
            one.add(1, 2)
        stream.close()
        seen.append(one.add(1, 2))
        next(one.forever())  # dropped
        seen.append(one.history())
        kept.append(one.forever())
        assert next(kept[0]) == 0
        return "done"

    kept: list[Any] = []
    one = make(log=handler)
    assert one.begins_ocall("x") == "done"
    assert seen == [3, ["after 0", "after 0"]]
    with pytest.raises(EnclaveStateError, match="belongs to a handler"):
        next(kept[0])
    assert one.history() == ["after 0"] * 3
    assert one.add(1, 2) == 3


def test_a_stream_cannot_be_asked_by_the_handler_of_its_own_ocall(make):
    found: list[str] = []

    def handler(text: str) -> str:
        with pytest.raises(EnclaveStateError, match="in use"):
            next(stream)
        found.append(text)
        return text

    one = make(log=handler)
    stream = one.asks(2)
    assert list(stream) == ["item 0", "item 1"]
    assert found == ["item 0", "item 1", "end"]


def test_a_nested_stream_that_is_not_allowed_is_refused(make):
    def handler(text: str) -> str:
        with pytest.raises(CallError, match="does not allow"):
            next(one.listed(1))
        return text

    one = make(log=handler)
    assert one.begins_ocall("x") == "x"


# ---- signatures --------------------------------------------------------------------------------


def test_annotations_that_stream_and_those_that_cannot():
    def one() -> Iterator[int]: ...

    def two() -> Generator[list[str], None, None]: ...

    def three() -> Iterable: ...  # type: ignore[type-arg]

    def sends() -> Generator[int, str, None]: ...

    def returns() -> Generator[int, None, str]: ...

    def nested() -> list[Iterator[int]]: ...  # type: ignore[empty-body]

    async def later() -> Iterator[int]:
        yield 1

    from collections.abc import AsyncIterator

    def waits() -> AsyncIterator[int]: ...

    def takes(x: Iterator[int]) -> int: ...  # type: ignore[empty-body]

    for function in (one, two, three, sends, returns, nested, later, waits, takes):
        function.__qualname__ = function.__name__
    for function, item in ((one, "int"), (two, ["list", "str"]), (three, "any")):
        signature = Signature.of(function)
        assert (signature.streams, signature.returns) == (True, item)
        assert signature.to_wire()["returns"] == ["stream", item]
        assert Signature.from_wire(signature.to_wire()).to_wire() == signature.to_wire()
        assert "Iterator[" in str(signature)
    for function in (sends, returns, nested, waits, takes):
        with pytest.raises(ArgumentError):
            Signature.of(function)


@pytest.mark.parametrize(
    "wire",
    [
        {"returns": ["stream"]},
        {"returns": ["stream", "int", "int"]},
        {"returns": ["stream", ["stream", "int"]]},
        {"returns": ["list", ["stream", "int"]]},
        {"kind": "native", "returns": ["stream", "int"]},
        {"kind": "ocall", "returns": ["stream", "int"]},
        {"private": False},
        {"private": 1},
        {"private": "yes"},
        {"kind": "native", "private": True},
        {"secret": True},
    ],
)
def test_wires_that_no_build_makes_are_refused(wire):
    good = {"name": "f", "kind": "python", "params": [], "returns": "int"}
    assert Signature.from_wire(good)
    with pytest.raises(ArgumentError):
        Signature.from_wire({**good, **wire})
