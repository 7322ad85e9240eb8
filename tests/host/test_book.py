"""The bookkeeping of a pool, with a clock that the test moves."""

from __future__ import annotations

import pytest

from pyenclave.errors import BusyError, EnclaveClosedError, EnclaveLostError, LaunchError
from pyenclave.host._book import Book, Member, Ticket
from pyenclave.host._limits import Limits


class Bench:
    """A book, its clock, and enclaves that are numbers."""

    def __init__(self, **limits: object) -> None:
        self.book = Book(Limits(**limits), lambda: 0.5)  # type: ignore[arg-type]
        self.book.state = "running"
        self.now = 1000.0
        self.made = 0
        self.late: dict[int, int] = {}
        self.woken: list[Ticket] = []
        self.held: list[Ticket] = []

    def launch(self) -> list[Member]:
        """Do the launches that the plan asks for."""
        plan = self.book.plan(self.now)
        return [self.join() for _ in range(plan.launches)]

    def join(self) -> Member:
        number = self.made
        self.made += 1
        member = Member(
            handle=number, lanes=1, late=lambda: self.late.get(number, 0), started=self.now
        )
        assert self.book.joined(member, self.now)
        return member

    def ticket(self, *, alone: bool = False) -> Ticket:
        """Begin to wait."""
        ticket = Ticket(wake=lambda: self.woken.append(ticket), since=self.now, alone=alone)
        assert not self.book.take(ticket)
        return ticket

    def take(self, *, alone: bool = False) -> Member | None:
        """Take a place if there is one, and else do not wait."""
        ticket = Ticket(alone=alone)
        if self.book.take(ticket):
            self.held.append(ticket)
        else:
            self.book.forget(ticket, self.now)
        return ticket.member

    def give(self, member: Member, **how: bool) -> None:
        """Give back a place in *member*, that whoever has or got one."""
        tickets = [one for one in (*self.held, *self.woken) if one.member is member]
        self.book.give(tickets[0], self.now, **how)


def test_it_starts_as_many_as_wanted_and_no_more() -> None:
    bench = Bench(size=3, max_size=3)
    assert len(bench.launch()) == 3
    assert bench.launch() == []


@pytest.mark.parametrize(
    "limits",
    [
        {"size": 0},
        {"size": 2, "max_size": 1},
        {"warm": -1},
        {"queue": -1},
        {"max_calls": 0},
        {"max_age": 0},
        {"max_age": float("nan")},
        {"health": float("inf")},
        {"give_up": 0},
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(reversed(limits))):
        Limits(**limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", [{"size": True}, {"queue": 1.5}, {"health": "1"}])
def test_limits_of_a_wrong_type_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]


def test_calls_wait_in_order_and_no_more_than_the_queue_holds() -> None:
    bench = Bench(size=1, max_size=1, queue=2)
    (one,) = bench.launch()
    assert bench.take() is one
    assert bench.take() is None
    first, second = bench.ticket(), bench.ticket()
    with pytest.raises(BusyError, match="at most 2"):
        bench.ticket()
    bench.give(one)
    assert bench.woken == [first]
    assert first.member is one
    # Who comes now does not overtake.
    assert bench.take() is None
    bench.give(one)
    assert second.member is one


def test_who_stops_waiting_gives_back_what_it_was_given_meanwhile() -> None:
    bench = Bench(size=1, max_size=1)
    (one,) = bench.launch()
    bench.take()
    first, second, third = bench.ticket(), bench.ticket(), bench.ticket()
    bench.book.forget(second, bench.now)
    bench.give(one)
    bench.book.forget(first, bench.now)  # it had been woken, but had not looked
    assert third.member is one
    assert one.running == 1


def test_it_grows_when_calls_wait_and_shrinks_when_nobody_comes() -> None:
    bench = Bench(size=1, max_size=3, grow_after=0.05, shrink_after=60)
    (one,) = bench.launch()
    bench.take()
    bench.ticket()
    assert bench.launch() == []  # it has waited for no time yet
    bench.now += 0.06
    (two,) = bench.launch()
    assert two.running == 1  # whoever waited has it
    bench.ticket()
    bench.now += 0.06
    (three,) = bench.launch()
    bench.ticket()
    bench.now += 10
    assert bench.launch() == []  # that is max_size
    bench.give(one)
    for member in (one, two, three):
        bench.give(member)
    bench.now += 61
    plan = bench.book.plan(bench.now)
    assert len(plan.end) == 2
    assert plan.launches == 0
    assert bench.book.stats().enclaves == 1


def test_an_enclave_is_replaced_after_its_calls_or_its_time() -> None:
    bench = Bench(size=1, max_size=1, max_calls=3, max_age=100)
    (one,) = bench.launch()
    for _ in range(4):  # 3, and a tenth of jitter
        assert bench.take() is one
        bench.give(one)
    plan = bench.book.plan(bench.now)
    assert plan.end == [one]
    assert plan.launches == 1
    two = bench.join()
    bench.now += 106
    assert bench.book.plan(bench.now).end == [two]
    assert bench.book.stats().recycled == 2


def test_an_enclave_that_leaves_finishes_its_calls() -> None:
    bench = Bench(size=1, max_size=1, max_age=10)
    (one,) = bench.launch()
    bench.take()
    bench.now += 20
    assert bench.book.plan(bench.now).end == []
    bench.give(one)
    assert bench.book.plan(bench.now).end == [one]


def test_failures_are_tried_again_ever_later_until_it_gives_up_and_says_why() -> None:
    bench = Bench(size=2, max_size=2, give_up=5)
    begun, tries, delays = bench.now, 0, []
    waiting = None
    while bench.book.state == "running":
        plan = bench.book.plan(bench.now)
        for _ in range(plan.launches):
            tries += 1
            bench.book.failed(LaunchError(f"no memory {tries}"), bench.now)
        if waiting is None:
            waiting = bench.ticket()
        if not plan.launches:
            delays.append(plan.seconds)
            bench.now += plan.seconds + 0.001
    assert bench.book.state == "failed"
    assert bench.now - begun > 0.05 + 0.1 + 0.2
    assert delays == sorted(delays)
    assert waiting is not None
    assert isinstance(waiting.error, LaunchError)
    assert "no memory 5" in str(waiting.error)
    with pytest.raises(LaunchError, match="gave up: 5 launches failed in a row"):
        bench.take()
    assert bench.book.plan(bench.now + 1000).launches == 0
    bench.book.restart()
    assert bench.book.plan(bench.now).launches == 2


def test_one_that_works_makes_failures_forgotten() -> None:
    bench = Bench(size=2, max_size=2, give_up=3)
    bench.book.plan(bench.now)
    bench.book.failed(LaunchError("no"), bench.now)
    one = bench.join()
    bench.take()
    bench.give(one)
    assert bench.book.stats().failures == 1  # nobody says that it answered
    bench.take()
    bench.give(one, answered=True)
    assert bench.book.stats().failures == 0


def test_enclaves_that_end_at_once_count_as_failures_and_those_that_served_do_not() -> None:
    bench = Bench(size=1, max_size=1, give_up=3)
    for _ in range(3):
        (one,) = bench.launch()
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now)
        bench.now += 100
    assert bench.book.state == "failed"
    bench.book.restart()
    for _ in range(10):
        (one,) = bench.launch()
        bench.take()
        bench.give(one)
        assert bench.book.lost(one, EnclaveLostError("it ended"), bench.now)
        assert not bench.book.lost(one, EnclaveLostError("it ended"), bench.now)
    assert bench.book.state == "running"


def test_a_thread_whose_caller_gave_up_is_taken_when_it_is_free() -> None:
    bench = Bench(size=1, max_size=1, stuck_after=30)
    (one,) = bench.launch()
    bench.take()
    bench.late[0] = 1
    bench.give(one, gave_up=True)
    assert bench.take() is None
    waiting = bench.ticket()
    plan = bench.book.plan(bench.now)
    assert plan.seconds <= 0.1
    bench.late[0] = 0
    bench.book.plan(bench.now)
    assert waiting.member is one


def test_one_that_stays_stuck_is_ended() -> None:
    bench = Bench(size=1, max_size=1, stuck_after=30)
    (one,) = bench.launch()
    bench.take()
    bench.late[0] = 1
    bench.give(one, gave_up=True)
    bench.book.plan(bench.now)
    bench.now += 31
    plan = bench.book.plan(bench.now)
    assert plan.end == [one]
    assert plan.launches == 1


def test_who_has_an_enclave_alone_shares_it_with_nobody() -> None:
    bench = Bench(size=1, max_size=1)
    (one,) = bench.launch()
    assert bench.take(alone=True) is one
    assert bench.take() is None
    waiting = bench.ticket(alone=True)
    bench.give(one)
    assert waiting.member is one
    assert one.owned


def test_idle_ones_are_asked_whether_they_answer() -> None:
    bench = Bench(size=2, max_size=2, health=10)
    one, two = bench.launch()
    bench.now += 11
    plan = bench.book.plan(bench.now)
    assert plan.ask == [one, two]
    assert bench.take() is None  # they are asked just now
    waiting = bench.ticket()
    bench.book.asked(one, bench.now, answered=True)
    assert waiting.member is one
    bench.book.asked(two, bench.now, answered=False)
    plan = bench.book.plan(bench.now)
    assert plan.end == [two]
    assert plan.launches == 1


def test_draining_refuses_new_calls_and_waits_for_old_ones() -> None:
    bench = Bench(size=1, max_size=1)
    (one,) = bench.launch()
    bench.take()
    waiting = bench.ticket()
    bench.book.drain()
    assert isinstance(waiting.error, EnclaveClosedError)
    with pytest.raises(EnclaveClosedError, match="draining"):
        bench.take()
    assert bench.book.busy
    bench.give(one)
    assert not bench.book.busy
    assert bench.book.plan(bench.now).launches == 0
    assert bench.book.close() == [one.handle]
    with pytest.raises(EnclaveClosedError, match="closed"):
        bench.take()


def test_one_that_comes_when_all_is_over_is_not_wanted() -> None:
    bench = Bench(size=1, max_size=1)
    bench.book.plan(bench.now)
    bench.book.close()
    member = Member(handle=0, lanes=1, late=lambda: 0, started=bench.now)
    assert not bench.book.joined(member, bench.now)


def test_fresh_ones_are_limited() -> None:
    bench = Bench(max_fresh=1)
    bench.book.take_fresh(1)
    with pytest.raises(BusyError, match="fresh"):
        bench.book.take_fresh(2)
    bench.book.end_fresh(1)
    bench.book.end_fresh(1)
    bench.book.take_fresh(2)


def test_fresh_ones_are_counted_once_by_what_became_of_them() -> None:
    bench = Bench()
    book = bench.book

    def counted() -> tuple[int, ...]:
        stats = book.stats()
        return stats.fresh, stats.launched, stats.calls, stats.lost, book.queue.launch_failures

    book.take_fresh(1)
    assert counted() == (1, 0, 0, 0, 0)
    book.fresh_started(1, "one")
    assert counted() == (1, 1, 0, 0, 0)
    book.end_fresh(1)
    book.end_fresh(1, lost=True)
    assert counted() == (0, 1, 1, 0, 0)
    book.take_fresh(2)
    book.fresh_started(2, "two")
    book.end_fresh(2, lost=True, error=EnclaveLostError("it ended"))
    assert counted() == (0, 2, 2, 1, 0)
    assert "it ended" in book.stats().last_error
    book.take_fresh(3)
    book.fresh_started(3, "three")  # it was asked for, and then refused
    book.end_fresh(3, refused=True, error=LaunchError("no more"))
    book.take_fresh(4)
    book.end_fresh(4, refused=True)
    assert counted() == (0, 2, 2, 1, 2)
    assert "no more" in book.stats().last_error
    assert book.stats().failures == 0  # nothing about the pool's own enclaves


def test_one_that_dies_before_a_call_begins_counts_although_the_call_had_a_place() -> None:
    """Else every call to an enclave that cannot live would make the delays short again."""
    bench = Bench(size=1, max_size=1, give_up=3)
    for count in range(3):
        (one,) = bench.launch()
        assert bench.take() is one
        # The process's end is seen first; what the call was at is known later.
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now, began=None)
        assert bench.book.stats().failures == count
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now, began=False)
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now, began=False)
        assert bench.book.stats().failures == count + 1
        bench.give(one, answered=True)
        assert bench.book.stats().failures == count + 1
        bench.now += 100
    assert bench.book.state == "failed"


def test_a_call_that_ends_its_enclave_does_not_end_the_pool() -> None:
    """Whoever sends such calls must not be able to: it had started well."""
    bench = Bench(size=1, max_size=1, give_up=3)
    for _ in range(10):
        (one,) = bench.launch()
        bench.take()
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now, began=None)
        bench.book.lost(one, EnclaveLostError("it ended"), bench.now, began=True)
        bench.give(one, gave_up=True)
    assert bench.book.state == "running"
    assert bench.book.stats().failures == 0


def test_a_place_is_given_back_once_however_often_that_is_said() -> None:
    bench = Bench(size=1, max_size=1)
    (one,) = bench.launch()
    bench.take()
    waiting = bench.ticket()
    (ticket,) = bench.held
    for _ in range(3):
        bench.book.give(ticket, bench.now)
    assert waiting.member is one
    assert one.running == 1
    for _ in range(3):
        bench.book.forget(waiting, bench.now)
        bench.book.give(waiting, bench.now)
    assert one.running == 0
    assert bench.book.stats().calls == 1


def test_one_who_was_interrupted_while_waiting_is_out_of_the_queue() -> None:
    bench = Bench(size=1, max_size=1)
    bench.launch()
    bench.take()
    silent = Ticket()
    assert not bench.book.take(silent)  # interrupted before it said how to wake it
    second = bench.ticket()
    bench.book.give(bench.held[0], bench.now)
    assert silent.member is not None
    bench.book.give(silent, bench.now)
    assert second.member is not None


def test_the_one_that_was_used_last_is_used_next() -> None:
    bench = Bench(size=3, max_size=3)
    bench.launch()
    first, second = bench.take(), bench.take()
    assert first is not None
    assert second is not None
    bench.give(second)
    bench.give(first)
    assert bench.take() is first
    assert bench.take() is second


def test_who_has_every_place_itself_is_told_so() -> None:
    bench = Bench(size=2, max_size=2)
    bench.launch()
    for alone in (False, True):
        bench.take(alone=alone)
        assert not bench.book.waits_for_itself("me")
    bench.book.keep(bench.held[0], "me")
    assert not bench.book.waits_for_itself("me")
    bench.book.keep(bench.held[1], "me")
    assert bench.book.waits_for_itself("me")
    assert not bench.book.waits_for_itself("you")
    bench.book.give(bench.held[0], bench.now)
    assert not bench.book.waits_for_itself("me")


def test_fresh_ones_end_with_the_pool() -> None:
    bench = Bench()
    bench.book.take_fresh(1)
    bench.book.fresh_started(1, "one")
    bench.book.take_fresh(2)
    assert bench.book.close() == ["one"]
    with pytest.raises(EnclaveClosedError):
        bench.book.fresh_started(2, "two")
