"""
Sealed files for whoever gets a key of a vault: envelope encryption.

Each file has a data key of its own making, wrapped by the vault's key in an envelope in front of
the sealed file (``docs/formats/wrapped-file.md``). Only the public half is needed to encrypt; to
open, the vault unwraps, or an enclave to which the vault released the key. `open_sealed` takes the
keys of this module, and every object with the same methods, as ``key=``.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, runtime_checkable

from pyenclave._locks import Lock
from pyenclave.errors import SealingError, UnsealError
from pyenclave.formats import wrapped
from pyenclave.formats.key_envelope import KeyEnvelope
from pyenclave.formats.wrapped import Envelope
from pyenclave.sealed.file_store import behind, read_fully, write_fully

if TYPE_CHECKING:
    from pyenclave.sealed.file_store import Store

__all__ = [
    "DATA_KEY_SIZE",
    "Together",
    "UnwrappingKey",
    "Wrapping",
    "WrappingKey",
    "enter",
    "is_envelope_key",
    "key_name",
    "open_envelope",
    "rewrap",
    "seal_envelope",
]

DATA_KEY_SIZE: Final = 32
_LABEL: Final = b"pyenclave/key-envelope/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapping:
    """
    A data key that was wrapped.

    Attributes:
        kid: The identifier of the key that wrapped it, with its version.
        algorithm: How: one of ``pyenclave.formats.key_envelope.ALGORITHMS``.
        wrapped: The result.

    """

    kid: str
    algorithm: str
    wrapped: bytes


@runtime_checkable
class WrappingKey(Protocol):
    """
    What can be given as ``key`` to make a file.

    It may also have ``fresh()``, which returns a data key and its `Wrapping`: see `Together`.
    """

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap 32 bytes."""


@runtime_checkable
class UnwrappingKey(Protocol):
    """
    What can be given as ``key`` to open a file: a released key, for one.

    It may also have ``kid``, the one identifier that it is for, and ``for_kid(kid)``, which returns
    the object for the key that an envelope names, or raises UnsealError.
    """

    def unwrap(self, wrapped: bytes, algorithm: str) -> bytes:
        """Unwrap, or raise UnsealError."""


def is_envelope_key(key: object) -> bool:
    """Tell whether *key* wraps or unwraps data keys."""
    return callable(getattr(key, "wrap", None)) or callable(getattr(key, "unwrap", None))


def key_name(kid: str) -> str:
    """
    Return what of an identifier tells keys apart: ``NAME/VERSION``, or all of it if it has none.

    Versions are random; the vault's address is left out, since one vault may have several.
    """
    at = kid.rfind("/keys/")
    return kid[at + len("/keys/") :].strip("/") if at >= 0 else kid


def _mac(data_key: bytes, place: Envelope, envelope: KeyEnvelope) -> bytes:
    secret = hmac.digest(_LABEL, data_key, "sha256")
    return hmac.digest(
        secret, place.generation.to_bytes(8, "little") + envelope.unsigned(), "sha256"
    )


class Together:
    """
    A wrapping key that gives all files one data key: who opens them has one key unwrapped.

    Their page keys differ all the same, by each file's id and salts.

    Args:
        key: Wraps it, once.

    """

    def __init__(self, key: WrappingKey) -> None:
        self._key = key
        self._made: tuple[bytes, Wrapping] | None = None
        self._lock = Lock()

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap any other data key."""
        return self._key.wrap(data_key)

    def fresh(self) -> tuple[bytes, Wrapping]:
        """Return the data key and its wrapping."""
        with self._lock:
            if self._made is None:
                self._made = _fresh(self._key)
            return self._made

    def __repr__(self) -> str:
        return f"<Together {self._key!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are never pickled")


def _fresh(key: object) -> tuple[bytes, Wrapping]:
    ready = getattr(key, "fresh", None)
    if callable(ready):
        made: tuple[bytes, Wrapping] = ready()
        return made
    wrap = getattr(key, "wrap", None)
    if not callable(wrap):
        raise TypeError(f"key: a {type(key).__name__} cannot make a file: it does not wrap")
    # A generator that repeats itself gives this key twice, and still no page key: see salts.
    data_key = os.urandom(DATA_KEY_SIZE)
    return data_key, wrap(data_key)


def seal_envelope(
    data_key: bytes, made: Wrapping, *, file_id: bytes, generation: int = 2
) -> Envelope:
    """
    Make the envelope of a file.

    Args:
        data_key: The key of the sealed file, 32 bytes.
        made: The same, wrapped.
        file_id: The sealed file's id, 16 bytes.
        generation: Of the envelope; each that replaces another one is one more.

    Raises:
        SealingError: The wrapping is none.

    """
    try:
        envelope = KeyEnvelope(
            kid=made.kid, algorithm=made.algorithm, wrapped=bytes(made.wrapped), file_id=file_id
        )
    except UnsealError as error:
        raise SealingError(f"the wrapped key fits no envelope: {error}") from None
    place = Envelope(generation, envelope.to_bytes())
    signed = replace(envelope, mac=_mac(data_key, place, envelope))
    return Envelope(generation, signed.to_bytes())


def open_envelope(head: bytes, key: object) -> tuple[bytes, KeyEnvelope]:
    """
    Return the data key in a file's head, and what the envelope says.

    Args:
        head: The first 8192 bytes of the file.
        key: Unwraps it.

    Raises:
        UnsealError: No envelope of a vault's key, of another key, or changed.

    """
    place = wrapped.newest(head)
    if not place.of_vault:
        raise UnsealError(
            "the file's key is sealed to an enclave and wrapped by no key of a vault",
            advice="Open it with pyenclave unseal.",
        )
    envelope = place.key_envelope
    choose = getattr(key, "for_kid", None)
    if callable(choose):
        key = choose(envelope.kid)
    wanted = getattr(key, "kid", None)
    if isinstance(wanted, str) and key_name(wanted) != key_name(envelope.kid):
        raise UnsealError(
            "the file is encrypted to another key", expected=wanted, found=envelope.kid
        )
    unwrap = getattr(key, "unwrap", None)
    if not callable(unwrap):
        raise UnsealError(
            "this key only encrypts: it has no private half",
            expected="a vault's or a released key",
            found=type(key).__name__,
        )
    data_key = unwrap(envelope.wrapped, envelope.algorithm)
    if not isinstance(data_key, bytes | bytearray) or len(data_key) != DATA_KEY_SIZE:
        raise UnsealError("what was unwrapped is no data key", expected=f"{DATA_KEY_SIZE} bytes")
    data_key = bytes(data_key)
    if not hmac.compare_digest(_mac(data_key, place, envelope), envelope.mac):
        raise UnsealError(
            "the key envelope is not authentic",
            expected=f"the envelope that was made with key {envelope.kid}",
            found="a changed one, or another data key",
        )
    return data_key, envelope


def rewrap(head: bytes, old: object, new: WrappingKey) -> tuple[Envelope, Envelope]:
    """
    Wrap a file's data key for another key, or for another version of it.

    Args:
        head: The first 8192 bytes of the file.
        old: Unwraps it now.
        new: Is to wrap it.

    Returns:
        The envelope that counts now, and the one that is to be written to the other place: first
        that one, durably, then the old place is filled with zeros.

    Raises:
        UnsealError: As `open_envelope`.

    """
    data_key, envelope = open_envelope(head, old)
    place = wrapped.newest(head)
    made = new.wrap(data_key)
    generation = place.generation + 1
    return place, seal_envelope(data_key, made, file_id=envelope.file_id, generation=generation)


def _head_of(store: Store) -> bytes:
    head = bytearray(wrapped.HEAD_SIZE)
    read_fully(store, memoryview(head), 0, "its key envelope")
    return bytes(head)


def enter(store: Store, base: str, key: object) -> tuple[Store, bytes, bytes]:
    """
    Go behind a file's envelope, or make one in front of a new file.

    Args:
        store: The whole file. It is locked here.
        base: The mode without ``b`` and ``t``.
        key: Wraps, unwraps, or both.

    Returns:
        Where the sealed file is, its key, and its id.

    Raises:
        UnsealError: As `open_envelope`.
        TypeError: *key* cannot do what the mode needs.

    """
    store.lock(exclusive=base != "r")
    if base[0] in "wx" or (base[0] == "a" and not store.size()):
        data_key, made = _fresh(key)
        file_id = os.urandom(16)
        place = seal_envelope(data_key, made, file_id=file_id)
        # Before anything is sealed under the key. What was there is gone at once, for its data
        # key may be one that this key's holder does not have.
        store.truncate(0)
        write_fully(store, memoryview(place.to_bytes()), place.offset)
        write_fully(store, memoryview(bytes(wrapped.PLACE_SIZE)), wrapped.PLACE_SIZE)
        store.fsync()
        return behind(store, wrapped.HEAD_SIZE), data_key, file_id
    data_key, envelope = open_envelope(_head_of(store), key)
    return behind(store, wrapped.HEAD_SIZE), data_key, envelope.file_id
