"""Which check of a lane refuses, where several would: the first one, by name.

Each of these checks was one that no test noticed when it was switched off (docs/proofs.md).
"""

from __future__ import annotations

import pytest
from ring_ends import (
    ABORT,
    ACK,
    CALL,
    HALF,
    RESULT,
    SLOT,
    Ring,
    broken,
    read,
    transfer,
    wait,
    write,
)  # fmt: skip

from pyenclave._ffi import ffi, lib

LONG = bytes(range(250)) * 2  # several fragments


@pytest.fixture
def ring() -> Ring:
    return Ring()


def fragment(length: int = HALF) -> bytes:
    return b"f" * length


def test_BND_06_a_worker_cannot_abort_a_host_s_message(ring):
    host = ring.hosts[0]
    assert write(host, CALL, LONG) == lib.PYE_E_TIMEOUT
    ring.put("reply", kind=ABORT)
    assert write(host, CALL, LONG) == lib.PYE_E_PROTOCOL
    assert broken(host) == "kind"


def test_BND_06_an_answer_before_the_call_breaks_the_host(ring):
    host = ring.hosts[0]
    ring.put("reply", sequence=7)
    assert write(host, CALL, b"x") == lib.PYE_E_PROTOCOL
    assert broken(host) == "sequence"
    assert lib.pye_lane_sequence(host) == 0  # nothing was sent
    assert lib.pye_lane_depth(host) == 0


def test_BND_06_a_result_before_the_call_is_whole_breaks_the_host(ring):
    host = ring.hosts[0]
    assert write(host, CALL, LONG) == lib.PYE_E_TIMEOUT
    ring.put("reply", kind=RESULT, payload=b"early")
    assert write(host, CALL, LONG) == lib.PYE_E_PROTOCOL
    assert broken(host) == "turn"


def test_the_first_check_that_refuses_is_the_one_that_is_named(ring):
    worker, host = ring.workers[0], ring.hosts[0]
    ring.put("request", payload=fragment(), total=500)
    assert wait(worker)[0] == lib.PYE_OK
    assert read(worker, 500)[0] == lib.PYE_E_TIMEOUT
    ring.put("request", sequence=2, payload=fragment(), total=500, offset=HALF, lane=1)
    status, data = read(worker, 500)
    assert (status, data) == (lib.PYE_E_PROTOCOL, bytes(500))
    assert broken(worker) == "lane"
    assert broken(host) == ""


# ---- giving a call up ----


def test_a_broken_lane_is_not_drained(ring):
    host = ring.hosts[0]
    assert lib.pye_lane_refuse(host, b"test") == lib.PYE_E_PROTOCOL
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_PROTOCOL


def test_while_aborting_only_an_acknowledgement_is_taken(ring):
    host = ring.hosts[0]
    assert write(host, CALL, b"x") == lib.PYE_OK
    ring.put("reply", payload=fragment(), total=500)
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_TIMEOUT  # the reply is long: ABORT is out
    ring.put("reply", sequence=2, kind=RESULT, payload=b"again")
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_PROTOCOL
    assert broken(host) == "turn"


def test_an_acknowledgement_of_nothing_is_refused_while_draining(ring):
    host = ring.hosts[0]
    assert write(host, CALL, b"x") == lib.PYE_OK
    ring.put("reply", kind=ACK)
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_PROTOCOL
    assert broken(host) == "turn"


def test_a_result_before_the_call_is_whole_is_refused_while_draining(ring):
    host = ring.hosts[0]
    assert write(host, CALL, LONG) == lib.PYE_E_TIMEOUT
    ring.put("reply", kind=RESULT, payload=b"early")
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_PROTOCOL
    assert broken(host) == "turn"


def test_a_reply_that_begins_in_the_middle_is_refused_while_draining(ring):
    host = ring.hosts[0]
    assert write(host, CALL, b"x") == lib.PYE_OK
    ring.put("reply", payload=fragment(), total=500, offset=HALF)
    assert lib.pye_lane_drain(host, 0) == lib.PYE_E_PROTOCOL
    assert broken(host) == "first fragment"


def test_draining_ends_when_waiting_fails():
    """Once, not as often as a drain looks."""
    looked = []

    @ffi.callback("int32_t(uint32_t *, uint32_t, uint32_t)")
    def gone(_word, _expected, _timeout):
        looked.append(1)
        return lib.PYE_E_PEER_LOST

    @ffi.callback("int(void)")
    def no_cpu():
        return -1

    ring = Ring()
    ring.ops.wait, ring.ops.cpu = gone, no_cpu
    host = ring.end(0, 2, lib.PYE_SIDE_HOST, 1000)
    assert write(host, CALL, b"x") == lib.PYE_OK
    assert lib.pye_lane_drain(host, 1) == lib.PYE_E_PEER_LOST
    assert len(looked) == 1


def test_the_lane_lives_on_after_each_message_that_fits(ring):
    """What the tests above refuse is refused for what it is: right frames are taken."""
    for size in (1, SLOT, SLOT + 1, 500):
        transfer(ring.hosts[0], CALL, b"q" * size, ring.workers[0])
        transfer(ring.workers[0], RESULT, b"r" * size, ring.hosts[0])
