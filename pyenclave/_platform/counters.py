"""
Monotonic counters of enclaves, in a MACed file.

A counter belongs to a signer and product (to a measurement, for unsigned images), to debug or
production, and to a level. Beside its value it keeps the *blob mark* of the one sealed blob that
was committed with that value: several blobs may have been sealed for the same next value, and only
one of them may ever be the newest. Debug and unsigned enclaves have a smaller quota of their own,
because anybody can make a new owner of that kind.

The file is replaced as a whole: written aside, fsynced, renamed, the directory fsynced, and only
then is a value given out. Afterwards the generation number is written to a second file, the *mark*
of the store: a store that is older than the mark, or older than what this process saw before, was
put back and is refused.

This is software. Whoever puts back the *whole* state directory while no platform runs is not
detected; only a TPM or TEE could. ``docs/formats/state.md`` has the layout.
"""

from __future__ import annotations

import contextlib
import hmac
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec

from pyenclave._core import hmac_sha256
from pyenclave.errors import (
    PlatformUnavailableError,
    RollbackError,
    SealingError,
    SealLimitError,
)

__all__ = [
    "MARK_SIZE",
    "MAX_PER_DEBUG_OWNER",
    "MAX_PER_OWNER",
    "MAX_TOTAL",
    "MAX_TOTAL_DEBUG",
    "CounterStore",
    "Files",
    "MemoryFiles",
    "Reading",
]

ID_SIZE: Final = 16
OWNER_SIZE: Final = 32
MARK_SIZE: Final = 32
MAX_PER_OWNER: Final = 256
MAX_TOTAL: Final = 8192  # of production owners
MAX_PER_DEBUG_OWNER: Final = 64  # an owner that is debug or unsigned
MAX_TOTAL_DEBUG: Final = 1024  # of all such owners together; not part of MAX_TOTAL
_MAX_VALUE: Final = (1 << 63) - 1
_STORE: Final = "counters"
_MARK: Final = "counters.mark"
_STORE_MAGIC: Final = b"PYECTR\x00\x01"
_MARK_MAGIC: Final = b"PYECMK\x00\x01"
_MARK_LAYOUT: Final = struct.Struct("<8sQ")
_MAC: Final = 32

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_SIZE, max_length=ID_SIZE)]
_Owner = Annotated[bytes, msgspec.Meta(min_length=OWNER_SIZE, max_length=OWNER_SIZE)]
_BlobMark = Annotated[bytes, msgspec.Meta(max_length=MARK_SIZE)]


class _Counter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    id: _Id
    owner: _Owner
    debug: bool  # the quota that it counts for
    value: Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]
    mark: _BlobMark  # of the blob that was committed with this value; empty if none was


class _Store(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    generation: Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]
    counters: tuple[_Counter, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Store, strict=True)


class Reading(NamedTuple):
    """A counter's value and the mark of the blob committed with it (empty: no blob was)."""

    value: int
    mark: bytes


class Files(Protocol):
    """Where the store is kept; a state directory is one such place."""

    path: str

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Keep other processes out."""

    def read_file(self, name: str) -> bytes | None:
        """Return the content of *name*, or None; it has a limit of its own."""

    def replace_file(self, name: str, data: bytes) -> None:
        """Put *data* into *name*, durably and all or nothing."""


class MemoryFiles:
    """Files of a platform without a state directory; they end with it."""

    path = "memory"

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Nobody else is there."""
        return contextlib.nullcontext()

    def read_file(self, name: str) -> bytes | None:
        """Return the content of *name*, or None."""
        return self._files.get(name)

    def replace_file(self, name: str, data: bytes) -> None:
        """Put *data* into *name*."""
        self._files[name] = data


class CounterStore:
    """
    The counters of one platform. Thread-safe; several platform processes may share the file.

    Args:
        files: The state directory.
        key: 32-byte MAC key, derived from the platform's root.
        random: Source of counter identities.

    """

    def __init__(self, files: Files, key: bytes, random: Callable[[int], bytes]) -> None:
        self._files = files
        self._key = key
        self._random = random
        self._mutex = threading.Lock()
        self._seen = 0  # the highest generation that this process knows of

    def create(self, owner: bytes, *, debug: bool = False) -> tuple[bytes, int]:
        """
        Make a counter with value 0.

        Args:
            owner: 32 bytes that name the owner.
            debug: The owner is a debug or an unsigned enclave: the smaller quota counts.

        Returns:
            The counter's 16-byte identity and 0.

        Raises:
            SealLimitError: The owner, or the platform, has as many as it may.
            SealingError: The store is damaged or cannot be written.
            RollbackError: The store was put back.

        """
        _check_length("owner", owner, OWNER_SIZE)

        def change(held: dict[bytes, _Counter]) -> _Counter:
            each = MAX_PER_DEBUG_OWNER if debug else MAX_PER_OWNER
            total = MAX_TOTAL_DEBUG if debug else MAX_TOTAL
            mine = sum(counter.owner == owner for counter in held.values())
            alike = sum(counter.debug == debug for counter in held.values())
            if mine >= each or alike >= total:
                kind = "debug and unsigned" if debug else "production"
                raise SealLimitError(
                    f"too many counters of {kind} enclaves",
                    expected=f"at most {each} an owner, {total} in all",
                    found=f"{mine}, {alike}",
                    advice="Destroy counters that are not used any more.",
                )
            counter = _Counter(self._random(ID_SIZE), owner, debug, 0, b"")
            held[counter.id] = counter
            return counter

        made = self._update(change)
        return made.id, made.value

    def read(self, owner: bytes, counter_id: bytes) -> Reading:
        """Return value and blob mark of a counter. Raises as :meth:`increment`."""
        _check_length("owner", owner, OWNER_SIZE)
        with self._mutex, self._locked():
            _, held = self._load()
        counter = _find(held, owner, counter_id)
        return Reading(counter.value, counter.mark)

    def increment(
        self,
        owner: bytes,
        counter_id: bytes,
        expected: int | None = None,
        mark: bytes = b"",
    ) -> int:
        """
        Add one, durably, and return the new value.

        With a mark this commits a blob, at most one for each value: a compare-and-set from
        *expected* to *expected* + 1 with *mark*. Doing it again with the same mark changes nothing
        and succeeds, so that a retry after a lost answer is harmless; with another mark it fails.

        Args:
            owner: 32 bytes that name the owner.
            counter_id: 16 bytes from :meth:`create`.
            expected: If given, nothing is changed unless this is the value: so that a retry after
                a lost answer cannot count twice.
            mark: 32 bytes that name the blob which becomes the newest one; needs *expected*.
                Without it no blob is the newest one afterwards.

        Raises:
            ValueError: The mark has another size, or there is no *expected* with it.
            RollbackError: The value is not the expected one, or the store was put back.
            SealLimitError: The counter is at 2^63 - 1.
            SealingError: There is no such counter of this owner, the store is damaged, or it
                cannot be written; the value may then be the old or the new one, never another.

        """
        _check_length("owner", owner, OWNER_SIZE)

        if mark:
            _check_length("mark", mark, MARK_SIZE)
            if expected is None:
                raise ValueError("a mark without the value that it follows")

        def change(held: dict[bytes, _Counter]) -> _Counter:
            counter = _find(held, owner, counter_id)
            if mark and expected is not None and counter.value == expected + 1:
                if hmac.compare_digest(counter.mark, mark):
                    return counter  # done before
                raise RollbackError(
                    "another blob was committed with this value of the counter",
                    found=counter.value,
                )
            if expected is not None and counter.value != expected:
                raise RollbackError(
                    "counter has another value", expected=expected, found=counter.value
                )
            if counter.value == _MAX_VALUE:
                raise SealLimitError("counter is at its end", found=counter.value)
            held[counter.id] = msgspec.structs.replace(counter, value=counter.value + 1, mark=mark)
            return held[counter.id]

        return self._update(change).value

    def destroy(self, owner: bytes, counter_id: bytes) -> int:
        """Remove a counter for ever and return its last value. Raises as :meth:`increment`."""
        _check_length("owner", owner, OWNER_SIZE)

        def change(held: dict[bytes, _Counter]) -> _Counter:
            return held.pop(_find(held, owner, counter_id).id)

        return self._update(change).value

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._files.lock("counters.lock"))
            except PlatformUnavailableError as error:
                raise SealingError(f"counters cannot be used: {error}") from None
            yield

    def _update(self, change: Callable[[dict[bytes, _Counter]], _Counter]) -> _Counter:
        with self._mutex, self._locked():
            generation, held = self._load()
            before = dict(held)
            result = change(held)
            if held != before:
                self._save(_Store(generation + 1, tuple(held.values())))
        return result

    def _load(self) -> tuple[int, dict[bytes, _Counter]]:
        try:
            data = self._files.read_file(_STORE)
            mark_data = self._files.read_file(_MARK)
        except PlatformUnavailableError as error:
            raise SealingError(f"counters cannot be read: {error}") from None
        mark = self._open_mark(mark_data)
        if data is None:
            if mark or self._seen:
                raise RollbackError(
                    "the store of counters is gone", expected=f"generation {max(mark, self._seen)}"
                )
            return 0, {}
        store = self._open_store(data)
        lowest = max(mark, self._seen)
        if store.generation < lowest:
            raise RollbackError(
                "the store of counters was put back",
                expected=f"generation {lowest} or later",
                found=store.generation,
            )
        # A crash between store and mark leaves the mark one behind; more cannot happen.
        if store.generation > mark + 1:
            raise RollbackError(
                "the mark of the counters was put back",
                expected=f"generation {store.generation - 1} or later",
                found=mark,
            )
        self._seen = store.generation
        if store.generation > mark:
            # Finish what was cut short, the directory's fsync included, before a value of it is
            # given out: power lost later must not take it back.
            self._save_mark(store.generation)
        held = {counter.id: counter for counter in store.counters}
        if len(held) != len(store.counters):
            raise SealingError("the store of counters names one twice")
        return store.generation, held

    def _open_store(self, data: bytes) -> _Store:
        body, mac = data[:-_MAC], data[-_MAC:]
        if not body.startswith(_STORE_MAGIC) or not hmac.compare_digest(self._mac(body), mac):
            raise self._damaged(_STORE)
        try:
            return _decoder.decode(body[len(_STORE_MAGIC) :])
        except (msgspec.DecodeError, RecursionError):
            raise self._damaged(_STORE) from None

    def _open_mark(self, data: bytes | None) -> int:
        if data is None:
            return 0
        body, mac = data[:-_MAC], data[-_MAC:]
        if len(body) != _MARK_LAYOUT.size or not hmac.compare_digest(self._mac(body), mac):
            raise self._damaged(_MARK)
        magic, generation = _MARK_LAYOUT.unpack(body)
        if magic != _MARK_MAGIC:
            raise self._damaged(_MARK)
        return int(generation)

    def _damaged(self, name: str) -> SealingError:
        return SealingError(
            f"{self._files.path}/{name} is damaged, or of another root",
            expected="a MAC under this platform's root",
            advice="Restore it from a backup of the whole state directory.",
        )

    def _save(self, store: _Store) -> None:
        body = _STORE_MAGIC + _encoder.encode(store)
        self._write(_STORE, body + self._mac(body))
        self._seen = store.generation
        self._save_mark(store.generation)

    def _save_mark(self, generation: int) -> None:
        mark = _MARK_LAYOUT.pack(_MARK_MAGIC, generation)
        self._write(_MARK, mark + self._mac(mark))

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._files.replace_file(name, data)
        except OSError as error:
            raise SealingError(
                f"counters cannot be written: {error.strerror}",
                advice=f"Make room for, and writing possible in, {self._files.path}.",
            ) from None

    def _mac(self, body: bytes) -> bytes:
        return hmac_sha256(self._key, body)


def _find(held: dict[bytes, _Counter], owner: bytes, counter_id: bytes) -> _Counter:
    counter = held.get(counter_id)
    # Another owner's counter looks like none: identities tell nothing.
    if counter is None or not hmac.compare_digest(counter.owner, owner):
        raise SealingError("this enclave has no such counter")
    return counter


def _check_length(what: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ValueError(f"{what} has {size} bytes, not {len(data)}")
