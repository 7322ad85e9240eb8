"""What synthetic chips write is what readers, ours and others', read."""

from __future__ import annotations

import hashlib
import subprocess
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509 as others
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from pyenclave.formats import cbor
from pyenclave.formats.hcl import HclReport, RuntimeClaims
from pyenclave.formats.nitro import NitroDocument
from pyenclave.formats.snp import KEY_VLEK, SnpReport
from pyenclave.formats.tpm import TpmQuote, pcr_digest, read_pcr_values
from pyenclave.formats.x509 import Certificate, Crl
from pyenclave.testing.amd import AmdChip
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.certificates import Authority, Key, certificate, crl, name, pem
from pyenclave.testing.nitro import NitroHost

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


def test_certificates_are_those_that_another_library_reads_and_verifies() -> None:
    root = Authority.root(name(C="US", CN="Root"), Key.ec())
    middle = root.issue(name(C="US", CN="Middle"), Key.ec("P-384"))
    key = Key.ec()
    leaf = others.load_der_x509_certificate(
        certificate(
            subject=name(CN="Leaf"),
            issuer=middle.subject,
            key=key,
            signer=middle.key,
            algorithm="ecdsa-sha384",
            serial=77,
            ca=False,
            usages=("digitalSignature",),
        )
    )
    above = others.load_der_x509_certificate(middle.der)
    leaf.verify_directly_issued_by(above)
    above.verify_directly_issued_by(others.load_der_x509_certificate(root.der))
    assert leaf.serial_number == 77
    usage = leaf.extensions.get_extension_for_class(others.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    constraints = above.extensions.get_extension_for_class(others.BasicConstraints)
    assert constraints.critical
    assert constraints.value.path_length == 0
    assert Certificate.from_der(leaf.public_bytes(serialization.Encoding.DER)).common_name == "Leaf"


def test_revocation_lists_are_those_that_another_library_reads_and_verifies() -> None:
    root = Authority.root(name(CN="Root"), Key.ec())
    made = crl(issuer=root.subject, signer=root.key, revoked=[5, 9], next_update=NOW, number=3)
    read = others.load_der_x509_crl(made)
    assert read.is_signature_valid(root.key.private.public_key())  # type: ignore[arg-type]
    assert {item.serial_number for item in read} == {5, 9}
    assert read.next_update_utc == NOW
    ours = Crl.from_bytes(made)
    assert ours.revoked == {5, 9}
    assert ours.next_update == NOW


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("signer", ["vcek", "vlek"])
def test_reports_of_a_chip_are_signed_up_to_its_root(product: str, signer: str) -> None:
    chip = AmdChip(product, signer=signer)  # type: ignore[arg-type]
    report = chip.report(report_data=b"\x07" * 64)
    read = SnpReport.from_bytes(report)
    assert read.report_data == b"\x07" * 64
    assert (read.signing_key == KEY_VLEK) is (signer == "vlek")
    assert read.product == product
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # serial number 0, as AMD has it
        vek = others.load_der_x509_certificate(chip.vek)
        ask = others.load_der_x509_certificate(chip.ask.der)
        ark = others.load_der_x509_certificate(chip.ark.der)
    vek.verify_directly_issued_by(ask)
    ask.verify_directly_issued_by(ark)
    ark.verify_directly_issued_by(ark)
    key = vek.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (0x2A0, 0x2E8))
    key.verify(encode_dss_signature(r, s), report[:0x2A0], ec.ECDSA(hashes.SHA384()))
    changed = bytearray(report)
    changed[0x90] ^= 1
    with pytest.raises(InvalidSignature):
        key.verify(encode_dss_signature(r, s), bytes(changed[:0x2A0]), ec.ECDSA(hashes.SHA384()))
    assert chip.sign(bytes(changed)) != bytes(changed)
    assert Crl.from_bytes(chip.endorsements(revoked=[0])["crl.der"]).revoked == {0}


def test_the_system_tool_verifies_a_chips_chain(tmp_path: Path) -> None:
    chip = AmdChip("milan")
    (tmp_path / "ark.pem").write_bytes(chip.root)
    (tmp_path / "ask.pem").write_bytes(pem(chip.ask.der))
    (tmp_path / "vek.pem").write_bytes(pem(chip.vek))
    command = ["openssl", "verify", "-CAfile", "ark.pem", "-untrusted", "ask.pem", "vek.pem"]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.stdout.strip() == "vek.pem: OK", done.stderr


def test_documents_of_a_nitro_host_are_signed_up_to_its_root() -> None:
    host = NitroHost(NOW)
    for tagged in (False, True):
        data = host.document(tagged=tagged, nonce=b"n" * 16)
        document = NitroDocument.from_bytes(data)
        assert document.payload.nonce == b"n" * 16
        assert document.to_bytes() == data
        chain = [document.payload.certificate, *reversed(document.payload.cabundle)]
        loaded = [others.load_der_x509_certificate(item) for item in chain]
        for lower, upper in zip(loaded, [*loaded[1:], loaded[-1]], strict=True):
            lower.verify_directly_issued_by(upper)
        protected, _, payload, signature = cbor.loads(data.removeprefix(b"\xd2"), "document")  # type: ignore[misc]
        signed = cbor.dumps(["Signature1", protected, b"", payload])
        r, s = (int.from_bytes(signature[at : at + 48], "big") for at in (0, 48))
        key = loaded[0].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))


def test_a_synthetic_azure_vm_binds_its_vtpm_to_its_chip() -> None:
    chip = AmdChip("milan")
    vm = AzureVm(hardware=lambda data: chip.report(report_data=data))
    report = HclReport.from_bytes(vm.hcl_report())
    assert SnpReport.from_bytes(report.hardware_report).report_data == report.expected_report_data
    claims = RuntimeClaims.from_bytes(report.runtime_data)
    assert claims.ak is not None
    files = vm.endorsements(b"nonce nonce")
    quote = TpmQuote.from_bytes(files["tpm-quote.msg"])
    assert quote.extra_data == b"nonce nonce"
    values = read_pcr_values(files["tpm-pcrs.json"])
    assert pcr_digest(values, quote.selections, "sha256") == quote.pcr_digest
    vm.ak.private.public_key().verify(  # type: ignore[call-arg]
        files["tpm-quote.sig"], files["tpm-quote.msg"], padding.PKCS1v15(), hashes.SHA256()
    )
    other = HclReport.from_bytes(vm.hcl_report(report_data=hashlib.sha512(b"").digest()))
    assert other.expected_report_data != SnpReport.from_bytes(other.hardware_report).report_data
