"""
Which databases were served with the key-encryption keys of a state directory.

Who destroys a key-encryption key looks for rows that need it, and sees those of his own database
only. So each vault notes its database (by the id of its audit log) where it is started.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import select

from pyenclave._platform.state import State
from pyenclave.services.storage.database import Database
from pyenclave.services.storage.tables import audit_head

__all__ = ["FILE", "note_user", "other_users"]

FILE: Final = "vault-databases"  # a line each: the id of a log, in hexadecimal
_LOCK: Final = "vault.lock"
_MAX: Final = 64 << 10
_WAIT: Final = 120.0  # seconds; the enclave's image may be built under this lock


def _log_of(db: Database) -> str:
    log = db.submit(lambda tx: tx.connection.scalar(select(audit_head.c.log))).result()
    return bytes(log).hex() if log is not None else ""


def _listed(state: State) -> list[str]:
    data = state.read_file(FILE, limit=_MAX) or b""
    return data.decode("ascii", "replace").split()


def note_user(db: Database, state_dir: str) -> None:
    """
    Note that *db* is served with the key-encryption keys of *state_dir*.

    Raises:
        PlatformUnavailableError: The state directory cannot be used.

    """
    log = _log_of(db)
    with State.open(state_dir) as state:
        if not state.writable:
            return  # nothing can be destroyed there either
        with state.lock(_LOCK, timeout=_WAIT):
            listed = _listed(state)
            if log not in listed:
                state.replace_file(FILE, "".join(f"{item}\n" for item in [*listed, log]).encode())


def other_users(db: Database, state_dir: str) -> list[str]:
    """Return the ids of other databases that were served with these key-encryption keys."""
    log = _log_of(db)
    with State.open(state_dir) as state:
        return [item for item in _listed(state) if item != log]
