"""
Commands and answers of a TPM 2.0, as bytes: framing, password sessions, public areas of NV indices.

The TCG's TPM 2.0 Library: part 1, 16 to 19 (framing, sessions), part 2, 6.6 (response codes), 13
(NV). All integers are big-endian. An answer is judged like anything that came from outside: a TPM
may sit behind a hypervisor, a socket or a broken bus. No I/O happens here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyenclave.errors import TpmError
from pyenclave.formats.tpm import HASHES

__all__ = [
    "MAX_COMMAND",
    "MAX_RESPONSE",
    "NV_AUTHREAD",
    "NV_AUTHWRITE",
    "NV_COUNTER",
    "NV_NO_DA",
    "NV_OWNERREAD",
    "NV_OWNERWRITE",
    "NV_WRITTEN",
    "RC_HANDLE",
    "RC_NV_DEFINED",
    "RC_NV_UNINITIALIZED",
    "RETRIED",
    "NvPublic",
    "Parameters",
    "command",
    "parameters",
    "response_size",
    "sized",
    "words",
]

MAX_COMMAND: Final = 4096  # bytes; what the resource manager of Linux takes
MAX_RESPONSE: Final = 4096
HEADER: Final = 10

_NO_SESSIONS: Final = 0x8001
_SESSIONS: Final = 0x8002
_TPM_1_2: Final = 0x00C4  # TPM_ST_RSP_COMMAND
_PASSWORD: Final = 0x40000009  # TPM_RS_PW
_CONTINUE: Final = 1

# TPMA_NV (part 2, 13.4)
NV_OWNERWRITE: Final = 1 << 1
NV_AUTHWRITE: Final = 1 << 2
NV_COUNTER: Final = 1 << 4  # TPM_NT_COUNTER in bits 4 to 7
NV_OWNERREAD: Final = 1 << 17
NV_AUTHREAD: Final = 1 << 18
NV_NO_DA: Final = 1 << 25
NV_WRITTEN: Final = 1 << 29
_NV_TYPE: Final = 0xF0

RC_HANDLE: Final = 0x08B
RC_NV_UNINITIALIZED: Final = 0x14A
RC_NV_DEFINED: Final = 0x14C
#: What a TPM says when the same command may be sent again: it did nothing of it (part 3, 5.4).
RETRIED: Final = frozenset((0x908, 0x90A, 0x920, 0x922))

_ERRORS: Final = {  # RC_VER1: with 0x100
    0x00: ("INITIALIZE", "the TPM was not started"),
    0x01: ("FAILURE", "the TPM is in failure mode"),
    0x03: ("SEQUENCE", "commands in a wrong order"),
    0x0B: ("PRIVATE", ""),
    0x19: ("HMAC", ""),
    0x20: ("DISABLED", "the command is disabled"),
    0x21: ("EXCLUSIVE", "another session is exclusive"),
    0x24: ("AUTH_TYPE", "this needs another kind of authorisation"),
    0x25: ("AUTH_MISSING", "an authorisation is missing"),
    0x26: ("POLICY", ""),
    0x27: ("PCR", "PCRs cannot be changed so"),
    0x28: ("PCR_CHANGED", "PCRs changed meanwhile"),
    0x2D: ("UPGRADE", "firmware is being upgraded"),
    0x2E: ("TOO_MANY_CONTEXTS", ""),
    0x2F: ("AUTH_UNAVAILABLE", "this entity takes no such authorisation"),
    0x30: ("REBOOT", "the machine has to be restarted first"),
    0x31: ("UNBALANCED", ""),
    0x42: ("COMMAND_SIZE", "the command's size is wrong"),
    0x43: ("COMMAND_CODE", "the TPM has no such command"),
    0x44: ("AUTHSIZE", "the authorisation's size is wrong"),
    0x45: ("AUTH_CONTEXT", "no authorisation belongs here"),
    0x46: ("NV_RANGE", "beyond the end of the NV index"),
    0x47: ("NV_SIZE", "the NV index cannot have this size"),
    0x48: ("NV_LOCKED", "the NV index is locked"),
    0x49: ("NV_AUTHORIZATION", "the NV index does not allow this"),
    0x4A: ("NV_UNINITIALIZED", "the NV index was never written"),
    0x4B: ("NV_SPACE", "there is no room for another NV index"),
    0x4C: ("NV_DEFINED", "the NV index exists already"),
    0x50: ("BAD_CONTEXT", ""),
    0x51: ("CPHASH", ""),
    0x52: ("PARENT", ""),
    0x53: ("NEEDS_TEST", "the TPM has to test itself first"),
    0x54: ("NO_RESULT", ""),
    0x55: ("SENSITIVE", ""),
}
_FORMAT_ONE: Final = {
    0x01: ("ASYMMETRIC", "the asymmetric algorithm is not supported"),
    0x02: ("ATTRIBUTES", "attributes that do not go together"),
    0x03: ("HASH", "the hash is not supported"),
    0x04: ("VALUE", "out of range, or not allowed here"),
    0x05: ("HIERARCHY", "the hierarchy is not enabled, or not the right one"),
    0x07: ("KEY_SIZE", ""),
    0x08: ("MGF", ""),
    0x09: ("MODE", ""),
    0x0A: ("TYPE", "the wrong type"),
    0x0B: ("HANDLE", "there is no such object or index"),
    0x0C: ("KDF", ""),
    0x0D: ("RANGE", "out of range"),
    0x0E: ("AUTH_FAIL", "the authorisation is wrong, and counted"),
    0x0F: ("NONCE", ""),
    0x10: ("PP", "physical presence is needed"),
    0x12: ("SCHEME", "the key has another scheme"),
    0x15: ("SIZE", "the size is wrong"),
    0x16: ("SYMMETRIC", ""),
    0x17: ("TAG", ""),
    0x18: ("SELECTOR", ""),
    0x1A: ("INSUFFICIENT", "the command is too short"),
    0x1B: ("SIGNATURE", ""),
    0x1C: ("KEY", "the key does not fit its use"),
    0x1D: ("POLICY_FAIL", ""),
    0x1F: ("INTEGRITY", ""),
    0x20: ("TICKET", ""),
    0x21: ("RESERVED_BITS", "reserved bits are set"),
    0x22: ("BAD_AUTH", "the authorisation is wrong"),
    0x23: ("EXPIRED", ""),
    0x24: ("POLICY_CC", ""),
    0x25: ("BINDING", ""),
    0x26: ("CURVE", ""),
    0x27: ("ECC_POINT", ""),
}
_WARNINGS: Final = {  # RC_WARN: with 0x900
    0x01: ("CONTEXT_GAP", ""),
    0x02: ("OBJECT_MEMORY", "no room for objects: flush some (tpm2_flushcontext -t)"),
    0x03: ("SESSION_MEMORY", "no room for sessions"),
    0x04: ("MEMORY", "no memory"),
    0x05: ("SESSION_HANDLES", "no session handles left"),
    0x06: ("OBJECT_HANDLES", "no object handles left"),
    0x07: ("LOCALITY", "not from this locality"),
    0x08: ("YIELDED", "suspended: send it again"),
    0x09: ("CANCELED", "cancelled"),
    0x0A: ("TESTING", "the TPM tests itself: send it again"),
    **{0x10 + n: (f"REFERENCE_H{n}", f"handle {n + 1} is not loaded") for n in range(7)},
    **{0x18 + n: (f"REFERENCE_S{n}", f"session {n + 1} is not loaded") for n in range(7)},
    0x20: ("NV_RATE", "the TPM limits how often NV is written: send it again later"),
    0x21: ("LOCKOUT", "locked out after wrong authorisations"),
    0x22: ("RETRY", "busy: send it again"),
    0x23: ("NV_UNAVAILABLE", "NV cannot be reached now"),
}
_FORMAT: Final = 0x80
_PARAMETER: Final = 0x40
_SESSION: Final = 0x800
_VERSION_2: Final = 0x100
_VENDOR: Final = 0x400


def words(code: int) -> tuple[str, str]:
    """
    Return a response code's name and what it says (part 2, 6.6).

    Args:
        code: Of the answer; any 32 bits.

    Returns:
        ``TPM_RC_…`` and a sentence, as ``("TPM_RC_HANDLE", "handle 2: there is no such …")``.

    """
    layer, low = code >> 16, code & 0xFFFF
    suffix = f", said by layer {layer} above the TPM" if layer else ""
    if low & ~0xFFF:
        return "unknown", f"response code {code:#x}{suffix}"
    if low & _FORMAT:
        name, text = _FORMAT_ONE.get(low & 0x3F, ("", ""))
        number = low >> 8 & 0xF
        if low & _PARAMETER:
            where = f"parameter {number}"
        elif low & _SESSION:
            where = f"session {number & 7}"
        else:
            where = f"handle {number & 7}"
        where = where if number & (0xF if low & _PARAMETER else 7) else "something of the command"
        text = f"{where}: {text}" if text else where
    elif low & _VENDOR:
        name, text = "", "an error of the TPM's vendor"
    elif low & _VERSION_2:
        table = _WARNINGS if low & _SESSION else _ERRORS
        name, text = table.get(low & 0x7F, ("", ""))
    else:
        name, text = "", "an error of a TPM 1.2"
    text = text or "no more is known of it"
    return f"TPM_RC_{name}" if name else "unknown", f"{text} ({code:#x}{suffix})"


def error_code(code: int) -> int:
    """Return *code* without the number of the handle, session or parameter that it is about."""
    return code & 0xBF if code & _FORMAT and not code >> 12 else code


def sized(value: bytes) -> bytes:
    """Write a TPM2B: two bytes of size, then *value*."""
    if len(value) > 0xFFFF:
        raise ValueError(f"a TPM takes at most 65535 bytes in one piece, not {len(value)}")
    return len(value).to_bytes(2, "big") + value


def command(
    code: int,
    handles: Sequence[int] = (),
    parameters: bytes = b"",
    *,
    passwords: Sequence[bytes] = (),
) -> bytes:
    """
    Write a command.

    Args:
        code: TPM_CC.
        handles: Its handle area; those that need authorisation come first.
        parameters: Its parameters, marshalled.
        passwords: One authorisation value for each handle that needs one; often empty.

    Raises:
        ValueError: The command is too long.

    """
    area = b"".join(
        _PASSWORD.to_bytes(4, "big") + sized(b"") + bytes([_CONTINUE]) + sized(password)
        for password in passwords
    )
    body = b"".join(handle.to_bytes(4, "big") for handle in handles)
    if passwords:
        body += len(area).to_bytes(4, "big") + area
    body += parameters
    size = HEADER + len(body)
    if size > MAX_COMMAND:
        raise ValueError(f"a TPM command has at most {MAX_COMMAND} bytes, not {size}")
    tag = _SESSIONS if passwords else _NO_SESSIONS
    return tag.to_bytes(2, "big") + size.to_bytes(4, "big") + code.to_bytes(4, "big") + body


def response_size(header: bytes) -> int:
    """
    Return how long the answer is that begins with these 10 bytes.

    Raises:
        TpmError: Shorter than its own header, or too long.

    """
    size = int.from_bytes(header[2:6], "big")
    if len(header) < HEADER or not HEADER <= size <= MAX_RESPONSE:
        raise _wrong("the size", f"{HEADER} to {MAX_RESPONSE} bytes", f"{size} bytes")
    return size


def _wrong(what: str, expected: object, found: object) -> TpmError:
    return TpmError(f"answer of the TPM: {what} is wrong", expected=expected, found=found)


class Parameters:
    """Takes big-endian parts off the front of an answer."""

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str = "answer of the TPM") -> None:
        self._data = data
        self._what = what
        self._at = 0

    def take(self, size: int, name: str) -> bytes:
        """Take *size* bytes."""
        left = len(self._data) - self._at
        if size > left:
            raise TpmError(
                f"{self._what}: {name} is cut off", expected=f"{size} bytes", found=f"{left} bytes"
            )
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def number(self, size: int, name: str) -> int:
        """Take an integer of *size* bytes."""
        return int.from_bytes(self.take(size, name), "big")

    def sized(self, name: str, limit: int) -> bytes:
        """Take a TPM2B of at most *limit* bytes."""
        size = self.number(2, f"size of {name}")
        if size > limit:
            raise _wrong(f"size of {name}", f"at most {limit} bytes", f"{size} bytes")
        return self.take(size, name)

    def rest(self) -> bytes:
        """Take what is left."""
        return self.take(len(self._data) - self._at, "rest")

    def end(self) -> None:
        """Refuse what follows."""
        left = len(self._data) - self._at
        if left:
            raise TpmError(
                f"{self._what}: bytes follow the end", expected="nothing", found=f"{left} bytes"
            )


def parameters(data: bytes, *, sessions: int, handles: int = 0) -> Parameters:
    """
    Judge an answer and return its parameters, its handles in front.

    Args:
        data: The whole answer.
        sessions: How many passwords the command had.
        handles: How many handles the answer has.

    Raises:
        TpmError: The TPM refused (`TpmError.rc`), or the answer is malformed.

    """
    if len(data) < HEADER or response_size(data[:HEADER]) != len(data):
        raise _wrong("the size", "as its header says", f"{len(data)} bytes")
    tag, code = int.from_bytes(data[:2], "big"), int.from_bytes(data[6:10], "big")
    if tag == _TPM_1_2:
        raise TpmError("this is a TPM 1.2", expected="a TPM 2.0", rc=code)
    if tag not in (_NO_SESSIONS, _SESSIONS):
        raise _wrong("the tag", f"{_NO_SESSIONS:#x} or {_SESSIONS:#x}", f"{tag:#x}")
    if code:
        if len(data) != HEADER or tag != _NO_SESSIONS:
            raise _wrong("an answer with a response code", "ten bytes", f"{len(data)} bytes")
        name, text = words(code)
        raise TpmError(f"the TPM refuses: {name}: {text}", rc=error_code(code))
    if (tag == _SESSIONS) != bool(sessions):
        raise _wrong("the tag", "sessions as in the command", f"{tag:#x}")
    if not sessions:
        return Parameters(data[HEADER:])
    cursor = Parameters(data[HEADER:])
    front = cursor.take(4 * handles, "handles")
    body = cursor.take(cursor.number(4, "size of the parameters"), "parameters")
    for _ in range(sessions):
        # A password session carries nothing back; it proves nothing either (part 1, 19.4).
        if cursor.sized("nonce of a password session", 64):
            raise _wrong("a password session", "no nonce", "one")
        cursor.number(1, "attributes of a session")
        if cursor.sized("acknowledgement of a password session", 64):
            raise _wrong("a password session", "no acknowledgement", "one")
    cursor.end()
    return Parameters(front + body)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvPublic:
    """
    A TPMS_NV_PUBLIC: what is known of an NV index.

    Attributes:
        index: Its handle, 0x01000000 to 0x01FFFFFF.
        name_hash: Of its name.
        attributes: TPMA_NV.
        policy: Policy digest, or empty.
        size: Bytes of data.
    """

    index: int
    name_hash: str = "sha256"
    attributes: int
    policy: bytes = b""
    size: int

    @classmethod
    def from_parameters(cls, cursor: Parameters) -> NvPublic:
        """
        Read the answer of TPM2_NV_ReadPublic; the name that follows must be that of the area.

        Raises:
            TpmError: Malformed, or a name of something else.

        """
        area = cursor.sized("public area of the NV index", 256)
        name = cursor.sized("name of the NV index", 66)
        cursor.end()
        inner = Parameters(area, "public area of an NV index")
        index, hash_id = inner.number(4, "index"), inner.number(2, "nameAlg")
        attributes = inner.number(4, "attributes")
        policy, size = inner.sized("authPolicy", 64), inner.number(2, "dataSize")
        inner.end()
        if hash_id not in HASHES:
            raise _wrong("the hash of an NV index's name", "a hash that is known", f"{hash_id:#x}")
        found = cls(
            index=index,
            name_hash=HASHES[hash_id],
            attributes=attributes,
            policy=policy,
            size=size,
        )
        if name != found.name:
            raise _wrong("the name of an NV index", found.name.hex(), name.hex())
        return found

    def to_bytes(self) -> bytes:
        """Write the TPMS_NV_PUBLIC, without a size in front."""
        hash_id = next(number for number, name in HASHES.items() if name == self.name_hash)
        return b"".join(
            (
                self.index.to_bytes(4, "big"),
                hash_id.to_bytes(2, "big"),
                self.attributes.to_bytes(4, "big"),
                sized(self.policy),
                self.size.to_bytes(2, "big"),
            )
        )

    @property
    def name(self) -> bytes:
        """The index's name: its hash algorithm, then the hash of the public area."""
        area = self.to_bytes()
        return area[4:6] + hashlib.new(self.name_hash, area).digest()

    @property
    def is_counter(self) -> bool:
        """Whether it is a counter (TPM_NT_COUNTER)."""
        return self.attributes & _NV_TYPE == NV_COUNTER

    @property
    def written(self) -> bool:
        """Whether it was ever written: before, it cannot be read."""
        return bool(self.attributes & NV_WRITTEN)
