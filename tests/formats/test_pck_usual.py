"""The quick way of reading the usual SGX extension takes and refuses what the other does."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import pck
from pyenclave.formats.der import Der
from pyenclave.formats.x509 import Certificate
from pyenclave.testing.intel import IntelPlatform


def usual(changes):
    platform = IntelPlatform(datetime(2026, 7, 1, 12, tzinfo=UTC))
    certificate = Certificate.from_der(platform.make_pck(changes))
    return certificate.extensions[pck.OID_SGX_EXTENSION].value


def tlv(tag, content):
    size = len(content)
    length = bytes((size,)) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes((tag,)) + length + content


def field(arcs, value):
    return tlv(0x30, tlv(6, bytes.fromhex("2a864886f84d010d01") + bytes(arcs)) + value)


def number(value):
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def written(draw, *, extended):
    svns = [draw.choice((0, 1, 127, 128, 255)) for _ in range(16)]
    pce_svn = draw.choice((0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF))
    tcb = b"".join(field((2, i + 1), number(svn)) for i, svn in enumerate(svns))
    tcb += field((2, 17), number(pce_svn)) + field((2, 18), tlv(4, draw.randbytes(16)))
    body = field((1,), tlv(4, draw.randbytes(16))) + field((2,), tlv(0x30, tcb))
    body += field((3,), tlv(4, draw.randbytes(2))) + field((4,), tlv(4, draw.randbytes(6)))
    body += field((5,), tlv(0x0A, bytes((draw.randrange(3),))))
    if extended:
        flags = [field((7, i), tlv(1, draw.choice((b"\0", b"\xff")))) for i in (1, 2, 3)]
        body += field((6,), tlv(4, draw.randbytes(16))) + field((7,), tlv(0x30, b"".join(flags)))
    return tlv(0x30, body), tuple(svns), pce_svn


def both(data, monkeypatch):
    """Return what each way gives; None where it refuses."""

    def read():
        try:
            return pck.PckExtension.from_bytes(data)
        except EvidenceFormatError:
            return None

    quick = read()
    with monkeypatch.context() as patch:
        patch.setattr(pck, "_usual", lambda _: None)
        return quick, read()


@pytest.mark.parametrize("extended", [False, True])
def test_every_usual_extension_is_read_the_quick_way_and_the_same(extended, monkeypatch):
    draw = random.Random(1)
    for _ in range(200):
        data, svns, pce_svn = written(draw, extended=extended)
        assert pck._usual(data) is not None
        quick, slow = both(data, monkeypatch)
        assert quick == slow
        assert (quick.components, quick.pce_svn) == (svns, pce_svn)
        assert quick.platform_instance_id == slow.platform_instance_id


def test_the_synthetic_platforms_are_usual():
    assert pck._usual(usual({})) is not None


def test_whatever_one_byte_becomes_both_ways_agree(monkeypatch):
    draw = random.Random(2)
    for extended in (False, True):
        data, _, _ = written(draw, extended=extended)
        for index in range(len(data)):
            for value in {0, 1, 0x7F, 0x80, 0xFF, data[index] ^ 1, data[index] + 1 & 0xFF}:
                changed = data[:index] + bytes((value,)) + data[index + 1 :]
                quick, slow = both(changed, monkeypatch)
                assert quick == slow, (index, value)


def test_whatever_byte_is_put_in_or_taken_out_both_ways_agree(monkeypatch):
    draw = random.Random(3)
    data, _, _ = written(draw, extended=True)
    for index in range(len(data)):
        for more in (b"", data[index : index + 1] * 2, b"\0" + data[index : index + 1]):
            body = data[:index] + more + data[index + 1 :]
            # The outer length is put right, so that what is inside decides; and so the list's.
            for text in (body, body[:2] + (len(body) - 4).to_bytes(2, "big") + body[4:]):
                quick, slow = both(text, monkeypatch)
                assert quick == slow, (index, more)


def test_the_lengths_of_the_list_of_svns_are_compared(monkeypatch):
    """The expression leaves them open: each wrong value must be refused, as the other way does."""
    data, _, _ = written(random.Random(4), extended=True)
    outer = Der(data, "test").sequence()
    outer.sequence()
    places = [2, data.index(bytes.fromhex("2a864886f84d010d0102")) - 4]
    places.append(places[1] + 16)
    for place in places:
        for wrong in (0, 1, 0x7F, 0xFF, 0x100, 0x153, 0x154, 0xFFFF):
            changed = data[:place] + wrong.to_bytes(2, "big") + data[place + 2 :]
            quick, slow = both(changed, monkeypatch)
            assert quick == slow
            assert (quick is None) is (changed != data)
