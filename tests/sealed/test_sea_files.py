"""Threat catalogue B.3 (SEA-01 … SEA-12) and PAG-10, PAG-12 where they concern sealed files."""

from __future__ import annotations

import gc
import hmac
import io
import itertools
import logging
import os
import struct
import traceback
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from file_places import FakeCounter, MemoryStore, PlainCounter, content
from two_keys import two_key_ciphertext

from pyenclave.errors import EnclaveError, RollbackError, SealingError, UnsealError
from pyenclave.formats.sealed_file import MAC_OFFSET, FileHeader, Geometry
from pyenclave.formats.sealed_stream import StreamHeader, write_frame
from pyenclave.sealed import file_crypto, stream
from pyenclave.sealed.counter import FileCounter
from pyenclave.sealed.file import open_sealed
from pyenclave.sealed.file_crypto import FileKeys, key_root
from pyenclave.sealed.file_engine import SealedEngine

KEY = bytes(range(32))
DATA = bytes(i * 7 % 251 for i in range(100 * 4096 + 10))


def engine(store: Any, **options: Any) -> SealedEngine:
    return SealedEngine(store, **({"key": KEY} | options))


def make(data: bytes = DATA, commits: int = 1, **options: Any) -> MemoryStore:
    store = MemoryStore()
    file = engine(store, write=True, create=True, **options)
    for i in range(commits):
        file.write(0, memoryview(bytes([i]) + data[1:]))
        file.commit()
    file.close()
    return store


def read(data: bytes, **options: Any) -> bytes:
    file = engine(MemoryStore(data), **options)
    try:
        return content(file)
    finally:
        file.close()


# ---- SEA-02, SEA-04, SEA-07: what keys and bindings are made of ---------------------------------


def test_sea_02_a_name_is_bound_and_never_the_path(tmp_path: Path) -> None:
    """The name opens, another does not; where the file lies does not matter."""
    with open_sealed(tmp_path / "a", "wb", key=KEY, name=b"patients") as file:
        file.write(b"data")
    (tmp_path / "a").rename(tmp_path / "b")
    with open_sealed(tmp_path / "b", key=KEY, name=b"patients") as reader:
        assert reader.read() == b"data"
    for name in (b"", b"patient", b"patients\0"):
        with pytest.raises(UnsealError, match="name"):
            open_sealed(tmp_path / "b", key=KEY, name=name)


def test_sea_02_changed_flags_and_fields_do_not_choose_another_meaning() -> None:
    """A header whose counter flag, page size, size or height says something else is refused."""
    good = make(b"data").data
    header = FileHeader.from_bytes(bytes(good[4096 * 0 : 4096]))
    assert header.offset == 0
    for at, value in ((8, 8192), (12, 1), (56, 3), (64, 1 << 30), (72, 2), (80, 1), (88, 1)):
        changed = bytearray(good)
        struct.pack_into("<I" if at in (8, 12) else "<Q", changed, at, value)
        with pytest.raises(SealingError):
            read(bytes(changed))


def test_sea_04_parts_of_a_key_do_not_run_into_each_other() -> None:
    """Names, ids and salts that join to the same bytes give different tags and keys."""
    ids = [b"\0" * 16, b"\0" * 15 + b"a", b"a" + b"\0" * 15]
    names = [b"", b"a", b"ab", b"\0", b"a\0"]
    found = {FileKeys(key_root(KEY), i).name_tag(n) for i in ids for n in names}
    assert len(found) == len(ids) * len(names)


def test_sea_07_all_derived_keys_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, ids, salts and file keys: every pair of derived keys differs."""
    secrets: list[bytes] = []
    monkeypatch.setattr(
        file_crypto, "PageKey", lambda secret, *, enclave: secrets.append(bytes(secret))
    )
    for key, number in itertools.product((KEY, bytes(32)), range(3)):
        keys = FileKeys(key_root(key), bytes([number]) * 16)
        secrets += [bytes(keys._mac), bytes(keys._names), bytes(keys._pages), bytes(keys._root)]
        for salt in (bytes(16), b"\1" * 16):
            keys.opener(salt)
    roots = 2 * 3 - 2  # the root is of the file key alone
    assert len(set(secrets)) == len(secrets) - roots


# ---- SEA-03, SEA-09: headers and lengths ----------------------------------------------------


def test_sea_03_every_bit_of_the_header_is_authenticated() -> None:
    """With one commit there is one header; whatever bit of it changes, nothing opens."""
    good = bytes(make(b"data").data)
    place = FileHeader.from_bytes(good[:4096]).offset
    for at in range(place, place + 4096):
        for bit in range(8) if at < place + 320 else ():
            changed = bytearray(good)
            changed[at] ^= 1 << bit
            with pytest.raises(UnsealError):
                read(bytes(changed))


class Small:
    """The smallest file with all parts: both headers, data, a node, the free list, free slots."""

    def __init__(self) -> None:
        self.counter = FakeCounter()
        self.store = MemoryStore()
        self.states = []
        for text in (b"before", b"newest"):
            file = engine(self.store, write=True, create=True, counter=self.counter)
            file.write(4096, memoryview(text))  # a hole before it, and so a node above it
            file.close()
            self.states.append(bytes(self.store.data))
        self.good = self.states[-1]
        self.content = bytes(4096) + b"newest"
        self.file = file = engine(self.store, counter=self.counter)
        assert file.header.height == 1
        leaf = file._tree.leaf(0)
        assert leaf is not None
        self.newest = file.header.offset // 4096
        self.checked = {file.header.root.slot, leaf.words[1]}
        self.listed = {file.header.free.slot}
        self.unused = set(range(2, file.header.end)) - self.checked - self.listed
        assert (len(self.checked), len(self.unused), len(self.good)) == (2, 2, 7 * 4096)

    def refused(self, slot: int) -> bool:
        """Read as much as concerns *slot*; what can be read is what was written."""
        file = self.file
        try:
            if slot < 2:
                opened = engine(self.store, counter=self.counter)
                assert content(opened) == self.content
                opened.close()
            elif slot in self.listed:  # read when something is written
                space = file._tree.space
                space.chain, space._ready = file.header.free, []
                space._load_chain()
                assert sum(length for _, length in space._ready) == len(self.unused)
            else:
                file._tree.reset(file.header)
                assert content(file) == self.content
        except SealingError:
            return True
        return False

    def wrong(self, bits: Any) -> list[tuple[int, int]]:
        """Flip *bits* of every byte; return where what should be refused was not, or else."""
        wrong = []
        for at in range(len(self.good)):
            slot, offset = divmod(at, 4096)
            must = slot == self.newest or slot in self.checked | self.listed
            may = must or (slot < 2 and 16 <= offset < 48)  # id and name tag of both headers agree
            for bit in bits(at):
                self.store.data[at] ^= 1 << bit
                if self.refused(slot) not in {must, may}:
                    wrong.append((at, bit))
                self.store.data[at] ^= 1 << bit
        return wrong


def test_sea_03_every_byte_of_a_small_file_is_authenticated_or_unused() -> None:
    """With a counter: what is flipped is refused, or of the commit before, or in no use."""
    small = Small()
    assert not any(small.refused(slot) for slot in range(7))
    assert small.wrong(lambda at: (at % 8,)) == []


@pytest.mark.long
def test_sea_03_every_bit_of_a_small_file_is_authenticated_or_unused() -> None:
    assert Small().wrong(lambda _: range(8)) == []


def test_sea_08_every_page_of_a_small_file_at_every_place_and_from_before() -> None:
    """Each slot with the content of each other one, now and before, and moved by halves."""
    small = Small()
    refused = 0
    for slot, other, state in itertools.product(range(7), range(7), small.states):
        page = state.ljust(7 * 4096, b"\0")[other * 4096 : (other + 1) * 4096]
        for begin, end in ((0, 4096), (0, 2048), (2048, 4096)):
            at = slot * 4096
            if page[begin:end] == small.good[at + begin : at + end]:
                continue
            small.store.data[at + begin : at + end] = page[begin:end]
            found = small.refused(slot)
            if slot == small.newest or slot in small.checked | small.listed:
                assert found, (slot, other, begin)
            refused += found
            small.store.data[:] = small.good
    assert refused > 100


def test_sea_03_other_bytes_of_a_larger_file_are_authenticated_or_unused() -> None:
    """Without a counter: what is changed is refused, or nothing is read from it."""
    good = bytes(make(DATA[:20000], commits=3).data)
    refused = 0
    for at in range(0, len(good), 61):
        changed = bytearray(good)
        changed[at] ^= 0x10
        try:
            found = read(bytes(changed))
        except UnsealError:
            refused += 1
            continue
        # The newest header gone, the one before it is what a reader without counter gets.
        assert found in (b"\2" + DATA[1:20000], b"\1" + DATA[1:20000])
    assert refused > len(good) // 61 // 4


def test_sea_09_every_length_field_around_its_value() -> None:
    """Sizes, slots and counts ±1, 0 and the largest, under a MAC that holds: typed errors only."""
    good = bytes(make(DATA[:30000]).data)
    header = FileHeader.from_bytes(good[:4096])
    keys = FileKeys(key_root(KEY), header.file_id)
    for at in (8, 48, 56, 64, 72, 80, 88, 128, 136, 160, 168):
        form = "<I" if at == 8 else "<Q"
        (value,) = struct.unpack_from(form, good, at)
        largest = (1 << (32 if at == 8 else 64)) - 1
        for other in {0, 1, value - 1, value + 1, value * 2, largest, largest // 2, 1 << 20}:
            if other == value or not 0 <= other <= largest:
                continue
            changed = bytearray(good)
            struct.pack_into(form, changed, at, other)
            changed[MAC_OFFSET : MAC_OFFSET + 32] = bytes(32)
            changed[MAC_OFFSET : MAC_OFFSET + 32] = keys.header_mac(changed[:4096])
            place = (other & 1) * 4096 if at == 48 else 0
            moved = changed if not place else bytearray(4096) + changed[:4096] + changed[8192:]
            try:
                file = engine(MemoryStore(bytes(moved)))
                file.read_into(0, memoryview(bytearray(1 << 16)))
            except SealingError:
                continue
            # What holds all the same: a number that says nothing about where data is.
            assert at in (48, 56, 64, 72, 80), (at, other)


def test_sea_09_a_file_that_was_cut_off_is_refused_where_it_ends() -> None:
    good = bytes(make().data)
    for size in (*range(0, 9000, 500), len(good) // 2, len(good) - 1):
        with pytest.raises(UnsealError):
            read(good[:size])
    assert read(good + bytes(100_000)) == read(good)


# ---- SEA-05 is test_file_crash.py; SEA-06 the platform's keys; SEA-01 the blobs of SealPolicy ---


# ---- SEA-08: nothing of a bad page is released ---------------------------------------------------


def test_sea_08_a_corrupt_page_raises_at_the_read_that_needs_it() -> None:
    """Other pages stay readable, the buffer holds nothing of the bad one, the error names it."""
    store = make()
    file = engine(store)
    tree = file._tree
    leaf = tree.leaf(0)
    assert leaf is not None
    slot = leaf.words[20]
    store.data[slot * 4096 + 77] ^= 1
    out = bytearray(b"\xee" * 4096)
    assert file.read_into(19 * 4096, memoryview(out)) == 4096
    assert out == DATA[19 * 4096 : 20 * 4096]
    with pytest.raises(UnsealError, match="page 20 of the sealed file") as caught:
        file.read_into(20 * 4096, memoryview(out))
    assert out == bytes(4096)
    assert "81920" in str(caught.value)
    big = bytearray(b"\xee" * (64 * 4096))
    with pytest.raises(UnsealError, match="page 20 "):
        file.read_into(0, memoryview(big))
    assert big[20 * 4096 : 21 * 4096] == bytes(4096)
    small = bytearray(b"\xee" * 100)
    with pytest.raises(UnsealError, match="page 20 "):
        file.read_into(20 * 4096 + 5, memoryview(small))
    assert small == b"\xee" * 100
    with open_sealed(store, key=KEY) as buffered:
        with pytest.raises(UnsealError, match="page 20 "):
            buffered.read()
        buffered.seek(21 * 4096)
        assert buffered.read(10) == DATA[21 * 4096 : 21 * 4096 + 10]


def test_sea_08_pages_of_other_places_times_and_files_are_refused() -> None:
    """Swapped, replayed and foreign pages: each has a tag that holds, elsewhere."""
    store = make(commits=2)
    before = bytes(make(commits=1).data)
    slots = range(2, len(store.data) // 4096)
    good = bytes(store.data)
    reference = read(good)
    refused = 0
    for a, b in itertools.pairwise(slots):
        swapped = bytearray(good)
        swapped[a * 4096 : (a + 1) * 4096] = good[b * 4096 : (b + 1) * 4096]
        swapped[b * 4096 : (b + 1) * 4096] = good[a * 4096 : (a + 1) * 4096]
        foreign = bytearray(good)
        foreign[a * 4096 : (a + 1) * 4096] = before[a * 4096 : (a + 1) * 4096].ljust(4096, b"\0")
        for changed in (swapped, foreign):
            try:
                assert read(bytes(changed)) == reference  # a slot of the commit before
            except UnsealError:
                refused += 1
    assert refused > 150


# ---- SEA-10: a file opens under one key ----------------------------------------------------------


def test_sea_10_a_file_opens_under_the_one_key_that_made_it() -> None:
    """The header's MAC commits to the key before any page is opened."""
    good = bytes(make(b"data").data)
    for bit in range(256):
        other = bytearray(KEY)
        other[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnsealError, match="under this key"):
            read(good, key=bytes(other))


def test_sea_10_a_stream_crafted_for_two_keys_opens_under_one_only() -> None:
    """The chunk's tag holds under both keys (shown); the header's MAC under one."""
    mine, other = KEY, b"\xaa" * 32
    salt, frame = bytes(32), write_frame(16, final=True)
    (header_key, name_key, a), (_, _, b) = (stream._keys(key_root(k), salt) for k in (mine, other))
    crafted = two_key_ciphertext((a, b), frame)
    for key in (a, b):
        AESGCM(key).decrypt(bytes(12), crafted, frame)
    tag = hmac.digest(name_key, b"", "sha256")[:16]
    header = StreamHeader(chunk_size=16, salt=salt, name_tag=tag)
    whole = header.to_bytes()[:-32] + stream._mac(header_key, header) + frame + crafted
    assert len(stream.open_stream(io.BytesIO(whole), key=mine).read()) == 16
    with pytest.raises(UnsealError, match="under this key"):
        stream.open_stream(io.BytesIO(whole), key=other)


def test_sea_10_one_file_does_not_hold_two_for_two_keys() -> None:
    """Two headers, each with its own key's MAC: neither reader is shown anything."""
    other = b"\xaa" * 32
    both = bytearray(make(b"for the one", commits=2).data)  # the newest header is the second
    decoy = make(b"", file_id=bytes(16), key=other)
    both[:4096] = decoy.data[:4096]
    assert read(bytes(4096) + bytes(both[4096:])) == b"\1or the one"
    assert read(bytes(decoy.data), key=other) == b"\0"
    for key in (KEY, other):
        with pytest.raises(UnsealError, match="two files"):
            read(bytes(both), key=key)


# ---- SEA-11: rollback ----------------------------------------------------------------------------


def counted(counter: Any, commits: int) -> list[bytes]:
    """The file after each of its commits."""
    store, states = MemoryStore(), []
    file = engine(store, write=True, create=True, counter=counter)
    for i in range(commits):
        file.write(0, memoryview(b"commit %d" % i))
        file.commit()
        states.append(bytes(store.data))
    file.close()
    return states


@pytest.mark.parametrize("kind", [FakeCounter, PlainCounter])
def test_sea_11_an_old_file_is_refused_with_its_counter(kind: Any) -> None:
    counter = kind()
    states = counted(counter, 4)
    assert counter.read() == 4
    assert read(states[3], counter=counter) == b"commit 3"
    for old in states[:3]:
        with pytest.raises(RollbackError, match="counter names"):
            read(old, counter=counter)
        with pytest.raises(RollbackError):
            engine(MemoryStore(old), write=True, counter=counter)


def test_sea_11_without_a_counter_an_old_file_opens_as_the_docs_say() -> None:
    store = make(commits=1)
    old = bytes(store.data)
    file = engine(store, write=True)
    file.write(0, memoryview(b"newer"))
    file.close()
    assert read(old) != read(bytes(store.data))
    page = Path(__file__).resolve().parents[2] / "docs" / "formats" / "sealed-file.md"
    assert "without a counter" in page.read_text("utf-8").lower()


def test_sea_11_a_commit_cut_off_before_its_counter_is_taken_up() -> None:
    """Counter + 1 opens and moves the counter; a second such commit, of another branch, never."""
    counter = FakeCounter()
    states = counted(counter, 2)
    behind = FakeCounter(1, counter.log[0][1])
    assert read(states[1], counter=behind) == b"commit 1"
    assert behind.value == 2
    # Two branches of one state, each written for the same next value.
    branches = []
    for text in (b"branch A", b"branch B"):
        branch, own = MemoryStore(states[1]), FakeCounter(2, counter.log[1][1])
        file = engine(branch, write=True, counter=own)
        file.write(0, memoryview(text))
        file.close()
        branches.append(bytes(branch.data))
    shared = FakeCounter(2, counter.log[1][1])
    assert read(branches[1], counter=shared) == b"branch B"
    with pytest.raises(RollbackError, match="another state"):
        read(branches[0], counter=shared)
    assert read(branches[1], counter=shared) == b"branch B"


def test_sea_11_a_counter_that_is_missing_foreign_or_set_back_is_refused() -> None:
    counter = FakeCounter()
    states = counted(counter, 3)
    with pytest.raises(RollbackError, match="bound to a counter"):
        read(states[2])
    with pytest.raises(RollbackError, match="not bound to this counter"):
        read(states[2], counter=PlainCounter(3))
    with pytest.raises(RollbackError, match="counter names"):
        read(states[2], counter=FakeCounter(1))
    with pytest.raises(RollbackError, match="not bound"):
        read(bytes(make(b"data").data), counter=counter)
    with pytest.raises(RollbackError, match="gone"):
        engine(MemoryStore(), write=True, create=True, counter=counter)
    with pytest.raises(TypeError, match="counter"):
        read(states[2], counter=5)


def test_sea_11_the_projects_own_counter_dates_a_file(tmp_path: Path) -> None:
    """FileCounter: an old copy and a commit of another branch are refused across openings."""
    path, counter = tmp_path / "file", FileCounter(tmp_path / "counters", name="file")
    with open_sealed(path, "wb", key=KEY, counter=counter) as file:
        file.write(b"first")
    old = path.read_bytes()
    with open_sealed(path, "r+b", key=KEY, counter=counter) as file:
        file.write(b"other")
    counter = FileCounter(tmp_path / "counters", name="file")
    with open_sealed(path, key=KEY, counter=counter) as reader:
        assert reader.read() == b"other"
    path.write_bytes(old)
    with pytest.raises(RollbackError, match="counter names"):
        open_sealed(path, key=KEY, counter=counter)


@pytest.mark.parametrize("kind", [FakeCounter, PlainCounter])
def test_sea_11_a_file_is_bound_to_another_counter(kind: Any) -> None:
    """From none to one, to another and to none: each time the old way no longer opens."""
    store = make(b"data")
    first, second = kind(), kind(7)
    second.id = b"the second counter"
    before: list[tuple[bytes, Any]] = []
    for old, new in ((None, first), (first, second), (second, second), (second, None)):
        before.append((bytes(store.data), old))
        file = engine(store, write=True, counter=old)
        file.write(0, memoryview(b"bound"))
        file.bind(new)
        file.write(5, memoryview(b"more"))
        file.close()
        assert read(bytes(store.data), counter=new) == b"boundmore"
    for copy, old in before[1:]:
        with pytest.raises(RollbackError):
            read(copy, counter=old)
    assert read(before[0][0]) == b"\0ata"  # it never had a counter: the docs say so
    with pytest.raises(RollbackError, match="not bound"):
        read(bytes(store.data), counter=second)
    with open_sealed(store, "rb", key=KEY) as reader, pytest.raises(SealingError, match="reading"):
        reader.bind(first)


def test_sea_11_a_counter_that_fails_leaves_the_commit_in_doubt() -> None:
    class Broken(FakeCounter):
        broken = False

        def advance(self, to: int, mark: bytes = b"") -> None:
            if self.broken:
                raise SealingError("the counter store is gone")
            super().advance(to, mark)

    counter, store = Broken(), MemoryStore()
    file = engine(store, write=True, create=True, counter=counter)
    file.write(0, memoryview(b"first"))
    file.commit()
    counter.broken = True
    file.write(0, memoryview(b"other"))
    for _ in range(2):
        with pytest.raises(SealingError):
            file.commit()
    with pytest.raises(SealingError, match="open it again"):
        file.discard()
    with pytest.raises(SealingError):
        file.close()
    counter.broken = False
    assert read(bytes(store.data), counter=counter) == b"other"


# ---- SEA-12: secrets stay out of what is shown --------------------------------------------------


def test_sea_12_no_secret_in_repr_errors_logs_or_tracebacks(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    key = os.urandom(32)
    path = tmp_path / "file"
    with caplog.at_level(logging.DEBUG), open_sealed(path, "w+b", key=key) as file:
        file.write(b"plaintext of the file")
        shown = [repr(file), repr(file.raw), repr(file.raw.engine), str(file)]
        shown.append(repr(file.raw.engine._keys))
    for other in (bytes(32), key):
        try:
            with open_sealed(path, key=other, name=b"no") as reader:
                reader.read()
        except EnclaveError as error:
            shown += [str(error), repr(error), "".join(traceback.format_exception(error))]
    shown.append(caplog.text)
    for text in shown:
        assert key.hex() not in text
        assert repr(key)[2:-1] not in text
        assert "plaintext of" not in text


def test_sea_12_closing_wipes_keys_and_the_page_in_the_clear() -> None:
    store = MemoryStore()
    file = engine(store, write=True, create=True)
    file.write(0, memoryview(b"plaintext"))
    keys = file._live_keys()
    buffers = [keys._root, keys._mac, keys._names, keys._pages]
    tail = file._tail
    assert bytes(tail[:9]) == b"plaintext"
    file.close()
    assert all(not buffer for buffer in buffers)
    assert not any(tail)
    with pytest.raises(EnclaveError, match="closed"):
        content(file)
    gc.collect()


# ---- PAG-10, PAG-12: a hostile store, and what it sees ----------------------------------------


def test_pag_10_a_store_that_changes_while_it_is_read_gives_a_typed_error() -> None:
    class Hostile(MemoryStore):
        reads = 0

        def pread(self, into: memoryview, offset: int) -> int:
            self.reads += 1
            count = super().pread(into, offset)
            if self.reads > 3 and count:
                into[self.reads % count] ^= 0xFF
            return count

    file = engine(Hostile(bytes(make().data)))
    with pytest.raises(UnsealError):
        content(file)

    class Liar(MemoryStore):
        def pread(self, into: memoryview, offset: int) -> int:
            return super().pread(into, offset) + (1 if offset > 8192 else 0)

    with pytest.raises(UnsealError):
        content(engine(Liar(bytes(make().data))))


def test_pag_10_a_read_that_fails_leaves_nothing_of_the_store_in_the_buffer() -> None:
    """The caller's buffer is where pages are opened: what was not opened is not in it."""

    class Short(MemoryStore):
        error: OSError | None = None
        armed = False

        def pread(self, into: memoryview, offset: int) -> int:
            if not self.armed:
                return super().pread(into, offset)
            if len(into) == 4096 * 8:
                into[:100] = b"x" * 100
                return 100
            if self.error is not None:
                raise self.error
            return 0

    for error in (None, OSError(5, "planted")):
        store = Short(bytes(make().data))
        file = engine(store)
        file.read_into(0, memoryview(bytearray(4096)))
        store.armed, store.error = True, error
        out = bytearray(b"o" * 4096 * 8)
        with pytest.raises((UnsealError, OSError)):
            file.read_into(4096, memoryview(out))
        assert not any(out)
        file.close()


def test_pag_12_the_store_sees_sizes_and_places_but_no_content() -> None:
    """Equal pages are unlike on disk; how many there are is not hidden, as the docs say."""
    data = bytes(make(b"\x5a" * 4096 * 50).data)
    pages = [data[i : i + 4096] for i in range(8192, len(data), 4096)]
    assert len(set(pages)) == len(pages)
    assert b"\x5a" * 8 not in data
    assert Geometry.of(4096).fanout == 85
    assert io.BytesIO(data).getbuffer().nbytes < 60 * 4096
