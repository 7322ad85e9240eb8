"""Workers that answer a batch with what is no answer to it."""

from __future__ import annotations

import os
import threading
import time

import batch_model as model
import pytest

from pyenclave import _core
from pyenclave.calls import ring
from pyenclave.errors import ArgumentError, CallError, EnclavePoisonedError
from pyenclave.host._map import Results, source_of

RESULT, ERROR = 129, 130


def claimed(x: int) -> int:
    """What the caller believes to call."""
    raise AssertionError(x)


def mapped(one, name, items, errors="raise"):
    call = one.functions.batched(name)
    return Results(call, source_of(call, items), raises=errors == "raise")


class Liar:
    """A worker that answers every batch with bytes of the test's choice."""

    def __init__(self, signature_of, answers):
        import mmap
        import struct

        from pyenclave.calls import errors as call_errors
        from pyenclave.calls.signature import Signature
        from pyenclave.host.handle import Functions

        fd = ring.create(1)
        self.memory = ring.map_ring(fd, 1)
        os.close(fd)
        self.lanes = _core.HostLanes(
            self.memory, mmap.mmap(-1, 4096), 1, ring.DEFAULT_SLOT, 1 << 20, lambda: None,
            EnclavePoisonedError, call_errors.from_frame,
            threading.Condition(), 4,
        )  # fmt: skip
        self.functions = Functions((Signature.of(signature_of),), self.lanes)
        side = ring.slot_stride()
        request, reply = 4096 + 256, 4096 + 256 + side

        def serve():
            for sequence, (kind, answer) in enumerate(answers, 1):
                while struct.unpack_from("<I", self.memory, request)[0] != sequence:
                    time.sleep(0.001)
                (length,) = struct.unpack_from("<I", self.memory, request + 8)
                asked = self.memory[request + 32 : request + 32 + length]
                data = answer(asked) if callable(answer) else answer
                self.memory[reply + 32 : reply + 32 + len(data)] = data
                self.memory[reply + 4 : reply + 32] = struct.pack(
                    "<HHIIQQ", kind, 0, len(data), 0, len(data), 0
                )
                self.memory[reply : reply + 4] = struct.pack("<I", sequence)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()


def number(value: int) -> bytes:
    return b"\0" + value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (model.write([(0, number(5))], 8), [5]),
        (model.write([(1, b"\xff")], 8), CallError),
        (model.write([(2, b"\1\0\0\0")], 8), ArgumentError),
        (model.write([(0, b"short")], 8), CallError),
        (model.write([(0, number(5))] * 2, 8), "of another batch"),
        (model.write([(0, number(5))], 8)[:-1], "not a batch"),
        (model.write([(3, b"")], 8), "not a batch"),
        (model.write([(0, number(5))], 8, budget=1), "not a batch"),
        (model.HEADER.pack(2**32 - 1, 1, 0, 0), "not a batch"),
        (model.HEADER.pack(1, 0, 2**64 - 8, 0), "not a batch"),
        (b"", "not a batch"),
    ],
)
def test_BND_06_an_answer_that_is_none_of_this_batch_is_refused(answer, want):
    liar = Liar(claimed, [(RESULT, answer)])
    results = mapped(liar, "claimed", [1], "return")
    if isinstance(want, str):
        with pytest.raises(CallError, match=want):
            next(results)
    else:
        found = list(results)
        assert found == want if isinstance(want, list) else type(found[0]) is want
    assert liar.lanes.busy == 0


def test_an_answer_that_never_gets_on_is_asked_again_and_ends():
    """Each answer does one item of the many that were sent: the map still ends, in order."""

    def one_item(request):
        (at, length, _), *others = model.read(request, 8, reply=False)
        return model.write([(0, request[at : at + length])] + [(3, b"")] * len(others), 8)

    liar = Liar(claimed, [(RESULT, one_item)] * 30)
    assert list(mapped(liar, "claimed", range(30))) == list(range(30))


def test_a_batch_refused_as_a_whole_is_raised():
    liar = Liar(claimed, [(ERROR, b"\x95\xadcall.argument\xa1x\xa0\xa0\xc0")])
    with pytest.raises(CallError):
        next(mapped(liar, "claimed", [1], "return"))


@pytest.mark.parametrize("kind", [131, 132, 133])
def test_an_answer_of_another_kind_poisons(kind):
    liar = Liar(claimed, [(kind, b"")])
    with pytest.raises(EnclavePoisonedError):
        next(mapped(liar, "claimed", [1], "return"))
