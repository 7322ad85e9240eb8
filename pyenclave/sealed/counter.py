"""
Monotonic counters that date sealed files, so that an older copy of a file is refused.

A sealed file carries the value that its counter has, or gets next. It is written with the next
value, made durable, and only then is the counter advanced; whoever opens it accepts the counter's
value or the one after it, never less (design, section 8). Beside its value a counter may keep the
*mark* of the one state that was committed with it: of several that were written for the same next
value, because a writer was stopped, only one may ever be the newest.

Inside an enclave the platform's counters are used (`pyenclave.trusted.Counter`).
:class:`FileCounter` is for development, and for data whose storage is less trusted than this
machine: whoever can write its file can put it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec

from pyenclave.errors import RollbackError, SealingError, SealLimitError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["MAX_STEP", "Counter", "FileCounter", "Reading", "check_step"]

T = TypeVar("T")

MAX_STEP: Final = 16  # how far a counter may be advanced at once
MAX_MARK: Final = 64  # bytes

_FORMAT: Final = "pyenclave-counters/1"
_ID_SIZE: Final = 16
_MAX_VALUE: Final = (1 << 63) - 1
_MAX_COUNTERS: Final = 4096
_MAX_NAME: Final = 200  # characters
_MAX_FILE: Final = 8 << 20


class Reading(NamedTuple):
    """A counter's value, and the mark of what was committed with it (empty: nothing was)."""

    value: int
    mark: bytes


@runtime_checkable
class Counter(Protocol):
    """
    A number that only grows. Thread-safe, and shared by whoever knows its identity.

    What a call returns is durable: no crash takes it back.
    """

    @property
    def id(self) -> bytes:
        """Name of this counter, 1 to 64 bytes; no other has it, and none gets it again."""

    def read(self) -> int:
        """
        Return the value, from 0 to 2^63 - 1.

        Raises:
            SealingError: It cannot be read, or there is no such counter.
            RollbackError: It was put back, as far as that is noticed.

        """

    def reading(self) -> Reading:
        """Return value and mark together. Raises as :meth:`read`."""

    def advance(self, to: int, mark: bytes = b"") -> None:
        """
        Make *to* the value, durably.

        Where it is the value already this does nothing, but for a mark: then the state of that
        mark must be the one that was committed.

        Args:
            to: The new value, at most ``MAX_STEP`` more than the old one.
            mark: Names the state that becomes the newest one; up to 64 bytes.

        Raises:
            RollbackError: The value is more than *to* already, or another mark has *to*.
            SealLimitError: *to* is out of reach.
            SealingError: As for :meth:`read`; or it cannot be written: then the value is the old
                or the new one, never another.

        """


def check_step(reading: Reading, to: int, mark: bytes) -> bool:
    """
    Judge an advance, as every counter must.

    Args:
        reading: What the counter has.
        to: What it is to have.
        mark: With what.

    Returns:
        Whether there is something to do.

    Raises:
        RollbackError: See :meth:`Counter.advance`, also for the others.
        SealLimitError: *to* is more than ``MAX_STEP`` away, or beyond 2^63 - 1.
        TypeError: *to* is no number, or *mark* no bytes.
        ValueError: *to* is negative, or *mark* too long.

    """
    for what, given, kind in (("value", to, int), ("mark", mark, bytes)):
        if not isinstance(given, kind) or isinstance(given, bool):
            raise TypeError(f"a counter's {what} is {kind.__name__}, not {type(given).__name__}")
    if to < 0 or len(mark) > MAX_MARK:
        raise ValueError(f"a counter has values from 0 and marks of up to {MAX_MARK} bytes")
    value = reading.value
    if to < value:
        raise RollbackError(
            "the counter is beyond this value", expected=f"at least {value}", found=to
        )
    if to == value:
        if mark and mark != reading.mark:
            raise RollbackError(
                "another state was committed with this value of the counter",
                expected=reading.mark.hex() or "none",
                found=mark.hex(),
            )
        return False
    if to > min(value + MAX_STEP, _MAX_VALUE):
        raise SealLimitError(
            "a counter cannot be advanced that far at once",
            expected=f"at most {min(value + MAX_STEP, _MAX_VALUE)}",
            found=to,
        )
    return True


_Id = Annotated[bytes, msgspec.Meta(min_length=_ID_SIZE, max_length=_ID_SIZE)]
_Mark = Annotated[bytes, msgspec.Meta(max_length=MAX_MARK)]
_Value = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: _Id
    value: _Value
    mark: _Mark = b""


class _Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    generation: _Value
    counters: Annotated[dict[_Name, _Entry], msgspec.Meta(max_length=_MAX_COUNTERS)]


_decoder = msgspec.json.Decoder(_Store, strict=True)


class FileCounter:
    """
    A counter in a file, one of several that the file may hold. Threads and processes may share it.

    Each change is written aside, synced, renamed and the folder synced, under a lock that ends with
    its process: whatever is killed when, no change is lost and none is half there.

    What it does **not** do: hold against somebody who can write the file. Whoever puts back both it
    and the sealed file is not noticed, except by a process that saw the newer value. Use it for
    development, for tests, or where it lies on another, better protected disk than the sealed file.

    Args:
        path: The file; made if it is not there, with mode 0600. ``PATH.lock`` and, for moments,
            ``PATH.new`` lie beside it.
        name: Which of the file's counters, 1 to 200 printable characters.
        create: Whether to make the counter, with value 0, if it is not there.

    Raises:
        SealingError: There is no such counter, or the file is damaged or cannot be used.
        SealLimitError: The file holds 4,096 counters already.
        TypeError: *name* is no text.
        ValueError: *name* is too long, empty or not printable.

    """

    def __init__(
        self, path: str | os.PathLike[str], name: str = "default", *, create: bool = True
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a counter's name is a text, not {type(name).__name__}")
        if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            raise ValueError(f"a counter's name has 1 to {_MAX_NAME} printable characters")
        if fcntl is None:
            raise SealingError("this system has no file locks: there are no file counters")
        self._path = Path(path).absolute()
        self._name = name
        self._id: bytes | None = None
        self._seen = 0  # the highest value that this object knows of
        self._synced = -1  # the generation that is known to be durable
        with self._locked(exclusive=create):
            store = self._load()
            if name not in store.counters:
                if not create:
                    raise SealingError(f"{self._path} has no counter {name!r}")
                if len(store.counters) >= _MAX_COUNTERS:
                    raise SealLimitError("a file holds so many counters", expected=_MAX_COUNTERS)
                store = self._save(store, _Entry(secrets.token_bytes(_ID_SIZE), 0))
            self._id = store.counters[name].id

    @property
    def id(self) -> bytes:
        """16 random bytes, made with the counter."""
        if self._id is None:
            raise AssertionError("the counter was not opened")
        return self._id

    @property
    def path(self) -> str:
        """The file."""
        return str(self._path)

    def read(self) -> int:
        """Return the value. Raises as :meth:`Counter.read`."""
        return self.reading().value

    def reading(self) -> Reading:
        """Return value and mark. Raises as :meth:`Counter.read`."""
        with self._locked(exclusive=False):
            entry = self._entry(self._load())
        return Reading(entry.value, entry.mark)

    def advance(self, to: int, mark: bytes = b"") -> None:
        """Make *to* the value. As :meth:`Counter.advance`."""
        with self._locked(exclusive=True):
            store = self._load()
            entry = self._entry(store)
            if check_step(Reading(entry.value, entry.mark), to, mark):
                self._save(store, _Entry(entry.id, to, mark))
                self._seen = to

    def _entry(self, store: _Store) -> _Entry:
        entry = store.counters.get(self._name)
        if entry is None or entry.id != self._id:
            raise RollbackError(
                f"the counter {self._name!r} is gone from {self._path}",
                expected=self.id.hex(),
                found=entry.id.hex() if entry else "none",
            )
        if entry.value < self._seen:
            raise RollbackError(
                f"the counters of {self._path} were put back",
                expected=f"at least {self._seen}",
                found=entry.value,
            )
        self._seen = entry.value
        return entry

    # ---- the file -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self._try("locked", lambda: os.open(f"{self._path}.lock", flags, 0o600))
        try:
            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            self._try("locked", lambda: fcntl.flock(fd, kind))
            yield
        finally:
            os.close(fd)

    def _load(self) -> _Store:
        """Return what the file holds; durable, so that no crash takes it back."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return _Store(_FORMAT, 0, {})
        except OSError as error:
            raise self._failure("read", error) from None
        with open(fd, "rb", buffering=0) as file:
            data = self._try("read", file.readall)
            store = self._parse(data)
            if store.generation != self._synced:
                # Its writer may have been stopped before it had synced the folder.
                self._try("synced", lambda: os.fsync(file.fileno()))
                self._sync_folder()
                self._synced = store.generation
        return store

    def _parse(self, data: bytes) -> _Store:
        body, _, check = data.partition(b"\n")
        good = len(data) <= _MAX_FILE and check == _checksum(body)
        try:
            store = _decoder.decode(body) if good else None
        except (msgspec.DecodeError, RecursionError):
            store = None
        if store is None or store.format != _FORMAT:
            raise SealingError(
                f"{self._path} is damaged, or no file of counters",
                expected=f"{_FORMAT}, as it was written",
                advice="What was sealed under its counters opens with them only: look for a copy.",
            )
        return store

    def _save(self, store: _Store, entry: _Entry) -> _Store:
        counters = {**store.counters, self._name: entry}
        changed = _Store(_FORMAT, store.generation + 1, counters)
        body = msgspec.json.encode(changed)
        data = memoryview(body + b"\n" + _checksum(body))
        aside = f"{self._path}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(aside, flags, 0o600)
            try:
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(aside, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise self._failure("written", error) from None
        self._sync_folder()
        self._synced = changed.generation
        return changed

    def _sync_folder(self) -> None:
        def sync() -> None:
            fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        self._try("synced", sync)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as error:
            raise self._failure(what, error) from None

    def _failure(self, what: str, error: OSError) -> SealingError:
        return SealingError(f"{self._path}: the counters cannot be {what}: {error.strerror}")

    def __repr__(self) -> str:
        return f"FileCounter({str(self._path)!r}, {self._name!r})"


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode("ascii") + b"\n"
