"""
The control plane of the native core: features and system mechanisms, through cffi.

This is the only module that imports ``_ffi``. The data plane is ``_core``.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from pyenclave import _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import ArgumentError, EnclaveLostError, EnclaveStateError

__all__ = [
    "NAMESPACES",
    "RING_SEALS",
    "SEALED",
    "Mapping",
    "Spawned",
    "check_memfd",
    "close_fds",
    "cpu_features",
    "drop_capabilities",
    "harden_early",
    "mapped_bytes",
    "mapping_lines",
    "mapping_text",
    "mappings",
    "memory_lock_limit",
    "open_mappings",
    "open_status",
    "parse_mapping",
    "pidfd_kill",
    "pidfd_open",
    "pidfd_steal",
    "pidfd_wait",
    "probe_again",
    "probe_inside",
    "probe_outside",
    "process_read",
    "reset_signals",
    "sandbox_after_threads",
    "sandbox_before_threads",
    "sanitizer_environment",
    "secret_memory_kind",
    "spawn",
    "thread_count",
    "tracer",
]

# ---- the build ---------------------------------------------------------------------------------

_SANITIZER_NAMES: Final = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")


def sanitizer_environment() -> dict[str, str]:
    """
    Return what a program needs of this environment to load a sanitizer build.

    Of any other build nothing passes: what the platform and its zygotes load is not for the
    environment to say. Whether this is one was decided when the core was compiled.
    """
    if not _core.SANITIZED:
        return {}
    return {name: os.environ[name] for name in _SANITIZER_NAMES if name in os.environ}


# ---- features --------------------------------------------------------------------------------


def cpu_features() -> tuple[str, ...]:
    """Return the names of the CPU features that the core may use, in the order of their bits."""
    word = lib.pye_cpu_features()
    names = (lib.pye_cpu_feature_name(1 << bit) for bit in range(32) if word >> bit & 1)
    return tuple(ffi.string(name).decode() for name in names if name != ffi.NULL)


# ---- sandbox and processes -------------------------------------------------------------------

NAMESPACES: Final = ("user", "net", "pid", "mount", "ipc", "uts", "cgroup")
_WAYS: Final = {1: "clone", 2: "double_fork", 3: "fork"}
_MAPPINGS: Final = 1 << 16  # bytes of /proc/self/maps to expect
_SECRET_KINDS: Final = {0: "none", 1: "memfd_secret", 2: "locked", 3: "unlocked"}

# Seals of a ring (its size is fixed) and of code (nothing of it can change).
RING_SEALS: Final[int] = lib.PYE_SEAL_SEAL | lib.PYE_SEAL_SHRINK | lib.PYE_SEAL_GROW
SEALED: Final[int] = RING_SEALS | lib.PYE_SEAL_WRITE


class _Closing:
    """State of closing this process in, from spawn to the last probe. One a process."""

    def __init__(self) -> None:
        self.sandbox = ffi.new("pye_sandbox *")


_closing = _Closing()


def _check(status: int, what: str) -> None:
    """Raise the exception of a failed *status* of the operation *what*."""
    if status == lib.PYE_OK:
        return
    error = ffi.errno
    name = ffi.string(lib.pye_status_name(status)).decode()
    text = f"{what}: {ffi.string(lib.pye_status_message(status)).decode()} ({name})"
    if status in (lib.PYE_E_OS, lib.PYE_E_DENIED, lib.PYE_E_NO_MEMORY):
        raise OSError(error, f"{text}: {os.strerror(error)}")
    if status == lib.PYE_E_UNSUPPORTED:
        raise OSError(errno.ENOSYS, text)
    if status == lib.PYE_E_PEER_LOST:
        raise EnclaveLostError(text)
    if status in (lib.PYE_E_ARGUMENT, lib.PYE_E_LENGTH):
        raise ValueError(text)
    raise EnclaveStateError(text)


class Spawned(NamedTuple):
    """
    A child made by :func:`spawn`.

    Attributes:
        pid: The child's process id as its maker sees it; 0 in the child.
        pidfd: Descriptor of the child, the caller's to close; -1 in the child.
        namespaces: Which of :data:`NAMESPACES` are new in the child.
        way: ``clone``, ``double_fork``, or ``fork`` where the kernel refused namespaces.

    """

    pid: int
    pidfd: int
    namespaces: tuple[str, ...]
    way: str


def spawn(namespaces: tuple[str, ...] = NAMESPACES, *, flags: int = 0) -> Spawned:
    """
    Fork this process into new namespaces, as far as the kernel permits; returns in both.

    The child is killed when this process ends. It starts with one thread, and Python's own
    after-fork hooks have run; those of ``pthread_atfork`` have not.

    Args:
        namespaces: Names out of :data:`NAMESPACES`. Refused ones are left out and not reported
            as obtained: all, else all but ``user``, else none.
        flags: For tests: 1 does without the single clone, 2 without PR_GET_TID_ADDRESS.

    Raises:
        EnclaveStateError: This process has more than one thread.
        OSError: The kernel made no process.

    """
    wanted = 0
    for name in namespaces:
        wanted |= 1 << NAMESPACES.index(name)
    pid, pidfd, got, way, outer_pid, outer_ns = _core.spawn(wanted, flags)
    if pid == 0:
        _closing.sandbox = ffi.new("pye_sandbox *")
        _closing.sandbox.outer_pid = outer_pid
        _closing.sandbox.outer_ns = outer_ns
    names = tuple(name for bit, name in enumerate(NAMESPACES) if got >> bit & 1)
    return Spawned(pid, pidfd, names, _WAYS[way])


def thread_count() -> int:
    """Return the number of threads of this process, those of C libraries included."""
    count = ffi.new("uint32_t *")
    _check(lib.pye_harden_threads(count), "counting threads")
    return int(count[0])


def tracer() -> int:
    """Return the process id of whoever traces this process, or 0."""
    pid = ffi.new("int64_t *")
    _check(lib.pye_harden_tracer(pid), "reading the tracer")
    return int(pid[0])


def harden_early(*, parent: int | None = None) -> dict[str, bool]:
    """
    Do what must come first in a process that will hold secrets; call it before anything else.

    Not dumpable, no core files, no new privileges, and with *parent* death by SIGKILL when that
    process ends. Undone by ``execve``, so call it after the last one (threat catalogue A.5).

    Args:
        parent: Process id that must be the parent (of a process that :func:`spawn` made it is 0
            and already taken care of: leave it out).

    Returns:
        ``untraced``: whether no process traces this one. The others hold or raise.

    Raises:
        EnclaveLostError: The parent has ended already.
        OSError: A step was refused.

    """
    _check(lib.pye_harden_dumpable_off(), "dumpable off")
    _check(lib.pye_harden_core_limit(), "core limit")
    _check(lib.pye_harden_no_new_privs(), "no_new_privs")
    if parent is not None:
        _check(lib.pye_harden_parent_death(9, -1), "parent death signal")
        if os.getppid() != parent:
            raise EnclaveLostError("the parent has ended", expected=parent, found=os.getppid())
    return {
        "dumpable_off": True,
        "nodump": True,
        "no_new_privs": True,
        "untraced": tracer() == 0,
    }


def drop_capabilities() -> None:
    """Give up every capability for ever, uid 0's included; the uid stays."""
    _check(lib.pye_harden_capabilities(), "dropping capabilities")


def reset_signals() -> None:
    """Set all dispositions to default (PIPE, XFSZ and INT to ignored) and unblock all signals."""
    _check(lib.pye_harden_signals(), "resetting signals")


def close_fds(keep: tuple[int, ...]) -> None:
    """Close every descriptor but those of *keep* (at most 256)."""
    _check(lib.pye_fds_close_except(ffi.new("int[]", keep), len(keep)), "closing descriptors")


def check_memfd(fd: int, *, size: int = 0, seals: int = RING_SEALS) -> int:
    """
    Accept *fd* only if it is a memfd that carries *seals* and has *size* bytes.

    Args:
        fd: A descriptor that came from an untrusted process.
        size: The exact size in bytes, or 0 for any above 0.
        seals: ``F_SEAL_*`` bits, at least SHRINK: :data:`RING_SEALS` or :data:`SEALED`.

    Returns:
        Its size in bytes.

    Raises:
        EnclaveStateError: It is a pipe, a socket, a plain file, lacks a seal, or has another size.
        OSError: It is no descriptor.

    """
    found = ffi.new("uint64_t *")
    status = lib.pye_fd_check_memfd(fd, size, seals, found)
    if status == lib.PYE_E_DENIED:
        raise EnclaveStateError(
            "shared memory is not a sealed memfd", expected=f"a memfd with seals {seals:#x}"
        )
    if status == lib.PYE_E_LENGTH:
        raise EnclaveStateError(
            "shared memory has the wrong size",
            expected=size or "more than 0",
            found=os.fstat(fd).st_size,
        )
    _check(status, "checking a memfd")
    return int(found[0])


def pidfd_open(pid: int) -> int:
    """Return a descriptor of process *pid*; the caller closes it."""
    fd = ffi.new("int *")
    _check(lib.pye_pidfd_open(fd, pid), "opening a process")
    return int(fd[0])


def pidfd_wait(pidfd: int, timeout: float) -> bool:
    """Wait up to *timeout* seconds for a process to end; a signal may make it return early."""
    status = lib.pye_pidfd_wait(pidfd, max(0, int(timeout * 1000)))
    if status in (lib.PYE_E_TIMEOUT, lib.PYE_E_BUSY):
        return False
    _check(status, "waiting for a process")
    return True


def pidfd_kill(pidfd: int, signal: int) -> None:
    """Send *signal* to the process of *pidfd* (``ProcessLookupError`` if it was reaped)."""
    _check(lib.pye_pidfd_kill(pidfd, signal), "signalling a process")


def pidfd_steal(pidfd: int, target: int) -> int:
    """Duplicate descriptor *target* of another process: what an attacker tries."""
    fd = ffi.new("int *")
    _check(lib.pye_pidfd_steal(fd, pidfd, target), "taking a descriptor")
    return int(fd[0])


def process_read(pid: int, address: int, size: int) -> bytes:
    """
    Read up to *size* bytes of process *pid*: what an attacker tries.

    Raises:
        PermissionError: The process may not be read.
        OSError: It may, but there is nothing readable at *address* (EFAULT); or it is gone.

    """
    out = ffi.new("uint8_t[]", size)
    count = ffi.new("size_t *")
    _check(lib.pye_process_read(pid, address, out, size, count), "reading a process")
    return bytes(ffi.buffer(out, count[0]))


@functools.cache
def _bit_names() -> tuple[tuple[int, str], ...]:
    names = ((1 << bit, lib.pye_bit_name(1 << bit)) for bit in range(32))
    return tuple((bit, ffi.string(name).decode()) for bit, name in names if name != ffi.NULL)


def _bits(word: int) -> dict[str, bool]:
    return {name: bool(word & bit) for bit, name in _bit_names()}


def sandbox_before_threads() -> dict[str, bool | int]:
    """
    Close step 1, while there is one thread: Landlock, a first filter of system calls, and what
    only now can be tried. Call it before any code of the image runs.

    Afterwards no file can be opened (not even in /proc) or changed in mode or owner, nothing
    connected to and no signal sent outside. Open descriptors stay usable.

    Returns:
        Every protection bit with what was proved so far, and ``landlock_abi``.

    Raises:
        EnclaveStateError: There is more than one thread, or the step was done before.

    """
    _check(lib.pye_sandbox_before(_closing.sandbox), "closing the sandbox, step 1")
    found: dict[str, bool | int] = {**_bits(_closing.sandbox.proved)}
    found["landlock_abi"] = int(_closing.sandbox.landlock_abi)
    return found


def sandbox_after_threads(*, jit: bool = False, sealed: bool = False) -> dict[str, bool | int]:
    """
    Close step 2, when all threads exist: no new executable memory, and seccomp on all threads.

    Args:
        jit: Leave executable memory possible, for code that compiles at run time.
        sealed: Leave possible what the pager of sealed memory needs.

    Returns:
        Every protection bit with what was proved so far, and ``landlock_abi``.

    Raises:
        EnclaveStateError: Step 1 was not done, or a thread cannot be brought under the filter.

    """
    flags = (lib.PYE_SECCOMP_JIT if jit else 0) | (lib.PYE_SECCOMP_SEALED if sealed else 0)
    _check(lib.pye_sandbox_after(_closing.sandbox, flags), "closing the sandbox, step 2")
    return probe_inside()


def probe_inside() -> dict[str, bool | int]:
    """
    Try from inside what the closed sandbox must refuse.

    Returns:
        Every protection bit: true if its try was refused when it was closed, and still is; and
        ``landlock_abi``, the number of the ABI used, 0 for none.

    Raises:
        EnclaveStateError: The sandbox is not closed.

    """
    word = ffi.new("uint32_t *")
    _check(lib.pye_sandbox_probe(_closing.sandbox, word), "probing the sandbox")
    found: dict[str, bool | int] = {**_bits(word[0])}
    found["landlock_abi"] = int(_closing.sandbox.landlock_abi)
    return found


def secret_memory_kind() -> str:
    """Return what secret memory step 1 got: memfd_secret, locked, unlocked, or none before it."""
    return _SECRET_KINDS[int(_closing.sandbox.secret_kind)]


def _refused(attempt: Callable[[], object]) -> bool:
    """Whether calling *attempt* is refused for want of permission."""
    try:
        attempt()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def open_status(pid: int) -> int:
    """Return a descriptor of what the kernel says of process *pid*, then and later."""
    return os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)


def _status_fields(status: int) -> dict[bytes, bytes]:
    """Read from a descriptor of :func:`open_status` what probes look at."""
    text = b"\n"
    # In one piece, as the kernel gives it: what was not read counts as not held.
    text += os.pread(status, 1 << 14, 0)
    # Five fields of sixty: what is not there counts as not held.
    fields = {}
    for name in _STATUS_FIELDS:
        _, found, rest = text.partition(b"\n" + name + b":")
        if found:
            fields[name] = rest.partition(b"\n")[0].strip()
    return fields


def probe_outside(pid: int) -> dict[str, bool]:
    """
    Try from outside what process *pid* must refuse, and read what the kernel says of it.

    ``dumpable_off`` is a real attempt to read its memory and to take its descriptors, so a
    caller that holds CAP_SYS_PTRACE rightly gets False.

    Args:
        pid: A process of this user.

    Returns:
        ``dumpable_off``, ``untraced``, ``seccomp``, ``no_new_privs``, ``pidns``, ``locked``.

    Raises:
        OSError: The process is gone.

    """
    status = open_status(pid)
    try:
        fields = _status_fields(status)
    finally:
        os.close(status)
    pidfd = pidfd_open(pid)

    def steal() -> None:
        os.close(pidfd_steal(pidfd, 0))

    def open_memory() -> None:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))

    try:
        # Permission is judged before the address, so any address will do.
        unreadable = _refused(lambda: process_read(pid, 4096, 1))
        dumpable_off = unreadable and _refused(steal) and _refused(open_memory)
    finally:
        os.close(pidfd)
    return _outside(fields, dumpable_off=dumpable_off)


def probe_again(pid: int, status: int) -> dict[str, bool]:
    """
    Try a process again that :func:`probe_outside` tried before, in less time.

    The kernel's account is read anew, in full. Of the attempts, which all ask the kernel for one
    and the same permission, one is made: to read its memory.

    Args:
        pid: As for :func:`probe_outside`, which says what is returned and raised.
        status: From :func:`open_status`, of that process.

    """
    fields = _status_fields(status)
    return _outside(fields, dumpable_off=_refused(lambda: process_read(pid, 4096, 1)))


_STATUS_FIELDS: Final = (b"TracerPid", b"Seccomp", b"NoNewPrivs", b"NSpid", b"VmLck")


def _outside(fields: dict[bytes, bytes], *, dumpable_off: bool) -> dict[str, bool]:
    ids = fields.get(b"NSpid", b"").split()
    return {
        "dumpable_off": dumpable_off,
        "untraced": fields.get(b"TracerPid") == b"0",
        "seccomp": fields.get(b"Seccomp") == b"2",
        "no_new_privs": fields.get(b"NoNewPrivs") == b"1",
        "pidns": len(ids) >= 2 and ids[-1] == b"1",
        "locked": fields.get(b"VmLck", b"0 kB").split()[0] != b"0",
    }


class Mapping(NamedTuple):
    """One line of ``/proc/self/maps``."""

    start: int
    end: int
    permissions: str  # "r-xp": read, write, execute, private or shared
    offset: int
    device: tuple[int, int]
    inode: int  # 0: no file behind it
    path: str  # as the kernel shows it: "/memfd:name (deleted)", "[heap]", ""


def open_mappings() -> int:
    """Return a descriptor for :func:`mappings`, usable after files cannot be opened any more."""
    return os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)


def mappings(fd: int | None = None) -> list[Mapping]:
    """
    Return what is mapped into this process.

    Args:
        fd: A descriptor of :func:`open_mappings`, which stays open; None opens one.

    """
    return [parse_mapping(line) for line in mapping_lines(fd)]


def mapped_bytes(mapping: Mapping) -> bytes:
    """
    Copy the bytes of a mapping of this process.

    Args:
        mapping: One of :func:`mapping_lines` that is still there; another ends the process.

    Raises:
        ArgumentError: It cannot be read.

    """
    if "r" not in mapping.permissions:
        raise ArgumentError("a mapping cannot be read", found=mapping.permissions)
    return bytes(ffi.buffer(ffi.cast("char *", mapping.start), mapping.end - mapping.start))


def mapping_text(fd: int | None = None) -> bytes:
    """Return what :func:`mappings` reads, a line a mapping, as the kernel wrote it."""
    own = open_mappings() if fd is None else fd
    # The kernel gives a page or less at a time: a buffer for each of these would be most of it.
    buffer = bytearray(_MAPPINGS)
    length = 0
    try:
        os.lseek(own, 0, os.SEEK_SET)
        while True:
            with memoryview(buffer) as view, view[length:] as rest:
                got = os.readv(own, (rest,))
            if got == 0:
                break
            length += got
            if length == len(buffer):
                buffer.extend(bytes(len(buffer)))
    finally:
        if fd is None:
            os.close(own)
    # The kernel writes a line feed in a name as "\012", so a line is a mapping. Only "\n" ends
    # one: splitlines() would also break at the other characters that a name may hold.
    return bytes(memoryview(buffer)[:length])


def mapping_lines(fd: int | None = None) -> list[bytes]:
    """Return the lines that :func:`mappings` reads; comparing them is cheaper than reading them."""
    return _core.new_lines(b"", mapping_text(fd))


def parse_mapping(line: bytes) -> Mapping:
    """Read one line of :func:`mapping_lines`."""
    span, permissions, offset, device, inode, *path = line.split(None, 5)
    start, _, end = span.partition(b"-")
    major, _, minor = device.partition(b":")
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        permissions=permissions.decode("ascii"),
        offset=int(offset, 16),
        device=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=os.fsdecode(path[0]) if path else "",
    )


# ---- secret memory ---------------------------------------------------------------------------


def memory_lock_limit() -> tuple[int | None, int | None]:
    """Return how many bytes may be locked, soft and hard limit; None: without limit."""
    soft, hard = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _check(lib.pye_secmem_limit(soft, hard), "reading RLIMIT_MEMLOCK")
    unlimited = (1 << 64) - 1
    return (
        None if soft[0] == unlimited else int(soft[0]),
        None if hard[0] == unlimited else int(hard[0]),
    )
