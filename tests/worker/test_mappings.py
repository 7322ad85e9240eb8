"""Which mappings a zygote and a worker accept."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave._core import new_lines
from pyenclave._native import mapping_text
from pyenclave._worker import mappings
from pyenclave._worker.mappings import check_mappings, foreign_mappings
from pyenclave.errors import RuntimeLockError

SEALED = (os.makedev(0, 1), 77)
LIBC = (os.makedev(0xFE, 0), 500)
RING = (os.makedev(0, 1), 78)
LOCKED = SimpleNamespace(
    sealed={SEALED}, files={LIBC: "/usr/lib/libc.so.6"}, accepted=set(), snapshot=b""
)


def line(rights: str, device: str, inode: int, path: str = "") -> bytes:
    return f"7f0000000000-7f0000001000 {rights} 00000000 {device} {inode}   {path}".encode()


@pytest.mark.parametrize(
    "mapping",
    [
        line("r-xp", "fe:00", 500, "/usr/lib/libc.so.6"),
        line("rw-p", "fe:00", 500, "/usr/lib/libc.so.6"),
        # An overlay may show another device than stat does; then the path decides.
        line("r-xp", "00:2a", 9, "/usr/lib/libc.so.6"),
        # A chroot's paths as they are seen from outside; then the file decides.
        line("r-xp", "fe:00", 500, "/srv/jail/usr/lib/libc.so.6"),
        line("r-xp", "00:01", 77, "/memfd:pyenclave-object (deleted)"),
        line("rw-s", "00:01", 78, "/memfd:pyenclave-ring (deleted)"),
        line("rw-p", "00:00", 0),
        line("rw-p", "00:00", 0, "[heap]"),
        line("rw-p", "00:00", 0, "[stack]"),
        line("r-xp", "00:00", 0, "[vdso]"),
        line("--xp", "00:00", 0, "[vsyscall]"),
        line("rw-s", "00:01", 90, "/secretmem (deleted)"),
        line("rw-p", "00:00", 0, "[anon:libc_malloc]"),
    ],
)
def test_what_is_locked_or_sealed_or_plain_memory_is_accepted(mapping: bytes) -> None:
    """Bootstrap files, sealed memfds, data, the kernel's own."""
    assert foreign_mappings([mapping], LOCKED, data={RING}) == []


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        (line("r--p", "fe:00", 501, "/usr/lib/libevil.so"), "not in the lock"),
        (line("r--p", "fe:00", 502, "/home/user/data.bin"), "not in the lock"),
        (line("r-xp", "fe:00", 501, "/usr/lib/libc.so.6"), "not the file"),
        (line("r-xp", "fe:00", 500, "/usr/lib/libc.so.6 (deleted)"), "not in the lock"),
        (line("r-xp", "fe:00", 501, "/srv/jail/usr/lib/libc.so.6"), "not in the lock"),
        (line("r-xp", "00:2a", 500, "/srv/jail/usr/lib/libc.so.6"), "not in the lock"),
        (line("r-xp", "fe:00", 500, "/srv/jail/libc.so.6"), "not in the lock"),
        (line("r-xp", "fe:00", 500, "/srv/jail/usr/lib/libc.so.6 (deleted)"), "not in the lock"),
        (line("r-xp", "00:01", 79, "/memfd:pyenclave-object (deleted)"), "not in the lock"),
        (line("r-xs", "00:01", 78, "/memfd:pyenclave-ring (deleted)"), "executable data"),
        (line("r-xs", "00:01", 90, "/secretmem (deleted)"), "executable data"),
        (line("r-xp", "00:00", 0), "executable without a file"),
        (line("r-xp", "00:00", 0, "[heap]"), "executable without a file"),
        (line("r-xp", "00:00", 0, "[anon:x]"), "executable without a file"),
        (line("rwxp", "00:00", 0), "writable and executable"),
        (line("rwxp", "00:01", 77, "/memfd:pyenclave-object (deleted)"), "writable and exec"),
        (line("rw-s", "00:01", 95, "/dev/zero (deleted)"), "not in the lock"),
        (line("rw-s", "00:01", 96, "/SYSV00000000 (deleted)"), "not in the lock"),
        (line("r--p", "fe:00", 500, "/usr/lib/libc.so.6\\012x"), "not in the lock"),
    ],
)
def test_everything_else_is_named_with_its_reason(mapping: bytes, reason: str) -> None:
    """Files, foreign memfds, replaced files, memory made executable, shared memory."""
    (found,) = foreign_mappings([mapping], LOCKED, data={RING})
    assert reason in found


def test_code_made_at_run_time_needs_the_image_to_say_so() -> None:
    """`[runtime] jit`: executable memory without a file, and nothing else."""
    memory = line("rwxp", "00:00", 0)
    assert foreign_mappings([memory], LOCKED, jit=True) == []
    library = line("r-xp", "fe:00", 501, "/usr/lib/libevil.so")
    assert foreign_mappings([library], LOCKED, jit=True)


LINES = st.lists(
    st.tuples(st.integers(0, 1 << 48), st.sampled_from([b"r--p", b"r-xp", b"rwxp", b""])),
    max_size=12,
)


def written(lines: list[tuple[int, bytes]]) -> list[bytes]:
    return [b"%x-%s" % line for line in lines]


@given(LINES, LINES, st.booleans())
def test_no_new_line_is_ever_hidden(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], end: bool
) -> None:
    """Whatever the order: each line that was not there before is in the result."""
    known, now = written(before), written(before[::2] + after)
    tail = b"\n" if end else b""
    found = new_lines(b"\n".join(known) + tail, b"\n".join(now) + tail)
    assert {line for line in now if line not in known} <= set(found) <= set(now)


@given(LINES, LINES)
def test_in_ascending_lines_exactly_the_new_ones_are_found(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]]
) -> None:
    first, second = dict(before), dict(before[::2] + after)
    known, now = (written(sorted(lines.items())) for lines in (first, second))
    found = new_lines(b"".join(x + b"\n" for x in known), b"".join(x + b"\n" for x in now))
    assert found == [line for line in now if line not in known]


def test_a_line_that_only_begins_like_a_known_one_is_new() -> None:
    for line in (b"10-20 r-xp /a", b"10-20 r-xp /a/b", b"10-20 r-x", b"010-20 r-xp /a/"):
        assert new_lines(b"10-20 r-xp /a/\n", line + b"\n") == [line]


def test_the_kernels_own_text_has_no_new_line_against_itself() -> None:
    text = mapping_text()
    assert new_lines(text, text) == []
    assert new_lines(b"", text) == text.split(b"\n")[:-1]


@given(LINES, st.integers(0, 400), st.integers(0, 12))
def test_a_text_that_was_cut_or_turned_round_hides_nothing(
    lines: list[tuple[int, bytes]], cut: int, turn: int
) -> None:
    """What is known may be shorter, longer or in another order than what is there now."""
    now = written(sorted(lines))
    text = b"".join(x + b"\n" for x in now)
    turned = now[turn:] + now[:turn]
    for known in (text[:cut], text[cut:], b"".join(x + b"\n" for x in turned)):
        found = new_lines(known, text)
        assert set(now) - set(known.split(b"\n")) <= set(found) <= set(now)
        assert set(new_lines(text, known)) >= set(known.split(b"\n")) - set(now) - {b""}


def test_two_known_lines_do_not_make_a_third() -> None:
    known = b"10-20 r--p\n20-30 r-xp\n"
    for line in (b"10-20 r--p20-30 r-xp", b"10-20 r-xp", b"20-30 r--p", b"20-30 r-xp\0"):
        assert new_lines(known, line + b"\n") == [line]
    assert new_lines(known, b"20-30 r-xp\n10-20 r--p\n") == [b"10-20 r--p"]
    assert new_lines(known, b"\n" + known) == [b""]


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch):
    """Let a test say what is mapped."""

    def say(*lines: bytes) -> None:
        text = b"".join(x + b"\n" for x in lines)
        monkeypatch.setattr(mappings, "mapping_text", lambda fd=None: text)

    return say


def placed(start: int, rights: str, path: str = "") -> bytes:
    inode = LIBC[1] if path else 0
    device = "fe:00" if path else "00:00"
    return f"{start:x}-{start + 0x1000:x} {rights} 00000000 {device} {inode}    {path}".encode()


def test_whatever_comes_after_a_check_is_judged_by_the_next(mapped) -> None:
    """Each line differs from an accepted one in a single thing, and is refused for it."""
    good = [placed(0x1000, "r-xp", "/usr/lib/libc.so.6"), placed(0x5000, "rw-p")]
    for wrong in (
        placed(0x1000, "rwxp", "/usr/lib/libc.so.6"),
        placed(0x1000, "r-xp", "/usr/lib/libevil.so"),
        good[0].replace(b" 500 ", b" 501 "),
        placed(0x5000, "r-xp"),
        placed(0x5000, "rwxp"),
        placed(0x9000, "r--p", "/etc/passwd"),
        placed(0x0, "r-xp"),
    ):
        fresh = SimpleNamespace(**{**vars(LOCKED), "accepted": set(), "snapshot": b""})
        mapped(*good)
        check_mappings(None, fresh)
        for lines in ([*good, wrong], [wrong, *good], [wrong, good[1]], [good[0], wrong], [wrong]):
            for _ in range(2):  # a refusal is not remembered as accepted
                mapped(*lines)
                with pytest.raises(RuntimeLockError):
                    check_mappings(None, fresh)
        mapped(*good)
        check_mappings(None, fresh)


def test_what_was_accepted_once_may_go_and_come_back(mapped) -> None:
    fresh = SimpleNamespace(**{**vars(LOCKED), "accepted": set(), "snapshot": b""})
    lines = [placed(0x1000 * place, "rw-p", "/usr/lib/libc.so.6") for place in range(1, 6)]
    for now in (lines, lines[::2], lines[::-1], [], lines):
        mapped(*now)
        check_mappings(None, fresh)
    assert fresh.accepted == set(lines)


@pytest.mark.parametrize(
    ("rights", "inode", "path", "left_out"),
    [
        ("rw-p", 0, "", True),
        ("r--p", 0, "", True),
        ("---p", 0, "", True),
        ("rw-s", 0, "", True),
        ("rw-p", 0, "[heap]", True),
        ("rw-p", 0, "[stack]", True),
        ("r-xp", 0, "", False),
        ("rwxp", 0, "", False),
        ("rwxp", 0, "[heap]", False),
        ("rwxp", 0, "[stack]", False),
        ("rw-p", 0, "[heap] ", False),
        ("rw-p", 0, "[heap]x", False),
        ("rw-p", 0, "[stack:12]", False),
        ("rw-p", 0, "[vdso]", False),
        ("rw-p", 0, "[anon:x]", False),
        ("rw-p", 0, "/", False),
        ("rw-p", 0, "x", False),
        ("rw-p", 7, "", False),
        ("rw-p", 7, "[heap]", False),
        ("rw-p", 10, "", False),
        ("rw-s", 78, "/memfd:pyenclave-ring (deleted)", False),
    ],
)
def test_only_plain_memory_is_left_out(rights: str, inode: int, path: str, left_out: bool) -> None:
    """What is left out is never judged: it must be what the judge accepts."""
    text = line(rights, "00:00", inode, path)
    for end in (b"", b"\n"):
        assert new_lines(b"", text + end) == [text]
        assert new_lines(b"", text + end, plain=False) == ([] if left_out else [text])
    if left_out:
        assert foreign_mappings([text], LOCKED) == []


@given(
    st.binary(max_size=60) | st.text("0123456789abcdef-: rwxps[heap]/", max_size=70).map(str.encode)
)
def test_whatever_is_left_out_would_be_accepted(text: bytes) -> None:
    """Bytes that no kernel writes are not left out, or are harmless to the judge as well."""
    for one in text.split(b"\n"):
        if one and new_lines(b"", one, plain=False) == []:
            fields = one.split(b" ")
            assert fields[1][2:3] == b"-"
            assert one.split(None, 5)[4] == b"0"


def test_a_long_table_of_mappings_is_read_whole(tmp_path) -> None:
    text = b"".join(b"%x-%x r--p 00000000 fe:00 5   /a\n" % (n, n + 1) for n in range(9000))
    (tmp_path / "maps").write_bytes(text)
    fd = os.open(tmp_path / "maps", os.O_RDONLY)
    assert len(text) > 4 << 16
    for _ in range(2):
        assert mapping_text(fd) == text
    os.close(fd)
