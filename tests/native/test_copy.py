"""How fragments are stored into a slot: the right bytes, none beside them, and the quicker way."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import platform
import random
from collections.abc import Iterator

import core_build
import pytest

CACHED, PAST = 0, 1
PAGE = 4096
LENGTHS = [0, 1, 15, 63, 64, 65, 4095, 4096, 4097, 4160, 8191, 65535, 65536, 65600, 70001]


class Choice(ctypes.Structure):
    _fields_ = (
        ("cost", ctypes.c_uint64 * 2),
        ("began", ctypes.c_uint64),
        ("better", ctypes.c_uint32),
        ("way", ctypes.c_uint32),
        ("until", ctypes.c_uint32),
        ("pause", ctypes.c_uint32),
    )


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("copy") / "copy.so"
    file = core_build.CSRC / "src/call/copy.c"
    core_build.program(target, [file], ["-O2", "-fPIC", "-Wall", "-Werror"], link=["-shared"])
    library = ctypes.CDLL(str(target))
    word, size, byte = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32
    choice, at = ctypes.POINTER(Choice), ctypes.c_void_p
    for name, arguments in (
        ("pye_copy_init", [choice]), ("pye_copy_choose", [choice]),
        ("pye_copy_began", [choice, word]), ("pye_copy_ended", [choice, word, word, word]),
        ("pye_copy_into", [at, at, size, byte]), ("pye_copy_out", [at, at, size]),
        ("pye_copy_zero", [at, size]),
    ):  # fmt: skip
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    return library


@pytest.fixture(scope="module")
def room() -> Iterator[tuple[mmap.mmap, int]]:
    area = mmap.mmap(-1, 32 * PAGE)
    pin = ctypes.c_char.from_buffer(area)
    yield area, ctypes.addressof(pin)
    del pin


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("what", ["cached", "past", "out", "zero"])
def test_bytes_arrive_and_none_beside_them(
    copies: ctypes.CDLL, room: tuple[mmap.mmap, int], what: str, length: int
) -> None:
    area, base = room
    source = random.Random(length).randbytes(length + 64)
    kept = (ctypes.c_char * len(source)).from_buffer_copy(source)
    for place in (0, 1, 16, 32, 63):
        for begin in (0, 1, 8, 33):
            area[:] = b"\xa5" * len(area)
            to, origin = base + PAGE + place, ctypes.addressof(kept) + begin
            if what == "zero":
                copies.pye_copy_zero(to, length)
                want = bytes(length)
            elif what == "out":
                copies.pye_copy_out(to, origin, length)
                want = source[begin : begin + length]
            else:
                copies.pye_copy_into(to, origin, length, PAST if what == "past" else CACHED)
                want = source[begin : begin + length]
            end = PAGE + place + length
            assert area[PAGE + place : end] == want
            assert area[: PAGE + place].count(0xA5) == PAGE + place
            assert area[end:].count(0xA5) == len(area) - end


def messages(
    copies: ctypes.CDLL, choice: Choice, costs: list[tuple[int, int]], unseen: int = 0
) -> list[int]:
    """Return the ways of messages of 1 MiB, of which each way costs so many ticks for a KiB."""
    ways = []
    for pair in costs:
        copies.pye_copy_choose(choice)
        ways.append(choice.way)
        copies.pye_copy_began(choice, 1000)
        copies.pye_copy_ended(choice, 1000 + pair[choice.way] * 1024, 1 << 20, unseen)
    return ways


@pytest.fixture
def choice(copies: ctypes.CDLL) -> Choice:
    one = Choice()
    copies.pye_copy_init(one)
    copies.pye_copy_choose(one)
    if platform.machine() != "x86_64":
        pytest.skip("there is one way only on this machine")
    copies.pye_copy_init(one)
    return one


@pytest.mark.parametrize("better", [CACHED, PAST])
def test_the_way_that_costs_less_is_taken(copies: ctypes.CDLL, choice: Choice, better: int) -> None:
    cost = (100, 200) if better == CACHED else (200, 100)
    ways = messages(copies, choice, [cost] * 1000)
    assert ways[:2] == [CACHED, PAST]
    assert ways[2:].count(1 - better) < 10
    assert ways[-10:] == [better] * 10


def test_what_only_the_reader_pays_counts_against_the_way_past_the_caches(
    copies: ctypes.CDLL, choice: Choice
) -> None:
    assert messages(copies, choice, [(300, 100)] * 1000, unseen=250)[-10:] == [CACHED] * 10
    copies.pye_copy_init(choice)
    assert messages(copies, choice, [(300, 100)] * 1000, unseen=100)[-10:] == [PAST] * 10


def test_trials_of_the_other_way_become_seldom_but_never_end(
    copies: ctypes.CDLL, choice: Choice
) -> None:
    ways = messages(copies, choice, [(100, 500)] * 5000)
    tried = [i for i, way in enumerate(ways) if way == PAST]
    gaps = [after - before for before, after in itertools.pairwise(tried)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 17
    assert gaps[-1] == 1025


def test_a_change_of_the_machine_is_followed(copies: ctypes.CDLL, choice: Choice) -> None:
    messages(copies, choice, [(100, 200)] * 100)
    ways = messages(copies, choice, [(2000, 200)] * 20)
    assert ways[-10:].count(PAST) >= 9
    ways = messages(copies, choice, [(100, 200)] * 3000)
    assert ways[-10:] == [CACHED] * 10


def test_one_slow_message_changes_nothing(copies: ctypes.CDLL, choice: Choice) -> None:
    messages(copies, choice, [(100, 200)] * 100)
    ways = messages(copies, choice, [(10**9, 10**9), *[(100, 200)] * 10])
    assert ways == [CACHED] * 11


def test_a_message_whose_time_was_not_begun_teaches_nothing(
    copies: ctypes.CDLL, choice: Choice
) -> None:
    before = bytes(choice)
    copies.pye_copy_ended(choice, 10**6, 1 << 20, 0)
    assert bytes(choice) == before
    copies.pye_copy_began(choice, 5)
    began = bytes(choice)
    copies.pye_copy_ended(choice, 10**6, 1023, 0)
    assert bytes(choice) == began
