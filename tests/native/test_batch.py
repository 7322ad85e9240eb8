"""Batches: every check of what the other side packed, and the loop over native functions."""

from __future__ import annotations

import random
import struct

import batch_model as model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyenclave import _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import ArgumentError

EDGES = [0, 1, 7, 8, 63, 64, 65, 2**16, 2**16 + 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62 - 1,
         2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 8, 2**64 - 1]  # fmt: skip
ALIGNS = [1, 8, 64]

bodies = st.lists(st.binary(max_size=70), min_size=1, max_size=8)


def items_of(data: bytes, align: int, reply: bool):
    try:
        return _core.batch_items(data, align, reply)
    except ArgumentError:
        return None


def agree(data: bytes, align: int, reply: bool) -> None:
    found = items_of(data, align, reply)
    assert found == model.read(data, align, reply)
    if found is not None:
        assert all(at % align == 0 and at + length <= len(data) for at, length, _ in found)


# ---- reading -----------------------------------------------------------------------------------


@given(bodies=bodies, align=st.sampled_from(ALIGNS), budget=st.integers(0, 2**32 - 1))
def test_what_was_written_is_read(bodies, align, budget):
    data = model.write([(0, body) for body in bodies], align, budget=budget)
    found = items_of(data, align, reply=False)
    assert [data[at : at + length] for at, length, _ in found] == bodies


@given(
    bodies=bodies,
    align=st.sampled_from(ALIGNS),
    reply=st.booleans(),
    even=st.booleans(),
    places=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(EDGES) | st.integers(0, 255)),
        max_size=3,
    ),
    cut=st.integers(-70, 70),
)
@settings(max_examples=3000, deadline=None)
def test_BND_02_the_checks_agree_with_a_model_of_unbounded_integers(
    bodies, align, reply, even, places, cut
):
    """Any word at an edge, any byte, any length: C and the model say the same."""
    if even:
        size = len(bodies[0])
        bodies = [(body + bytes(size))[:size] for body in bodies]
    data = bytearray(model.write([(0, b) for b in bodies], align, form=0 if even else 1))
    for place, value in places:
        at = place * 4 if value > 255 else place * 3
        if at + 8 <= len(data):
            data[at : at + 8] = struct.pack("<Q", value)
    data = bytes(data[: len(data) + cut] if cut < 0 else data + bytes(cut))
    agree(data, align, reply)


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("reply", [False, True])
def test_every_changed_byte_is_judged_as_the_model_does(align, reply):
    tags = [(0, b"abc"), (1, b"error"), (2, b"\1\0\0\0"), (0, b""), (3, b""), (3, b"")]
    data = model.write(tags if reply else [(0, body) for _, body in tags], align)
    assert items_of(data, align, reply) is not None
    for at in range(len(data)):
        for value in (0, 1, 0x40, 0x80, 0xC0, 0xFF):
            agree(data[:at] + bytes([value]) + data[at + 1 :], align, reply)
    for length in range(len(data)):
        agree(data[:length], align, reply)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("form", [0, 1, 2, 2**32 - 1])
def test_BND_01_no_count_or_size_at_its_edge_reaches_beyond_the_message(edge, form):
    for count in (1, 2, 3, 65536, 65537, 2**32 - 1, 0):
        agree(model.HEADER.pack(count, form, edge, 0) + bytes(256), 8, True)
        if edge < 2**32:
            agree(model.HEADER.pack(edge, form, count, 0) + bytes(256), 8, False)
    if edge < 2**62:
        for tag in range(4):
            word = struct.pack("<Q", tag << 62 | edge)
            head = model.HEADER.pack(2, 1, 0, 0)
            agree(head + word + word + bytes(48) + bytes(128), 8, True)
            agree(head + bytes(8) + word + bytes(48) + bytes(128), 8, True)


def test_BND_02_a_product_that_wraps_to_the_length_is_refused():
    # 2^61 * 8 = 2^64, which is 0 in 64 bits: the length of an empty batch.
    assert items_of(model.HEADER.pack(8, 0, 2**61, 0), 8, False) is None
    assert items_of(model.HEADER.pack(16, 0, 2**60 + 4, 0) + bytes(64), 1, False) is None


def test_an_alignment_that_is_none_is_refused():
    data = model.write([(0, b"x")], 8)
    for align in (0, 3, 65, 128, 2**32 - 8):
        assert items_of(data, align, False) is None


# ---- native functions --------------------------------------------------------------------------

CAP = 4096


class Arena:
    """Private memory of the worker, with canaries, and a function that is called."""

    def __init__(self, function, cap=CAP):
        self.cap = cap
        self.raw = ffi.new("uint8_t[]", b"\xa5" * 64 + bytes(cap + 128) + b"\xa5" * 64)
        base = int(ffi.cast("uintptr_t", self.raw)) + 64
        self.skip = -base % 64 + 64
        self.calls = 0
        self.forgotten = []

        @ffi.callback("pye_status(uint8_t *, size_t, uint8_t *, size_t *)")
        def call(data, length, out, out_len):
            assert int(ffi.cast("uintptr_t", out)) % 64 == 0
            assert int(ffi.cast("uintptr_t", data)) % 64 == 0
            self.calls += 1
            answer = function(bytes(ffi.buffer(data, length)), out_len[0], out)
            if isinstance(answer, int):
                return answer
            ffi.buffer(out, len(answer))[:] = answer
            out_len[0] = len(answer)
            return 0

        @ffi.callback("void(uint8_t *, size_t)")
        def forget(memory, length):
            self.forgotten.append(length)
            ffi.memmove(memory, bytes(length), length)

        self.function, self.forget = call, forget

    def run(self, data: bytes):
        reply = ffi.new("const uint8_t **")
        length, used = ffi.new("size_t *"), ffi.new("size_t *")
        keep = ffi.new("uint8_t[]", len(data) + 64)
        start = keep + -int(ffi.cast("uintptr_t", keep)) % 64
        ffi.memmove(start, data, len(data))
        rc = lib.pye_batch_native(
            ffi.cast("void *", self.function), reply, length, used, self.raw + self.skip, self.cap,
            start, len(data), self.forget,
        )  # fmt: skip
        whole = bytes(ffi.buffer(self.raw))
        # 64 bytes on either side of the arena are zero, or the canary.
        around = whole[: self.skip] + whole[self.skip + self.cap :]
        assert set(around) <= {0, 0xA5}
        assert used[0] <= self.cap
        return rc, bytes(ffi.buffer(reply[0], length[0])) if length[0] else b""

    def results(self, data: bytes):
        rc, reply = self.run(data)
        assert rc == lib.PYE_OK
        found = items_of(reply, 64, reply=True)
        assert found == model.read(reply, 64, reply=True)
        return [(tag, reply[at : at + length]) for at, length, tag in found]


def packed(bodies, form=model.TABLE):
    return model.write([(0, body) for body in bodies], 64, form=form)


@given(bodies=st.lists(st.binary(max_size=100), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_a_batch_gives_what_single_calls_give(bodies):
    def twice(data, cap, out):
        return lib.PYE_E_ARGUMENT if data[:1] == b"\0" else data + data

    want = [
        (2, struct.pack("<I", lib.PYE_E_ARGUMENT)) if body[:1] == b"\0" else (0, body * 2)
        for body in bodies
    ]
    assert Arena(twice, 1 << 16).results(packed(bodies)) == want


def test_even_items_give_an_even_answer_without_a_table():
    bodies = [bytes([i]) * 64 for i in range(5)]
    for form in (model.EVEN, model.TABLE):
        rc, reply = Arena(lambda data, cap, out: data[::-1]).run(packed(bodies, form))
        assert rc == lib.PYE_OK
        assert reply == model.write([(0, body) for body in bodies], 64, form=model.EVEN)


def test_BND_06_an_answer_longer_than_its_room_is_refused():
    class Lie(bytes):
        pass

    arena = Arena(lambda data, cap, out: b"")

    @ffi.callback("pye_status(uint8_t *, size_t, uint8_t *, size_t *)")
    def lie(data, length, out, out_len):
        ffi.memmove(out, b"secret", 6)
        out_len[0] = {b"a": 2**64 - 1, b"b": out_len[0] + 1, b"c": 3}[ffi.buffer(data, length)[:]]
        return 0

    arena.function = lie
    too_long = (2, struct.pack("<I", lib.PYE_E_LENGTH))
    assert arena.results(packed([b"a", b"b", b"c", b"a"])) == [
        too_long, too_long, (0, b"sec"), too_long,
    ]  # fmt: skip


def test_BND_07_what_a_function_wrote_beyond_its_answer_does_not_cross():
    def scribble(data, cap, out):
        ffi.buffer(out, 512)[:] = b"\x5e" * 512
        return lib.PYE_E_STATE if data == b"fail" else data

    rc, reply = Arena(scribble).run(packed([b"x", b"fail", b"yy", b"fail", b"z" * 64]))
    assert rc == lib.PYE_OK
    assert b"\x5e" not in reply
    # And what a failing function wrote is gone before the next is called.
    seen = []

    def look(data, cap, out):
        seen.append(bytes(ffi.buffer(out, 256)))
        ffi.buffer(out, 256)[:] = b"\x5e" * 256
        return lib.PYE_E_STATE

    Arena(look).run(packed([b"1", b"2", b"3"]))
    assert [data.count(b"\x5e") for data in seen] == [0, 0, 0]


def test_items_beyond_half_of_the_room_are_left_for_the_next_batch():
    arena = Arena(lambda data, cap, out: bytes(700))
    found = arena.results(packed([b"x"] * 10))
    made = [item for item in found if item[0] == 0]
    assert len(made) == arena.calls == 3  # 192 + 2 * 704 <= 2048 < 192 + 3 * 704
    assert found[3:] == [(3, b"")] * 7


def test_each_item_has_nearly_half_of_the_room():
    caps = []

    def take(data, cap, out):
        caps.append(cap)
        return bytes(200)

    Arena(take).run(packed([b"x"] * 12))
    assert min(caps) >= CAP // 2 - 64
    assert all(cap % 64 == 0 for cap in caps)


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(64), packed([b"x"])[:-1]])
def test_nothing_is_called_of_what_is_not_a_batch(data):
    arena = Arena(lambda data, cap, out: b"")
    assert arena.run(data) == (lib.PYE_E_ARGUMENT, b"")
    assert arena.calls == 0


def test_a_table_that_leaves_no_room_is_refused_before_any_call():
    arena = Arena(lambda data, cap, out: b"")
    assert arena.run(packed([b""] * 200))[0] == lib.PYE_E_LIMIT
    assert arena.calls == 0


# ---- gathering ---------------------------------------------------------------------------------


def gather(data: bytes, size: int, out_len: int):
    reader = ffi.new("pye_batch *")
    keep = ffi.from_buffer(data)
    assert lib.pye_batch_open(reader, ffi.cast("uint8_t *", keep), len(data), 8, 1) == lib.PYE_OK
    out = ffi.new("uint8_t[]", b"\xa5" * (out_len + 8))
    rc = lib.pye_batch_gather(reader, out, out_len, size)
    whole = bytes(ffi.buffer(out))
    assert whole[out_len : out_len + 8] == b"\xa5" * 8
    return rc, whole[:out_len]


def test_BND_06_gathering_takes_only_results_of_the_announced_size():
    data = model.write([(0, b"abc"), (0, b"def")], 8)
    assert gather(data, 3, 6) == (lib.PYE_OK, b"abcdef")
    for size, out_len in [(3, 5), (3, 7), (4, 8), (2, 4), (2**63, 0), (2**64 - 1, 6), (0, 0)]:
        assert gather(data, size, out_len) == (lib.PYE_E_LENGTH, bytes(out_len))
    mixed = model.write([(0, b"abcd"), (1, b"efgh"), (0, b"ijkl")], 8)
    assert gather(mixed, 4, 12) == (lib.PYE_E_LENGTH, bytes(12))


def test_random_bytes_are_judged_as_the_model_does():
    rng = random.Random(6)
    for _ in range(3000):
        data = bytearray(rng.randbytes(rng.choice([0, 20, 64, 80, 200])))
        data[20:64] = bytes(len(data[20:64]))
        if len(data) >= 16 and rng.random() < 0.8:
            data[0:8] = struct.pack("<II", rng.randrange(4), rng.randrange(3))
        agree(bytes(data), rng.choice(ALIGNS), rng.random() < 0.5)
