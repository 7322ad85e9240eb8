"""Each system call of a heap fails once: the heap is not made, or it is poisoned, and says why."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from failing import needs_the_test_build
from heap_ends import (
    KINDS,
    MLOCK2,
    MPROTECT,
    NUM,
    PAGE,
    RESIDENT,
    UFFD,
    WRITE,
    Heap,
    Kind,
    heap_of,
    options_of,
    steered,
)
from proof_state import LIE, SYSCONF, Failure

from pyenclave._ffi import ffi, lib

pytestmark = needs_the_test_build
MOST = 200  # calls of one operation
NEXT = 5  # the first page whose fault, after those before it, brings more than the one before did
USERFAULTFD, PIDFD_OPEN, PROCESS_MADVISE = "syscall 323", "syscall 434", "syscall 440"
GETRANDOM, MEMFD_CREATE = "syscall 318", "syscall 319"
SYSINFO = "syscall 99"  # without it there may be swap: the view is locked
NOHUGEPAGE, WIPEONFORK, DONTDUMP = "madvise 15", "madvise 18", "madvise 16"
DONTNEED, DONTNEED_LOCKED, POPULATE_WRITE = "madvise 4", "madvise 24", "madvise 23"
REMOVE = "madvise 9"
OF_ERRNO = {
    errno.EPERM: lib.PYE_E_DENIED,
    errno.ENOMEM: lib.PYE_E_NO_MEMORY,
    errno.EIO: lib.PYE_E_OS,
    errno.EINTR: lib.PYE_E_OS,
    errno.EINVAL: lib.PYE_E_OS,
}


# ---- while pages move ----


@dataclass(frozen=True)
class Operation:
    """What is done to a heap, after what, and which pages are looked at if it succeeds."""

    before: Callable[[Heap], object]
    work: Callable[[Heap], int]
    pages: tuple[int, int] = (0, 16)


def nothing(_heap: Heap) -> None:
    """The heap is new."""


def cold(heap: Heap) -> None:
    heap.fill(0, 16)


def read(heap: Heap) -> None:
    """What is resident was shown for reading, where heaps know that."""
    cold(heap)
    assert heap.prefetch(0, 16) == lib.PYE_OK


def written(heap: Heap) -> None:
    cold(heap)
    assert heap.pin(0, 16) == lib.PYE_OK
    assert heap.unpin(0, 16) == lib.PYE_OK


def scattered(heap: Heap) -> None:
    cold(heap)
    for page in range(0, 16, 3):
        assert heap.pin(page, 1) == lib.PYE_OK
        assert heap.unpin(page, 1) == lib.PYE_OK


def one_pinned(heap: Heap) -> None:
    written(heap)
    assert heap.pin(20, 1) == lib.PYE_OK


def in_sequence(heap: Heap) -> None:
    cold(heap)
    for page in range(NEXT):
        assert heap.fault(page) == lib.PYE_OK


def full(heap: Heap) -> None:
    cold(heap)
    assert heap.prefetch(100, RESIDENT) == lib.PYE_OK


def leaves(heap: Heap) -> None:
    """Pages of several leaves of a version tree are resident."""
    for page in range(0, NUM, 128):
        heap.fill(page, 1)
    for page in range(0, NUM, 128):
        assert heap.pin(page, 1) == lib.PYE_OK
        assert heap.unpin(page, 1) == lib.PYE_OK


def discard(heap: Heap) -> int:
    status = heap.discard(0, 8)
    if status == lib.PYE_OK:
        heap.forget(0, 8)
    return status


OPERATIONS = {
    "zeros are shown": Operation(nothing, lambda heap: heap.prefetch(0, 8)),
    "zeros are pinned": Operation(nothing, lambda heap: heap.pin(0, 8)),
    "cold pages are shown": Operation(cold, lambda heap: heap.prefetch(0, 8)),
    "cold pages are pinned": Operation(cold, lambda heap: heap.pin(0, 8)),
    "what was read is pinned": Operation(read, lambda heap: heap.pin(0, 2)),
    "a fault": Operation(cold, lambda heap: heap.fault(3)),
    "a fault of a write": Operation(cold, lambda heap: heap.fault(3, WRITE)),
    "a fault of a sequence": Operation(in_sequence, lambda heap: heap.fault(NEXT)),
    "a write to what was read": Operation(read, lambda heap: heap.fault(3, WRITE)),
    "a fault that was served": Operation(read, lambda heap: heap.fault(3)),
    "what was written is evicted": Operation(written, lambda heap: heap.evict(0, 8)),
    "what was read is evicted": Operation(read, lambda heap: heap.evict(0, 8)),
    "scattered pages are evicted": Operation(scattered, Heap.evict),
    "one of many is pinned": Operation(one_pinned, lambda heap: heap.evict(4, 4)),
    "pages of several leaves": Operation(leaves, Heap.evict, (0, 1)),
    "room is made": Operation(full, lambda heap: heap.prefetch(0, 16)),
    "room is made for a fault": Operation(full, lambda heap: heap.fault(0)),
    "room is made for a pin": Operation(full, lambda heap: heap.pin(0, 16)),
    "pages are freed": Operation(written, discard),
}


def forgiven(kind: Kind, failure: Failure) -> bool:
    """Tell whether a heap goes on without this call, or tries it again."""
    what, error = failure.what, failure.error
    return (
        what in {"fallocate", PROCESS_MADVISE}
        or (what == DONTNEED_LOCKED and kind.mechanism == MPROTECT)
        or (what == DONTNEED and kind.tree)  # of a node that nobody needs any more
        or (error == errno.EINTR and what in {"ioctl", "pread", "pwrite"})
        or (error == errno.EINVAL and what == POPULATE_WRITE)
        # The process may have locked all its memory: it is done in another way.
        or (error == errno.EINVAL and what in {DONTNEED, DONTNEED_LOCKED, REMOVE})
        or (error == errno.ENOMEM and what == "mprotect")
    )


def may_give_way(kind: Kind, failure: Failure) -> bool:
    """Tell whether old pages are evicted, if there are any, for one that cannot be locked."""
    what = failure.what in {"ioctl", MLOCK2, POPULATE_WRITE}
    return kind.shown and failure.error == errno.ENOMEM and what


def check_end(
    heap: Heap, operation: Operation, failure: Failure, status: int, resident: int
) -> None:
    """Assert that the heap goes on as if nothing were, or has ended and says why."""
    gave_way = resident != 0 and status == lib.PYE_OK and may_give_way(heap.kind, failure)
    if gave_way or forgiven(heap.kind, failure):
        assert status == lib.PYE_OK, failure
        assert heap.poison()[0] == lib.PYE_OK
        assert heap.right(*operation.pages), failure
        assert heap.evict() == lib.PYE_OK
        assert heap.right(*operation.pages), failure
        return
    assert status == lib.PYE_E_POISONED, failure
    why, page, error = heap.poison()
    assert (why, error) == (OF_ERRNO[failure.error], failure.error), failure
    assert page < NUM
    assert heap.stats().resident == 0
    assert lib.pye_heap_frame(heap.raw, 0) == ffi.NULL
    assert heap.prefetch(0, 1) == lib.PYE_E_POISONED
    assert heap.fault(900) == lib.PYE_E_POISONED
    assert not any(bytes(ffi.buffer(ffi.cast("uint8_t *", heap.base + 900 * PAGE), PAGE)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_call_that_fails_while_pages_move_poisons_the_heap(kind: Kind) -> None:
    for name, operation in OPERATIONS.items():
        for error in (errno.EIO, errno.EINTR, errno.EINVAL, errno.ENOMEM):
            for at in range(1, MOST):
                with heap_of(kind) as heap:
                    operation.before(heap)
                    before = heap.stats()
                    with steered().failing(at, error) as failure:
                        status = operation.work(heap)
                    if not failure.name:
                        assert status == lib.PYE_OK, name
                        break
                    check_end(heap, operation, failure, status, before.resident)
                    after = heap.stats()
                    if status != lib.PYE_OK and not name.startswith("room"):
                        # What nobody was shown was brought for nobody.
                        assert after.read_ahead == before.read_ahead, failure
                        assert after.prefetched == before.prefetched, failure
                        assert after.discarded == before.discarded, failure
            else:
                pytest.fail(f"{name}: more than {MOST} calls")


@pytest.mark.parametrize("kind", [Kind(), Kind(MPROTECT), Kind(file=True)], ids=str)
@pytest.mark.parametrize("also", [0b1, 0b10])
def test_frames_that_cannot_be_given_back_in_another_way_either_poison(
    kind: Kind, also: int
) -> None:
    """The memory cannot be unlocked; or that did not help."""
    seen = 0
    for at in range(1, MOST):
        with heap_of(kind) as heap:
            written(heap)
            with steered().failing(at, errno.EINVAL, also=also) as failure:
                status = heap.discard(0, 8)
            if not failure.name:
                break
            if failure.what == REMOVE:
                seen += 1
                assert status == lib.PYE_E_POISONED
                assert heap.poison() == (lib.PYE_E_OS, 0, errno.EINVAL)
    assert seen == 1


@pytest.mark.parametrize("also", [0b1, 0b10, 0b100])
def test_without_mappings_all_is_hidden_and_if_that_fails_the_heap_ends(also: int) -> None:
    """The run, then the whole view, then the page that is pinned, then the run again."""
    with heap_of(Kind(MPROTECT)) as heap:
        one_pinned(heap)
        with steered().failing(1, errno.ENOMEM, also=also) as failure:
            status = heap.fault(2)
        assert failure.name == "mprotect"
        assert status == lib.PYE_E_POISONED
        assert heap.poison() == (lib.PYE_E_NO_MEMORY, 2, errno.ENOMEM)


def test_a_heap_that_cannot_be_reserved_is_hidden_and_reserved_after_all() -> None:
    for kind in KINDS:
        with heap_of(kind) as heap:
            written(heap)
            with steered().failing(1, errno.ENOMEM) as failure:
                assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
            assert failure.name == "mmap"
            for page in (0, 100):
                assert heap.fault(page) == lib.PYE_E_CLOSED
                assert not any(
                    bytes(ffi.buffer(ffi.cast("uint8_t *", heap.base + page * PAGE), PAGE))
                )


def test_a_zero_page_that_cannot_be_shown_is_no_fault_of_the_heap() -> None:
    with heap_of(Kind()) as heap:
        assert lib.pye_heap_close(heap.raw) == lib.PYE_OK
        with steered().failing(1, errno.ENOMEM) as failure:
            assert heap.fault(5) == lib.PYE_E_ARGUMENT
        assert failure.name == "mprotect"


# ---- while a heap is made ----


def made(kind: Kind, at: int, error: int, also: int = 0) -> tuple[Failure, int]:
    """Make a heap with one call failing; return which, and the status."""
    out = ffi.new("pye_heap **")
    with steered().failing(at, error, also=also) as failure:
        status = lib.pye_heap_new(out, options_of(kind, 0 if kind.file else -1))
    assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
    lib.pye_heap_free(out[0])
    return failure, int(status)


def done_without(kind: Kind, what: str) -> bool:
    """Tell whether there is a heap without this call."""
    if what in {NOHUGEPAGE, PIDFD_OPEN, MLOCK2, DONTNEED_LOCKED, SYSINFO}:
        return True
    # With a file the kernel is asked first whether it knows which pages were written.
    return kind.file and kind.mechanism == UFFD and what in {USERFAULTFD, "ioctl"}


@pytest.mark.parametrize("error", [errno.EPERM, errno.EIO])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.tree], ids=str)
def test_a_call_that_fails_while_a_heap_is_made_is_its_status(kind: Kind, error: int) -> None:
    secret = False  # between these two, secret memory is made: test_failing_once.py
    for at in range(1, MOST):
        failure, status = made(kind, at, error)
        what = failure.what
        if not what:
            assert status == lib.PYE_OK
            assert at > 10
            return
        secret = what != MEMFD_CREATE and (secret or what == GETRANDOM)
        if what == GETRANDOM:
            assert status == lib.PYE_E_RANDOM
        elif secret:
            continue
        elif done_without(kind, what):
            assert status == lib.PYE_OK, failure
        elif what == "ioctl":
            assert status == lib.PYE_E_UNSUPPORTED, failure
        elif what in {WIPEONFORK, DONTDUMP}:
            assert status in {OF_ERRNO[error], lib.PYE_E_UNSUPPORTED}, failure
        else:
            assert status == OF_ERRNO[error], failure


def test_calls_that_only_say_that_they_did_their_work_are_noticed() -> None:
    lies = []
    for at in range(1, MOST):
        failure, _ = made(Kind(), at, errno.EIO)
        if not failure.name:
            break
        # Not others: a descriptor that is said to be 0 would be closed.
        if failure.name in {"ioctl", GETRANDOM}:
            lies.append(made(Kind(), at, LIE)[1])
    assert lies == [lib.PYE_E_RANDOM, lib.PYE_E_UNSUPPORTED, lib.PYE_E_UNSUPPORTED]


def test_without_a_lock_and_without_the_limit_there_is_no_heap_that_must_be_locked() -> None:
    for at in range(1, MOST):
        failure, status = made(Kind(shown=True), at, errno.EIO, also=1)
        if failure.name == MLOCK2:
            assert status == lib.PYE_E_OS
            return
    pytest.fail("nothing was locked")


def test_pages_of_another_size_are_not_supported() -> None:
    out = ffi.new("pye_heap **")
    with steered().failing(1, what=SYSCONF) as failure:
        assert lib.pye_heap_new(out, options_of(Kind())) == lib.PYE_E_UNSUPPORTED
    assert failure.name == "sysconf"
