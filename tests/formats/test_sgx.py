"""SGX structures: strict reading, and writing that gives back the same bytes."""

from __future__ import annotations

import json
import random
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError, SignatureError
from pyenclave.formats import sgx
from pyenclave.formats.sgx import (
    Attributes,
    KeyRequest,
    Report,
    ReportBody,
    Sigstruct,
    TargetInfo,
)

if TYPE_CHECKING:
    from pathlib import Path

# Structure, size, and the ranges of bytes that are reserved (specification, SGX structures).
STRUCTURES: dict[str, tuple[Any, int, list[range]]] = {
    "report body": (
        ReportBody,
        384,
        [range(20, 32), range(96, 128), range(160, 192), range(262, 304)],
    ),
    "report": (
        Report,
        432,
        [range(20, 32), range(96, 128), range(160, 192), range(262, 304)],
    ),
    "target info": (TargetInfo, 512, [range(48, 50), range(56, 64), range(128, 512)]),
    "key request": (KeyRequest, 512, [range(6, 8), range(78, 512)]),
    "attributes": (Attributes, 16, []),
}
SIGSTRUCT_RESERVED = [range(44, 128), range(910, 912), range(992, 1008), range(1028, 1040)]


def noise(size: int, reserved: list[range]) -> bytearray:
    """Random bytes with zeros where they are demanded."""
    data = bytearray(random.Random(size).randbytes(size))
    for part in reserved:
        data[part.start : part.stop] = bytes(len(part))
    return data


def sigstruct(vectors: Path, name: str = "sgx-sigstruct-le-20240811") -> bytes:
    """A published SIGSTRUCT."""
    folder = vectors / "measurement" / name
    case = json.loads((folder / "case.json").read_text())
    return (folder / case["files"]["sigstruct"]["path"]).read_bytes()


# ---- hostile input ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_other_size_is_refused(name: str) -> None:
    kind, size, _ = STRUCTURES[name]
    for wrong in {0, 1, size - 1, size + 1, 2 * size, 4096}:
        with pytest.raises(EvidenceFormatError, match="size is wrong") as caught:
            kind.from_bytes(bytes(wrong))
        assert caught.value.expected == f"{size} bytes"
        assert caught.value.found == f"{wrong} bytes"


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_reserved_bit_is_refused_when_set(name: str) -> None:
    kind, size, reserved = STRUCTURES[name]
    data = noise(size, reserved)
    assert kind.from_bytes(data).to_bytes() == data
    for at in (at for part in reserved for at in part):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(EvidenceFormatError, match="reserved at offset"):
                kind.from_bytes(data)
            data[at] ^= 1 << bit


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_other_bit_is_kept(name: str) -> None:
    """No two inputs read as one value: each bit shows in the value and is written back."""
    kind, size, reserved = STRUCTURES[name]
    taken = {at for part in reserved for at in part}
    data = noise(size, reserved)
    original = kind.from_bytes(data)
    for at in range(size):
        if at in taken:
            continue
        data[at] ^= 1 << at % 8
        changed = kind.from_bytes(data)
        assert changed != original
        assert changed.to_bytes() == data
        data[at] ^= 1 << at % 8


@pytest.mark.parametrize("wrong", [None, "text", 7, [1]])
def test_what_is_not_bytes_like_is_a_type_error(wrong: Any) -> None:
    for kind in (Attributes, ReportBody, Report, TargetInfo, KeyRequest, Sigstruct):
        with pytest.raises(TypeError):
            kind.from_bytes(wrong)


@pytest.mark.parametrize("size", [0, 1, 1807, 1809, 3616])
def test_a_sigstruct_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(SignatureError, match="size is wrong"):
        Sigstruct.from_bytes(bytes(size))


def test_sigstruct_constants_and_reserved_bytes_are_demanded(vectors: Path) -> None:
    data = bytearray(sigstruct(vectors))
    fixed = [range(12), range(24, 40), range(512, 516), range(12, 15), *SIGSTRUCT_RESERVED]
    for at in (at for part in fixed for at in part):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(SignatureError):
                Sigstruct.from_bytes(data)
            data[at] ^= 1 << bit


@pytest.mark.parametrize(
    ("offset", "value", "name"),
    [
        (12, 1, "TYPE"),
        (12, 0x40000000, "TYPE"),
        (16, 1, "VENDOR"),
        (16, 0x80860000, "VENDOR"),
        (512, 0, "EXPONENT"),
        (512, 65537, "EXPONENT"),
    ],
)
def test_sigstruct_errors_name_the_field(vectors: Path, offset: int, value: int, name: str) -> None:
    data = bytearray(sigstruct(vectors))
    struct.pack_into("<I", data, offset, value)
    with pytest.raises(SignatureError, match=name) as caught:
        Sigstruct.from_bytes(data)
    assert caught.value.found == hex(value)


@pytest.mark.parametrize("name", ["sgx-sigstruct-neg-exponent", "sgx-sigstruct-neg-short"])
def test_published_malformed_sigstructs_are_refused(vectors: Path, name: str) -> None:
    with pytest.raises(SignatureError):
        Sigstruct.from_bytes(sigstruct(vectors, name))


# ---- writing ----------------------------------------------------------------------------------


def body(**fields: Any) -> ReportBody:
    """A report body with little in it."""
    return ReportBody(**{"mrenclave": bytes(32), "mrsigner": bytes(32)} | fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mrenclave", bytes(31)),
        ("mrenclave", bytes(33)),
        ("report_data", b""),
        ("config_id", bytes(63)),
        ("isv_prod_id", 1 << 16),
        ("isv_svn", -1),
        ("misc_select", 1 << 32),
        ("attributes", Attributes(flags=1 << 64)),
    ],
)
def test_writing_refuses_what_does_not_fit(field: str, value: Any) -> None:
    """A short field must not be filled up, nor a long one cut, in silence."""
    with pytest.raises(ValueError, match=r"SGX report body|ATTRIBUTES"):
        body(**{field: value}).to_bytes()


@pytest.mark.parametrize(("field", "value"), [("mrenclave", "00" * 16), ("report_data", None)])
def test_writing_refuses_the_wrong_type(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        body(**{field: value}).to_bytes()


@given(
    flags=st.integers(0, 2**64 - 1),
    mrenclave=st.binary(min_size=32, max_size=32),
    config_id=st.binary(min_size=64, max_size=64),
    svn=st.integers(0, 65535),
    misc=st.integers(0, 2**32 - 1),
)
def test_fields_stand_where_the_specification_has_them(
    flags: int, mrenclave: bytes, config_id: bytes, svn: int, misc: int
) -> None:
    value = body(
        attributes=Attributes(flags=flags, xfrm=3),
        mrenclave=mrenclave,
        config_id=config_id,
        isv_svn=svn,
        misc_select=misc,
    )
    data = value.to_bytes()
    assert len(data) == 384
    assert struct.unpack_from("<QQ", data, 48) == (flags, 3)
    assert struct.unpack_from("<I", data, 16) == (misc,)
    assert data[64:96] == mrenclave
    assert data[192:256] == config_id
    assert struct.unpack_from("<H", data, 258) == (svn,)
    assert ReportBody.from_bytes(data) == value
    target = TargetInfo.of(value).to_bytes()
    assert target[:32] == mrenclave
    assert target[32:48] == data[48:64]
    assert target[64:128] == config_id
    assert struct.unpack_from("<I", target, 52) == (misc,)


def test_key_request_fields_stand_where_the_specification_has_them() -> None:
    data = KeyRequest(
        key_name=sgx.KEYNAME_SEAL,
        key_policy=sgx.KEYPOLICY_MRSIGNER,
        isv_svn=0x0102,
        cpu_svn=b"c" * 16,
        attribute_mask=Attributes(flags=5, xfrm=6),
        key_id=b"k" * 32,
        misc_mask=0x0A0B0C0D,
        config_svn=0x0E0F,
    ).to_bytes()
    want = struct.pack("<HHHxx16sQQ32sIH434x", 4, 2, 0x102, b"c" * 16, 5, 6, b"k" * 32, 0xA0B0C0D,
                       0xE0F)  # fmt: skip
    assert data == want


def test_report_body_fields_of_published_quotes(vectors: Path) -> None:
    """The claims of real reports are what the sets' own description says."""
    count = 0
    for folder in sorted((vectors / "attestation").glob("sgx-v3-*")):
        expect = json.loads((folder / "case.json").read_text())["expect"]
        data = (folder / "quote.bin").read_bytes()[48:432]
        value = ReportBody.from_bytes(data)
        assert value.to_bytes() == data
        for name in (
            "cpu_svn", "isv_ext_prod_id", "mrenclave", "mrsigner", "config_id", "isv_family_id",
            "report_data",
        ):  # fmt: skip
            assert getattr(value, name).hex() == expect[name], name
        for name in ("misc_select", "isv_prod_id", "isv_svn", "config_svn"):
            assert getattr(value, name) == expect[name], name
        assert value.attributes.to_bytes().hex() == expect["attributes"]
        assert value.attributes.debug == expect["debug"]
        count += 1
    assert count >= 15


def test_sigstruct_fields_of_published_files(vectors: Path) -> None:
    count = 0
    for folder in sorted((vectors / "measurement").glob("sgx-sigstruct-*")):
        expect = json.loads((folder / "case.json").read_text())["expect"]
        if "mrenclave" not in expect:
            continue
        data = sigstruct(vectors, folder.name)
        value = Sigstruct.from_bytes(data)
        assert value.to_bytes() == data
        assert value.signed_bytes == data[:128] + data[900:1028]
        assert value.mrenclave.hex() == expect["mrenclave"]
        assert (value.vendor, value.exponent) == (expect["vendor"], expect["exponent"])
        assert f"{value.date:08x}" == expect["date_hex"]
        assert value.sw_defined == expect["swdefined"]
        assert (value.misc_select, value.misc_mask) == (expect["miscselect"], expect["miscmask"])
        assert value.attributes.to_bytes().hex() == expect["attributes"]
        assert value.attribute_mask.to_bytes().hex() == expect["attribute_mask"]
        assert value.isv_family_id.hex() == expect["isvfamilyid"]
        assert value.isv_ext_prod_id.hex() == expect["isvextprodid"]
        assert (value.isv_prod_id, value.isv_svn) == (expect["isvprodid"], expect["isvsvn"])
        count += 1
    assert count == 11


def test_attributes_are_masked_bit_by_bit() -> None:
    value = Attributes(flags=0b1110, xfrm=0b0111) & Attributes(flags=0b0110, xfrm=0b1110)
    assert value == Attributes(flags=0b0110, xfrm=0b0110)
    assert value.debug
    assert not Attributes(flags=sgx.FLAG_INITTED).debug
