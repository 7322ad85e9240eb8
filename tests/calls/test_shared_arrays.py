"""Arrays in memory that both sides map: hostile references first, then what users see."""

from __future__ import annotations

import gc
import mmap
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyenclave import _core
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.calls.signature import Signature
from pyenclave.errors import (
    ArgumentError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclavePoisonedError,
)
from pyenclave.host._arena import SharedMemory
from pyenclave.host.handle import Functions

SIZE = 4 << 20
CALL = 1
RESULT, ERROR = 129, 130
POINT = np.dtype([("x", "<f8"), ("hot", "?"), ("name", "U3"), ("at", "<i2", (2,))])
Points = Annotated[np.ndarray, POINT]

_kept: list[np.ndarray] = []
_ready = threading.Event()


def echo(x: np.ndarray) -> np.ndarray:
    return x


def negate(x: np.ndarray) -> np.ndarray:
    return -x


def total(x: np.ndarray, y: np.ndarray) -> float:
    return float(x.sum() + y.sum())


def is_zero(x: np.ndarray) -> bool:
    return not x.any()


def scale(x: np.ndarray, by: float = 2.0, *, plus: float = 0.0) -> np.ndarray:
    return x * by + plus


def spoil(x: np.ndarray) -> float:
    x[...] = -1
    return float(x.size)


def keep(x: np.ndarray) -> int:
    _kept.append(x)
    return x.ctypes.data % 64


def kept(which: int) -> np.ndarray:
    return _kept[which]


def points(x: Points) -> Points:
    return x[::-1]


def masked(x: Annotated[np.ndarray, "?"]) -> int:
    return int(np.frombuffer(x, np.uint8).max())


def late(x: np.ndarray, seconds: float) -> np.ndarray:
    time.sleep(seconds)
    return x


def other(kind: str) -> np.ndarray:
    return {"f4": np.ones(8, "f4"), "f8": np.ones(4), "short": np.ones(2)}[kind]


def fails(x: np.ndarray) -> np.ndarray:
    raise ValueError("no")


ALL = (echo, negate, total, is_zero, scale, spoil, keep, kept, points, masked, late, other, fails)


@pytest.fixture
def one(pair):
    return pair(*ALL, shared=SIZE, limit=1 << 20)


def sent(one: Any) -> int:
    """Bytes of the message that the host sent last."""
    found: int = struct.unpack_from("<Q", one.memory, one.header("request") + 16)[0]
    return found


def answered(one: Any) -> int:
    found: int = struct.unpack_from("<Q", one.memory, one.header("reply") + 16)[0]
    return found


def index_of(name: str) -> int:
    return sorted(function.__name__ for function in ALL).index(name)


def frame(*arrays: bytes, place: tuple[int, int] | None = None, rest: bytes = b"") -> bytes:
    head = b"" if place is None else struct.pack("<QQ", *place)
    body = head + b"".join(arrays) + rest
    return struct.pack("<I", 4 + len(body)) + body


def named(offset: int, *shape: int, code: int = 12, flag: int = 0x80) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return bytes([code, len(shape) | flag]) + sizes + struct.pack("<Q", offset)


# ---- hostile hosts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "shape"),
    [
        (SIZE, (1,)),
        (SIZE - 7, (1,)),
        (SIZE - 8, (2,)),
        (0, (SIZE // 8 + 1,)),
        (8, (SIZE // 8,)),
        (2**64 - 8, (1,)),
        (2**64 - 4096, (512,)),  # the end of the ring part, counted backwards
        (2**64 - 4096, (1024,)),
        (2**63, (1,)),
        (2**64 - 1, ()),
        (0, (2**40, 2**40)),
        (0, (2**61,)),
        (SIZE + 1, (0,)),
    ],
)
def test_BND_02_a_reference_beyond_the_shared_memory_is_refused(one, offset, shape):
    for name, place in (("is_zero", None), ("negate", (0, 0))):
        with pytest.raises(ArgumentError, match="malformed frame"):
            one.lanes.raw_call(CALL, index_of(name), frame(named(offset, *shape), place=place))
    assert one.is_zero(np.zeros(3))


@pytest.mark.parametrize(
    "place",
    [(SIZE, 8), (SIZE - 4, 8), (0, SIZE + 1), (2**64 - 8, 8), (8, 2**64 - 8), (2**64 - 4096, 4096),
     (64, 0), (SIZE + 1, 0)],
)  # fmt: skip
def test_BND_02_a_place_for_the_result_beyond_the_shared_memory_is_refused(one, place):
    before = bytes(one.memory[:4096])
    with pytest.raises(ArgumentError, match="place of its result"):
        one.lanes.raw_call(CALL, index_of("negate"), frame(named(0, 4), place=place))
    assert bytes(one.memory[:4096]) == before
    assert one.is_zero(np.zeros(3))


def test_malformed_references_are_refused_and_the_enclave_lives(one):
    index = index_of("is_zero")
    for data in (
        frame(named(0, 1)[:-1]),  # the offset is cut off
        frame(named(0, 1)[:-8]),
        frame(named(0, 1), rest=b"x"),
        frame(named(0, 1)) + b"x",
        frame(named(0, 1, flag=0xC0)),
        frame(named(0, *[1] * 33)),
        frame(named(0, 1, code=0)),
        frame(named(0, 1, code=41)),
    ):
        with pytest.raises(ArgumentError, match="malformed frame"):
            one.lanes.raw_call(CALL, index, data)
    with pytest.raises(ArgumentError):  # the place is missing
        one.lanes.raw_call(CALL, index_of("negate"), frame(named(0, 1)))
    assert one.is_zero(np.zeros(3))


def test_references_are_refused_where_there_is_no_shared_memory(pair):
    none = pair(is_zero)
    with pytest.raises(ArgumentError, match="none here"):
        none.lanes.raw_call(CALL, 0, frame(named(0, 0)))


def test_one_call_cannot_name_more_than_the_shared_memory_has(pair):
    one = pair(*ALL, shared=SIZE, limit=SIZE)
    half = SIZE // 16 + 8
    data = frame(named(0, half), named(64, half))
    with pytest.raises(ArgumentError, match="larger than the shared memory"):
        one.lanes.raw_call(CALL, index_of("total"), data)
    x = one.shared.zeros(half)
    x[0] = 3
    assert one.total(x, x) == 6  # the second is sent in the ordinary way
    assert SIZE // 2 < sent(one) < SIZE // 2 + 4096


def test_overlapping_references_are_two_copies(one):
    x = one.shared.array(np.arange(100.0))
    assert one.total(x[:60], x[40:]) == x[:60].sum() + x[40:].sum()
    assert sent(one) < 100
    assert np.array_equal(one.negate(x[10:50], out=x[20:60]), -np.arange(10.0, 50.0))


def test_BND_03_what_the_enclave_has_does_not_change_with_the_shared_memory(one):
    x = one.shared.array(np.arange(1000.0))
    assert one.keep(x) == 0
    x[...] = 7
    for _ in range(4):
        one.is_zero(x)
        one.negate(x)
    y = one.shared.empty(1000)
    assert np.array_equal(one.kept(0), np.arange(1000.0))
    assert np.array_equal(one.kept(0, out=y), np.arange(1000.0))
    one.memory[-SIZE:] = bytes(SIZE)
    assert np.array_equal(one.kept(0), np.arange(1000.0))


def test_what_trusted_code_keeps_is_never_given_out_again(one):
    x = one.shared.empty(5000, np.int64)
    for value in range(20):
        x[...] = value
        one.keep(x)
        one.is_zero(x)
    assert [int(one.kept(value).max()) for value in range(20)] == list(range(20))
    assert [int(one.kept(value).min()) for value in range(20)] == list(range(20))


def test_trusted_code_writes_to_a_copy(one):
    x = one.shared.zeros(50)
    assert one.spoil(x) == 50
    assert not x.any()


def test_SER_04_bools_and_texts_are_judged_on_the_copy(one):
    flags = one.shared.zeros(100_000, np.bool_)
    raw = flags.view(np.uint8)
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            raw[::7] ^= 2

    thread = threading.Thread(target=flip)
    thread.start()
    refused = 0
    try:
        for turn in range(20_000):  # a busy machine may run the two one after the other
            try:
                assert one.masked(flags) <= 1
            except ArgumentError:
                refused += 1
            if refused and turn >= 200:
                break
    finally:
        stop.set()
        thread.join()
    assert refused
    raw[...] = 2
    with pytest.raises(ArgumentError, match="bool"):
        one.masked(flags)


# ---- hostile workers ---------------------------------------------------------------------------


class Liar:
    """The host's real lanes, and a worker that answers with given bytes."""

    def __init__(self) -> None:
        fd = ring.create(1, shared=SIZE)
        self.memory = ring.map_ring(fd, 1, shared=SIZE)
        side = ring.slot_stride()
        self.request, self.reply = 4096 + 256, 4096 + 256 + side
        token = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.lanes = _core.HostLanes(
            self.memory, token, 1, ring.DEFAULT_SLOT, 1 << 20, lambda: None,
            lambda check: EnclavePoisonedError("host: " + check), call_errors.from_frame,
            threading.Condition(), 8, shared=SIZE,
        )  # fmt: skip
        echo.__pyenclave_ecall__ = True  # type: ignore[attr-defined]
        self.functions = Functions((Signature.of(echo),), self.lanes)
        self.shared = SharedMemory(self.memory, SIZE, lambda: None)
        self.answer = b""
        self.meanwhile: Callable[[], object] = lambda: None
        self.stop = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        last = 0
        while not self.stop:
            (sequence,) = struct.unpack_from("<I", self.memory, self.request)
            if sequence == last:
                time.sleep(0.0005)
                continue
            last = sequence
            self.meanwhile()
            data = self.answer
            self.memory[self.reply + 32 : self.reply + 32 + len(data)] = data
            struct.pack_into("<IIQQ", self.memory, self.reply + 8, len(data), 0, len(data), 0)
            # In one store: pack_into zeroes the place first, and the host would see that.
            words = memoryview(self.memory)[self.reply : self.reply + 8].cast("Q")
            words[0] = RESULT << 32 | sequence
            words.release()

    def close(self) -> None:
        self.stop = True
        self.thread.join()
        self.lanes.close()


@pytest.fixture
def liar():
    made = Liar()
    yield made
    made.close()


def test_a_hostile_answer_touches_nothing_but_out(liar):
    guard_before, out, guard_after = (liar.shared.zeros(64) for _ in range(3))
    base = SIZE - (out.ctypes.data - liar.shared._address)
    place = SIZE - base
    call = liar.functions.named("echo")
    liar.answer = frame(named(place, 64))
    assert call(np.zeros(3), out=out) is out
    for answer in (
        frame(named(place + 8, 64)),
        frame(named(0, 64)),
        frame(named(place, 65)),
        frame(named(place, 63)),
        frame(named(place, 2**60)),
        frame(named(2**64 - 4096, 64)),
        frame(named(place, 64, code=8)),
        frame(named(place, 8, 8)),
        frame(named(place, *[1] * 32)),
        frame(named(place, 64), rest=b"\0" * 8),
        frame(named(place, 64)[:-1]),
        frame(named(place, 64)) + bytes(512),
        b"\0\0\0\0\0\x80",
        b"\xff" * 600,
    ):
        out[...], guard_before[...], guard_after[...] = 5, 6, 7
        liar.answer = answer
        with pytest.raises((CallError, ArgumentError)):
            call(np.zeros(3), out=out)
        assert (guard_before == 6).all()
        assert (guard_after == 7).all()
        assert not out.any()
    for answer in (b"", b"\0" * 5, b"\x06\0\0\0\x0c"):
        liar.answer = answer
        with pytest.raises(CallError):
            call(np.zeros(3), out=out)


def test_a_hostile_answer_cannot_make_a_result_of_shared_memory(liar):
    call = liar.functions.named("echo")
    liar.answer = frame(named(0, 64))
    with pytest.raises(CallError, match="shared memory"):
        call(np.zeros(3))
    with pytest.raises(CallError, match="shared memory"):
        call(np.zeros(3), out=np.zeros(64))


def test_SER_04_bools_never_come_to_a_place_that_the_enclave_can_change(liar):
    """A mask is counted first and used afterwards."""
    call = liar.functions.named("echo")
    out = liar.shared.zeros(16, np.bool_)
    liar.answer = frame(named(out.ctypes.data - liar.shared._address, 16, code=1))
    with pytest.raises(CallError, match="shared memory"):
        call(np.zeros(3), out=out)


@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")  # NumPy 2.5
def test_BND_22_out_that_changes_its_form_during_the_call_is_refused(liar):
    call = liar.functions.named("echo")
    out = liar.shared.zeros(4)
    liar.answer = frame(named(out.ctypes.data - liar.shared._address, 4))
    liar.meanwhile = lambda: setattr(out, "dtype", np.dtype("V32"))
    with pytest.raises(ArgumentError, match="stays as it was"):
        call(np.zeros(3), out=out)


# ---- what crosses ------------------------------------------------------------------------------

_TYPES = [text for text in _core.ARRAY_TYPES if text]


def test_every_type_and_shape_crosses_by_its_place(one):
    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.sampled_from(_TYPES),
        hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
        st.binary(min_size=8, max_size=8),
    )
    def check(text: str, shape: tuple[int, ...], pattern: bytes) -> None:
        kind = np.dtype(text)
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.frombuffer(pattern * (count * 2 or 1), np.uint8)
        values = (
            (raw[:count] > 100) if kind == np.bool_ else raw[: count * kind.itemsize].view(kind)
        )
        values = values.reshape(shape)
        x = one.shared.array(values)
        out = one.shared.empty(shape, kind)
        assert (x.dtype, x.shape, x.flags.c_contiguous) == (kind, shape, True)
        for result in (one.echo(x), one.echo(values, out=out), one.echo(x, out=out)):
            assert result.dtype == kind
            assert result.shape == shape
            assert result.tobytes() == values.tobytes()
        assert result is out
        if count:
            assert sent(one) == 4 + 16 + 2 + 8 * len(shape) + 8
            if kind != np.bool_:  # results of bools are copied
                assert answered(one) == 4 + 2 + 8 * len(shape) + 8

    check()


@pytest.mark.parametrize("ndim", [1, 2, 7, 32])
def test_all_numbers_of_dimensions_cross(one, ndim):
    """With 7 the head of the answer is as long as a head and six bytes beside it."""
    x = one.shared.array(np.full((1,) * (ndim - 1) + (6,), 3, np.int8))
    out = one.shared.zeros(x.shape, np.int8)
    assert one.negate(x, out=out) is out
    assert (out == -3).all()


def test_parts_of_a_shared_array_cross_by_their_place(one):
    x = one.shared.array(np.arange(4096, dtype=np.uint8))
    odd = x[13:2061].view(np.float64)  # no multiple of 8: the copy inside is aligned
    assert odd.ctypes.data % 8
    got = one.echo(odd)
    assert sent(one) < 100
    assert got.tobytes() == odd.tobytes()
    y = one.shared.zeros((10, 10))
    assert one.scale(np.ones(10), out=y[3]) is not None
    assert answered(one) < 100
    assert y.sum() == 20
    assert (y[3] == 2).all()


def test_what_is_not_contiguous_or_lies_elsewhere_crosses_in_the_ordinary_way(one, pair):
    x = one.shared.array(np.arange(100.0).reshape(10, 10))
    for part in (x[::2], x.T, x[:, 3], x[::-1]):
        assert np.array_equal(one.negate(part), -part)
    swapped = x.astype(">f8")
    assert np.array_equal(one.negate(swapped), -x)
    y = one.shared.zeros((10, 10))
    assert np.array_equal(one.negate(x, out=y.T), -x)
    assert np.array_equal(y, -x.T)
    another = pair(*ALL, shared=SIZE)
    assert np.array_equal(another.negate(x), -x)
    assert sent(another) >= x.nbytes
    there = another.shared.zeros((10, 10))
    assert one.negate(x, out=there) is there
    assert np.array_equal(there, -x)


def test_records_cross_by_their_place(one):
    rows = one.shared.zeros(3, POINT)
    rows["x"], rows["name"], rows["hot"] = [1, 2, 3], ["a", "bcd", ""], [True, False, True]
    got = one.points(rows)
    assert sent(one) < 100
    assert np.array_equal(got, rows[::-1])
    rows.view(np.uint8)[8] = 7  # the bool of the first row
    with pytest.raises(ArgumentError, match="bool"):
        one.points(rows)
    aligned = one.shared.zeros(3, np.dtype(POINT.descr, align=True))
    assert np.array_equal(one.points(aligned), np.zeros(3, POINT))


def test_keywords_and_defaults_stay_what_they_are(one):
    x = one.shared.array([1.0, 2.0])
    out = one.shared.empty(2)
    assert one.scale(x).tolist() == [2, 4]
    assert one.scale(x, plus=1.0, out=out).tolist() == [3, 5]
    assert one.scale(x, 3.0, out=x).tolist() == [3, 6]
    assert x.tolist() == [3, 6]


@pytest.mark.parametrize("kind", ["f4", "f8", "short"])
def test_an_out_of_another_type_or_shape_is_refused(one, kind):
    """Of other types and shapes with as many bytes, too."""
    for wrong in (one.shared.zeros(4, np.int64), one.shared.zeros((2, 2)), one.shared.zeros(3)):
        with pytest.raises(ArgumentError, match="out"):
            one.other(kind, out=wrong)
        assert not wrong.any()
    assert one.is_zero(np.zeros(1))


def test_a_failing_function_leaves_a_usable_enclave(one):
    x = one.shared.zeros(4)
    for _ in range(3):
        with pytest.raises(EcallError):
            one.fails(x, out=x)
    assert one.negate(x, out=x) is x


def test_arrays_larger_than_the_message_limit_cross(one):
    x = one.shared.zeros(SIZE // 16)
    assert x.nbytes > 1 << 20
    x[-1] = 4
    assert one.negate(x, out=x)[-1] == -4
    with pytest.raises(ArgumentError, match="too long"):
        one.negate(np.zeros(SIZE // 16))


def test_lanes_do_not_mix_their_arrays(pair):
    many = pair(*ALL, shared=SIZE, lanes=4)
    wrong: list[Any] = []

    def work(number: int) -> None:
        x = many.shared.empty(20_000)
        y = many.shared.empty(20_000)
        for turn in range(60):
            x[...] = number * 1000 + turn
            many.negate(x, out=y)
            if not (y == -x).all():
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- calls that were given up ------------------------------------------------------------------


def test_memory_of_a_given_up_call_is_not_given_out_before_it_returns(one, until):
    x, out = one.shared.array(np.ones(1000)), one.shared.zeros(1000)
    free = one.shared.free
    gone = [weakref.ref(x), weakref.ref(out)]
    call = one.functions.with_options(_timeout(0.1)).named("late")
    with pytest.raises(CallTimeoutError):
        call(x, 0.8, out=out)
    del x, out
    gc.collect()
    assert [one.shared.free, *(ref() is None for ref in gone)] == [free, False, False]
    until(lambda: one.lanes.busy == 0)
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert one.shared.free == SIZE


def test_memory_is_free_again_after_ordinary_calls(one):
    for _ in range(50):
        one.negate(one.shared.zeros(SIZE // 24), out=one.shared.empty(SIZE // 24))
    assert one.shared.free == SIZE


def _timeout(seconds: float) -> Any:
    from pyenclave.host._options import Options

    return Options(timeout=seconds)
