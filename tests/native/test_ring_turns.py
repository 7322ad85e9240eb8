"""
Whose turn it is on a lane, and for what: calls, ocalls, nested calls and streams.

A model in Python says which kinds a side may send at any moment; both ends must agree with it, in
what they send and in what they take from a peer that sends something else.
"""

from __future__ import annotations

import random

import pytest
from ring_ends import (
    ABORT,
    ACK,
    ATTEST,
    BATCH,
    CALL,
    ERROR,
    ITEM,
    LIMIT,
    MORE,
    NEXT,
    OCALL,
    OCALL_ERROR,
    OCALL_RESULT,
    PING,
    RESULT,
    SLOT,
    STOP,
    Ring,
    broken,
    read,
    transfer,
    wait,
    write,
)  # fmt: skip

from pyenclave._ffi import lib

OF_HOST = (CALL, PING, ATTEST, NEXT, ABORT, BATCH, OCALL_RESULT, OCALL_ERROR, MORE, STOP)
OF_WORKER = (RESULT, ERROR, ACK, OCALL, ITEM)
EMPTY = (MORE, STOP)


class Model:
    """What may come next, from a list of what is open: calls, and what they wait for."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.by_host = True

    def legal(self) -> set[int]:
        if not self.by_host:
            return {RESULT, ERROR, OCALL, ITEM}
        if not self.open:
            return {CALL, PING, ATTEST, BATCH}
        return {CALL, OCALL_RESULT, OCALL_ERROR} if self.open[-1] == "ocall" else {MORE, STOP}

    def moved(self, kind: int) -> None:
        if kind in (CALL, PING, ATTEST, BATCH):
            self.open.append("call")
        elif kind == OCALL:
            self.open.append("ocall")
        elif kind == ITEM:
            self.open.append("item")
        else:  # what it answers ends
            self.open.pop()
        self.by_host = not self.by_host

    @property
    def depth(self) -> int:
        return self.open.count("call")


def payload(kind: int, size: int = 5) -> bytes:
    return b"" if kind in EMPTY else b"p" * size


def walk(ring: Ring, moves: int, rng: random.Random) -> Model:
    """Make random legal moves, now and then in fragments."""
    model = Model()
    host, worker = ring.hosts[0], ring.workers[0]
    for _ in range(moves):
        legal = sorted(model.legal())
        kind = rng.choice(legal)
        if model.depth >= 6 and model.by_host and CALL in legal and model.open:
            kind = OCALL_RESULT
        sender, receiver = (host, worker) if model.by_host else (worker, host)
        for wrong in (*OF_HOST, *OF_WORKER):
            if wrong not in legal:
                assert write(sender, wrong, payload(wrong)) == lib.PYE_E_STATE, wrong
            assert write(receiver, wrong, payload(wrong)) == lib.PYE_E_STATE, wrong
        data = payload(kind, rng.choice([0, 1, SLOT, SLOT + 1, 3 * SLOT]))
        header, got = transfer(sender, kind, data, receiver)
        assert (header.kind, got) == (kind, data)
        model.moved(kind)
        assert lib.pye_lane_depth(host) == lib.pye_lane_depth(worker) == model.depth
        held = {"ocall": OCALL, "item": ITEM}.get(model.open[-1] if model.open else "", 0)
        assert lib.pye_lane_held(host) == lib.pye_lane_held(worker) == held
        assert bool(lib.pye_lane_idle(host)) == (not model.open)
    return model


@pytest.mark.parametrize("seed", range(20))
def test_both_ends_agree_with_the_model_and_send_nothing_out_of_turn(seed):
    walk(Ring(lanes=1), 60, random.Random(seed))


@pytest.mark.parametrize("seed", range(60))
def test_BND_10_every_kind_out_of_turn_breaks_the_end_that_gets_it(seed):
    """After a random walk each illegal kind is put into the slot as a hostile peer would."""
    for wrong in (*OF_HOST, *OF_WORKER, 0, 11, 128, 134, 255, 65535):
        rng = random.Random(seed)
        ring = Ring(lanes=1)
        model = walk(ring, seed % 12, rng)
        receiver = ring.workers[0] if model.by_host else ring.hosts[0]
        side = "request" if model.by_host else "reply"
        if wrong in model.legal():
            continue
        sequence = ring.get("request")[0][0] + (1 if model.by_host else 0)
        ring.put(side, payload=payload(wrong), sequence=sequence, kind=wrong)
        assert wait(receiver)[0] == lib.PYE_E_PROTOCOL, (wrong, model.open)
        assert broken(receiver) in ("kind", "turn", "control")
        assert write(receiver, CALL if not model.by_host else RESULT, b"") == lib.PYE_E_PROTOCOL


@pytest.mark.parametrize("kind", EMPTY)
def test_what_asks_for_the_next_item_carries_nothing(kind):
    for fields in ({"payload": b"x"}, {"index": 1}, {"total": 5, "length": 0}):
        ring = Ring(lanes=1)
        transfer(ring.hosts[0], CALL, b"x", ring.workers[0])
        transfer(ring.workers[0], ITEM, b"1", ring.hosts[0])
        ring.put("request", sequence=2, kind=kind, **fields)
        assert wait(ring.workers[0])[0] == lib.PYE_E_PROTOCOL


def test_an_answer_given_twice_breaks_the_worker():
    """OCALL_RESULT, and the same again while the function goes on or returned."""
    for finished in (False, True):
        ring = Ring(lanes=1)
        host, worker = ring.hosts[0], ring.workers[0]
        transfer(host, CALL, b"x", worker)
        transfer(worker, OCALL, b"fetch", host)
        transfer(host, OCALL_RESULT, b"one", worker)
        if finished:
            transfer(worker, RESULT, b"done", host)
        ring.put("request", payload=b"two", sequence=3, kind=OCALL_RESULT)
        if not finished:  # nobody reads while it is the worker's turn: the next answer is "late"
            assert wait(worker)[0] == lib.PYE_E_STATE
            assert write(worker, OCALL, b"again") == lib.PYE_OK
            assert write(host, OCALL_ERROR, b"") == lib.PYE_E_STATE
        assert wait(worker)[0] == lib.PYE_E_PROTOCOL or not finished


def test_an_ocall_s_result_beyond_the_limit_leaves_both_ends_usable():
    ring = Ring(lanes=1)
    host, worker = ring.hosts[0], ring.workers[0]
    transfer(host, CALL, b"x", worker)
    transfer(worker, OCALL, b"fetch", host)
    long = bytes(LIMIT + 1)
    assert write(host, OCALL_RESULT, long) == lib.PYE_E_TIMEOUT
    assert wait(worker)[0] == lib.PYE_E_LIMIT
    assert write(worker, RESULT, b"without it") == lib.PYE_OK
    assert write(host, OCALL_RESULT, long) == lib.PYE_OK
    rc, header = wait(host)
    assert (rc, header.kind) == (lib.PYE_OK, RESULT)
    assert read(host, 10) == (lib.PYE_OK, b"without it")
    assert lib.pye_lane_idle(host)
    assert lib.pye_lane_idle(worker)


# ---- giving up ---------------------------------------------------------------------------------


def serve(worker, rng: random.Random, budget: list[int]) -> None:
    """Be a worker that is told to end: answer whatever frame came, with anything legal."""
    rc, header = wait(worker)
    if rc == lib.PYE_E_TIMEOUT:
        return
    assert rc == lib.PYE_OK, broken(worker)
    if read(worker, header.total)[0] != lib.PYE_OK:
        return
    answer(worker, rng, budget)


def answer(worker, rng: random.Random, budget: list[int]) -> None:
    budget[0] -= 1
    kinds = [RESULT, ERROR] if budget[0] < 0 else [RESULT, ERROR, OCALL, ITEM]
    size = rng.choice([0, 4, SLOT, 2 * SLOT])
    data = b"a" * size
    if write(worker, rng.choice(kinds), data) == lib.PYE_E_TIMEOUT:
        assert size > SLOT


@pytest.mark.parametrize("seed", range(200))
def test_a_given_up_lane_comes_back_wherever_it_was(seed):
    """From any point of a random walk, in the middle of fragments too."""
    rng = random.Random(seed)
    ring = Ring(lanes=1)
    host, worker = ring.hosts[0], ring.workers[0]
    model = walk(ring, rng.randrange(15), rng)
    pending: tuple[int, bytes] | None = None
    if model.by_host and model.open and rng.random() < 0.5:
        kind = rng.choice([OCALL_RESULT, CALL] if model.open[-1] == "ocall" else [MORE])
        if kind != MORE:  # begun, and given up while it is sent
            assert write(host, kind, b"h" * (3 * SLOT)) == lib.PYE_E_TIMEOUT
    elif not model.by_host:
        big = b"w" * (3 * SLOT)
        kind = rng.choice([RESULT, OCALL, ITEM])
        pending = (kind, big)
        assert write(worker, *pending) == lib.PYE_E_TIMEOUT
    budget = [6]
    for _ in range(100):
        rc = lib.pye_lane_drain(host, 0)
        if rc == lib.PYE_OK:
            break
        assert rc == lib.PYE_E_TIMEOUT, broken(host)
        if pending is not None:
            if write(worker, *pending) != lib.PYE_E_TIMEOUT:
                pending = None
        else:
            step(worker, rng, budget)
    assert lib.pye_lane_idle(host)
    assert lib.pye_lane_idle(worker)
    assert transfer(host, CALL, b"new", worker)[1] == b"new"
    assert transfer(worker, RESULT, b"good", host)[1] == b"good"


def step(worker, rng: random.Random, budget: list[int]) -> None:
    """Go on with whatever the worker is at: a message half sent, half read, or to come."""
    for kind in (RESULT, ERROR, OCALL, ITEM):
        rc = write(worker, kind, b"a" * (2 * SLOT))
        if rc == lib.PYE_E_STATE:
            continue
        return
    rc = read_on(worker)
    if rc == lib.PYE_OK:
        answer(worker, rng, budget)
    elif rc == lib.PYE_E_STATE:
        serve(worker, rng, budget)


def read_on(worker) -> int:
    for size in (3 * SLOT,):
        rc, _ = read(worker, size)
        if rc != lib.PYE_E_LENGTH:
            return rc
    return lib.PYE_E_STATE


def test_a_drain_stops_where_it_is_told():
    ring = Ring(lanes=1)
    host, worker = ring.hosts[0], ring.workers[0]
    transfer(host, CALL, b"outer", worker)
    transfer(worker, OCALL, b"fetch", host)
    transfer(host, CALL, b"nested", worker)
    transfer(worker, OCALL, b"fetch", host)
    assert lib.pye_lane_drain_to(host, 1, 0) == lib.PYE_E_TIMEOUT
    assert wait(worker)[1].kind == OCALL_ERROR
    assert read(worker, 0)[0] == lib.PYE_OK
    write(worker, ERROR, b"no answer")
    assert lib.pye_lane_drain_to(host, 1, 0) == lib.PYE_OK
    assert (lib.pye_lane_depth(host), lib.pye_lane_held(host)) == (1, OCALL)
    assert transfer(host, OCALL_RESULT, b"for the outer", worker)[1] == b"for the outer"


def test_a_worker_that_answers_at_once_does_not_keep_a_drain_for_ever():
    """Each drain takes a few frames; here the worker is as fast as can be: it answers before."""
    ring = Ring(lanes=1)
    host, worker = ring.hosts[0], ring.workers[0]
    transfer(host, CALL, b"x", worker)
    for _ in range(50):
        assert write(worker, OCALL, b"again") == lib.PYE_OK
        assert lib.pye_lane_drain(host, 0) == lib.PYE_E_TIMEOUT
        assert wait(worker)[1].kind == OCALL_ERROR
        assert read(worker, 0)[0] == lib.PYE_OK
    write(worker, RESULT, b"")
    assert lib.pye_lane_drain(host, 0) == lib.PYE_OK


def test_a_user_of_the_lane_can_refuse_what_only_it_knows():
    ring = Ring(lanes=1)
    transfer(ring.hosts[0], CALL, b"x", ring.workers[0])
    assert lib.pye_lane_refuse(ring.hosts[0], b"ocall") == lib.PYE_E_PROTOCOL
    assert broken(ring.hosts[0]) == "ocall"
    assert wait(ring.hosts[0])[0] == lib.PYE_E_PROTOCOL
