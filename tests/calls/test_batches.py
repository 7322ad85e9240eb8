"""Packed calls between two processes: order, errors, what is taken when, and hostile hosts."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator

import batch_model as model
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyenclave
from pyenclave import _core, trusted
from pyenclave._core import BatchRows
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.calls.signature import Signature, native_functions
from pyenclave.errors import (
    ArgumentError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveLostError,
    EnclavePoisonedError,
    OcallError,
    UnknownFunctionError,
)
from pyenclave.host import _map
from pyenclave.host._map import Results, source_of
from pyenclave.host.handle import Functions

BATCH = 6
RESULT, ERROR = 129, 130


def add(a: int, b: int) -> int:
    return a + b


def fail_on_thirds(x: int) -> int:
    if x % 3 == 0:
        raise LookupError(f"a secret: {x}")
    return -x


def scale(x: np.ndarray, by: float = 2.0) -> np.ndarray:
    return x * by


def size_of(pair: tuple[int, int]) -> int:
    return len(pair)


def echo(data: bytes) -> bytes:
    return data


def text(value: str, *, upper: bool = False) -> str:
    return value.upper() if upper else value


def needs_keyword(value: int, *, by: int) -> int:
    return value * by


def nothing() -> None:
    return None


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def leave(x: int) -> int:
    if x == 2:
        os._exit(9)
    return x


def poison(x: int) -> int:
    if x == 2:
        raise EnclavePoisonedError("a page's MAC does not hold")
    return x


def wrong(x: int) -> int:
    return "no int" if x else 0  # type: ignore[return-value]


def big(size: int) -> bytes:
    return bytes(size)


ALL = (add, fail_on_thirds, scale, size_of, echo, text, needs_keyword, nothing, sleep, leave,
       poison, wrong, big)  # fmt: skip


def mapped(one, name, items, errors="raise", functions=None):
    call = (functions or one.functions).batched(name)
    return Results(call, source_of(call, items), raises=errors == "raise")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    (folder / "lib.c").write_text(SOURCE)
    include = ["-I", pyenclave.get_include()]
    files = ["-o", folder / "lib.so", folder / "lib.c"]
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", *include, *files]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return str(folder / "lib.so")


SOURCE = """
#include <pyenclave_trusted.h>
#include <string.h>

/* Each byte one more; what begins with 255 is refused, after something was written. */
PYE_ECALL(bump)
{
    if (in_len > *out_len) {
        return PYE_ECALL_TOO_LONG;
    }
    for (size_t i = 0; i < in_len; i++) {
        out[i] = (uint8_t)(in[i] + 1);
    }
    if (in_len > 0 && in[0] == 255) {
        return in[1] == 0 ? PYE_ECALL_ARGUMENT : PYE_ECALL_USER + in[1];
    }
    *out_len = in_len;
    return PYE_ECALL_OK;
}

PYE_ECALL(total)
{
    double sum = 0;
    for (size_t i = 0; i + 8 <= in_len; i += 8) {
        double x;
        memcpy(&x, in + i, 8);
        sum += x;
    }
    if (*out_len < 8 || ((uintptr_t)in | (uintptr_t)out) % 64 != 0) {
        return PYE_ECALL_TOO_LONG;
    }
    memcpy(out, &sum, 8);
    *out_len = 8;
    return PYE_ECALL_OK;
}

/* As many bytes as the first byte says. */
PYE_ECALL(some)
{
    size_t want = in_len > 0 ? in[0] : 0;
    if (want > *out_len) {
        return PYE_ECALL_TOO_LONG;
    }
    memset(out, 7, want);
    *out_len = want;
    return PYE_ECALL_OK;
}
"""
NATIVE = {"bump": "", "total": "f8 -> f8", "some": ""}


# ---- order and values ----------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 3])
def test_results_come_in_the_order_of_the_items(pair, lanes):
    one = pair(*ALL, lanes=lanes)
    assert list(mapped(one, "echo", [])) == []
    for number in (1, 2, 9, 73, 5000):
        items = [str(i).encode() for i in range(number)]
        assert list(mapped(one, "echo", items)) == items
    assert one.lanes.busy == 0


def test_an_item_is_one_argument_and_a_tuple_is_spread_only_where_several_are_required(pair):
    one = pair(*ALL)
    assert list(mapped(one, "add", [(1, 2), (3, 4)])) == [3, 7]
    assert list(mapped(one, "size_of", [(1, 2), (3, 4)])) == [2, 2]
    assert list(mapped(one, "text", ["a", "b"])) == ["a", "b"]
    results = list(mapped(one, "add", [1, (1,), (1, 2, 3), [1, 2], (1, 2)], "return"))
    assert [type(result) for result in results] == [ArgumentError] * 4 + [int]
    with pytest.raises(ArgumentError, match="keyword argument by"):
        mapped(one, "needs_keyword", [1])
    with pytest.raises(ArgumentError, match="takes no argument"):
        mapped(one, "nothing", [1])
    with pytest.raises(UnknownFunctionError):
        mapped(one, "missing", [1])
    with pytest.raises(TypeError):
        mapped(one, "echo", 5)


def test_arrays_cross_in_batches_and_belong_to_the_caller(pair):
    one = pair(*ALL)
    items = [np.arange(i * 7, dtype="f8").reshape(7, i) for i in range(30)]
    results = list(mapped(one, "scale", items))
    for item, result in zip(items, results, strict=True):
        assert (result == item * 2).all()
        assert result.shape == item.shape
        assert result.flags.writeable
        assert result.ctypes.data % 8 == 0


def test_a_map_gives_what_single_calls_give(pair):
    one = pair(*ALL)
    numbers = st.integers(-(2**63), 2**62) | st.sampled_from([2**64, "x", None])

    def single(item):
        try:
            return one.fail_on_thirds(item)
        except CallError as error:
            return type(error)

    @given(items=st.lists(numbers, max_size=60), errors=st.sampled_from(["raise", "return"]))
    @settings(max_examples=60, deadline=None)
    def check(items, errors):
        got = []
        results = mapped(one, "fail_on_thirds", items, errors)
        while len(got) < len(items):
            try:
                value = next(results)
            except CallError as error:
                assert errors == "raise"
                value = error
            got.append(type(value) if isinstance(value, CallError) else value)
        assert list(results) == []
        assert got == [single(item) for item in items]

    check()


# ---- errors ------------------------------------------------------------------------------------


def test_an_error_is_of_its_item_and_the_others_run(pair):
    one = pair(*ALL)
    results = mapped(one, "fail_on_thirds", iter(range(1, 8)))
    assert [next(results), next(results)] == [-1, -2]
    with pytest.raises(EcallError) as raised:
        next(results)
    assert raised.value.type == "LookupError"
    assert "secret" not in str(raised.value)
    assert raised.value.id
    assert [next(results), next(results)] == [-4, -5]
    with pytest.raises(EcallError):
        next(results)
    assert list(results) == [-7]
    assert one.alive


def test_errors_of_a_debug_enclave_show_their_text(pair):
    one = pair(*ALL, debug=True)
    results = list(mapped(one, "fail_on_thirds", [1, 3], "return"))
    assert "a secret: 3" in str(results[1])


def test_a_result_of_a_wrong_type_is_that_item_s_error(pair):
    one = pair(*ALL)
    results = list(mapped(one, "wrong", [0, 1, 0], "return"))
    assert results[0] == results[2] == 0
    assert isinstance(results[1], EcallError)
    assert results[1].type == "TypeError"


def test_an_error_of_the_iterable_comes_after_the_results_before_it(pair):
    one = pair(*ALL)

    def items():
        yield from range(1, 3)
        yield from (4, 5)
        raise OSError("the disk")

    results = mapped(one, "fail_on_thirds", items())
    assert [next(results) for _ in range(4)] == [-1, -2, -4, -5]
    with pytest.raises(OSError, match="the disk"):
        next(results)
    assert one.lanes.busy == 0


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("good", [0, 1, 3, 7, 40])
def test_an_error_of_the_iterable_overtakes_no_result_on_any_number_of_lanes(pair, lanes, good):
    """It is raised once, in its place; an iterator that can go on does so afterwards."""
    one = pair(*ALL, lanes=lanes)

    class Items:
        at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            if self.at == good + 1:
                raise OSError("the disk")
            if self.at > good + 3:
                raise StopIteration
            return bytes([self.at])

    results = mapped(one, "echo", Items())
    assert [next(results) for _ in range(good)] == [bytes([n + 1]) for n in range(good)]
    with pytest.raises(OSError, match="the disk"):
        next(results)
    assert list(results) == [bytes([good + 2]), bytes([good + 3])]
    assert one.lanes.busy == 0


def test_a_map_that_was_interrupted_while_it_took_items_goes_on_with_none(pair):
    """What was taken then is lost: results that follow it would be of other items."""
    one = pair(*ALL)
    items = iter([b"a", b"b", b"c", b"d", b"e"])
    left = [1]

    class Items:
        def __iter__(self):
            return self

        def __next__(self):
            item = next(items)
            if item == b"c" and left.pop():
                raise KeyboardInterrupt
            return item

    results = mapped(one, "echo", Items())
    assert next(results) == b"a"
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert list(results) == []


def test_items_and_results_that_are_too_long_are_refused_alone(pair):
    one = pair(*ALL, limit=1 << 18)
    long = bytes((1 << 18) - 200)
    results = list(mapped(one, "echo", [b"a", long, b"b"], "return"))
    assert isinstance(results[1], ArgumentError)
    assert results[0::2] == [b"a", b"b"]
    sizes = [10, 100_000, 120_000, 300_000, 5, 120_000, 120_000, 1]
    results = list(mapped(one, "big", sizes, "return"))
    assert [len(r) if isinstance(r, bytes) else None for r in results] == [
        10, 100_000, 120_000, None, 5, 120_000, 120_000, 1,
    ]  # fmt: skip
    assert isinstance(results[3], ArgumentError)
    assert "too long in a batch" in str(results[3])


def test_an_image_with_tiny_messages_has_no_batches(pair):
    one = pair(*ALL, limit=4096)
    with pytest.raises(ArgumentError, match="too small for batches"):
        mapped(one, "echo", [b"x"])
    with pytest.raises(ArgumentError, match="too small for batches"):
        one.lanes.raw_call(BATCH, 0, model.write([(0, b"x")], 8))


def test_the_enclave_s_end_is_raised_at_its_place(pair):
    one = pair(*ALL)
    results = mapped(one, "leave", range(5))
    assert next(results) == 0
    with pytest.raises(EnclaveLostError) as raised:
        list(results)
    assert raised.value.started is True
    one = pair(*ALL)
    results = mapped(one, "poison", range(5), "return")
    assert next(results) == 0
    with pytest.raises(EnclaveLostError):
        list(results)
    assert one.ended() == (3, "a page's MAC does not hold")


# ---- with ocalls, streams and private functions ------------------------------------------------


@trusted.ocall(allow=["hidden"])
def fetch(key: str) -> bytes:
    raise AssertionError(key)


def ask(key: str) -> int:
    return len(fetch(key))


def count_up(to: int) -> Iterator[int]:
    yield from range(to)


def hidden(x: int) -> int:
    return x


hidden.__pyenclave_private__ = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_mapped_function_calls_the_host(pair, lanes):
    """What the host answers comes into the buffer in which the batch came: that must be kept."""
    asked = []

    def handler(key: str) -> bytes:
        asked.append(key)
        if key == "9":
            raise KeyError(key)
        return b"\xff" * (100_000 + int(key))

    one = pair(ask, hidden, stubs=(fetch,), handlers={"fetch": handler}, lanes=lanes)
    items = [str(i) for i in range(60)]
    results = list(mapped(one, "ask", items, "return"))
    assert isinstance(results[9], OcallError)
    assert results[:9] + results[10:] == [100_000 + i for i in range(60) if i != 9]
    assert sorted(asked, key=int) == items
    if lanes == 1:
        assert asked == items


def test_an_ocall_s_handler_calls_back_while_a_batch_is_under_way(pair):
    def handler(key: str) -> bytes:
        return bytes(one.hidden(int(key)))

    one = pair(ask, hidden, stubs=(fetch,), handlers={"fetch": handler})
    assert list(mapped(one, "ask", ["3", "4", "5"])) == [3, 4, 5]


def test_BND_09_a_private_function_is_not_called_by_a_batch(pair):
    one = pair(ask, hidden, stubs=(fetch,), handlers={"fetch": lambda key: b""})
    with pytest.raises(CallError, match="private"):
        list(mapped(one, "hidden", [1], "return"))
    assert one.alive


def test_a_stream_has_no_batches_on_either_side(pair):
    one = pair(add, count_up)
    with pytest.raises(ArgumentError, match="in items"):
        mapped(one, "count_up", [1])
    frame = one.signatures[1].request_plan.encode((3,))
    with pytest.raises(ArgumentError, match="in items"):
        one.lanes.raw_call(BATCH, 1, model.write([(0, frame)], 8))


# ---- what is taken when ------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_items_are_taken_lazily_and_never_many_ahead(pair, lanes):
    one = pair(*ALL, lanes=lanes)
    taken = itertools.count()
    seen = [0]

    def items():
        for i in taken:
            seen[0] = i
            yield bytes(60_000)

    results = mapped(one, "echo", items())
    assert seen[0] == 0
    for number in range(1, 40):
        assert len(next(results)) == 60_000
        # Two such items fit one slot; one more was taken and waits.
        assert seen[0] <= number + 3 * lanes + 1
    assert one.lanes.busy == 0


def test_no_lane_is_held_while_the_caller_s_code_runs(pair):
    """With one lane: calls from the loop's body and from the iterable itself do not wait."""
    one = pair(*ALL)
    items = (one.add(i, 1) for i in range(50))
    total = 0
    for value in mapped(one, "fail_on_thirds", (i * 3 + 1 for i in items)):
        total += one.add(value, 0)
    assert total == -sum((i + 1) * 3 + 1 for i in range(50))


def test_results_of_a_slow_function_stream(pair):
    """The last item ends only after results of those before it have come."""
    gate = mmap.mmap(-1, 1)  # shared with the worker

    def sleep(seconds: float) -> float:
        end = time.monotonic() + 60
        while seconds > 1 and gate[0] == 0 and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(min(seconds, 0.05))
        return seconds if seconds <= 1 or gate[0] else -1.0

    one = pair(sleep)
    results = mapped(one, "sleep", itertools.chain([0.0] * 3000, [0.05] * 19, [2.0]))
    for _ in range(3001):
        next(results)
    gate[0] = 1
    assert list(results) == [0.05] * 18 + [2.0]


def test_several_lanes_run_at_the_same_time(pair):
    most = mmap.mmap(-1, 1)  # shared with the worker
    lock = threading.Lock()
    running = 0

    def count(seconds: float) -> None:
        nonlocal running
        with lock:
            running += 1
            most[0] = max(most[0], running)
        time.sleep(seconds)
        with lock:
            running -= 1

    one = pair(count, lanes=4)
    assert list(mapped(one, "count", [0.05] * 16)) == [None] * 16
    assert most[0] > 1


def gated(gate):
    """Make a function that waits at the gate if it is told to."""

    def maybe(wait: bool) -> bool:
        if wait:
            gate.held()
        return wait

    return maybe


def test_a_deadline_ends_a_wait_and_the_lane_is_free_later(pair, gate, until):
    one = pair(*ALL, gated(gate))
    quick = one.functions.with_options(pyenclave.host._options.Options(timeout=1.0))
    results = mapped(one, "maybe", [False, True, False], functions=quick)
    assert next(results) is False
    with pytest.raises(CallTimeoutError):
        list(results)
    assert one.lanes.busy == 1
    gate.open()
    until(lambda: one.lanes.busy == 0)
    assert list(results) == []  # what may have begun is not sent again
    assert one.add(1, 2) == 3


def test_answers_that_came_before_a_crossing_failed_are_given_out(pair, gate, until):
    """Two batches are under way at a time: the first is answered, the second is not in time."""
    one = pair(*ALL, gated(gate), lanes=2)
    quick = one.functions.with_options(pyenclave.host._options.Options(timeout=1.0))
    results = mapped(one, "maybe", [False, True, False, False], functions=quick)
    assert next(results) is False
    with pytest.raises(CallTimeoutError):
        next(results)
    assert list(results) == []
    gate.open()
    until(lambda: one.lanes.busy == 0)
    gate.shut()
    results = mapped(one, "maybe", [True, False], functions=quick)
    with pytest.raises(CallTimeoutError):  # what came after it is not given out
        next(results)
    assert list(results) == []


def test_two_threads_cannot_take_from_one_map(pair, gate, until):
    one = pair(*ALL, gate.held)
    results = mapped(one, "held", [1, 2])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(next(results)))
    thread.start()
    until(lambda: one.lanes.busy == 1)
    with pytest.raises(ValueError, match="one thread at a time"):
        next(results)
    gate.open()
    thread.join()
    assert seen == [1]
    assert list(results) == [2]


# ---- native functions --------------------------------------------------------------------------


def test_native_functions_take_bytes_and_refuse_alone(pair, library):
    one = pair(library=library, native=NATIVE)
    items = [os.urandom(i % 90).replace(b"\xff", b"\0") for i in range(500)]
    want = [bytes(byte + 1 for byte in item) for item in items]
    assert list(mapped(one, "bump", items)) == want
    items[7], items[30] = b"\xff\0secret", b"\xff\5"
    results = list(mapped(one, "bump", items, "return"))
    assert isinstance(results[7], ArgumentError)
    assert isinstance(results[30], EcallError)
    assert results[30].type == "status 1005"
    assert results[:7] + results[8:30] + results[31:] == want[:7] + want[8:30] + want[31:]
    assert isinstance(next(mapped(one, "bump", ["text"], "return")), ArgumentError)


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (256, 64), (300, 5), (7, 128, 3), (5000, 64),
                                   (9, 0), (3, 200_000), (70_000, 1)])  # fmt: skip
@pytest.mark.parametrize("lanes", [1, 2])
def test_rows_of_an_array_cross_as_one_buffer(pair, library, shape, lanes):
    one = pair(library=library, native=NATIVE, lanes=lanes, limit=1 << 20)
    array = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    want = (array + 1).reshape(len(array), -1) if array.size else array.reshape(len(array), 0)
    got = mapped(one, "bump", array).array()
    assert got.dtype == np.uint8
    assert got.shape == want.shape or (len(array) == 0 and got.size == 0)
    assert (got == want).all()
    assert [bytes(row) for row in want] == list(mapped(one, "bump", array))


def test_only_plain_arrays_of_bytes_are_taken_as_they_are(pair, library):
    one = pair(library=library, native=NATIVE)
    call = one.functions.batched("bump")
    plain = np.zeros((3, 64), np.uint8)
    assert call.rows(plain) is not None
    views = [plain.view(kind) for kind in (np.int8, "S1", "M8[s]")]
    parts = [plain[:, ::2], plain.T, plain[0], plain[:0]]
    for other in (*views, *parts, np.ma.masked_array(plain), memoryview(plain), [b"x"]):
        assert call.rows(other) is None
    assert one.functions.batched("total").rows(plain) is None
    for wrong in (plain[0], plain.view("u2"), plain[:, ::2]):
        with pytest.raises(ValueError, match=r"rows of bytes|contiguous"):
            BatchRows(call, wrong)
    rows = BatchRows(call, plain)
    with pytest.raises(TypeError):
        rows.__init__(call, plain)
    assert not rows.done
    assert rows.take(2).count == 2
    assert rows.take(5).count == 1
    assert rows.take(5) is None
    assert rows.done
    with pytest.raises(TypeError):
        BatchRows.__new__(BatchRows).first()


def test_element_types_are_those_of_the_image(pair, library):
    one = pair(library=library, native=NATIVE)
    rows = np.arange(24, dtype="f8").reshape(6, 4)
    got = mapped(one, "total", rows).array()
    assert got.dtype == np.float64
    assert got.tolist() == [[value] for value in rows.sum(axis=1)]
    assert (mapped(one, "total", np.asfortranarray(rows)).array() == got).all()
    assert (mapped(one, "total", rows[::2]).array() == got[::2]).all()
    assert mapped(one, "total", np.arange(3.0)).array().tolist() == [[0], [1], [2]]
    assert [row.tolist() for row in mapped(one, "total", rows)] == got.tolist()
    assert [row.tolist() for row in mapped(one, "total", list(rows))] == got.tolist()
    for bad in (rows.astype("f4"), rows.astype(object)):
        with pytest.raises(ArgumentError):
            mapped(one, "total", bad)
    with pytest.raises(TypeError):
        mapped(one, "total", np.float64(3).reshape(()))


def test_an_array_of_results_wants_them_all_alike(pair, library):
    one = pair(library=library, native=NATIVE)
    assert mapped(one, "some", [b"\3"] * 10).array().tolist() == [[7, 7, 7]] * 10
    with pytest.raises(CallError, match="not all of one length"):
        mapped(one, "some", [b"\3", b"\4"]).array()
    bad = np.zeros((100, 64), np.uint8)
    bad[70, 0] = 255
    with pytest.raises(ArgumentError):
        mapped(one, "bump", bad, "return").array()
    with pytest.raises(ArgumentError):
        mapped(one, "bump", [b"1", "text"]).array()
    results = mapped(one, "bump", bad[:70])
    next(results)
    with pytest.raises(ValueError, match="taken before"):
        results.array()
    assert mapped(one, "bump", bad[:70]).array().tolist() == (bad[:70] + 1).tolist()
    assert mapped(one, "bump", []).array().shape == (0, 0)


def test_a_python_function_has_no_array_of_results(pair):
    one = pair(*ALL)
    with pytest.raises(TypeError, match="native"):
        mapped(one, "echo", [b"x"]).array()


def test_BND_07_what_a_refusing_function_wrote_is_in_no_answer(pair, library):
    one = pair(library=library, native=NATIVE)
    rows = [b"\xff\0" + b"\x41" * 2000, b"\x10" * 3, b"\xff\1" + b"\x41" * 70_000, b"\x20" * 200]
    raw = one.lanes.raw_call(BATCH, 0, model.write([(0, row) for row in rows], 64))
    assert b"\x42" * 4 not in raw
    assert one.lanes.raw_call(BATCH, 0, model.write([(0, b"\1" * 64)] * 3, 64)) == model.write(
        [(0, b"\2" * 64)] * 3, 64, form=model.EVEN
    )


# ---- hostile hosts -----------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
def test_the_enclave_refuses_what_is_not_a_batch_and_lives(pair, library, native):
    one = pair(library=library, native=NATIVE) if native else pair(*ALL)
    good = model.write([(0, b"abc"), (0, b"")], 64 if native else 8)
    bad = [b"", good[:-1], good + bytes(8), good[:63], bytes(64), bytes(200), b"\xff" * 4096,
           os.urandom(200_000), model.HEADER.pack(2**32 - 1, 0, 0, 0),
           model.HEADER.pack(65536, 1, 0, 0) + bytes(65536 * 8),
           model.HEADER.pack(8, 0, 2**61, 0), good[:70] + b"\xff" + good[71:]]  # fmt: skip
    for data in bad:
        with pytest.raises(CallError):
            one.lanes.raw_call(BATCH, 0, data)
    for index in (len(one.signatures), 40_000, 65_535):
        with pytest.raises(UnknownFunctionError):
            one.lanes.raw_call(BATCH, index, good)
    assert one.alive


def test_arguments_that_do_not_decode_are_that_item_s_error(pair):
    one = pair(*ALL)
    index = [s.name for s in one.signatures].index("add")
    good = one.signatures[index].request_plan.encode((2, 3))
    frames = [good, b"", good[:-1], good + b"\0", b"\xff" * 18, good]
    raw = one.lanes.raw_call(BATCH, index, model.write([(0, frame) for frame in frames], 8))
    found = model.read(raw, 8, reply=True)
    assert [tag for _, _, tag in found] == [0, 1, 1, 1, 1, 0]


def test_a_budget_of_the_host_stops_a_batch_between_items(pair):
    one = pair(*ALL)
    index = [s.name for s in one.signatures].index("sleep")
    item = one.signatures[index].request_plan.encode((0.03,))
    raw = one.lanes.raw_call(BATCH, index, model.write([(0, item)] * 9, 8, budget=50))
    tags = [tag for _, _, tag in model.read(raw, 8, reply=True)]
    done = tags.count(0)
    assert done in (1, 2)  # one, if that slept for longer than it was to
    assert tags == [0] * done + [3] * (9 - done)


@pytest.mark.timeout(60)
def test_BND_03_a_batch_whose_words_change_never_makes_the_worker_crash(pair):
    """A process flips the counts, sizes, lengths and bytes of the batch while it crosses."""
    one = pair(*ALL, limit=1 << 20)
    at = one.header("request") + 32
    pid = os.fork()
    if pid == 0:
        rng = np.random.default_rng(5)
        values = [
            bytes(8),
            b"\xff" * 8,
            (2**62).to_bytes(8, "little"),
            (65537).to_bytes(8, "little"),
        ]
        while True:
            for place, what in zip(rng.integers(0, 60, 500), rng.integers(0, 4, 500), strict=True):
                start = at + int(place) * 8
                old = one.memory[start : start + 8]
                one.memory[start : start + 8] = values[what]
                one.memory[start : start + 8] = old
    seen = {"right": 0, "other": 0, "refused": 0}
    items = [bytes([i]) * i for i in range(40)]
    try:
        end = time.monotonic() + 3
        far = end + 20  # on a machine with much else to do
        while (now := time.monotonic()) < end or (seen["right"] <= 100 and now < far):
            try:
                results = list(mapped(one, "echo", items, "return"))
                seen["right" if results == items else "other"] += 1
            except CallError:
                seen["refused"] += 1
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert one.alive
    assert seen["right"] > 100, seen
    assert seen["other"] + seen["refused"] > 0, seen  # what was flipped did matter
    assert list(mapped(one, "echo", items)) == items


def test_refused_items_keep_their_places_when_a_batch_is_cut(pair, monkeypatch):
    """Items refused by the host lie between items that cross in several goes."""
    one = pair(*ALL)
    monkeypatch.setattr(_map, "BUDGET_MS", 1)
    items = [0.002 if i % 4 else "bad" for i in range(60)]
    results = list(mapped(one, "sleep", items, "return"))
    assert [0.002 if isinstance(r, float) else "bad" for r in results] == items


@pytest.mark.parametrize("slot", [96, 128, 160, 192, 256, 4096])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_a_batch_of_rows_is_no_longer_than_a_slot_however_small(slot: int, width: int) -> None:
    """No image makes such slots: the room for a batch's head is not taken from less than that."""
    fd = ring.create(1, slot)
    memory = ring.map_ring(fd, 1, slot)
    os.close(fd)
    lanes = _core.HostLanes(
        memory, mmap.mmap(-1, 4096), 1, slot, 1 << 20, lambda: None, EnclaveLostError,
        call_errors.from_frame, threading.Condition(), 4,
    )  # fmt: skip
    wire = native_functions({"f": "bytes -> bytes"})[0]
    call = Functions((Signature.from_wire(wire),), lanes).batched("f")
    for make in (call.rows, functools.partial(_core.BatchRows, call)):
        rows, num = make(np.zeros((3000, width), np.uint8)), 0
        while not rows.done:
            batch = rows.take(2**32 - 1)
            num += batch.count
            assert batch.count == 1 or batch.size <= slot
        assert num == 3000
