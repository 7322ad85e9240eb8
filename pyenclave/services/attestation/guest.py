"""
Guest attestation of Azure's confidential VMs (``AzureGuest``), protocol 2.0.

The wire format is that of Microsoft's guest attestation client. The guest sends hardware report,
runtime claims of the paravisor, PCR quote and a key of its vTPM; they are put together to the same
evidence that `pyenclave.attestation` verifies elsewhere. The answer is sealed: only the vTPM that
holds the certified key can open it, so evidence that somebody overheard gets him nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pyenclave.attestation.vtpm_key import certified_key
from pyenclave.errors import EvidenceFormatError
from pyenclave.formats import eventlog_data, jose, jsonstrict
from pyenclave.formats.dcap import TdQuote
from pyenclave.formats.eventlog import EventLog
from pyenclave.formats.hcl import REPORT_TYPE_SNP, REPORT_TYPE_TDX, HclReport, RsaKey, RuntimeClaims
from pyenclave.formats.tdx import td_report_of
from pyenclave.formats.tpm import TpmQuote
from pyenclave.services.attestation.encoding import decode
from pyenclave.services.attestation.requests import MAX_EVIDENCE, Request
from pyenclave.services.attestation.verification import Prepared, Verified, snp_proof

__all__ = ["certified", "claims", "prepare", "sealed"]

_WHAT: Final = "attestationInfo"
_PROTOCOLS: Final = ("2.0",)
_MAX_TEXT: Final = 256
_MAX_PAYLOAD: Final = 16 << 10
_MAX_LOG: Final = 512 << 10
_MAX_TPM: Final = 8 << 10
_MAX_PCRS: Final = 24
# The firmware's word on secure boot (TCG PC Client Platform Firmware Profile 1.06, 3.3.4.8).
_BOOT_POLICY: Final = 7
_SEPARATORS: Final = frozenset(hashlib.sha256(d).digest() for d in (bytes(4), b"\xff" * 4))
_VARIABLE: Final = 0x80000001  # EV_EFI_VARIABLE_DRIVER_CONFIG
_GLOBAL: Final = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le
_AAD: Final = b"Transport Key"
_INFO: Final = frozenset(
    {
        "AttestationProtocolVersion",
        "ClientPayload",
        "IsolationInfo",
        "OSBuild",
        "OSDistro",
        "OSType",
        "OSVersionMajor",
        "OSVersionMinor",
        "TcgLogs",
        "TpmInfo",
    }
)
_TPM: Final = frozenset(
    {
        "AikCert",
        "AikPub",
        "EncKeyCertifyInfo",
        "EncKeyCertifyInfoSignature",
        "EncKeyPub",
        "PCRs",
        "PcrQuote",
        "PcrSet",
        "PcrSignature",
    }
)


def _wrong(what: str, expected: object, found: object) -> EvidenceFormatError:
    return EvidenceFormatError(f"{_WHAT}: {what}", expected=expected, found=found)


def _object(value: object, what: str, known: frozenset[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(what, "an object", type(value).__name__)
    for name in value:
        if name not in known:
            raise _wrong(f"{what}: an unknown member", ", ".join(sorted(known)), f"{name!r:.60}")
    return value


def _info(request: Request) -> Mapping[str, Any]:
    found = jsonstrict.object_of(request.evidence, _WHAT, max_depth=8)
    info = _object(found, "the whole", _INFO)
    version = info.get("AttestationProtocolVersion")
    if version not in _PROTOCOLS:
        raise _wrong("AttestationProtocolVersion", "2.0", f"{version!r:.20}")
    return info


def _isolation(info: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    isolation = _object(info.get("IsolationInfo"), "IsolationInfo", frozenset({"Type", "Evidence"}))
    kind = isolation.get("Type")
    if kind not in ("SevSnp", "TDX"):
        raise _wrong("IsolationInfo.Type", "SevSnp or TDX: a confidential VM", f"{kind!r:.40}")
    names = frozenset({"Proof", "RunTimeData"})
    return kind, _object(isolation.get("Evidence"), "IsolationInfo.Evidence", names)


def _pcrs(tpm: Mapping[str, Any]) -> dict[int, bytes]:
    listed = tpm.get("PCRs")
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_PCRS:
        raise _wrong("PCRs", f"1 to {_MAX_PCRS} values", type(listed).__name__)
    values: dict[int, bytes] = {}
    for item in listed:
        pcr = _object(item, "PCRs", frozenset({"Index", "Digest"}))
        index = pcr.get("Index")
        if type(index) is not int or not 0 <= index < _MAX_PCRS or index in values:
            raise _wrong("PCRs: Index", "0 to 23, each once", f"{index!r:.20}")
        values[index] = decode(pcr.get("Digest"), "PCRs: Digest", limit=64)
    return values


def prepare(request: Request) -> Prepared:
    """
    Put the guest's parts together to evidence of a confidential VM.

    Raises:
        EvidenceFormatError: A part is missing or malformed, or the VM is not a confidential one.

    """
    info = _info(request)
    _payload(info)
    kind, evidence = _isolation(info)
    runtime = decode(evidence.get("RunTimeData"), "RunTimeData", limit=32 << 10)
    proof = decode(evidence.get("Proof"), "Proof", limit=MAX_EVIDENCE)
    tpm = _object(info.get("TpmInfo"), "TpmInfo", _TPM)
    files: dict[str, bytes] = {
        "tpm-quote.msg": decode(tpm.get("PcrQuote"), "PcrQuote", limit=_MAX_TPM),
        "tpm-quote.sig": decode(tpm.get("PcrSignature"), "PcrSignature", limit=_MAX_TPM),
        "tpm-pcrs.json": json.dumps(
            {"sha256": {str(index): value.hex() for index, value in _pcrs(tpm).items()}}
        ).encode(),
    }
    log = info.get("TcgLogs")
    if log:
        files["tpm-eventlog.bin"] = decode(log, "TcgLogs", limit=_MAX_LOG)
    if kind == "SevSnp":
        report, vek, _ = snp_proof(proof, "Proof")
        files |= vek
        hcl = HclReport(
            hardware_report=report, report_type=REPORT_TYPE_SNP, runtime_data=_bare(runtime)
        )
        name = "azure-hcl-snp"
    else:
        body = TdQuote.from_bytes(proof).report_body
        files["td-quote.bin"] = proof
        hcl = HclReport(
            hardware_report=td_report_of(body),
            report_type=REPORT_TYPE_TDX,
            runtime_data=_bare(runtime),
        )
        name = "azure-hcl-tdx"
    try:
        data = hcl.to_bytes()
    except ValueError as error:
        raise _wrong("Proof", "a whole hardware report", str(error)) from None
    ignored = tuple(member for member in ("AikCert", "AikPub") if tpm.get(member))
    return Prepared(request=request, kind=name, data=data, files=files, ignored=ignored)


def _bare(runtime: bytes) -> bytes:
    return runtime.rstrip(b"\0")


def _payload(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the client's payload: names and base64 text, as they stand there."""
    payload = info.get("ClientPayload") or {}
    if not isinstance(payload, Mapping) or len(payload) > 32:
        raise _wrong("ClientPayload", "an object of at most 32 members", type(payload).__name__)
    for name, value in payload.items():
        if not name or len(name) > _MAX_TEXT:
            raise _wrong("ClientPayload", "names of 1 to 256 characters", f"{name!r:.40}")
        decode(value, f"ClientPayload.{name:.40}", limit=_MAX_PAYLOAD)
    return dict(payload)


def _text(info: Mapping[str, Any], name: str) -> str | None:
    value = info.get(name)
    if value is None:
        return None
    try:
        return decode(value, name, limit=_MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(name, "UTF-8", "other bytes") from None


def certified(prepared: Prepared) -> RsaKey:
    """
    Return the key of the vTPM that the answer is sealed to.

    Raises:
        AppraisalError: The vTPM did not certify it.
        EvidenceFormatError: A part is malformed.

    """
    hcl = HclReport.from_bytes(prepared.data)
    ak = RuntimeClaims.from_bytes(hcl.runtime_data).ak
    if ak is None:
        raise _wrong("RunTimeData", "the vTPM's attestation key", "none")
    tpm = _object(_info(prepared.request).get("TpmInfo"), "TpmInfo", _TPM)
    return certified_key(
        decode(tpm.get("EncKeyPub"), "EncKeyPub", limit=_MAX_TPM),
        decode(tpm.get("EncKeyCertifyInfo"), "EncKeyCertifyInfo", limit=_MAX_TPM),
        decode(tpm.get("EncKeyCertifyInfoSignature"), "EncKeyCertifyInfoSignature", limit=_MAX_TPM),
        ak,
    )


def _key(verified: Verified) -> RsaKey:
    if verified.guest_key is None:
        raise ValueError("evidence of a guest has the key that its vTPM certified")
    return verified.guest_key


def _base64url(number: int) -> str:
    return jose.b64url_encode(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def claims(verified: Verified) -> dict[str, Any]:
    """
    Return the claims: the TEE's nested, the guest's own beside them.

    Raises:
        EvidenceFormatError: A part is malformed.

    """
    from pyenclave.services.attestation.claims import machine_claims

    told = verified.result.claims
    info = _info(verified.request)
    hcl = HclReport.from_bytes(verified.prepared.data)
    inner = machine_claims({"kind": verified.result.kind, **told}, verified.prepared.data)
    runtime = jsonstrict.object_of(hcl.runtime_data, "runtime claims", max_depth=8)
    inner["x-ms-runtime"] = runtime
    key = _key(verified)
    prefix = "x-ms-azurevm-"
    found: dict[str, Any] = {
        "x-ms-attestation-type": "azurevm",
        f"{prefix}attestation-protocol-ver": info["AttestationProtocolVersion"],
        f"{prefix}attested-pcrs": _quoted(verified, info),
        f"{prefix}ostype": _text(info, "OSType"),
        f"{prefix}osdistro": _text(info, "OSDistro"),
        f"{prefix}osbuild": _text(info, "OSBuild"),
        f"{prefix}osversion-major": _number(info, "OSVersionMajor"),
        f"{prefix}osversion-minor": _number(info, "OSVersionMinor"),
        "secureboot": _secure_boot(verified),
        f"{prefix}vmid": runtime.get("vm-configuration", {}).get("vmUniqueId"),
        "x-ms-isolation-tee": inner,
        "x-ms-runtime": {
            "client-payload": _payload(info),
            "keys": [
                {
                    "kid": "TpmEphemeralEncryptionKey",
                    "kty": "RSA",
                    "key_ops": ["encrypt"],
                    "n": _base64url(key.modulus),
                    "e": _base64url(key.exponent),
                }
            ],
        },
    }
    return {name: value for name, value in found.items() if value is not None}


def _secure_boot(verified: Verified) -> bool | None:
    """
    Return whether the firmware started with secure boot; None: the guest's log does not show it.

    What the operating system extends comes after the separator, and is its own word. The log is
    one that replays to the quoted PCR, so that what is before it is what the firmware measured.
    """
    log = verified.prepared.files.get("tpm-eventlog.bin")
    explained = any(
        check.name == "eventlog.replay" and check.outcome == "passed"
        for check in verified.result.checks
    )
    if log is None or not explained:
        return None
    said = set()
    for event in EventLog.from_bytes(log).events:
        if event.index != _BOOT_POLICY or not event.extends:
            continue
        digest = event.digests.get("sha256")
        if digest in _SEPARATORS:  # the type of an event is not measured: anybody may write it
            break
        if event.type != _VARIABLE or digest != eventlog_data.bank_hash("sha256", event.data):
            return None
        fields = eventlog_data.decode(event).fields
        if event.data[:16] == _GLOBAL and fields.get("variable") == "SecureBoot":
            value = fields.get("value")
            said.add(value if isinstance(value, int) else None)
    else:
        return None
    return None if not said or None in said else said == {1}


def _quoted(verified: Verified, info: Mapping[str, Any]) -> list[int]:
    """Return the PCRs that the verified quote covers; refuse values beside them."""
    quote = TpmQuote.from_bytes(verified.prepared.files["tpm-quote.msg"])
    banks = (item.indices for item in quote.selections if item.bank == "sha256")
    quoted = sorted(index for indices in banks for index in indices)
    others = sorted(set(_pcrs(info["TpmInfo"])) - set(quoted))
    if others:
        raise _wrong("PCRs: a value that the quote does not cover", quoted, others)
    return quoted


def _number(info: Mapping[str, Any], name: str) -> int | None:
    value = info.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
        raise _wrong(name, "a number", f"{value!r:.20}")
    return value


def sealed(verified: Verified, token: str) -> str:
    """
    Return *token* so that only the guest's vTPM can open it, as Microsoft's client expects it.

    A random key encrypts the token (AES-256-GCM); the certified key of the vTPM encrypts that key.
    RSAES-PKCS1-v1_5 is what the client's TPM call decrypts; the TPM, not this service, opens it.
    """
    key = _key(verified)
    inner, iv = os.urandom(32), os.urandom(12)
    data = AESGCM(inner).encrypt(iv, token.encode("ascii"), _AAD)
    public = rsa.RSAPublicNumbers(key.exponent, key.modulus).public_key()
    answer = {
        "EncryptedInnerKey": _b64(public.encrypt(inner, padding.PKCS1v15())),
        "EncryptionParams": {
            "BlockMode": "ChainingModeGCM",
            "BlockPadding": "PKCS7",
            "Cipher": "AES",
            "KeySizeInBits": 256,
            "Iv": _b64(iv),
        },
        "AuthenticationData": _b64(data[-16:]),
        "Jwt": _b64(data[:-16]),
    }
    return jose.b64url_encode(json.dumps(answer).encode())


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
