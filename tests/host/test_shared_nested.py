"""Shared memory of nested calls on a loop: kept for as long as the enclave may write there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from pyenclave import AsyncEnclave
from pyenclave.errors import BusyError

pytestmark = pytest.mark.usefixtures("used_state")

SIZE = 1 << 20
SOURCE = """
import time

import numpy as np
import numpy.typing as npt
import pyenclave
from pyenclave import trusted


@trusted.ocall(allow=["slow"])
def ask(x: int) -> int: ...


@pyenclave.ecall
def outer(x: int) -> int:
    return ask(x)


@pyenclave.ecall
def slow(seconds: float) -> npt.NDArray[np.uint8]:
    time.sleep(seconds)
    return np.full(1048576, 7, np.uint8)
"""


def test_a_nested_call_of_one_that_is_given_up_keeps_its_memory_until_it_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    (tmp_path / "entry.py").write_text(SOURCE)

    async def main() -> None:
        begun = asyncio.Event()

        async def ask(x: int) -> int:
            out = enclave.shared.empty(SIZE, np.uint8)
            begun.set()
            await enclave.call("slow", 1.0, out=out)
            return x

        enclave = AsyncEnclave.from_file(
            tmp_path / "entry.py", shared_memory=SIZE, ocalls={"ask": ask}, quiet=True
        )
        async with enclave:
            call = asyncio.create_task(enclave.call("outer", 1))
            await begun.wait()
            await asyncio.sleep(0.2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            del call
            await asyncio.sleep(0.1)
            refused = 0
            while True:
                try:
                    mine = enclave.shared.empty(SIZE, np.uint8)
                    break
                except BusyError:
                    refused += 1
                await asyncio.sleep(0.02)
            assert refused, "the worker was still at work"
            mine[...] = 1
            await asyncio.sleep(1.2)
            assert (mine == 1).all(), "a late result came to somebody else's array"

    asyncio.run(asyncio.wait_for(main(), 60))
