"""
A hostile host, and a hostile worker, while calls go on: ocalls, nested calls, streams.

The hostile side is this file: it writes frames into the ring byte by byte, whatever its turn. What
is out of turn poisons the worker; content that is wrong is a typed error inside, and it lives.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from pyenclave import _core, trusted
from pyenclave.calls import errors as call_errors
from pyenclave.calls import ring
from pyenclave.calls.ocalls import Ocall
from pyenclave.calls.signature import Signature
from pyenclave.errors import CallError, EnclaveError, EnclavePoisonedError, EnclaveStateError
from pyenclave.host import _ocalls
from pyenclave.host.handle import Functions, Options

CALL, PING, ATTEST, NEXT, ABORT, BATCH = 1, 2, 3, 4, 5, 6
OCALL_RESULT, OCALL_ERROR, MORE, STOP = 7, 8, 9, 10
RESULT, ERROR, ACK, OCALL, ITEM = 129, 130, 131, 132, 133
HEADER = struct.Struct("<IHHIIQQ")
LIMIT = 1 << 20


@trusted.ocall(allow=["add", "ask"])
def fetch(key: str) -> list[int]:
    raise AssertionError


def ask(key: str) -> str:
    try:
        return str(fetch(key))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def add(a: int, b: int) -> int:
    return a + b


def count(number: int) -> Iterator[int]:
    yield from range(number)


def hidden(x: int) -> int:
    return x


hidden.__pyenclave_private__ = True  # type: ignore[attr-defined]
# By name, as in the image.
ADD, ASK, COUNT, HIDDEN = range(4)


class RawHost:
    """A host that writes what it likes."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair
        self.memory = pair.memory
        self.sequence = 0
        self.request, self.reply = pair.header("request"), pair.header("reply")

    def put(self, kind: int, index: int = 0, payload: bytes = b"", **fields: int) -> None:
        self.sequence += 1
        header = {
            "sequence": self.sequence, "kind": kind, "index": index, "length": len(payload),
            "lane": 0, "total": len(payload), "offset": 0,
        }  # fmt: skip
        header.update(fields)
        at = self.request
        self.memory[at + 32 : at + 32 + len(payload)] = payload
        data = HEADER.pack(*header.values())
        self.memory[at + 4 : at + 32] = data[4:]
        self.memory[at : at + 4] = data[:4]
        _core.futex_wake(self.memory, at)

    def get(self, seconds: float = 20.0) -> tuple[int, bytes]:
        """Wait for the reply; return its kind and payload."""
        end = time.monotonic() + seconds
        while True:
            header = HEADER.unpack(self.memory[self.reply : self.reply + 32])
            if header[0] == self.sequence:
                start = self.reply + 32
                return header[1], self.memory[start : start + header[3]]
            assert time.monotonic() < end, "no reply"
            assert self.pair.alive, self.pair.ended()
            time.sleep(0.001)

    def ask(self, kind: int, index: int = 0, payload: bytes = b"", **fields: int):
        self.put(kind, index, payload, **fields)
        return self.get()

    def poisons(self) -> str:
        """The worker ended itself and said why."""
        code, words = self.pair.ended()
        assert code == 3, (code, words)
        return words


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def integers(*values: int) -> bytes:
    return b"".join(b"\0" + struct.pack("<q", value) for value in values)


def packed(value: object) -> bytes:
    data = msgspec.msgpack.encode(value)
    return struct.pack("<Q", len(data)) + data


def said(reply: tuple[int, bytes]) -> str:
    """The string that a RESULT of ``ask`` holds."""
    assert reply[0] == RESULT, reply
    (length,) = struct.unpack_from("<Q", reply[1])
    assert len(reply[1]) == 8 + length
    return reply[1][8:].decode()


@pytest.fixture
def host(pair):
    return RawHost(
        pair(add, ask, count, hidden, stubs=(fetch,), handlers={"fetch": len}, limit=LIMIT)
    )


def until_ocall(host: RawHost) -> None:
    assert host.ask(CALL, ASK, text("k")) == (OCALL, text("k"))


def until_item(host: RawHost) -> None:
    assert host.ask(CALL, COUNT, integers(5)) == (ITEM, integers(0))


# ---- out of turn: the worker is poisoned -------------------------------------------------------


@pytest.mark.parametrize("kind", [OCALL_RESULT, OCALL_ERROR, MORE, STOP, NEXT, ABORT])
@pytest.mark.parametrize("before", [0, 1])
def test_what_answers_nothing_poisons_the_worker(host, kind, before):
    for _ in range(before):
        assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))
    host.put(kind, 0, b"" if kind != OCALL_RESULT else packed([1]))
    assert "turn" in host.poisons()


@pytest.mark.parametrize(
    "kind", [PING, ATTEST, BATCH, MORE, STOP, NEXT, ABORT, RESULT, OCALL, ITEM, 0, 11, 65535]
)
def test_what_does_not_answer_an_ocall_poisons_the_worker(host, kind):
    until_ocall(host)
    host.put(kind)
    assert "protocol" in host.poisons()


@pytest.mark.parametrize(
    "kind", [CALL, PING, ATTEST, BATCH, OCALL_RESULT, OCALL_ERROR, NEXT, ABORT, RESULT, OCALL, 99]
)
def test_what_does_not_ask_for_an_item_poisons_the_worker(host, kind):
    until_item(host)
    host.put(kind, ADD, integers(1, 2))
    assert "protocol" in host.poisons()


@pytest.mark.parametrize("kind", [MORE, STOP])
@pytest.mark.parametrize("fields", [{"payload": b"x"}, {"index": COUNT}])
def test_asking_for_an_item_with_content_poisons_the_worker(host, kind, fields):
    until_item(host)
    host.put(kind, **fields)
    assert "control" in host.poisons()


def test_an_ocall_answered_twice_poisons_the_worker(host):
    until_ocall(host)
    assert said(host.ask(OCALL_RESULT, 0, packed([1]))) == "[1]"
    host.put(OCALL_RESULT, 0, packed([2]))
    assert "turn" in host.poisons()


def test_an_answer_that_comes_before_it_is_asked_for_poisons_the_worker(host):
    """The second answer lies in the slot while the function runs; it is seen as out of turn."""
    until_ocall(host)
    host.put(OCALL_RESULT, 0, packed([1]))
    host.put(OCALL_RESULT, 0, packed([2]))
    assert "protocol" in host.poisons()


def test_a_stream_asked_on_after_its_end_poisons_the_worker(host):
    assert host.ask(CALL, COUNT, integers(1)) == (ITEM, integers(0))
    assert host.ask(MORE) == (RESULT, b"")
    host.put(MORE)
    assert "turn" in host.poisons()


def test_trusted_code_cannot_go_on_after_the_protocol_broke(pair):
    """It catches everything, and would answer; the lane is broken, so nothing crosses."""
    host = RawHost(
        pair(add, ask, count, hidden, stubs=(fetch,), handlers={"fetch": len}, limit=LIMIT)
    )
    until_ocall(host)
    before = host.memory[host.reply : host.reply + 64]
    host.put(MORE)
    host.poisons()
    assert host.memory[host.reply : host.reply + 64] == before


# ---- content: a typed error inside, and the enclave lives --------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\0", b"\xff" * 8, packed("text"), packed([1, "two"]), packed([1.5]), packed(None),
        packed([1]) + b"x", packed([1])[:-1], struct.pack("<Q", 2**63) + b"\x91\x01",
        struct.pack("<Q", 40) + b"\x91" * 40, struct.pack("<Q", 5) + b"\xdd\xff\xff\xff\xff",
        packed([2**64 - 1] * 3)[:20], os.urandom(1000),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_an_error_inside(host, payload):
    until_ocall(host)
    answer = said(host.ask(OCALL_RESULT, 0, payload))
    assert answer.startswith("OcallError: what the host function fetch returned does not fit")
    assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))


def test_an_answer_beyond_the_limit_is_an_error_inside(host):
    for total in (LIMIT + 1, 2**40, 2**64 - 1):
        until_ocall(host)
        filler = bytes(ring.DEFAULT_SLOT // 2)
        answer = said(host.ask(OCALL_RESULT, 0, filler, total=total))
        assert answer.startswith("OcallError: what the host function fetch returned is too long")
    assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", "OcallError: the host gave up the call of fetch"),
        (b"KeyError", "OcallError: the host function fetch raised KeyError"),
        ("Schlüssel".encode(), "OcallError: the host function fetch raised Schlüssel"),
        (b"no name; at all", "OcallError: the host function fetch failed"),
        (b"\xff\xfe", "OcallError: the host function fetch failed"),
        (b"\x1b[2J", "OcallError: the host function fetch failed"),
        (b"A" * 129, "OcallError: the host function fetch failed"),
        (b"A" * 100_000, "OcallError: the host function fetch failed"),
    ],
)
def test_what_the_host_says_of_a_failure_is_a_name_or_nothing(host, payload, expected):
    until_ocall(host)
    assert said(host.ask(OCALL_ERROR, 0, payload)) == expected
    assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))


def test_a_dropped_answer_is_followed_by_another(host):
    """The host begins a long answer, drops it, and says something else."""
    until_ocall(host)
    half = bytes(ring.DEFAULT_SLOT // 2)
    assert host.ask(OCALL_RESULT, 0, half, total=4 * len(half)) == (ACK, b"")
    assert host.ask(ABORT) == (ACK, b"")
    assert said(host.ask(OCALL_RESULT, 0, packed([7]))) == "[7]"


@pytest.mark.parametrize("index", [COUNT, HIDDEN, 4, 5, 255, 65535])
def test_BND_09_a_nested_call_of_what_is_not_allowed_is_refused(host, index):
    until_ocall(host)
    kind, payload = host.ask(CALL, index, integers(1))
    assert kind == ERROR
    error = call_errors.from_frame(payload)
    assert isinstance(error, CallError)
    assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))  # nested, and allowed
    assert said(host.ask(OCALL_RESULT, 0, packed([1]))) == "[1]"


def test_BND_09_a_private_function_is_refused_at_the_top(host):
    kind, payload = host.ask(CALL, HIDDEN, integers(1))
    assert (kind, type(call_errors.from_frame(payload))) == (ERROR, CallError)


def test_BND_10_nesting_is_capped_inside(host):
    for _ in range(8):
        until_ocall(host)
    kind, payload = host.ask(CALL, ASK, text("ninth"))
    assert kind == ERROR
    assert "nested too deep" in str(call_errors.from_frame(payload))
    for depth in range(8):
        assert said(host.ask(OCALL_RESULT, 0, packed([depth]))) == f"[{depth}]"
    assert host.ask(CALL, ADD, integers(1, 2)) == (RESULT, integers(3))


def test_a_nested_call_that_is_too_long_is_refused_and_the_ocall_still_waits(host):
    until_ocall(host)
    kind, payload = host.ask(CALL, ADD, bytes(ring.DEFAULT_SLOT // 2), total=LIMIT + 1)
    assert kind == ERROR
    assert "too long" in str(call_errors.from_frame(payload))
    assert said(host.ask(OCALL_RESULT, 0, packed([1]))) == "[1]"


# ---- a hostile worker --------------------------------------------------------------------------


class RawWorker:
    """A worker that answers with whatever a script says, and the host's real lanes."""

    def __init__(self, *script: tuple[Any, ...]) -> None:
        self.fd = ring.create(1)
        self.memory = ring.map_ring(self.fd, 1)
        side = ring.slot_stride()
        self.request, self.reply = 4096 + 256, 4096 + 256 + side
        self.script = script
        self.seen: list[tuple[int, bytes]] = []
        self.stop = False
        token = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.lanes = _core.HostLanes(
            self.memory, token, 1, ring.DEFAULT_SLOT, LIMIT, lambda: None,
            lambda check: EnclavePoisonedError("host: " + check), call_errors.from_frame,
            threading.Condition(), 8,
        )  # fmt: skip
        declared = (Ocall.of(fetch),)
        self.lanes.set_ocalls(
            _ocalls.make_table(declared, {"fetch": lambda key: [len(key)]}, LIMIT), _ocalls.submit
        )
        for function in (add, count):
            function.__pyenclave_ecall__ = True  # type: ignore[attr-defined]
        self.functions = Functions(tuple(map(Signature.of, (add, count))), self.lanes)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        last = 0
        for kind, index, payload, fields in self.script:
            while True:
                header = HEADER.unpack(self.memory[self.request : self.request + 32])
                if header[0] != last:
                    break
                if self.stop:
                    return
                time.sleep(0.001)
            last = header[0]
            start = self.request + 32
            self.seen.append((header[1], self.memory[start : start + header[3]]))
            values = {
                "sequence": last, "kind": kind, "index": index, "length": len(payload), "lane": 0,
                "total": len(payload), "offset": 0,
            }  # fmt: skip
            values.update(fields)
            data = HEADER.pack(*values.values())
            at = self.reply
            self.memory[at + 32 : at + 32 + len(payload)] = payload
            self.memory[at + 4 : at + 32] = data[4:]
            self.memory[at : at + 4] = data[:4]
            _core.futex_wake(self.memory, at)

    def close(self) -> None:
        self.stop = True
        self.thread.join()
        os.close(self.fd)


def frame(kind: int, index: int = 0, payload: bytes = b"", **fields: int) -> tuple[Any, ...]:
    return kind, index, payload, fields


@pytest.fixture
def scripted():
    made: list[RawWorker] = []

    def make(*script: tuple[Any, ...]) -> RawWorker:
        made.append(RawWorker(*script))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("script", "check"),
    [
        ([frame(OCALL, 1, text("k"))], "ocall"),
        ([frame(OCALL, 65535, text("k"))], "ocall"),
        ([frame(ITEM, 0, integers(1))], "turn"),
        ([frame(OCALL, 0, text("k")), frame(ITEM, 0, integers(1))], "turn"),
        ([frame(OCALL, 0, text("k")), frame(ACK)], "turn"),
        ([frame(OCALL, 0, text("k")), frame(CALL)], "kind"),
        ([frame(OCALL, 0, bytes(ring.DEFAULT_SLOT // 2), total=LIMIT + 1)], "total"),
    ],
)
def test_a_worker_that_answers_a_call_out_of_turn_poisons_the_handle(scripted, script, check):
    one = scripted(*script)
    with pytest.raises(EnclavePoisonedError, match=check):
        one.functions.named("add")(1, 2)


@pytest.mark.parametrize("kind", [OCALL, ITEM])
def test_a_worker_cannot_call_the_host_for_a_control_frame(scripted, kind):
    one = scripted(frame(kind, 0, text("k")))
    with pytest.raises(EnclavePoisonedError, match="turn"):
        one.lanes.request(PING, b"x")


def test_arguments_of_an_ocall_that_do_not_fit_never_reach_the_handler(scripted):
    for payload in (b"", text("k")[:-1], text("k") + b"x", b"\xff" * 20):
        one = scripted(frame(OCALL, 0, payload), frame(RESULT, 0, integers(7)))
        assert one.functions.named("add")(1, 2) == 7
        assert one.seen[1] == (OCALL_ERROR, b"ArgumentError")


def test_a_stream_s_end_must_be_empty(scripted):
    one = scripted(frame(ITEM, 0, integers(1)), frame(RESULT, 0, b"more"))
    stream = one.functions.named("count")(5)
    assert next(stream) == 1
    with pytest.raises(EnclavePoisonedError, match="stream"):
        next(stream)


def test_an_item_after_the_stop_poisons_the_handle(scripted):
    one = scripted(frame(ITEM, 0, integers(1)), frame(ITEM, 0, integers(2)))
    stream = one.functions.named("count")(5)
    assert next(stream) == 1
    with pytest.raises(EnclavePoisonedError, match="stream"):
        stream.close()
    assert one.seen[1] == (STOP, b"")


def test_an_item_that_does_not_fit_ends_the_stream(scripted, until):
    one = scripted(
        frame(ITEM, 0, integers(1)), frame(ITEM, 0, b"nonsense"), frame(RESULT), frame(RESULT)
    )
    stream = one.functions.named("count")(5)
    assert next(stream) == 1
    with pytest.raises(CallError, match="does not fit"):
        next(stream)
    until(lambda: one.lanes.busy == 0)
    assert one.seen[2] == (STOP, b"")


# ---- a flipper during ocalls -------------------------------------------------------------------


def flip_words(memory: Any, base: int, reply: int, seed: int) -> None:
    """Change words of headers and payloads for ever."""
    import random

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rng = random.Random(seed)
    places = [base + 256 + n for n in range(0, 64, 4)] + [reply + n for n in range(0, 64, 4)]
    values = [0, 1, 2, OCALL, OCALL_RESULT, OCALL_ERROR, MORE, STOP, ITEM, 0xFFFF, 2**31, 2**32 - 1]
    while True:
        at = rng.choice(places)
        old = memory[at : at + 4]
        memory[at : at + 4] = struct.pack("<I", rng.choice(values))
        if rng.random() < 0.7:
            memory[at : at + 4] = old
        for _ in range(rng.randrange(1500)):
            pass


@pytest.mark.timeout(60)
def test_BND_03_a_flipper_during_ocalls_and_streams_never_makes_either_side_crash(pair):
    end = time.monotonic() + 4.0
    seen = {"right": 0, "wrong": 0, "refused": 0, "state": 0, "poisoned": 0, "workers": 0}

    def goes_on() -> bool:
        """Longer on a machine with much else to do."""
        now = time.monotonic()
        return now < end or (seen["right"] <= 5 and now < end + 20)

    while goes_on():
        one = pair(
            add, ask, count, hidden, stubs=(fetch,), limit=LIMIT,
            handlers={"fetch": len},
        )  # fmt: skip
        functions = one.functions
        one.lanes.set_ocalls(
            _ocalls.make_table(
                (Ocall.of(fetch),),
                {"fetch": lambda key, f=functions: [f.named("add")(1, len(key))]},
                LIMIT,
            ),
            _ocalls.submit,
        )
        quick = functions.with_options(Options(timeout=0.3))
        seen["workers"] += 1
        flipper = os.fork()
        if flipper == 0:
            try:
                flip_words(one.memory, 4096, one.header("reply"), seen["workers"])
            finally:
                os._exit(0)
        try:
            calls = 0
            while one.alive and goes_on():
                calls += 1
                try:
                    if calls % 2:
                        good = quick.named("ask")("abc") == "[4]"
                    else:
                        good = list(quick.named("count")(3)) == [0, 1, 2]
                    seen["right" if good else "wrong"] += 1
                except CallError:
                    seen["refused"] += 1
                    if one.lanes.busy:
                        break
                except EnclaveStateError:
                    seen["state"] += 1
                    break
        except EnclaveError:
            seen["state"] += 1
        finally:
            os.kill(flipper, signal.SIGKILL)
            os.waitpid(flipper, 0)
        if not one.alive:
            code, words = one.ended()
            assert code == 3, (code, words)
            seen["poisoned"] += 1
        one.stop()
    assert seen["right"] > 5, seen
    assert seen["poisoned"] + seen["state"] + seen["refused"] + seen["wrong"] > 0, seen
