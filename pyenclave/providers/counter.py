"""
A monotonic counter of a TPM, as `pyenclave.sealed.counter.Counter`: it dates sealed files.

The value is that of an NV counter. Such a counter only grows: nobody lowers it, not by putting a
disk back, nor by removing it, for a TPM begins a new counter above all that it ever had (TPM 2.0
Library, part 3, 31.8). A second index beside it keeps the counter's identity, and the mark of the
one state that was committed with the value. ``docs/formats/counters.md`` has its layout.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyenclave._locks import Lock
from pyenclave.errors import RollbackError, SealingError, TpmError
from pyenclave.formats import tpm_wire
from pyenclave.sealed.counter import MAX_MARK, Reading, check_step
from pyenclave.tpm import DEFAULT_DEVICE, Tpm, lock_file

__all__ = ["FIRST_INDEX", "LAST_INDEX", "TpmCounter"]

#: NV indices that owners of a TPM may define as they like (TCG registry of reserved handles).
FIRST_INDEX: Final = 0x01800000
LAST_INDEX: Final = 0x01BFFFFF
_ATTRIBUTES: Final = tpm_wire.NV_OWNERREAD | tpm_wire.NV_OWNERWRITE
_COUNTER: Final = 8  # bytes
_MAGIC: Final = b"PYETPMC\x01"
_ID: Final = 16
_CHECK: Final = 16
_SLOT: Final = 8 + 1 + MAX_MARK + _CHECK
_RECORD: Final = len(_MAGIC) + _ID + 2 * _SLOT
_MAX_VALUE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class _Record:
    """What the second index holds: the identity, and two slots that are written in turn."""

    id: bytes
    slots: tuple[Reading | None, Reading | None]

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> _Record:
        start = len(_MAGIC) + _ID
        if len(data) != _RECORD or data[: len(_MAGIC)] != _MAGIC:
            raise SealingError(
                f"{what}: the index beside the counter is not one of ours",
                expected=f"{_RECORD} bytes that begin with {_MAGIC.hex()}",
                found=f"{len(data)} bytes, {data[: len(_MAGIC)].hex()}",
            )
        identity = data[len(_MAGIC) : start]
        first, second = (data[at : at + _SLOT] for at in (start, start + _SLOT))
        return cls(identity, (_read_slot(identity, first), _read_slot(identity, second)))

    def mark_of(self, value: int) -> bytes:
        """Return the mark that was committed with *value*."""
        return next((slot.mark for slot in self.slots if slot and slot.value == value), b"")


def _write_slot(identity: bytes, reading: Reading) -> bytes:
    body = reading.value.to_bytes(8, "big") + bytes([len(reading.mark)])
    body += reading.mark.ljust(MAX_MARK, b"\0")
    return body + hashlib.sha256(_MAGIC + identity + body).digest()[:_CHECK]


def _read_slot(identity: bytes, data: bytes) -> Reading | None:
    """Return what a slot holds; None if it was never written, or not to its end."""
    body, size = data[:-_CHECK], data[8]
    check = hashlib.sha256(_MAGIC + identity + body).digest()[:_CHECK]
    if size > MAX_MARK or not hmac.compare_digest(check, data[-_CHECK:]):
        return None
    return Reading(int.from_bytes(body[:8], "big"), body[9 : 9 + size])


class TpmCounter:
    """
    A counter in a TPM. Threads may share it; processes too, see *lock*.

    Every change costs the TPM two writes of NV memory, which take milliseconds and wear it out
    after some hundred thousand: use it for commits, not for every write.

    What it does **not** do: hold against who may use the TPM at will (root). He can remove the
    counter, so that no file that is bound to it opens, and can put back its *mark*, which decides
    between two states that were written for one value; he cannot lower the value.

    An advance by more than one is several increments: cut off in between it leaves a value between.

    Args:
        address: The TPM, as for `Tpm.open`; opened for each call and closed again.
        index: NV index of the counter, below `LAST_INDEX`; the next one has its mark.
        create: Whether to make the counter if it is not there. It begins at a value above those of
            all counters that this TPM ever had.
        owner_password: The owner's; usually empty.
        lock: A file that processes lock while they use the counter. Default the device itself.
            Behind a socket there is none: swtpm serves one client at a time, others need a file.
        timeout: Seconds for one call.

    Raises:
        SealingError: There is no such counter, or the TPM refuses.
        ValueError: An index that is not an owner's.

    """

    def __init__(
        self,
        address: str = DEFAULT_DEVICE,
        index: int = FIRST_INDEX,
        *,
        create: bool = True,
        owner_password: bytes = b"",
        lock: str | os.PathLike[str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        if not FIRST_INDEX <= index < LAST_INDEX:
            raise ValueError(
                f"the index of a counter is {FIRST_INDEX:#x} to {LAST_INDEX - 1:#x}, not {index:#x}"
            )
        self._address = address
        self._index = index
        self._password = owner_password
        self._lock = lock
        self._timeout = timeout
        self._mutex = Lock()
        self._seen = 0
        with self._opened() as tpm:
            self._id = self._made(tpm) if create else self._found(tpm)

    @property
    def id(self) -> bytes:
        """16 random bytes, made with the counter."""
        return self._id

    def read(self) -> int:
        """Return the value. Raises as :meth:`Counter.read`."""
        return self.reading().value

    def reading(self) -> Reading:
        """Return value and mark. Raises as :meth:`Counter.read`."""
        with self._opened() as tpm:
            return self._reading(tpm)[0]

    def advance(self, to: int, mark: bytes = b"") -> None:
        """Make *to* the value. As :meth:`Counter.advance`."""
        with self._opened() as tpm:
            now, record = self._reading(tpm)
            if not check_step(now, to, mark):
                return
            # First the mark, which counts for nothing until the value is there; never over the
            # mark of the value that holds now.
            place = 1 if record.slots[0] is not None and record.slots[0].value == now.value else 0
            slot = _write_slot(self._id, Reading(to, mark))
            offset = len(_MAGIC) + _ID + place * _SLOT
            tpm.nv_write(self._index + 1, slot, offset=offset, password=self._password)
            for _ in range(to - now.value):
                tpm.nv_increment(self._index, password=self._password)
            found, _ = self._reading(tpm)
            if found != Reading(to, mark):
                raise RollbackError(
                    f"{self!r} was advanced by somebody else at the same time",
                    expected=f"{to} with mark {mark.hex() or 'none'}",
                    found=f"{found.value} with mark {found.mark.hex() or 'none'}",
                    advice="Processes that share it need one lock file (lock=).",
                )

    def destroy(self) -> None:
        """
        Remove the counter for ever: what is bound to it opens no more.

        Raises:
            SealingError: The TPM refuses.

        """
        with self._opened() as tpm:
            for index in (self._index, self._index + 1):
                if tpm.nv_exists(index):
                    tpm.nv_undefine(index, owner_password=self._password)

    # ---- the TPM ------------------------------------------------------------------------------

    def _reading(self, tpm: Tpm) -> tuple[Reading, _Record]:
        try:
            value = tpm.nv_counter(self._index, password=self._password)
            data = tpm.nv_read(self._index + 1, password=self._password)
        except TpmError as error:
            if error.rc in (tpm_wire.RC_HANDLE, tpm_wire.RC_NV_UNINITIALIZED):
                raise RollbackError(f"{self!r} is gone from the TPM", found=error.message) from None
            raise
        record = _Record.from_bytes(data, repr(self))
        if record.id != self._id:
            raise RollbackError(
                f"{self!r} is another counter now", expected=self._id.hex(), found=record.id.hex()
            )
        if not self._seen <= value <= _MAX_VALUE:
            raise RollbackError(
                f"{self!r} went back", expected=f"{self._seen} to {_MAX_VALUE}", found=value
            )
        self._seen = value
        return Reading(value, record.mark_of(value)), record

    def _found(self, tpm: Tpm) -> bytes:
        for index in (self._index, self._index + 1):
            if not tpm.nv_exists(index):
                raise SealingError(f"{self!r}: the TPM has no such counter", found=f"no {index:#x}")
        tpm.nv_counter(self._index, password=self._password)
        data = tpm.nv_read(self._index + 1, password=self._password)
        return _Record.from_bytes(data, repr(self)).id

    def _made(self, tpm: Tpm) -> bytes:
        """Make the counter, or finish what was cut off: it is there once it has a value."""
        if tpm.nv_exists(self._index):
            public = tpm.nv_public(self._index)
            if not public.is_counter or public.size != _COUNTER:
                raise SealingError(
                    f"{self!r}: the index is somebody else's",
                    expected="a counter of 8 bytes",
                    found=f"attributes {public.attributes:#x}, {public.size} bytes",
                    advice="Choose another index.",
                )
            if not public.written:
                tpm.nv_increment(self._index, password=self._password)
            return self._found(tpm)
        identity = secrets.token_bytes(_ID)
        record = _MAGIC + identity + bytes(2 * _SLOT)
        if tpm.nv_exists(self._index + 1):
            old = tpm.nv_public(self._index + 1)
            if old.size != _RECORD:
                raise SealingError(
                    f"{self!r}: the index beside it is somebody else's",
                    expected=f"{_RECORD} bytes",
                    found=f"{old.size} bytes",
                    advice="Choose another index.",
                )
        else:
            tpm.nv_define(self._index + 1, _RECORD, _ATTRIBUTES, owner_password=self._password)
        tpm.nv_write(self._index + 1, record, password=self._password)
        attributes = _ATTRIBUTES | tpm_wire.NV_COUNTER
        tpm.nv_define(self._index, _COUNTER, attributes, owner_password=self._password)
        tpm.nv_increment(self._index, password=self._password)
        return identity

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Tpm]:
        """Open the TPM, alone; what it refuses is a SealingError."""
        # The lock file first: whoever waits for it must not keep others from connecting.
        with self._mutex, contextlib.ExitStack() as stack:
            try:
                if self._lock is not None:
                    lock_file(self._lock_fd(stack), self._timeout)
                tpm = stack.enter_context(Tpm.open(self._address, timeout=self._timeout))
                if self._lock is None:
                    stack.enter_context(tpm.exclusive())
                yield tpm
            except TpmError as error:
                raise SealingError(
                    f"{self!r} cannot be used: {error.message}", advice=error.advice
                ) from error

    def _lock_fd(self, stack: contextlib.ExitStack) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._lock or "", flags, 0o600)
        except OSError as error:
            raise SealingError(f"{self!r}: the lock file cannot be opened: {error}") from None
        stack.callback(os.close, fd)
        return fd

    def __repr__(self) -> str:
        return f"TpmCounter({self._address!r}, {self._index:#x})"
