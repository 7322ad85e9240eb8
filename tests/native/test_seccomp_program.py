"""The filters themselves: every call number, by an interpreter of what the kernel would run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from seccomp_bpf import ALLOW, ENOSYS, EPERM, KILL, Program, execute

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu11", "-O2", "-I", str(ROOT / "csrc/include"), "-I", str(ROOT / "csrc/src")]

RENAMED = ["-Dsyscall=captured_syscall", "-Dgetpid=captured_getpid"]

NATIVE = 0xC000003E
X32 = 0x40000000

pytestmark = pytest.mark.skipif(
    os.uname().sysname != "Linux" or os.uname().machine != "x86_64",
    reason="numbers are those of x86-64 Linux",
)

# Allowed whatever their arguments: read off the filter when it still compared one by one.
# fmt: off
ALWAYS = frozenset((
    0, 1, 3, 5, 7, 8, 11, 12, 13, 14, 15, 17, 18, 19, 20, 23, 24, 25, 26, 28, 35, 39, 44, 45, 46,
    47, 48, 60, 63, 77, 79, 96, 102, 104, 107, 108, 110, 131, 149, 150, 186, 201, 202, 204, 219,
    228, 229, 230, 231, 232, 233, 270, 271, 273, 281, 291, 295, 296, 309, 318, 334, 447,
))
# fmt: on
THREAD = 0x3D0F00
# Calls that are judged by an argument: arguments, and what must come of them.
JUDGED: dict[int, list[tuple[tuple[int, ...], int]]] = {
    9: [((0, 0, 3), ALLOW), ((0, 0, 4), EPERM), ((0, 0, 7), EPERM), ((0, 0, 0), ALLOW)],
    10: [((0, 0, 1), ALLOW), ((0, 0, 5), EPERM), ((0, 0, 0xFFFFFFFB), ALLOW)],
    16: [((0, 0x5421), ALLOW), ((0, 0x5412), EPERM), ((0, 0), EPERM)],
    56: [((THREAD,), ALLOW), ((THREAD | 0x400000,), ALLOW), ((17,), EPERM), ((0,), EPERM)]
    + [((THREAD ^ 1 << bit,), EPERM) for bit in range(32) if bit != 22],
    72: [
        ((0, command), ALLOW if command in (1, 2, 3, 4, 1030, 1034) else EPERM)
        for command in range(1100)
    ],
    157: [((option,), ALLOW if option in (3, 15, 16, 21, 39) else EPERM) for option in range(100)]
    + [((0x53564D41,), ALLOW), ((0x59616D61,), EPERM)],
    234: [((1,), EPERM), ((0,), EPERM), ((0xFFFFFFFF,), EPERM)],
    262: [((0, 0, 0, 0x1000), ALLOW), ((0, 0, 0, 0), EPERM), ((0, 0, 0, 0x1100), EPERM)],
    302: [
        ((0, 7, 0, 9), ALLOW),
        ((1, 7, 0, 9), EPERM),
        ((0, 7, 9, 0), EPERM),
        ((0, 7, 1 << 32, 0), EPERM),
    ],
    435: [((0, 0), ENOSYS), ((1, 2, 3, 4, 5, 6), ENOSYS)],
}
# What changes for images that ask for sealed memory, and nothing else does. Own process: 4242.
SEALED: dict[int, list[tuple[tuple[int, ...], int]]] = {
    16: [
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
    72: [
        ((0, command), ALLOW if command in (1, 2, 3, 4, 1030, 1033, 1034) else EPERM)
        for command in range(1100)
    ],
    323: [
        ((0x80001,), ALLOW),  # O_CLOEXEC, UFFD_USER_MODE_ONLY
        *[((0x80001 ^ 1 << bit,), EPERM) for bit in range(32)],
    ],
    319: [
        ((7, 3), ALLOW),  # MFD_CLOEXEC, MFD_ALLOW_SEALING
        ((7, 11), ALLOW),  # MFD_NOEXEC_SEAL besides
        *[((7, 3 ^ 1 << bit), EPERM) for bit in range(32) if bit != 3],
    ],
    434: [((4242, 0), ALLOW), ((1, 0), EPERM), ((0, 0), EPERM), ((0xFFFFFFFF, 0), EPERM)],
    440: [((5, 0, 1, advice, 0), ALLOW if advice in (4, 24) else EPERM) for advice in range(128)],
    325: [((0, 4096, 1), ALLOW), ((0, 4096, 0), EPERM), ((0, 4096, 2), EPERM)],
}
# Numbers around everything that means something; the kernel hands over 32 bits.
NUMBERS = [*range(1001), 0xFFFF, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
NUMBERS += [X32 | number for number in range(1001)]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Return the filter that the project's own sources make, without setting it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("seccomp")
    source = ROOT / "csrc/src/linux/seccomp.c"
    renamed = [compiler, *FLAGS, *RENAMED, "-c", str(source)]
    subprocess.run([*renamed, "-o", str(folder / "seccomp.o")], check=True)
    program = folder / "seccomp_program"
    main = str(ROOT / "tests/native/seccomp_program.c")
    subprocess.run(
        [compiler, *FLAGS, main, str(folder / "seccomp.o"), "-o", str(program)], check=True
    )

    def run(*arguments: str) -> Program:
        process = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
        rows = [tuple(map(int, line.split())) for line in process.stdout.splitlines()]
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    return run


@pytest.mark.parametrize("flags", ["0", "1", "2", "3"])
def test_PRC_08_exactly_the_calls_of_the_list_are_always_allowed(made, flags: str) -> None:
    """Both directions, for every number: nothing that is not listed, everything that is."""
    program = made("closed", flags)
    judged = JUDGED.keys() | (SEALED.keys() if int(flags) & 2 else set())
    wrong = {}
    for number in NUMBERS:
        if number in judged:
            continue
        expected = KILL if number >= X32 else ALLOW if number in ALWAYS else EPERM
        for arguments in ((), (0xFFFFFFFFFFFFFFFF,) * 6):
            found = execute(program, number, arguments, arch=NATIVE)
            if found != expected:
                wrong[number] = found
    assert wrong == {}
    assert not ALWAYS & judged


@pytest.mark.parametrize("number", JUDGED)
def test_PRC_08_judged_calls_are_judged_by_their_argument(made, number: int) -> None:
    program = made("closed", "0")
    for arguments, expected in JUDGED[number]:
        assert execute(program, number, arguments, arch=NATIVE) == expected, arguments


def test_PRC_08_only_the_jit_flag_allows_executable_memory(made) -> None:
    program = made("closed", "1")
    for number in (9, 10):
        assert execute(program, number, (0, 0, 7), arch=NATIVE) == ALLOW
    for number in JUDGED.keys() - {9, 10}:
        for arguments, expected in JUDGED[number]:
            assert execute(program, number, arguments, arch=NATIVE) == expected


@pytest.mark.parametrize("number", JUDGED.keys() | SEALED.keys())
def test_PRC_08_sealed_memory_allows_what_its_pager_needs_and_no_more(made, number: int) -> None:
    """By argument, each; and with it executable memory is refused as before."""
    program = made("closed", "2")
    for arguments, expected in SEALED.get(number) or JUDGED[number]:
        assert execute(program, number, arguments, arch=NATIVE) == expected, arguments


@pytest.mark.parametrize("which", [("closed", "0"), ("closed", "1"), ("closed", "2"), ("loading",)])
def test_PRC_08_the_architecture_is_looked_at_before_any_number(made, which) -> None:
    """First of all: numbers mean other calls elsewhere, so none of them may be allowed."""
    program = made(*which)
    assert program[0][0] == 0x20
    assert program[0][3] == 4  # offset of `arch`
    for arch in (0x40000003, 0xC00000B7, 0x4000003E, 0, 0xFFFFFFFF):
        assert {execute(program, number, arch=arch) for number in NUMBERS} == {KILL}


def test_PRC_08_while_an_image_loads_x32_is_killed_and_what_is_listed_refused(made) -> None:
    program = made("loading")
    found = {number: execute(program, number, arch=NATIVE) for number in NUMBERS}
    assert {value for number, value in found.items() if number >= X32} == {KILL}
    assert {value for number, value in found.items() if number < X32} == {ALLOW, EPERM}
    for number in (42, 49, 59, 90, 101, 161, 165, 248, 272, 310, 321, 322, 425, 438, 452):
        assert found[number] == EPERM
    for number in (0, 1, 9, 10, 257, 317, 444):
        assert found[number] == ALLOW
    # What the pager of sealed memory opens once the sandbox is closed, and nothing like it.
    for arguments, expected in SEALED[323]:
        assert execute(program, 323, arguments, arch=NATIVE) == expected, arguments


@pytest.mark.parametrize("which", [("closed", "0"), ("closed", "1"), ("closed", "2"), ("loading",)])
def test_every_jump_of_a_filter_lands_inside_it(made, which) -> None:
    """And the last step is a return, so that every way through the program ends in one."""
    program = made(*which)
    assert len(program) <= 256
    assert program[-1][0] == 0x06
    for at, (code, yes, no, _) in enumerate(program):
        if code & 7 == 5:
            assert at + 1 + max(yes, no) < len(program)


def test_the_longest_way_through_the_filter_is_short(made) -> None:
    """The kernel tries every number when the filter is set: most of closing a sandbox."""

    def steps(program: Program, at: int) -> int:
        code, yes, no, _ = program[at]
        if code == 0x06:
            return 1
        if code & 7 == 5:
            return 1 + max(steps(program, at + 1 + yes), steps(program, at + 1 + no))
        return 1 + steps(program, at + 1)

    # 21 for the calls that are judged by an argument, 4 at the head, and the search.
    assert steps(made("closed", "0"), 0) <= 34
    assert steps(made("closed", "2"), 0) <= 39
