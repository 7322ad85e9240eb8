"""Each allocation and each system call of the core fails once.

Then the operation says so with a status, or does without in the way that its header says; nothing
is left behind, nothing is half done, and the next call works. docs/proofs.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
from collections import defaultdict
from collections.abc import Callable

import pytest
from failing import every_failure, needs_the_test_build, state
from proof_state import COMPARISONS, LIE
from ring_ends import CALL, RESULT, Ring, transfer
from test_mutants_arguments import aligned

from pyenclave._ffi import ffi, lib

pytestmark = needs_the_test_build
PAGE = mmap.PAGESIZE


def outcomes(operation: Callable[[], int], **options) -> dict[str, set[int]]:
    """Return the statuses that *operation* gave, by the name of the call that failed."""
    found = defaultdict(set)
    for failure, status in every_failure(operation, **options):
        found[failure.name].add(status)
    return dict(found)


REAL = (0, errno.EPERM, errno.ENOMEM, errno.EINTR, errno.ENOSYS)


# ---- memory ----


def test_secret_memory_is_made_whole_or_not_at_all():
    out, kind = ffi.new("void **"), ffi.new("uint32_t *")

    def make() -> int:
        status = lib.pye_secmem_new(out, 3 * PAGE + 1, kind)
        if status == lib.PYE_OK:
            assert lib.pye_secmem_live(out[0])
            memory = ffi.cast("uint8_t *", out[0])
            memory[0] = memory[3 * PAGE] = 1  # it is there, to its last byte
            assert kind[0] in {
                lib.PYE_SECMEM_SECRET,
                lib.PYE_SECMEM_LOCKED,
                lib.PYE_SECMEM_UNLOCKED,
            }
            lib.pye_secmem_free(out[0], 3 * PAGE + 1)
        else:
            assert (out[0], kind[0]) == (ffi.NULL, 0)
        return status

    found = outcomes(make, errors=REAL)
    # The reservation, its head and the wish that forks lack it: without them there is none.
    for needed in ("mmap", "mprotect", "madvise"):
        assert found[needed] - {lib.PYE_OK}, needed
    # Secret pages are the best way, not the only one.
    assert found["syscall 447"] == {lib.PYE_OK}
    assert found["ftruncate"] == {lib.PYE_OK} or os.uname().machine != "x86_64"


def test_ordinary_pages_stand_in_for_secret_ones_or_fail_whole(in_child):
    """Where memfd_secret is refused, every later step fails once too."""
    assert state is not None
    out, kind = ffi.new("void **"), ffi.new("uint32_t *")

    def make() -> int:
        status = lib.pye_secmem_new(out, 1, kind)
        if status == lib.PYE_OK:
            ffi.cast("uint8_t *", out[0])[0] = 1
            lib.pye_secmem_free(out[0], 1)
        return status

    def filtered() -> list[list[object]]:
        number = ffi.new("int[1]", [447])
        assert lib.pye_seccomp_deny(number, 1, errno.ENOSYS) == lib.PYE_OK
        return [[f.name, s] for f, s in every_failure(make, (0, errno.EPERM))]

    found = in_child(filtered).result()
    statuses = {status for _, status in found}
    assert statuses == {lib.PYE_OK, lib.PYE_E_NO_MEMORY, lib.PYE_E_DENIED}
    refused = {name for name, status in found if status != lib.PYE_OK}
    assert refused == {"mmap", "mprotect", "madvise"}
    # Out of core dumps and out of forks, with each errno; the wish to be wiped has a stand-in.
    advised = [status for name, status in found if name == "madvise"]
    assert (len(advised), advised.count(lib.PYE_OK)) == (6, 2)


def test_the_lock_limit_is_told_or_not():
    soft, hard = ffi.new("uint64_t *"), ffi.new("uint64_t *")

    def ask() -> int:
        return lib.pye_secmem_limit(soft, hard)

    for failure, status in every_failure(ask, REAL):
        assert status != lib.PYE_OK, failure
        assert (soft[0], hard[0]) == (0, 0)


@pytest.mark.parametrize("sides", ["host", "worker"])
def test_a_lane_is_made_or_not(sides):
    ring = Ring()
    out = ffi.new("pye_lane **")
    side = lib.PYE_SIDE_HOST if sides == "host" else lib.PYE_SIDE_WORKER

    def make() -> int:
        memory = ffi.cast("void *", ring.base)
        status = lib.pye_lane_new(out, memory, ring.size, 2, 128, 0, side, 1000, ring.ops)
        assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
        lib.pye_lane_free(out[0])
        return status

    assert outcomes(make) == {"calloc": {lib.PYE_E_NO_MEMORY}}


def test_counters_are_made_or_not():
    out = ffi.new("pye_stats **")

    def make() -> int:
        clock = ffi.addressof(lib, "pye_clock_ns")
        status = lib.pye_stats_new(out, 4, 10, clock)
        assert (out[0] == ffi.NULL) == (status != lib.PYE_OK)
        lib.pye_stats_free(out[0])
        return status

    assert outcomes(make) == {"calloc": {lib.PYE_E_NO_MEMORY}}


def test_without_memory_for_its_table_a_public_key_has_none():
    if lib.pye_p256_table_new(ffi.NULL) == ffi.NULL:
        pytest.skip("this CPU lacks AVX-512 IFMA")

    def make() -> int:
        table = lib.pye_p256_table_new(ffi.NULL)
        lib.pye_p256_table_free(table)
        return lib.PYE_OK if table != ffi.NULL else lib.PYE_E_NO_MEMORY

    found = outcomes(make, errors=(0,))
    assert found == {"malloc": {lib.PYE_E_NO_MEMORY}, "aligned_alloc": {lib.PYE_E_NO_MEMORY}}


# ---- waiting ----


def test_a_watch_begins_or_not_and_never_in_part():
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    word = ffi.new("uint32_t *", 1)
    out = ffi.new("pye_watch **")

    def begin() -> int:
        return lib.pye_watch_new(out, 4, event)

    def settle(status: int) -> None:
        if status != lib.PYE_OK:
            assert out[0] == ffi.NULL
            return
        # It works, whatever failed on the way: a word that differs is told.
        lib.pye_watch_set(out[0], 0, word, 0)
        lib.pye_watch_kick(out[0])
        assert select.select([event], [], [], 10)[0]
        os.eventfd_read(event)
        lib.pye_watch_free(out[0])

    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found = outcomes(begin, errors=(0, errno.EPERM), settle=settle)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == masked
    needed = {"calloc", "fcntl", "pthread_mutex_init", "pthread_create", "pthread_attr_init"}
    for name in needed:
        assert lib.PYE_OK not in found[name], name
    assert found["calloc"] == {lib.PYE_E_NO_MEMORY}
    os.close(event)


def test_waking_and_sleeping_tell_what_failed():
    word = ffi.new("uint32_t *", 5)

    def wake() -> int:
        return lib.pye_wake_futex(word)

    def sleep() -> int:
        return lib.pye_wait_futex(word, 4, 1)  # differs: no sleep

    by_error = {
        0: lib.PYE_E_UNSUPPORTED,
        errno.EPERM: lib.PYE_E_DENIED,
        errno.ENOMEM: lib.PYE_E_NO_MEMORY,
        errno.EINVAL: lib.PYE_E_OS,
    }
    for failure, status in every_failure(wake, tuple(by_error)):
        assert status == by_error[failure.error]
    by_error |= {errno.EINTR: lib.PYE_OK, errno.ETIMEDOUT: lib.PYE_E_TIMEOUT}
    for failure, status in every_failure(sleep, tuple(by_error)):
        assert status == by_error[failure.error]


def test_a_lane_goes_on_when_a_wake_is_lost():
    ring = Ring()
    host, worker = ring.hosts[0], ring.workers[0]

    def call() -> int:
        for lane in (host, worker):  # asleep, as far as the other side can see
            lib.pye_lane_arm(lane, ffi.new("uint32_t **"), ffi.new("uint32_t *"))
        transfer(host, CALL, b"q" * 300, worker)
        transfer(worker, RESULT, b"r" * 300, host)
        return lib.PYE_OK

    found = outcomes(call)
    assert found == {"syscall 202" if os.uname().machine == "x86_64" else "syscall 98": {0}}


# ---- descriptors and processes ----


def test_shared_memory_is_accepted_only_when_it_was_looked_at():
    import fcntl

    fd = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 1 | 2 | 4)
    size = ffi.new("uint64_t *")

    def check() -> int:
        return lib.pye_fd_check_memfd(fd, PAGE, 2, size)

    for failure, status in every_failure(check, REAL):
        assert status != lib.PYE_OK, failure
        assert size[0] == 0
    os.close(fd)


def test_another_process_is_opened_waited_for_and_read_or_an_error_tells():
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    fd, other = ffi.new("int *"), ffi.new("int *")
    byte, got = ffi.new("uint8_t[4]"), ffi.new("size_t *")

    def opened() -> int:
        status = lib.pye_pidfd_open(fd, child)
        if status == lib.PYE_OK:
            os.close(fd[0])
        else:
            assert fd[0] == -1
        return status

    def read_own() -> int:
        at = int(ffi.cast("uintptr_t", byte))
        status = lib.pye_process_read(os.getpid(), at, byte, 4, got)
        assert (got[0] == 4) == (status == lib.PYE_OK)
        return status

    try:
        for operation in (opened, read_own):
            for failure, status in every_failure(operation, REAL):
                assert status != lib.PYE_OK, failure
        assert lib.pye_pidfd_open(fd, child) == lib.PYE_OK

        def poke() -> int:
            return lib.pye_pidfd_kill(fd[0], 0)

        def steal() -> int:
            status = lib.pye_pidfd_steal(other, fd[0], 1)
            if status == lib.PYE_OK:
                os.close(other[0])
            else:
                assert other[0] == -1
            return status

        for operation in (poke, steal):
            for failure, status in every_failure(operation, REAL):
                assert status != lib.PYE_OK, failure
        assert state is not None
        for error, expected in (
            (errno.EINTR, lib.PYE_E_BUSY),
            (errno.ENOMEM, lib.PYE_E_NO_MEMORY),
            (0, lib.PYE_E_NO_MEMORY),
        ):
            with state.failing(1, error):
                assert lib.pye_pidfd_wait(fd[0], 0) == expected
        assert lib.pye_pidfd_wait(fd[0], 0) == lib.PYE_E_TIMEOUT
        os.kill(child, signal.SIGKILL)
        assert lib.pye_pidfd_wait(fd[0], 10_000) == lib.PYE_OK
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(fd[0])


def test_how_the_process_stands_is_told_or_an_error_is():
    pid, count = ffi.new("int64_t *"), ffi.new("uint32_t *")

    def tracer() -> int:
        return lib.pye_harden_tracer(pid)

    def threads() -> int:
        return lib.pye_harden_threads(count)

    for failure, status in every_failure(tracer, (*REAL, errno.ENOENT)):
        by_error = {errno.ENOENT: lib.PYE_E_UNSUPPORTED, errno.EPERM: lib.PYE_E_DENIED}
        if failure.name == "open":
            assert status == by_error.get(failure.error, status), failure
        assert status != lib.PYE_OK, failure
        assert pid[0] == 0
    for failure, status in every_failure(threads, REAL):
        assert status == lib.PYE_E_UNSUPPORTED, failure
        assert count[0] == 0
    assert state is not None
    with state.failing(2, LIE):  # a file without the line
        assert lib.pye_harden_tracer(pid) == lib.PYE_E_UNSUPPORTED


# ---- known answers ----


def test_an_implementation_with_a_wrong_answer_is_not_used():
    """Each comparison of the self-tests finds a difference once."""

    def hashes() -> int:
        return lib.pye_hash_self_test()

    compared = 0
    for failure, status in every_failure(hashes, (0,), what=COMPARISONS):
        compared += 1
        assert status == lib.PYE_E_SELF_TEST, failure
    assert compared >= 7
    offered = lib.pye_gcm_implementations()
    for implementation in (1 << i for i in range(16) if offered >> i & 1):

        def answers(which: int = implementation) -> int:
            return lib.pye_gcm_self_test(which)

        compared = 0
        for failure, status in every_failure(answers, (0,), what=COMPARISONS):
            compared += 1
            assert status == lib.PYE_E_SELF_TEST, failure
        assert compared == 2 * 5  # of both key sizes


def test_a_page_key_needs_nothing_that_could_fail():
    memory, _keep = aligned(lib.pye_page_key_size())
    key = ffi.cast("pye_page_key *", memory)
    secret, enclave = ffi.new("uint8_t[32]"), ffi.new("uint8_t[16]")

    def make() -> int:
        status = lib.pye_page_key_init(key, secret, 32, enclave, 0xFFFF)
        lib.pye_page_key_destroy(key)
        return status

    assert outcomes(make) == {}
