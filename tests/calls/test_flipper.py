"""
BND-03: a process that changes every shared word while calls run.

Whatever it writes, a call ends with its own result, a wrong result that the host itself caused by
changing its own data, or a typed error; the worker lives or poisons itself. It never crashes.
"""

from __future__ import annotations

import os
import signal
import struct
import time

import numpy as np
import pytest

from pyenclave.calls import ring
from pyenclave.errors import CallError, EnclaveError, EnclaveStateError
from pyenclave.host._options import Options

SECONDS = 4.0
CALLS = 100_000


def add(a: int, b: int) -> int:
    return a + b


def join(text: str, data: bytes) -> str:
    return text + data.hex()


def scale(x: np.ndarray) -> np.ndarray:
    return x * 2


def flip(memory, base: int, stride: int, seed: int) -> None:
    """Toggle words of both headers, both state areas and the first payload bytes, for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rng = np.random.default_rng(seed)
    request, reply = base + 256, base + 256 + (stride - 256) // 2
    places = [
        *(request + n for n in range(0, 64, 4)),
        *(reply + n for n in range(0, 64, 4)),
        base, base + 4, base + 128, base + 132,
    ]  # fmt: skip
    values = [0, 1, 2, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, ring.DEFAULT_SLOT,
              ring.DEFAULT_SLOT + 1, 1 << 20]  # fmt: skip
    while True:
        for where, what, pause in zip(
            rng.integers(0, len(places), 1000).tolist(),
            rng.integers(0, 2**32, 1000).tolist(),
            rng.integers(0, 2000, 1000).tolist(),
            strict=True,
        ):
            at = places[where]
            value = values[what % len(values)] if what % 3 else what
            old = memory[at : at + 4]
            memory[at : at + 4] = struct.pack("<I", value)
            if what % 2:  # back again at once: the change that a second fetch would see
                memory[at : at + 4] = old
            for _ in range(pause):
                pass


def flip_while_calling(pair, seconds: float, most: int) -> None:
    end = time.monotonic() + seconds
    seen = {"right": 0, "wrong": 0, "refused": 0, "state": 0, "poisoned": 0, "workers": 0}
    array = np.arange(50, dtype="f8")
    calls = 0

    def goes_on() -> bool:
        """Longer on a machine with much else to do."""
        now = time.monotonic()
        return (now < end or (seen["right"] <= 100 and now < end + 20)) and calls < most

    while goes_on():
        one = pair(add, join, scale, limit=1 << 20)
        quick = one.functions.with_options(Options(timeout=0.2))
        seen["workers"] += 1
        flipper = os.fork()
        if flipper == 0:
            try:
                flip(one.memory, 4096, one.lane_stride, seen["workers"])
            finally:
                os._exit(0)
        try:
            while one.alive and goes_on():
                calls += 1
                try:
                    kind = calls % 3
                    if kind == 0:
                        good = quick.named("add")(calls, 1) == calls + 1
                    elif kind == 1:
                        good = quick.named("join")("ab", b"\1\2") == "ab0102"
                    else:
                        good = bool((quick.named("scale")(array) == array * 2).all())
                    seen["right" if good else "wrong"] += 1
                except CallError:
                    seen["refused"] += 1
                    if one.lanes.busy:
                        break  # this lane waits for an answer that was flipped away
                except EnclaveStateError:
                    seen["state"] += 1
                    break
        except EnclaveError:
            seen["state"] += 1
        finally:
            os.kill(flipper, signal.SIGKILL)
            os.waitpid(flipper, 0)
        if not one.alive:
            code, words = one.ended()
            assert code == 3, (code, words)
            seen["poisoned"] += 1
        one.stop()
    assert seen["right"] > 100, seen
    # What was changed had effects: without these the flipper flipped nothing that matters.
    assert seen["poisoned"] + seen["state"] + seen["refused"] + seen["wrong"] > 0, seen


@pytest.mark.timeout(60)
def test_BND_03_a_flipper_never_makes_either_side_crash(pair):
    flip_while_calling(pair, SECONDS, CALLS)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_BND_03_a_flipper_never_makes_either_side_crash_in_ten_minutes(pair):
    """A million calls of the lanes alone: tests/native/test_ring_threads.py."""
    flip_while_calling(pair, 600.0, 10 * CALLS)
