"""
Protected libraries behind a real protection key. CPUs without one skip this file; ``.ci/protected``
runs it on an emulated CPU that has them, and with gates that are broken.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from failing import every_failure, needs_the_test_build
from protected_files import NO_KEY, files, new, try_new

from pyenclave import ProtectedLibrary, _core
from pyenclave._ffi import ffi, lib
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    EcallError,
    EnclaveClosedError,
    EnclaveStateError,
    ImageError,
    ProtectionError,
)

pytestmark = pytest.mark.skipif(bool(NO_KEY), reason=NO_KEY)

SECRET = b"what only the library may read, sixty-four bytes of it exactly.."
PLACES = ("variable", "zeroed variable", "memory", "stack", "input", "output")
LIBC = ctypes.CDLL(None, use_errno=True)
LEAVE_SIGNALS = 1
PKU = next(1 << bit for bit in range(32)
           if lib.pye_cpu_feature_name(1 << bit) != ffi.NULL
           and ffi.string(lib.pye_cpu_feature_name(1 << bit)) == b"pku")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files(tmp_path_factory.mktemp("protected"))


@pytest.fixture(scope="module")
def probe(made: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(made / "probe.so"))


@pytest.fixture
def library(made: Path) -> Iterator[ProtectedLibrary]:
    with ProtectedLibrary(made / "library.so", memory="64 KiB") as library:
        yield library


def places(answer: bytes) -> dict[str, int]:
    return dict(zip(PLACES, struct.unpack("6Q", answer), strict=True))


def fault(address: int, size: int = 64) -> int:
    """Return how the kernel, which heeds the thread's keys, refuses to read there; 0: it reads."""
    reader, writer = os.pipe()
    try:
        done = LIBC.write(writer, ctypes.c_void_p(address), ctypes.c_size_t(size))
        return ctypes.get_errno() if done != size else 0
    finally:
        os.close(reader)
        os.close(writer)


def write_fault(address: int) -> int:
    """As :func:`fault`, of writing."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"x" * 8)
        done = LIBC.read(reader, ctypes.c_void_p(address), ctypes.c_size_t(8))
        return ctypes.get_errno() if done != 8 else 0
    finally:
        os.close(reader)
        os.close(writer)


def shut(pkru: int) -> bool:
    """Tell whether every key but the ordinary one forbids access."""
    return pkru & 0x55555554 == 0x55555554


# ---- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4096, 131072])
def test_a_function_gets_its_input_and_answers(library: ProtectedLibrary, size: int) -> None:
    data = os.urandom(size)
    assert library.echo(data) == data
    assert library.call("echo", memoryview(data)) == data
    assert library.echo(bytearray(data)) == data


def test_statuses_are_those_of_native_functions(library: ProtectedLibrary) -> None:
    with pytest.raises(ArgumentError, match="refuses its input"):
        library.status(b"short")
    with pytest.raises(ArgumentError, match="refuses a length"):
        library.status(struct.pack("i", 2))
    for status in (1042, -1, 19):
        with pytest.raises(EcallError) as info:
            library.status(struct.pack("i", status))
        assert info.value.type == f"status {status}"


def test_an_input_or_answer_beyond_the_message_is_refused(made: Path) -> None:
    with ProtectedLibrary(made / "library.so", message=4096) as library:
        assert len(library.echo(bytes(4096))) == 4096
        with pytest.raises(ArgumentError, match="longer than a message"):
            library.echo(bytes(4097))
        with pytest.raises(ArgumentError, match="refuses a length"):
            library.too_much(b"")


def test_what_a_refusing_function_wrote_is_not_answered_later(made: Path) -> None:
    with ProtectedLibrary(made / "library.so", threads=1) as library:
        for refuse in (
            lambda: library.status(struct.pack("i", 7)),
            lambda: library.too_much(b""),
        ):
            with pytest.raises((EcallError, ArgumentError)):
                refuse()
            assert library.leftover(b"") == bytes(1000)


def test_memory_ends_where_it_was_said_to_end(made: Path) -> None:
    for size in (0, 8192, 1 << 20):
        with ProtectedLibrary(made / "library.so", memory=size) as library:
            assert struct.unpack("Q", library.take_all(b""))[0] == size
            assert places(library.keep(SECRET))["memory"] == 0


def test_each_loading_is_a_library_of_its_own(made: Path, library: ProtectedLibrary) -> None:
    library.keep(SECRET)
    with ProtectedLibrary(made / "library.so") as other:
        assert other.kept(b"").startswith(b"as it was loaded\0")
    assert library.kept(b"") == SECRET


def test_only_a_buffer_is_an_argument(library: ProtectedLibrary) -> None:
    for wrong in ("text", 5, None):
        with pytest.raises(TypeError):
            library.echo(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        library.echo()  # type: ignore[call-arg]


# ---- what the rest of the process sees ---------------------------------------------------------


def test_nothing_of_the_library_can_be_read_or_written(library: ProtectedLibrary) -> None:
    """System calls of this thread fault on each place; one before the load read it."""
    found = places(library.keep(SECRET))
    for name, address in found.items():
        assert fault(address) == errno.EFAULT, name
        assert write_fault(address) == errno.EFAULT, name
    assert library.kept(b"") == SECRET
    assert fault(ctypes.addressof(ctypes.create_string_buffer(64))) == 0


def test_reading_it_in_place_is_a_fault(made: Path, in_child: Any) -> None:
    """A stray pointer, here of ctypes, ends the process that follows it."""

    def follow(name: str) -> int:
        library = ProtectedLibrary(made / "library.so")
        ctypes.string_at(places(library.keep(SECRET))[name], 1)
        return 0

    for name in PLACES:
        assert in_child(follow, name).signal == signal.SIGSEGV, name


def test_the_gate_reads_and_writes_nothing_there_for_its_caller(library: ProtectedLibrary) -> None:
    """It has the key open while it copies: a wrong address must not become an input."""
    found = places(library.keep(SECRET))
    for address in found.values():
        page = address // 4096 * 4096
        for start, size in ((address, 64), (address - 32, 64), (page - 8, 9), (page + 4095, 1)):
            wrong = (ctypes.c_char * size).from_address(start)
            with pytest.raises(ArgumentError, match="behind the library's own key"):
                library.echo(wrong)
    assert library.kept(b"") == SECRET


def test_core_dumps_have_nothing_of_it(library: ProtectedLibrary) -> None:
    for name, address in places(library.keep(SECRET)).items():
        assert "dd" in flags_at(address), name


def flags_at(address: int) -> list[str]:
    """Return what the kernel tells of a mapping (VmFlags of proc_pid_smaps(5))."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8") as maps:
        for line in maps:
            word = line.split()[0]
            if not word.endswith(":"):
                low, high = (int(number, 16) for number in word.split("-"))
                inside = low <= address < high
            elif inside and word == "VmFlags:":
                return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_other_threads_have_the_key_shut(made: Path) -> None:
    """One that was there before, and one that comes after, also while a call runs."""
    go, ready = threading.Event(), threading.Event()
    found: list[Any] = []

    def before() -> None:
        ready.set()
        go.wait(60)
        found.extend(fault(address) for address in targets.values())

    old = threading.Thread(target=before)
    old.start()
    assert ready.wait(60)
    with ProtectedLibrary(made / "library.so") as library, Waiting(library):
        targets = places(library.keep(SECRET))
        new = threading.Thread(target=lambda: found.append(fault(targets["variable"])))
        new.start()
        new.join(60)
        go.set()
        old.join(60)
    assert found == [errno.EFAULT] * 7


def test_the_key_is_shut_before_and_after_each_call(
    library: ProtectedLibrary, probe: ctypes.CDLL
) -> None:
    probe.probe_pkru.restype = ctypes.c_uint32
    calls: list[Callable[[], object]] = [
        lambda: library.echo(b""),
        lambda: library.echo(bytes(100000)),
        lambda: library.status(struct.pack("i", 9)),
        lambda: library.echo(bytes(1 << 18)),
    ]
    assert shut(probe.probe_pkru())
    for call in calls:
        with suppress(EcallError, ArgumentError):
            call()
        assert shut(probe.probe_pkru())


def test_the_stack_is_the_librarys_own(library: ProtectedLibrary) -> None:
    found = places(library.keep(SECRET))
    assert 0 < found["input"] - found["stack"] < 256 << 10
    assert fault(found["stack"]) == errno.EFAULT


def test_a_stack_that_is_too_deep_ends_the_process_at_a_guard(made: Path, in_child: Any) -> None:
    def deep(pages: int) -> int:
        library = ProtectedLibrary(made / "library.so", stack="64 KiB", threads=2)
        library.echo(b"")
        return len(library.deep(struct.pack("Q", pages)))

    assert in_child(deep, 8).result() == 8
    assert in_child(deep, 40).signal == signal.SIGSEGV


# ---- the gate itself, below the bindings -------------------------------------------------------


@pytest.fixture
def code(probe: ctypes.CDLL) -> Iterator[Any]:
    """``probe_fill`` behind a key, by the C interface."""
    code = new(functions=(ctypes.cast(probe.probe_fill, ctypes.c_void_p).value,))
    yield code
    assert lib.pye_protect_free(code, 0) == lib.PYE_OK


@pytest.fixture
def told_less() -> Iterator[None]:
    """A core that is told to use nothing but keys; the library is told nothing."""
    lib.pye_cpu_set_mask(PKU)
    yield
    lib.pye_cpu_set_mask(0xFFFFFFFF)


@pytest.fixture
def silent(probe: ctypes.CDLL) -> Iterator[Any]:
    """As ``code``, but without a system call after the registers were cleared: that of the test
    build has a name made for it, by functions that change vector registers.
    """
    function = ctypes.cast(probe.probe_fill, ctypes.c_void_p).value
    code = new(functions=(function,), flags=LEAVE_SIGNALS)
    yield code
    assert lib.pye_protect_free(code, 0) == lib.PYE_OK


def test_registers_are_cleared_that_the_core_does_not_use(
    told_less: None, silent: Any, probe: ctypes.CDLL
) -> None:
    test_no_register_keeps_what_the_function_left(silent, probe)


def test_no_register_keeps_what_the_function_left(silent: Any, probe: ctypes.CDLL) -> None:
    code = silent
    registers = (ctypes.c_uint8 * 2624)(*[1] * 2624)
    where, answer = ctypes.c_uint64(), ctypes.c_int32(-1)
    run = int(ffi.cast("uintptr_t", ffi.addressof(lib, "pye_protect_run")))
    status = probe.probe_run(
        ctypes.c_void_p(run), ctypes.c_void_p(int(ffi.cast("uintptr_t", code))), 0, 0,
        ctypes.byref(answer), ctypes.byref(where), registers,
    )  # fmt: skip
    assert (status, answer.value) == (0, 0)
    # What the core itself does after it has cleared them may be there.
    assert b"\xa5" * 4 not in bytes(registers)[:2112]
    assert b"\0" * 16 in bytes(registers)[:2112]
    image = bytes(registers)[2112:]  # of FXSAVE
    assert image[32:160] == bytes(128)  # x87
    assert image[24:28] == struct.pack("I", 0x1F80)  # MXCSR, as before
    assert fault(where.value) == errno.EFAULT  # its stack


def test_a_function_or_slot_that_is_not_there_is_refused(code: Any) -> None:
    answer, length = ffi.new("int32_t *"), ffi.new("size_t *", 5)
    out = ffi.new("uint8_t[64]")

    def run(slot: int, function: int, room: int = 4096) -> int:
        return int(lib.pye_protect_run(code, slot, function, answer, out, 64, length, out, room))

    assert run(1, 0) == lib.PYE_OK
    assert length[0] == 8
    for slot, function, room, status in (
        (2, 0, 0, lib.PYE_E_ARGUMENT),
        (0, 1, 0, lib.PYE_E_ARGUMENT),
        (0, 0, 4097, lib.PYE_E_LENGTH),
    ):
        assert run(slot, function, room) == status
        assert (answer[0], length[0]) == (lib.PYE_E_STATE, 0)


def test_answers_are_not_written_behind_the_key() -> None:
    """A wrong address for an answer: neither in the slots, nor in a range."""
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    answer, length = ffi.new("int32_t *"), ffi.new("size_t *")
    mine = ffi.new("uint8_t[64]")
    before = set(mappings())
    fill = ctypes.CDLL(None).getpid  # never called
    code = new(functions=(ctypes.cast(fill, ctypes.c_void_p).value,), ranges=((address, 4096),))
    added = [tuple(int(part, 16) for part in line.split("-")) for line in mappings()
             if line not in before]  # fmt: skip
    low, high = min(row[0] for row in added), max(row[1] for row in added)
    try:
        for start in (address, address + 4095, low, high - 1, address - 63):
            out = ffi.cast("uint8_t *", start)
            assert lib.pye_protect_run(code, 0, 0, answer, out, 64, length, mine, 0) == (
                lib.PYE_E_ARGUMENT
            )
            assert lib.pye_protect_answer(code, 0, out, 64) == lib.PYE_E_ARGUMENT
            assert lib.pye_protect_run(code, 0, 0, answer, mine, 64, length, out, 64) == (
                lib.PYE_E_ARGUMENT
            )
        assert lib.pye_protect_answer(code, 0, ffi.cast("uint8_t *", address), 0) == lib.PYE_OK
    finally:
        assert lib.pye_protect_free(code, 0) == lib.PYE_OK


def test_more_than_was_answered_is_not_given_out(code: Any) -> None:
    answer, length = ffi.new("int32_t *"), ffi.new("size_t *")
    out = ffi.new("uint8_t[64]")
    assert lib.pye_protect_answer(code, 0, out, 1) == lib.PYE_E_LENGTH
    assert lib.pye_protect_run(code, 0, 0, answer, out, 0, length, out, 0) == lib.PYE_OK
    assert lib.pye_protect_answer(code, 0, out, length[0]) == lib.PYE_OK
    assert lib.pye_protect_answer(code, 0, out, length[0] + 1) == lib.PYE_E_LENGTH
    assert lib.pye_protect_answer(code, 2, out, 0) == lib.PYE_E_ARGUMENT


def test_slots_are_taken_once(code: Any) -> None:
    slot = ffi.new("uint32_t *")
    for expected in (0, 1):
        assert lib.pye_protect_take(code, slot) == lib.PYE_OK
        assert slot[0] == expected
    assert lib.pye_protect_take(code, slot) == lib.PYE_E_BUSY
    assert lib.pye_protect_free(code, 0) == lib.PYE_E_BUSY
    assert lib.pye_protect_free(code, 1) == lib.PYE_E_BUSY
    lib.pye_protect_give(code, 0)
    assert lib.pye_protect_take(code, slot) == lib.PYE_OK
    for number in (0, 1):
        lib.pye_protect_give(code, number)


def test_ranges_that_are_not_mapped_leave_nothing_behind() -> None:
    for _ in range(40):
        assert try_new(ranges=((4096, 4096),))[0] == lib.PYE_E_NO_MEMORY
    assert lib.pye_protect_free(new(), 0) == lib.PYE_OK


def test_freeing_nothing_is_nothing() -> None:
    assert lib.pye_protect_free(ffi.NULL, 0) == lib.PYE_OK


# ---- signals -----------------------------------------------------------------------------------


def handled(probe: ctypes.CDLL) -> tuple[int, int, int]:
    pkru, stack = ctypes.c_uint32(), ctypes.c_uint64()
    return probe.probe_handled(ctypes.byref(pkru), ctypes.byref(stack)), pkru.value, stack.value


def test_a_signal_waits_for_the_end_of_the_call(
    library: ProtectedLibrary, probe: ctypes.CDLL
) -> None:
    """Its handler runs when the key is shut, on the thread's own stack."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert probe.probe_handle(signal.SIGUSR1, 0) == 0
        for count in range(1, 4):
            answer = library.signal(struct.pack("i", signal.SIGUSR1))
            assert struct.unpack("Q", answer)[0] == sum(range(256)) * 2
            found, pkru, stack = handled(probe)
            assert (found, shut(pkru)) == (count, True)
            assert fault(stack, 1) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_left_signals_need_a_stack_of_their_own(
    made: Path, probe: ctypes.CDLL, in_child: Any
) -> None:
    """With one, the handler runs during the call, the key shut; without, the process ends."""

    def call(alternate: bool) -> list[int]:
        library = ProtectedLibrary(made / "library.so", signals="leave")
        probe.probe_handle(signal.SIGUSR1, int(alternate))
        if alternate:
            assert probe.probe_alternate() == 0
        answer = library.signal(struct.pack("i", signal.SIGUSR1))
        count, pkru, _ = handled(probe)
        variable = places(library.keep(SECRET))["variable"]
        return [struct.unpack("Q", answer)[0], count, int(shut(pkru)), fault(variable)]

    assert in_child(call, True).result() == [sum(range(256)) * 2, 1, 1, errno.EFAULT]
    assert in_child(call, False).signal == signal.SIGSEGV


def test_a_storm_of_signals_changes_no_answer(library: ProtectedLibrary) -> None:
    """A Python handler every half millisecond, and calls until it ran 200 times."""
    count = 0

    def handle(number: int, frame: object) -> None:
        nonlocal count
        count += 1

    data = os.urandom(4096)
    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        calls = 0
        while count < 200:
            assert struct.unpack("Q", library.busy(data))[0] == 100 * sum(data)
            assert library.echo(data) == data
            calls += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls


# ---- threads, forks, ends ----------------------------------------------------------------------


class Waiting:
    """A call that runs, in a thread of its own, until the block ends."""

    def __init__(self, library: ProtectedLibrary) -> None:
        self.library = library

    def __enter__(self) -> None:
        self.go, self.began = os.pipe(), os.pipe()
        data = struct.pack("2i", self.go[0], self.began[1])
        self.answers: list[bytes] = []
        self.thread = threading.Thread(target=lambda: self.answers.append(self.library.wait(data)))
        self.thread.start()
        assert os.read(self.began[0], 1) == b"w"

    def __exit__(self, *error: object) -> None:
        os.write(self.go[1], b"e")
        self.thread.join(60)
        for fd in (*self.go, *self.began):
            os.close(fd)
        assert self.answers == [b"e"]


def test_as_many_calls_run_at_once_as_there_are_threads(made: Path) -> None:
    with ProtectedLibrary(made / "library.so", threads=2) as library:
        with Waiting(library):
            assert library.echo(b"beside") == b"beside"
            with Waiting(library), pytest.raises(BusyError, match="every stack"):
                library.echo(b"")
            with pytest.raises(BusyError, match="under way"):
                library.close()
        assert library.echo(b"after") == b"after"


def test_many_threads_get_their_own_answers(made: Path) -> None:
    wrong = []

    def work(number: int) -> None:
        data = bytes([number]) * 1000
        wrong.extend(1 for _ in range(200) if library.echo(data) != data)

    with ProtectedLibrary(made / "library.so", threads=8) as library:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert wrong == []


def test_a_closed_library_refuses_and_is_gone(made: Path) -> None:
    library = ProtectedLibrary(made / "library.so")
    found = places(library.keep(SECRET))
    echo = library.echo
    library.close()
    library.close()
    assert library.closed
    for use in (lambda: echo(b""), lambda: library.call("echo", b""), library.__enter__):
        with pytest.raises(EnclaveClosedError):
            use()
    assert all(fault(address) == errno.EFAULT for address in found.values())  # not mapped
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "memfd:pyenclave-protected" not in maps.read()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="buffers in Python")
def test_a_buffer_that_closes_the_library_is_refused(made: Path) -> None:
    """Asking for a buffer runs code of the argument's."""
    library = ProtectedLibrary(made / "library.so")

    class Closes:
        def __buffer__(self, _flags: int) -> memoryview:
            library.close()
            return memoryview(b"data")

    with pytest.raises(EnclaveClosedError):
        library.echo(Closes())  # type: ignore[arg-type]


def test_closing_leaves_what_was_loaded_not_what_was_kept(made: Path) -> None:
    """A library that stays loaded has the variables that it was loaded with."""
    library = ProtectedLibrary(made / "library.so")
    variable = places(library.keep(SECRET))["variable"]
    held = ctypes.CDLL(f"/proc/self/fd/{library._code.fileno()}")  # keeps it loaded
    library.close()
    assert ctypes.string_at(variable, 17) == b"as it was loaded\0"
    assert "dd" not in flags_at(variable)  # an ordinary one, of core dumps too
    assert held is not None
    # Its path is known to the loader; a new loading must not be given that object.
    with ProtectedLibrary(made / "library.so") as other:
        assert places(other.keep(SECRET))["variable"] != variable


def test_keys_come_back(made: Path) -> None:
    for _ in range(40):
        with ProtectedLibrary(made / "library.so") as library:
            assert library.echo(b"x") == b"x"
    for _ in range(40):
        ProtectedLibrary(made / "library.so").echo(b"x")
        gc.collect()


def test_when_all_keys_are_taken_an_error_says_so(made: Path) -> None:
    with ExitStack() as stack:
        libraries = []
        with pytest.raises(ProtectionError, match="no protection key"):
            libraries.extend(
                stack.enter_context(ProtectedLibrary(made / "library.so")) for _ in range(16)
            )
    ProtectedLibrary(made / "library.so").close()


def test_a_forked_child_has_no_secret_and_may_end(library: ProtectedLibrary, in_child: Any) -> None:
    found = places(library.keep(SECRET))
    held = ctypes.CDLL(f"/proc/self/fd/{library._code.fileno()}")  # keeps its variables mapped

    def child() -> list[Any]:
        told = []
        for use in (lambda: library.echo(b""), library.close):
            try:
                use()
            except EnclaveStateError as error:
                told.append(error.message)
        left = ctypes.string_at(found["variable"], 17).decode()
        faults = [fault(found[name]) for name in ("memory", "stack", "input", "output")]
        return [*told, left, *faults, library.closed]

    refused = "this handle belongs to the process that started it, not to a forked child"
    loaded = "as it was loaded\0"
    assert in_child(child).result() == [refused, refused, loaded, *[errno.EFAULT] * 4, True]
    assert library.kept(b"") == SECRET
    assert held is not None


def test_a_forked_child_has_no_memory_of_it(in_child: Any) -> None:
    """The pages are not there, whatever the child does with the key."""
    code = new(memory=1 << 16)
    lines = mappings()
    gone = in_child(lambda: [line for line in lines if line not in mappings()]).result()
    assert len(gone) >= 4
    assert lib.pye_protect_free(code, 0) == lib.PYE_OK


def mappings() -> list[str]:
    """Return the places of all mappings of this process."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return [line.split()[0] for line in maps]


@pytest.mark.parametrize("end", ["", "library.close()", "del library", "os.fork()", "threads"])
def test_a_process_ends_well_with_a_library(made: Path, end: str) -> None:
    """The library's destructors run at the end, and touch its variables."""
    if end == "threads":
        end = (
            "import threading\n"
            "pipe = os.pipe()\n"
            "data = struct.pack('2i', pipe[0], pipe[1])\n"
            "began = os.pipe()\n"
            "data = struct.pack('2i', pipe[0], began[1])\n"
            "threading.Thread(target=lambda: library.wait(data), daemon=True).start()\n"
            "os.read(began[0], 1)\n"
        )
    script = (
        "import os, pyenclave, struct, sys\n"
        "library = pyenclave.ProtectedLibrary(sys.argv[1])\n"
        "library.keep(b'x' * 64)\n"
        f"{end}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, made / "library.so"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_cpu_mask_without_the_feature_is_refused(made: Path) -> None:
    lib.pye_cpu_set_mask(0xFFFFFFFF & ~PKU)
    try:
        assert try_new()[0] == lib.PYE_E_UNSUPPORTED
        with pytest.raises(ProtectionError, match="no protection keys"):
            ProtectedLibrary(made / "library.so")
    finally:
        lib.pye_cpu_set_mask(0xFFFFFFFF)


def test_a_kernel_that_refuses_keys_is_an_error(made: Path, in_child: Any) -> None:
    """Without pkey_alloc, or where a filter forbids it."""

    def refused(number: int) -> list[str]:
        assert lib.pye_seccomp_deny([330], 1, number) == lib.PYE_OK
        with pytest.raises(ProtectionError) as info:
            ProtectedLibrary(made / "library.so")
        return [str(info.value)]

    assert "PYE_E_UNSUPPORTED" in in_child(refused, errno.ENOSYS).result()[0]
    assert "PYE_E_DENIED" in in_child(refused, errno.EPERM).result()[0]


def test_code_of_the_data_plane_refuses_wrong_numbers(made: Path) -> None:
    rest = ((), 0, 0, 65536, 4096, 1, False)

    def opened(name: str = "library.so") -> int:
        return os.open(made / name, os.O_RDONLY)

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="functions"):
        _core.ProtectedCode(opened(), (), (), *rest)
    with pytest.raises(ValueError, match="ranges"):
        _core.ProtectedCode(opened(), ("echo",), ((0, 4096),) * 17, *rest)
    with pytest.raises(ImageError, match="no function"):
        _core.ProtectedCode(opened(), ("nowhere",), (), *rest)
    with pytest.raises(ImageError, match="cannot be loaded"):
        _core.ProtectedCode(-1, ("echo",), (), *rest)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- the core's test build: what fails once ----------------------------------------------------

REAL = (0, errno.EPERM, errno.ENOMEM, errno.ENOSYS)


@needs_the_test_build
def test_a_key_and_its_memory_are_taken_whole_or_not_at_all() -> None:
    """A system call or an allocation that fails is an error, and nothing is left."""
    page = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    left = []

    def make() -> int:
        status, code = try_new(ranges=((address, 4096), (address + 4096, 4096)))
        if status == lib.PYE_OK:
            assert fault(address, 1) == errno.EFAULT
            status = lib.pye_protect_free(code, 0)
            left.extend([code] * (status != lib.PYE_OK))
        return int(status)

    def settle(_status: int) -> None:
        while left:
            assert lib.pye_protect_free(left.pop(), 0) == lib.PYE_OK
        assert fault(address, 8192) == 0

    seen = set()
    for failure, status in every_failure(make, REAL, settle=settle):
        seen.add(failure.name)
        assert status != lib.PYE_OK or failure.name in ("munmap", "syscall 331"), str(failure)
    assert {"calloc", "mmap", "madvise", "syscall 329", "syscall 330"} <= seen


@needs_the_test_build
def test_ends_and_calls_notice_what_fails(code: Any, probe: ctypes.CDLL) -> None:
    """Ranges that stay behind the key at the end, and signals that cannot be blocked."""
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ending = new(ranges=((address, 4096),))
    slot, answer, length = ffi.new("uint32_t *"), ffi.new("int32_t *"), ffi.new("size_t *")
    out = ffi.new("uint8_t[64]")
    assert lib.pye_protect_take(ending, slot) == lib.PYE_OK

    def end() -> int:
        status = lib.pye_protect_free(ending, 1)
        return int(lib.PYE_OK if status == lib.PYE_E_BUSY else status)

    def run() -> int:
        return int(lib.pye_protect_run(code, 0, 0, answer, out, 64, length, out, 0))

    found = [(failure.name, status) for failure, status in every_failure(end, REAL)]
    assert ("syscall 329", lib.PYE_OK) not in found
    assert "syscall 329" in dict(found)
    lib.pye_protect_give(ending, slot[0])
    assert lib.pye_protect_free(ending, 0) == lib.PYE_OK
    probe.probe_pkru.restype = ctypes.c_uint32
    calls = []
    for failure, status in every_failure(run, REAL):
        calls.append((failure.name, failure.at, status == lib.PYE_OK))
        assert shut(probe.probe_pkru())
    # The first call blocks; the second gives the mask back, and nothing is left to do if it cannot.
    assert set(calls) == {("syscall 14", 1, False), ("syscall 14", 2, True)}
