"""The protection record's bytes."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib

import msgspec
import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats.record import MAX_RECORD, ProtectionBit, ProtectionRecord

RECORD = ProtectionRecord(
    level="embedded",
    tee="none",
    platform_svn=1,
    ephemeral=False,
    debug=False,
    jit=False,
    enclave_id="0123456789abcdef" * 2,
    bits={
        "seccomp": ProtectionBit(value=True, by="outside"),
        "landlock_abi": ProtectionBit(value=7, by="inside"),
    },
    signature=bytes(range(64)),
)
GOLDEN = (
    b'PYEREC\x00\x01\xf4\x00\x00\x00{"bits":{"landlock_abi":{"by":"inside","value":7},'
    b'"seccomp":{"by":"outside","value":true}},"debug":false,'
    b'"enclave_id":"0123456789abcdef0123456789abcdef","ephemeral":false,"jit":false,'
    b'"level":"embedded","platform_svn":1,"tee":"none","version":1}' + bytes(range(64))
)


def frame(text: bytes) -> bytes:
    return b"PYEREC\x00\x01" + struct.pack("<I", len(text)) + text + bytes(64)


def body(**changes: object) -> bytes:
    members = json.loads(GOLDEN[12:-64])
    members.update(changes)
    members = {name: value for name, value in members.items() if value is not None}
    return frame(json.dumps(members, sort_keys=True, separators=(",", ":")).encode())


def test_golden_bytes_are_read_and_written_for_ever() -> None:
    assert RECORD.to_bytes() == GOLDEN
    assert ProtectionRecord.from_bytes(GOLDEN) == RECORD


def test_every_truncation_and_extension_is_refused() -> None:
    for size in range(len(GOLDEN)):
        with pytest.raises(EvidenceFormatError):
            ProtectionRecord.from_bytes(GOLDEN[:size])
    for tail in (b"\0", b"}", bytes(64), bytes(MAX_RECORD)):
        with pytest.raises(EvidenceFormatError):
            ProtectionRecord.from_bytes(GOLDEN + tail)


def test_no_flipped_bit_gives_an_equal_record() -> None:
    for at in range(len(GOLDEN)):
        for bit in range(8):
            changed = bytearray(GOLDEN)
            changed[at] ^= 1 << bit
            with contextlib.suppress(EvidenceFormatError):
                assert ProtectionRecord.from_bytes(bytes(changed)) != RECORD


@pytest.mark.parametrize(
    "data",
    [
        body(version=2),
        body(version=None),
        body(extra=1),
        body(level="hardware"),
        body(tee="sgx2"),
        body(debug=1),
        body(debug="no"),
        body(platform_svn=-1),
        body(platform_svn=65536),
        body(platform_svn=True),
        body(enclave_id="0123"),
        body(enclave_id="G" * 32),
        body(enclave_id="ABCDEF0123456789" * 2),
        body(bits={"x": {"by": "host", "value": True}}),
        body(bits={"x": {"by": "inside", "value": -1}}),
        body(bits={"x": {"by": "inside", "value": 1 << 31}}),
        body(bits={"x": {"by": "inside", "value": 1.5}}),
        body(bits={"X": {"by": "inside", "value": True}}),
        body(bits={"a" * 33: {"by": "inside", "value": True}}),
        body(bits={f"b{n}": {"by": "inside", "value": True} for n in range(65)}),
        frame(GOLDEN[12:-64].replace(b",", b", ")),
        frame(GOLDEN[12:-64].replace(b'"debug":false', b'"debug":false,"debug":false')),
        frame(GOLDEN[12:-64].replace(b'"debug":false,', b"") + b' "debug":false}'),
        frame(b"[" * 4000),
        frame(b'{"bits":' * 1000),
        frame(b"\xff\xfe"),
        frame(b"null"),
        b"",
    ],
    ids=lambda data: f"{len(data)}-{zlib.crc32(data) % 1000}",
)
def test_other_forms_are_refused(data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        ProtectionRecord.from_bytes(data)


def test_an_unsigned_record_is_not_written() -> None:
    with pytest.raises(ValueError, match="not signed"):
        msgspec.structs.replace(RECORD, signature=b"").to_bytes()


def test_a_bit_that_is_false_zero_or_absent_does_not_hold() -> None:
    bits = {
        "yes": ProtectionBit(value=True, by="inside"),
        "level": ProtectionBit(value=2, by="inside"),
        "no": ProtectionBit(value=False, by="inside"),
        "none": ProtectionBit(value=0, by="inside"),
    }
    record = msgspec.structs.replace(RECORD, bits=bits)
    held = [name for name in (*bits, "absent") if record.holds(name)]
    assert held == ["yes", "level"]
