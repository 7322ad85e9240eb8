"""What the headers of sealed files say. Nothing is opened, so nothing of it is verified."""

from __future__ import annotations

import os
from typing import Any, Final

from pyenclave._files import open_file
from pyenclave.cli import _sealers, _tool
from pyenclave.errors import UnsealError
from pyenclave.formats import wrapped
from pyenclave.formats.sealed import SealedHeader, split
from pyenclave.formats.sealed_file import HEADER_PLACES, FileHeader
from pyenclave.sealed.policy import SealPolicy

__all__ = ["describe", "envelope_of", "file_header"]

_HEADER: Final = 8192  # bytes that a sealed file's header has at most
FORMS: Final = {
    "blob": "sealed blob",
    "file": "sealed file",
    "wrapped": "sealed file of an enclave",
    "encrypted": "sealed file of a vault's key",
}


def file_header(fd: int, start: int) -> FileHeader:
    """
    Return the newest header of a sealed file that begins at *start*.

    Raises:
        UnsealError: There is none.

    """
    found: list[FileHeader] = []
    why = UnsealError("there is no header of a sealed file")
    for place in HEADER_PLACES:
        data = os.pread(fd, _HEADER, start + place)
        if not any(data[:8]):
            continue
        try:
            header = FileHeader.from_bytes(data)
        except UnsealError as error:
            why = error
            continue
        if header.offset == place:
            found.append(header)
    if not found:
        raise why
    return max(found, key=lambda header: header.generation)


def envelope_of(fd: int, form: str) -> SealedHeader | None:
    """
    Return the header of a blob or of a wrapped file's envelope; None for others.

    Raises:
        UnsealError: It is malformed.

    """
    if form == "blob":
        return split(_sealers.read_all(fd, _tool.LIMIT + 4096))[0]
    if form == "wrapped":
        return wrapped.newest(os.pread(fd, wrapped.HEAD_SIZE, 0)).header
    return None


def _of_vault(fd: int) -> dict[str, Any]:
    found = wrapped.newest(os.pread(fd, wrapped.HEAD_SIZE, 0)).key_envelope
    return {"key": found.kid, "algorithm": found.algorithm, "wrapped_key": len(found.wrapped)}


def _identity(header: SealedHeader) -> dict[str, Any]:
    policy = SealPolicy(header.key_policy).name
    bound = {"signer": "mrsigner", "unique": "mrenclave"}.get(policy)
    return {
        "policy": policy,
        "mrenclave": header.identity if bound == "mrenclave" else None,
        "mrsigner": header.identity if bound == "mrsigner" else None,
        "product_id": header.product_id,
        "security_version": header.security_version,
        "platform_svn": int.from_bytes(header.cpu_svn[:2], "little"),
        "debug": header.debug,
    }


def describe(path: str) -> dict[str, Any]:
    """
    Return what a sealed file's header says, as the JSON object of ``pyenclave info``.

    Raises:
        UnsealError: It is no sealed file.

    """
    fd = open_file(path)
    try:
        size = os.fstat(fd).st_size
        form = _sealers.form_of(fd)
        if not form:
            raise UnsealError(
                "this is no sealed file: neither blob, nor sealed file, nor wrapped one",
                expected="its magic bytes",
                found=os.pread(fd, 8, 0).hex() or "an empty file",
            )
        result: dict[str, Any] = {"file": path, "form": FORMS[form], "size": size}
        envelope = envelope_of(fd, form)
        if envelope is not None:
            result |= _identity(envelope)
        if form == "encrypted":
            result |= _of_vault(fd)
        if form == "blob" and envelope is not None:
            counter = None
            if envelope.counter_id is not None:
                counter = {"id": envelope.counter_id, "value": envelope.counter_value}
            result |= {
                "length": envelope.length,
                "aad_length": envelope.aad_length,
                "counter": counter,
            }
        else:
            header = file_header(fd, wrapped.HEAD_SIZE if form in ("wrapped", "encrypted") else 0)
            counter = None
            if header.counter_id is not None:
                counter = {"id": header.counter_id, "value": header.counter_value}
                if header.old_counter_id is not None:
                    counter |= {"before": header.old_counter_id}
            result |= {
                "length": header.size,
                "page_size": header.page_size,
                "file_id": header.file_id,
                "generation": header.generation - 1,
                "counter": counter,
            }
        return result | {"verified": False}
    finally:
        os.close(fd)
