"""Guest attestation: a confidential VM of Azure, and the answer that only its vTPM opens."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import uuid
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.formats.hcl import REPORT_TYPE_TDX, HclReport
from pyenclave.formats.tpm import ALG_NULL, PcrSelection, TpmCertification, TpmPublic
from pyenclave.testing.azure import AzureVm
from pyenclave.testing.certificates import Key

PATH = "/attest/AzureGuest"
ID_KEY = bytes.fromhex(
    "0356215882a825279a85b300b0b742931d113bf7e32dde2e50ffde7ec743ca49"
    "1ecdd7f336dc28a6e0b2bb57af7a44a3"
)
_DECRYPT = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 17


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Guest:
    """A VM with a key of its vTPM, as Microsoft's client sends it."""

    def __init__(self, site: Any, helpers: Any, tee: str = "SevSnp", **report: Any) -> None:
        self.helpers = helpers
        self.tee = tee
        self.key = Key.rsa(2048, index=11)
        if tee == "SevSnp":
            fields = {"id_key_digest": ID_KEY} | report
            self.vm = AzureVm(hardware=lambda data: site.chip.report(report_data=data, **fields))
            hcl = HclReport.from_bytes(self.vm.hcl_report())
            self.proof = helpers.proof(site.chip, hcl.hardware_report)
            self.runtime = hcl.runtime_data
        else:
            self.vm = AzureVm(hardware=lambda data: data, report_type=REPORT_TYPE_TDX)
            self.runtime = self.vm.runtime_data()
            self.proof = site.machine.td_quote(report_data=helpers.digest64(self.runtime), **report)
        self.public = self.make_public()

    def make_public(self, **changes: Any) -> TpmPublic:
        numbers = self.key.private.public_key().public_numbers()
        assert isinstance(numbers, rsa.RSAPublicNumbers)
        plain = TpmPublic(
            attributes=_DECRYPT,
            symmetric=(ALG_NULL,),
            scheme=ALG_NULL,
            scheme_hash=None,
            unique=numbers.n.to_bytes(256, "big"),
        )
        return replace(plain, **changes)

    def tpm(self, **changes: Any) -> dict[str, Any]:
        files = self.vm.endorsements()
        said = TpmCertification(name=self.public.name).to_bytes()
        area = self.public.to_bytes()
        found: dict[str, Any] = {
            "AikCert": _b64(b"\0" * 64),
            "AikPub": _b64(b"\1" * 64),
            "PcrQuote": _b64(files["tpm-quote.msg"]),
            "PcrSignature": _b64(files["tpm-quote.sig"]),
            "EncKeyPub": _b64(len(area).to_bytes(2, "big") + area),
            "EncKeyCertifyInfo": _b64(said),
            "EncKeyCertifyInfoSignature": _b64(self.vm.ak.sign(said, "rsa-pkcs1-sha256")),
            "PcrSet": sorted(self.vm.pcrs),
            "PCRs": [{"Index": n, "Digest": _b64(v)} for n, v in self.vm.pcrs.items()],
        }
        return found | changes

    def info(self, **changes: Any) -> dict[str, Any]:
        evidence = {"Proof": _b64(self.proof), "RunTimeData": _b64(self.runtime)}
        found: dict[str, Any] = {
            "AttestationProtocolVersion": "2.0",
            "OSType": _b64(b"Linux"),
            "OSDistro": _b64(b"Debian"),
            "OSBuild": _b64(b"NotApplication"),
            "OSVersionMajor": 12,
            "OSVersionMinor": 5,
            "TcgLogs": "",
            "ClientPayload": {"nonce": _b64(b"ADE0101")},
            "TpmInfo": self.tpm(),
            "IsolationInfo": {"Type": self.tee, "Evidence": evidence},
        }
        return found | changes

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"AttestationInfo": self.helpers.b64(json.dumps(self.info(**changes)).encode())}

    def open(self, sealed: str) -> str:
        """Do what the client does with the vTPM."""
        answer = json.loads(base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)))
        params = answer["EncryptionParams"]
        assert (params["Cipher"], params["BlockMode"]) == ("AES", "ChainingModeGCM")
        assert isinstance(self.key.private, rsa.RSAPrivateKey)
        wrapped = base64.b64decode(answer["EncryptedInnerKey"])
        inner = self.key.private.decrypt(wrapped, padding.PKCS1v15())
        data = base64.b64decode(answer["Jwt"]) + base64.b64decode(answer["AuthenticationData"])
        iv = base64.b64decode(params["Iv"])
        return AESGCM(inner).decrypt(iv, data, b"Transport Key").decode()


@pytest.mark.parametrize("tee", ["SevSnp", "TDX"])
def test_a_guest_opens_its_token(site: Any, helpers: Any, tee: str) -> None:
    guest = Guest(site, helpers, tee)
    answer = site.post(PATH, guest.body(), query={"api-version": "2020-10-01"})
    assert answer.status_code == 200, answer.text
    found = site.verified(guest.open(answer.json()["token"]))
    assert found["x-ms-attestation-type"] == "azurevm"
    assert found["x-ms-azurevm-ostype"] == "Linux"
    assert found["x-ms-azurevm-osversion-major"] == 12
    assert found["x-ms-azurevm-attested-pcrs"] == list(range(24))
    assert found["x-ms-azurevm-vmid"] == "00000000-0000-4000-8000-000000000000"
    assert found["x-ms-runtime"]["client-payload"] == {"nonce": _b64(b"ADE0101")}
    (key,) = found["x-ms-runtime"]["keys"]
    numbers = guest.key.private.public_key().public_numbers()
    assert key["kid"] == "TpmEphemeralEncryptionKey"
    assert key["n"] == helpers.b64(numbers.n.to_bytes(256, "big"))
    inner = found["x-ms-isolation-tee"]
    assert inner["x-ms-runtime"] == json.loads(guest.runtime)
    if tee == "SevSnp":
        assert inner["x-ms-attestation-type"] == "sevsnpvm"
        assert inner["x-ms-compliance-status"] == "azure-compliant-cvm"
        assert inner["x-ms-sevsnpvm-microcode-svn"] == 219
    else:
        assert inner["x-ms-attestation-type"] == "tdxvm"
        assert inner["attester_tcb_status"] == "UpToDate"
    assert "x-ms-compliance-status" not in found
    assert site.audit()[-1]["claims"]["x-ms-isolation-tee"]


GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le
SEPARATOR = (7, 4, bytes(4))


def variable(value: bytes, name: str = "SecureBoot", vendor: bytes = GLOBAL) -> bytes:
    """UEFI_VARIABLE_DATA."""
    text = name.encode("utf-16-le")
    return vendor + struct.pack("<QQ", len(name), len(value)) + text + value


def secure_boot(value: bytes, **changes: Any) -> tuple[int, int, bytes]:
    return 7, 0x80000001, variable(value, **changes)


def log_of(*events: tuple[Any, ...]) -> tuple[bytes, dict[int, bytes]]:
    """Return a log of SHA-256 and the PCRs that it gives; a fourth part is what is measured."""
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1)
    data += struct.pack("<HH", 0xB, 32) + b"\0"
    log = struct.pack("<II20sI", 0, 3, bytes(20), len(data)) + data
    pcrs: dict[int, bytes] = {}
    for index, kind, content, *measured in events:
        digest = hashlib.sha256(measured[0] if measured else content).digest()
        log += struct.pack("<IIIH", index, kind, 1, 0xB) + digest
        log += struct.pack("<I", len(content)) + content
        pcrs[index] = hashlib.sha256(pcrs.get(index, bytes(32)) + digest).digest()
    return log, pcrs


ON, OFF = b"\1", b"\0"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([secure_boot(ON), SEPARATOR], True),
        ([secure_boot(OFF), SEPARATOR], False),
        # The operating system extends the PCR too, and its log says what it likes.
        ([secure_boot(OFF), SEPARATOR, secure_boot(ON)], False),
        ([SEPARATOR, secure_boot(ON)], None),
        ([secure_boot(OFF), secure_boot(ON), SEPARATOR], False),
        ([SEPARATOR], None),
        # Of another vendor, of another name, another length, and data that was not measured.
        ([secure_boot(ON, vendor=bytes(16)), SEPARATOR], None),
        ([secure_boot(ON, name="SecureBoox"), SEPARATOR], None),
        ([secure_boot(b"\1\1"), SEPARATOR], None),
        ([(*secure_boot(ON), variable(OFF)), SEPARATOR], None),
        ([(*secure_boot(ON), ON), SEPARATOR], None),
        ([(0, *secure_boot(ON)[1:]), SEPARATOR], None),
        ([(7, 0x80000002, variable(ON)), SEPARATOR], None),
        # Types are not measured: digests of the variable and of the separator under other ones.
        ([(7, 5, b"x", variable(OFF)), (7, 5, b"x", bytes(4)), secure_boot(ON)], None),
        ([(7, 5, b"x", variable(OFF)), (7, 5, b"x", bytes(4)), secure_boot(ON), SEPARATOR], None),
        ([secure_boot(OFF), (7, 5, b"x", bytes(4)), secure_boot(ON), SEPARATOR], False),
        ([secure_boot(OFF), (7, 5, b"x", b"\xff" * 4), secure_boot(ON), SEPARATOR], False),
        ([secure_boot(ON)], None),
    ],
)
def test_secure_boot_is_what_the_firmware_measured(
    site: Any, helpers: Any, events: list[tuple[Any, ...]], expected: bool | None
) -> None:
    """Only before the separator, and only where the digest is of what the log shows."""
    log, pcrs = log_of(*events)
    guest = Guest(site, helpers)
    guest.vm.pcrs = {**guest.vm.pcrs, **dict.fromkeys(range(8), bytes(32)), **pcrs}
    answer = site.post(PATH, guest.body(TcgLogs=_b64(log), TpmInfo=guest.tpm()))
    assert answer.status_code == 200, answer.text
    found = site.verified(guest.open(answer.json()["token"]))
    assert found.get("secureboot") is expected
    # Without the log nothing is said; with one of another boot nothing is attested.
    answer = site.post(PATH, guest.body(TpmInfo=guest.tpm()))
    assert "secureboot" not in site.verified(guest.open(answer.json()["token"]))
    other, _ = log_of(*events, secure_boot(ON))
    body = guest.body(TcgLogs=_b64(other), TpmInfo=guest.tpm())
    assert "eventlog.replay" in site.refused(PATH, body)[2]


def test_firmware_of_somebodys_own_is_not_compliant(site: Any, helpers: Any) -> None:
    guest = Guest(site, helpers, id_key_digest=bytes(48))
    answer = site.post(PATH, guest.body())
    found = site.verified(guest.open(answer.json()["token"]))
    assert "x-ms-compliance-status" not in found["x-ms-isolation-tee"]


def _tpm_faults(guest: Guest) -> dict[str, dict[str, Any]]:
    other = Key.rsa(2048, index=12)
    said = TpmCertification(name=guest.public.name).to_bytes()
    exportable = guest.make_public(attributes=_DECRYPT & ~2)
    area = exportable.to_bytes()
    moved = TpmCertification(name=exportable.name).to_bytes()
    return {
        "certify.signature": guest.tpm(
            EncKeyCertifyInfoSignature=_b64(other.sign(said, "rsa-pkcs1-sha256"))
        ),
        "certify.name": guest.tpm(EncKeyPub=_b64(area)),
        "certify.attributes": guest.tpm(
            EncKeyPub=_b64(area),
            EncKeyCertifyInfo=_b64(moved),
            EncKeyCertifyInfoSignature=_b64(guest.vm.ak.sign(moved, "rsa-pkcs1-sha256")),
        ),
        "quote.signature": guest.tpm(PcrSignature=_b64(bytes(256))),
        "quote.digest": guest.tpm(
            PCRs=[{"Index": n, "Digest": _b64(bytes(32))} for n in range(24)]
        ),
    }


@pytest.mark.parametrize(
    "fault",
    ["certify.signature", "certify.name", "certify.attributes", "quote.signature", "quote.digest"],
)
def test_what_the_vtpm_did_not_say_is_refused(site: Any, helpers: Any, fault: str) -> None:
    guest = Guest(site, helpers)
    body = guest.body(TpmInfo=_tpm_faults(guest)[fault])
    status, code, message = site.refused(PATH, body)
    assert (status, code) == (400, "AttestationFailed")
    assert fault.partition(".")[2] in message


def test_runtime_claims_of_another_vm_are_refused(site: Any, helpers: Any) -> None:
    guest = Guest(site, helpers)
    changed = guest.runtime.replace(b'"secure-boot":true', b'"secure-boot":null')
    assert changed != guest.runtime
    evidence = {"Proof": _b64(guest.proof), "RunTimeData": _b64(changed)}
    body = guest.body(IsolationInfo={"Type": "SevSnp", "Evidence": evidence})
    assert "hcl.binding" in site.refused(PATH, body)[2]


@pytest.mark.parametrize(
    "change",
    [
        {"AttestationProtocolVersion": "1.0"},
        {"IsolationInfo": {"Type": "TrustedLaunch"}},
        {"IsolationInfo": None},
        {"TpmInfo": None},
        {"TpmInfo": {"PCRs": []}},
        {"ClientPayload": {"nonce": 1}},
        {"ClientPayload": "nonce"},
        {"OSType": _b64(b"\xff")},
        {"OSVersionMajor": "12"},
        {"More": 1},
    ],
)
def test_malformed_information_is_refused(site: Any, helpers: Any, change: dict[str, Any]) -> None:
    status, code, _ = site.refused(PATH, Guest(site, helpers).body(**change))
    assert (status, code) == (400, "InvalidParameter")


def test_a_debug_guest_is_refused_by_the_default_policy(site: Any, helpers: Any) -> None:
    guest = Guest(site, helpers, policy=0x30000 | 1 << 19)
    assert site.refused(PATH, guest.body())[1] == "PolicyEvaluationError"


def test_a_pcr_that_was_not_quoted_is_refused(site: Any, helpers: Any) -> None:
    guest = Guest(site, helpers)
    digest = hashlib.sha256(b"".join(guest.vm.pcrs[n] for n in range(8))).digest()
    quote = {"selections": (PcrSelection("sha256", tuple(range(8))),), "pcr_digest": digest}
    files = guest.vm.endorsements(**quote)
    parts = {
        "PcrQuote": _b64(files["tpm-quote.msg"]),
        "PcrSignature": _b64(files["tpm-quote.sig"]),
    }
    status, _, message = site.refused(PATH, guest.body(TpmInfo=guest.tpm(**parts)))
    assert status == 400
    assert "PCRs: a value that the quote does not cover" in message
    listed = [{"Index": n, "Digest": _b64(guest.vm.pcrs[n])} for n in range(8)]
    answer = site.post(PATH, guest.body(TpmInfo=guest.tpm(**parts, PCRs=listed)))
    assert answer.status_code == 200, answer.text
    found = site.verified(guest.open(answer.json()["token"]))
    assert found["x-ms-azurevm-attested-pcrs"] == list(range(8))
