"""The header of sealed blobs, byte for byte."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from pyenclave.errors import UnsealError
from pyenclave.formats import sealed as fmt

HEADER = fmt.SealedHeader(
    key_policy=fmt.POLICY_MRSIGNER,
    security_version=0x0102,
    product_id=0x0304,
    cpu_svn=bytes(range(16)),
    attribute_mask=bytes(range(16, 32)),
    misc_mask=0x01020304,
    key_id=bytes(range(32, 64)),
    identity=bytes(range(64, 96)),
    debug=True,
    aad_length=0x0A,
    length=3,
    counter_id=bytes(range(96, 112)),
    counter_value=0x0102030405060708,
    commitment=bytes(range(112, 144)),
)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"PYESEAL\x02"),
        (8, b"\x0f\x00"),
        (10, b"\x03\x00"),
        (12, b"\x03\x00"),
        (12, b"\x04\x00"),
        (16, b"\x01\x00"),
        (20, b"\xe1\x00"),
        (22, b"\x01\x00"),
        (60, b"\x01"),
        (168, b"\x01"),
        (191, b"\x80"),
        (96, bytes(32)),
        (152, struct.pack("<Q", 1 << 31)),
        (160, struct.pack("<Q", 1 << 31)),
        (160, struct.pack("<Q", 2**64 - 1)),
    ],
)
def test_a_field_with_an_illegal_value_is_refused(offset: int, content: bytes):
    data = bytearray(HEADER.to_bytes())
    assert data[offset : offset + len(content)] != content
    data[offset : offset + len(content)] = content
    with pytest.raises(UnsealError, match="is wrong"):
        fmt.SealedHeader.from_bytes(bytes(data))


@pytest.mark.parametrize("flag", [1, 2])
def test_fields_without_their_flag_must_be_zero(flag: int):
    data = bytearray(HEADER.to_bytes())
    data[8] &= ~flag
    with pytest.raises(UnsealError):
        fmt.SealedHeader.from_bytes(bytes(data))


def test_a_short_header_is_refused():
    for size in range(fmt.HEADER_SIZE):
        with pytest.raises(UnsealError):
            fmt.SealedHeader.from_bytes(HEADER.to_bytes()[:size])


def test_the_header_goes_there_and_back():
    assert fmt.SealedHeader.from_bytes(HEADER.to_bytes()) == HEADER
    bare = dataclasses.replace(
        HEADER, aad_length=None, counter_id=None, counter_value=0, debug=False
    )
    assert fmt.SealedHeader.from_bytes(bare.to_bytes()) == bare
    empty = dataclasses.replace(HEADER, aad_length=0)
    assert fmt.SealedHeader.from_bytes(empty.to_bytes()) == empty != bare


def test_fields_lie_where_the_document_says():
    data = HEADER.to_bytes()
    assert len(data) == 224
    assert data[:24].hex() == "505945534541 4c01 0700 0400 0200 0201 0000 0403 e000 0000".replace(
        " ", ""
    )
    assert data[24:40] == bytes(range(16))
    assert data[40:56] == bytes(range(16, 32))
    assert data[56:64].hex() == "0403020100000000"
    assert data[64:96] == bytes(range(32, 64))
    assert data[96:128] == bytes(range(64, 96))
    assert data[128:144] == bytes(range(96, 112))
    assert data[144:168].hex() == "08070605040302010a000000000000000300000000000000"
    assert data[168:192] == bytes(24)
    assert data[192:224] == bytes(range(112, 144))


def test_the_key_request_has_the_layout_of_the_manual():
    """KEYREQUEST, Intel SDM vol. 3D (notes on SGX structures, 2.4)."""
    request = HEADER.key_request()
    assert len(request) == 512
    assert request[:8].hex() == "0400020002010000"
    assert request[8:24] == HEADER.cpu_svn
    assert request[24:40] == HEADER.attribute_mask
    assert request[40:72] == HEADER.key_id
    assert request[72:76].hex() == "04030201"
    assert not any(request[76:])
