"""
The trusted code of the tool enclave: ``pyenclave seal``, ``unseal``, ``reseal`` and ``evidence``.

The image is built at first use for this runtime and signed with a key of the state directory.
Whoever owns that directory owns what is sealed with it.

A file is sealed here, slice by slice, under a key of its own that is made here. That key leaves
only as an *envelope*: a sealed blob, which no function opens for the host. The host reads and
writes the files themselves, for which it is asked by ocalls.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from pyenclave import trusted
from pyenclave.errors import EnclaveError, UnsealError
from pyenclave.formats.evidence import provision_info
from pyenclave.sealed import provision
from pyenclave.sealed.file import open_sealed
from pyenclave.trusted._state import current

_POLICIES: Final = {
    "signer": trusted.SealPolicy.signer,
    "unique": trusted.SealPolicy.unique,
}
_ENVELOPE: Final = b"pyenclave/envelope/1"  # additional data of envelopes, and of nothing else
_SLICE: Final = 1 << 20  # bytes that cross at once
_BODY: Final = 384  # bytes of a report that say who it is of

# ---- what the host does --------------------------------------------------------------------------


@trusted.ocall
def file_read(handle: int, offset: int, length: int) -> bytes:
    """Return bytes of the sealed file."""
    raise NotImplementedError


@trusted.ocall
def file_write(handle: int, offset: int, data: bytes) -> None:
    """Write bytes of the sealed file."""
    raise NotImplementedError


@trusted.ocall
def file_truncate(handle: int, size: int) -> None:
    """Make the sealed file so long."""
    raise NotImplementedError


@trusted.ocall
def file_sync(handle: int) -> None:
    """Make the sealed file durable."""
    raise NotImplementedError


@trusted.ocall
def file_size(handle: int) -> int:
    """Return the length of the sealed file."""
    raise NotImplementedError


@trusted.ocall
def take(handle: int, length: int) -> bytes:
    """Return the next bytes of the plaintext; none at its end."""
    raise NotImplementedError


@trusted.ocall
def give(handle: int, data: bytes) -> None:
    """Take the next bytes of the plaintext."""
    raise NotImplementedError


class _HostStore:
    """The sealed file at the host, as a store: nothing of what it answers is trusted."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def pread(self, into: memoryview, offset: int) -> int:
        done = 0
        while done < len(into):
            want = min(_SLICE, len(into) - done)
            data = file_read(self._handle, offset + done, want)
            if len(data) > want:
                raise OSError("the host gave more than it was asked for")
            into[done : done + len(data)] = data
            done += len(data)
            if len(data) < want:
                break
        return done

    def pwrite(self, data: memoryview, offset: int) -> int:
        for at in range(0, len(data), _SLICE):
            file_write(self._handle, offset + at, bytes(data[at : at + _SLICE]))
        return len(data)

    def truncate(self, size: int) -> None:
        file_truncate(self._handle, size)

    def fsync(self) -> None:
        file_sync(self._handle)

    def size(self) -> int:
        return file_size(self._handle)

    def lock(self, *, exclusive: bool) -> None:
        """Do nothing: the host has the file for itself."""

    def close(self) -> None:
        """Do nothing: the host closes it."""


# ---- envelopes -----------------------------------------------------------------------------------


def _policy(name: str) -> trusted.SealPolicy:
    if name not in _POLICIES:
        raise trusted.PublicError(f"unknown policy {name[:40]!r}")
    return _POLICIES[name]


def _bound(aad: bytes, has_aad: bool, listing: bool) -> bytes:
    return _ENVELOPE + bytes([has_aad, listing]) + aad


def _wrap(key: bytes, policy: str, bound: bytes) -> bytes:
    return trusted.seal(key, policy=_policy(policy), aad=bound)


def _unwrap(envelope: bytes, bound: bytes) -> bytes:
    try:
        key = trusted.unseal(envelope, aad=bound)
    except UnsealError as error:
        # The host holds the whole envelope; the text says nothing that is not in its header.
        raise trusted.PublicError(str(error)) from None
    if len(key) != 32:
        raise trusted.PublicError("the envelope holds no file key")
    return key


# ---- files ---------------------------------------------------------------------------------------


@trusted.ecall
def seal_file(
    handle: int, policy: str, aad: bytes, has_aad: bool, listing: bool
) -> tuple[bytes, bytes]:
    """Seal what the host gives, to the host's file; return its key's envelope, and its id."""
    key = os.urandom(32)
    bound = _bound(aad, has_aad, listing)
    envelope = _wrap(key, policy, bound)
    with open_sealed(_HostStore(handle), "xb", key=key) as file:
        while data := take(handle, _SLICE):
            file.write(data)
        return envelope, file.raw.engine.header.file_id


@trusted.ecall
def unseal_file(handle: int, envelope: bytes, aad: bytes, has_aad: bool, listing: bool) -> bytes:
    """Open the host's file, and give it what is in it; return its id."""
    key = _unwrap(envelope, _bound(aad, has_aad, listing))
    try:
        with open_sealed(_HostStore(handle), "rb", key=key) as file:
            while data := file.read(_SLICE):
                give(handle, data)
            return file.raw.engine.header.file_id
    except UnsealError as error:
        raise trusted.PublicError(str(error)) from None


@trusted.ecall
def rewrap(envelope: bytes, policy: str, aad: bytes, has_aad: bool, listing: bool) -> bytes:
    """Return another envelope of the same key: of this security version, and of *policy*."""
    bound = _bound(aad, has_aad, listing)
    return _wrap(_unwrap(envelope, bound), policy, bound)


# ---- to the same code under another signer -------------------------------------------------------


@trusted.ecall
def target() -> bytes:
    """Return what lets another enclave make a report for this one."""
    return trusted.target_info()


@trusted.ecall
def introduce(target_info: bytes) -> tuple[bytes, bytes]:
    """Return this launch's public key, and a report over it for the enclave of *target_info*."""
    public = current().key.public
    return public, trusted.report(target_info, hashlib.sha512(public).digest())


@trusted.ecall
def hand_over(
    envelope: bytes, aad: bytes, has_aad: bool, listing: bool, public: bytes, report: bytes
) -> bytes:
    """Return the envelope's key, encrypted to an enclave of the same measurement."""
    try:
        body = trusted.verify_report(report)
    except EnclaveError:
        raise trusted.PublicError("the other enclave's report does not hold") from None
    own = trusted.identity()
    if body.mrenclave != own.mrenclave or body.report_data != hashlib.sha512(public).digest():
        raise trusted.PublicError("a file's key goes to the same code only")
    if bool(body.attributes.debug) != own.debug:
        raise trusted.PublicError("debug and production enclaves share no keys")
    key = _unwrap(envelope, _bound(aad, has_aad, listing))
    info = provision_info(report_body=bytes(report[:_BODY]), runtime_key=public, info=_ENVELOPE)
    return provision.encrypt(key, public_key=public, info=info)


@trusted.ecall
def take_over(ciphertext: bytes, policy: str, aad: bytes, has_aad: bool, listing: bool) -> bytes:
    """Seal a key that `hand_over` returned to this enclave's own identity."""
    key = trusted.receive(ciphertext, info=_ENVELOPE)
    if len(key) != 32:
        raise trusted.PublicError("what was handed over is no file key")
    return _wrap(key, policy, _bound(aad, has_aad, listing))


# ---- blobs, as `pyenclave seal` made them before -------------------------------------------------


def _plain(aad: bytes, has_aad: bool) -> bytes | None:
    if aad.startswith(_ENVELOPE):
        raise trusted.PublicError("envelopes are not opened for the host")
    return aad if has_aad else None


@trusted.ecall
def unseal_blob(blob: bytes, aad: bytes, has_aad: bool) -> bytes:
    """Open a blob."""
    try:
        return trusted.unseal(blob, aad=_plain(aad, has_aad))
    except UnsealError as error:
        raise trusted.PublicError(str(error)) from None


@trusted.ecall
def reseal_blob(blob: bytes, policy: str, aad: bytes, has_aad: bool) -> bytes:
    """Seal a blob's content anew."""
    data = unseal_blob(blob, aad, has_aad)
    return trusted.seal(data, policy=_policy(policy), aad=_plain(aad, has_aad))
