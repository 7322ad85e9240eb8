"""Each system call fails once while a process is made, and while it is closed in.

Half of these operations cannot be taken back (a filter stays), so each try has a child of its own.
docs/proofs.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import threading
from collections.abc import Callable

import pytest
from failing import MOST, Resources, needs_the_test_build, state
from proof_state import LIE

from pyenclave._ffi import ffi, lib

pytestmark = needs_the_test_build

ROOT = os.getuid() == 0
NO_CLONE, NO_TID_PRCTL = 1, 2
Try = tuple[str, int, list[int]]  # what failed, the status, and what else was seen


def in_children(
    in_child, operation: Callable[[], list[int]], error: int = 0, *, most: int = MOST
) -> list[Try]:
    """Run *operation* in one child after the other, each with a later call failing."""

    def run(at: int) -> list[object]:
        assert state is not None
        with state.failing(at, error) as failure:
            status, *seen = operation()
        return [failure.name, status, seen]

    found = []
    for at in range(1, most):
        name, status, seen = in_child(run, at).result()
        if not name:
            assert status == lib.PYE_OK
            return found
        found.append((name, status, seen))
    return found


# ---- making the worker's process ----


def reap() -> list[int]:
    """Wait for every child; return how each ended."""
    codes = []
    while True:
        try:
            _, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return codes
        codes.append(os.waitstatus_to_exitcode(status))


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.ENOMEM, errno.EINTR])
@pytest.mark.parametrize("namespaces", [0, 127])
@pytest.mark.parametrize("flags", [0, NO_TID_PRCTL, NO_CLONE])
def test_a_worker_is_spawned_or_nothing_is_left_of_it(in_child, namespaces, flags, error):
    """Calls of the parent, the middle process and the worker fail, whoever comes to it first."""
    assert state is not None
    ran = mmap.mmap(-1, 4096)  # shared with the worker

    def spawn() -> tuple[int, int, list[int]]:
        ran[0] = 0
        out = ffi.new("pye_spawned *")
        status = lib.pye_spawn_worker(out, namespaces, flags)
        if status == lib.PYE_OK and out.pid == 0:
            ran[0] = 1
            os._exit(77)  # the worker
        number = ffi.errno
        if status == lib.PYE_OK:
            assert out.pid > 0
            os.close(out.pidfd)
        elif status in {lib.PYE_E_OS, lib.PYE_E_DENIED}:
            assert number != 0
        return status, out.pidfd, reap()

    def every() -> list[list[object]]:
        found: list[list[object]] = []
        for at in range(1, 60):
            before = Resources.now()
            with state.failing(at, error, everywhere=True) as failure:
                status, pidfd, _ = spawn()
            if not failure.name:
                return found
            assert Resources.now() == before, f"{failure}: something is left"
            assert status == lib.PYE_OK or pidfd == -1, f"{failure}: a descriptor is told"
            assert status == lib.PYE_OK or not ran[0], f"{failure}: a worker runs untold"
            found.append([failure.name, status, ran[0]])
            status, _, codes = spawn()
            assert status == lib.PYE_OK, f"{failure}: it does not work afterwards"
            assert 77 in codes, f"{failure}: the next worker did not run"
        return found

    found = in_child(every).result()
    assert found[0][:2] == ["stat", lib.PYE_E_UNSUPPORTED]  # whether there are other threads
    for name, status, _ in found:
        if name in {"syscall 434", "write", "pipe2"}:
            assert status != lib.PYE_OK, name
        if error == errno.EPERM and status != lib.PYE_OK:
            others = {"stat": lib.PYE_E_UNSUPPORTED, "read": lib.PYE_E_OS}
            assert status == others.get(name, lib.PYE_E_DENIED) or name == "write", name
    if error == errno.EINTR:  # a signal in between is no failure
        # Which of three processes makes the n-th call is for them to settle: one may be missed.
        names = {"read", "poll", "waitpid"} if flags == NO_CLONE else set()
        for _ in range(20):
            if names <= {row[0] for row in found}:
                break
            found += in_child(every).result()
        assert names <= {row[0] for row in found}
        for name in ("read", "poll", "waitpid"):
            rows = [row for row in found if row[0] == name]
            assert all(row[1:] == [lib.PYE_OK, 1] for row in rows), name
    elif flags == NO_CLONE:
        switches = [row for row in found if row[0] in {"prctl", "poll"}]
        assert switches[0][1] != lib.PYE_OK  # becoming the one who inherits
        # What ties the worker's life to its maker's: without it there is none.
        assert [row[2] for row in switches[1:]] == [0] * (len(switches) - 1) != []


def test_closing_descriptors_tells_when_one_range_stays(in_child):
    def close() -> list[int]:
        keep = ffi.new("int[2]", [7, 900])
        return [lib.pye_fds_close_except(keep, 2)]

    def run(at: int) -> list[object]:
        os.dup2(0, 7)
        os.dup2(0, 900)
        assert state is not None
        with state.failing(at, errno.EPERM) as failure:
            (status,) = close()
        return [failure.name, status]

    names = set()
    for at in range(1, 4):
        name, status = in_child_with_pipe(run, at)
        assert status == lib.PYE_E_DENIED
        names.add(name)
    assert names == {"syscall 436"}


def in_child_with_pipe(function: Callable[[int], list[object]], at: int) -> list[object]:
    """Run *function* in a child that answers through a descriptor that stays open (900 or 7)."""
    import json

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            spare = os.dup2(writer, 950)
            text = b"[]"
            try:
                os.dup2(spare, 0)  # what the function keeps as 7 and 900
                text = json.dumps(function(at)).encode()
            finally:
                os.write(7, text)
        finally:
            os._exit(0)
    os.close(writer)
    data = b""
    while piece := os.read(reader, 4096):
        data += piece
    os.close(reader)
    os.waitpid(pid, 0)
    return list(json.loads(data))


# ---- single switches ----


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    "switch",
    [
        lambda: [lib.pye_harden_dumpable_off()],
        lambda: [lib.pye_harden_core_limit()],
        lambda: [lib.pye_harden_no_new_privs()],
        lambda: [lib.pye_harden_parent_death(9, -1)],
        lambda: [lib.pye_harden_mdwe()],
        lambda: [lib.pye_harden_limit(int(resource.RLIMIT_NOFILE), 100)],
        lambda: [lib.pye_sandbox_seccomp_loading()],
        lambda: [lib.pye_sandbox_seccomp(0)],
        lambda: [lib.pye_seccomp_deny(ffi.new("int[1]", [499]), 1, 1)],
    ],
    ids=[
        "dumpable",
        "core",
        "no_new_privs",
        "parent",
        "mdwe",
        "limit",
        "loading",
        "seccomp",
        "deny",
    ],
)
def test_a_switch_that_was_not_set_is_not_called_set(in_child, switch, error):
    def run(at: int) -> list[object]:
        assert state is not None
        assert lib.pye_harden_no_new_privs() == lib.PYE_OK
        with state.failing(at, error) as failure:
            (status,) = switch()
        return [failure.name, status]

    failed = 0
    for at in range(1, 8):
        name, status = in_child(run, at).result()
        if not name:
            break
        failed += 1
        assert status != lib.PYE_OK, name
    assert failed


def test_a_parent_that_cannot_be_looked_at_is_taken_for_gone(in_child):
    def run() -> list[int]:
        fd = os.pidfd_open(os.getppid())
        assert state is not None
        with state.failing(2):
            return [lib.pye_harden_parent_death(9, fd)]

    assert in_child(run).result() == [lib.PYE_E_PEER_LOST]


def test_signals_are_set_right_or_an_error_tells(in_child):
    """The C library's own signals refuse to be set, so only the mask can tell."""

    def run() -> list[object]:
        assert state is not None
        with state.failing(signal.SIGRTMAX + 1) as failure:
            status = lib.pye_harden_signals()
        return [failure.name, status]

    assert in_child(run).result() == ["sigprocmask", lib.PYE_E_OS]


@pytest.mark.skipif(not ROOT, reason="needs root")
@pytest.mark.parametrize("error", [0, errno.EPERM])
def test_capabilities_are_dropped_or_an_error_tells(in_child, error):
    def drop() -> list[int]:
        return [lib.pye_harden_capabilities()]

    found = in_children(in_child, drop, error)
    switches = [status for name, status, _ in found if name == "prctl"]
    assert len(switches) > 3
    assert all(status != lib.PYE_OK for name, status, _ in found if name != "prctl")
    if error:  # all but the ambient set, which kernels may lack, must succeed
        assert switches.count(lib.PYE_OK) == 1
    else:  # EINVAL: beyond the last capability that the kernel has
        assert switches[-2] != lib.PYE_OK
        assert switches.count(lib.PYE_OK) == len(switches) - 1


@pytest.mark.skipif(not ROOT, reason="needs root")
def test_capabilities_that_stay_although_the_kernel_says_otherwise_are_noticed(in_child):
    def drop() -> list[int]:
        return [lib.pye_harden_capabilities()]

    lied = [s for name, s, _ in in_children(in_child, drop, LIE) if name == "syscall 126"]
    if os.uname().machine == "x86_64":
        assert lied == [lib.PYE_E_DENIED]


# ---- the sandbox ----


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.ENOSYS])
def test_landlock_is_closed_or_not_called_so(in_child, error):
    def run(at: int) -> list[object]:
        abi = ffi.new("uint32_t *")
        assert lib.pye_harden_no_new_privs() == lib.PYE_OK
        assert state is not None
        before = Resources.now()
        with state.failing(at, error) as failure:
            status = lib.pye_sandbox_landlock(abi)
        assert status == lib.PYE_OK or Resources.now() == before
        return [failure.name, status, abi[0]]

    abi = in_child(run, 1000).result()
    if abi[1] != lib.PYE_OK:
        pytest.skip("this kernel has no Landlock")
    statuses = []
    for at in range(1, 20):
        name, status, told = in_child(run, at).result()
        if not name:
            break
        assert (told != 0) == (status == lib.PYE_OK), name
        statuses.append((name, status))
    # The version, the rule set and the restriction must succeed; the rule for urandom need not.
    for number in ("syscall 444", "syscall 446"):
        answers = [status for name, status in statuses if name == number]
        assert lib.PYE_OK not in answers
        if error == errno.EPERM:
            assert set(answers) == {lib.PYE_E_DENIED}
    assert ("open", lib.PYE_OK) in statuses


STEPS = ["before", "after"]


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("step", STEPS)
def test_no_step_of_closing_in_is_taken_by_half(in_child, step, error):
    """A call that fails takes its proof away or ends the step; it never adds one."""

    def closing(at: int) -> list[object]:
        sandbox = ffi.new("pye_sandbox *")
        assert state is not None
        if step == "after":
            assert lib.pye_sandbox_before(sandbox) == lib.PYE_OK
        begun = sandbox.step
        with state.failing(at, error) as failure:
            if step == "before":
                status = lib.pye_sandbox_before(sandbox)
            else:
                status = lib.pye_sandbox_after(sandbox, 0)
        assert sandbox.step == begun + (status == lib.PYE_OK)
        return [failure.name, status, sandbox.proved]

    _, status, whole = in_child(closing, 1000).result()
    assert status == lib.PYE_OK
    results = []
    for at in range(1, 120):
        name, status, proved = in_child(closing, at).result()
        if not name:
            break
        results.append((name, status))
        assert proved & ~whole == 0, f"call {at} ({name}) failed and proved {proved & ~whole:x}"
    else:
        pytest.fail("it does not end")
    assert any(status == lib.PYE_OK for _, status in results)
    refusals = {name for name, status in results if status != lib.PYE_OK}
    if step == "before":
        assert {"stat", "prctl"} <= refusals
        assert results[0] == ("stat", lib.PYE_E_UNSUPPORTED)  # whether there are other threads
    if error == errno.ENOMEM:  # no reason to go on without
        assert "syscall 317" in refusals or os.uname().machine != "x86_64"


def test_a_thread_with_a_filter_of_its_own_keeps_the_filter_from_being_called_set(in_child):
    def run() -> list[int]:
        import ctypes
        import struct

        assert lib.pye_harden_no_new_privs() == lib.PYE_OK
        libc = ctypes.CDLL(None, use_errno=True)
        ready, end = threading.Event(), threading.Event()
        set_up = []

        def own() -> None:
            code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
            program = ctypes.create_string_buffer(
                struct.pack("@HxxxxxxQ", 1, ctypes.addressof(code))
            )
            set_up.append(libc.prctl(22, 2, program, 0, 0))
            ready.set()
            end.wait(30)

        thread = threading.Thread(target=own)
        thread.start()
        ready.wait(30)
        status = lib.pye_seccomp_deny(ffi.new("int[1]", [499]), 1, 1)
        end.set()
        thread.join()
        return [*set_up, status]

    assert in_child(run).result() == [0, lib.PYE_E_STATE]
