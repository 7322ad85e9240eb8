"""What a work sees of the database: one transaction's connection, time, cache and audit log."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar

from sqlalchemy import Connection

from pyenclave.errors import ServiceError
from pyenclave.services.audit.event import Event
from pyenclave.services.storage.secrets import Secrets

__all__ = ["Cache", "Group", "Refused", "Transaction"]

V = TypeVar("V")
_MISSING: Final = object()


class Refused(Exception):  # noqa: N818 - a decision, not a fault
    """
    Raised by a work that refuses: its writes are undone, its *event* is kept.

    Args:
        error: What the caller gets, with the event's reference id filled in.
        event: What the auditor gets.

    """

    def __init__(self, error: ServiceError, event: Event) -> None:
        super().__init__(error.message)
        self.error = error
        self.event = event


class Cache:
    """Values read from the database, all of one generation; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.generation = -1
        self._values: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    def at(self, generation: int) -> None:
        """Forget everything if it is of another generation."""
        if generation != self.generation:
            self._values.clear()
            self.generation = generation

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.generation = -1

    def get(self, key: Hashable, load: Callable[[], V]) -> V:
        """Return the value of *key*, loaded at most once a generation."""
        value = self._values.get(key, _MISSING)
        if value is _MISSING:
            value = load()
            if len(self._values) >= self.limit:
                del self._values[next(iter(self._values))]
            self._values[key] = value
        return value  # type: ignore[no-any-return]


class Group:
    """
    The works that share one transaction of the database; the writer's side of `Transaction`.

    Attributes:
        events: What the works appended, with the reference ids.
        used: Whether any work used the connection.
        any_changed: Whether any called `Transaction.changed`.
        now: Time of the group, in UTC.
        secrets: The database's.

    """

    __slots__ = (
        "_changed", "_kept", "_saved", "any_changed", "cache", "connection", "driver", "events",
        "now", "references", "secrets", "used",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        driver: Any,
        cache: Cache,
        references: Callable[[], str],
        now: dt.datetime,
        secrets: Secrets,
    ) -> None:
        self.connection = connection
        self.driver = driver
        self.cache = cache
        self.references = references
        self.now = now
        self.secrets = secrets
        self.events: list[tuple[Event, str]] = []
        self.used = self.any_changed = False
        self._saved = self._changed = False
        self._kept = 0

    def begin_work(self) -> None:
        """Start the next work."""
        self._saved = self._changed = False
        self._kept = len(self.events)

    def keep_work(self) -> None:
        """Keep what the work wrote."""
        if self._saved:
            self.driver.execute("RELEASE SAVEPOINT work")
        if self._changed:
            self.cache.clear()  # what it read before its last write

    def undo_work(self) -> None:
        """Take back what the work wrote, its events and what it cached."""
        del self.events[self._kept :]
        if self._saved:
            self.cache.clear()  # it may have cached what it wrote
            self.driver.execute("ROLLBACK TO SAVEPOINT work")
            self.driver.execute("RELEASE SAVEPOINT work")
            outer = self.connection.get_transaction()
            if outer is not None and not outer.is_active:
                raise RuntimeError("a work ended its group's transaction")

    def save(self) -> None:
        """Make the work's savepoint, if it has none yet."""
        if not self._saved:
            self.driver.execute("SAVEPOINT work")
            self._saved = self.used = True

    def change(self) -> None:
        """Forget what is cached, here and, after the commit, elsewhere."""
        self._changed = self.any_changed = True
        self.cache.clear()

    def audit(self, event: Event) -> str:
        """Keep *event* for the end of the group."""
        reference = self.references()
        self.events.append((event, reference))
        return reference

    def report(self, event: Event) -> None:
        """Keep *event* whatever becomes of the work."""
        self.events.insert(self._kept, (event, self.references()))
        self._kept += 1


class Transaction:
    """
    What a work is given. Works of one group share the database's transaction, one after the other.

    Attributes:
        now: Time of the group, in UTC.

    """

    __slots__ = ("_group", "now")

    def __init__(self, group: Group) -> None:
        self._group = group
        self.now = group.now

    @property
    def connection(self) -> Connection:
        """
        The SQLAlchemy connection.

        The first use in a work makes its savepoint. Works neither commit nor roll back.
        """
        self._group.save()
        return self._group.connection

    @property
    def secrets(self) -> Secrets:
        """What protects secrets and seals rows in this database."""
        return self._group.secrets

    @property
    def changing(self) -> bool:
        """Whether this group wrote cached data: what is read now may not be committed."""
        return self._group.any_changed

    def cached(self, key: Hashable, load: Callable[[], V]) -> V:
        """
        Return ``load()``, or what it returned since anybody last called `changed`.

        The generation is read once a group, so the value is never older than this transaction.
        Values are shared between works and must not be changed.

        Args:
            key: Names the value; begin it with the part's name.
            load: Reads it through `connection`.

        """
        return self._group.cache.get(key, load)

    def changed(self) -> None:
        """Say that cached data was written: nobody reads an older value after the commit."""
        self._group.change()

    def audit(self, event: Event) -> str:
        """
        Append *event* in this transaction.

        It is kept if and only if the work's writes are: a work that raises leaves no event, one
        that raises `Refused` leaves that one's.

        Returns:
            Its reference id.

        """
        return self._group.audit(event)

    def report(self, event: Event) -> None:
        """
        Append *event* even if the work is refused or fails: for what it found out by the way.

        It is lost only if the whole group is.
        """
        self._group.report(event)
