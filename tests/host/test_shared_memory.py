"""``enclave.shared``: the allocator, the arrays' lives, and real enclaves."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
import select
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import pyenclave
from pyenclave.errors import (
    ArgumentError,
    BusyError,
    CallTimeoutError,
    EnclaveClosedError,
    EnclaveLostError,
    EnclaveStateError,
)
from pyenclave.formats.image import Image
from pyenclave.host._arena import Blocks
from pyenclave.image.build import build_script
from pyenclave.measurement.image import measure_image

SIZE = 8 << 20
SOURCE = """
import time
import numpy as np
import pyenclave

@pyenclave.ecall
def negate(x: np.ndarray) -> np.ndarray:
    return -x

@pyenclave.ecall
def late(x: np.ndarray, seconds: float) -> np.ndarray:
    time.sleep(seconds)
    return x

@pyenclave.ecall
def total(x: np.ndarray) -> float:
    return float(x.sum())
"""


# ---- who has which bytes -----------------------------------------------------------------------


class Taking(RuleBasedStateMachine):
    """No two holders have a byte in common, and what is given back can be had again."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 1 << 14
        self.blocks = Blocks(self.size)
        self.held: dict[int, int] = {}

    @rule(size=st.integers(1, 5000))
    def take(self, size: int) -> None:
        at = self.blocks.take(size)
        if at is None:
            assert self.blocks.state()[1] < -(-size // 64) * 64
        else:
            assert at % 64 == 0
            assert at not in self.held
            self.held[at] = size

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False))
    def give_back(self, choice: random.Random) -> None:
        at = choice.choice(sorted(self.held))
        self.blocks.give_back(at, self.held.pop(at))

    @invariant()
    def nothing_is_held_twice_and_nothing_is_lost(self) -> None:
        end = 0
        used = 0
        for at, size in sorted(self.held.items()):
            assert at >= end
            end = at + size
            used += -(-size // 64) * 64
        assert end <= self.size
        assert self.blocks.state()[0] == self.size - used


TestTaking = Taking.TestCase
TestTaking.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_all_of_the_memory_can_be_had_again_in_one_piece():
    blocks = Blocks(1 << 16)
    held = [(blocks.take(64 * size), 64 * size) for size in range(1, 40)]
    random.Random(3).shuffle(held)
    for at, size in held:
        assert at is not None
        blocks.give_back(at, size)
    assert blocks.take(1 << 16) == 0
    assert blocks.take(1) is None
    assert blocks.state() == (0, 0)


def test_blocks_are_taken_and_given_back_by_many_threads():
    blocks = Blocks(64 * 300)
    owners = np.zeros(300, np.int64)
    wrong: list[int] = []

    def work(me: int) -> None:
        for turn in range(400):
            size = 64 * (1 + turn % 7)
            at = blocks.take(size)
            if at is None:
                continue
            mine = owners[at // 64 : (at + size) // 64]
            if mine.any():
                wrong.append(me)
            mine[...] = me
            mine[...] = 0
            blocks.give_back(at, size)

    threads = [threading.Thread(target=work, args=(number + 1,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert blocks.state() == (64 * 300, 64 * 300)


# ---- arrays ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "entry.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def image(script):
    return build_script(script, shared_memory=SIZE)


@pytest.fixture(scope="module")
def state(tmp_path_factory, used):
    return used(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def warm(image, state):
    """Keeps the platform and the zygote."""
    with pyenclave.Enclave(image, state=state, quiet=True) as enclave:
        yield enclave


@pytest.fixture
def enclave(image, state, warm):
    with pyenclave.Enclave(image, state=state, quiet=True) as enclave:
        yield enclave


def test_what_is_no_array_of_the_memory_is_refused(enclave):
    shared = enclave.shared
    with pytest.raises(ArgumentError, match="larger than the shared memory"):
        shared.empty(SIZE + 1, np.uint8)
    with pytest.raises(ArgumentError, match="larger"):
        shared.empty((2**40, 2**40, 2**40))
    for kind in (object, [("a", "O")], "V0", "S0"):
        with pytest.raises(ArgumentError, match="cannot be in shared memory"):
            shared.empty(3, kind)
    for shape in (-1, (3, -1)):
        with pytest.raises(ValueError, match="negative"):
            shared.empty(shape)
    for shape in (2.0, "3", None, (1.5,)):
        with pytest.raises((TypeError, AttributeError)):
            shared.empty(shape)
    assert shared.free == SIZE


def test_a_full_memory_names_what_is_free_and_what_was_asked(enclave):
    shared = enclave.shared
    kept = [shared.empty(SIZE // 4, np.uint8) for _ in range(4)]
    with pytest.raises(BusyError, match=r"at most 0 bytes in one piece, 0 are free.*found 8 bytes"):
        shared.empty(1)
    del kept[::2]
    with pytest.raises(BusyError, match=f"{SIZE // 2} are free.*{SIZE // 2} bytes asked"):
        shared.empty(SIZE // 2, np.uint8)
    assert shared.free == SIZE // 2
    del kept
    assert shared.empty(SIZE, np.uint8).nbytes == SIZE


def test_arrays_are_as_numpy_makes_them(enclave):
    shared = enclave.shared
    assert shared.size == SIZE
    assert "8388608" in repr(shared)
    x = shared.empty((3, 4))
    assert (x.shape, x.dtype, x.flags.c_contiguous, x.flags.writeable) == (
        (3, 4), np.dtype(np.float64), True, True)  # fmt: skip
    assert type(x) is np.ndarray
    assert shared.zeros((), np.int8).shape == ()
    assert shared.zeros(0).size == 0
    assert not shared.zeros(100).any()
    rows = shared.array(np.ones(3, [("a", "<i4"), ("b", "U5")]))
    assert rows["a"].tolist() == [1, 1, 1]
    assert shared.array([[1, 2], [3, 4]], np.float32).tolist() == [[1, 2], [3, 4]]
    assert shared.empty(np.int64(3)).shape == (3,)
    assert shared.empty([2, 2]).shape == (2, 2)
    assert pickle.loads(pickle.dumps(x)).shape == x.shape
    starts = {shared.empty(1, np.uint8).ctypes.data % 64 for _ in range(5)}
    assert starts == {0}


def test_a_view_keeps_the_memory_and_the_last_one_frees_it(enclave):
    shared = enclave.shared
    x = shared.array(np.arange(1000.0))
    part = x.reshape(10, 100)[3, ::2].view(np.int64)
    want = part.copy()
    used = SIZE - shared.free
    del x
    gc.collect()
    assert SIZE - shared.free == used
    others = [shared.array(np.full(1000, 9.0)) for _ in range(8)]
    assert (part == want).all()
    assert len(others) == 8
    del part, others
    gc.collect()
    assert shared.free == SIZE


def test_a_call_by_reference_and_into_out(enclave):
    shared = enclave.shared
    x, y = shared.array(np.arange(1 << 17, dtype=np.float64)), shared.empty(1 << 17)
    assert enclave.negate(x, out=y) is y
    assert np.array_equal(y, -x)
    assert enclave.total(y) == -x.sum()
    assert enclave.negate(np.ones(5)).tolist() == [-1] * 5
    assert list(enclave.map("total", [x[:3], y[:3], np.ones(2)])) == [3, -3, 2]


# ---- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "kill"])
def test_arrays_stay_readable_after_the_enclave(enclave, how):
    shared = enclave.shared
    x = shared.array(np.arange(1000.0))
    if how == "close":
        enclave.close()
        with pytest.raises(EnclaveStateError):
            enclave.negate(x)
    else:
        process = os.pidfd_open(enclave.info.pid)
        os.kill(enclave.info.pid, signal.SIGKILL)
        assert select.select([process], [], [], 20)[0]
        os.close(process)
        with pytest.raises(EnclaveLostError):
            enclave.negate(x, out=x)
    assert abs(x).sum() == sum(range(1000))
    with pytest.raises((EnclaveClosedError, EnclaveLostError)):
        shared.empty(3)
    x[...] = 3
    del shared, enclave
    gc.collect()
    assert (x == 3).all()


def test_arrays_outlive_their_handle(image, state, warm):
    handle = pyenclave.Enclave(image, state=state, quiet=True).start()
    x = handle.shared.array(np.arange(100_000))
    handle.close()
    del handle
    gc.collect()
    assert x.sum() == sum(range(100_000))


@pytest.mark.no_asan(reason="forks")
def test_a_forked_child_reads_the_arrays_and_gets_no_new_ones(enclave):
    shared = enclave.shared
    x = shared.array(np.ones(1000))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "wrong"
        try:
            right = float(x.sum()) == 1000
            try:
                shared.empty(3)
            except EnclaveStateError:
                said = "right" if right else "wrong sum"
            del x
            gc.collect()
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"right"
    os.waitpid(pid, 0)
    assert SIZE - shared.free == 8 * 1000
    assert enclave.negate(x, out=x) is x
    assert x.sum() == -1000


def test_an_image_without_it_says_how_to_ask_for_it(script, state, warm):
    with pyenclave.Enclave.from_file(script, state=state, quiet=True) as plain:
        with pytest.raises(EnclaveStateError, match="shared_memory"):
            _ = plain.shared
        x = warm.shared.array(np.ones(4))
        assert plain.negate(x, out=x) is x
        assert x.tolist() == [-1] * 4
    with pytest.raises(EnclaveStateError):
        _ = plain.shared


@pytest.mark.parametrize("size", [-1, 1, 4097, "64 Mib", "17 GiB", 1.5, None, True])
def test_a_script_cannot_ask_for_what_is_no_size(script, size):
    with pytest.raises(ValueError, match=r"bytes|pages"):
        pyenclave.Enclave.from_file(script, shared_memory=size)


def test_the_size_is_measured_and_an_image_without_is_what_it_was(script):
    plain, with_it = build_script(script), build_script(script, shared_memory="8 MiB")
    assert Image.parse(plain).info.shared_memory == 0
    assert Image.parse(with_it).info.shared_memory == SIZE
    assert b"shared_memory" not in plain
    assert measure_image(Image.parse(plain)) != measure_image(Image.parse(with_it))


# ---- the other handles -------------------------------------------------------------------------


def test_asyncio_calls_by_reference_and_gives_up(script, state, warm):
    async def main() -> None:
        async with pyenclave.AsyncEnclave.from_file(
            script, state=state, quiet=True, shared_memory="8 MiB"
        ) as enclave:
            shared = enclave.shared
            x = shared.array(np.arange(1 << 16, dtype=np.float64))
            y, z = shared.empty(1 << 16), shared.empty(1 << 16)
            assert await enclave.negate(x, out=y) is y
            assert np.array_equal(y, -x)
            results = await asyncio.gather(
                *(enclave.total(x[:n]) for n in range(1, 20)), enclave.negate(y, out=z)
            )
            assert results[:-1] == [float(x[:n].sum()) for n in range(1, 20)]
            assert np.array_equal(z, x)
            with pytest.raises(ArgumentError, match="out"):
                await enclave.negate(x, out=shared.empty((2, 1 << 15)))
            del y, z, results
            gc.collect()
            free = shared.free
            out = shared.empty(1 << 16)
            with pytest.raises(CallTimeoutError):
                await enclave.options(timeout=0.1).late(
                    shared.array(np.ones(1 << 16)), 1.5, out=out
                )
            del out
            gc.collect()
            assert shared.free == free - 2 * 8 * (1 << 16)  # the enclave still has both
            assert await enclave.total(x) == x.sum()  # after the late one: it is the only thread
            gc.collect()
            assert shared.free == free

    asyncio.run(main())


def test_a_pool_takes_arrays_of_another_enclave_in_the_ordinary_way(image, state, warm):
    x, y = warm.shared.array(np.ones(1000)), warm.shared.empty(1000)
    with pyenclave.EnclavePool(image, size=2, state=state, quiet=True) as pool:
        for _ in range(6):
            y[...] = 0
            assert pool.call("negate", x, out=y) is y
            assert (y == -1).all()


def test_a_fake_has_it_too(script):
    from pyenclave.testing.fake import FakeEnclave

    with FakeEnclave(script, shared_memory="1 MiB") as fake:
        x = fake.shared.array(np.ones(1000))
        assert fake.negate(x, out=x) is x
        assert x.sum() == -1000
