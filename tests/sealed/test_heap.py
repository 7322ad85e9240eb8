"""Sealed memory as its users see it: arrays, NumPy's temporaries, limits, system calls."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyenclave
from pyenclave.errors import EnclaveClosedError, SealingError, SealLimitError
from pyenclave.sealed.heap import HeapFullError, SealedHeap

MiB = 1 << 20
PAGE = 4096


@pytest.fixture(params=["userfaultfd", "mprotect"])
def heap(request: pytest.FixtureRequest) -> Iterator[SealedHeap]:
    try:
        made = SealedHeap("64 MiB", "1 MiB", mechanism=request.param)
    except pyenclave.errors.EnclaveStateError as error:
        pytest.skip(f"{request.param}: {error}")
    with made:
        yield made


def pages_of(heap: SealedHeap, array: np.ndarray) -> range:
    first = (array.ctypes.data - heap._pages.address) // PAGE
    return range(first, first + -(-array.nbytes // PAGE))


def test_it_is_a_public_name_that_importing_the_package_does_not_load():
    assert pyenclave.SealedHeap is SealedHeap


@pytest.mark.parametrize(
    ("capacity", "resident", "error"),
    [
        (0, MiB, ValueError),
        (-1, MiB, ValueError),
        (True, MiB, TypeError),
        (1.5, MiB, TypeError),
        (None, MiB, TypeError),
        ("64 megabytes", MiB, ValueError),
        ("9" * 400, MiB, ValueError),
        (2**63, MiB, ValueError),
        (2**64, MiB, ValueError),
        (MiB, 0, ValueError),
        (MiB, 252 * 1024, ValueError),
        (MiB, 2**80, ValueError),
        (MiB, "nothing", ValueError),
    ],
)
def test_a_size_that_no_heap_has_is_refused(capacity, resident, error):
    with pytest.raises(error, match=r"capacity|resident"):
        SealedHeap(capacity, resident)


def test_a_demand_that_is_none_is_refused():
    with pytest.raises(ValueError, match="require"):
        SealedHeap(MiB, MiB, require="fast")


def test_a_heap_with_a_path_keeps_its_ciphertext_there_and_removes_it(tmp_path):
    path = tmp_path / "heap"
    plain = np.random.default_rng(3).random(2 * MiB)
    with SealedHeap("32 MiB", "1 MiB", path) as heap:
        array = heap.array(plain)
        heap.evict()
        assert path.stat().st_mode & 0o777 == 0o600
        stored = path.read_bytes()
        assert stored[:16] == b"pyenclave heap\r\n"
        assert len(stored) > 16 * MiB
        assert plain[1000:1004].tobytes() not in stored
        assert np.array_equal(array, plain)
        with pytest.raises(SealingError, match="running process"):
            SealedHeap("32 MiB", "1 MiB", path)
    assert not path.exists()
    array = SealedHeap("32 MiB", "1 MiB", path).zeros(MiB)
    assert path.exists()
    assert not array.any()
    del array
    gc.collect()
    assert not path.exists()


def test_a_file_of_a_heap_that_was_changed_poisons_it(tmp_path):
    path = tmp_path / "heap"
    with SealedHeap("32 MiB", "1 MiB", path) as heap:
        array = heap.array(np.arange(MiB))
        heap.evict()
        with path.open("r+b") as file:
            file.seek(PAGE * (1 + (array.ctypes.data - heap._pages.address) // PAGE + 9) + 5)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(SealingError, match="poisoned"):
            array.sum()


def test_only_the_file_of_a_heap_that_has_ended_is_replaced(tmp_path):
    path = tmp_path / "heap"
    path.write_bytes(b"somebody's work")
    with pytest.raises(SealingError, match="another file"):
        SealedHeap(MiB, MiB, path)
    assert path.read_bytes() == b"somebody's work"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(SealingError, match="taken"):
        SealedHeap(MiB, MiB, link)
    with pytest.raises(SealingError, match=r"taken|another"):
        SealedHeap(MiB, MiB, tmp_path)
    path.write_bytes(b"pyenclave heap\r\n".ljust(5000, b"\0"))
    with SealedHeap(MiB, MiB, path) as heap:
        assert heap.zeros(3).sum() == 0
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        SealedHeap(MiB, MiB, tmp_path / "no such folder" / "heap")


def test_locked_pages_are_counted_or_refused():
    """Where the limit has room (or the process may lock anything) all resident pages are locked."""
    try:
        heap = SealedHeap("8 MiB", "1 MiB", require="locked")
    except SealLimitError as error:
        assert "locked" in str(error)  # noqa: PT017 - both are right, by the machine's limit
        return
    with heap:
        array = heap.zeros(MiB)
        array += 1
        assert heap.stats.locked_bytes == heap.stats.resident_bytes > 0


def test_more_than_the_limit_allows_to_lock_is_refused():
    script = (
        "import resource, pyenclave\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "try:\n"
        "    pyenclave.SealedHeap('64 MiB', '8 MiB', require='locked')\n"
        "except pyenclave.errors.SealLimitError as error:\n"
        "    print('refused:', error)\n"
    )
    words = [sys.executable, "-c", script]
    if os.getuid() == 0:
        drop = "-ipc_lock"
        words = ["setpriv", "--bounding-set", drop, "--inh-caps", drop, *words]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=Path(pyenclave.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: the resident pages cannot be locked")


def test_arrays_are_ordinary_and_most_of_them_is_ciphertext(heap):
    data = np.arange(4 * MiB, dtype=np.float64)
    array = heap.array(data)
    assert type(array) is np.ndarray
    assert array.flags.owndata
    assert array.flags.aligned
    assert array in heap
    assert data not in heap
    assert np.array_equal(array, data)
    assert heap.stats.resident_bytes <= heap.stats.resident_limit == MiB
    assert heap.stats.resident_peak <= MiB
    heap.evict()
    assert heap.stats.resident_bytes == 0
    stored = b"".join(bytes(heap._pages._cipher(page)) for page in pages_of(heap, array))
    assert stored != data.tobytes()
    # Of 8,192 pages no line of 16 bytes is where it was.
    same = np.frombuffer(stored, "V16") == np.frombuffer(data.tobytes(), "V16")
    assert not same.any()
    assert array[12345] == 12345


@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes_types_and_orders_are_numpys(heap, order):
    for dtype in (
        np.uint8,
        np.float32,
        ">i8",
        np.complex128,
        "S7",
        "M8[ns]",
        [("a", "i4"), ("b", "f8")],
    ):
        made = heap.zeros((3, 5, 7), dtype, order=order)
        like = np.zeros((3, 5, 7), dtype, order=order)
        assert made.dtype == like.dtype
        assert made.strides == like.strides
        assert made.tobytes() == like.tobytes()
        assert made in heap
    assert heap.empty(()).shape == ()
    assert heap.empty((0, 3)).size == 0
    assert heap.empty(5).dtype == np.float64


@pytest.mark.parametrize(
    "shape", [2**40, (2**31, 2**31), (2**62, 4), (2**64,), (2**63, 2**63, 2**63), 64 * MiB]
)
def test_arrays_that_do_not_fit_are_a_limit_and_a_memory_error(heap, shape):
    with pytest.raises(SealLimitError, match="no room") as caught:
        heap.empty(shape)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(MemoryError):
        heap.zeros(shape, np.uint16)
    assert heap.empty(8 * MiB - PAGE, np.uint8) in heap


def test_shapes_that_are_none_are_refused_as_numpy_does(heap):
    for shape in (-1, (3, -2), "3", 1.5, None):
        with pytest.raises((ValueError, TypeError)):
            heap.empty(shape)
    with pytest.raises(TypeError):
        heap.empty(3, "no such type")


def test_objects_are_refused_since_they_would_lie_outside(heap):
    for make in (
        lambda: heap.empty(3, object),
        lambda: heap.zeros(3, [("a", object)]),
        lambda: heap.array([{}, None]),
        lambda: heap.array([1], object),
    ):
        with pytest.raises(TypeError, match="Python objects"):
            make()


def test_ranges_of_arrays_that_are_gone_are_free_and_zero_again(heap):
    for _ in range(20):
        array = heap.empty(40 * MiB, np.uint8)
        array[:] = 7
        del array
    assert heap.stats.taken_bytes == 0
    assert not heap.empty(40 * MiB, np.uint8).any()
    part = heap.array(np.arange(MiB))[1000:2000:3]
    gc.collect()
    assert part[7] == 1021
    assert heap.stats.taken_bytes >= 8 * MiB


def test_arrays_keep_the_heap_that_nobody_names():
    array = SealedHeap(8 * MiB, MiB).zeros(MiB)
    gc.collect()
    array += 5
    assert array.sum() == 5 * MiB


def test_a_full_heap_is_usable_again_when_something_goes(heap):
    kept = []
    with pytest.raises(HeapFullError, match="longest free range"):
        kept += [kept.append(heap.empty(5 * MiB, np.uint8)) for _ in range(100)]
    assert len(kept) == 12
    kept.pop(4)
    assert heap.empty(5 * MiB, np.uint8) in heap


def test_a_buffer_is_zeros_that_anything_may_write(heap):
    buffer = heap.buffer("2 MiB")
    assert (buffer.format, buffer.nbytes, buffer.readonly) == ("B", 2 * MiB, False)
    assert bytes(buffer) == bytes(2 * MiB)
    buffer[5:9] = b"mine"
    heap.evict()
    assert bytes(buffer[4:10]) == b"\0mine\0"
    assert buffer in heap


def test_inside_numpy_everything_new_lies_in_the_heap(heap):
    a = heap.array(np.arange(100_000, dtype=np.float64))
    outside = np.ones(3)
    with heap.numpy() as same:
        assert same is heap
        made = [a * 2 + 1, np.sqrt(a), np.zeros(9), a.reshape(100, 1000).T.copy(), a[a > 7]]
        made += [
            np.concatenate([a, a]),
            np.sort(a),
            a.astype(np.int16),
            np.fromiter(range(900), int),
        ]
        made += [np.arange(5.0), np.linspace(0, 1, 7), np.array([1, 2, 3]), np.full(10**4, 3)]
    assert all(array in heap for array in made)
    assert made[-5].tolist() == list(range(900))
    assert outside not in heap
    assert np.ones(3) not in heap
    assert a * 2 not in heap
    assert made[0][-1] == 199_999


def test_arrays_outlive_the_block_and_the_last_one_frees_its_range(heap):
    with heap.numpy():
        made = np.ones(MiB)
    made.resize(2 * MiB, refcheck=False)
    assert made in heap
    assert made.sum() == MiB
    made.resize(10, refcheck=False)
    assert made.sum() == 10
    before = heap.stats.taken_bytes
    del made
    assert heap.stats.taken_bytes < before


def test_blocks_nest_and_each_puts_back_what_was_there():
    with SealedHeap(8 * MiB, MiB) as first, SealedHeap(8 * MiB, MiB) as second:
        with first.numpy():
            a = np.ones(4)
            with second.numpy():
                b = np.ones(4)
                with first.numpy(), first.numpy():
                    c = np.ones(4)
            d = np.ones(4)
        assert [a in first, b in second, c in first, d in first] == [True] * 4
        scope = first.numpy()
        with pytest.raises(ZeroDivisionError), scope:
            1 / 0  # noqa: B018
        with scope, pytest.raises(pyenclave.errors.EnclaveStateError, match="entered"):
            scope.__enter__()
        assert np.ones(4) not in first


def test_other_threads_and_tasks_are_not_concerned(heap):
    seen: dict[str, bool] = {}

    def other(name: str) -> None:
        seen[name] = np.ones(9) in heap

    async def task(name: str, *, inside: bool) -> None:
        if inside:
            with heap.numpy():
                await asyncio.sleep(0)
                seen[name] = np.ones(9) in heap
        else:
            await asyncio.sleep(0)
            seen[name] = np.ones(9) in heap

    async def both() -> None:
        await asyncio.gather(task("in", inside=True), task("out", inside=False))

    with heap.numpy():
        thread = threading.Thread(target=other, args=("thread",))
        thread.start()
        thread.join()
    asyncio.run(both())
    assert seen == {"thread": False, "in": True, "out": False}


def test_numpys_error_of_a_full_heap_leaves_the_block_as_its_own(heap):
    with pytest.raises(HeapFullError, match="no room") as caught, heap.numpy():
        np.ones(9 * MiB)
    assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(MemoryError) as other, heap.numpy():
        raise MemoryError("somebody else's")
    assert type(other.value) is MemoryError


def test_random_use_with_numpy_agrees_with_plain_arrays(heap):
    rng = random.Random(7)
    generator = np.random.default_rng(7)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(300):
        what = rng.randrange(8)
        if what < 2 or not pairs:
            plain = generator.integers(0, 1000, rng.choice([3, 500, 10_000, 150_000]))
            pairs.append((heap.array(plain), plain.copy()))
        elif what == 2:
            pairs.pop(rng.randrange(len(pairs)))
        else:
            ours, plain = pairs[rng.randrange(len(pairs))]
            low = rng.randrange(len(plain))
            part = slice(low, low + rng.randrange(1, 5000), rng.choice([1, 1, 3]))
            if what == 3:
                ours[part] += step
                plain[part] += step
            elif what == 4:
                ours[part] = ours[part][::-1]
                plain[part] = plain[part][::-1].copy()
            elif what == 5:
                ours.sort()
                plain.sort()
            elif what == 6:
                with heap.numpy():
                    pairs.append((ours * 3 - ours[::-1], plain * 3 - plain[::-1]))
            else:
                heap.evict(ours[part])
            assert ours.sum() == plain.sum()
        while sum(plain.nbytes for _, plain in pairs) > 8 * MiB:
            pairs.pop(0)
    assert all(np.array_equal(*pair) for pair in pairs)
    assert heap.stats.resident_peak <= MiB


def test_threads_use_arrays_of_one_heap_at_once(heap):
    failed: list[str] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        with heap.numpy():
            for _ in range(6):
                plain = generator.random(100_000)
                ours = heap.array(plain)
                ours = np.sort(ours * 2 + 1)
                if not np.array_equal(ours, np.sort(plain * 2 + 1)) or ours not in heap:
                    failed.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert heap.stats.taken_bytes <= 16 * PAGE


def test_pages_are_brought_kept_and_sent_away_when_asked(heap):
    array = heap.array(np.arange(MiB))
    heap.evict()
    assert heap.prefetch(array[: 100 * 512]) == 100
    assert heap.stats.resident_bytes == 100 * PAGE
    assert heap.evict(array[: 50 * 512]) == 50
    with heap.pin(array[:512]) as pinned:
        assert pinned is not None
        assert heap.stats.pinned_bytes == PAGE
        heap.evict()
        assert heap.stats.resident_bytes == PAGE
    assert heap.stats.pinned_bytes == 0
    with pytest.raises(SealLimitError, match=r"8\.0 MiB, and .*larger resident="), heap.pin(array):
        pass
    for call in (heap.prefetch, heap.evict):
        with pytest.raises(ValueError, match="does not lie in this heap"):
            call(np.ones(3))
    with pytest.raises(ValueError, match="does not lie"), heap.pin(b"bytes"):
        pass


def test_a_system_call_on_sealed_pages_fails_or_is_right(heap):
    """`os.write`, `tofile`, `readinto`, `send`: an error, a part, or all; never other bytes."""
    plain = np.random.default_rng(1).integers(0, 256, 600_000, np.uint8)
    array = heap.array(plain)
    heap.evict()
    with tempfile.TemporaryFile(buffering=0) as file:
        with pytest.raises(OSError, match="Bad address"):
            os.write(file.fileno(), array)
        assert array[0] == plain[0]
        heap.prefetch(array[:PAGE])
        done = os.write(file.fileno(), array)
        assert 0 < done < array.nbytes
        file.seek(0)
        assert file.read() == plain.tobytes()[:done]
        heap.evict()
        file.seek(0)
        with pytest.raises(OSError, match=r"Bad address|requested and"):
            array.tofile(file)
        file.seek(0)
        file.write(plain.tobytes())
        file.seek(0)
        with pytest.raises(OSError, match="Bad address"):
            file.readinto(array)
    left, right = socket.socketpair()
    with left, right, pytest.raises(OSError, match="Bad address"):
        left.send(array)
    assert np.array_equal(array, plain)


def test_the_helpers_make_system_calls_work(heap, tmp_path):
    plain = np.random.default_rng(1).integers(0, 256, 3_000_001, np.uint8)
    array = heap.array(plain)
    heap.evict()
    path = tmp_path / "data"
    with path.open("wb") as file:
        assert heap.write_to(file, array) == plain.nbytes
    assert path.read_bytes() == plain.tobytes()
    other = heap.empty(plain.shape, plain.dtype)
    with path.open("rb") as file:
        assert heap.read_into(file, other[:1000]) == 1000
        assert heap.read_into(file, other[1000:]) == plain.nbytes - 1000
        assert heap.read_into(file, other) == 0
    assert np.array_equal(other, plain)
    heap.evict()
    fd = os.open(path, os.O_RDWR)
    try:
        assert heap.read_into(fd, other.reshape(1, -1)) == plain.nbytes
        assert heap.write_to(fd, other[:10]) == 10
    finally:
        os.close(fd)
    memory = io.BytesIO()
    assert heap.write_to(memory, array.view("V1")) == plain.nbytes
    assert memory.getvalue() == plain.tobytes()
    assert heap.stats.pinned_bytes == 0
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=heap.write_to, args=(left, array[:500_000]))
        sender.start()
        assert heap.read_into(right, other[:500_000]) == 500_000
        sender.join()
    assert np.array_equal(other, plain)


def test_the_helpers_refuse_what_they_cannot_move(heap):
    array = heap.zeros((100, 100))
    for wrong in (array[:, ::2], array.T[3:]):
        with pytest.raises(ValueError, match="not contiguous"):
            heap.write_to(io.BytesIO(), wrong)
    with pytest.raises(TypeError, match="file"):
        heap.write_to("name", array)
    with pytest.raises(TypeError, match="file"):
        heap.read_into(None, array)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        heap.read_into(io.BytesIO(), array)
    with pytest.raises(ValueError, match="does not lie"):
        heap.write_to(io.BytesIO(), np.ones(3))


def test_after_closing_nothing_works_and_all_say_why():
    heap = SealedHeap(8 * MiB, MiB)
    array = heap.array(np.arange(1000))
    heap.close()
    heap.close()
    assert heap.closed
    for use in (
        lambda: heap.empty(3),
        lambda: heap.array([1]),
        lambda: heap.stats,
        lambda: heap.numpy().__enter__(),
        lambda: heap.prefetch(array),
        lambda: heap.write_to(io.BytesIO(), array),
        heap.__enter__,
    ):
        with pytest.raises(EnclaveClosedError, match="closed"):
            use()
    assert "closed" in repr(heap)


def test_a_heap_is_neither_pickled_nor_copied(heap):
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(heap)


def test_a_watch_samples_shows_and_draws(heap, tmp_path):
    out = io.StringIO()
    with heap.watch(0.01, show=True, file=out) as watch:
        array = heap.zeros(2 * MiB)
        for _ in range(3):
            array += 1
    assert len(watch.samples) > 2
    assert watch.samples[-1].stats.pages_out > 1000
    assert "plaintext" in out.getvalue()
    watch.save(tmp_path / "course.svg")
    picture = (tmp_path / "course.svg").read_text()
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "plaintext, of at most 1.0 MiB" in picture
    with pytest.raises(RuntimeError, match="once"):
        watch.__enter__()
    for wrong in (0, -1, 1e9, float("nan")):
        with pytest.raises(ValueError, match="interval"):
            heap.watch(wrong)


@pytest.mark.parametrize(
    "kind", ["", *(["isolated", "legacy"] if sys.version_info >= (3, 13) else [])]
)
def test_another_interpreter_of_the_process_is_refused(kind: str):
    """Handlers and tables are the process's: _core is loaded in one interpreter only."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    script = (
        "import pyenclave\n"
        "heap = pyenclave.SealedHeap('1 MiB', '1 MiB')\n"
        f"import {name} as sub\n"
        f"other = sub.create({kind!r})\n"
        "try:\n"
        "    failed = sub.run_string(other, 'import pyenclave._core')\n"
        "    if failed is not None:\n"
        "        print('refused:', failed.formatted)\n"
        "except Exception as error:\n"
        "    print('refused:', error)\n"
        "sub.destroy(other)\n"
    ).replace("create('')", "create()")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(pyenclave.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout
    assert "interpreter" in done.stdout
