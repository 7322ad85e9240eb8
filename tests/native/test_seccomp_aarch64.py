"""The filters that AArch64 gets: every call number of its own table, by an interpreter."""

from __future__ import annotations

from pathlib import Path

import aarch64_tools
import pytest
from seccomp_bpf import ALLOW, ENOSYS, EPERM, KILL, Program, execute

# Emulated programs do not run with the sanitizers' libraries preloaded.
pytestmark = pytest.mark.no_asan

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O1", "-Dsyscall=captured_syscall", "-Dgetpid=captured_getpid"]

NATIVE = 0xC00000B7  # AUDIT_ARCH_AARCH64
# Of AArch32, of x86-64 and of machines with the other byte order.
FOREIGN = (0x40000028, 0xC000003E, 0x800000B7, 0x40000003, 0, 0xFFFFFFFF)

# include/uapi/asm-generic/unistd.h, by hand: what may be called whatever the arguments.
ALWAYS = {
    "getcwd": 17, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "ftruncate": 46,
    "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
    "pwrite64": 68, "preadv": 69, "pwritev": 70, "pselect6": 72, "ppoll": 73, "fstat": 80,
    "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101,
    "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
    "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "uname": 160, "getcpu": 168, "gettimeofday": 169,
    "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177,
    "gettid": 178, "sendto": 206, "recvfrom": 207, "shutdown": 210, "sendmsg": 211, "recvmsg": 212,
    "brk": 214, "munmap": 215, "mremap": 216, "msync": 227, "mlock": 228, "munlock": 229,
    "madvise": 233, "getrandom": 278, "rseq": 293, "memfd_secret": 447,
}  # fmt: skip
THREAD = 0x3D0F00
# Calls that are judged by an argument: arguments, and what must come of them. PROT_BTI is 0x10.
JUDGED: dict[int, list[tuple[tuple[int, ...], int]]] = {
    222: [((0, 0, 3), ALLOW), ((0, 0, 4), EPERM), ((0, 0, 0x14), EPERM), ((0, 0, 0), ALLOW)],
    226: [((0, 0, 1), ALLOW), ((0, 0, 5), EPERM), ((0, 0, 0x15), EPERM), ((0, 0, 0x11), ALLOW)],
    29: [((0, 0x5421), ALLOW), ((0, 0x5412), EPERM), ((0, 0), EPERM)],
    220: [((THREAD,), ALLOW), ((THREAD | 0x400000,), ALLOW), ((17,), EPERM), ((0,), EPERM)]
    + [((THREAD ^ 1 << bit,), EPERM) for bit in range(32) if bit != 22],
    25: [
        ((0, command), ALLOW if command in (1, 2, 3, 4, 1030, 1034) else EPERM)
        for command in range(1100)
    ],
    # Refused among others: 54 PR_PAC_RESET_KEYS, 55 PR_SET_TAGGED_ADDR_CTRL.
    167: [((option,), ALLOW if option in (3, 15, 16, 21, 39) else EPERM) for option in range(100)]
    + [((0x53564D41,), ALLOW), ((0x59616D61,), EPERM)],
    131: [((1,), EPERM), ((0,), EPERM), ((0xFFFFFFFF,), EPERM)],
    79: [((0, 0, 0, 0x1000), ALLOW), ((0, 0, 0, 0), EPERM), ((0, 0, 0, 0x1100), EPERM)],
    261: [
        ((0, 7, 0, 9), ALLOW),
        ((1, 7, 0, 9), EPERM),
        ((0, 7, 9, 0), EPERM),
        ((0, 7, 1 << 32, 0), EPERM),
    ],
    435: [((0, 0), ENOSYS), ((1, 2, 3, 4, 5, 6), ENOSYS)],
}
# What changes for images that ask for sealed memory, and nothing else does. Own process: 4242.
SEALED: dict[int, list[tuple[tuple[int, ...], int]]] = {
    29: [
        ((0, 0x5421), ALLOW),
        *[((0, request), ALLOW) for request in (0xC018AA3F, 0xC020AA00, 0xC020AA04, 0xC020AA07)],
        # Unregistering, waking, copying, protecting, poisoning, moving; and a terminal's.
        *[
            ((0, request), EPERM)
            for request in (0x8010AA01, 0x8010AA02, 0xC028AA03, 0xC018AA06, 0xC020AA08, 0xC028AA05)
        ],
        ((0, 0xAA00), EPERM),  # of /dev/userfaultfd: a descriptor with more rights
        ((0, 0x5412), EPERM),
    ],
    25: [
        ((0, command), ALLOW if command in (1, 2, 3, 4, 1030, 1033, 1034) else EPERM)
        for command in range(1100)
    ],
    282: [
        ((0x80001,), ALLOW),  # O_CLOEXEC, UFFD_USER_MODE_ONLY
        *[((0x80001 ^ 1 << bit,), EPERM) for bit in range(32)],
    ],
    279: [
        ((7, 3), ALLOW),  # MFD_CLOEXEC, MFD_ALLOW_SEALING
        ((7, 11), ALLOW),  # MFD_NOEXEC_SEAL besides
        *[((7, 3 ^ 1 << bit), EPERM) for bit in range(32) if bit != 3],
    ],
    434: [((4242, 0), ALLOW), ((1, 0), EPERM), ((0, 0), EPERM), ((0xFFFFFFFF, 0), EPERM)],
    440: [((5, 0, 1, advice, 0), ALLOW if advice in (4, 24) else EPERM) for advice in range(128)],
    284: [((0, 4096, 1), ALLOW), ((0, 4096, 0), EPERM), ((0, 4096, 2), EPERM)],
}
# Refused while an image loads; everything else may still be called then.
LOADING = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
    "fremovexattr": 16, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "fchmod": 52,
    "fchmodat": 53, "fchownat": 54, "fchown": 55, "utimensat": 88, "personality": 92,
    "unshare": 97, "ptrace": 117, "bind": 200, "connect": 203, "add_key": 217, "request_key": 218,
    "keyctl": 219, "execve": 221, "perf_event_open": 241, "name_to_handle_at": 264,
    "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
    "bpf": 280, "execveat": 281, "userfaultfd": 282, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsmount": 432, "pidfd_getfd": 438, "mount_setattr": 442, "fchmodat2": 452,
    "setxattrat": 463, "removexattrat": 466, "file_setattr": 469,
}  # fmt: skip
NUMBERS = [*range(1001), 0xFFFF, 0x3FFFFFFF, 0x40000000, 0x40000001, 0x7FFFFFFF, 0xFFFFFFFF]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Return the filter that the project's own sources make for AArch64, without setting it."""
    aarch64_tools.need()
    program = aarch64_tools.build(
        tmp_path_factory.mktemp("seccomp") / "seccomp_program",
        [ROOT / "tests/native/seccomp_program.c", ROOT / "csrc/src/linux/seccomp.c"],
        FLAGS,
    )

    def run(*arguments: str) -> Program:
        done = aarch64_tools.run(program, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    return run


@pytest.mark.parametrize("flags", ["0", "1", "2", "3"])
def test_PRC_08_aarch64_allows_exactly_the_calls_of_the_list(made, flags: str) -> None:
    """Both directions, for every number: nothing that is not listed, everything that is."""
    program = made("closed", flags)
    allowed = set(ALWAYS.values())
    judged = JUDGED.keys() | (SEALED.keys() if int(flags) & 2 else set())
    wrong = {}
    for number in NUMBERS:
        if number in judged:
            continue
        for arguments in ((), (0xFFFFFFFFFFFFFFFF,) * 6):
            found = execute(program, number, arguments, arch=NATIVE)
            if found != (ALLOW if number in allowed else EPERM):
                wrong[number] = found
    assert wrong == {}
    assert len(allowed) == len(ALWAYS)
    assert not allowed & judged


@pytest.mark.parametrize("number", JUDGED)
def test_PRC_08_aarch64_judges_calls_by_their_argument(made, number: int) -> None:
    program = made("closed", "0")
    for arguments, expected in JUDGED[number]:
        assert execute(program, number, arguments, arch=NATIVE) == expected, arguments


def test_PRC_08_only_the_jit_flag_allows_executable_memory_on_aarch64(made) -> None:
    program = made("closed", "1")
    for number in (222, 226):
        assert execute(program, number, (0, 0, 7), arch=NATIVE) == ALLOW
    for number in JUDGED.keys() - {222, 226}:
        for arguments, expected in JUDGED[number]:
            assert execute(program, number, arguments, arch=NATIVE) == expected


@pytest.mark.parametrize("number", JUDGED.keys() | SEALED.keys())
def test_PRC_08_aarch64_allows_the_pager_of_sealed_memory_no_more(made, number: int) -> None:
    program = made("closed", "2")
    for arguments, expected in SEALED.get(number) or JUDGED[number]:
        assert execute(program, number, arguments, arch=NATIVE) == expected, arguments


@pytest.mark.parametrize("which", [("closed", "0"), ("closed", "1"), ("closed", "2"), ("loading",)])
def test_PRC_08_aarch64_kills_calls_of_32_bit_and_foreign_programs(made, which) -> None:
    program = made(*which)
    assert program[0] == (0x20, 0, 0, 4)  # first of all `arch` is loaded
    for arch in FOREIGN:
        assert {execute(program, number, arch=arch) for number in NUMBERS} == {KILL}


def test_PRC_08_while_an_image_loads_aarch64_refuses_what_is_listed(made) -> None:
    program = made("loading")
    refused = {n for n in NUMBERS if execute(program, n, arch=NATIVE) == EPERM}
    assert refused == set(LOADING.values())
    assert {execute(program, n, arch=NATIVE) for n in NUMBERS if n not in refused} == {ALLOW}
    for arguments, expected in SEALED[282]:
        assert execute(program, 282, arguments, arch=NATIVE) == expected, arguments


@pytest.mark.parametrize("which", [("closed", "0"), ("closed", "1"), ("closed", "2"), ("loading",)])
def test_every_jump_of_a_filter_for_aarch64_lands_inside_it(made, which) -> None:
    program = made(*which)
    assert len(program) <= 256
    assert program[-1][0] == 0x06
    for at, (code, yes, no, _) in enumerate(program):
        if code & 7 == 5:
            assert at + 1 + max(yes, no) < len(program)
