"""What is counted of real calls, and what the registry keeps of launches that are gone."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time

import pytest

from pyenclave import _core
from pyenclave.calls import stats
from pyenclave.calls.stats import FunctionStats, Latency, Launch, QueueStats, Registry
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EcallError,
    EnclaveLostError,
    EnclavePoisonedError,
)
from pyenclave.host._options import Options

ARGUMENT, BUSY, TIMEOUT, LOST, POISONED, DEPTH = range(6)


def echo(data: bytes) -> bytes:
    return data


def add(a: int, b: int) -> int:
    return a + b


def fails(x: int) -> int:
    raise ValueError("no")


def slow(seconds: float) -> None:
    time.sleep(seconds)


def launch(one, name: str = "one") -> Launch:
    return Launch(name, [item.name for item in one.signatures], 1, one.lanes)


def by_name(found: Launch) -> dict[str, FunctionStats]:
    return {item.name: item for item in found.by_function()}


def test_what_did_not_fit_is_counted_and_did_not_cross(pair) -> None:
    one = pair(add, echo)
    for bad in (("x", 1), (1, 2**70)):
        with pytest.raises(ArgumentError):
            one.add(*bad)
    with pytest.raises(ArgumentError):
        one.echo(3)
    assert one.lanes.stats.events()[ARGUMENT] == 3
    assert launch(one).by_function() == ()


def test_calls_are_counted_by_function(pair) -> None:
    one = pair(add, echo)
    for number in range(10):
        assert one.add(number, 1) == number + 1
    assert one.echo(bytes(100_000)) == bytes(100_000)
    found = by_name(launch(one))
    assert found["add"].calls == 10
    assert found["add"].latency.samples == 1
    assert found["echo"].calls == 1
    assert found["echo"].bytes_in > 100_000
    assert found["echo"].bytes_out > 100_000
    assert one.lanes.stats.events() == (0,) * 6


def test_errors_inside_are_counted_apart_from_refusals(pair) -> None:
    one = pair(fails, echo, limit=2048)
    for _ in range(3):
        with pytest.raises(EcallError):
            one.fails(1)
    with pytest.raises(ArgumentError):
        one.echo(bytes(5000))
    with pytest.raises(EcallError):
        one.lanes.raw_call(1, by_index(one, "fails"), call_bytes(one))
    found = by_name(launch(one))
    assert (found["fails"].raised, found["fails"].refused) == (4, 0)
    assert (found["echo"].calls, found["echo"].raised, found["echo"].refused) == (1, 0, 1)


def by_index(one, name: str) -> int:
    return [item.name for item in one.signatures].index(name)


def call_bytes(one) -> bytes:
    return one.signatures[by_index(one, "fails")].request_plan.encode((1,))


def test_control_messages_are_no_calls(pair) -> None:
    one = pair(echo)
    one.lanes.request(2, b"ping")
    assert launch(one).by_function() == ()


def test_an_index_beyond_the_image_counts_as_other(pair) -> None:
    one = pair(echo)
    with pytest.raises(Exception, match="number"):
        one.lanes.raw_call(1, 700, b"")
    assert by_name(launch(one))[stats.OTHER].refused == 1


def test_timeouts_late_lanes_and_refusals_are_counted(pair, until) -> None:
    one = pair(slow, queue=0)
    with pytest.raises(CallTimeoutError):
        one.functions.with_options(Options(timeout=0.05)).named("slow")(0.4)
    assert one.lanes.late_lanes == 1
    with pytest.raises(BusyError):
        one.slow(0.0)
    assert launch(one).stats().late == 1
    until(lambda: one.lanes.busy == 0)
    events = one.lanes.stats.events()
    assert (events[TIMEOUT], events[BUSY]) == (1, 1)
    assert one.lanes.late_lanes == 0


def test_the_longest_queue_is_remembered(pair, until) -> None:
    one = pair(slow)
    threads = [threading.Thread(target=one.slow, args=(0.05,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: one.lanes.queued >= 2)
    for thread in threads:
        thread.join()
    assert 2 <= one.lanes.stats.events()[DEPTH] <= 3
    assert one.lanes.queued == 0
    assert by_name(launch(one))["slow"].calls == 4


def test_a_lost_call_and_a_broken_protocol_are_counted(pair) -> None:
    one = pair(slow)
    threading.Timer(0.1, one.kill).start()
    with pytest.raises(EnclaveLostError):
        one.slow(5.0)
    assert one.lanes.stats.events()[LOST] == 1
    other = pair(slow)
    threading.Timer(0.1, lambda: spoil(other)).start()
    with pytest.raises(EnclavePoisonedError):
        other.slow(5.0)
    assert other.lanes.stats.events()[POISONED] == 1


def spoil(one) -> None:
    offset = one.header("reply")
    one.memory[offset + 4 : offset + 6] = b"\x77\x77"
    sequence = int.from_bytes(one.memory[offset : offset + 4], "little")
    one.memory[offset : offset + 4] = (sequence + 1).to_bytes(4, "little")


def test_calls_from_many_threads_are_all_counted(pair) -> None:
    one = pair(add, lanes=2)

    def work() -> None:
        for number in range(500):
            one.add(number, number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert by_name(launch(one))["add"].calls == 2000


# ---- figures -------------------------------------------------------------------------------------


def latency(*nanoseconds: int) -> Latency:
    counts = [0] * (len(_core.STATS_BOUNDS) + 1)
    for value in nanoseconds:
        counts[
            next((i for i, b in enumerate(_core.STATS_BOUNDS) if value < b), len(counts) - 1)
        ] += 1
    return Latency(samples=len(nanoseconds), seconds=sum(nanoseconds) / 1e9, counts=tuple(counts))


def test_quantiles_are_near_the_true_ones() -> None:
    values = [1000 + 37 * i for i in range(1000)]
    found = latency(*values)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        true = sorted(values)[max(0, round(share * len(values)) - 1)] / 1e9
        assert found.quantile(share) == pytest.approx(true, rel=0.25)
    assert found.mean == pytest.approx(sum(values) / 1e12)


def test_a_quantile_of_nothing_is_nothing_and_of_too_much_is_the_last_bound() -> None:
    assert latency().p50 is None
    assert latency().mean is None
    assert latency(2**40).p99 == _core.STATS_BOUNDS[-1] / 1e9
    assert latency(0).p50 <= 128e-9
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            latency(1).quantile(wrong)


def test_stats_are_plain_values_for_json(pair) -> None:
    one = pair(add)
    one.add(1, 2)
    found = launch(one).stats()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["calls"] == 1
    assert plain["functions"][0]["name"] == "add"
    assert plain["latency"]["sampled_one_in"] == 64
    assert set(plain) == set(type(found).__dataclass_fields__)
    with pytest.raises(AttributeError):
        found.calls = 5


# ---- the registry --------------------------------------------------------------------------------


class Lanes:
    late_lanes = 2
    queued = 3

    def __init__(self, functions: int = 1) -> None:
        self.stats = _core.CallStats(1, functions)
        self.stats.refused()


class Owner:
    pass


def known(registry: Registry, name: str, functions: int = 1) -> tuple[Owner, Lanes]:
    owner, lanes = Owner(), Lanes(functions)
    registry.add(Launch(name, [f"f{i}" for i in range(functions)], 4, lanes), owner)
    return owner, lanes


def test_what_is_gone_stays_counted() -> None:
    registry = Registry()
    owner, lanes = known(registry, "a")
    there = registry.totals()["a"]
    assert (there.running, there.threads, there.late, there.waiting) == (1, 4, 2, 3)
    assert there.failures["arguments"] == 1
    del owner, lanes
    gc.collect()
    for _ in range(2):
        gone = registry.totals()["a"]
        assert (gone.launches, gone.running, gone.ended["closed"]) == (1, 0, 1)
        assert gone.failures["arguments"] == 1
    assert registry.launches() == ()


def test_what_waited_before_a_pool_stays_counted_when_the_pool_is_gone() -> None:
    """A scrape sees refusals of the pool's own queue, which no enclave ever heard of."""
    registry = Registry()
    pool = Owner()
    queue = QueueStats(
        name="one",
        line=[object(), object()],
        busy=3,
        timeouts=4,
        repeated=5,
        launch_failures=6,
        most_waiting=7,
    )
    registry.add_queue(queue, pool)
    there = registry.totals()["one"]
    assert there.waiting == 2
    del pool
    gc.collect()
    for total in (there, registry.totals()["one"], registry.totals()["one"]):
        assert (total.failures["busy"], total.failures["timeouts"]) == (3, 4)
        assert (total.repeated, total.launch_failures, total.most_waiting) == (5, 6, 7)
    assert registry.totals()["one"].waiting == 0  # nobody waits for a pool that is gone
    registry.forget()
    assert registry.totals() == {}


def test_how_a_launch_ended_is_kept() -> None:
    registry = Registry()
    owner, lanes = known(registry, "a")
    (found,) = registry.launches()
    found.state = "lost"
    del owner, lanes, found
    gc.collect()
    assert registry.totals()["a"].ended == {"closed": 0, "lost": 1, "poisoned": 0}


def test_names_beyond_the_bound_are_one() -> None:
    registry = Registry()
    held = [known(registry, f"name {i}") for i in range(stats.MAX_NAMES + 10)]
    for _ in range(2):
        totals = registry.totals()
        assert len(totals) == stats.MAX_NAMES + 1
        assert totals[stats.OTHER].launches == 10
        held.clear()
        gc.collect()


def test_functions_beyond_the_bound_are_one() -> None:
    registry = Registry()
    total = stats.NameTotals()
    for part in range(3):
        total._add_functions(
            [FunctionStats(name=f"f{part}.{i}", calls=1) for i in range(stats.MAX_FUNCTIONS)]
        )
    assert len(total.functions) == stats.MAX_FUNCTIONS + 1
    assert total.functions[stats.OTHER].calls == 2 * stats.MAX_FUNCTIONS
    assert registry.totals() == {}


def test_a_finalizer_in_the_middle_of_a_reading_does_no_harm() -> None:
    """Garbage is collected anywhere, in the thread that reads as well."""
    registry = Registry()
    held = [known(registry, "a") for _ in range(50)]
    with registry._lock:
        held.clear()
        gc.collect()
    assert registry.totals()["a"].ended["closed"] == 50


def test_a_forked_child_knows_of_no_launch() -> None:
    owner, lanes = known(stats.registry, "of the parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if stats.registry.totals() == {} else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "of the parent" in stats.registry.totals()
    del owner, lanes
