"""The version tree: what it keeps, what it refuses, and that nothing is lost when storage fails."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from test_epoch import key_of
from tree_ends import (
    FANOUT,
    NAME,
    NOTHING,
    SECRET,
    Epoch,
    StatusError,
    Storage,
    Tree,
    check,
    entry,
    memory,
)

from pyenclave._ffi import ffi, lib

DISK_FULL = lib.PYE_E_OS


def refused(status: int, call, *args) -> None:
    with pytest.raises(StatusError) as error:
        call(*args)
    assert error.value.status == status, error.value


def spread(pages: int) -> list[int]:
    """Pages at every border of every level."""
    step, found = 1, {0, pages - 1}
    while step < pages:
        found |= {step - 1, step, step + 1, pages - step}
        step *= FANOUT
    return sorted(page for page in found if 0 <= page < pages)


# ---- what it keeps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "levels"),
    [(1, 1), (128, 1), (129, 2), (128**2, 2), (128**2 + 1, 3), (2**28, 4), (2**36, 6), (2**40, 6)],
)
def test_what_is_put_is_got_at_every_border(pages: int, levels: int) -> None:
    tree = Tree(pages)
    assert tree.stats["levels"] == levels
    places = spread(pages)
    assert tree.get_many(places) == [NOTHING] * len(places)
    tree.put_many(places, map(entry, places))
    tree.trim()
    assert tree.stats["cached"] == tree.stats["dirty"] == 0
    assert tree.get_many(places) == [entry(page) for page in places]
    assert max(tree.storage.nodes) == lib.pye_tree_num_nodes(pages) - 1
    for page in {(place + 1) % pages for place in places} - set(places):
        assert tree.get(page) == [NOTHING]


def test_a_run_crosses_leaves_and_is_one_look_for_each() -> None:
    tree = Tree(10_000)
    entries = [entry(page) for page in range(100, 600)]
    tree.put(100, *entries)
    tree.trim()
    tree.storage.log.clear()
    assert tree.get(100, 500) == entries
    loads = [node for what, node in tree.storage.log if what == "load"]
    assert loads == [lib.pye_tree_num_nodes(10_000) - 1, 0, 1, 2, 3, 4]
    assert tree.get(90, 20) == [NOTHING] * 10 + entries[:10]
    assert tree.stats["loads"] == 6


def test_an_entry_of_version_zero_is_nothing() -> None:
    tree = Tree(1000)
    tree.put(5, entry(5))
    tree.put(5, (0, b"\xff" * 16, 99))
    assert tree.get(5) == [NOTHING]


def test_random_steps_are_as_of_a_dictionary() -> None:
    """Single pages, runs and scattered batches, in a cache that is far too small, and trims."""
    rng = random.Random(5)
    pages = 3 * 128**2 + 77
    tree = Tree(pages, 24)
    model: dict[int, tuple[int, bytes, int]] = {}
    for step in range(6_000):
        what = rng.randrange(13)
        if what < 4:
            first = rng.randrange(pages)
            num = min(rng.choice([1, 2, 64, 256]), pages - first)
            assert tree.get(first, num) == [
                model.get(page, NOTHING) for page in range(first, first + num)
            ]
        elif what < 7:
            first = rng.randrange(pages)
            num = min(rng.choice([1, 3, 130]), pages - first)
            new = [entry(rng.randrange(2**40)) for _ in range(num)]
            tree.put(first, *new)
            model.update(zip(range(first, first + num), new, strict=True))
        elif what < 11:
            places = [rng.randrange(pages) for _ in range(rng.choice([1, 5, 40]))]
            if what == 7:  # given back
                tree.put_many(places, [NOTHING] * len(places))
                for place in places:
                    model.pop(place, None)
            elif what < 10:
                new = [entry(rng.randrange(2**40)) for _ in places]
                tree.put_many(places, new)
                model.update(zip(places, new, strict=True))
            else:
                assert tree.get_many(places) == [model.get(place, NOTHING) for place in places]
        elif what == 11:
            first = rng.randrange(pages)
            num = min(rng.choice([1, 100, 5000]), pages - first)
            tree.clear(first, num)
            for page in [page for page in model if first <= page < first + num]:
                del model[page]
        elif step % 20 == 0:
            tree.trim(rng.randrange(24))
        stats = tree.stats
        assert stats["cached"] <= 24
        assert stats["dirty"] <= stats["cached"]
    for page, value in model.items():
        assert tree.get(page) == [value]
    assert tree.stats["stores"] > 1000


# ---- what it costs ---------------------------------------------------------------------------


def test_what_was_never_put_takes_no_storage() -> None:
    tree = Tree(2**40)
    assert tree.get_many(range(0, 2**40, 2**34 + 3)) == [NOTHING] * 64
    tree.trim()
    assert tree.storage.log == []
    tree.put(2**39, entry(1))
    tree.trim()
    assert len(tree.storage.nodes) == tree.stats["levels"]


def test_nodes_that_became_zero_are_dropped_and_cost_nothing_again() -> None:
    tree = Tree(2**21)
    places = list(range(0, 2**21, 128 * 128 + 1))
    tree.put_many(places, map(entry, places))
    tree.trim()
    assert len(tree.storage.nodes) > 2 * len(places)
    tree.put_many(places, [NOTHING] * len(places))
    tree.trim()
    assert tree.storage.nodes == {}
    tree.storage.log.clear()
    assert tree.get_many(places) == [NOTHING] * len(places)
    tree.trim()
    assert tree.storage.log == []


def test_giving_back_everything_costs_what_was_in_use() -> None:
    tree = Tree(2**40)
    places = [5, 2**20 + 1, 2**30, 2**40 - 1]
    tree.put_many(places, map(entry, places))
    tree.trim()
    tree.storage.log.clear()
    made = tree.stats["made"]
    tree.clear(0, 2**40)
    assert tree.stats["made"] == made
    assert tree.get_many(places) == [NOTHING] * 4
    assert sum(what == "load" for what, _ in tree.storage.log) < 30
    tree.trim()
    assert tree.storage.nodes == {}
    tree.clear(3, 2**39)
    assert tree.stats["cached"] == 0
    # What is in the cache only is given back, too, and no more than was said.
    tree.put(1000, *map(entry, range(300)))
    tree.clear(1001, 298)
    assert tree.get(1000, 300) == [entry(0), *[NOTHING] * 298, entry(299)]
    tree.put(1000, *map(entry, range(300)))
    tree.trim()
    tree.clear(1001, 298)
    tree.trim()
    assert tree.get(1000, 300) == [entry(0), *[NOTHING] * 298, entry(299)]
    for first, num in ((2**40, 1), (0, 2**40 + 1), (2**64 - 1, 2)):
        refused(lib.PYE_E_ARGUMENT, tree.clear, first, num)
    refused(lib.PYE_E_LENGTH, tree.clear, 0, 0)
    tree.trim()
    tree.storage.fail_load = lib.PYE_E_OS
    refused(lib.PYE_E_OS, tree.clear, 0, 2**40)


def test_a_node_that_did_not_change_is_not_stored_again() -> None:
    tree = Tree(10_000)
    tree.put(7, entry(7))
    tree.trim()
    stored = len(tree.storage.kept)
    for _ in range(5):
        assert tree.get(7) == [entry(7)]
        tree.trim()
    assert len(tree.storage.kept) == stored
    tree.put(7, entry(8))
    tree.trim()
    assert len(tree.storage.kept) == stored + 2


def test_the_cache_keeps_what_is_wanted_and_its_size() -> None:
    tree = Tree(128 * 200, 32)
    for number in range(4000):
        tree.get(128 * (number % 200))
        tree.get(0)
        assert tree.stats["cached"] <= 32
    # The one that is always wanted was brought once, or nearly.
    assert tree.stats["found"] >= 4000 - 100
    before = tree.stats["made"]
    tree.get(1)
    assert tree.stats["made"] == before


def test_memory_is_the_cache_and_little_more() -> None:
    options = ffi.new("pye_tree_options *", {"num_pages": 2**28})
    nodes = lib.PYE_TREE_CACHE
    assert 4096 * nodes < lib.pye_tree_size(options) < 4096 * nodes * 1.02
    small = ffi.new("pye_tree_options *", {"num_pages": 2**40, "cache_nodes": 16})
    assert lib.pye_tree_size(small) < 80 * 1024


def test_nothing_beyond_its_memory_is_written() -> None:
    tree = Tree(2**20, 16)
    for page in range(0, 2**20, 999):
        tree.put(page, entry(page))
    at = int(ffi.cast("uintptr_t", tree.tree)) - int(ffi.cast("uintptr_t", tree.raw))
    raw = bytes(tree.raw)
    assert set(raw[:at] + raw[at + tree.size :]) == {0xA5}


# ---- the bytes -------------------------------------------------------------------------------


def test_a_node_is_sealed_as_the_document_says() -> None:
    """docs/formats/heap.md, written a second time: from the root down."""
    pages = 128**2 * 3
    tree = Tree(pages)
    tree.put(128 * 130 + 5, entry(1234))
    tree.trim()
    # 384 leaves, then the 3 above them, then 1.
    assert lib.pye_tree_num_nodes(pages) == 388
    assert sorted(tree.storage.nodes) == [130, 385, 387]
    # They were sealed from the leaf up, so versions are 1, 2, 3; the tag of the root is found.
    found = {}
    for level, (node, version) in enumerate([(130, 1), (385, 2), (387, 3)]):
        head = b"PYEPAGE1" + NAME + (4096 * node).to_bytes(8, "little")
        head += version.to_bytes(8, "little") + level.to_bytes(4, "little") + b"\x03" + bytes(19)
        sealed = tree.storage.nodes[node]
        # AES-GCM's stream does not need the tag: decrypt, then compare what a fresh seal gives.
        nonce = version.to_bytes(8, "big") + bytes(4)
        cipher = AESGCM(key_of(0))
        plain = cipher.encrypt(nonce, sealed, None)[:4096]
        again = cipher.encrypt(nonce, plain, head)
        assert again[:4096] == sealed
        found[level] = (plain, again[4096:])
    for level in (0, 1):
        version, place = level + 1, (130 >> 7 * level) % 128
        child = version.to_bytes(8, "little") + found[level][1] + bytes(8)
        plain = bytearray(4096)
        plain[32 * place : 32 * place + 32] = child
        assert found[level + 1][0] == plain, level
    leaf = bytearray(4096)
    number, tag, flags = entry(1234)
    leaf[160:192] = number.to_bytes(8, "little") + tag + flags.to_bytes(8, "little")
    assert found[0][0] == leaf


# ---- what it refuses -------------------------------------------------------------------------


def dead(tree: Tree) -> None:
    """The tree is poisoned for good, and keeps neither key nor entries."""
    refused(lib.PYE_E_POISONED, tree.get, 0)
    refused(lib.PYE_E_POISONED, tree.get_many, [0])
    refused(lib.PYE_E_POISONED, tree.put, 0, entry(0))
    refused(lib.PYE_E_POISONED, tree.put_many, [0], [entry(0)])
    refused(lib.PYE_E_POISONED, tree.prepare, [0])
    refused(lib.PYE_E_POISONED, tree.clear, 0, 1)
    refused(lib.PYE_E_POISONED, tree.trim)
    refused(lib.PYE_E_POISONED, lambda: check(lib.pye_tree_skip(tree.tree, 2**36)))
    refused(lib.PYE_E_CLOSED, tree.epoch.to_seal)
    assert SECRET not in bytes(tree.epoch.raw)
    lib.pye_tree_destroy(tree.tree)
    refused(lib.PYE_E_POISONED, tree.get, 0)


def filled(storage: Storage | None = None, **options: bytes) -> Tree:
    """A tree of three levels with nodes of each in storage, and none in the cache."""
    tree = Tree(128**2 * 3, storage=storage, **options)
    places = range(0, 128**2 * 3, 1500)
    tree.put_many(places, map(entry, places))
    tree.trim()
    return tree


def test_PAG_04_any_changed_byte_of_any_node_ends_the_tree() -> None:
    # Page 0 is reached through nodes 0, 384 and 387; a bit of every 64th byte, and of the last.
    for node in (0, 384, 387):
        for at in [*range(node % 7, 4096, 64), 4095]:
            tree = filled()
            sealed = bytearray(tree.storage.nodes[node])
            sealed[at] ^= 1 << at % 8
            tree.storage.nodes[node] = bytes(sealed)
            refused(lib.PYE_E_AUTH, tree.get, 0)
            dead(tree)


def test_PAG_01_every_older_version_of_a_node_ends_the_tree() -> None:
    """A leaf, an inner node and the topmost are each stored ten times."""

    def run(offer: tuple[int, int] | None) -> Tree:
        tree = filled()
        for number in range(10):
            tree.put(0, entry(1000 + number))
            tree.trim()
        if offer is not None:
            node, which = offer
            versions = [sealed for kept, sealed in tree.storage.kept if kept == node]
            assert len(versions) == 11
            assert versions[-1] == tree.storage.nodes[node]
            tree.storage.nodes[node] = versions[which]
        return tree

    assert run(None).get(0) == [entry(1009)]
    for node in (0, 384, 387):
        for which in range(10):
            tree = run((node, which))
            refused(lib.PYE_E_AUTH, tree.get, 0)
            dead(tree)


def test_PAG_01_the_whole_storage_as_it_was_before_ends_the_tree() -> None:
    tree = filled()
    before = dict(tree.storage.nodes)
    tree.put(0, entry(77))
    tree.trim()
    tree.storage.nodes = before
    refused(lib.PYE_E_AUTH, tree.get, 0)
    dead(tree)


def test_PAG_02_any_two_nodes_exchanged_end_the_tree() -> None:
    names = sorted(filled().storage.nodes)
    for other in names:
        if other == 0:
            continue
        tree = filled()
        nodes = tree.storage.nodes
        nodes[0], nodes[other] = nodes[other], nodes[0]
        refused(lib.PYE_E_AUTH, tree.get, 0)
        dead(tree)


@pytest.mark.parametrize("what", [{"secret": b"\x01" * 32}, {"name": b"\x02" * 16}])
def test_PAG_03_nodes_of_another_tree_end_the_tree(what: dict[str, bytes]) -> None:
    tree, other = filled(), filled(**what)
    tree.storage.nodes = dict(other.storage.nodes)
    refused(lib.PYE_E_AUTH, tree.get, 0)
    dead(tree)
    assert other.get(0) == [entry(0)]


def test_PAG_03_a_page_sealed_by_the_heap_is_no_node() -> None:
    """Even under the tree's own key: an ordinary page at a node's address has another type."""
    tree = filled()
    info = ffi.new("pye_page_info *", {"address": 0, "flags": 0, "type": 2})
    out, tag, version = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[16]"), ffi.new("uint64_t *")
    check(lib.pye_page_seal(tree.epoch.to_seal(), out, tag, version, b"\x01" * 4096, info))
    tree.storage.nodes[0] = bytes(out)
    refused(lib.PYE_E_AUTH, tree.get, 0)
    dead(tree)


def test_a_run_that_meets_a_bad_node_gives_zeroes_only() -> None:
    tree = Tree(1000)
    tree.put(0, *map(entry, range(1000)))
    tree.trim()
    tree.storage.nodes[3] = bytes(4096)
    refused(lib.PYE_E_AUTH, tree.get, 0, 1000)
    dead(tree)


def test_scattered_pages_that_meet_a_bad_node_end_the_tree_too() -> None:
    for put in (False, True):
        tree = Tree(1000)
        tree.put(0, *map(entry, range(1000)))
        tree.trim()
        tree.storage.nodes[3] = bytes(4096)
        if put:
            refused(lib.PYE_E_AUTH, tree.put_many, [1, 400], [entry(1), entry(2)])
        else:
            refused(lib.PYE_E_AUTH, tree.get_many, [1, 400])
        dead(tree)


def test_storage_may_give_memory_of_its_own() -> None:
    storage = Storage()
    storage.own = ffi.new("uint8_t[4096]")
    tree = filled(storage)
    places = list(range(0, 128**2 * 3, 1500))
    assert tree.get_many(places) == [entry(page) for page in places]


def test_wrong_arguments_are_refused_and_nothing_happens() -> None:
    tree = Tree(1000)
    for first, num in ((1000, 1), (999, 2), (0, 1001), (2**64 - 1, 2)):
        refused(lib.PYE_E_ARGUMENT, tree.get, first, num)
    for bad in ([1000], [0, 2**64 - 1], [5, 1000, 5]):
        refused(lib.PYE_E_ARGUMENT, tree.get_many, bad)
        refused(lib.PYE_E_ARGUMENT, tree.put_many, bad, [entry(1)] * len(bad))
        refused(lib.PYE_E_ARGUMENT, tree.prepare, bad)
    refused(lib.PYE_E_ARGUMENT, tree.put, 999, entry(1), entry(2))
    entries, pages = ffi.new("pye_tree_entry[4]"), ffi.new("uint64_t[4]")
    null, t = ffi.NULL, tree.tree
    for call in (lib.pye_tree_get, lib.pye_tree_put):
        assert call(t, entries, 0, 0) == lib.PYE_E_LENGTH
        assert call(t, null, 0, 1) == lib.PYE_E_ARGUMENT
        assert call(null, entries, 0, 1) == lib.PYE_E_ARGUMENT
    for call in (lib.pye_tree_get_many, lib.pye_tree_put_many):
        assert call(t, entries, pages, 0) == lib.PYE_E_LENGTH
        assert call(t, null, pages, 1) == lib.PYE_E_ARGUMENT
        assert call(t, entries, null, 1) == lib.PYE_E_ARGUMENT
        assert call(null, entries, pages, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_tree_prepare(t, pages, 0) == lib.PYE_E_LENGTH
    assert lib.pye_tree_prepare(t, null, 1) == lib.PYE_E_ARGUMENT
    assert lib.pye_tree_trim(null, 0) == lib.PYE_E_ARGUMENT
    assert lib.pye_tree_skip(null, 5) == lib.PYE_E_ARGUMENT
    assert tree.get(0, 1000) == [NOTHING] * 1000
    tree.trim()
    assert tree.storage.log == []
    lib.pye_tree_destroy(null)
    lib.pye_tree_release(null)


def test_options_that_cannot_be_are_refused() -> None:
    epoch, storage = Epoch(), Storage()
    raw, at = memory(1 << 20, off=32)

    def options(pages: int = 1000, cache: int = 16) -> object:
        made = ffi.new("pye_tree_options *", {"num_pages": pages, "cache_nodes": cache})
        made.key = epoch.key
        storage.fill(made.storage)
        return made

    good = ffi.cast("pye_tree *", at + 32)
    for bad in (
        options(pages=0),
        options(pages=2**40 + 1),
        options(cache=15),
        options(cache=lib.PYE_TREE_MAX_CACHE + 1),
    ):
        assert lib.pye_tree_size(bad) == 0
        assert lib.pye_tree_init(good, bad) == lib.PYE_E_ARGUMENT
    for pages in (0, 2**40 + 1, 2**64 - 1):
        assert lib.pye_tree_num_nodes(pages) == 0
    assert lib.pye_tree_size(ffi.NULL) == 0
    assert lib.pye_tree_init(good, ffi.NULL) == lib.PYE_E_ARGUMENT
    assert lib.pye_tree_init(ffi.NULL, options()) == lib.PYE_E_ARGUMENT
    assert lib.pye_tree_init(ffi.cast("pye_tree *", at), options()) == lib.PYE_E_ALIGNMENT
    for missing in ("load", "store"):
        bad = options()
        setattr(bad.storage, missing, ffi.NULL)
        assert lib.pye_tree_init(good, bad) == lib.PYE_E_ARGUMENT
    bad = options()
    bad.key = ffi.NULL
    assert lib.pye_tree_init(good, bad) == lib.PYE_E_ARGUMENT
    for cache in (16, lib.PYE_TREE_MAX_CACHE):
        assert lib.pye_tree_size(options(cache=cache)) > 4096 * cache
    bad = options()
    bad.storage.drop = ffi.NULL
    assert lib.pye_tree_init(good, bad) == lib.PYE_OK
    assert raw is not None


def test_a_tree_that_is_over_or_was_forked_says_so() -> None:
    tree = filled()
    lib.pye_tree_destroy(tree.tree)
    lib.pye_tree_destroy(tree.tree)
    refused(lib.PYE_E_CLOSED, tree.get, 0)
    refused(lib.PYE_E_CLOSED, tree.put, 0, entry(1))
    refused(lib.PYE_E_CLOSED, tree.epoch.to_seal)
    tree = filled()
    ffi.memmove(tree.raw, bytes(len(tree.raw)), len(tree.raw))
    refused(lib.PYE_E_STATE, tree.get, 0)
    refused(lib.PYE_E_STATE, tree.put_many, [0], [entry(1)])
    refused(lib.PYE_E_STATE, tree.trim)
    lib.pye_tree_destroy(tree.tree)
    refused(lib.PYE_E_STATE, tree.get, 0)


# ---- storage that fails ----------------------------------------------------------------------


def test_PAG_10_a_failing_load_gives_its_status_and_may_be_repeated() -> None:
    tree = filled()
    for status in (lib.PYE_E_OS, lib.PYE_E_DENIED):
        tree.storage.fail_load = status
        refused(status, tree.get, 3000)
        refused(status, tree.put, 3000, entry(1))
        refused(status, tree.prepare, [3000])
    tree.storage.fail_load = 0
    assert tree.get(3000) == [entry(3000)]
    assert tree.get(1500) == [entry(1500)]


def test_PAG_10_a_failing_store_loses_nothing() -> None:
    """ENOSPC while nodes leave: what was put before stays, the call may be made again."""
    tree = Tree(128 * 100, 16)
    tree.storage.fail_store = DISK_FULL
    done = list(range(15))  # with the topmost, the cache is full
    for leaf in done:
        tree.put(128 * leaf, entry(leaf))
    refused(DISK_FULL, tree.put, 128 * 15, entry(15))
    assert tree.storage.nodes == {}
    refused(DISK_FULL, tree.get, 128 * 50)
    refused(DISK_FULL, tree.trim)
    assert tree.get_many([128 * leaf for leaf in done]) == [entry(leaf) for leaf in done]
    tree.storage.fail_store = 0
    for leaf in range(len(done), 100):
        tree.put(128 * leaf, entry(leaf))
    assert tree.get_many([128 * leaf for leaf in range(100)]) == [entry(i) for i in range(100)]


def test_prepared_leaves_stay_so_that_their_versions_can_be_put() -> None:
    """Storage fails between the two, and others are wanted in their place."""
    tree = Tree(2**36, 6 * 41)
    rng = random.Random(9)
    for _ in range(20):
        pages = [rng.randrange(2**36) for _ in range(40)]
        tree.prepare(pages)
        tree.get_many([rng.randrange(2**36) for _ in range(20)])
        tree.storage.fail_store = tree.storage.fail_load = DISK_FULL
        tree.put_many(pages, map(entry, pages))
        tree.storage.fail_store = tree.storage.fail_load = 0
        tree.release()
        assert tree.get_many(pages) == [entry(page) for page in pages]


def test_a_preparation_of_long_ago_does_not_count_when_its_number_comes_again() -> None:
    """Numbers have 32 bits; the tree's words are looked for, and the last number set to the end."""
    tree = Tree(20 * 128)
    tree.prepare([0])  # number 1
    for _ in range(8):
        tree.prepare([128])
    words = ffi.cast("uint32_t *", tree.tree)
    (at,) = [i for i in range(64) if words[i] == words[i + 1] == 9]
    tree.release()
    words[at + 1] = 2**32 - 1
    tree.prepare([256])
    assert (words[at], words[at + 1]) == (1, 1)
    tree.trim(2)  # the new leaf and what is above it; the one of long ago leaves
    assert tree.stats["cached"] == 2


def test_more_than_the_cache_cannot_be_prepared_and_then_nothing_is() -> None:
    tree = Tree(128 * 100, 16)  # two levels
    refused(lib.PYE_E_LIMIT, tree.prepare, [128 * leaf for leaf in range(16)])
    assert tree.get_many([128 * leaf for leaf in range(100)]) == [NOTHING] * 100
    tree.prepare([128 * leaf for leaf in range(14)])
    refused(lib.PYE_E_LIMIT, tree.trim)
    assert tree.stats["cached"] == 15
    assert tree.get_many([128 * 50, 128 * 51]) == [NOTHING] * 2  # in the one slot that is left
    # The next preparation ends this one.
    tree.prepare([128 * leaf for leaf in range(60, 74)])
    tree.release()
    tree.trim()
    assert tree.stats["cached"] == 0


def test_PAG_06_the_key_of_the_nodes_moves_to_the_next_epoch() -> None:
    tree = filled()
    check(lib.pye_tree_skip(tree.tree, 2**36 - 1))
    for number in range(4):
        tree.put(1500 * number, entry(5000 + number))
        tree.trim()
    assert lib.pye_epoch_number(tree.epoch.key) == 1
    assert [tree.get(1500 * number) for number in range(4)] == [[entry(5000 + n)] for n in range(4)]
    assert tree.get(1500 * 20) == [entry(1500 * 20)]


def test_PAG_06_when_no_epoch_is_left_the_tree_is_destroyed() -> None:
    tree = filled()
    check(lib.pye_tree_skip(tree.tree, 2**64 - 2**40 + 2**36 + 1))
    tree.put(0, entry(9))
    refused(lib.PYE_E_LIMIT, tree.trim)
    refused(lib.PYE_E_CLOSED, tree.get, 0)
    refused(lib.PYE_E_CLOSED, tree.epoch.to_seal)


def test_storage_in_memory_keeps_nodes_at_their_numbers() -> None:
    pages = 128**2
    nodes = ffi.new("uint8_t[]", 4096 * lib.pye_tree_num_nodes(pages))
    tree = Tree(pages, base=nodes)
    places = list(range(0, pages, 97))
    tree.put_many(places, map(entry, places))
    tree.trim()
    assert any(nodes[128 * 4096 : 129 * 4096])
    assert tree.get_many(places) == [entry(page) for page in places]
    tree.put_many(places, [NOTHING] * len(places))
    tree.trim()
    assert tree.get_many(places) == [NOTHING] * len(places)
    tree.put_many(places, map(entry, places))
    tree.trim()
    nodes[0] ^= 1
    refused(lib.PYE_E_AUTH, tree.get, 0)
