"""Certificates and revocation lists are read as others read them; hostile ones are refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import der
from pyenclave.formats.x509 import BasicConstraints, Certificate, Crl, Name, pem_blocks

NOW = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def builder(key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sample CA")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


@pytest.fixture(scope="module")
def sample(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.fixture(scope="module")
def crl(key: ec.EllipticCurvePrivateKey) -> bytes:
    entry = x509.RevokedCertificateBuilder().serial_number(5).revocation_date(NOW).build()
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sample CA")]))
        .last_update(NOW)
        .next_update(NOW + dt.timedelta(days=1))
        .add_revoked_certificate(entry)
        .add_extension(x509.CRLNumber(3), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def _certificates(folder: Path) -> list[bytes]:
    found: list[bytes] = []
    for path in sorted(folder.rglob("*.pem")):
        if path.parent != folder and path.name.endswith(("chain.pem", "k.pem")):
            found += pem_blocks(path.read_bytes(), "CERTIFICATE", limit=8)
    assert len(found) > 100
    return found


def test_vendors_certificates_read_as_cryptography_reads_them(vectors: Path) -> None:
    for data in set(_certificates(vectors / "attestation")):
        ours, theirs = Certificate.from_der(data), x509.load_der_x509_certificate(data)
        assert ours.tbs == theirs.tbs_certificate_bytes
        assert ours.serial == theirs.serial_number
        assert ours.signature == theirs.signature
        assert (ours.not_before, ours.not_after) == (
            theirs.not_valid_before_utc,
            theirs.not_valid_after_utc,
        )
        assert ours.public_key() == theirs.public_key()
        common = theirs.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert ours.common_name == common[0].value
        assert list(ours.extensions) == [e.oid.dotted_string for e in theirs.extensions]
        known = {type(extension.value): extension.value for extension in theirs.extensions}
        constraints = known.get(x509.BasicConstraints)
        if constraints is None:
            assert ours.basic_constraints is None
            continue
        assert isinstance(constraints, x509.BasicConstraints)
        assert ours.basic_constraints == BasicConstraints(constraints.ca, constraints.path_length)


def test_vendors_revocation_lists_read_as_cryptography_reads_them(vectors: Path) -> None:
    paths = sorted((vectors / "attestation").rglob("*crl.der"))
    assert len(paths) > 30
    for data in {path.read_bytes() for path in paths}:
        ours, theirs = Crl.from_bytes(data), x509.load_der_x509_crl(data)
        assert ours.tbs == theirs.tbs_certlist_bytes
        assert ours.revoked == {entry.serial_number for entry in theirs}
        assert ours.next_update == theirs.next_update_utc
        assert ours.this_update == theirs.last_update_utc
        assert ours.crl_number is not None
        assert Crl.from_bytes(data.hex().encode() + b"\n") == ours
        assert Crl.from_bytes(theirs.public_bytes(Encoding.PEM)) == ours


def test_each_changed_byte_changes_what_is_read_or_is_refused(sample: bytes) -> None:
    good = Certificate.from_der(sample)
    for place in range(len(sample)):
        for bit in (1, 0x80):
            bad = bytearray(sample)
            bad[place] ^= bit
            try:
                read = Certificate.from_der(bytes(bad))
            except EvidenceFormatError:
                continue
            assert (read.tbs, read.signature) != (good.tbs, good.signature)


def test_each_cut_is_refused(sample: bytes, crl: bytes) -> None:
    for data, read in ((sample, Certificate.from_der), (crl, Crl.from_bytes)):
        for size in range(len(data)):
            with pytest.raises(EvidenceFormatError):
                read(data[:size])
        with pytest.raises(EvidenceFormatError):
            read(data + b"\0")


def test_an_extension_that_occurs_twice_is_refused(sample: bytes) -> None:
    extension = der.encode_sequence(der.encode_oid("1.2.3"), der.encode_octet_string(b""))
    body = der.Der(sample, "x").sequence()
    tbs = body.sequence()
    parts = []
    while tbs.more:
        parts.append(tbs.element())
    parts[-1] = der.encode(der.context(3), der.encode_sequence(extension, extension))
    bad = der.encode_sequence(der.encode_sequence(*parts), body.element(), body.element())
    with pytest.raises(EvidenceFormatError, match="occurs twice"):
        Certificate.from_der(bad)


def test_the_two_algorithm_names_must_be_the_same(sample: bytes) -> None:
    body = der.Der(sample, "x").sequence()
    tbs = body.element()
    body.element()
    other = der.encode_sequence(der.encode_oid("1.2.840.10045.4.3.3"))
    with pytest.raises(EvidenceFormatError, match="differ"):
        Certificate.from_der(der.encode_sequence(tbs, other, body.element()))


def test_a_key_that_is_no_point_is_a_typed_error(sample: bytes) -> None:
    good = Certificate.from_der(sample)
    spki = good.spki[:-64] + b"\x01" * 64
    with pytest.raises(EvidenceFormatError, match="not usable"):
        Certificate.from_der(sample.replace(good.spki, spki)).public_key()


def test_chains_may_end_in_one_nul_and_white_space(sample: bytes) -> None:
    pem = x509.load_der_x509_certificate(sample).public_bytes(Encoding.PEM)
    for tail in (b"", b"\0", b"\n", b"\n\n\0", b" \r\n"):
        assert len(Certificate.from_pem_chain(pem + pem + tail)) == 2
    for bad in (b"", b"x" + pem, pem + b"x", pem + b"\0\0", pem + b"x" + pem, pem[:-3], b"\0"):
        with pytest.raises(EvidenceFormatError):
            Certificate.from_pem_chain(bad)
    with pytest.raises(EvidenceFormatError, match="more than"):
        Certificate.from_pem_chain(pem * 17)
    with pytest.raises(EvidenceFormatError, match="label"):
        Certificate.from_pem_chain(pem.replace(b"CERTIFICATE", b"PRIVATE KEY"))
    assert Certificate.from_bytes(pem) == Certificate.from_bytes(sample)


def test_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(EvidenceFormatError, match="too large"):
        Certificate.from_der(bytes((1 << 16) + 1))
    with pytest.raises(EvidenceFormatError, match="too large"):
        Crl.from_bytes(bytes((8 << 20) + 1))


def test_the_list_says_what_it_revokes(crl: bytes) -> None:
    read = Crl.from_bytes(crl)
    assert read.revoked == {5}
    assert read.crl_number == 3
    assert read.authority_key_id is not None
    assert read.issuer_text == "CN=Sample CA"


def test_names_of_many_attributes_have_no_one_common_name() -> None:
    def pair(text: str) -> bytes:
        inner = der.encode_sequence(der.encode_oid("2.5.4.3"), der.encode_text(text))
        return der.encode(der.SET, inner)

    assert Name.from_bytes(der.encode_sequence(pair("a"))).common_name == "a"
    assert Name.from_bytes(der.encode_sequence(pair("a"), pair("b"))).common_name is None
    with pytest.raises(EvidenceFormatError):
        Name.from_bytes(der.encode_sequence(der.encode(der.SET, b"\x30\x00")))
