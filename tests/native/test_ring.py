"""
Lanes, both ends in this process and without waiting: what each accepts of what the other wrote.

A lane's private end is the C struct; everything a peer can do is writing to the memory, which the
tests do byte by byte.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_ends import (
    ABORT,
    ACK,
    AREA,
    ATTEST,
    BATCH,
    BEGIN,
    CALL,
    ERROR,
    HALF,
    ITEM,
    LIMIT,
    NEXT,
    OCALL_RESULT,
    PING,
    RESULT,
    SHORT,
    SIDE,
    SLOT,
    STOP,
    STRIDE,
    Ring,
    broken,
    read,
    transfer,
    wait,
    write,
)  # fmt: skip

from pyenclave import _core
from pyenclave._ffi import ffi, lib

EXTREMES = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1] + [
    2**64 - n for n in (2, 31, 32, 127, 128, 129, 4096)
]


# ---- making ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "slot"),
    [(0, 128), (1025, 128), (2**32 - 1, 128), (1, 0), (1, 95), (1, 97), (1, 2**24 + 32),
     (1, 2**32 - 32), (2**32 - 1, 2**32 - 32)],
)  # fmt: skip
def test_BND_02_an_impossible_layout_has_no_size(lanes, slot):
    assert _core.ring_size(lanes, slot) == 0


def test_the_size_is_whole_pages_and_grows_with_lanes():
    sizes = [_core.ring_size(n, 128) for n in range(1, 50)]
    assert all(size % 4096 == 0 for size in sizes)
    assert sizes == sorted(sizes)
    assert all(size >= 4096 + n * STRIDE for n, size in enumerate(sizes, 1))


def test_BND_01_memory_of_another_size_or_alignment_is_refused():
    ring = Ring()
    out = ffi.new("pye_lane **")
    for shift, size, number, side, want in [
        (0, ring.size - 1, 0, 1, lib.PYE_E_LENGTH),
        (0, ring.size + 4096, 0, 1, lib.PYE_E_LENGTH),
        (0, 0, 0, 1, lib.PYE_E_LENGTH),
        (64, ring.size, 0, 1, lib.PYE_E_ALIGNMENT),
        (0, ring.size, 2, 1, lib.PYE_E_ARGUMENT),
        (0, ring.size, 2**32 - 1, 1, lib.PYE_E_ARGUMENT),
        (0, ring.size, 0, 0, lib.PYE_E_ARGUMENT),
        (0, ring.size, 0, 3, lib.PYE_E_ARGUMENT),
    ]:
        memory = ffi.cast("void *", ring.base + shift)
        assert lib.pye_lane_new(out, memory, size, 2, SLOT, number, side, 1, ring.ops) == want
        assert out[0] == ffi.NULL


def test_an_answer_that_is_known_to_take_long_is_slept_for_at_once():
    """The processor is not looked away from those who make it; the next one is looked for again."""
    ring = Ring()
    worker = ring.workers[0]
    seen = []

    def sleep(word, expected, timeout_ms) -> int:
        seen.append("wait")
        if "answer" in seen:
            transfer_reply()
        return lib.PYE_E_TIMEOUT

    def transfer_reply() -> None:
        assert wait(worker)[0] == lib.PYE_OK
        assert read(worker, 1)[0] == lib.PYE_OK
        assert write(worker, RESULT, b"y") == lib.PYE_OK

    callbacks = {
        "wait": ffi.callback("pye_status(uint32_t *, uint32_t, uint32_t)", sleep),
        "wake": ffi.callback("pye_status(uint32_t *)", lambda _: lib.PYE_OK),
        "yield": ffi.callback("void()", lambda: seen.append("yield")),
        "cpu": ffi.callback("int()", lambda: -1),
    }
    ring.ops = ffi.new("pye_wait_ops *", callbacks)
    host = ring.end(0, 2, lib.PYE_SIDE_HOST, LIMIT)
    header = ffi.new("pye_lane_header *")
    lib.pye_lane_rest(host)
    assert write(host, PING, b"x") == lib.PYE_OK
    for _ in range(2):
        assert lib.pye_lane_wait(host, header, 1) == lib.PYE_E_TIMEOUT
    assert seen == ["wait", "wait"]
    seen[:] = ["answer"]
    assert lib.pye_lane_wait(host, header, 1) == lib.PYE_OK
    assert seen == ["answer", "wait"]
    assert read(host, 1) == (lib.PYE_OK, b"y")
    seen.clear()
    assert write(host, PING, b"x") == lib.PYE_OK
    assert lib.pye_lane_wait(host, header, 1) == lib.PYE_E_TIMEOUT
    assert seen == ["yield", "yield", "wait"]


# ---- what a peer may write ---------------------------------------------------------------------


def model(fields: dict[str, int], limit: int) -> int:
    """What a fresh worker must answer to a first frame, in Python's unbounded integers."""
    if fields["sequence"] == 0:
        return lib.PYE_E_TIMEOUT
    f = fields
    ok = (
        f["sequence"] == 1
        and f["lane"] == 0
        and f["kind"] in (CALL, PING, ATTEST, BATCH)
        and f["length"] <= SLOT
        and f["offset"] == 0
        and f["length"] == (f["total"] if f["total"] <= SLOT else HALF)
    )
    if not ok:
        return lib.PYE_E_PROTOCOL
    return lib.PYE_OK if f["total"] <= limit else lib.PYE_E_LIMIT


def numbers(bits: int, *likely: int):
    sizes = [0, 1, HALF - 1, HALF, HALF + 1, SLOT - 1, SLOT, SLOT + 1, LIMIT, LIMIT + 1]
    edge = [value for value in [*likely, *EXTREMES, *sizes] if value < 2**bits]
    return st.sampled_from(edge) | st.integers(0, 2**bits - 1)


FIELDS = st.fixed_dictionaries(
    {
        "sequence": st.just(1) | numbers(32),
        "kind": st.sampled_from([CALL, PING, ATTEST, BATCH])
        | numbers(
            16, *range(NEXT, BATCH), *range(OCALL_RESULT, STOP + 2), *range(RESULT, ITEM + 2)
        ),
        "index": numbers(16),
        "length": numbers(32),
        "lane": st.just(0) | numbers(32),
        "total": numbers(64),
        "offset": st.just(0) | numbers(64),
    }
)


@given(fields=FIELDS)
@settings(max_examples=1500, deadline=None)
def test_BND_02_the_checks_agree_with_a_model_of_unbounded_integers(fields):
    ring = Ring(lanes=1)
    ring.put("request", **fields)
    rc, header = wait(ring.workers[0])
    assert rc == model(fields, LIMIT)
    if rc == lib.PYE_OK:
        assert header.length <= SLOT
        assert header.total <= LIMIT
        read(ring.workers[0], header.total)
    assert ring.canaries()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("sequence", "length", "lane", "total", "offset")
        for value in EXTREMES
        if value < 2 ** (64 if field in ("total", "offset") else 32)
    ],
)
def test_BND_01_BND_05_no_field_at_its_edge_reaches_beyond_the_slot(field, value):
    ring = Ring()
    ring.put("request", payload=b"x" * (HALF if field == "total" else SLOT), **{field: value})
    rc, _ = wait(ring.workers[0])
    if field == "total":  # a full first fragment of a message that is too long: typed, alive
        assert rc == lib.PYE_E_LIMIT
        assert not broken(ring.workers[0])
    else:
        assert rc == lib.PYE_E_PROTOCOL
        assert broken(ring.workers[0]) == field
    assert ring.canaries()


def test_BND_05_a_total_that_fits_when_cut_to_32_bits_is_too_long():
    ring = Ring()
    ring.put("request", payload=b"x" * HALF, total=2**32 + SLOT)
    assert wait(ring.workers[0])[0] == lib.PYE_E_LIMIT


def test_a_broken_lane_stays_broken():
    ring = Ring()
    ring.put("request", sequence=7)
    worker = ring.workers[0]
    assert wait(worker)[0] == lib.PYE_E_PROTOCOL
    ring.put("request", sequence=1)
    assert wait(worker)[0] == lib.PYE_E_PROTOCOL
    assert write(worker, RESULT, b"x") == lib.PYE_E_PROTOCOL
    assert read(worker, 1)[0] == lib.PYE_E_PROTOCOL
    assert broken(worker) == "sequence"


def test_lane_ownership_is_checked():
    """A frame for another lane is refused, and a lane's frames do not reach another."""
    ring = Ring()
    ring.put("request", on=0)
    assert wait(ring.workers[1])[0] == lib.PYE_E_TIMEOUT
    ring.put("request", on=0, lane=1)
    assert wait(ring.workers[0])[0] == lib.PYE_E_PROTOCOL
    assert broken(ring.workers[0]) == "lane"


@pytest.mark.parametrize(
    "kind",
    [NEXT, ABORT, *range(OCALL_RESULT, STOP + 2), *range(RESULT, ITEM + 2), 0, 128, 255, 65535,
     256 + CALL],
)  # fmt: skip
def test_a_frame_out_of_turn_or_of_unknown_kind_breaks_the_worker(kind):
    ring = Ring()
    ring.put("request", kind=kind)
    assert wait(ring.workers[0])[0] == lib.PYE_E_PROTOCOL


@pytest.mark.parametrize("kind", [CALL, PING, NEXT, ABORT, ACK, 0, 1000])
def test_BND_06_a_reply_out_of_turn_breaks_the_host(kind):
    ring = Ring()
    assert write(ring.hosts[0], CALL, b"x") == lib.PYE_OK
    ring.put("reply", kind=kind)
    assert wait(ring.hosts[0])[0] == lib.PYE_E_PROTOCOL


@pytest.mark.parametrize(
    "fields",
    [
        {"length": SLOT + 1, "total": SLOT + 1},
        {"length": 2**31, "total": 2**31},
        {"length": 2**32 - 1, "total": 2**32 - 1},
        {"length": HALF, "total": LIMIT + 1},
        {"length": HALF, "total": 2**63},
        {"length": HALF, "total": 2**64 - 1},
        {"length": SLOT, "total": SLOT + 1},
        {"length": HALF - 1, "total": SLOT + 1},
        {"length": HALF, "total": SLOT},
        {"length": 5, "total": 4},
        {"length": 5, "total": 6},
        {"length": 5, "total": 10, "offset": 5},
        {"length": 0, "total": 5},
        {"sequence": 2},
        {"lane": 1},
        {"offset": 2**64 - 1},
    ],
)
def test_BND_06_replies_with_altered_sizes_are_refused(fields):
    ring = Ring()
    assert write(ring.hosts[0], CALL, b"x") == lib.PYE_OK
    ring.put("reply", **fields)
    rc, header = wait(ring.hosts[0])
    assert rc == lib.PYE_E_PROTOCOL
    assert ring.canaries()
    # And nothing can be read out afterwards, however large the buffer.
    assert read(ring.hosts[0], header.length if header.length <= SLOT else 0)[0] != lib.PYE_OK


def test_BND_06_the_buffer_must_have_the_announced_size():
    ring = Ring()
    write(ring.hosts[0], CALL, b"12345678")
    assert wait(ring.workers[0])[0] == lib.PYE_OK
    for size in (0, 7, 9, 128):
        rc, data = read(ring.workers[0], size)
        assert rc == lib.PYE_E_LENGTH
        assert data == bytes(size)
    assert read(ring.workers[0], 8) == (lib.PYE_OK, b"12345678")


def test_BND_03_a_header_changed_after_the_check_has_no_effect():
    ring = Ring()
    write(ring.hosts[0], CALL, b"12345678", index=3)
    rc, header = wait(ring.workers[0])
    assert rc == lib.PYE_OK
    ring.put("request", kind=PING, index=9, length=SLOT, total=2**63, offset=77, sequence=99)
    assert (header.kind, header.index, header.total) == (CALL, 3, 8)
    assert read(ring.workers[0], 8)[0] == lib.PYE_OK
    assert write(ring.workers[0], RESULT, b"fine") == lib.PYE_OK
    assert ring.get("reply")[0][:2] == (1, RESULT)


def test_BND_03_a_payload_changed_after_the_copy_has_no_effect():
    ring = Ring()
    write(ring.hosts[0], CALL, b"12345678")
    wait(ring.workers[0])
    _, copy = read(ring.workers[0], 8)
    ring.put("request", payload=b"hostile!")
    assert copy == b"12345678"


@pytest.mark.parametrize(
    "fields",
    [
        {"total": 301},
        {"total": 299},
        {"total": LIMIT},
        {"offset": 0},
        {"offset": 65},
        {"offset": 128},
        {"index": 4},
        {"kind": PING},
        {"kind": CALL, "length": 63},
        {"kind": CALL, "length": 128},
        {"sequence": 1},
        {"sequence": 3},
    ],
)
def test_BND_17_a_later_fragment_with_other_sizes_is_refused(fields):
    ring = Ring()
    data = bytes(range(200)) + bytes(100)
    assert write(ring.hosts[0], CALL, data, index=3) == lib.PYE_E_TIMEOUT
    rc, header = wait(ring.workers[0])
    assert (rc, header.total) == (lib.PYE_OK, 300)
    assert read(ring.workers[0], 300)[0] == lib.PYE_E_TIMEOUT
    good = {"sequence": 2, "index": 3, "length": HALF, "total": 300, "offset": HALF}
    ring.put("request", **(good | fields))
    rc, out = read(ring.workers[0], 300)
    if fields == {"sequence": 1}:  # nothing new yet
        assert rc == lib.PYE_E_TIMEOUT
        return
    assert rc == lib.PYE_E_PROTOCOL
    assert out == bytes(300)  # BND-18: nothing of the first fragment is left


def test_BND_17_a_later_reply_fragment_with_other_sizes_is_refused():
    for fields in ({"total": 400}, {"total": 299}, {"offset": 0}, {"length": 1}, {"kind": ERROR}):
        ring = Ring()
        write(ring.hosts[0], CALL, b"x")
        ring.put("reply", payload=b"a" * HALF, total=300)
        rc, header = wait(ring.hosts[0])
        assert (rc, header.total) == (lib.PYE_OK, 300)
        assert read(ring.hosts[0], 300)[0] == lib.PYE_E_TIMEOUT
        good = {"sequence": 2, "length": HALF, "total": 300, "offset": HALF}
        ring.put("reply", **(good | fields))
        rc, out = read(ring.hosts[0], 300)
        assert (rc, out) == (lib.PYE_E_PROTOCOL, bytes(300)), fields


def test_the_next_fragment_is_written_before_the_last_is_acknowledged():
    """It lies behind that one, so that what the receiver copies meanwhile stays as it is."""
    ring = Ring()
    data = bytes(range(1, 251))
    assert write(ring.hosts[0], CALL, data) == lib.PYE_E_TIMEOUT
    header, slot = ring.get("request")
    assert header == (1, CALL, 0, HALF, 0, 250, 0)
    assert slot == bytes(BEGIN - 32) + data[:SLOT] + bytes(AREA - SLOT)
    assert wait(ring.workers[0])[0] == lib.PYE_OK
    out = ffi.new("uint8_t[]", 250)
    assert lib.pye_lane_read(ring.workers[0], out, 250, 0) == lib.PYE_E_TIMEOUT
    assert write(ring.hosts[0], CALL, data) == lib.PYE_E_TIMEOUT
    header, slot = ring.get("request")
    assert header == (2, CALL, 0, HALF, 0, 250, HALF)
    assert slot == bytes(BEGIN - 32) + data[: SLOT + HALF] + bytes(AREA - SLOT - HALF)
    # What a hostile host does to the place that was acknowledged has no effect any more.
    first = ring.offset("request") + BEGIN
    ring.whole[first : first + HALF] = b"!" * HALF
    assert lib.pye_lane_read(ring.workers[0], out, 250, 0) == lib.PYE_E_TIMEOUT
    assert bytes(ffi.buffer(out, SLOT)) == data[:SLOT]


@pytest.mark.parametrize("size", [0, 1, HALF, SLOT, SLOT + 1, 300, AREA + HALF + 1])
def test_a_message_is_read_into_two_buffers(size):
    data = bytes(i % 251 for i in range(size))
    for split in sorted({0, 1, HALF - 1, HALF, HALF + 1, SLOT, size // 2, size - 1, size}):
        if not 0 <= split <= size:
            continue
        ring = Ring()
        rc = write(ring.hosts[0], CALL, data)
        assert wait(ring.workers[0])[0] == lib.PYE_OK
        head = ffi.new("uint8_t[]", b"\xa5" * (split + 64))
        body = ffi.new("uint8_t[]", b"\xa5" * (size - split + 64))
        worker = ring.workers[0]
        for _ in range(2 + size // HALF):
            taken = lib.pye_lane_read_split(worker, head, split, body, size - split, 0)
            if rc == lib.PYE_E_TIMEOUT:
                rc = write(ring.hosts[0], CALL, data)
            if taken == lib.PYE_OK:
                break
        assert (rc, taken) == (lib.PYE_OK, lib.PYE_OK)
        assert bytes(ffi.buffer(head))[: split + 64] == data[:split] + b"\xa5" * 64
        assert bytes(ffi.buffer(body))[: size - split + 64] == data[split:] + b"\xa5" * 64


def test_BND_18_both_buffers_are_zeroed_when_the_message_breaks():
    ring = Ring()
    assert write(ring.hosts[0], CALL, b"h" * 300) == lib.PYE_E_TIMEOUT
    assert wait(ring.workers[0])[0] == lib.PYE_OK
    head, body = ffi.new("uint8_t[]", 50), ffi.new("uint8_t[]", 250)
    worker = ring.workers[0]
    for wrong in ((51, 250), (50, 251), (0, 299), (301, 0)):
        buffers = ffi.new("uint8_t[]", 400), ffi.new("uint8_t[]", 400)
        rc = lib.pye_lane_read_split(worker, buffers[0], wrong[0], buffers[1], wrong[1], 0)
        assert rc == lib.PYE_E_LENGTH
    assert lib.pye_lane_read_split(worker, head, 50, body, 250, 0) == lib.PYE_E_TIMEOUT
    assert bytes(ffi.buffer(head)) == b"h" * 50
    ring.put("request", sequence=2, length=HALF, total=301, offset=HALF)
    assert lib.pye_lane_read_split(worker, head, 50, body, 250, 0) == lib.PYE_E_PROTOCOL
    assert not any(bytes(ffi.buffer(head)) + bytes(ffi.buffer(body)))


# ---- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 31, 127, 128, 129, 255, 256, 257, 512, 999, 1000])
def test_messages_of_every_size_cross_in_both_directions(size):
    ring = Ring()
    data = bytes(i * 7 % 251 for i in range(size))
    for turn in range(3):
        for lane in (0, 1):
            header, got = transfer(ring.hosts[lane], CALL, data, ring.workers[lane], index=turn)
            assert got == data
            assert (header.kind, header.index, header.lane) == (CALL, turn, lane)
            header, got = transfer(ring.workers[lane], RESULT, data[::-1], ring.hosts[lane])
            assert got == data[::-1]
            assert header.kind == RESULT
    assert ring.canaries()


def test_a_message_of_many_segments_is_gathered():
    ring = Ring()
    parts = [b"", b"a" * 5, b"", b"b" * 200, b"c", b"", b"d" * 94, b""]
    buffers = [ffi.from_buffer(part) for part in parts]
    segments = ffi.new(
        "pye_segment[]",
        [{"data": ffi.cast("uint8_t *", b), "len": len(b)} for b in buffers],
    )
    host, worker = ring.hosts[0], ring.workers[0]
    out = ffi.new("uint8_t[300]")
    rc = lib.pye_lane_write(host, CALL, 0, segments, len(parts), 0)
    assert wait(worker)[1].total == 300
    while lib.pye_lane_read(worker, out, 300, 0) == lib.PYE_E_TIMEOUT:
        rc = lib.pye_lane_write(host, CALL, 0, segments, len(parts), 0)
    assert rc == lib.PYE_OK
    assert bytes(ffi.buffer(out)) == b"".join(parts)


def test_BND_03_another_message_does_not_go_on_with_the_one_that_is_under_way():
    """Shorter than what was sent already, it would have had a fragment of 4 GiB."""
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    data = bytes(range(250)) + bytes(250)
    assert write(host, CALL, data) == lib.PYE_E_TIMEOUT
    assert wait(worker)[1].total == 500
    assert write(host, PING, data) == lib.PYE_E_STATE
    assert write(host, CALL, data + b"1") == lib.PYE_E_STATE
    assert write(host, CALL, data[:10]) == lib.PYE_E_STATE
    assert lib.pye_lane_broken(host) == ffi.NULL
    out = ffi.new("uint8_t[500]")
    rc = lib.PYE_E_TIMEOUT
    while lib.pye_lane_read(worker, out, 500, 0) == lib.PYE_E_TIMEOUT:
        rc = write(host, CALL, data)
    assert rc == lib.PYE_OK
    assert bytes(ffi.buffer(out)) == data
    assert ring.canaries()


def test_BND_02_segments_whose_sum_overflows_are_refused():
    ring = Ring()
    segments = ffi.new("pye_segment[2]", [{"len": 2**64 - 1}, {"len": 2}])
    assert lib.pye_lane_write(ring.hosts[0], CALL, 0, segments, 2, 0) == lib.PYE_E_LENGTH
    assert lib.pye_lane_idle(ring.hosts[0])


def test_BND_07_nothing_of_a_longer_message_stays_behind_a_shorter_one():
    ring = Ring()
    transfer(ring.hosts[0], CALL, b"x", ring.workers[0])
    transfer(ring.workers[0], RESULT, b"SECRET" * 80, ring.hosts[0])
    transfer(ring.hosts[0], CALL, b"x", ring.workers[0])
    transfer(ring.workers[0], RESULT, b"ok", ring.hosts[0])
    header, payload = ring.get("reply")
    assert header == (9, RESULT, 0, 2, 0, 2, 0)
    assert payload == b"ok" + bytes(SIDE - 32 - 2)
    assert b"SECRET" not in ring.whole[:]


def test_long_messages_go_on_where_the_last_one_ended_and_short_ones_do_not():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    at = ring.offset("request")
    begins = []
    for number in range(20):
        size = (65, 128, 100, 64)[number % 4]
        data = bytes([number + 1]) * size
        header, got = transfer(host, CALL, data, worker)
        assert (header.total, got) == (size, data)
        begins.append(ring.whole[at : at + SIDE].index(data))
        assert transfer(worker, RESULT, b"", host)[1] == b""
        if size <= SHORT:  # BND-07
            assert ring.whole[at + 32 : at + SIDE] == data + bytes(SIDE - 32 - size)
    # Each takes whole lines, and one that would go beyond the end lies at the beginning.
    places = [128 + 128 * (i % 8) for i in range(15)]
    assert begins == [32 if i % 4 == 3 else places[i - i // 4] for i in range(20)]


def test_a_payload_that_ends_with_the_area_is_followed_by_one_at_its_beginning():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    at = ring.offset("request")
    for size in (600, 360):  # ten lines and six
        transfer(host, CALL, b"\1" * size, worker)
        transfer(worker, RESULT, b"", host)
    assert ring.whole[at + SIDE - 64 : at + SIDE - 24] == b"\1" * 40
    transfer(host, CALL, b"\2" * 65, worker)
    assert ring.whole[at + BEGIN : at + BEGIN + 65] == b"\2" * 65
    assert ring.canaries()


def test_both_ends_agree_where_the_next_one_lies_after_one_was_dropped():
    """The fragment that was written ahead of its turn was never sent."""
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    assert write(host, CALL, b"\1" * 300) == lib.PYE_E_TIMEOUT
    assert wait(worker)[0] == lib.PYE_OK
    assert read(worker, 300)[0] == lib.PYE_E_TIMEOUT
    for _ in range(3):
        rc = lib.pye_lane_drain(host, 0)
        if rc == lib.PYE_OK:
            break
        assert read(worker, 300)[0] == lib.PYE_E_CLOSED
    assert rc == lib.PYE_OK
    data = bytes(range(100))
    assert transfer(host, CALL, data, worker)[1] == data
    assert transfer(worker, RESULT, data, host)[1] == data


def test_BND_01_BND_05_where_a_payload_lies_is_nothing_that_the_peer_says():
    """Fragments of a hostile host, as announced, more of them than the area has room for."""
    ring = Ring(limit=100_000)
    worker = ring.workers[0]
    total = 70 * HALF
    out = ffi.new("uint8_t[]", total)
    for number in range(70):
        place = BEGIN + number % 16 * HALF
        ring.put(
            "request", sequence=number + 1, payload=bytes([number]) * HALF, total=total,
            offset=number * HALF, place=place,
        )  # fmt: skip
        if number == 0:
            assert wait(worker)[0] == lib.PYE_OK
        rc = lib.pye_lane_read(worker, out, total, 0)
        assert rc == (lib.PYE_OK if number == 69 else lib.PYE_E_TIMEOUT)
    assert bytes(ffi.buffer(out)) == b"".join(bytes([i]) * HALF for i in range(70))
    assert ring.canaries()


def test_turns_are_kept():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    assert write(worker, RESULT, b"x") == lib.PYE_E_STATE
    assert wait(host)[0] == lib.PYE_E_STATE
    assert read(worker, 0)[0] == lib.PYE_E_STATE
    assert wait(worker)[0] == lib.PYE_E_TIMEOUT
    assert write(host, CALL, b"x") == lib.PYE_OK
    assert write(host, CALL, b"x") == lib.PYE_E_STATE
    assert wait(host)[0] == lib.PYE_E_TIMEOUT
    assert wait(worker)[0] == lib.PYE_OK
    assert write(worker, RESULT, b"x") == lib.PYE_E_STATE  # not read yet


def test_a_message_beyond_the_limit_is_answered_and_the_lane_lives():
    ring = Ring()
    assert write(ring.hosts[0], CALL, bytes(LIMIT + 1)) == lib.PYE_E_TIMEOUT
    assert wait(ring.workers[0])[0] == lib.PYE_E_LIMIT
    assert write(ring.workers[0], ERROR, b"too long") == lib.PYE_OK
    assert write(ring.hosts[0], CALL, bytes(LIMIT + 1)) == lib.PYE_OK  # refused early
    rc, header = wait(ring.hosts[0])
    assert (rc, header.kind, header.total) == (lib.PYE_OK, ERROR, 8)
    assert read(ring.hosts[0], 8) == (lib.PYE_OK, b"too long")
    assert transfer(ring.hosts[0], CALL, b"next", ring.workers[0])[1] == b"next"


def test_the_sequence_wraps():
    """After 2^32 exchanges; the counters of both ends are set to just before by hand."""
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    for _ in range(5):
        transfer(host, CALL, b"abc", worker)
        transfer(worker, RESULT, b"abc", host)
    for lane in (host, worker):
        words = ffi.cast("uint32_t *", lane)
        places = [place for place in range(40) if words[place] == 5]
        assert len(places) == 2
        for place in places:
            words[place] = 2**32 - 2
    for side in ("request", "reply"):
        at = ring.offset(side)
        ring.whole[at : at + 4] = struct.pack("<I", 2**32 - 2)
    for want in (2**32 - 1, 0, 1):
        assert transfer(host, CALL, b"abc", worker)[0].sequence == want
        assert transfer(worker, RESULT, b"def", host)[1] == b"def"


# ---- giving up ---------------------------------------------------------------------------------


def drain(lane):
    return lib.pye_lane_drain(lane, 0)


def test_a_given_up_call_frees_the_lane_when_it_returns():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    write(host, CALL, b"slow")
    assert drain(host) == lib.PYE_E_TIMEOUT
    wait(worker)
    read(worker, 4)
    assert drain(host) == lib.PYE_E_TIMEOUT
    write(worker, RESULT, b"late")
    assert drain(host) == lib.PYE_OK
    assert transfer(host, CALL, b"new", worker)[1] == b"new"


def test_a_call_given_up_while_sending_is_aborted():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    assert write(host, CALL, b"a" * 300) == lib.PYE_E_TIMEOUT
    assert wait(worker)[1].total == 300
    assert read(worker, 300)[0] == lib.PYE_E_TIMEOUT
    assert drain(host) == lib.PYE_E_TIMEOUT  # ABORT is out
    rc, out = read(worker, 300)
    assert (rc, out) == (lib.PYE_E_CLOSED, bytes(300))
    assert lib.pye_lane_idle(worker)
    assert drain(host) == lib.PYE_OK
    assert transfer(host, CALL, b"new", worker)[1] == b"new"


def test_a_call_given_up_while_the_reply_comes_is_aborted():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    transfer(host, CALL, b"x", worker)
    assert write(worker, RESULT, b"r" * 300) == lib.PYE_E_TIMEOUT
    assert drain(host) == lib.PYE_E_TIMEOUT
    assert write(worker, RESULT, b"r" * 300) == lib.PYE_E_CLOSED
    assert drain(host) == lib.PYE_OK
    assert transfer(host, CALL, b"new", worker)[1] == b"new"


def test_a_call_given_up_in_the_middle_of_reading_is_aborted():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    transfer(host, CALL, b"x", worker)
    write(worker, RESULT, b"r" * 300)
    assert wait(host)[0] == lib.PYE_OK
    assert read(host, 300)[0] == lib.PYE_E_TIMEOUT  # NEXT is out
    assert write(worker, RESULT, b"r" * 300) == lib.PYE_E_TIMEOUT  # second fragment
    assert drain(host) == lib.PYE_E_TIMEOUT
    assert write(worker, RESULT, b"r" * 300) == lib.PYE_E_CLOSED
    assert drain(host) == lib.PYE_OK


def test_only_a_host_drains():
    assert drain(Ring().workers[0]) == lib.PYE_E_ARGUMENT


# ---- indices -----------------------------------------------------------------------------------


def test_BND_08_the_mask_keeps_good_indices_and_zeroes_all_others():
    for num in (0, 1, 2, 3, 255, 256, 65535, 65536):
        for index in range(65536):
            want = index if index < num else 0
            if lib.pye_index_mask(index, num) != want:
                pytest.fail(f"mask({index}, {num})")
    for index in (2**31, 2**32 - 1, 2**16):
        assert lib.pye_index_mask(index, 65536) == 0


# ---- MessagePack shapes ------------------------------------------------------------------------


def test_SER_02_depth_and_lengths_are_checked_before_a_decoder_sees_them():
    import msgspec

    good = [None, True, -1, 2**64 - 1, -(2**63), 1.5, "ü" * 300, b"b" * 70000, [[[]]], {"a": {}},
            list(range(20)), {str(i): i for i in range(70000)}]  # fmt: skip
    for value in good:
        data = msgspec.msgpack.encode(value)
        assert _core.msgpack_check(data)
        assert not _core.msgpack_check(data + b"\xc0")
        assert not _core.msgpack_check(data[:-1])
    assert not _core.msgpack_check(b"")
    assert _core.msgpack_check(b"\x91" * 31 + b"\x90")
    assert not _core.msgpack_check(b"\x91" * 32 + b"\x90")
    assert not _core.msgpack_check(b"\x91" * 100000 + b"\xc0")
    for bomb in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
                 b"\xc6\x7f\xff\xff\xff", b"\xdc\xff\xff", b"\xc1", b"\xd4\x01\x00",
                 b"\xc7\x0c\x01" + bytes(12)):  # fmt: skip
        assert not _core.msgpack_check(bomb)
    assert _core.msgpack_check(b"\xd6\xff" + bytes(4))
    assert _core.msgpack_check(b"\xc7\x0c\xff" + bytes(12))


@given(data=st.binary(max_size=60))
@settings(max_examples=2000, deadline=None)
def test_SER_02_what_the_check_accepts_is_what_a_decoder_accepts(data):
    import msgspec

    if _core.msgpack_check(data):
        said = ""
        try:
            msgspec.msgpack.decode(data)
        except msgspec.DecodeError as error:
            said = str(error)  # the shape is right; content may still be refused
        except (UnicodeDecodeError, TypeError):
            pass  # text that is not UTF-8, a list as a key
        assert "truncated" not in said
        assert "trailing" not in said


# ---- notes -------------------------------------------------------------------------------------


def note_of(lane) -> bytes:
    out = ffi.new("uint8_t[64]", b"x" * 64)
    length = lib.pye_lane_note_get(lane, out)
    assert bytes(out)[length:] == bytes(64 - length)
    return bytes(out)[:length]


@pytest.mark.parametrize("note", [b"a", b"req-123:a.b_c", b"Z" * 63, b"0" * 64, b""])
def test_a_note_reaches_the_other_side_and_can_be_taken_back(note):
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]
    assert note_of(worker) == b""
    assert lib.pye_lane_note_set(host, note, len(note)) == 0
    assert note_of(worker) == note
    assert lib.pye_lane_note_set(host, b"b", 1) == 0
    assert note_of(worker) == b"b"
    assert lib.pye_lane_note_set(host, ffi.NULL, 0) == 0
    assert note_of(worker) == b""


@pytest.mark.parametrize(
    "note", [b"x" * 65, b" ", b"a b", b"a\n", b"a\0b", b"\x1b[31m", b"\xc3\xa9"]
)
def test_a_note_of_other_bytes_is_not_set(note):
    ring = Ring()
    assert lib.pye_lane_note_set(ring.hosts[0], b"kept", 4) == 0
    assert lib.pye_lane_note_set(ring.hosts[0], note, len(note)) == lib.PYE_E_ARGUMENT
    assert note_of(ring.workers[0]) == b"kept"


def test_what_a_host_writes_in_the_place_of_a_note_is_no_note_unless_it_is_one():
    ring = Ring()
    place = 2 * 4096 + 64  # the ring begins a page into its memory
    for data, want in [
        (b"ok" + bytes(62), b"ok"),
        (b"y" * 64, b"y" * 64),
        (b"\n" + b"a" * 63, b""),
        (b"a\x1b" + bytes(62), b""),
        (b"a\0b" + bytes(61), b"a"),
        (b"\xff" * 64, b""),
    ]:
        ring.whole[place : place + 64] = data
        assert note_of(ring.workers[0]) == want
