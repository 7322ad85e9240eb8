"""Makes RA-TLS certificates and attested key sets, with a platform of our own."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal

from pyenclave.attestation import AppraisalPolicy, AttestationResult, appraise
from pyenclave.formats import cbor, ratls
from pyenclave.formats.cbor import Tag
from pyenclave.testing.certificates import Key, certificate, name
from pyenclave.testing.intel import IntelPlatform

NOW = datetime(2026, 7, 1, tzinfo=UTC)
NONCE = bytes(range(32))
MRENCLAVE = bytes(range(32))
PLATFORM = IntelPlatform(NOW)
KEY, OTHER = Key.ec(), Key.ec()
SUBJECT = name(CN="RATLS")
DICE = ratls.OID_EVIDENCE


def claims_of(key: Key = KEY, algorithm: int = 1, **changes: Any) -> bytes:
    """Return the claims of *key*; other values by name, GONE removes one."""
    found: dict[str, Any] = {
        "pubkey-hash": cbor.dumps([algorithm, ratls.HASHES[algorithm](key.spki).digest()]),
        "nonce": NONCE,
    }
    found |= {item.replace("_", "-"): value for item, value in changes.items()}
    return cbor.dumps({item: value for item, value in found.items() if value is not GONE})


GONE = object()


def report_data(buffer: bytes) -> bytes:
    return hashlib.sha256(buffer).digest() + bytes(32)


def extension(
    buffer: bytes | None = None, *, quoted: bytes | None = None, td: bool = False, tag: int = 60000
) -> bytes:
    buffer = claims_of() if buffer is None else buffer
    data = report_data(buffer) if quoted is None else quoted
    quote = PLATFORM.td_quote(report_data=data) if td else PLATFORM.enclave_quote(report_data=data)
    return cbor.dumps(Tag(tag, [quote, buffer]))


def made(*extensions: tuple[str, bytes] | tuple[str, bool, bytes], **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "subject": SUBJECT,
        "issuer": SUBJECT,
        "key": KEY,
        "signer": KEY,
        "key_ids": False,
        "not_before": NOW - timedelta(days=1),
        "not_after": NOW + timedelta(days=1),
        "extensions": [(oid, any(rest[:-1]), rest[-1]) for oid, *rest in extensions],
    }
    return certificate(**(values | changes))


@cache
def collateral(tee: Literal["sgx", "tdx"]) -> dict[str, bytes]:
    return PLATFORM.endorsements(tee)


def judge(data: bytes, **changes: Any) -> AttestationResult:
    options: dict[str, Any] = {
        "policy": AppraisalPolicy(mrenclave=MRENCLAVE),
        "nonce": NONCE,
        "at": NOW,
        "roots": [PLATFORM.root],
        "endorsements": collateral("tdx" if changes.pop("td", False) else "sgx"),
    }
    return appraise(data, **(options | changes))


def key_set(*certificates: bytes, kid: str | None = None) -> bytes:
    keys = [
        {
            "kid": kid or f"key {index}",
            "kty": "EC",
            "x5c": [base64.b64encode(item).decode()],
        }
        for index, item in enumerate(certificates)
    ]
    return json.dumps({"keys": keys}).encode()


def attested(**changes: Any) -> bytes:
    text = ratls.key_forms(KEY.spki)["pem+nul"]
    data = changes.pop("quoted", hashlib.sha256(text).digest() + bytes(32))
    quote = PLATFORM.enclave_quote(report_data=data, **changes.pop("body", {}))
    return made((ratls.OIDS_OPEN_ENCLAVE[0], quote), **changes)


def judge_keys(data: bytes, **changes: Any) -> AttestationResult:
    return judge(data, nonce=None, freshness="not_checked", **changes)
