"""SEV-SNP reports and certificate tables: what is read, what is refused, and what is written."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import snp, snp_certs


def made(**fields: object) -> bytes:
    """Return the bytes of a report."""
    return snp.SnpReport(**({"measurement": b"\x5a" * 48} | fields)).to_bytes()  # type: ignore[arg-type]


def test_a_report_of_another_size_is_refused() -> None:
    for size in (0, 1, 1183, 1185, 4000):
        with pytest.raises(EvidenceFormatError, match="size"):
            snp.SnpReport.from_bytes(bytes(size))


@pytest.mark.parametrize("version", [0, 1, 6, 1 << 31])
def test_a_report_of_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(EvidenceFormatError, match="version"):
        snp.SnpReport.from_bytes(made(version=version))


# Every byte that some version reserves, with the versions that do.
RESERVED = [
    *((offset, 2) for offset in range(0x188, 0x1A0)),
    *((offset, 3) for offset in range(0x18B, 0x1A0)),
    *((offset, version) for version in (2, 3, 4) for offset in range(0x1F8, 0x208)),
    *((offset, 5) for offset in range(0x208, 0x2A0)),
    *((offset, 3) for offset in (*range(0x4C, 0x50), 0x1EB, 0x1EF)),
    *((offset, 3) for offset in range(0x2A0 + 48, 0x2A0 + 72)),
    *((offset, 3) for offset in range(0x2E8 + 48, 0x4A0)),
]


def test_each_reserved_byte_must_be_zero() -> None:
    for offset, version in RESERVED:
        data = bytearray(made(version=version))
        data[offset] = 1
        with pytest.raises(EvidenceFormatError):
            snp.SnpReport.from_bytes(data)


def test_each_byte_of_a_report_is_a_field_or_reserved() -> None:
    data = made(version=5)
    before = snp.SnpReport.decode(data)
    seen = {at for at, _ in RESERVED} - set(range(0x188, 0x18B)) - set(range(0x1F8, 0x208))
    for offset in range(snp.REPORT_SIZE):
        changed = bytearray(data)
        changed[offset] ^= 0x80
        same = snp.SnpReport.decode(changed) == before
        assert same is (offset in seen), hex(offset)


def test_att_18_policy_bits_that_nobody_knows_are_refused() -> None:
    for bit in range(64):
        policy = snp.POLICY_RESERVED_ONE | 1 << bit
        if bit <= 25:
            assert snp.SnpReport.from_bytes(made(policy=policy)).policy == policy
            continue
        with pytest.raises(EvidenceFormatError, match="POLICY"):
            snp.SnpReport.from_bytes(made(policy=policy))
    with pytest.raises(EvidenceFormatError, match="POLICY"):
        snp.SnpReport.from_bytes(made(policy=0))


@pytest.mark.parametrize("info", [7 << 2, 2 << 2, 6 << 2, 1 << 5, 1 << 31])
def test_att_16_reserved_signing_keys_are_refused(info: int) -> None:
    with pytest.raises(EvidenceFormatError, match="SIGNING_KEY"):
        snp.SnpReport.from_bytes(made(key_info=info))


def test_other_algorithms_and_levels_are_refused() -> None:
    for fields in ({"signature_algo": 0}, {"signature_algo": 2}, {"vmpl": 4}, {"vmpl": 1 << 31}):
        with pytest.raises(EvidenceFormatError):
            snp.SnpReport.from_bytes(made(**fields))


def test_unknown_platform_bits_are_not_refused() -> None:
    """Turin's firmware sets bit 6, which no document names."""
    report = snp.SnpReport.from_bytes(made(platform_info=0x65))
    assert snp.bit_names(report.platform_info, snp.PLATFORM_BITS) == [
        "smt_en",
        "ecc_en",
        "alias_check_complete",
    ]


def test_reader_and_writer_agree_on_the_vectors(vectors: Path) -> None:
    reports = sorted(vectors.glob("attestation/*snp-*/report.bin"))
    assert len(reports) >= 16
    for path in reports:
        assert snp.SnpReport.from_bytes(path.read_bytes()).to_bytes() == path.read_bytes()


@given(st.data())
def test_reader_and_writer_agree_on_any_report(data: st.DataObject) -> None:
    def some(size: int) -> bytes:
        return data.draw(st.binary(min_size=size, max_size=size))

    report = snp.SnpReport(
        version=5,
        guest_svn=data.draw(st.integers(0, 2**32 - 1)),
        family_id=some(16),
        report_data=some(64),
        measurement=some(48),
        chip_id=some(64),
        reported_tcb=some(8),
        current_firmware=(1, 55, 40),
        signature_r=some(48),
        signature_s=some(48),
        current_mit_vector=data.draw(st.integers(0, 2**64 - 1)),
    )
    assert snp.SnpReport.from_bytes(report.to_bytes()) == report


def test_the_writer_refuses_what_does_not_fit() -> None:
    for fields in ({"measurement": b"x"}, {"guest_svn": -1}, {"version": 1 << 32}):
        with pytest.raises(ValueError, match="SEV-SNP"):
            made(**fields)


def test_att_16_tcb_components_stand_where_their_generation_has_them() -> None:
    value = bytes(range(1, 9))
    old = {"bootloader": 1, "tee": 2, "snp": 7, "microcode": 8}
    assert snp.decode_tcb(value, "milan") == snp.decode_tcb(value, "genoa") == old
    turin = {"fmc": 1, "bootloader": 2, "tee": 3, "snp": 4, "microcode": 8}
    assert snp.decode_tcb(value, "turin") == turin
    assert snp.encode_tcb(turin, "turin") == bytes([1, 2, 3, 4, 0, 0, 0, 8])


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x01, "milan"),
        (0x19, 0x11, "genoa"),
        (0x19, 0xA0, "genoa"),
        (0x19, 0x20, None),
        (0x1A, 0x02, "turin"),
        (0x1A, 0x12, None),
        (0x1A, 0x50, "venice"),
        (0x17, 0x01, None),
        (0, 0, None),
    ],
)
def test_the_product_line_follows_from_cpuid(family: int, model: int, product: str | None) -> None:
    assert snp.product_of_cpuid(family, model) == product


# ---- the certificate table --------------------------------------------------------------------


def table(*entries: tuple[str, bytes]) -> bytes:
    return snp_certs.CertificateTable(entries).to_bytes()


def test_reader_and_writer_of_the_table_agree() -> None:
    entries = ((snp_certs.GUID_VCEK, b"leaf"), (snp_certs.GUID_ASK, b""), (str_guid(7), b"x" * 99))
    read = snp_certs.CertificateTable.from_bytes(table(*entries) + bytes(64))
    assert read.entries == entries
    assert read.get(snp_certs.GUID_VCEK) == b"leaf"
    assert read.get(snp_certs.GUID_ASK) is None  # empty is not there
    assert read.get(snp_certs.GUID_ARK) is None


def str_guid(number: int) -> str:
    return f"{number:08x}-0000-0000-0000-000000000001"


def test_no_bytes_are_an_empty_table() -> None:
    assert snp_certs.CertificateTable.from_bytes(b"").entries == ()
    assert snp_certs.CertificateTable.from_bytes(bytes(24)).entries == ()


def test_att_22_entries_outside_the_table_are_refused() -> None:
    good = table((snp_certs.GUID_VCEK, b"leaf"))
    for offset, length in ((47, 4), (48, 5), (53, 0), (0, 4), (2**32 - 1, 2**32 - 1), (48, 2**31)):
        bad = good[:16] + struct.pack("<II", offset, length) + good[24:]
        with pytest.raises(EvidenceFormatError, match="outside"):
            snp_certs.CertificateTable.from_bytes(bad)


def test_tables_without_end_with_doubles_or_too_long_are_refused() -> None:
    entry = table((snp_certs.GUID_VCEK, b"leaf"))[:24]
    many = b"".join(table((str_guid(n), b""))[:24] for n in range(1, 40))
    for bad, why in (
        (entry, "no end"),
        (entry[:10], "no end"),
        (many + bytes(24), "no end"),
        (entry + entry + bytes(24), "twice"),
        (bytes(snp_certs.MAX_TABLE_SIZE + 1), "too long"),
    ):
        with pytest.raises(EvidenceFormatError, match=why):
            snp_certs.CertificateTable.from_bytes(bad)


def test_random_tables_are_read_or_refused_and_nothing_else() -> None:
    for _ in range(2000):
        data = bytearray(table((snp_certs.GUID_VLEK, os.urandom(8)), (snp_certs.GUID_ARK, b"y")))
        data[os.urandom(1)[0] % len(data)] = os.urandom(1)[0]
        try:
            found = snp_certs.CertificateTable.from_bytes(bytes(data))
        except EvidenceFormatError:
            continue
        assert len(found.entries) <= 2
