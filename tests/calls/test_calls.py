"""Calls between two processes: results, errors, giving up, and ends."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

import pyenclave
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallError,
    CallTimeoutError,
    EcallError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclavePoisonedError,
    EnclaveStateError,
    UnknownFunctionError,
)
from pyenclave.host._options import Options

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


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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
    assert b"planted" not in one.memory[reply : reply + 32 + ring.DEFAULT_SLOT]
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


# ---- native ----------------------------------------------------------------------------------

SOURCE = r"""
#include <pyenclave_trusted.h>
#include <string.h>
PYE_ECALL(plus)
{
    for (size_t i = 0; i < in_len; i++) out[i] = (uint8_t)(in[i] + 1);
    *out_len = in_len;
    return PYE_ECALL_OK;
}
PYE_ECALL(lies)   /* says more than it wrote */
{
    (void)in; (void)in_len;
    memcpy(out, "12345678", 8);
    *out_len = 64;
    return PYE_ECALL_OK;
}
PYE_ECALL(beyond)
{
    (void)in; (void)in_len; (void)out;
    *out_len += 1;
    return PYE_ECALL_OK;
}
PYE_ECALL(refuses)
{
    (void)in; (void)out; (void)out_len;
    memset(out, 0x53, 64);
    return in_len ? 1042 : PYE_ECALL_ARGUMENT;
}
PYE_ECALL(half)
{
    double x[64];
    if (in_len > sizeof(x)) return PYE_ECALL_TOO_LONG;
    memcpy(x, in, in_len);
    for (size_t i = 0; i < in_len / 8; i++) x[i] /= 2;
    memcpy(out, x, in_len);
    *out_len = in_len;
    return PYE_ECALL_OK;
}
"""
NATIVE = {"plus": "", "lies": "", "beyond": "", "refuses": "", "half": "f8 -> f8"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    (folder / "lib.c").write_text(SOURCE)
    warn = ["-Wall", "-Wextra", "-Werror", "-Wpedantic"]
    include = ["-I", pyenclave.get_include()]
    files = ["-o", folder / "lib.so", folder / "lib.c"]
    command = ["gcc", "-std=c11", "-O2", *warn, "-shared", "-fPIC", *include, *files]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return str(folder / "lib.so")


def test_native_functions_get_bytes_and_arrays(pair, library):
    one = pair(library=library, native=NATIVE)
    assert one.plus(b"abc") == b"bcd"
    assert one.plus(bytearray(b"")) == b""
    assert one.plus(np.zeros(3, "u1")) == b"\1\1\1"
    data = os.urandom(300_000)
    assert one.plus(data) == bytes((np.frombuffer(data, "u1") + 1).astype("u1"))
    assert one.half(np.array([2.0, 4.0])).tolist() == [1.0, 2.0]
    for bad in (np.zeros(2, "f4"), [1.0], b"12345678"):
        with pytest.raises(ArgumentError):
            one.half(bad)
    for bad in ("text", 5, None, np.arange(8)[::2]):
        with pytest.raises(ArgumentError):
            one.plus(bad)
    with pytest.raises(ArgumentError, match="length"):
        one.half(np.zeros(65))


def test_BND_07_a_native_function_that_lies_gives_out_nothing_old(pair, library):
    one = pair(library=library, native=NATIVE)
    one.plus(b"\x52" * 4096)  # its answer, all 0x53, was in the buffer before
    assert one.lies(b"") == b"12345678" + bytes(56)
    with pytest.raises(EcallError, match="1042"):
        one.refuses(b"x")  # it wrote 64 bytes before it failed
    assert one.lies(b"") == b"12345678" + bytes(56)
    with pytest.raises(ArgumentError, match="refuses its input"):
        one.refuses(b"")
    with pytest.raises(ArgumentError, match="length"):
        one.beyond(b"")
    assert one.alive


@pytest.mark.parametrize("limit", [None, 1 << 22])
def test_BND_07_what_a_refusing_native_function_wrote_is_in_no_later_answer(pair, library, limit):
    one = pair(library=library, native=NATIVE, **({"limit": limit} if limit else {}))
    for data in (b"x", b""):
        with pytest.raises((EcallError, ArgumentError)):
            one.refuses(data)  # it filled its buffer with 0x53 first
        assert one.lies(b"") == b"12345678" + bytes(56)


# ---- giving up -------------------------------------------------------------------------------


def test_a_deadline_passes_and_the_lane_is_free_when_the_call_returns(pair, gate, until):
    one = pair(*BASIC, gate.held)
    quick = one.functions.with_options(Options(timeout=0.1))
    start = time.monotonic()
    with pytest.raises(CallTimeoutError):
        quick.named("held")()
    assert time.monotonic() - start > 0.09
    assert one.lanes.busy == 1
    with pytest.raises(CallTimeoutError, match="before"):
        quick.named("add")(1)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(one.add(1)))
    thread.start()
    until(lambda: one.lanes.queued == 1)  # it waits for the lane
    assert found == []
    gate.open()
    thread.join()
    assert found == [11]
    assert one.lanes.busy == 0


def test_a_large_call_given_up_is_aborted_and_the_lane_recovers(pair, until):
    one = pair(*BASIC, limit=1 << 28)
    data = bytes(100 << 20)
    for _ in range(3):
        with pytest.raises(CallTimeoutError):
            one.functions.with_options(Options(timeout=0.005)).named("echo")(data)
        assert one.add(1) == 11


def test_an_interrupt_ends_the_wait(pair, gate, until):
    one = pair(*BASIC, gate.held)

    def interrupt() -> None:
        until(gate.reached)
        time.sleep(0.1)  # most often the caller waits in the kernel by now
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        one.held()  # which would not return
    thread.join()
    gate.open()
    assert one.add(1) == 11


def test_more_calls_than_may_wait_are_refused(pair, gate, until):
    one = pair(*BASIC, gate.held, queue=2)
    results: list[object] = []

    def call() -> None:
        try:
            results.append(one.held())
        except BusyError as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) == 3)
    assert results == ["BusyError"] * 3
    gate.open()
    for thread in threads:
        thread.join()
    assert results[3:] == [7] * 3


def test_lanes_serve_at_the_same_time(pair):
    here = mmap.mmap(-1, 4)  # shared with the worker

    def meet(place: int) -> bool:
        """Whether all four calls run."""
        here[place] = 1
        end = time.monotonic() + 30
        while here[:] != b"\1\1\1\1" and time.monotonic() < end:
            time.sleep(0.002)
        return here[:] == b"\1\1\1\1"

    one = pair(meet, lanes=4)
    met: list[bool] = []
    threads = [
        threading.Thread(target=lambda place=place: met.append(one.meet(place)))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [True] * 4


def test_many_threads_get_their_own_answers(pair):
    one = pair(*BASIC, lanes=2)
    wrong: list[object] = []

    def call(seed: int) -> None:
        for i in range(300):
            if one.add(seed, i) != seed + i:
                wrong.append((seed, i))

    threads = [threading.Thread(target=call, args=(seed * 1000,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_BND_22_code_that_runs_while_encoding_may_itself_call(pair):
    one = pair(*BASIC)

    class Calls:
        def __index__(self) -> int:
            return one.add(1)

    assert one.add(Calls()) == 21


# ---- ends ------------------------------------------------------------------------------------


def test_a_worker_killed_in_a_call_is_lost(pair, gate, until):
    one = pair(*BASIC, gate.held)

    def kill() -> None:
        until(gate.reached)
        one.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EnclaveLostError) as caught:
        one.held()  # which would not return
    thread.join()
    assert caught.value.started is True


def test_a_worker_that_kills_itself_is_lost(pair):
    one = pair(die, add)
    with pytest.raises(EnclaveLostError):
        one.die()


def test_closing_ends_waiting_calls(pair, gate, until):
    one = pair(*BASIC, gate.held)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            one.held()
        except EnclaveClosedError as error:
            caught.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: one.lanes.busy == 1 and one.lanes.queued == 2)
    one.lanes.close()
    for thread in threads:
        thread.join()
    assert len(caught) == 3
    with pytest.raises(EnclaveClosedError):
        one.add(1)


def test_a_forked_child_refuses_and_the_parent_goes_on(pair):
    one = pair(*BASIC)
    assert one.add(1) == 11
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = b"?"
        try:
            one.add(1)
        except EnclaveStateError as error:
            text = str(error).encode()
        finally:
            os.write(writer, text)
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"forked child" in os.read(reader, 1000)
    assert one.add(2) == 12
    os.close(reader)
    os.close(writer)


def test_SER_10_the_ring_stays_mapped_while_lanes_live(pair):
    one = pair(*BASIC)
    with pytest.raises(BufferError):
        one.memory.close()
    assert one.add(1) == 11


def test_nothing_of_a_call_can_be_pickled(pair):
    import copy
    import pickle

    one = pair(*BASIC)
    for thing in (one.lanes, one.functions.named("add")):
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                way(thing)
