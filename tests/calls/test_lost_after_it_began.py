"""EnclaveLostError.started: a call that had begun is never said not to have."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pyenclave import trusted
from pyenclave.errors import EnclaveLostError


@trusted.ocall
def much(key: str) -> bytes:
    raise AssertionError


def ask(key: str) -> int:
    return len(much(key))


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@pytest.mark.timeout(60)
def test_a_worker_that_ends_while_an_ocall_is_answered_in_fragments(pair):
    def handler(key: str) -> bytes:
        os.kill(one.pid, signal.SIGSTOP)  # it takes no fragment any more
        threading.Timer(0.3, one.kill).start()
        return bytes(600_000)

    one = pair(ask, stubs=(much,), handlers={"much": handler})
    with pytest.raises(EnclaveLostError) as caught:
        one.ask("k")
    assert caught.value.started is True


@pytest.mark.timeout(60)
def test_a_stream_whose_worker_ended_and_whose_handle_noticed(pair):
    one = pair(numbers)
    stream = one.numbers(3)
    assert next(stream) == 0
    one.kill()
    one.ended()
    one.lanes.close()  # as a handle does that learnt of it elsewhere
    with pytest.raises(EnclaveLostError) as caught:
        next(stream)
    assert caught.value.started is True
