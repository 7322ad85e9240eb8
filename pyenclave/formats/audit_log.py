"""
The audit log: hashes of rows, signed checkpoints, exported form (docs/formats/audit-log.md).

A row's hash covers the hash before it, its number and its body, byte by byte; the first follows a
value made from the log's own random id. Nothing here knows a database, so that an exported log is
read and verified on any machine (`pyenclave.formats.audit_chain`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Self

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from pyenclave.errors import AuditError, EvidenceFormatError
from pyenclave.formats import jose, jsonstrict

__all__ = [
    "CHECKPOINT_TYPE",
    "HASH",
    "LOG_ID",
    "MAX_BODY",
    "Checkpoint",
    "Exported",
    "PublicKey",
    "Row",
    "Start",
    "checkpoint_line",
    "fields_of",
    "genesis",
    "head_line",
    "key_line",
    "read_export",
    "row_hash",
    "row_line",
]

HASH: Final = 32
LOG_ID: Final = 16
MAX_BODY: Final = 64 << 10  # bytes of one row's body
CHECKPOINT_TYPE: Final = "pyenclave-audit-checkpoint"
FORMAT: Final = "pyenclave-audit-1"
MAX_LINE: Final = MAX_BODY + 256
MAX_KEYS: Final = 64  # keys that one log names
_MAX_SEQ: Final = (1 << 63) - 1
_GENESIS: Final = b"pyenclave-audit-log-v1\0"
_ROW: Final = b"pyenclave-audit-row-v1\0"
# Lines have one form, so that a pattern reads them and a row's body is its own bytes.
_ROW_LINE: Final = re.compile(
    rb'\{"seq":([1-9][0-9]{0,18}),"hash":"([0-9a-f]{64})","row":(\{.*\})\}'
)
_KEY_LINE: Final = re.compile(rb'\{"key":"([-A-Za-z0-9+/= \\n]{1,2000})"\}')
_CHECKPOINT_LINE: Final = re.compile(rb'\{"checkpoint":"([-A-Za-z0-9_.]{1,4000})"\}')


def genesis(log: bytes) -> bytes:
    """Return what the first row of the log with this id follows."""
    if len(log) != LOG_ID:
        raise ValueError(f"the id of a log has {LOG_ID} bytes, not {len(log)}")
    return hashlib.sha256(_GENESIS + log).digest()


def row_hash(previous: bytes, seq: int, body: bytes) -> bytes:
    """Return the hash of row *seq*, which follows a row of hash *previous*."""
    return hashlib.sha256(_ROW + previous + seq.to_bytes(8, "big") + body).digest()


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is stored: its number, the bytes that were hashed, and the hash."""

    seq: int
    body: bytes = field(repr=False)
    hash: bytes = field(repr=False)


def fields_of(row: Row) -> dict[str, Any]:
    """
    Return the members of a row's body.

    Raises:
        AuditError: It is no JSON object.

    """
    return jsonstrict.object_of(
        row.body, f"row {row.seq}", AuditError, max_depth=40, max_size=MAX_BODY
    )


@dataclass(frozen=True, slots=True)
class Start:
    """
    Where the rows at hand begin.

    Attributes:
        log: The log's id.
        seq: Number of the row before the first; 0 for a whole log.
        hash: What the first row follows.

    """

    log: bytes
    seq: int
    hash: bytes

    @property
    def whole(self) -> bool:
        """Whether this is the log's own beginning."""
        return self.seq == 0 and self.hash == genesis(self.log)


class PublicKey:
    """
    A key that checkpoints are verified with.

    Attributes:
        kid: SHA-256 of its SubjectPublicKeyInfo, in hexadecimal.
        pem: The key as PEM.

    """

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        self.key = key
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.kid = hashlib.sha256(der).hexdigest()
        self.pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    @classmethod
    def from_pem(cls, pem: bytes, what: str = "the key of the audit log") -> Self:
        """
        Read a public key on P-256.

        Raises:
            AuditError: It is another kind of key, or none.

        """
        try:
            key = load_pem_public_key(pem)
        except ValueError:
            raise AuditError(f"{what}: not a public key in PEM") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise AuditError(f"{what}: another kind of key", expected="P-256")
        return cls(key)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    A signed statement that a log had this row at this time.

    Attributes:
        log: The log's id.
        seq: The row.
        hash: Its hash, which covers all rows before.
        at: When it was signed (RFC 3339).
        token: The signed form.

    """

    log: bytes
    seq: int
    hash: bytes
    at: str
    token: jose.Jws = field(repr=False)
    text: str = field(repr=False)

    @classmethod
    def from_text(cls, text: str | bytes, what: str = "checkpoint") -> Self:
        """
        Read a checkpoint; its signature is not looked at.

        Raises:
            AuditError: It is none.

        """
        try:
            token = jose.Jws.from_bytes(text, what, max_size=4_096)
            claims = token.claims(what)
        except EvidenceFormatError as error:
            raise AuditError(error.message, expected=error.expected, found=error.found) from None
        if token.header.get("typ") != CHECKPOINT_TYPE or token.algorithm != "ES256":
            raise AuditError(f"{what}: another kind of token", expected=CHECKPOINT_TYPE)
        log, digest = _hex(claims, "log", LOG_ID, what), _hex(claims, "hash", HASH, what)
        seq, at = claims.get("seq"), claims.get("at")
        if type(seq) is not int or not 0 <= seq <= _MAX_SEQ or not isinstance(at, str):
            raise AuditError(f"{what}: its row or time")
        kept = text if isinstance(text, str) else bytes(text).decode("ascii")
        return cls(log, seq, digest, at, token, kept)

    def verify(self, keys: Mapping[str, PublicKey]) -> bool:
        """Whether one of *keys* (by kid) signed it."""
        key = keys.get(self.token.kid or "")
        return key is not None and self.token.verify(key.key, allowed=("ES256",))


def _hex(claims: Mapping[str, Any], name: str, size: int, what: str) -> bytes:
    value = claims.get(name)
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
        raise AuditError(f"{what}: {name}", expected=f"{size} bytes in hexadecimal")
    return bytes.fromhex(value)


# -- the exported form -----------------------------------------------------------------------------


class _HeadLine(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of an export."""

    format: str
    log: str
    after: int
    hash: str


def head_line(start: Start) -> bytes:
    """Return the first line of an export."""
    return msgspec.json.encode(_HeadLine(FORMAT, start.log.hex(), start.seq, start.hash.hex()))


def key_line(key: PublicKey) -> bytes:
    """Return the line of a key that signed checkpoints."""
    return msgspec.json.encode({"key": key.pem})


def row_line(row: Row) -> bytes:
    """Return the line of a row."""
    return b'{"seq":%d,"hash":"%s","row":%s}' % (row.seq, row.hash.hex().encode(), row.body)


def checkpoint_line(checkpoint: Checkpoint) -> bytes:
    """Return the line of a checkpoint."""
    return b'{"checkpoint":"%s"}' % checkpoint.text.encode("ascii")


@dataclass(frozen=True, slots=True)
class Exported:
    """
    An exported log that is being read.

    Attributes:
        start: Where its rows begin.
        items: Keys, rows and checkpoints in the order of the lines; `None` with the number of a
            line that is none of these. The file is read while this is.

    """

    start: Start
    items: Iterator[PublicKey | Row | Checkpoint | int] = field(repr=False)


def read_export(file: BinaryIO) -> Exported:
    """
    Read an exported log, line by line.

    Args:
        file: Opened for reading bytes.

    Raises:
        AuditError: Its first line is not that of an export.

    """
    lines = _lines(file)
    first = next(lines, b"")
    try:
        head = msgspec.json.decode(first, type=_HeadLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = _HeadLine("", "", 0, "")
    if head.format != FORMAT:
        raise AuditError("not an exported audit log", expected=FORMAT, found=f"{first[:60]!r}")
    claims = {"log": head.log, "hash": head.hash}
    log, digest = (_hex(claims, name, size, "the export's first line") for name, size in _SIZES)
    if not 0 <= head.after <= _MAX_SEQ:
        raise AuditError("the export's first line: after")
    return Exported(Start(log, head.after, digest), _items(lines))


_SIZES: Final = (("log", LOG_ID), ("hash", HASH))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE + 2):
        if not line.endswith(b"\n") and len(line) > MAX_LINE:
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        yield line.removesuffix(b"\n")


def _items(lines: Iterator[bytes]) -> Iterator[PublicKey | Row | Checkpoint | int]:
    for number, line in enumerate(lines, 2):
        try:
            yield _item(line, number)
        except AuditError:
            yield number


def _item(line: bytes, number: int) -> PublicKey | Row | Checkpoint | int:
    if len(line) > MAX_LINE:
        return number
    if found := _ROW_LINE.fullmatch(line):
        seq = int(found[1])
        if seq <= _MAX_SEQ:
            return Row(seq, found[3], bytes.fromhex(found[2].decode()))
    elif found := _CHECKPOINT_LINE.fullmatch(line):
        return Checkpoint.from_text(found[1], f"line {number}")
    elif found := _KEY_LINE.fullmatch(line):
        return PublicKey.from_pem(found[1].replace(b"\\n", b"\n"), f"line {number}")
    return number
