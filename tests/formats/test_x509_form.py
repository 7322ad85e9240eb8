"""The quick reader of certificates of one form accepts nothing that the full one does not."""

from __future__ import annotations

import random
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest

from pyenclave.errors import EnclaveError
from pyenclave.formats.pck import OID_SGX_EXTENSION
from pyenclave.formats.x509 import Certificate
from pyenclave.formats.x509_form import CertificateForm
from pyenclave.testing.certificates import Key
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def platform() -> IntelPlatform:
    return IntelPlatform(NOW)


@pytest.fixture(scope="module")
def form(platform: IntelPlatform) -> CertificateForm:
    found = CertificateForm.of(Certificate.from_der(platform.pck), (OID_SGX_EXTENSION,))
    assert found is not None
    return found


def same(quick: Certificate, data: bytes) -> None:
    full = Certificate.from_der(data)
    for item in fields(Certificate):
        if item.name != "mark":
            assert getattr(quick, item.name) == getattr(full, item.name), item.name
    assert list(quick.extensions) == list(full.extensions)


def test_certificates_of_other_platforms_are_read_with_the_same_fields(
    platform: IntelPlatform, form: CertificateForm
) -> None:
    count = 0
    for index in range(40):
        platform.key = Key.ec()
        serial = (1 << 8 * index % 160) + index
        data = platform.make_pck({}, serial=serial)
        quick = form.read(data, "mark")
        if quick is not None:
            same(quick, data)
            assert quick.mark == "mark"
            count += 1
    assert count >= 39


def test_every_changed_byte_is_refused_or_reads_as_by_the_full_reader(
    platform: IntelPlatform, form: CertificateForm
) -> None:
    source = random.Random(5)
    accepted = 0
    for index in range(len(platform.pck)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, source.randrange(256), platform.pck[index] ^ 1}:
            data = bytearray(platform.pck)
            if data[index] == value:
                continue
            data[index] = value
            quick = form.read(bytes(data), None)
            if quick is not None:
                same(quick, bytes(data))
                accepted += 1
    assert accepted > 500  # in keys, numbers, the signature


def test_what_is_cut_longer_or_shifted_is_refused_or_reads_as_by_the_full_reader(
    platform: IntelPlatform, form: CertificateForm
) -> None:
    source = random.Random(6)
    for _ in range(3000):
        data = bytearray(platform.pck)
        at = source.randrange(len(data))
        if source.random() < 0.5:
            del data[at : at + source.randrange(1, 4)]
        else:
            data[at:at] = source.randbytes(source.randrange(1, 4))
        # Make the outer lengths fit again, so that not all are refused by them.
        data[2:4] = (len(data) - 4).to_bytes(2, "big")
        if source.random() < 0.7:
            size = int.from_bytes(platform.pck[6:8], "big") + len(data) - len(platform.pck)
            data[6:8] = size.to_bytes(2, "big")
        quick = form.read(bytes(data), None)
        if quick is not None:
            same(quick, bytes(data))
    for text in (b"", platform.pck[:-1], platform.pck + b"\0", bytes(300), b"\x30\x82"):
        assert form.read(text, None) is None


def test_serial_numbers_dates_and_signatures_keep_their_rules(
    platform: IntelPlatform, form: CertificateForm
) -> None:
    pck = platform.pck
    tried = 0
    for offset, values in ((14, range(256)), (15, range(256)), (13, range(4))):
        for value in values:
            data = bytearray(pck)
            data[offset] = value
            quick = form.read(bytes(data), None)
            if quick is not None:
                same(quick, bytes(data))
                tried += 1
    assert tried > 100
    at = pck.index(b"\x30\x1e\x17\x0d") + 4
    for text in (b"261301000000Z", b"260229000000Z", b"260101240000Z", b"26010100000aZ"):
        data = bytearray(pck)
        data[at : at + 13] = text
        assert form.read(bytes(data), None) is None
        with pytest.raises(EnclaveError):
            Certificate.from_der(bytes(data))


def test_a_certificate_of_another_form_is_left_to_the_full_reader(
    platform: IntelPlatform, form: CertificateForm
) -> None:
    other = IntelPlatform(NOW)
    for certificate in (other.root_ca.der, other.pck_ca.der):
        assert form.read(certificate, None) is None
    # A blank has nothing that differs.
    blank: Any = form.blank
    assert blank.serial is None
    assert blank.not_before is None
    assert blank.extensions[OID_SGX_EXTENSION].value == b""


@pytest.mark.parametrize("place", range(0, 12, 2))
def test_dates_are_those_that_the_full_reader_reads_and_no_others(
    platform: IntelPlatform, form: CertificateForm, place: int
) -> None:
    data = bytearray(platform.pck)
    at = data.index(b"\x17\x0d") + 2
    data[at : at + 12] = b"260228235959"
    read = 0
    for number in range(100):
        data[at + place : at + place + 2] = b"%02d" % number
        quick = form.read(bytes(data), None)
        try:
            full = Certificate.from_der(bytes(data))
        except EnclaveError:
            assert quick is None, number
            continue
        assert quick is not None, number
        assert quick.not_before == full.not_before
        assert quick.not_before.tzinfo is UTC
        read += 1
    assert read == (100, 12, 28, 24, 60, 60)[place // 2]
