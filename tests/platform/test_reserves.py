"""Warm workers: what a host may ask for, and what becomes of them, whoever ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyenclave._memfd import seal
from pyenclave._platform import reserves as reserves_module
from pyenclave._platform.client import PlatformClient
from pyenclave.calls import ring
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    EnclaveError,
    EnclaveLostError,
    EnclaveStateError,
    ImageError,
    LaunchError,
    LaunchRefusedError,
)
from pyenclave.formats import messages
from pyenclave.formats.record import ProtectionRecord

SEALS_ALL = 0x1 | 0x2 | 0x4 | 0x8


def image_fd(**image: object) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, json.dumps(image).encode())
    seal(fd, SEALS_ALL)
    return fd


def reserve(client: PlatformClient, *, options: dict[str, Any] | None = None, **image: object):
    fd = image_fd(**image)
    try:
        return client.reserve(fd, **(options or {})).reserve_id
    finally:
        os.close(fd)


def offer(client: PlatformClient, reserve_id: bytes, threads: int = 1) -> int:
    fd = ring.create(threads)
    try:
        slot, bell = client.offer(reserve_id, fd)
    finally:
        os.close(fd)
    os.close(bell)
    return slot


def wait_for(done: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if done():
            return True
        time.sleep(0.01)
    return False


def warm(client: PlatformClient, reserve_id: bytes, count: int) -> list[int]:
    """Offer rings and wait until each has a worker; the numbers of the offers."""
    slots = [offer(client, reserve_id) for _ in range(count)]
    assert wait_for(lambda: client.ask_reserve(reserve_id).ready >= count)
    return slots


def children(pid: int) -> set[int]:
    found = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(entry))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def fds_of(client: PlatformClient) -> int:
    return len(os.listdir(f"/proc/{client.hello.pid}/fd"))


def taken(client: PlatformClient, reserve_id: bytes) -> messages.Launched:
    launched, pidfd = client.take(reserve_id)
    os.close(pidfd)
    return launched


def test_two_hand_outs_are_two_enclaves(client: PlatformClient, tmp_path: Path) -> None:
    """Identity, record, key, process and ring of each are its own; the identity comes at once."""
    told = tmp_path / "told"
    kind = reserve(client, behaviour=f"tells {told}", code=9)
    slots = warm(client, kind, 2)
    assert client.list() == ()  # what is warm is no enclave
    assert not told.exists()  # and knows nothing of one
    first, second = taken(client, kind), taken(client, kind)
    assert first.warm
    assert second.warm
    assert sorted([first.slot, second.slot]) == slots
    for name in ("enclave_id", "pid", "record", "runtime_public_key", "slot"):
        assert getattr(first, name) != getattr(second, name), name
    for launched in (first, second):
        record = ProtectionRecord.from_bytes(launched.record)
        assert record.enclave_id == launched.enclave_id.hex()
        assert launched.mrenclave == bytes([9]) * 32
    assert wait_for(lambda: told.exists() and told.stat().st_size == 800)
    given = told.read_bytes()
    assert {given[384:400], given[784:]} == {first.enclave_id, second.enclave_id}
    assert {row.enclave_id for row in client.list()} == {first.enclave_id, second.enclave_id}


def test_a_used_worker_never_comes_back(client: PlatformClient) -> None:
    kind = reserve(client)
    pids, identities = set(), set()
    for _ in range(4):
        warm(client, kind, 1)
        launched = taken(client, kind)
        client.close_enclave(launched.enclave_id)
        pids.add(launched.pid)
        identities.add(launched.enclave_id)
        assert client.ask_reserve(kind).slots == ()
    assert len(pids) == len(identities) == 4


def test_without_a_warm_worker_one_is_started(client: PlatformClient) -> None:
    kind = reserve(client)
    slot = offer(client, kind)
    launched = taken(client, kind)  # it comes while the first is being started, or before
    assert launched.slot == slot
    with pytest.raises(ArgumentError, match="no ring was offered"):
        client.take(kind)


def test_one_that_was_killed_is_replaced_and_never_handed_out(client: PlatformClient) -> None:
    kind = reserve(client)
    warm(client, kind, 2)
    before = children(client.hello.pid)
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, before)))
    launched = taken(client, kind)
    assert launched.pid not in before
    assert wait_for(lambda: client.ask_reserve(kind).ready == 1)
    told = client.ask_reserve(kind)
    assert told.failures >= 1
    assert "ended" in told.error


def test_the_offer_that_a_host_names_is_the_one_that_it_gets(client: PlatformClient) -> None:
    """Its ring may have a call in it, which no other enclave may find there."""
    kind = reserve(client)
    slots = warm(client, kind, 3)
    for slot in (slots[1], slots[2]):
        taking = client.begin_take(kind, slot)
        assert client.ask_reserve(kind).ready == 3 - len(client.list())  # answered in their order
        launched, pidfd = taking.result()
        os.close(pidfd)
        assert (launched.slot, launched.warm) == (slot, True)
        assert taking.result() == (launched, -1)
    for unknown in (slots[1], 99):
        with pytest.raises(ArgumentError, match="no such offer"):
            client.begin_take(kind, unknown).result()
    assert client.ask_reserve(kind).slots == (slots[0],)


def test_a_named_offer_without_a_worker_gets_one_and_no_other_ring(
    client: PlatformClient, state_path: Path
) -> None:
    kind = reserve(client)
    slots = warm(client, kind, 2)
    before = children(client.hello.pid)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, before)))
    taking = client.begin_take(kind, slots[0])
    launched, pidfd = taking.result()
    os.close(pidfd)
    assert launched.slot == slots[0]
    assert launched.pid not in before
    assert client.ask_reserve(kind).slots == (slots[1],)


def test_a_hand_out_that_is_refused_ends_its_offer(
    client: PlatformClient, state_path: Path
) -> None:
    kind = reserve(client)
    slots = warm(client, kind, 2)
    policy = state_path / "launch-policy.toml"
    policy.touch(0o600)
    policy.write_text("allow_debug = false\n")
    taking = client.begin_take(kind, slots[0])
    assert wait_for(taking.look)
    for _ in range(2):
        with pytest.raises(LaunchRefusedError, match="allow_debug"):
            taking.result()
    assert client.ask_reserve(kind).slots == (slots[1],)


def test_a_connection_that_ends_tells_who_waits_for_a_hand_out(
    state_path: Path, client: PlatformClient
) -> None:
    kind = reserve(client)
    slots = warm(client, kind, 2)
    taking = client.begin_take(kind, slots[0])
    client.close()
    assert taking.look()
    with pytest.raises(EnclaveLostError):
        taking.result()


@pytest.mark.parametrize("behaviour", ["dies warm", "speaks warm"])
def test_one_that_dies_or_speaks_is_ended_and_tried_again_ever_later(
    client: PlatformClient, behaviour: str
) -> None:
    """Back-off: what dies at once takes no processor to speak of."""
    kind = reserve(client, behaviour=behaviour)
    begun = time.monotonic()
    offer(client, kind)
    for count in range(1, 6):  # each starts a process, which takes its time on a busy machine
        assert wait_for(lambda: client.ask_reserve(kind).failures >= count, 20)  # noqa: B023
    # At least three quarters of 0.05 s, then twice as long each time.
    assert time.monotonic() - begun > 0.75 * (0.05 + 0.1 + 0.2 + 0.4)
    assert "warm worker ended" in client.ask_reserve(kind).error


def test_a_reserve_that_fails_names_the_error_and_leaves_nothing(client: PlatformClient) -> None:
    kind = reserve(client, behaviour="ending")
    before = fds_of(client)
    offer(client, kind)
    assert wait_for(lambda: client.ask_reserve(kind).failures >= 2)
    told = client.ask_reserve(kind)
    assert "the entry raised ImportError" in told.error
    with pytest.raises(ImageError, match="the entry raised ImportError"):
        client.take(kind)
    assert client.ask_reserve(kind).slots == ()
    assert wait_for(lambda: fds_of(client) <= before)
    assert client.list() == ()


def test_one_that_dies_after_its_identity_is_a_lost_enclave(client: PlatformClient) -> None:
    kind = reserve(client, behaviour="dies after identity")
    warm(client, kind, 1)
    launched = taken(client, kind)
    assert wait_for(lambda: client.why(launched.enclave_id).state == "lost")
    assert client.ask_reserve(kind).slots == ()


def test_debug_and_production_never_mix(client: PlatformClient) -> None:
    debug = reserve(client, signed=True, options={"debug": True})
    production = reserve(client, signed=True, behaviour="liar", options={"debug": False})
    assert debug != production
    warm(client, debug, 1)
    offer(client, production)
    # The fake worker is an ordinary process: as production it is refused, warm or not.
    assert wait_for(lambda: client.ask_reserve(production).failures >= 1)
    assert "lacks a required protection" in client.ask_reserve(production).error
    with pytest.raises(LaunchRefusedError, match="lacks a required protection"):
        client.take(production)
    assert taken(client, debug).debug


def test_a_reserve_is_the_connections_own(client: PlatformClient, state_path: Path) -> None:
    kind = reserve(client)
    warm(client, kind, 1)
    with PlatformClient.connect(state_path) as other:
        for attempt in (
            lambda: other.take(kind),
            lambda: other.ask_reserve(kind),
            lambda: other.withdraw(kind),
            lambda: offer(other, kind),
        ):
            with pytest.raises(ArgumentError, match="no such reserve"):
                attempt()
    assert client.ask_reserve(kind).ready == 1


def test_when_the_host_goes_its_warm_workers_go(client: PlatformClient, state_path: Path) -> None:
    with PlatformClient.connect(state_path) as other:
        warm(other, reserve(other), 3)
        mine = warm(client, reserve(client), 1)
        assert mine == [0]
        assert len(children(client.hello.pid)) == 4
    assert wait_for(lambda: len(children(client.hello.pid)) == 1)


def test_when_the_platform_is_killed_its_warm_workers_go(state_path: Path, client) -> None:
    kind = reserve(client)
    warm(client, kind, 2)
    pids = children(client.hello.pid)
    os.kill(client.hello.pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(alive, pids)))
    with pytest.raises(EnclaveError):
        client.take(kind)


def test_withdrawing_ends_one_or_all_and_gives_everything_back(client: PlatformClient) -> None:
    first = reserve(client)
    before = fds_of(client)
    slots = warm(client, first, 3)
    client.withdraw(first, slots[1])
    assert client.ask_reserve(first).slots == (slots[0], slots[2])
    with pytest.raises(ArgumentError, match="no such offer"):
        client.withdraw(first, slots[1])
    assert wait_for(lambda: len(children(client.hello.pid)) == 2)
    client.withdraw(first)
    assert wait_for(lambda: not children(client.hello.pid))
    assert wait_for(lambda: fds_of(client) <= before)
    with pytest.raises(ArgumentError, match="no such reserve"):
        client.take(first)


def test_a_host_that_asks_for_too_much_is_refused(client: PlatformClient, state_path: Path) -> None:
    policy = state_path / "launch-policy.toml"
    policy.touch(0o600)
    policy.write_text("max_warm = 2\n")
    kind = reserve(client)
    warm(client, kind, 2)
    with pytest.raises(BusyError, match="too many warm workers; expected 2"):
        offer(client, kind)
    for code in range(1, reserves_module.MAX_RESERVES):
        reserve(client, code=code)
    with pytest.raises(BusyError, match="too many reserves"):
        reserve(client, code=99)
    assert taken(client, kind).warm


def test_warm_workers_count_as_enclaves_but_make_room_for_real_ones(
    client: PlatformClient, state_path: Path, launch: Callable[..., tuple[Any, int]]
) -> None:
    policy = state_path / "launch-policy.toml"
    policy.touch(0o600)
    policy.write_text("max_enclaves = 2\n")
    kind = reserve(client)
    warm(client, kind, 2)
    offer(client, kind)
    assert wait_for(lambda: "too many enclaves" in client.ask_reserve(kind).error)
    assert wait_for(lambda: len(children(client.hello.pid)) == 2)
    launch(client)
    assert client.ask_reserve(kind).ready == 1
    launch(client)
    assert client.ask_reserve(kind).ready == 0
    with pytest.raises(BusyError, match="too many enclaves; expected 2"):
        launch(client)
    assert wait_for(lambda: len(children(client.hello.pid)) == 2)


def test_the_policy_of_the_hand_out_counts(client: PlatformClient, state_path: Path) -> None:
    """What was warm before the rule was written is not handed out against it."""
    kind = reserve(client)
    warm(client, kind, 1)
    policy = state_path / "launch-policy.toml"
    policy.touch(0o600)
    policy.write_text("allow_debug = false\n")
    with pytest.raises(LaunchRefusedError, match="allow_debug"):
        client.take(kind)
    assert wait_for(lambda: not children(client.hello.pid))


@pytest.mark.parametrize(
    ("given", "text"),
    [("pipe", "of the ring"), ("unsealed", "of the ring"), ("two lanes", "another size")],
)
def test_what_is_no_ring_is_refused_before_anything_is_started(
    client: PlatformClient, given: str, text: str
) -> None:
    kind = reserve(client)
    before = fds_of(client)
    fds = {
        "pipe": os.pipe,
        "unsealed": lambda: (os.memfd_create("x"),),
        "two lanes": lambda: (ring.create(2),),
    }[given]()
    with pytest.raises(ArgumentError, match=text):
        client.offer(kind, fds[0])
    for fd in fds:
        os.close(fd)
    assert client.ask_reserve(kind).slots == ()
    assert fds_of(client) <= before


@pytest.mark.parametrize(
    "message",
    [
        messages.Take(reserve_id=b""),
        messages.Take(reserve_id=bytes(16)),
        messages.Offer(reserve_id=bytes(16)),
        messages.Withdraw(reserve_id=b"x" * 1000, slot=-5),
        messages.AskReserve(reserve_id=bytes(16)),
        messages.Reserve(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_requests_out_of_place_are_answered_by_errors(
    client: PlatformClient, message: messages.Message
) -> None:
    client._channel.send(message)
    answer, _ = client._channel.receive(30)
    assert isinstance(answer, messages.Failure)
    assert client.list() == ()


def test_a_host_may_not_send_what_the_platform_answers(client: PlatformClient) -> None:
    client._channel.send(messages.Reserved(reserve_id=bytes(16), slots=(), ready=0))
    answer, _ = client._channel.receive(30)
    assert isinstance(answer, messages.Failure)
    assert answer.code == EnclaveStateError.code


def test_a_platform_without_threads_refuses_and_lives(client: PlatformClient) -> None:
    kind = reserve(client, behaviour="no thread")
    offer(client, kind)
    assert wait_for(lambda: client.ask_reserve(kind).failures >= 1)
    assert "no thread" in client.ask_reserve(kind).error
    with pytest.raises(LaunchError):
        client.take(kind)
    good = reserve(client)
    warm(client, good, 1)
    assert taken(client, good).warm
