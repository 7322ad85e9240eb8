"""One enclave of a pool breaks the protocol after its caller gave up: the others go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pyenclave import EnclavePool
from pyenclave.errors import CallTimeoutError, EnclaveError
from pyenclave.testing.hosts import HostileHost

pytestmark = pytest.mark.usefixtures("used_state")

SOURCE = """
import time

import pyenclave


@pyenclave.ecall
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pyenclave.ecall
def add(x: int, y: int) -> int:
    return x + y
"""


def test_a_broken_answer_to_a_given_up_call_costs_the_pool_that_enclave_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENCLAVE_STATE", str(tmp_path / "state"))
    (tmp_path / "entry.py").write_text(SOURCE)
    with EnclavePool.from_file(tmp_path / "entry.py", size=2, health=0.2, quiet=True) as pool:
        assert pool.call("add", 1, 2) == 3
        before = {member.handle._running().pidfd: member for member in pool._book.members}
        with pytest.raises(CallTimeoutError):
            pool.options(timeout=0.2).call("sleep", 600.0)
        (broken,) = [one for one in before.values() if one.handle._running().lanes.busy]
        host = HostileHost(broken.handle)
        host.scribble(host.reply(), b"\x55" * 32)
        deadline = time.monotonic() + 30
        while any(one is broken for one in pool._book.members):
            assert time.monotonic() < deadline, "the pool keeps what broke the protocol"
            with_it = pool.call("add", 2, 2)  # the other one serves meanwhile
            assert with_it == 4
            time.sleep(0.05)
        while len(pool._book.members) < 2:
            assert time.monotonic() < deadline, "it is not replaced"
            time.sleep(0.05)
        assert [pool.call("add", x, 1) for x in range(4)] == [1, 2, 3, 4]
    with pytest.raises(EnclaveError):
        pool.call("add", 1, 1)
