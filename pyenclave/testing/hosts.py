"""
What can happen to an enclave, on demand: a hostile host, a lost worker, a poisoned enclave.

All of it happens to real enclaves through the very ring that the handle uses, so that a test sees
what a service would see.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Literal, Self

from pyenclave.calls import ring
from pyenclave.errors import EnclaveError, EnclavePoisonedError, EnclaveStateError

__all__ = ["HostileHost", "Loss", "poison"]

_PAGE: Final = 4096  # docs/formats/ring.md: memory
_STATE: Final = 256
_TAKEN: Final = 128 + 64
_HEADER: Final = struct.Struct("<IHHIIQQ")
_SLOT: Final = ring.slot_stride()
_SECONDS: Final = 10.0


def _run_of(enclave: Any) -> Any:
    run = getattr(enclave, "_run", None)
    if run is None:
        raise EnclaveStateError(
            "this is not the started handle of one enclave", found=type(enclave).__name__
        )
    return run


def _until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {_SECONDS:g} s: {what}")
        time.sleep(0.0005)


class HostileHost:
    """
    The host's side of a ring in the hands of an attacker.

    What a method writes is noticed by the enclave at once or within 100 ms, by the handle at its
    next call. Offsets are those of docs/formats/ring.md.

    Args:
        enclave: A started handle (Enclave, AsyncEnclave or a fake of either).

    Attributes:
        enclave: The handle.
        memory: All bytes of the ring, writable.

    Raises:
        EnclaveStateError: The handle is not started.

    """

    def __init__(self, enclave: Any) -> None:
        self.enclave = enclave
        self._run = _run_of(enclave)
        self.memory = memoryview(self._run.lanes.memory)

    def request(self, lane: int = 0) -> int:
        """Return where the request slot of *lane* begins."""
        at = _PAGE + lane * (_STATE + 2 * _SLOT) + _STATE
        if lane < 0 or at + 2 * _SLOT > len(self.memory):
            raise IndexError(f"the ring has no lane {lane}")
        return at

    def reply(self, lane: int = 0) -> int:
        """Return where the reply slot of *lane* begins."""
        return self.request(lane) + _SLOT

    def scribble(self, offset: int, data: bytes) -> None:
        """Write *data* anywhere into the ring."""
        if offset < 0 or offset + len(data) > len(self.memory):
            raise IndexError(f"the ring has {len(self.memory)} bytes")
        self.memory[offset : offset + len(data)] = data

    def flip(self, offset: int, mask: int = 1) -> None:
        """Invert the bits *mask* of one byte of the ring."""
        if not 0 <= offset < len(self.memory):
            raise IndexError(f"the ring has {len(self.memory)} bytes")
        self.memory[offset] ^= mask

    def record(self, lane: int = 0) -> bytes:
        """Return the last request of *lane*, header and payload, to replay it later."""
        at = self.request(lane)
        length = _HEADER.unpack_from(self.memory, at)[3]
        return bytes(self.memory[at : at + _HEADER.size + min(length, ring.DEFAULT_SLOT)])

    def replay(self, recorded: bytes, lane: int = 0) -> None:
        """Put an earlier request back, its sequence included."""
        at = self.request(lane)
        self.scribble(at + 8, recorded[8:])
        self.scribble(at, recorded[:8])  # the word that is waited on comes last

    def send(
        self,
        payload: bytes = b"",
        *,
        kind: int = 1,
        index: int = 0,
        lane: int = 0,
        sequence: int | None = None,
        length: int | None = None,
        total: int | None = None,
        offset: int = 0,
        claimed_lane: int | None = None,
    ) -> None:
        """
        Write a request frame; each field tells the truth unless it is given.

        Args:
            payload: What follows the header.
            kind: Kind of frame, 1 for a call.
            index: The function's place in the image's list.
            lane: Where it is written.
            sequence: Number of the exchange; None for the next.
            length: Payload bytes that the header claims to be there.
            total: Bytes of the message that it claims.
            offset: Where in the message it claims to be.
            claimed_lane: The lane that it claims.

        """
        at = self.request(lane)
        now = int(_HEADER.unpack_from(self.memory, at)[0])
        size = len(payload) if length is None else length
        header = _HEADER.pack(
            (now + 1 if sequence is None else sequence) & 0xFFFFFFFF,
            kind,
            index,
            size & 0xFFFFFFFF,
            lane if claimed_lane is None else claimed_lane,
            size if total is None else total,
            offset,
        )
        self.scribble(at + _HEADER.size, payload)
        self.replay(header, lane)

    def lie_about_length(self, length: int = 0xFFFFFFFF, lane: int = 0) -> None:
        """Announce a call with more bytes than a slot can hold."""
        self.send(length=length, lane=lane)

    def poisoned(self) -> EnclavePoisonedError:
        """
        Wait until the enclave is poisoned, and return the error that its handle raises now.

        Raises:
            TimeoutError: It is still there: the lie was none.
            EnclaveError: It ended otherwise.

        """
        found: list[EnclavePoisonedError] = []

        def look() -> bool:
            try:
                self._run.guard()
            except EnclavePoisonedError as error:
                found.append(error)
            return bool(found)

        _until(look, "the enclave is poisoned")
        return found[0]


def poison(enclave: Any) -> EnclavePoisonedError:
    """
    Break the call protocol, so that the enclave destroys itself; return what its handle raises.

    Raises:
        EnclaveStateError: The handle is not started, or its enclave ended before.

    """
    host = HostileHost(enclave)
    host._run.guard()  # noqa: SLF001 - of this module
    host.lie_about_length()
    return host.poisoned()


class Loss:
    """
    The loss of an enclave's worker, at a chosen point of the next call.

    - ``before``: at once, so that the next call never begins (``EnclaveLostError.started`` False);
    - ``during``: when the next call was taken and not answered (``started`` True);
    - ``after``: when the next call was answered, so that the one after it fails.

    Args:
        enclave: A started handle of a real enclave.
        when: As above.

    Raises:
        EnclaveStateError: The handle is not started, ended before, or is a fake.
        ValueError: *when* is none of these.

    """

    def __init__(self, enclave: Any, when: Literal["before", "during", "after"]) -> None:
        if when not in ("before", "during", "after"):
            raise ValueError(f"when is before, during or after, not {when!r}")
        self._run = _run_of(enclave)
        self._run.guard()
        self._pid = self._run.info.pid
        if self._pid == os.getpid():
            raise EnclaveStateError(
                "a fake has no worker that could be lost", advice="Close it, or poison it."
            )
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        if when == "before":
            self._kill()
            return
        # Stopped, it cannot answer before this object has seen the call.
        os.kill(self._pid, signal.SIGSTOP)
        action = self._during if when == "during" else self._after
        self._thread = threading.Thread(target=self._watch, args=(action,), daemon=True)
        self._thread.start()

    def wait(self) -> Self:
        """
        Wait until the worker is gone.

        Raises:
            TimeoutError: No call came, or none was answered.

        """
        if self._thread is not None:
            self._thread.join(_SECONDS)
            if self._thread.is_alive():
                raise TimeoutError(f"no call within {_SECONDS:g} s")
            if self._failure is not None:
                raise self._failure
        return self

    def cancel(self) -> None:
        """Let the enclave go on, if nothing happened yet."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(_SECONDS)

    def _watch(self, action: Callable[[], None]) -> None:
        try:
            while not self._busy():
                if self._given_up.wait(0.0002):
                    os.kill(self._pid, signal.SIGCONT)
                    return
            action()
        except (EnclaveError, OSError, TimeoutError) as error:
            self._failure = error

    def _busy(self) -> bool:
        lanes = self._run.lanes
        memory = memoryview(lanes.memory)
        for lane in range(self._run.info.threads):
            at = _PAGE + lane * (_STATE + 2 * _SLOT)
            asked = struct.unpack_from("<I", memory, at + _STATE)[0]
            if asked != struct.unpack_from("<I", memory, at + _STATE + _SLOT)[0]:
                self._at, self._asked = at, asked
                return True
        return False

    def _during(self) -> None:
        # What a worker says that took the call; this one is stopped and cannot.
        struct.pack_into("<I", memoryview(self._run.lanes.memory), self._at + _TAKEN, self._asked)
        self._kill()

    def _after(self) -> None:
        os.kill(self._pid, signal.SIGCONT)
        _until(lambda: self._run.lanes.busy == 0 and not self._busy(), "the call is answered")
        self._kill()

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._run.pidfd, select.POLLIN)
        if not poll.poll(_SECONDS * 1000):
            raise TimeoutError("the worker does not end")
