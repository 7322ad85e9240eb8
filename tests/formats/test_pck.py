"""The SGX extension of PCK certificates: a table of crafted ones, and the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats.dcap import read_quote
from pyenclave.formats.pck import OID_SGX_EXTENSION, PckExtension
from pyenclave.formats.x509 import Certificate


def entry(arc: str, value: bytes, root: str = OID_SGX_EXTENSION) -> bytes:
    return der.encode_sequence(der.encode_oid(f"{root}.{arc}"), value)


COMPONENTS = {f"2.{n}": der.encode_integer(n) for n in range(1, 17)}
TCB = COMPONENTS | {"2.17": der.encode_integer(300), "2.18": der.encode_octet_string(bytes(16))}
FIELDS = {
    "1": der.encode_octet_string(b"p" * 16),
    "3": der.encode_octet_string(b"\1\2"),
    "4": der.encode_octet_string(b"fmspc!"),
    "5": der.encode_integer(1, tag=der.ENUMERATED),
    "6": der.encode_octet_string(bytes(16)),
    "7": der.encode_sequence(*(entry(f"7.{n}", der.encode_boolean(n == 2)) for n in (1, 2, 3))),
}


def extension(
    tcb: dict[str, bytes] | None = None, fields: dict[str, bytes] | None = None, tail: bytes = b""
) -> bytes:
    inner = TCB | (tcb or {})
    outer = FIELDS | (fields or {})
    parts = [entry(arc, value) for arc, value in outer.items() if value]
    body = der.encode_sequence(*(entry(arc, value) for arc, value in inner.items() if value))
    return der.encode_sequence(parts[0], entry("2", body), *parts[1:], tail)


def test_a_good_extension_is_read() -> None:
    found = PckExtension.from_bytes(extension())
    assert found.components == tuple(range(1, 17))
    assert (found.pce_svn, found.pce_id, found.fmspc) == (300, b"\1\2", b"fmspc!")
    assert dict(found.configuration or {}) == {1: False, 2: True, 3: False}
    bare = PckExtension.from_bytes(extension(fields={"6": b"", "7": b""}))
    assert bare.configuration is bare.platform_instance_id is None


def test_att_15_fields_count_by_their_identifier_not_by_their_place() -> None:
    items = [entry(arc, value) for arc, value in reversed(TCB.items())]
    others = [entry(arc, value) for arc, value in FIELDS.items()]
    turned = der.encode_sequence(*others, entry("2", der.encode_sequence(*items)))
    assert PckExtension.from_bytes(turned) == PckExtension.from_bytes(extension())


INTEGER = der.encode_integer
OCTETS = der.encode_octet_string
CRAFTED: dict[str, bytes] = {
    **{f"without {arc}": extension(tcb={arc: b""}) for arc in TCB},
    **{f"without {arc}": extension(fields={arc: b""}) for arc in ("1", "3", "4", "5")},
    "negative": extension(tcb={"2.3": INTEGER(-1)}),
    "256": extension(tcb={"2.3": INTEGER(256)}),
    "long": extension(tcb={"2.3": INTEGER(1 << 200)}),
    "not minimal": extension(tcb={"2.3": der.encode(der.INTEGER, b"\0\1")}),
    "empty integer": extension(tcb={"2.3": der.encode(der.INTEGER, b"")}),
    "no integer": extension(tcb={"2.3": OCTETS(b"\1")}),
    "two values": extension(tcb={"2.3": INTEGER(1) + INTEGER(2)}),
    "PCESVN 65536": extension(tcb={"2.17": INTEGER(65536)}),
    "negative PCESVN": extension(tcb={"2.17": INTEGER(-1)}),
    "short CPUSVN": extension(tcb={"2.18": OCTETS(bytes(15))}),
    "component 19": extension(tcb={"2.19": INTEGER(1)}),
    "component 0": extension(tcb={"2.0": INTEGER(1)}),
    "short PPID": extension(fields={"1": OCTETS(bytes(15))}),
    "long PCEID": extension(fields={"3": OCTETS(bytes(3))}),
    "long FMSPC": extension(fields={"4": OCTETS(bytes(7))}),
    "type 3": extension(fields={"5": INTEGER(3, tag=der.ENUMERATED)}),
    "type as INTEGER": extension(fields={"5": INTEGER(1)}),
    "field 8": extension(fields={"8": OCTETS(b"")}),
    "FMSPC twice": extension(tail=entry("4", OCTETS(b"other!"))),
    "component twice": extension(
        fields={"2": der.encode_sequence(*(entry(arc, value) for arc, value in TCB.items()))}
    ),
    "foreign identifier": extension(tail=entry("4", OCTETS(b"other!"), "1.2.840.113741.1.13.2")),
    "deeper identifier": extension(tail=entry("4.1", OCTETS(b"other!"))),
    "bytes after": extension() + b"\0",
    "boolean 1": extension(
        fields={"7": der.encode_sequence(entry("7.1", der.encode(der.BOOLEAN, b"\1")))}
    ),
    "empty": b"",
    "no sequence": OCTETS(b""),
}


@pytest.mark.parametrize("what", CRAFTED)
def test_att_15_a_crafted_extension_is_refused(what: str) -> None:
    with pytest.raises(EvidenceFormatError):
        PckExtension.from_bytes(CRAFTED[what])


@given(st.data())
def test_any_change_of_bytes_is_refused_or_shows_or_is_not_read(data: st.DataObject) -> None:
    good = bytearray(extension())
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    try:
        found = PckExtension.from_bytes(bytes(good))
    except EvidenceFormatError:
        return
    assert found != PckExtension.from_bytes(extension())


def test_published_certificates_say_what_their_cases_say(vectors: Path) -> None:
    count = 0
    for path in sorted((vectors / "attestation").glob("*/case.json")):
        expect = json.loads(path.read_text())["expect"].get("pck")
        if expect is None or not (path.parent / "quote.bin").is_file():
            continue
        quote = read_quote((path.parent / "quote.bin").read_bytes())
        pck = PckExtension.from_certificate(Certificate.from_pem_chain(quote.certification_data)[0])
        assert pck.fmspc.hex() == expect["fmspc"]
        assert list(pck.components) == expect["tcb_components"]
        assert pck.cpu_svn.hex() == expect["cpusvn"]
        count += 1
    assert count >= 30


def test_a_certificate_without_extension_is_refused(vectors: Path) -> None:
    pem = (vectors / "attestation" / "roots" / "intel-sgx-root-ca.pem").read_bytes()
    with pytest.raises(EvidenceFormatError, match="missing"):
        PckExtension.from_certificate(Certificate.from_bytes(pem))
