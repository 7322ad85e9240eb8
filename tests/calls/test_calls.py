"""Calls between two processes: results, errors, hostile frames, and memory."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.errors import (
    ArgumentError,
    CallError,
    EcallError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    UnknownFunctionError,
)

CALL, PING, ATTEST = 1, 2, 3


def add(a: int, b: int = 10) -> int:
    return a + b


def greet(name: str, *, polite: bool = False) -> str:
    return ("Dear " if polite else "Hi ") + name


def twice(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x * 2


def nothing() -> None:
    return None


def echo(data: bytes) -> bytes:
    return data


def fail(text: str) -> int:
    raise LookupError(text)


class ShownError(Exception):
    public = True


def fail_publicly(text: str) -> int:
    raise ShownError(text)


def leave() -> int:
    raise SystemExit(7)


def wrong_result(secret: bytes) -> tuple[bytes, int]:
    return secret, object()  # type: ignore[return-value]


def wrong_scalar(x: int) -> int:
    return str(x)  # type: ignore[return-value]


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def big(size: int) -> bytes:
    return bytes(size)


def poison() -> None:
    raise EnclavePoisonedError("a page's MAC does not hold")


@dataclasses.dataclass
class Row:
    name: str
    value: float


def total(rows: list[Row]) -> Row:
    return Row("sum", sum(row.value for row in rows))


def mix(number: int, part: float, yes: bool, text: str, data: bytes) -> str:
    return repr((number, part, yes, text, data))


def negative(yes: bool) -> bool:
    return not yes


BASIC = (add, greet, twice, nothing, echo, fail, fail_publicly, leave, wrong_result, wrong_scalar,
         sleep, big, total, mix, negative)  # fmt: skip


# ---- results ---------------------------------------------------------------------------------


def test_values_cross_and_defaults_are_the_function_s_own(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    assert one.add(1, 2) == 3
    assert one.add(b=2, a=1) == 3
    assert one.greet("Ada") == "Hi Ada"
    assert one.greet("Ada", polite=True) == "Dear Ada"
    assert one.nothing() is None
    assert one.echo(b"") == b""
    assert one.total([{"name": "a", "value": 1.5}, Row("b", 2.0)]) == {"name": "sum", "value": 3.5}
    assert one.functions.typed(total)([Row("a", 1.0)]) == Row("sum", 1.0)
    assert repr(one.add) == "<trusted function add(a: int, b: int = …) -> int>"


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, True, "text", b"data"),
        (0, float("inf"), False, "", b""),
        (-(2**63), -0.0, True, "ü" * 300, bytes(600)),
        (2**64 - 1, 3, False, "\0", bytearray(b"other")),
        (np.int64(-7), np.float32(0.5), True, "x", memoryview(b"view")),
    ],
)
def test_scalars_text_and_bytes_cross_as_they_are(pair, values):
    one = pair(*BASIC)
    number, part, yes, text, data = values
    assert one.mix(*values) == repr((int(number), float(part), yes, text, bytes(data)))
    assert one.negative(yes) is not yes


@pytest.mark.parametrize(
    ("place", "wrong"), [(0, 1.0), (0, True), (0, 2**64), (1, "1"), (1, True), (2, 1), (3, b""),
                         (3, "\ud800"), (4, "text"), (4, None)]
)  # fmt: skip
def test_what_is_no_such_scalar_is_refused_before_it_is_sent(pair, place, wrong):
    one = pair(*BASIC)
    values = [1, 2.5, True, "text", b"data"]
    values[place] = wrong
    with pytest.raises(ArgumentError, match=("number", "part", "yes", "text", "data")[place]):
        one.mix(*values)
    assert one.negative(True) is False


def test_a_function_is_called_like_any_other(pair):
    one = pair(*BASIC)
    function = one.mix
    assert function.__name__ == "mix"
    assert repr(function) == (
        "<trusted function mix(number: int, part: float, yes: bool, text: str, data: bytes) -> str>"
    )
    expected = "(1, 2.0, True, 'd', b'e')"
    assert function(1, 2.0, True, "d", b"e") == expected
    assert function(1, 2.0, True, data=b"e", text="d") == expected
    rest = {"yes": True, "text": "d", "data": b"e"}
    assert function(*(1, 2.0), **rest) == expected
    assert type(function).__call__(function, 1, 2.0, True, "d", data=b"e") == expected
    for args, names in (
        ((), {}),
        ((1, 2.0, True, "d"), {}),
        ((1, 2.0, True, "d", b"e", 6), {}),
        ((1, 2.0, True, "d", b"e"), {"data": b"e"}),
        ((1, 2.0, True, "d"), {"other": b"e"}),
    ):
        with pytest.raises((TypeError, ArgumentError)):
            function(*args, **names)
    with pytest.raises(AttributeError):
        function.other = 1
    with pytest.raises(TypeError):
        type(function)()
    assert function(1, 2.0, True, "d", b"e") == expected


def test_the_object_of_a_function_keeps_what_it_needs_and_nothing_longer(pair):
    one = pair(*BASIC)
    call, _ = one.functions._host_call("negative")
    before = sys.getrefcount(call)
    function = call.quick()
    assert sys.getrefcount(call) == before + 1
    assert call in gc.get_referents(function)
    assert function(True) is False
    del function
    assert sys.getrefcount(call) == before


def test_messages_of_every_kind_come_right_after_each_other(pair):
    # A worker of one thread looks for the next message before it gives up the GIL.
    one = pair(*BASIC, limit=65_536)
    for number in range(400):
        assert one.negative(number % 2 == 0) is (number % 2 != 0)
        way = number % 7
        if way == 0:
            assert one.twice(np.full(3, float(number))).tolist() == [2.0 * number] * 3
        elif way == 1:
            with pytest.raises(ArgumentError, match="too long"):
                one.echo(bytes(70_000))
        elif way == 2:
            assert one.lanes.raw_call(PING, 0, b"abc") == b"abc"
        elif way == 3:
            assert one.echo(bytes(40_000)) == bytes(40_000)
        elif way == 4:
            with pytest.raises(EcallError, match="LookupError"):
                one.fail("x")
        elif way == 5:
            with pytest.raises(UnknownFunctionError):
                one.lanes.raw_call(CALL, 999, b"")
        else:
            with pytest.raises(EcallError, match="TypeError"):
                one.wrong_scalar(1)
    assert one.alive


@pytest.mark.parametrize("size", [0, 1, 100, 511, 512, 513, 4096, 4097, ring.DEFAULT_SLOT - 8,
                                  ring.DEFAULT_SLOT, ring.DEFAULT_SLOT + 1, 900_001])  # fmt: skip
def test_messages_of_every_size_cross(pair, size):
    one = pair(*BASIC)
    data = os.urandom(size)
    assert one.echo(data) == data
    assert one.lanes.request(PING, data) == data
    values = np.arange(size // 8, dtype="f8")
    assert (one.twice(values) == values * 2).all()


def test_long_messages_cross_unchanged_whichever_way_they_are_stored(pair):
    """Past the caches the second message and the eighteenth at least, of each side."""
    one = pair(*BASIC, limit=1 << 22)
    source = random.Random(7)
    for size in [900_001, 1_048_576, 2_500_000, 131_073] * 6:
        data = source.randbytes(size)
        assert one.echo(data) == data
        assert one.echo(data[:100]) == data[:100]
        for side in ("request", "reply"):
            at = one.header(side) + 32
            rest = one.memory[at + 200 : at + ring.slot_stride() - 32]
            assert rest.count(0) == len(rest), f"{side}: a longer message is left behind this one"


def test_out_takes_the_result(pair):
    one = pair(*BASIC)
    values, out = np.arange(5.0), np.zeros(5)
    assert one.twice(values, out=out) is out
    assert (out == values * 2).all()
    for bad, error in [(np.zeros(4), ArgumentError), (np.zeros(5, "f4"), ArgumentError),
                       ([0.0] * 5, TypeError)]:  # fmt: skip
        with pytest.raises(error):
            one.twice(values, out=bad)
    readonly = np.zeros(5)
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        one.twice(values, out=readonly)
    with pytest.raises(ArgumentError, match="unknown"):
        one.add(1, out=out)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,), (7, 3), (100_000,), (2, 3, 20_000)])
def test_out_is_filled_from_the_ring_or_by_a_copy(pair, shape):
    one = pair(twice, limit=1 << 22)
    values = np.random.default_rng(3).random(shape)
    canary = np.full(values.size + 16, 5.5)
    inside = canary[8 : 8 + values.size].reshape(shape)
    strided = np.zeros((*shape, 2))[..., 0]
    for out in (inside, strided, np.asfortranarray(np.zeros(shape))):
        assert one.twice(values, out=out) is out
        assert (out == values * 2).all()
    assert (canary[:8] == 5.5).all()
    assert (canary[-8:] == 5.5).all()
    copy = values.copy()
    assert one.twice(copy, out=copy) is copy
    assert (copy == values * 2).all()


def test_out_of_the_same_size_and_another_shape_is_refused_and_zeroed(pair):
    one = pair(twice)
    values = np.arange(1.0, 7).reshape(2, 3)
    for out in (np.ones((3, 2)), np.ones((1, 6)), np.ones((2, 3), "i8")):
        with pytest.raises(ArgumentError):
            one.twice(values, out=out)
        assert (out == 0).all() or (out == 1).all()
    assert (one.twice(values, out=np.ones((2, 3))) == values * 2).all()


# ---- errors ----------------------------------------------------------------------------------


def test_wrong_arguments_are_typed_errors_and_the_worker_lives(pair):
    one = pair(*BASIC)
    for arguments, keywords in [(("1",), {}), ((), {}), ((1, 2, 3), {}), ((1,), {"c": 1}),
                                ((2**64,), {}), ((True,), {})]:  # fmt: skip
        with pytest.raises(ArgumentError):
            one.add(*arguments, **keywords)
    with pytest.raises(ArgumentError):
        one.total([{"name": 1, "value": 2.0}])  # found inside
    with pytest.raises(UnknownFunctionError, match="It has: add"):
        one.functions.named("nope")
    assert one.add(1) == 11


def test_an_exception_crosses_as_type_and_id_without_its_text(pair):
    one = pair(*BASIC)
    with pytest.raises(EcallError) as caught:
        one.fail("SECRET")
    assert caught.value.type == "LookupError"
    assert len(caught.value.id) == 16
    assert "SECRET" not in str(caught.value)
    with pytest.raises(EcallError, match="the balance is too low"):
        one.fail_publicly("the balance is too low")
    with pytest.raises(EcallError) as caught:
        one.leave()
    assert caught.value.type == "SystemExit"
    assert one.add(1) == 11


def test_in_debug_the_text_crosses_and_the_traceback_is_printed_with_the_id(pair, capfd):
    one = pair(*BASIC, debug=True)
    with pytest.raises(EcallError, match="SECRET") as caught:
        one.fail("SECRET")
    err = capfd.readouterr().err
    assert caught.value.id in err
    assert "LookupError: SECRET" in err


def test_BND_18_a_result_that_does_not_fit_leaves_nothing_of_it(pair):
    one = pair(*BASIC)
    secret = b"planted-secret-" * 4
    one.wrong_scalar  # noqa: B018
    with pytest.raises(EcallError) as caught:
        one.wrong_result(secret)
    assert caught.value.type == "TypeError"
    reply = one.header("reply")
    assert b"planted" not in one.memory[reply : reply + ring.slot_stride()]
    with pytest.raises(EcallError):
        one.wrong_scalar(5)
    out = np.full(3, 7.0)
    with pytest.raises(ArgumentError):
        one.twice(np.zeros(3, "f4"), out=out)
    assert (out == 7.0).all()
    assert one.add(1) == 11  # no lane is held


def test_SER_02_messages_beyond_the_limit_are_refused_on_both_ways(pair):
    one = pair(*BASIC, limit=200_000)
    with pytest.raises(ArgumentError, match=r"enclave\.toml"):
        one.echo(bytes(200_001))
    with pytest.raises(EcallError):
        one.big(200_001)
    assert one.add(1) == 11
    assert one.big(199_000) == bytes(199_000)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc0", b"junk", b"\x91" * 2000, bytes(100_000),
     msgspec.msgpack.encode(["call.ecall", "m", "t"]),
     msgspec.msgpack.encode(["no.such", "m", "t", "i", None]),
     msgspec.msgpack.encode(["state.poisoned", "m", "t", "i", None]),
     b"\x95\xa1\xb9\xa0\xa0\xa0\xc0",  # a code that is not UTF-8
     msgspec.msgpack.encode([1, 2, 3, 4, 5])],
)  # fmt: skip
def test_an_error_frame_is_untrusted_and_gives_a_call_error_only(data):
    assert isinstance(call_errors.from_frame(data), CallError)


def test_error_frames_are_capped_and_text_that_cannot_be_shown_is_empty():
    class OddError(Exception):
        public = True

        def __str__(self) -> str:
            raise RuntimeError

    frame = call_errors.to_frame(OddError(), called=True, show=False, correlation="ab")
    assert call_errors.from_frame(frame).type == "OddError"
    frame = call_errors.to_frame(
        ArgumentError("x" * 100_000), called=False, show=False, correlation=""
    )
    assert len(frame) < 5000
    lone = call_errors.to_frame(ValueError("\ud800"), called=True, show=True, correlation="")
    assert isinstance(call_errors.from_frame(lone), EcallError)


# ---- hostile frames --------------------------------------------------------------------------


def test_BND_08_every_index_beyond_the_table_is_a_typed_error(pair):
    one = pair(nothing)
    for index in range(1, 65536):
        with pytest.raises(UnknownFunctionError):
            one.lanes.raw_call(CALL, index, b"")
    assert one.lanes.raw_call(CALL, 0, b"") == b""
    assert one.alive


def test_malformed_payloads_are_typed_errors(pair):
    one = pair(*BASIC)
    rng = np.random.default_rng(5)
    for index in range(len(BASIC)):
        if one.signatures[index].name in ("echo", "sleep", "big"):
            continue
        for size in (0, 1, 7, 8, 9, 17, 64, 300):
            try:
                one.lanes.raw_call(CALL, index, rng.bytes(size))
            except CallError:
                continue
    negative_of = next(i for i, item in enumerate(one.signatures) if item.name == "negative")
    assert one.lanes.raw_call(CALL, negative_of, b"\x01") == b"\x00"
    for wrong in (b"", b"\x02", b"\x01\x00", b"\xff" * 9):
        with pytest.raises(ArgumentError, match="malformed frame"):
            one.lanes.raw_call(CALL, negative_of, wrong)
    for nonce in (bytes(1025), bytes(300_000)):
        with pytest.raises(ArgumentError, match="nonce"):
            one.lanes.raw_call(ATTEST, 0, nonce)
    assert one.add(1) == 11


def test_a_broken_sequence_poisons_the_worker_with_its_reason(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    at = one.header("request")
    one.memory[at : at + 4] = b"\x77\x77\x77\x77"
    code, words = one.ended()
    assert code == 3
    assert "sequence" in words


def test_BND_06_a_broken_reply_poisons_the_handle(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    asked, at = one.header("request"), one.header("reply")
    os.kill(one.pid, signal.SIGSTOP)

    def lie() -> None:
        # What a compromised worker could write: the right sequence, a length beyond the slot.
        while one.memory[asked : asked + 4] != (2).to_bytes(4, "little"):
            time.sleep(0.001)
        one.memory[at + 8 : at + 12] = (ring.DEFAULT_SLOT + 1).to_bytes(4, "little")
        one.memory[at : at + 4] = (2).to_bytes(4, "little")

    liar = threading.Thread(target=lie)
    liar.start()
    with pytest.raises(EnclavePoisonedError, match="length"):
        one.add(1)
    liar.join()
    one.kill()


def test_BND_06_an_answer_before_its_call_poisons_the_handle(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    at = one.header("reply")
    one.memory[at : at + 4] = (2).to_bytes(4, "little")
    with pytest.raises(EnclavePoisonedError, match="sequence"):
        one.add(1)


def test_trusted_code_that_finds_a_broken_mac_poisons(pair):
    one = pair(poison, add)
    with pytest.raises(EnclaveLostError):
        one.poison()
    assert one.ended() == (3, "a page's MAC does not hold")


# ---- memory ----------------------------------------------------------------------------------


def test_BND_19_anything_but_a_size_fixed_memory_of_the_right_size_is_refused(tmp_path):
    import fcntl

    size = ring.layout(1)
    seal = fcntl.F_ADD_SEALS
    grow, shrink, last = fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL

    def memory(seals: int | None, length: int = size) -> int:
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, length)
        if seals is not None:
            fcntl.fcntl(fd, seal, seals)
        return fd

    (tmp_path / "plain").write_bytes(bytes(size))
    reader, writer = os.pipe()
    bad = [
        os.open(tmp_path / "plain", os.O_RDWR), os.open(tmp_path, os.O_RDONLY), reader, writer,
        os.open("/dev/zero", os.O_RDWR), memory(None), memory(grow), memory(shrink),
        memory(grow | shrink), memory(grow | last), memory(shrink | last),
        memory(grow | shrink | last | fcntl.F_SEAL_WRITE), memory(grow | shrink | last, size - 1),
        memory(grow | shrink | last, size + 4096), memory(grow | shrink | last, 0),
        os.memfd_create("x"),
    ]  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    for fd in bad:
        with pytest.raises(EnclaveStateError):
            ring.map_ring(fd, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in bad:
        os.close(fd)
    fd = ring.create(1)
    ring.map_ring(fd, 1).close()
    with pytest.raises(EnclaveStateError, match="size"):
        ring.map_ring(fd, 2)
    os.close(fd)


def test_BND_20_the_peer_cannot_shrink_and_punching_is_no_fault(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    for length in (0, 4096, ring.layout(1) + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(one.ring_fd, length)
    stop = threading.Event()

    def punch() -> None:
        import ctypes

        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        while not stop.is_set():
            assert fallocate(one.ring_fd, 3, 0, ring.layout(1)) == 0  # punch, keep size
            time.sleep(0.001)

    thread = threading.Thread(target=punch)
    thread.start()
    try:
        for _ in range(2000):
            try:
                one.add(1)
            except (CallError, EnclaveStateError):
                if not one.alive:
                    break
    finally:
        stop.set()
        thread.join()
    if not one.alive:
        assert one.ended()[0] == 3  # poisoned, not SIGBUS or SIGSEGV


def test_BND_16_no_address_of_the_worker_reaches_the_ring(pair):
    one = pair(*BASIC)
    ranges = []
    for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines():
        low, _, high = line.split()[0].partition("-")
        ranges.append((int(low, 16), int(high, 16)))
    acts = [
        lambda: one.add(1),
        lambda: one.fail("x"),
        lambda: one.wrong_scalar(1),
        lambda: one.big(5000),
        lambda: one.twice(np.zeros(100)),
        lambda: one.total([]),
        lambda: one.lanes.raw_call(CALL, 99, b""),
        lambda: one.lanes.raw_call(CALL, 0, b"junk"),
        lambda: one.lanes.raw_call(ATTEST, 0, b"n"),
        lambda: one.echo(b"\1" * 70000),
    ]
    for act in acts:
        said = ""
        try:
            act()
        except CallError as error:
            said = str(error)
        assert "0x" not in said
        words = np.frombuffer(one.memory[:], dtype="<u8")
        words = words[words > 2**44]  # below it there is at most a sanitizer's shadow
        for low, high in ranges:
            assert not ((words >= low) & (words < high)).any()
