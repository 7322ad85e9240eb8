"""The platform's quote and its chain of trust."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pyenclave._platform.counters import CounterStore, MemoryFiles
from pyenclave._platform.keys import attributes, cpu_svn
from pyenclave._platform.quote import Quoter
from pyenclave._platform.root import PlatformRoot
from pyenclave._platform.service import Services
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import messages
from pyenclave.formats.dcap import QE_VENDOR_INTEL, Quote
from pyenclave.formats.record import QE_VENDOR_ID
from pyenclave.formats.sgx import ReportBody

BODY = ReportBody(
    cpu_svn=cpu_svn(), attributes=attributes(debug=False), mrenclave=b"E" * 32, mrsigner=b"S" * 32
)


def root(secret: bytes = b"r" * 32, level: str = "embedded") -> PlatformRoot:
    return PlatformRoot(bytearray(secret), level=level, ephemeral=False)


def verify(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))


def verify_quote(data: bytes, anchor: x509.Certificate) -> Quote:
    quote = Quote.from_bytes(data)
    leaf, intermediate, top = x509.load_pem_x509_certificates(quote.certification_data)
    assert top == anchor
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(top)
    top.verify_directly_issued_by(top)
    public = leaf.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    verify(public, quote.qe_report_signature, quote.qe_report.to_bytes())
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    assert quote.qe_report.report_data == bound + bytes(32)
    key = ec.EllipticCurvePublicKey.from_encoded_point(
        ec.SECP256R1(), b"\x04" + quote.attestation_key
    )
    verify(key, quote.signature, quote.signed_bytes)
    return quote


def test_a_quote_verifies_up_to_the_platforms_root() -> None:
    platform = root()
    quote = verify_quote(Quoter(platform).quote(BODY, b"d" * 64), platform.chain.root)
    assert quote.report_body.report_data == b"d" * 64
    assert quote.report_body.mrenclave == BODY.mrenclave
    assert quote.qe_vendor_id == QE_VENDOR_ID != QE_VENDOR_INTEL


def test_any_flipped_byte_of_what_is_signed_is_noticed() -> None:
    platform = root()
    data = Quoter(platform).quote(BODY, b"d" * 64)
    for at in [*range(0, 432, 7), 436, 500, 564, 948, 1015, 1100]:
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises((InvalidSignature, EvidenceFormatError, AssertionError, ValueError)):
            verify_quote(bytes(changed), platform.chain.root)


def test_another_platforms_root_does_not_fit() -> None:
    with pytest.raises(AssertionError):
        verify_quote(Quoter(root()).quote(BODY, bytes(64)), root(b"x" * 32).chain.root)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_64_bytes(size: int) -> None:
    with pytest.raises(EvidenceFormatError):
        Quoter(root()).quote(BODY, bytes(size))


def test_the_same_root_gives_the_same_certificates_for_ever() -> None:
    first, second = root(), root()
    assert first.chain.to_pem() == second.chain.to_pem()
    assert first.chain.root != root(b"x" * 32).chain.root
    assert first.chain.root != root(level="service").chain.root
    # Golden: whoever enrolled this fingerprint keeps it over releases.
    fingerprint = first.chain.root.fingerprint(hashes.SHA256()).hex()
    assert fingerprint == "bdc75c422ee422c4de624bc5cb581552749f8fdcd1b06e0ff7ac52c4d3c27d42"


def test_certificates_say_what_they_may_do() -> None:
    chain = root().chain
    for certificate, authority, length in (
        (chain.root, True, 1),
        (chain.intermediate, True, 0),
        (chain.leaf, False, None),
    ):
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert basic.critical
        assert usage.critical
        assert (basic.value.ca, basic.value.path_length) == (authority, length)
        assert usage.value.key_cert_sign is authority
        assert usage.value.digital_signature is not authority
        assert certificate.not_valid_after_utc > dt.datetime(2045, 1, 1, tzinfo=dt.UTC)
        assert 0 < certificate.serial_number < 1 << 159
    assert "no TEE" in chain.root.subject.rfc4514_string()
    keys = {
        certificate.public_key().public_numbers()  # type: ignore[union-attr]
        for certificate in (chain.root, chain.intermediate, chain.leaf)
    }
    assert len(keys | {root().attestation_key.public_key().public_numbers()}) == 4


def test_what_the_machine_below_says_goes_with_every_quote() -> None:
    vouched = root()
    vouched.tee, vouched.machine = "sev-snp", b"what the hardware says"
    enclave: Any = SimpleNamespace(body=BODY)
    for platform, expected in ((vouched, vouched.machine), (root(), b"")):
        services = Services(platform, CounterStore(MemoryFiles(), bytes(32), os.urandom))
        reply = services.answer(enclave, messages.QuoteRequest(data=bytes(64)))
        assert isinstance(reply, messages.QuoteReply)
        assert reply.machine == expected
