"""
One sealed file: bytes at offsets, transactions, and what is bound to what.

The order of a commit is what makes it safe: pages and nodes go to slots that the last commit does
not use, fsync, then the other header, fsync, then the counter. Whatever is cut off in between, one
of the two headers is whole and everything that it refers to is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from pyenclave._locks import RLock
from pyenclave.errors import (
    EnclaveClosedError,
    EnclaveStateError,
    RollbackError,
    SealingError,
    SealLimitError,
    UnsealError,
)
from pyenclave.formats.sealed_file import (
    BLANK,
    MAC_OFFSET,
    MAC_SIZE,
    MAX_SIZE,
    UNIT,
    FileHeader,
    Geometry,
)
from pyenclave.sealed.file_commits import (
    CommitCounter,
    Rebinding,
    advance,
    check_counter,
    check_protocol,
    counter_name,
    read_headers,
    refuse_lost_file,
    value_and_mark,
)
from pyenclave.sealed.file_crypto import FileKeys, key_root
from pyenclave.sealed.file_store import Store, write_fully
from pyenclave.sealed.file_tree import BATCH, Tree

__all__ = ["CommitCounter", "SealedEngine"]

CACHE_SIZE: Final = 4 << 20  # bytes of nodes that are kept


_engines: weakref.WeakSet[SealedEngine] = weakref.WeakSet()


def _forget_in_child() -> None:
    """What a forked child inherited of keys is wiped: it may not use them anyway."""
    for engine in list(_engines):
        engine.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class SealedEngine:
    """
    Reads and writes one sealed file at offsets. Any thread may call; one works at a time.

    Args:
        store: Where the file is; it is closed with the engine.
        key: 32 bytes or a key object.
        name: What the file is called; it opens under the same name only.
        write: Open for writing.
        create: Make a new file where there is none.
        truncate: Begin with an empty file; the old content stays until the first commit.
        page_size: Of a file that is made.
        counter: The counter that the file is bound to; or both, of one that is not made anew and
            whose binding to another may have been cut off.
        cache_size: Bytes of tree nodes that are kept in memory.
        random: Source of random bytes.
        file_id: Of a file that is made: the 16 bytes of the one that it takes the place of, under
            another key.

    """

    def __init__(
        self,
        store: Store,
        *,
        key: object,
        name: bytes = b"",
        write: bool = False,
        create: bool = False,
        truncate: bool = False,
        page_size: int = UNIT,
        counter: CommitCounter | Rebinding | None = None,
        cache_size: int = CACHE_SIZE,
        random: Callable[[int], bytes] = os.urandom,
        file_id: bytes | None = None,
    ) -> None:
        Geometry.of(page_size)
        check_protocol(counter)
        if isinstance(counter, Rebinding) and truncate:
            raise ValueError("counter: a file that begins anew has one counter")
        self._store = store
        self._lock = RLock()
        self._pid = os.getpid()
        self._closed = False
        self._given_id = file_id
        self._failed: str | None = None
        self._in_doubt = False
        self._changed = False
        self._fresh = False
        self._cut_store = False
        self.writable = write
        self._counter: CommitCounter | None = None
        self._tail = memoryview(bytearray())
        self._tail_page = -1
        self._tail_dirty = False
        self._unit = memoryview(bytearray())  # plaintext that the caller wants a part of
        self._keys: FileKeys | None = None
        root = key_root(key)
        try:
            store.lock(exclusive=write)
            header = self._load(
                root, bytes(name), random, counter, create=create, truncate=truncate
            )
            if header is None:
                if isinstance(counter, Rebinding):
                    raise UnsealError("the file holds no commit", expected="a sealed file")
                self._counter = counter
                header = self._begin(bytearray(root), bytes(name), page_size, random)
            root[:] = bytes(len(root))
        except BaseException:
            root[:] = bytes(len(root))
            self._wipe_keys()
            raise
        self.header = header
        self._counted = header.counter_value  # value of the counter at the last commit
        self.geometry = header.geometry
        self.size = header.size
        nodes = max(8, cache_size // header.page_size)
        self._tree = Tree(header, self._live_keys(), store, nodes=nodes)
        self._tail = memoryview(bytearray(header.page_size))
        _engines.add(self)
        if write:
            self._live_keys().start(bytes(header.to_bytes()))
            if truncate and not self._fresh:
                self.truncate(0)

    # ---- opening -----------------------------------------------------------------------------

    def _load(
        self,
        root: bytearray,
        name: bytes,
        random: Callable[[int], bytes],
        counter: CommitCounter | Rebinding | None,
        *,
        create: bool,
        truncate: bool,
    ) -> FileHeader | None:
        """Return the newest commit, or None if a new file is to be made."""
        headers, blank, why = read_headers(self._store)
        if blank and create and not headers:
            if not truncate and not isinstance(counter, Rebinding):
                refuse_lost_file(counter)
            return None
        try:
            header, mark = self._newest(headers, blank, why, root, name, random)
            self._counter = check_counter(counter, header, mark)
        except (UnsealError, RollbackError):
            if not (truncate and create):
                raise
            # As any file that is opened for writing anew, whatever it holds.
            self._wipe_keys()
            self._store.truncate(0)
            return None
        return header

    def _newest(
        self,
        headers: list[tuple[FileHeader, bytes]],
        blank: bool,
        why: UnsealError | None,
        root: bytearray,
        name: bytes,
        random: Callable[[int], bytes],
    ) -> tuple[FileHeader, bytes]:
        """Return the newest header that verifies, with its MAC."""
        if len({(header.file_id, header.name_tag) for header, _ in headers}) > 1:
            # Every MAC commits to a key, but two headers could commit to two (SEA-10): whoever has
            # both keys would make one file that shows each reader another content.
            raise UnsealError(
                "the sealed file has headers of two files",
                expected="one id and name tag",
                found="two",
                advice="It was damaged or put together; bring a good copy.",
            )
        best: FileHeader | None = None
        best_mac = b""
        best_keys: FileKeys | None = None
        for header, data in headers:
            keys = FileKeys(bytearray(root), header.file_id, random=random)
            mac = data[MAC_OFFSET : MAC_OFFSET + MAC_SIZE]
            zeroed = bytearray(data)
            zeroed[MAC_OFFSET : MAC_OFFSET + MAC_SIZE] = bytes(MAC_SIZE)
            if hmac.compare_digest(keys.header_mac(zeroed), mac) and (
                best is None or header.generation > best.generation
            ):
                if best_keys is not None:
                    best_keys.close()
                best, best_keys, best_mac = header, keys, mac
            else:
                keys.close()
        if best is None or best_keys is None:
            if headers:
                raise UnsealError(
                    "the sealed file is not authentic under this key",
                    expected="a header that the key verifies",
                    found="another MAC",
                    advice="Give the key that the file was written with, or a good copy.",
                )
            if blank:
                raise UnsealError(
                    "the file holds no commit",
                    expected="a sealed file",
                    found="no header",
                    advice="It was never closed or committed, or is no sealed file.",
                )
            raise why or UnsealError("this is no sealed file")
        if not hmac.compare_digest(best_keys.name_tag(name), best.name_tag):
            best_keys.close()
            raise UnsealError(
                "the sealed file has another name",
                expected="the name it was made with",
                found=repr(name),
                advice="Give the same name= as when it was made.",
            )
        self._keys = best_keys
        return best, best_mac

    def _begin(
        self, root: bytearray, name: bytes, page_size: int, random: Callable[[int], bytes]
    ) -> FileHeader:
        """Start a new file. It is there with its first commit."""
        seed = random(32) + os.urandom(16) + repr((os.getpid(), id(self))).encode()
        file_id = self._given_id or hashlib.sha256(b"pyenclave/file/1/id" + seed).digest()[:16]
        self._keys = FileKeys(root, file_id, random=random)
        self._fresh = self._changed = True
        self._cut_store = True
        value = 0 if self._counter is None else self._counter.read()
        return FileHeader(
            page_size=page_size,
            file_id=file_id,
            name_tag=self._keys.name_tag(name),
            generation=1,  # that of the commit before the first, which nobody wrote
            size=0,
            end=Geometry.of(page_size).first_slot,
            height=0,
            free_slots=0,
            counter_id=None if self._counter is None else counter_name(self._counter),
            counter_value=value,
            root=BLANK,
            free=BLANK,
        )

    # ---- state -------------------------------------------------------------------------------

    def _live_keys(self) -> FileKeys:
        if self._keys is None:
            raise EnclaveClosedError("the sealed file is closed")
        return self._keys

    def _wipe_keys(self) -> None:
        keys, self._keys = self._keys, None
        if keys is not None:
            keys.close()

    def _check(self, *, write: bool = False) -> None:
        """Refuse what this object cannot do; with *write*, also after a failure."""
        if os.getpid() != self._pid:
            raise EnclaveStateError(
                "a sealed file belongs to the process that opened it, not to a forked child",
                advice="Open it again in the child.",
            )
        if self._closed:
            raise EnclaveClosedError("the sealed file is closed")
        if write and self._failed is not None:
            raise SealingError(
                f"an earlier write failed ({self._failed}); nothing was committed since",
                advice="discard() goes back to the last commit."
                if not self._in_doubt
                else "Close the file and open it again: the last commit is there or it is not.",
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Any failure ends the transaction: what is half written is never committed."""
        with self._lock:
            self._check(write=True)
            try:
                self._changed = True
                yield
            except BaseException as error:
                self._failed = f"{type(error).__name__}: {error}"
                raise

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def generation(self) -> int:
        """Number of the last commit; 0 before the first."""
        return self.header.generation - 1

    # ---- reading -----------------------------------------------------------------------------

    def read_into(self, offset: int, out: memoryview) -> int:
        """
        Read to *out* from *offset* and return the number of bytes: all there is.

        Raises:
            UnsealError: A page is not authentic.
            SealingError: An earlier write failed, and `discard` was not called.

        """
        with self._lock:
            # After a failed write nobody knows what is there but the last commit.
            self._check(write=self._failed is not None)
            size = min(len(out), self.size - offset)
            if size <= 0:
                return 0
            if self._tail_dirty:
                with self._writing():
                    self._flush_tail()
            self._tree.trim()
            done = 0
            if offset % UNIT == 0:
                done = size // UNIT * UNIT
                if done:
                    self._tree.read(offset // UNIT, out[:done])
            while done < size:
                unit, inner = divmod(offset + done, UNIT)
                units = min(BATCH, -(-(inner + size - done) // UNIT))
                if len(self._unit) < units * UNIT:
                    self._unit = memoryview(bytearray(units * UNIT))
                part = self._unit[: units * UNIT]
                self._tree.read(unit, part)
                count = min(size - done, units * UNIT - inner)
                out[done : done + count] = part[inner : inner + count]
                done += count
            return size

    # ---- writing -----------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> int:
        """Write *data* at *offset* and return its length. It is there after a commit."""
        if not len(data):
            return 0
        if offset + len(data) > MAX_SIZE:
            raise SealLimitError("a sealed file is not larger", expected=MAX_SIZE, found=offset)
        size = self.geometry.page_size
        with self._writing():
            self._tree.grow(-(-(offset + len(data)) // size))
            done = 0
            while done < len(data):
                page, inner = divmod(offset + done, size)
                left = len(data) - done
                if inner or left < size:
                    count = min(size - inner, left)
                    self._load_tail(page)
                    self._tail[inner : inner + count] = data[done : done + count]
                    self._tail_dirty = True
                else:
                    count = left // size * size
                    if page <= self._tail_page < page + count // size:
                        self._tail_page, self._tail_dirty = -1, False
                    self._tree.write(0, page, data[done : done + count])
                done += count
                self.size = max(self.size, offset + done)
            return done

    def _load_tail(self, page: int) -> None:
        """Make the one page that is kept in the clear page number *page*."""
        if self._tail_page == page:
            return
        self._flush_tail()
        self._tail_page = -1
        size = self.geometry.page_size
        if page * size < self.size:
            self._tree.read(page * self.geometry.units, self._tail)
        else:
            self._tail[:] = bytes(size)
        self._tail_page = page

    def _flush_tail(self) -> None:
        if self._tail_dirty:
            self._tree.write(0, self._tail_page, self._tail)
            self._tail_dirty = False

    def truncate(self, size: int) -> int:
        """Make the file *size* bytes long; new bytes are zeros and take no room."""
        if size < 0:
            raise ValueError(f"size: expected 0 or more, found {size}")
        if size > MAX_SIZE:
            raise SealLimitError("a sealed file is not larger", expected=MAX_SIZE, found=size)
        page_size = self.geometry.page_size
        with self._writing():
            if size < self.size:
                pages = -(-size // page_size)
                if pages <= self._tail_page:
                    self._tail_page, self._tail_dirty = -1, False
                self._tree.trim()
                self._tree.cut(pages)
                if size % page_size:
                    # What follows must read as zeros if the file grows again.
                    self._load_tail(size // page_size)
                    self._tail[size % page_size :] = bytes(page_size - size % page_size)
                    self._tail_dirty = True
            else:
                self._tree.grow(-(-size // page_size))
            self.size = size
            return size

    # ---- transactions ------------------------------------------------------------------------

    def commit(self) -> int:
        """
        Make everything written durable, at once or not at all, and return the commit's number.

        Raises:
            OSError: The store failed. The last commit is there; this one is not, or, if its header
                was under way, may be: then nothing more can be written here.
            SealingError: An earlier write failed.

        """
        with self._lock:
            self._check(write=True)
            if not self.writable:
                raise SealingError("the sealed file is open for reading only")
            if not self._changed:
                return self.generation
            with self._writing():
                self._commit()
            self._changed = False
            return self.generation

    def _commit(self, before: tuple[CommitCounter, int] | None = None) -> None:
        """Commit; with *before*, the counter that is left with this, and its value then."""
        keys, store = self._live_keys(), self._store
        old_end = self.header.end
        self._flush_tail()
        root, free, free_slots, end = self._tree.save()
        value = 0 if self._counter is None else self._counted + 1
        header = FileHeader(
            page_size=self.header.page_size,
            file_id=self.header.file_id,
            name_tag=self.header.name_tag,
            generation=self.header.generation + 1,
            size=self.size,
            end=end,
            height=self._tree.height,
            free_slots=free_slots,
            counter_id=None if self._counter is None else counter_name(self._counter),
            counter_value=value,
            root=root,
            free=free,
            old_counter_id=None if before is None else counter_name(before[0]),
            old_counter_value=0 if before is None else before[1],
        )
        data = header.to_bytes()
        mark = keys.header_mac(data)
        data[MAC_OFFSET : MAC_OFFSET + MAC_SIZE] = mark
        store.fsync()
        self._in_doubt = True
        write_fully(store, memoryview(data), header.offset)
        store.fsync()
        if before is not None:
            # First of the two: the new counter's value says that the old one is retired.
            advance(*before, mark)
        if self._counter is not None:
            advance(self._counter, value, mark)
        self._counted = value
        self._in_doubt = False
        self.header = header
        self._fresh = False
        keys.committed = keys.sealed
        self._tree.committed(header)
        if end < old_end or self._cut_store:
            # Nothing refers to what lies behind. If this is not done, or undone, nothing is lost.
            self._cut_store = False
            with contextlib.suppress(OSError):
                store.truncate(max(end * header.page_size, 2 * self.geometry.stride))

    def bind(self, counter: CommitCounter | None) -> int:
        """
        Bind the file to another counter, or to none, with a commit of what was written.

        The old counter is retired before the new one counts: with it no copy of the file opens any
        more. Cut off in between, the file opens with both (`Rebinding`) or as it was before.

        Args:
            counter: The new counter.

        Returns:
            The number of the commit.

        Raises:
            As `commit`.

        """
        if isinstance(counter, Rebinding):
            raise TypeError("counter: bind takes the new one only")
        check_protocol(counter)
        with self._lock:
            self._check(write=True)
            if not self.writable:
                raise SealingError("the sealed file is open for reading only")
            old, counted = self._counter, self._counted
            before: tuple[CommitCounter, int] | None = None
            if old is not None and counter is not None and bytes(counter.id) != bytes(old.id):
                before = old, counted + 1
            base = 0 if counter is None else value_and_mark(counter)[0]
            try:
                with self._writing():
                    if old is not None and counter is None:
                        self._commit()  # what was before does not open from here on
                        counted = self._counted
                    self._counter, self._counted = counter, base
                    self._commit(before)
            except BaseException:
                self._counter, self._counted = old, counted
                raise
            self._changed = False
            if old is not None and counter is None:
                # That a copy of this very commit does not open with it, either.
                advance(old, counted + 1, self._live_keys().header_mac(self.header.to_bytes()))
            return self.generation

    def discard(self) -> None:
        """
        Go back to the last commit: all that was written since is forgotten.

        Raises:
            SealingError: A commit failed so that nobody can say whether it is there.

        """
        with self._lock:
            if self._in_doubt:
                self._check(write=True)
            self._check()
            self._tail_page, self._tail_dirty = -1, False
            keys = self._live_keys()
            keys.committed = keys.sealed
            self._tree.reset(self.header)
            self.size = self.header.size
            self._failed = None
            self._changed = self._fresh
            self._cut_store = True

    def forget(self) -> None:
        """Wipe keys and plaintext; nothing can be read or written any more."""
        self._wipe_keys()
        for buffer in (self._tail, self._unit):
            buffer[:] = bytes(len(buffer))
        self._tail_page, self._tail_dirty = -1, False
        self._tree.close()

    def close(self, *, commit: bool = True) -> None:
        """
        Commit, wipe the keys and close the store. May be called twice.

        Args:
            commit: Whether to commit what was written. After a failure nothing is committed.

        Raises:
            SealingError: Something written could not be committed because of an earlier failure.

        """
        if os.getpid() != self._pid:
            self._closed = True
            self._store.close()
            return
        with self._lock:
            if self._closed:
                return
            try:
                if commit and self.writable and (self._changed or self._failed is not None):
                    self.commit()
            finally:
                self._closed = True
                self.forget()
                self._store.close()

    def __reduce__(self) -> Any:
        raise TypeError("a sealed file cannot be pickled")
