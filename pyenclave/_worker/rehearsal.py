"""
A rehearsal: the start of a worker with an image that does nothing, before there is a real one.

It is the very code of a start (``main.py``), so that what a start writes to has been copied for
this process, and what it reads has been mapped, before anybody waits: each of these pages, and
there are hundreds, would take a microsecond or two. Nothing of it stays.
"""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from pyenclave import _native
from pyenclave._core import SecretMemory
from pyenclave._memfd import sealed
from pyenclave._worker import dispatch
from pyenclave._worker.main import Prepared, Start, Worker
from pyenclave.calls import ring
from pyenclave.calls.channel import Channel
from pyenclave.calls.signature import functions_of
from pyenclave.errors import EnclavePoisonedError, EnclaveStateError
from pyenclave.formats import messages
from pyenclave.formats.image import FileEntry, ImageInfo, assemble
from pyenclave.trusted import _runtime, _state

if TYPE_CHECKING:
    from pyenclave._worker.importer import Locked

__all__ = ["rehearsal_image", "rehearse"]

_NAME = "pyenclave_rehearsal"
_FUNCTION = "add"
_REQUEST = 4096 + 256  # where lane 0 has its request slot (docs/formats/ring.md)
_CALL = 1  # the kind of its frame
_HEADER = struct.Struct("<IHHIIQQ")


class _Rehearsal(Worker):
    """A worker whose sandbox stays open, and that speaks to nobody."""

    def _redirect(self) -> None:
        """Leave standard output where it is."""

    def _keep_records(self) -> None:
        """Leave ``logging`` as it is."""

    def _close(self, info: ImageInfo) -> dict[str, bool | int]:
        with contextlib.suppress(EnclaveStateError):  # its first step was not done, so it refuses
            return super()._close(info)
        return {"rehearsal": True}


def rehearse(data: bytes, locked: Locked) -> None:
    """
    Do what a start does, with an image that does nothing, and drop the result.

    The process must be a spare or one like it: whatever it is told here is forgotten, its
    randomness is stirred, and the key that is made is dropped.

    Args:
        data: From :func:`rehearsal_image`.
        locked: What the zygote verified; as it was, afterwards.

    """
    accepted, snapshot, entered = locked.accepted, locked.snapshot, _state.entered()
    locked.accepted = set(accepted)
    collecting = gc.isenabled()
    ours, theirs = Channel.pair()
    with ours, theirs, contextlib.ExitStack() as undone:
        image_fd = sealed("pyenclave-rehearsal", data)
        undone.callback(os.close, image_fd)
        prepared = Prepared(image_fd, locked)
        ring_fd = ring.create(prepared.image.info.threads)
        undone.callback(os.close, ring_fd)
        ours.send(messages.Soon())
        ours.send(_identity(debug=False))
        worker = _Rehearsal(locked)
        worker.connect(theirs, ring_fd)
        try:
            start = Start(
                early={"rehearsal": True},
                memory=SecretMemory(_runtime.SECRET_SIZE),
                maps=_native.open_mappings(),
                prepared=prepared,
            )
            worker.start(os.dup(image_fd), start)
            _serve(worker, prepared, ring_fd)
            worker.idle()
        finally:
            _runtime.stop()
            dispatch.leave()
            if not collecting:
                gc.disable()
            module = sys.modules.pop(_NAME, None)
            if module is not None:
                # Its functions name it: nobody else would let go of the image.
                vars(module).clear()
            locked.accepted, locked.snapshot = accepted, snapshot
            _state.leave(entered=entered)


def _serve(worker: Worker, prepared: Prepared, ring_fd: int) -> None:
    """Serve a call that nobody made, and then what no host may send, which ends it."""
    if worker.table is None or prepared.measured is None:
        return
    signature = prepared.measured.by_name[_FUNCTION]
    number = prepared.measured.signatures.index(signature)
    arguments = signature.request_plan.encode((1, 2.0))
    size = len(arguments)
    memory = worker.table.memory(ring_fd)
    header = _HEADER.pack(1, _CALL, number, size, 0, size, 0)
    memory[_REQUEST : _REQUEST + len(header) + size] = header + arguments

    called = []

    def spoil() -> None:
        called.append(True)
        memory[_REQUEST : _REQUEST + 4] = b"\xff" * 4

    vars(sys.modules[_NAME])["last"] = spoil
    with contextlib.suppress(EnclavePoisonedError):
        worker.serve()
    worker.forget_lane()
    if not called:
        raise EnclaveStateError("the rehearsal's call was not served")


def _identity(*, debug: bool) -> messages.Identity:
    return messages.Identity(
        enclave_id=bytes(16), body=bytes(384), debug=debug, level="", record=b"", seed=bytes(32)
    )


def rehearsal_image(locked: Locked) -> bytes:
    """Return an image that does nothing."""
    source = (
        b"from __future__ import annotations\n"
        b"import numpy as np\n"
        b"import numpy.typing as npt\n"
        b"import pyenclave\n"
        b"Row = npt.NDArray[np.float64]\n"
        b"@pyenclave.ecall\n"
        b"def nothing(x: int, y: bytes = b'', *, z: list[float] | None = None) -> np.ndarray:\n"
        b"    return np.zeros(x)\n"
        b"@pyenclave.ecall\n"
        b"def same(x: npt.NDArray[np.float64], *, y: Row | None = None) -> Row:\n"
        b"    return x\n"
        b"@pyenclave.ecall\n"
        b"def add(x: int, y: float) -> float:\n"
        b"    last()\n"
        b"    return x + y\n"
        b"def last() -> None:\n"
        b"    pass\n"
    )
    name = f"entry/{_NAME}.py"
    module = ModuleType(_NAME)
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - our own
    info = ImageInfo(
        name="rehearsal",
        product_id=0,
        security_version=0,
        debug=True,
        threads=1,
        entry_kind="python",
        entry_module=_NAME,
        entry_file=name,
        functions=tuple(functions_of(module)),
        sealed_memory=0,
        message_limit=4096,
        ocalls=(),
        blas_threads=1,
        jit=False,
        seal={},
        files=(FileEntry(name=name, size=len(source), executable=True),),
    )
    (lock,) = locked.locks.values()
    return assemble(info, lock, {name: source})
