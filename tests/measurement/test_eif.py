"""Nitro image files: hostile ones first, then the vectors and signatures made here."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import random
import struct
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pyenclave.errors import MeasurementError
from pyenclave.formats import cbor
from pyenclave.formats.cose import Sign1
from pyenclave.measurement.eif import Eif

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ONE_RAMDISK_PCR2 = (
    "21b9efbc184807662e966d34f390821309eeac6802309798"
    "826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
)
PLAIN = [(1, b"kernel"), (2, b"quiet"), (5, b"{}"), (3, b"init"), (3, b"app")]


def build(sections: Sequence[tuple[int, bytes]], *, flags: int = 0, version: int = 4) -> bytearray:
    at = 548
    offsets, body = [], b""
    for kind, data in sections:
        offsets.append(at + len(body))
        body += struct.pack(">HHQ", kind, 0, len(data)) + data
    sizes = [len(data) for _, data in sections]
    head = b".eif" + struct.pack(">HHQQHH", version, flags, 1 << 28, 2, 0, len(sections))
    head += struct.pack(">32Q", *offsets, *[0] * (32 - len(sections)))
    head += struct.pack(">32Q", *sizes, *[0] * (32 - len(sections))) + bytes(4)
    data = bytearray(head + bytes(4) + body)
    return fix_crc(data)


def fix_crc(data: bytearray) -> bytearray:
    data[544:548] = struct.pack(">I", zlib.crc32(data[548:], zlib.crc32(data[:544])))
    return data


@pytest.fixture(scope="module")
def signer() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "signer")])
    start = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=9000))
        .sign(key, hashes.SHA384())
    )
    return key, certificate


def signature_section(
    signer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    pcr0: bytes,
    *,
    as_arrays: bool = True,
    index: int = 0,
) -> bytes:
    key, certificate = signer

    def octets(data: bytes) -> Any:
        return list(data) if as_arrays else data

    payload = cbor.dumps({"register_index": index, "register_value": octets(pcr0)})
    message = Sign1.sign(payload, key=key, algorithm="ES384").to_bytes()
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return cbor.dumps([{"signing_certificate": octets(pem), "signature": octets(message)}])


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ([], "number of sections"),
        (PLAIN[1:], "type kernel"),
        ([*PLAIN, (1, b"second")], "type kernel"),
        ([PLAIN[0], PLAIN[3]], "type command line"),
        (PLAIN[:3], "type ramdisk"),
        ([*PLAIN, (5, b"{}")], "type metadata"),
        ([*PLAIN, (4, b"\x81\xa0"), (4, b"\x81\xa0")], "type signature"),
        ([*PLAIN, (6, b"")], "head of section"),
        ([(0, b""), *PLAIN], "head of section"),
    ],
)
def test_sections_that_cannot_be_are_refused(sections: list[tuple[int, bytes]], match: str) -> None:
    with pytest.raises(MeasurementError, match=match):
        Eif(build(sections))


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, b".elf", "not recognised"),
        (4, b"\0\5", "version"),
        (26, b"\0\x21", "number of sections"),
        (26, b"\0\4", "more sections"),
        (28, struct.pack(">Q", 549), "not where"),
        (36, struct.pack(">Q", 548), "not where"),
        (36, b"\xff" * 8, "not where"),
        (284, struct.pack(">Q", 7), "head of section"),
        (284, b"\xff" * 8, "not where"),
        (548 + 4, b"\xff" * 8, "head of section"),
        (548 + 12, b"X", "CRC-32"),
    ],
)
def test_a_header_that_cannot_be_is_refused(at: int, value: bytes, match: str) -> None:
    data = build(PLAIN)
    data[at : at + len(value)] = value
    with pytest.raises(MeasurementError, match=match):
        Eif(data)


def test_every_truncation_and_extension_is_refused() -> None:
    data = build(PLAIN)
    for size in range(len(data)):
        with pytest.raises(MeasurementError):
            Eif(data[:size])
    with pytest.raises(MeasurementError, match="follow the last section"):
        Eif(fix_crc(data + b"x"))


def test_every_bit_of_the_file_counts() -> None:
    data = build(PLAIN)
    for at in range(len(data)):
        data[at] ^= 1
        with pytest.raises(MeasurementError):
            Eif(data)
        data[at] ^= 1


@pytest.mark.parametrize(
    "section",
    [
        b"",
        b"\x80",
        b"\xa0",
        b"\x81\x01",
        b"\x81\xa0",
        b"\x82\xa0\xa0",
        cbor.dumps([{"signing_certificate": b"x", "signature": b""}]),
        cbor.dumps([{"signing_certificate": [256], "signature": b""}]),
        cbor.dumps([{"signing_certificate": [True], "signature": b""}]),
    ],
)
def test_a_malformed_signature_section_is_refused(section: bytes) -> None:
    image = Eif(build([*PLAIN, (4, section)]))
    with pytest.raises(MeasurementError, match="EIF signature"):
        _ = image.pcrs


def test_no_mutation_raises_anything_but_the_typed_error(
    signer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
) -> None:
    pcr0 = Eif(build(PLAIN)).pcrs[0]
    section = signature_section(signer, pcr0, as_arrays=False)
    good = build([*PLAIN, (4, section)])
    generator = random.Random(5)
    begin = good.index(section)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(begin, len(data))] = generator.randrange(256)
        with contextlib.suppress(MeasurementError):
            Eif(fix_crc(data)).to_json()


# ---- what is measured -------------------------------------------------------------------------


def test_pcrs_are_those_by_hand() -> None:
    def pcr(data: bytes) -> bytes:
        return hashlib.sha384(bytes(48) + hashlib.sha384(data).digest()).digest()

    image = Eif(build(PLAIN))
    assert image.pcrs == {
        0: pcr(b"kernelquietinitapp"),
        1: pcr(b"kernelquietinit"),
        2: pcr(b"app"),
    }
    single = Eif(build(PLAIN[:4]))
    assert single.pcrs[0] == single.pcrs[1]
    assert single.pcrs[2].hex() == ONE_RAMDISK_PCR2


def test_metadata_flags_and_signature_are_not_measured() -> None:
    first = Eif(build(PLAIN)).pcrs
    changed = [section if section[0] != 5 else (5, b"other") for section in PLAIN]
    assert Eif(build(changed, flags=1)).pcrs == first
    assert Eif(build(changed, flags=1)).architecture == "aarch64"


@pytest.mark.parametrize("as_arrays", [True, False])
def test_a_signature_holds_for_its_image_alone(
    signer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate], as_arrays: bool
) -> None:
    pcr0 = Eif(build(PLAIN)).pcrs[0]
    section = signature_section(signer, pcr0, as_arrays=as_arrays)
    good = Eif(build([*PLAIN, (4, section)]))
    assert good.signature is not None
    assert good.signature.valid
    der = signer[1].public_bytes(serialization.Encoding.DER)
    wanted = hashlib.sha384(bytes(48) + hashlib.sha384(der).digest()).digest()
    assert good.pcrs[8] == wanted
    other = Eif(build([*PLAIN, (3, b"more"), (4, section)]))
    assert other.signature is not None
    assert not other.signature.valid
    wrong = Eif(build([*PLAIN, (4, signature_section(signer, pcr0, index=1))]))
    assert wrong.signature is not None
    assert not wrong.signature.valid


def test_a_signature_of_another_key_does_not_hold(
    signer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
) -> None:
    pcr0 = Eif(build(PLAIN)).pcrs[0]
    stranger = ec.generate_private_key(ec.SECP384R1()), signer[1]
    found = Eif(build([*PLAIN, (4, signature_section(stranger, pcr0))])).signature
    assert found is not None
    assert not found.valid


def test_every_image_of_the_vectors_has_the_expected_pcrs(vectors: Path) -> None:
    seen = 0
    for path in sorted((vectors / "measurement").glob("nitro-eif-*/case.json")):
        case = json.loads(path.read_text())
        found = Eif((path.parent / case["files"]["eif"]["path"]).read_bytes()).to_json()
        for name, wanted in case["expect"].items():
            assert found[name] == wanted, (path, name)
        assert ("pcr8" in found) == ("pcr8" in case["expect"])
        assert found.get("signature_valid", True), path
        seen += 1
    assert seen == 3
